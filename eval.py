"""Score a model, an ensemble of several or files of captions with the scores that papers quote.

    python eval.py --checkpoint output_models/best_checkpoint.pth --beam_sizes 1,3,5
    python eval.py --checkpoint seed_1.pth seed_2.pth --output_json ensemble.json      # an ensemble
    python eval.py --model_path blip_finetuned_model/                                  # BLIP
    python eval.py --submission submission.csv --references test_captions.csv
    python eval.py --submission a.csv b.csv --references test_captions.csv             # which is better?
    python eval.py --boxes demo/boxes.json                         # does it look at what it names?
    python eval.py --worst 8 --figure worst.png                    # where is it wrong?
    python eval.py --per_image_csv a.csv                           # scores of each image, for this:
    python eval.py --compare a.csv b.csv
    torchrun --nproc_per_node 2 eval.py --checkpoint output_models/best_checkpoint.pth

A model captions the images of a prepared split by itself, without teacher forcing, and is scored against
all references of each image. The scores are those of the official COCO caption evaluation.
"""

from __future__ import annotations

import captioning.interrupts  # noqa: F401  before what takes seconds

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.annotations import Record
from captioning.comparison import compare_files, compare_models, print_intervals, verdict
from captioning.scoring import (
    COLUMNS,
    find_image_folder,
    prepared_records,
    reference_records,
    score_records,
    score_submission,
)
from captioning.submissions import escape_formula, write_submission
from metrics import Scores, score_captions
from utils import (
    LARGEST,
    Device,
    UserError,
    check_at_least,
    check_output,
    parallel_map,
    processes,
    progress_bar,
    run_script,
    write_json,
    write_table,
)

if TYPE_CHECKING:  # files of captions are scored without torch, which takes seconds to import
    import torch

    from captioning.captioner import Captioner

__all__ = ["Settings", "evaluate", "print_table", "score_submission"]


@dataclass
class Settings:
    checkpoint: tuple[str, ...] = ("output_models/best_checkpoint.pth",)  # a model; several are an ensemble
    model_path: str | None = None  # BLIP instead: a folder of train_model.py, or a model of the hub
    word_map: str | None = None  # word_map.json, for a checkpoint that has none
    data_folder: str = "data_output"  # what create_input_files.py wrote
    split: str = "test"  # train, val or test; also of references that name splits
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # a row of the table each
    length_penalty: float = 0.0  # compare captions by log-probability / length ** this
    device: Device = "auto"  # auto: a GPU where there is one
    batch_size: int = 32  # images searched at a time
    cache_features: bool = True  # take the encoder's output from train.py's cache, where there is one
    submission: tuple[str, ...] = ()  # score files of captions (CSV or COCO results JSON) instead of a model
    references: str | None = None  # annotations, any layout, to score submissions against
    image_folder: str | None = None  # the references' images, for --worst; None: test/test, if it is there
    partial: bool = False  # score a submission that lacks images or has unknown ones, on what it has
    output_json: str | None = None  # write the scores here too
    output_captions: str | None = None  # write the captions here: .csv, or .json for COCO results
    per_image_csv: str | None = None  # write each image's file, caption, references and scores here
    escape_formulas: bool = False  # put ' before ids and captions of CSVs that spreadsheets take for formulas
    worst: int = 0  # draw this many images with the lowest CIDEr
    figure: str = "worst.png"  # file that --worst draws
    boxes: str | None = None  # boxes.json or COCO instances JSON: score where a model looks
    compare: tuple[str, ...] = ()  # two files of --per_image_csv: is the second better by more than chance?

    def __post_init__(self):
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "worst")
        check_at_least(self, -100, "length_penalty")
        if not self.beam_sizes or min(self.beam_sizes) < 1 or max(self.beam_sizes) > LARGEST["beam_size"]:
            raise UserError(f"--beam_sizes is {self.beam_sizes}: give numbers from 1 to 1000, such as 1,3,5")
        if bool(self.submission) != (self.references is not None):
            raise UserError("--submission and --references belong together: give both")
        if self.submission and self.boxes:
            raise UserError("--boxes needs a model, which looks: leave --submission out")
        if self.compare and len(self.compare) != 2:
            raise UserError("--compare takes two files, as --per_image_csv writes them")


