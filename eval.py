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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.command_line import LARGEST, allow_single, check_at_least, check_different_files, run_script
from captioning.data.prepared import Record
from captioning.data.submissions import (
    METADATA,
    ScoredCaption,
    caption_rows,
    escape_formula,
    metadata_name,
    say_metadata_place,
    write_submission,
)
from captioning.data.tables import Columns
from captioning.decoding.options import AttentionDecodingOptions, DecodingOptions
from captioning.report.comparison import compare_files, compare_pairs, print_comparisons
from captioning.report.quality import caption_diversity, print_diversity
from captioning.report.scoring import (
    COLUMNS,
    Decoded,
    decode_files,
    decode_split,
    find_image_folders,
    names_of,
    open_split,
    prepared_records,
    prepared_references,
    reference_records,
    report_scores,
    score_files,
    score_submission,
    training_texts,
)
from metrics import Scores
from utils import Device, UserError, check_output, processes, say, write_json, write_table

if TYPE_CHECKING:  # files of captions are scored without torch, which takes seconds to import
    from captioning.captioners.base import BaseCaptioner
    from captioning.report.quality import Pointing

__all__ = ["Settings", "evaluate", "print_table", "score_submission"]


@dataclass
class Settings(AttentionDecodingOptions):
    """The settings of this script. `--help` also lists those of AttentionDecodingOptions
    (captioning/decoding/options.py); to change one of these for this script, repeat its line here."""

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
    submission: tuple[str, ...] = ()  # score files of captions (CSV, JSON, JSON lines) instead of a model
    references: tuple[str, ...] = ()  # annotations, any layout, to score submissions against
    image_folder: tuple[str, ...] = ()  # the references' images, for --worst; none: test/test, if it is there
    id_column: str | None = None  # column of the images in tables of any names; None: recognized
    caption_column: str | None = None  # column of the captions; None: recognized
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
        allow_single(self, "checkpoint", "submission", "references", "image_folder")
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "worst", "diversity")
        if self.diversity == 1:
            raise UserError("--diversity is 1: give 2 or more samples, to compare with each other")
        self.sample_options()  # refuses what cannot be
        if not self.diversity and (self.temperature is not None or self.top_p is not None):
            raise UserError("--temperature and --top_p are of the samples of --diversity: add it")
        if not self.beam_sizes or min(self.beam_sizes) < 1 or max(self.beam_sizes) > LARGEST["beam_size"]:
            raise UserError(f"--beam_sizes is {self.beam_sizes}: give numbers from 1 to 1000, such as 1,3,5")
        if bool(self.submission) != bool(self.references):
            raise UserError("--submission and --references belong together: give both")
        if self.submission and self.boxes:
            raise UserError("--boxes needs a model, which looks: leave --submission out")
        if self.compare and len(self.compare) != 2:
            raise UserError("--compare takes two files, as --per_image_csv writes them")
        outputs = ("output_json", "output_captions", "per_image_csv", "figure")
        check_different_files(self, outputs, ("submission", "references", "boxes", "word_map", "compare"))

    def search_options(self, beam_size: int) -> DecodingOptions:
        """How the captions that are scored are searched."""
        return DecodingOptions.of(self, beam_size=beam_size, temperature=None, top_p=None)

    def sample_options(self) -> DecodingOptions:
        """How the samples of --diversity are drawn."""
        return DecodingOptions.of(self, num_captions=self.diversity or 1, temperature=self.temperature or 1.0)


def main(settings: Settings) -> None:
    if settings.compare:
        compare_files(*settings.compare)
        return
    check_outputs(settings)
    if settings.submission:
        rows, records = score_submissions(settings)
    else:
        rows, records = evaluate(settings), prepared_records(settings.data_folder, settings.split)
        if not processes().is_main_process:
            return
        if settings.boxes:
            score_pointing(rows, records, settings)
    print_table(rows)
    if settings.submission:
        compare_submissions(rows, records)
    write_results(rows, records, settings)


