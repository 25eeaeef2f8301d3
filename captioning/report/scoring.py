"""Scores of captions against their references: of a file of captions, of a prepared split."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.data.annotations import as_paths, read_annotations, test_records
from captioning.data.image_names import NameIndex, join_same_names, parts_of, stem
from captioning.data.images import parallel_map
from captioning.data.prepared import Prepared, Record, Rows
from captioning.data.submissions import ScoredCaption, read_submission
from captioning.data.tables import Columns
from captioning.data.text_files import require_words, say_once
from captioning.decoding.options import DecodingOptions
from metrics import Scores, score_captions, tokenize
from metrics.ngrams import LONGEST_NGRAM, named_bleu
from utils import UserError, counted, processes, progress_bar, say

if TYPE_CHECKING:
    import torch

    from captioning.captioners.attention import Captioner
    from captioning.captioners.base import BaseCaptioner


# --- scores -------------------------------------------------------------------------------------------------

COLUMNS = {  # scores, and how tables call them
    "Bleu_1": "BLEU-1",
    "Bleu_2": "BLEU-2",
    "Bleu_3": "BLEU-3",
    "Bleu_4": "BLEU-4",
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr",
}


def report_scores(references: Mapping[str, Sequence[str]], captions: Mapping[str, str]) -> Scores:
    """The official scores of captions by image id (`metrics.score_captions`), but with `matched_bleu`, by
    which BLEU without a match is 0."""
    scores = score_captions(references, captions)
    total = [sum(column) for column in zip(*scores.bleu_counts.values())]
    per_image = {
        image_id: of_image | matched_bleu(scores.bleu_counts[image_id])
        for image_id, of_image in scores.per_image.items()
    }
    return replace(scores, overall=scores.overall | matched_bleu(total), per_image=per_image)


def matched_bleu(counts: Sequence[float]) -> dict[str, float]:
    """Bleu_1 to Bleu_4 from the counts of `metrics.ngrams.bleu_counts`; 0 where no n-gram matches.

    The official evaluation adds small constants, which leave up to 2e-4 there, and up to 0.03 where captions
    are too short to have an n-gram. Such numbers say nothing about the captions but differ between models.
    """
    matched = counts[-LONGEST_NGRAM:]  # for n = 1 to 4
    return {
        name: score if all(matched[:n]) else 0.0
        for n, (name, score) in enumerate(named_bleu(counts).items(), start=1)
    }


# --- references ---------------------------------------------------------------------------------------------


def prepared_records(data_folder: str | Path, split: str) -> list[Record]:
    """The images of a prepared split with all their captions, in the order of the HDF5 file.

    Raises:
        UserError: there is no such split, or two of its images share an id.
    """
    folder, records = Path(data_folder), Prepared(data_folder).records(split)
    if len({record.image_id for record in records}) < len(records):
        raise UserError(
            f"{folder}: images of the {split} split share an id; give each its own and prepare it anew"
        )
    return records


def prepared_references(data_folder: str | Path, split: str) -> dict[str, list[str]]:
    """All captions of each image of a prepared split, by its id, in the order of the HDF5 file.

    Raises:
        UserError: as in `prepared_records`, or if an image has no caption.
    """
    records = prepared_records(data_folder, split)
    if not all(record.captions for record in records):
        raise UserError(
            f"{data_folder}: images of the {split} split have no captions to score against; prepare it with "
            f"--test_annotations FILE, or caption the folder and give --submission and --references"
        )
    return {record.image_id: record.captions for record in records}


def training_texts(data_folder: str | Path) -> tuple[set[str] | None, set[tuple[str, ...]] | None]:
    """The vocabulary and the training captions of prepared data; None, None if the folder has no such
    data."""
    folder = Path(data_folder)
    if not (folder / "prepared.json").is_file():
        return None, None
    records = prepared_records(folder, "train")
    texts = {tuple(tokenize(text)) for record in records for text in record.captions}
    return {word for words in texts for word in words}, texts


Files = str | Path | Sequence[str | Path]  # one or several


def reference_records(
    references: Files,
    split: str = "test",
    image_folders: Files | None = None,
    columns: Columns | None = None,
) -> list[Record]:
    """The captioned images of annotations in any layout, of the `split` if they name splits.

    Raises:
        UserError: a file is damaged, or there are no captions of that split.
    """
    records = read_annotations(references, image_folders, columns)
    records = [record for record in test_records(records, split) if record.captions]
    if image_folders is None:
        records = join_same_names(records, names_of(references))
    if not records:
        if columns is not None:
            columns.check()
        raise UserError(f"{names_of(references)}: no captions of the {split} split in it to score against")
    return records


def names_of(files: Files) -> str:
    """The files' names, for a message."""
    return ", ".join(map(str, as_paths(files)))