def main(settings: Settings) -> None:
    if settings.compare:
        compare_files(*settings.compare)
        return
    outputs = [settings.output_json, settings.output_captions, settings.per_image_csv]
    for output in [*filter(None, outputs), *[settings.figure] * bool(settings.worst)]:
        check_output(output)
    if settings.submission:
        rows, records = score_submissions(settings)
    else:
        rows, records = evaluate(settings), prepared_records(settings.data_folder, settings.split)
        if not processes().is_main_process:
            return
        if settings.boxes:
            point(rows, records, settings)
    print_table(rows)
    if settings.submission:
        print_comparisons(rows, records)
    write_results(rows, records, settings)


# --- models -------------------------------------------------------------------------------------------------


def evaluate(settings: Settings) -> list[dict]:
    """Caption and score a prepared split with each beam size.

    Under torchrun or accelerate the images are shared out, each to one process.

    Returns:
        A dictionary a beam size: "beam_size", "images", "processes", "images_per_second" (encoding and
        search), "features" ("computed" or "cached"), "captions" {id: caption}, "scores" (Scores). Empty in
        all processes but the main one.
    """
    from accelerate.utils import gather_object

    from captioning.captioner import Captioner
    from captioning.features import cached_features
    from captioning.prepared import read_prepared

    state = processes()
    prepared_size = read_prepared(settings.data_folder)["settings"]["image_size"]
    references = read_references(settings.data_folder, settings.split)
    if settings.model_path:
        return evaluate_pretrained(settings, references) if state.is_main_process else []
    captioner = Captioner.load(settings.checkpoint, settings.word_map)
    if prepared_size != captioner.image_size:
        raise UserError(
            f"{settings.data_folder}: images of {prepared_size} pixels, but the model was trained on "
            f"{captioner.image_size}; prepare the data with --image_size {captioner.image_size}"
        )
    caches = None
    if settings.cache_features:
        caches = [
            cached_features(encoder, settings.data_folder, settings.split) for encoder in captioner.encoders
        ]
        caches = None if None in caches else caches
    with state.split_between_processes(list(range(len(references)))) as indices:
        texts, seconds = caption_images(captioner, indices, caches, settings)
    gathered = gather_object([(indices, texts, seconds)])
    if not state.is_main_process:
        return []
    ids = list(references)
    rows = []
    for beam_size in settings.beam_sizes:
        captions = dict.fromkeys(ids, "")
        for indices, texts, _ in gathered:
            captions.update(zip((ids[index] for index in indices), texts[beam_size], strict=True))
        slowest = max(seconds["encoding"] + seconds[beam_size] for _, _, seconds in gathered)
        rows.append(
            {
                "beam_size": beam_size,
                "images": len(ids),
                "processes": state.num_processes,
                "images_per_second": len(ids) / slowest,
                "features": "cached" if caches else "computed",
                "captions": captions,
                "scores": score_captions(references, captions),
            }
        )
    return rows


def evaluate_pretrained(settings: Settings, references: dict[str, list[str]]) -> list[dict]:
    """`evaluate` for BLIP, which prepares the image files by itself."""
    captioner = load_model(settings)
    records = prepared_records(settings.data_folder, settings.split)
    batches = [records[i : i + settings.batch_size] for i in range(0, len(records), settings.batch_size)]
    rows = []
    for beam_size in settings.beam_sizes:
        captions, began = {}, time.perf_counter()
        for batch in progress_bar(batches, desc=f"beam {beam_size}", unit="batch"):
            texts = captioner.caption([record.path for record in batch], beam_size)
            captions.update(zip([record.image_id for record in batch], texts))
        row = {"beam_size": beam_size, "images": len(records), "processes": 1}
        row["images_per_second"] = len(records) / (time.perf_counter() - began)
        scores = score_captions(references, captions)
        rows.append(row | {"features": "computed", "captions": captions, "scores": scores})
    return rows


def load_model(settings: Settings):
    from captioning.captioner import Captioner

    if not settings.model_path:
        return Captioner.load(settings.checkpoint, settings.word_map)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Captioner.load(settings.model_path)


def read_references(data_folder: str | Path, split: str) -> dict[str, list[str]]:
    """All captions of each image of a prepared split, by its id, in the order of the HDF5 file."""
    records = prepared_records(data_folder, split)
    if not all(record.captions for record in records):
        raise UserError(
            f"{data_folder}: images of the {split} split have no captions to score against; prepare it with "
            f"--test_annotations FILE, or caption the folder and give --submission and --references"
        )
    return {record.image_id: record.captions for record in records}