def check_outputs(settings: Settings) -> None:
    """Raise UserError, before any work, for a file that cannot be written."""
    outputs = [settings.output_json, settings.output_captions, settings.per_image_csv]
    if settings.worst:
        outputs.append(settings.figure)
    for output in filter(None, outputs):
        check_output(output)


# --- files of captions --------------------------------------------------------------------------------------


def score_submissions(settings: Settings) -> tuple[list[dict], list[Record]]:
    """The table's rows, one for each file of captions, and the images with their references."""
    folders = find_image_folders(settings.references, settings.image_folder)
    columns = Columns(settings.id_column, settings.caption_column)
    records = reference_records(settings.references, settings.split, folders, columns)
    whose = names_of(settings.references)
    scored = score_files(settings.submission, records, whose, settings.partial, columns)
    rows = [{"model": file} | row for file, row in zip(settings.submission, scored)]
    columns.check()
    if settings.diversity:
        add_diversity(rows, settings)
    return rows, records


def add_diversity(rows: list[dict], settings: Settings, samples: dict[str, list[str]] | None = None) -> None:
    """Add what `caption_diversity` returns to each row, as "diversity"."""
    _, training_captions = training_texts(settings.data_folder)
    for row in rows:
        row["diversity"] = caption_diversity(row["captions"], training_captions, samples)


def compare_submissions(rows: list[dict], records: Sequence[Record]) -> None:
    """Compare every two files on the images that both caption, and print the results."""
    names = [row["model"] for row in rows]
    references = {record.image_id: record.captions for record in records}
    captions, scores = [row["captions"] for row in rows], [row["scores"] for row in rows]
    print_comparisons(compare_pairs(references, names, captions, scores), names)


# --- models -------------------------------------------------------------------------------------------------


def evaluate(settings: Settings) -> list[dict]:
    """Caption and score a prepared split with each beam size.

    Under torchrun or accelerate every process captions a share of the images.

    Returns:
        One dictionary per beam size: "beam_size", "images", "processes", "images_per_second" (encoding and
        search), "features" ("computed" or "cached"), "captions" {id: caption} and "scores" (Scores); with
        --with_scores also "decoded" {id: ScoredCaption}, with --diversity "diversity". Processes other than
        the main one get an empty list.
    """
    from accelerate.utils import gather_object

    from captioning.data.prepared import read_prepared

    state = processes()
    prepared_size = read_prepared(settings.data_folder)["settings"]["image_size"]
    references = prepared_references(settings.data_folder, settings.split)
    options = {size: settings.search_options(size) for size in settings.beam_sizes}
    if settings.diversity:
        options["samples"] = settings.sample_options()
    if settings.model_path:
        if not state.is_main_process:
            return []
        records = prepared_records(settings.data_folder, settings.split)
        results = [
            decode_files(load_model(settings), records, options, settings.batch_size, settings.with_scores)
        ]
        source = {"processes": 1, "features": "computed"}
    else:
        captioner = load_model(settings)
        if prepared_size != captioner.image_size:
            raise UserError(
                f"{settings.data_folder}: images of {prepared_size} pixels, but the model was trained on "
                f"{captioner.image_size}; prepare the data with --image_size {captioner.image_size}"
            )
        stored, features = open_split(
            captioner, settings.data_folder, settings.split, settings.cache_features
        )
        with state.split_between_processes(list(range(len(references)))) as indices:
            result = decode_split(captioner, [*references], indices, stored, options, settings.batch_size)
        results = gather_object([result])
        if not state.is_main_process:
            return []
        source = {"processes": state.num_processes, "features": features}
    return make_rows(results, source, references, settings)


def load_model(settings: Settings) -> BaseCaptioner:
    from captioning.captioners.attention import Captioner

    if settings.model_path:
        return Captioner.load(settings.model_path)
    return Captioner.load(settings.checkpoint, settings.word_map)


