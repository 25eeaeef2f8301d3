"""From a folder of images to a file of captions, and back from such a file.

Two formats, by the file's extension: a CSV `image_id,caption` as Kaggle takes it, and COCO results JSON,
`[{"image_id": 391895, "caption": "..."}, ...]`, as the official evaluation server takes it.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from captioning.annotations import ImageFinder, read_annotations, require_image
from captioning.images import list_images
from utils import UserError, atomic_write, check_output, parallel_map, progress_bar, read_json, write_json


def find_images(test_folder: str | Path, test_csv: str | Path | None = None) -> list[tuple[str, str | None]]:
    """(id, path) of each image to caption; the path is None where there is no file.

    With a test.csv, given or found in the folder or up to two folders above it, its ids in its order;
    otherwise every image of the folder in natural order, by its name without extension.
    """
    folder = Path(test_folder)
    finder = ImageFinder(folder)
    if test_csv is not None:
        return [(image.image_id, image.path) for image in read_annotations(test_csv, folder)]
    resolved = folder.resolve()
    for parent in (resolved, resolved.parent, resolved.parent.parent):
        if (parent / "test.csv").is_file():
            ids = [image.image_id for image in read_annotations(parent / "test.csv")]
            if any(finder(image_id) for image_id in ids):  # otherwise it is about other images
                return [(image_id, finder(image_id)) for image_id in ids]
    paths = list_images(folder)
    stems = Counter(path.stem for path in paths)
    return [(path.stem if stems[path.stem] == 1 else path.name, str(path)) for path in paths]


def caption_folder(
    test_folder: str | Path,
    test_csv: str | Path | None,
    output: str | Path,
    read: Callable,
    caption: Callable[[list], list[str]],
    batch_size: int,
    workers: int,
) -> list[str]:
    """Caption the images that `find_images` finds and write the file `output`.

    Threads read images while the model works on the batch before.

    Args:
        read: an image's path -> what `caption` takes; raises UserError for an image that cannot be read.
        caption: what was read of up to `batch_size` images -> their captions.

    Returns:
        What was wrong with the images that could not be read, one line each; their captions are empty.

    Raises:
        UserError: wrong input, or not one readable image.
    """
    check_output(output)
    rows = find_images(test_folder, test_csv)
    captions: dict[str, str] = {}
    failed: list[str] = []

    def read_row(row: tuple[str, str | None]) -> tuple[str, object, str]:
        image_id, path = row
        try:
            return image_id, read(require_image(image_id, path, test_folder)), ""
        except UserError as error:
            return image_id, None, str(error)

    def readable() -> Iterator[tuple[str, object]]:
        results = parallel_map(read_row, rows, workers, ahead=2 * batch_size)
        for image_id, image, problem in progress_bar(
            results, total=len(rows), desc="captioning", unit="image"
        ):
            if problem:
                print(f"no caption: {problem}", file=sys.stderr)
                failed.append(problem)
            else:
                yield image_id, image

    batch: list[tuple[str, object]] = []

    def caption_batch() -> None:
        if batch:
            ids, images = zip(*batch)
            captions.update(zip(ids, caption(list(images)), strict=True))
            batch.clear()

    for item in readable():
        batch.append(item)
        if len(batch) == batch_size:
            caption_batch()
    caption_batch()
    if not captions:
        raise UserError(f"{test_folder}: not one readable image among {len(rows)}")
    write_submission(output, [(image_id, captions.get(image_id, "")) for image_id, _ in rows])
    empty = f", {len(failed)} left empty" if failed else ""
    print(f"{len(rows) - len(failed)} images captioned in {output}{empty}")
    return failed


def write_submission(path: str | Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write (id, caption) rows: as COCO results where the file's name ends in .json, else as a CSV."""
    if Path(path).suffix.lower() == ".json":
        write_json(path, [{"image_id": coco_id(image_id), "caption": text} for image_id, text in rows])
        return
    with atomic_write(path) as tmp_path, tmp_path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("image_id", "caption"))
        writer.writerows(rows)


def coco_id(image_id: str) -> int | str:
    """COCO's number of an image: its file names are like COCO_val2014_000000391895.jpg. Other ids stay."""
    number = re.fullmatch(r"(?:COCO_\w+?_)?0*(\d+)(?:\.jpg)?", image_id)
    return int(number[1]) if number else image_id


def read_submission(path: str | Path) -> list[tuple[str, str]]:
    """The (id, caption) rows of a CSV or a COCO results JSON, in file order, doubled ones too.

    Raises:
        UserError: the file is missing, damaged or of another layout, or holds no row.
    """
    path = Path(path)
    rows = _read_results(path) if path.suffix.lower() == ".json" else _read_rows(path)
    if not rows:
        raise UserError(f"{path}: no captions in it")
    return rows


def _read_results(path: Path) -> list[tuple[str, str]]:
    content = read_json(path)
    try:
        rows = [(str(entry["image_id"]), entry["caption"]) for entry in content]
        if all(isinstance(caption, str) for _, caption in rows):
            return rows
    except (KeyError, TypeError):
        pass
    raise UserError(f'{path}: not COCO results; expected [{{"image_id": 1, "caption": "a dog"}}, ...]')


def _read_rows(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="rest", restval="")
            columns = [(name or "").strip() for name in reader.fieldnames or []]
            if columns[:2] not in (["image_id", "caption"], ["image", "caption"]):
                raise UserError(f"{path}: its first line is not image_id,caption")
            reader.fieldnames = columns
            rows = []
            for row in reader:
                if len(row.get("rest", [])) or len(columns) > 2:
                    raise UserError(
                        f"{path}, line {reader.line_num}: more than two columns; quote captions with commas"
                    )
                rows.append((row[columns[0]].strip(), row["caption"]))
            return rows
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of captions") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from None