def caption_images(
    captioner: Captioner, indices: list[int], caches: list[Path] | None, settings: Settings
) -> tuple[dict[int, list[str]], dict]:
    """The captions of some images with each beam size, and the seconds of "encoding" and of each size.

    Each image is encoded once for all beam sizes.
    """
    import torch

    texts: dict[int, list[str]] = {beam_size: [] for beam_size in settings.beam_sizes}
    seconds = dict.fromkeys(("encoding", *settings.beam_sizes), 0.0)
    device = captioner.decoders[0].fc.weight.device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with progress_bar(
        total=len(indices), desc="evaluation", unit="image", disable=not processes().is_main_process
    ) as progress:
        for stored in read_batches(captioner, indices, caches, settings):
            began = clock()
            grids = [features.to(device) for features in stored] if caches else captioner.encode(stored[0])
            ended = clock()
            seconds["encoding"] += ended - began
            for beam_size in settings.beam_sizes:
                began = ended
                found = captioner.search(grids, beam_size, settings.length_penalty)
                texts[beam_size] += [captioner.text(hypothesis) for hypothesis in found]
                ended = clock()
                seconds[beam_size] += ended - began
            progress.update(len(stored[0]))
    return texts, seconds


def read_batches(
    captioner: Captioner, indices: list[int], caches: list[Path] | None, settings: Settings
) -> Iterator[list[torch.Tensor]]:
    """Batches of images, or of each encoder's features; a thread reads ahead."""
    import torch

    from captioning.features import open_features
    from captioning.prepared import Prepared

    data, split = Prepared(settings.data_folder), settings.split
    stored = [open_features(file, data, split) for file in caches] if caches else [data.images(split)]
    try:
        batches = [
            indices[start : start + settings.batch_size]
            for start in range(0, len(indices), settings.batch_size)
        ]

        def read(batch: list[int]) -> list[torch.Tensor]:
            return [torch.from_numpy(rows.read(batch)) for rows in stored]

        yield from parallel_map(read, batches, workers=1)
    finally:
        for rows in stored:
            rows.file.close()


def point(rows: list[dict], records: Sequence[Record], settings: Settings) -> None:
    """Add to each row "pointing": whether the model looks at what it names, with the row's beam size."""
    from captioning.interface import describe_files
    from captioning.pointing import pointing_score, read_boxes

    paths = {record.image_id: record.path for record in records}
    boxes = read_boxes(settings.boxes, paths)
    captioner = load_model(settings)
    for row in rows:
        captions, problems = describe_files(captioner, paths, row["beam_size"], settings.batch_size)
        for problem in problems:
            print(f"left out: {problem}")
        row["pointing"] = pointing_score(captions, *boxes)


# --- files of captions --------------------------------------------------------------------------------------


def score_submissions(settings: Settings) -> tuple[list[dict], list[Record]]:
    """A row for each file of captions, and the references' records."""
    folder = find_image_folder(settings.references, settings.image_folder)
    records = reference_records(settings.references, settings.split, folder)
    rows = [
        {"model": file} | score_records(file, records, settings.references, settings.partial)
        for file in settings.submission
    ]
    return rows, records


def print_comparisons(rows: list[dict], records: Sequence[Record]) -> None:
    """The paired bootstrap of each two rows, on the images that both have captions for."""
    for first, second in combinations(rows, 2):
        names = first["model"], second["model"]
        if first["captions"].keys() != second["captions"].keys():
            print(f"\n{names[0]} and {names[1]} have captions of other images: not compared")
            continue
        wanted = {record.image_id: record.captions for record in records}
        references = {image_id: wanted[image_id] for image_id in first["captions"]}
        found = compare_models(
            references,
            [row["captions"] for row in (first, second)],
            [row["scores"] for row in (first, second)],
        )
        print(f"\n{names[1]} less {names[0]}, 95 % interval of a paired bootstrap over the images:")
        print_intervals(found["intervals"])
        print(
            f"by CIDEr {names[1]} wins {found['wins']} images, loses {found['losses']}, ties {found['ties']}"
            f"; {found['identical']:.1%} of the captions are the same"
        )
        print(verdict(found["intervals"]["CIDEr"], "CIDEr", *names))


# --- results ------------------------------------------------------------------------------------------------