def make_rows(
    results: Sequence[tuple[Decoded, Mapping]],
    source: dict,
    references: dict[str, list[str]],
    settings: Settings,
) -> list[dict]:
    """What `evaluate` returns.

    Args:
        results: what `decode_split` returned in each process; the processes have consecutive images.
        source: the rows' "processes" and "features".
    """
    rows = []
    for beam_size in settings.beam_sizes:
        of_images = [captions for decoded, _ in results for captions in decoded[beam_size]]
        best = {image_id: captions[0] for image_id, captions in zip(references, of_images, strict=True)}
        texts = {image_id: caption.text for image_id, caption in best.items()}
        slowest = max(seconds["encoding"] + seconds[beam_size] for _, seconds in results)
        row = {"beam_size": beam_size, "images": len(texts), "images_per_second": len(texts) / slowest}
        row |= source | {"captions": texts, "scores": report_scores(references, texts)}
        if settings.with_scores:
            row["decoded"] = best
        rows.append(row)
    if settings.diversity:
        of_images = [captions for decoded, _ in results for captions in decoded["samples"]]
        samples = [[sample.text for sample in captions] for captions in of_images]
        add_diversity(rows, settings, dict(zip(references, samples)))
    return rows


def score_pointing(rows: list[dict], records: Sequence[Record], settings: Settings) -> None:
    """Add to each row, as "pointing", how often the model looks at what it names."""
    from captioning.captioners.base import describe_files
    from captioning.report.quality import pointing_score, read_boxes

    paths = {record.image_id: record.path for record in records}
    boxes = read_boxes(settings.boxes, paths)
    captioner = load_model(settings)
    for row in rows:
        options = settings.search_options(row["beam_size"])
        captions, problems = describe_files(captioner, paths, options, settings.batch_size)
        for problem in problems:
            say(f"left out: {problem}")
        row["pointing"] = pointing_score(captions, *boxes)


# --- results ------------------------------------------------------------------------------------------------


def print_table(rows: list[dict]) -> None:
    """Print one line per row, under the name of its model or else its beam size."""
    first = "model" if "model" in rows[0] else "beam"
    names = [str(row.get("model") or row["beam_size"] or "-") for row in rows]
    width = max(map(len, [first, *names]))
    of_a_model = "images_per_second" in rows[0]
    header = " ".join(f"{title:>7}" for title in COLUMNS.values())
    say(f"{first:{width}} {header}{'  images/s' if of_a_model else ''}")
    for name, row in zip(names, rows):
        scores: Scores = row["scores"]
        cells = [f"{scores.overall[key]:7.4f}" if key in scores.overall else f"{'-':>7}" for key in COLUMNS]
        rate = f"  {row['images_per_second']:10.1f}" if of_a_model else ""
        say(f"{name:{width}} {' '.join(cells)}{rate}")
    note = f", features {rows[0]['features']}" if of_a_model else ""
    say(f"{rows[0]['images']} images{note}")
    if "diversity" in rows[0]:
        print_diversity(first, names, [row["diversity"] for row in rows])
    for name, row in zip(names, rows):
        if "pointing" in row:
            print_pointing(f"{first} {name}", row["pointing"])


def print_pointing(name: str, pointing: Pointing) -> None:
    if not pointing.words:
        say(f"{name}: no word of the captions names an object that has a box")
        return
    absent = f"; {pointing.absent} words name an object that has no box there" if pointing.absent else ""
    say(
        f"{name}: attention points at the object for {pointing.score:.1%} of {pointing.words} object words, "
        f"a uniform guess for {pointing.chance:.1%}{absent}"
    )


def write_results(rows: list[dict], records: Sequence[Record], settings: Settings) -> None:
    """Write the files that were asked for, and print their names."""
    written = []
    if settings.output_json:
        write_json(settings.output_json, summary(rows, settings))
        written.append(settings.output_json)
    if settings.output_captions:
        written += write_caption_files(rows, records, settings)
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
        say(f"written: {', '.join(written)}")