def find_image_folders(references: Files, given: Sequence[str]) -> Sequence[str] | None:
    """The folders of a submission's images: those that are given, else test/test/ beside the references or
    here, else None.

    Raises:
        UserError: a folder does not exist.
    """
    for folder in given:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder of images; give the one that holds the image files")
    beside = [Path(file).parent / "test" / "test" for file in as_paths(references)]
    found = [str(folder) for folder in [*beside, Path("test/test")] if folder.is_dir()]
    return given or found[:1] or None


# --- files of captions --------------------------------------------------------------------------------------


def score_submission(
    submission: str | Path,
    references: Files,
    split: str = "test",
    partial: bool = False,
    columns: Columns | None = None,
) -> dict:
    """Score a file of captions against annotations in any layout.

    Args:
        split: the references' split to score against, if they name splits (Karpathy's JSON).
        partial: score the images that both files have.
        columns: names of columns that the user gives, in either file.

    Returns:
        "images", "missing" and "unknown" (numbers), "captions" {id: caption}, "scores" (Scores), and
        "beam_size", which is None.

    Raises:
        UserError: as in `match_submission` and `reference_records`.
    """
    records = reference_records(references, split, columns=columns)
    (row,) = score_files([submission], records, names_of(references), partial, columns)
    return row


def score_files(
    submissions: Sequence[str | Path],
    records: Sequence[Record],
    whose: str,
    partial: bool = False,
    columns: Columns | None = None,
) -> list[dict]:
    """What `score_submission` returns, of each file, for references that have been read already, those of
    `whose`. Several files are scored on the images that all of them have; lines say what is left out."""
    texts = {record.image_id: record.captions for record in records}
    matched = [match_submission(file, records, whose, partial, columns) for file in submissions]
    common = find_common(submissions, [captions for captions, _, _ in matched])
    if not common:
        raise UserError(f"{', '.join(map(str, submissions))}: no image that all have; score each by itself")
    rows = []
    for file, (captions, missing, unknown) in zip(submissions, matched):
        apart = [f"{len(missing)} missing"] if missing else []
        apart += [f"{counted(len(unknown), 'unknown row')} left out"] if unknown else []
        if apart:
            images = counted(len(texts), "image")
            say(f"PARTIAL: {file} has captions of {len(captions)} of {images}, {', '.join(apart)}")
        captions = {image_id: caption for image_id, caption in captions.items() if image_id in common}
        row = {"beam_size": None, "images": len(common), "missing": len(missing), "unknown": len(unknown)}
        rows.append(row | {"captions": captions})
    for row in rows:
        row["scores"] = report_scores({key: texts[key] for key in row["captions"]}, row["captions"])
    return rows


def find_common(names: Sequence[str | Path], captions: Sequence[Mapping[str, str]]) -> set[str]:
    """The images that all have, so that their scores can be compared; a line says how many are left out.

    Args:
        names: of the files or models. captions: of each, by image id.
    """
    common = set.intersection(*map(set, captions))
    left_out = [f"{len(own) - len(common)} of {name}" for name, own in zip(names, captions)]
    left_out = [part for part in left_out if not part.startswith("0 ")]
    if common and left_out:
        images = counted(len(common), "image")
        say(f"PARTIAL: scored on the {images} that all have; left out: {', '.join(left_out)}")
    return common