def print_table(rows: list[dict]) -> None:
    """A line a row, named by its "model", else by its beam size."""
    first = "model" if "model" in rows[0] else "beam"
    names = [str(row.get("model") or row["beam_size"] or "-") for row in rows]
    width = max(map(len, [first, *names]))
    searched = "images_per_second" in rows[0]
    header = " ".join(f"{title:>7}" for title in COLUMNS.values())
    print(f"{first:{width}} {header}{'  images/s' if searched else ''}")
    for name, row in zip(names, rows):
        scores: Scores = row["scores"]
        cells = [f"{scores.overall[key]:7.4f}" if key in scores.overall else f"{'-':>7}" for key in COLUMNS]
        rate = f"  {row['images_per_second']:10.1f}" if searched else ""
        print(f"{name:{width}} {' '.join(cells)}{rate}")
    note = f", features {rows[0]['features']}" if searched else ""
    print(f"{rows[0]['images']} images{note}")
    for name, row in zip(names, rows):
        if "pointing" in row:
            print_pointing(f"{first} {name}", row["pointing"])


def print_pointing(name: str, pointing) -> None:
    if not pointing.words:
        print(f"{name}: no word of the captions names an object that has a box")
        return
    absent = f"; {pointing.absent} words name an object that has no box there" if pointing.absent else ""
    print(
        f"{name}: attention points at the object for {pointing.score:.1%} of {pointing.words} object words, "
        f"a uniform guess for {pointing.chance:.1%}{absent}"
    )


def write_results(rows: list[dict], records: Sequence[Record], settings: Settings) -> None:
    written = []
    if settings.output_json:
        write_json(settings.output_json, summary(rows, settings))
        written.append(settings.output_json)
    if settings.output_captions:
        path = Path(settings.output_captions)
        for i, row in enumerate(rows, start=1):
            name = f"{path.stem}_beam{row['beam_size']}" if row["beam_size"] else f"{path.stem}_{i}"
            file = path if len(rows) == 1 else path.with_stem(name)
            write_submission(file, list(row["captions"].items()), escape_formulas=settings.escape_formulas)
            written.append(str(file))
    if settings.per_image_csv:
        lines = per_image_lines(rows, records)
        if settings.escape_formulas:
            lines = [{name: escape_formula(value) for name, value in line.items()} for line in lines]
        write_table(settings.per_image_csv, lines)
        written.append(settings.per_image_csv)
    if settings.worst:
        draw_worst(rows[0], records, settings)
        written.append(settings.figure)
    if written:
        print(f"written: {', '.join(written)}")


def summary(rows: list[dict], settings: Settings) -> dict:
    """The content of --output_json."""
    scores = []
    for row in rows:
        plain = {key: value for key, value in row.items() if key not in ("captions", "scores", "pointing")}
        if "pointing" in row:
            found = row["pointing"]
            plain["pointing"] = {"score": found.score, "chance": found.chance, "words": found.words}
        scores.append(plain | row["scores"].overall)
    source = {"submission": settings.submission, "references": settings.references}
    if not settings.submission:
        source = {
            "checkpoint": settings.model_path or settings.checkpoint,
            "data_folder": settings.data_folder,
        }
    return source | {"split": settings.split, "scores": scores}


def per_image_lines(rows: list[dict], records: Sequence[Record]) -> list[dict]:
    """The lines of --per_image_csv."""
    known = {record.image_id: record for record in records}
    return [
        {
            "image_id": image_id,
            "image": known[image_id].path or "",
            "model": row.get("model", ""),
            "beam_size": row["beam_size"],
            "caption": row["captions"][image_id],
            "references": " | ".join(known[image_id].captions),
        }
        | scores
        for row in rows
        for image_id, scores in row["scores"].per_image.items()
    ]


def draw_worst(row: dict, records: Sequence[Record], settings: Settings) -> None:
    """A figure of the images with the lowest CIDEr in a row, the worst first."""
    from captioning.figures import draw_captions

    known = {record.image_id: record for record in records if record.path}
    scores = {key: own for key, own in row["scores"].per_image.items() if key in known}
    if not scores:
        raise UserError("no image files to draw: give --image_folder, the folder of the references' images")
    worst = sorted(scores, key=lambda key: (scores[key]["CIDEr"], scores[key]["ROUGE_L"]))[: settings.worst]
    lines = [
        (
            known[key].path,
            f"{key}   CIDEr {scores[key]['CIDEr']:.2f}",
            row["captions"][key],
            known[key].captions,
        )
        for key in worst
    ]
    draw_captions(settings.figure, lines)


if __name__ == "__main__":
    run_script(main, Settings)