def summary(rows: list[dict], settings: Settings) -> dict:
    """The content of --output_json."""
    scores = []
    for row in rows:
        left_out = {"captions", "decoded", "scores", "pointing"}
        plain = {key: value for key, value in row.items() if key not in left_out}
        if "pointing" in row:
            names = ("score", "chance", "words")
            plain["pointing"] = {name: getattr(row["pointing"], name) for name in names}
        scores.append(plain | row["scores"].overall)
    source = {"submission": settings.submission, "references": settings.references}
    if not settings.submission:
        source = {
            "checkpoint": settings.model_path or settings.checkpoint,
            "data_folder": settings.data_folder,
        }
    return source | {"split": settings.split, "scores": scores}


def write_caption_files(rows: list[dict], records: Sequence[Record], settings: Settings) -> list[str]:
    """Write the files of --output_captions, one per row; return their names."""
    path, files = Path(settings.output_captions), []
    for i, row in enumerate(rows, start=1):
        name = f"{path.stem}_beam{row['beam_size']}" if row["beam_size"] else f"{path.stem}_{i}"
        file = path if len(rows) == 1 else path.with_stem(name)
        best = row.get("decoded") or {key: ScoredCaption(text) for key, text in row["captions"].items()}
        captions = [(image_id, [caption]) for image_id, caption in best.items()]
        if file.name == METADATA:
            files_of = {record.image_id: record.file_name or record.path for record in records}
            images = [files_of[image_id] or image_id for image_id, _ in captions]
            say_metadata_place(file, images)
            names = (metadata_name(image, file) for image in images)
            captions = [(name, of_image) for name, (_, of_image) in zip(names, captions)]
        lines, columns = caption_rows(captions, False, "decoded" in row)
        write_submission(file, lines, columns, settings.escape_formulas)
        files.append(str(file))
    return files


def per_image_lines(rows: list[dict], records: Sequence[Record]) -> list[dict]:
    """The lines of --per_image_csv."""
    by_id = {record.image_id: record for record in records}
    return [
        {
            "image_id": image_id,
            "image": by_id[image_id].path or "",
            "model": row.get("model", ""),
            "beam_size": row["beam_size"],
            "caption": row["captions"][image_id],
            "references": " | ".join(by_id[image_id].captions),
        }
        | log_probs(row, image_id)
        | scores
        for row in rows
        for image_id, scores in row["scores"].per_image.items()
    ]


def log_probs(row: dict, image_id: str) -> dict[str, float]:
    """The columns of --with_scores in --per_image_csv."""
    if "decoded" not in row:
        return {}
    caption: ScoredCaption = row["decoded"][image_id]
    return {
        "log_prob": round(caption.log_prob, 4),
        "log_prob_per_word": round(caption.log_prob_per_word, 4),
    }


def draw_worst(row: dict, records: Sequence[Record], settings: Settings) -> None:
    """Draw the images with the lowest CIDEr of a row, the worst first."""
    from captioning.report.figures import draw_captions

    with_image = {record.image_id: record for record in records if record.path}
    per_image = row["scores"].per_image
    ids = [image_id for image_id in per_image if image_id in with_image]
    if not ids:
        raise UserError("no image files to draw: give --image_folder, the folder of the references' images")
    ids.sort(key=lambda image_id: (per_image[image_id]["CIDEr"], per_image[image_id]["ROUGE_L"]))
    draw_captions(
        settings.figure,
        [
            (
                with_image[image_id].path,
                f"{image_id}   CIDEr {per_image[image_id]['CIDEr']:.2f}",
                row["captions"][image_id],
                with_image[image_id].captions,
            )
            for image_id in ids[: settings.worst]
        ],
    )


if __name__ == "__main__":
    run_script(main, Settings)