def match_submission(
    submission: str | Path,
    records: Sequence[Record],
    whose: str,
    partial: bool = False,
    columns: Columns | None = None,
) -> tuple[dict[str, str], list[str], list[str]]:
    """Read a file of captions and find the caption of each of the records; print how many are empty.

    Args:
        whose: the file that the records are from, for messages.
        partial: let ids be missing or unknown.
        columns: names of columns that the user gives.

    Returns:
        {image id: caption}; the ids that the file lacks; the file's ids that are no record's.

    Raises:
        UserError: the file is damaged, an id occurs twice or, unless `partial`, is missing or unknown.
    """
    rows = read_submission(submission, columns)
    known_ids = match_ids([image_id for image_id, _ in rows], records, f"{submission}", whose)
    doubled = [image_id for image_id, count in Counter(filter(None, known_ids)).items() if count > 1]
    refuse(submission, doubled, "given more than once", "leave one row of each")
    captions = {known: caption for known, (_, caption) in zip(known_ids, rows) if known}
    require_words(captions.values(), submission)
    missing = [record.image_id for record in records if record.image_id not in captions]
    unknown = [image_id for known, (image_id, _) in zip(known_ids, rows) if not known]
    if not captions:
        raise UserError(
            f"{submission}: none of its {len(rows)} ids ({', '.join(unknown[:3])}, ...) is among those of "
            f"{whose} ({', '.join(missing[:3])}, ...); give files of the same images"
        )
    if not partial:
        refuse(submission, missing, "missing", f"add what {whose} has, or give --partial")
        refuse(submission, unknown, f"unknown to {whose}", "remove them, or give --partial")
    empty = sum(not caption.strip() for caption in captions.values())
    if empty:
        say(f"{submission}: {empty} of {len(captions)} captions are empty; they count as wrong")
    return captions, missing, unknown


def match_ids(names: Sequence[str], records: Sequence[Record], source: str, whose: str) -> list[str | None]:
    """The id of the record that each name means, None if it means none; a line says what was matched loosely.

    Names are compared with the ids as they stand, with the names of the image files, and then with both as
    `NameIndex` does: without an image file's extension, by COCO's number, by the longest end of the path.
    """
    ids = {record.image_id for record in records}
    by_file = {name: one.image_id for one in records if (name := one.file_name or one.path)}
    plain = _plain_names(by_file)
    by_name, by_id = NameIndex(by_file), NameIndex(one.image_id for one in records)
    found, loose = [], []
    for name in names:
        known = name if name in ids else plain.get(name)
        known = known or by_file.get(by_name.find(name)) or by_id.find(name)
        found.append(known)
        if known and name not in plain and stem(known) != stem(name):
            loose.append(f"{name} with {known} of {whose}")
    if loose:
        shown = counted(len(loose), "id")
        say_once(f"{source}: {shown} matched by the end of the path or by the number: {loose[0]}")
    return found


def _plain_names(by_file: Mapping[str, str]) -> dict[str, str]:
    """The ids by the names of the image files without folders or extension, unless two have the same."""
    names = []
    for name, image_id in by_file.items():
        last = parts_of(name)[-1] if parts_of(name) else name
        names += [(alias, image_id) for alias in {name, stem(name), last, stem(last)}]
    counts = Counter(alias for alias, _ in names)
    return {alias: image_id for alias, image_id in names if counts[alias] == 1}


def refuse(file: str | Path, ids: Sequence[str], what: str, remedy: str) -> None:
    """Raise UserError if there are any `ids`, naming the first ten."""
    if ids:
        some = ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")
        raise UserError(f"{file}: {counted(len(ids), 'id')} {what} ({some}); {remedy}")


