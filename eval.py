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

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.command_line import LARGEST, check_at_least, run_script
from captioning.data.annotations import Record
from captioning.data.submissions import ScoredCaption, caption_rows, escape_formula, write_submission
from captioning.decoding.options import AttentionDecodingOptions, DecodingOptions
from captioning.report.comparison import compare_files, compare_models, print_intervals, verdict
from captioning.report.quality import caption_diversity, print_diversity
from captioning.report.scoring import (
    COLUMNS,
    find_image_folder,
    prepared_records,
    reference_records,
    score_records,
    score_submission,
    training_texts,
)
from metrics import Scores, score_captions
from utils import Device, UserError, check_output, processes, write_json, write_table

if TYPE_CHECKING:  # files of captions are scored without torch, which takes seconds to import
    from captioning.captioners.attention import Captioner
    from captioning.data.hdf5 import Rows

__all__ = ["Settings", "evaluate", "print_table", "score_submission"]


@dataclass
class Settings(AttentionDecodingOptions):
    """These and those of AttentionDecodingOptions (captioning/decoding/options.py), which `--help` lists too.
    To change one of those for this script, repeat its line here."""

    # a model on a prepared split
    checkpoint: tuple[str, ...] = ("output_models/best_checkpoint.pth",)  # a model; several are an ensemble
    model_path: str | None = None  # BLIP instead: a folder of train_model.py, or a model of the hub
    word_map: str | None = None  # word_map.json, for a checkpoint that has none
    data_folder: str = "data_output"  # what create_input_files.py wrote
    split: str = "test"  # train, val or test; also of references that name splits
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # a row of the table each
    batch_size: int = 32  # images searched at a time
    device: Device = "auto"  # auto: a GPU where there is one
    cache_features: bool = True  # take the encoder's output from train.py's cache, where there is one
    # or files of captions
    submission: tuple[str, ...] = ()  # score files of captions (CSV or COCO results JSON) instead of a model
    references: str | None = None  # annotations, any layout, to score submissions against
    image_folder: str | None = None  # the references' images, for --worst; None: test/test, if it is there
    partial: bool = False  # score a submission that lacks images or has unknown ones, on what it has
    compare: tuple[str, ...] = ()  # two files of --per_image_csv: is the second better by more than chance?
    # more about the captions
    diversity: int = field(default=0, metadata={"alone": 5})  # how captions and this many samples vary
    boxes: str | None = None  # boxes.json or COCO instances JSON: score where a model looks
    worst: int = 0  # draw this many images with the lowest CIDEr
    figure: str = "worst.png"  # file that --worst draws
    # files to write
    output_json: str | None = None  # write the scores here too
    output_captions: str | None = None  # write the captions here: .csv, or .json for COCO results
    per_image_csv: str | None = None  # write each image's file, caption, references and scores here
    with_scores: bool = False  # in these files log-probabilities too: log_prob and log_prob_per_word
    escape_formulas: bool = False  # put ' before ids and captions of CSVs that spreadsheets take for formulas

    def __post_init__(self):
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "worst", "diversity")
        if self.diversity == 1:
            raise UserError("--diversity is 1: give 2 or more samples, to compare with each other")
        self.sample_options()  # refuses what cannot be
        if not self.diversity and (self.temperature is not None or self.top_p is not None):
            raise UserError("--temperature and --top_p are of the samples of --diversity: add it")
        if not self.beam_sizes or min(self.beam_sizes) < 1 or max(self.beam_sizes) > LARGEST["beam_size"]:
            raise UserError(f"--beam_sizes is {self.beam_sizes}: give numbers from 1 to 1000, such as 1,3,5")
        if bool(self.submission) != (self.references is not None):
            raise UserError("--submission and --references belong together: give both")
        if self.submission and self.boxes:
            raise UserError("--boxes needs a model, which looks: leave --submission out")
        if self.compare and len(self.compare) != 2:
            raise UserError("--compare takes two files, as --per_image_csv writes them")

    def search_options(self, beam_size: int) -> DecodingOptions:
        """How the captions that are scored are searched."""
        return DecodingOptions.of(self, beam_size=beam_size, temperature=None, top_p=None)

    def sample_options(self) -> DecodingOptions:
        """How the samples of --diversity are drawn."""
        drawn = {"num_captions": self.diversity or 1, "temperature": self.temperature or 1.0}
        return DecodingOptions.of(self, **drawn)


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
        search), "features" ("computed" or "cached"), "captions" {id: caption}, "scores" (Scores); with those
        settings "decoded" {id: ScoredCaption} and "diversity". Empty in all processes but the main one.
    """
    from accelerate.utils import gather_object

    from captioning.data.prepared import read_prepared
    from captioning.report.scoring import decode_files, decode_split

    state = processes()
    prepared_size = read_prepared(settings.data_folder)["settings"]["image_size"]
    references = read_references(settings.data_folder, settings.split)
    options = {size: settings.search_options(size) for size in settings.beam_sizes}
    if settings.diversity:
        options["samples"] = settings.sample_options()
    if settings.model_path:
        if not state.is_main_process:
            return []
        records = prepared_records(settings.data_folder, settings.split)
        how = options, settings.batch_size, settings.with_scores
        gathered = [decode_files(load_model(settings), records, *how)]
        where = {"processes": 1, "features": "computed"}
    else:
        captioner = load_model(settings)
        if prepared_size != captioner.image_size:
            raise UserError(
                f"{settings.data_folder}: images of {prepared_size} pixels, but the model was trained on "
                f"{captioner.image_size}; prepare the data with --image_size {captioner.image_size}"
            )
        stored, features = open_split(captioner, settings)
        with state.split_between_processes(list(range(len(references)))) as own:
            found = decode_split(captioner, [*references], own, stored, options, settings.batch_size)
        gathered = gather_object([found])
        if not state.is_main_process:
            return []
        where = {"processes": state.num_processes, "features": features}
    # each process has had neighbours, in the order of the processes
    decoded = {name: [one for own, _ in gathered for one in own[name]] for name in options}
    return make_rows(decoded, [seconds for _, seconds in gathered], where, references, settings)


def open_split(captioner: Captioner, settings: Settings) -> tuple[list[Rows], str]:
    """The split's images, "computed", or its features for each encoder, "cached"."""
    from captioning.data.features import cached_features, open_features
    from captioning.data.prepared import Prepared

    folder, split = settings.data_folder, settings.split
    data = Prepared(folder)
    if settings.cache_features:
        caches = [cached_features(encoder, folder, split) for encoder in captioner.encoders]
        if None not in caches:
            return [open_features(file, data, split) for file in caches], "cached"
    return [data.images(split)], "computed"


