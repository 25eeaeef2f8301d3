"""Score a model, an ensemble of several or a file of captions with the scores that papers quote.

    python eval.py --checkpoint output_models/best_checkpoint.pth --beam_sizes 1,3,5
    python eval.py --checkpoint seed_1.pth seed_2.pth --output_json ensemble.json      # an ensemble
    python eval.py --submission submission.csv --references test_captions.csv
    torchrun --nproc_per_node 2 eval.py --checkpoint output_models/best_checkpoint.pth

A model captions the images of a prepared split by itself, with no true words put in, and is scored against
all references of each image. The scores are those of the official COCO caption evaluation.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import torch
from accelerate.utils import gather_object

from captioning.annotations import read_annotations
from captioning.captioner import Captioner
from captioning.features import cached_features
from captioning.images import IMAGE_EXTENSIONS
from captioning.submissions import coco_id, read_submission, write_submission
from datasets import read_prepared
from metrics import Scores, score_captions
from utils import (
    UserError,
    check_at_least,
    check_output,
    parallel_map,
    processes,
    progress_bar,
    read_json,
    run_script,
    write_json,
    write_table,
)


@dataclass
class Settings:
    checkpoint: tuple[str, ...] = ("output_models/best_checkpoint.pth",)  # a model; several are an ensemble
    word_map: str | None = None  # word_map.json, for a checkpoint that has none
    data_folder: str = "data_output"  # what create_input_files.py wrote
    split: str = "test"  # train, val or test; also of references that name splits
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # a row of the table each
    length_penalty: float = 0.0  # compare captions by log-probability / length ** this
    batch_size: int = 32  # images searched at a time
    cache_features: bool = True  # take the encoder's output from train.py's cache, where there is one
    submission: str | None = None  # score this file of captions (CSV or COCO results JSON) instead of a model
    references: str | None = None  # annotations, any layout, to score the submission against
    partial: bool = False  # score a submission that lacks images or has unknown ones, on what it has
    output_json: str | None = None  # write the scores here too
    output_captions: str | None = None  # write the captions here: .csv, or .json for COCO results
    per_image_csv: str | None = None  # write the scores of each image here

    def __post_init__(self):
        check_at_least(self, 1, "batch_size")
        if not self.beam_sizes or min(self.beam_sizes) < 1:
            raise UserError(f"--beam_sizes is {self.beam_sizes}: give numbers of at least 1, such as 1,3,5")
        if (self.submission is None) != (self.references is None):
            raise UserError("--submission and --references belong together: give both")


def main(settings: Settings) -> None:
    for output in (settings.output_json, settings.output_captions, settings.per_image_csv):
        if output:
            check_output(output)
    if settings.submission:
        rows = [score_submission(settings.submission, settings.references, settings.split, settings.partial)]
    else:
        rows = evaluate(settings)
    if processes().is_main_process:
        print_table(rows)
        write_results(rows, settings)


# --- models -------------------------------------------------------------------------------------------------


def evaluate(settings: Settings) -> list[dict]:
    """Caption and score a prepared split with each beam size.

    Under torchrun or accelerate the images are shared out, each to one process.

    Returns:
        A dictionary a beam size: "beam_size", "images", "processes", "images_per_second" (encoding and
        search), "features" ("computed" or "cached"), "captions" {id: caption}, "scores" (Scores). Empty in
        all processes but the main one.
    """
    state = processes()
    references = read_references(settings.data_folder, settings.split)
    captioner = Captioner.load(settings.checkpoint, settings.word_map)
    prepared_size = read_prepared(settings.data_folder)["settings"]["image_size"]
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


def read_references(data_folder: str | Path, split: str) -> dict[str, list[str]]:
    """All captions of each image of a prepared split, by its id, in the order of the HDF5 file."""
    folder = Path(data_folder)
    if split not in read_prepared(folder)["splits"]:
        raise UserError(f"{folder}: no {split} split in it; prepare one with create_input_files.py")
    ids, captions = (read_json(folder / f"{split}_{name}.json") for name in ("image_ids", "references"))
    if not all(captions):
        raise UserError(
            f"{folder}: images of the {split} split have no captions to score against; prepare it with "
            f"--test_annotations FILE, or caption the folder and give --submission and --references"
        )
    references_of = dict(zip(ids, captions, strict=True))
    if len(references_of) < len(ids):
        raise UserError(
            f"{folder}: images of the {split} split share an id; give each its own and prepare it anew"
        )
    return references_of


def caption_images(
    captioner: Captioner, indices: list[int], caches: list[Path] | None, settings: Settings
) -> tuple[dict[int, list[str]], dict]:
    """The captions of some images with each beam size, and the seconds of "encoding" and of each size.

    Each image is encoded once for all beam sizes.
    """
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
    images = Path(settings.data_folder) / f"{settings.split}_images.hdf5"
    files = [h5py.File(file, "r") for file in caches or [images]]
    try:
        stored = [file["features" if caches else "images"] for file in files]
        batches = [
            indices[start : start + settings.batch_size]
            for start in range(0, len(indices), settings.batch_size)
        ]

        def read(batch: list[int]) -> list[torch.Tensor]:
            return [torch.from_numpy(data[batch[0] : batch[-1] + 1]) for data in stored]  # neighbours

        yield from parallel_map(read, batches, workers=1)
    finally:
        for file in files:
            file.close()


# --- files of captions --------------------------------------------------------------------------------------


def score_submission(
    submission: str | Path, references: str | Path, split: str = "test", partial: bool = False
) -> dict:
    """Score a CSV or COCO results JSON against annotations in any layout: a row as `evaluate` returns it.

    Ids are compared as they are, else without an image's extension, else by COCO's number.

    Args:
        split: of the references, where they name splits (Karpathy's JSON).
        partial: score what both files have.

    Raises:
        UserError: damaged files, or ids that are doubled, missing or unknown; unless `partial`, the last two.
    """
    images = [image for image in read_annotations(references) if image.captions]
    if any(image.split for image in images):
        images = [image for image in images if image.split == split]
    if not images:
        raise UserError(f"{references}: no captions of the {split} split in it to score against")
    wanted = {image.image_id: image.captions for image in images}
    aliases = {
        alias: image_id for image_id in reversed(wanted) for alias in (str(coco_id(image_id)), stem(image_id))
    }
    aliases.update(zip(wanted, wanted))
    rows = read_submission(submission)
    found = [
        aliases.get(image_id) or aliases.get(stem(image_id)) or aliases.get(str(coco_id(image_id)))
        for image_id, _ in rows
    ]
    doubled = [image_id for image_id, count in Counter(filter(None, found)).items() if count > 1]
    refuse(submission, doubled, "given more than once", "leave one row of each")
    captions = {known: caption for known, (_, caption) in zip(found, rows) if known}
    missing = [image_id for image_id in wanted if image_id not in captions]
    unknown = [image_id for known, (image_id, _) in zip(found, rows) if not known]
    if not partial or not captions:
        refuse(submission, missing, "missing", f"add what {references} has, or give --partial")
        refuse(submission, unknown, f"unknown to {references}", "remove them, or give --partial")
    if missing or unknown:
        print(
            f"PARTIAL: {len(captions)} of {len(wanted)} images scored, {len(missing)} missing, "
            f"{len(unknown)} unknown rows left out"
        )
    empty = sum(not caption.strip() for caption in captions.values())
    if empty:
        print(f"{empty} of {len(captions)} captions are empty; they count as wrong")
    wanted = {image_id: wanted[image_id] for image_id in captions}
    return {
        "beam_size": None,
        "images": len(captions),
        "missing": len(missing),
        "unknown": len(unknown),
        "captions": captions,
        "scores": score_captions(wanted, captions),
    }


def stem(image_id: str) -> str:
    """An image's id without an image file's extension."""
    path = Path(image_id)
    return str(path.with_suffix("")) if path.suffix.lower() in IMAGE_EXTENSIONS else image_id


def refuse(file: str | Path, ids: list[str], what: str, remedy: str) -> None:
    if ids:
        some = ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")
        raise UserError(f"{file}: {len(ids)} ids {what} ({some}); {remedy}")


# --- results ------------------------------------------------------------------------------------------------

COLUMNS = {
    "Bleu_1": "BLEU-1",
    "Bleu_2": "BLEU-2",
    "Bleu_3": "BLEU-3",
    "Bleu_4": "BLEU-4",
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr",
}


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


def write_results(rows: list[dict], settings: Settings) -> None:
    if settings.output_json:
        scores = []
        for row in rows:
            plain = {key: value for key, value in row.items() if key not in ("captions", "scores")}
            scores.append(plain | row["scores"].overall)
        source = {"submission": settings.submission, "references": settings.references}
        if not settings.submission:
            source = {"checkpoint": settings.checkpoint, "data_folder": settings.data_folder}
        write_json(settings.output_json, source | {"split": settings.split, "scores": scores})
    if settings.output_captions:
        path = Path(settings.output_captions)
        for row in rows:
            file = path if len(rows) == 1 else path.with_stem(f"{path.stem}_beam{row['beam_size']}")
            write_submission(file, list(row["captions"].items()))
    if settings.per_image_csv:
        write_per_image(settings.per_image_csv, rows)


def write_per_image(path: str | Path, rows: list[dict]) -> None:
    lines = [
        {"image_id": image_id, "beam_size": row["beam_size"], "caption": row["captions"][image_id]} | scores
        for row in rows
        for image_id, scores in row["scores"].per_image.items()
    ]
    write_table(path, lines)


if __name__ == "__main__":
    run_script(main, Settings)