# --- captions of a prepared split ---------------------------------------------------------------------------

Decoded = dict[Any, list[list[ScoredCaption]]]  # by the name of the options: the captions of each image


def open_split(
    captioner: Captioner, data_folder: str | Path, split: str, cache_features: bool
) -> tuple[list[Rows], str]:
    """Open a prepared split's images, or its cached features.

    cache_features: use the cache if it has the features of every encoder.

    Returns:
        The images and "computed", or the features for each encoder and "cached".
    """
    from captioning.data.features import cached_features, open_features  # here, as they import torch

    data = Prepared(data_folder)
    if cache_features:
        caches = [cached_features(encoder, data_folder, split) for encoder in captioner.encoders]
        if None not in caches:
            return [open_features(file, data, split) for file in caches], "cached"
    return [data.images(split)], "computed"


def decode_split(
    captioner: Captioner,
    ids: Sequence[str],
    indices: Sequence[int],
    stored: Sequence[Rows],
    options: Mapping[Any, DecodingOptions],
    batch_size: int,
) -> tuple[Decoded, dict[Any, float]]:
    """Caption some images of a split with each of several decoding options; each image is encoded once.

    Args:
        ids: of all images of the split.
        indices: of the images to caption.
        stored: the split's images, or its features for each of the captioner's encoders.
        options: by names of your choice.

    Returns:
        By those names the captions of each image; the seconds that "encoding" and each search took.
    """
    import torch  # here, as it takes longer than all that a file of captions needs

    decoded: Decoded = {name: [] for name in options}
    seconds = dict.fromkeys(("encoding", *options), 0.0)
    device = captioner.decoders[0].fc.weight.device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with progress_bar(
        total=len(indices), desc="evaluation", unit="image", disable=not processes().is_main_process
    ) as progress:
        for batch_indices, values in read_batches(indices, stored, batch_size):
            began = clock()
            is_images = values[0].dtype == torch.uint8
            grids = captioner.encode(values[0]) if is_images else [features.to(device) for features in values]
            ended = clock()
            seconds["encoding"] += ended - began
            batch_ids = [ids[index] for index in batch_indices]
            for name, options_of_name in options.items():
                began = ended
                decoded[name] += captioner.scored(captioner.decode(grids, options_of_name, batch_ids))
                ended = clock()
                seconds[name] += ended - began
            progress.update(len(batch_indices))
    return decoded, seconds


def read_batches(
    indices: Sequence[int], stored: Sequence[Rows], batch_size: int
) -> Iterator[tuple[Sequence[int], list[torch.Tensor]]]:
    """Yield batches of indices with their rows of each of `stored`. A thread reads ahead; the files are
    closed at the end."""
    import torch

    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]

    def read(batch: Sequence[int]) -> tuple[Sequence[int], list[torch.Tensor]]:
        return batch, [torch.from_numpy(rows.read(batch)) for rows in stored]

    try:
        yield from parallel_map(read, batches, workers=1)
    finally:
        for rows in stored:
            rows.file.close()


def decode_files(
    captioner: BaseCaptioner,
    records: Sequence[Record],
    options: Mapping[Any, DecodingOptions],
    batch_size: int,
    with_scores: bool = False,
) -> tuple[Decoded, dict[Any, float]]:
    """Do what `decode_split` does from image files, for a captioner that prepares them itself. Each image is
    encoded anew for each of the options."""
    decoded: Decoded = {name: [] for name in options}
    seconds = dict.fromkeys(("encoding", *options), 0.0)
    batches = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    for name, options_of_name in options.items():
        began = time.perf_counter()
        for batch in progress_bar(batches, desc=f"evaluation, {name}", unit="batch"):
            images = [captioner.prepare(record.path) for record in batch]
            ids = [record.image_id for record in batch]
            decoded[name] += captioner.decode_prepared(images, options_of_name, ids, with_scores)
        seconds[name] = time.perf_counter() - began
    return decoded, seconds