def make_rows(
    decoded: dict, seconds: list[dict], where: dict, references: dict[str, list[str]], settings: Settings
) -> list[dict]:
    """What `evaluate` returns.

    Args:
        decoded: by beam size, and for "samples", the captions of each image.
        seconds: of each process.
        where: "processes" and "features" of the rows.
    """
    rows = []
    for beam_size in settings.beam_sizes:
        best = {image_id: own[0] for image_id, own in zip(references, decoded[beam_size], strict=True)}
        captions = {image_id: caption.text for image_id, caption in best.items()}
        slowest = max(own["encoding"] + own[beam_size] for own in seconds)
        row = {"beam_size": beam_size, "images": len(captions), "images_per_second": len(captions) / slowest}
        row |= where | {"captions": captions, "scores": score_captions(references, captions)}
        if settings.with_scores:
            row["decoded"] = best
        rows.append(row)
    if settings.diversity:
        texts = [[sample.text for sample in own] for own in decoded["samples"]]
        add_diversity(rows, settings, dict(zip(references, texts)))
    return rows


def add_diversity(rows: list[dict], settings: Settings, samples: dict[str, list[str]] | None = None) -> None:
    """Add to each row "diversity": what `caption_diversity` returns."""
    _, training_captions = training_texts(settings.data_folder)
    for row in rows:
        row["diversity"] = caption_diversity(row["captions"], training_captions, samples)


def load_model(settings: Settings):
    from captioning.captioners.attention import Captioner

    if not settings.model_path:
        return Captioner.load(settings.checkpoint, settings.word_map)
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


def point(rows: list[dict], records: Sequence[Record], settings: Settings) -> None:
    """Add to each row "pointing": whether the model looks at what it names, with the row's beam size."""
    from captioning.captioners.base import describe_files
    from captioning.report.pointing import pointing_score, read_boxes

    paths = {record.image_id: record.path for record in records}
    boxes = read_boxes(settings.boxes, paths)
    captioner = load_model(settings)
    for row in rows:
        options = settings.search_options(row["beam_size"])
        captions, problems = describe_files(captioner, paths, options, settings.batch_size)
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
    if settings.diversity:
        add_diversity(rows, settings)
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
    if "diversity" in rows[0]:
        print_diversity(first, names, [row["diversity"] for row in rows])
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
            own = row.get("decoded") or {key: ScoredCaption(text) for key, text in row["captions"].items()}
            own = [(image_id, [caption]) for image_id, caption in own.items()]
            lines, columns = caption_rows(own, False, "decoded" in row)
            write_submission(file, lines, columns, settings.escape_formulas)
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
        left_out = {"captions", "decoded", "scores", "pointing"}
        plain = {key: value for key, value in row.items() if key not in left_out}
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
        | log_probs(row, image_id)
        | scores
        for row in rows
        for image_id, scores in row["scores"].per_image.items()
    ]


def log_probs(row: dict, image_id: str) -> dict[str, float]:
    """The columns of --with_scores in --per_image_csv."""
    own = row["decoded"][image_id]._asdict() if "decoded" in row else {}
    return {name: round(value, 4) for name, value in own.items() if name != "text"}


def draw_worst(row: dict, records: Sequence[Record], settings: Settings) -> None:
    """A figure of the images with the lowest CIDEr in a row, the worst first."""
    from captioning.report.figures import draw_captions

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
