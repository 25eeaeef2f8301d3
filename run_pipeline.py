"""The whole pipeline in one command: data, training, captions, scores.

    python run_pipeline.py                # on train.csv, train/train/, test.csv, test/test/ where they are,
                                          # else on the demonstration set, which it draws first
    python run_pipeline.py --annotations captions.txt --image_folder Images --epochs 20
    python run_pipeline.py --annotations Flickr8k.token.txt --image_folder Flicker8k_Dataset
    python run_pipeline.py --model both   # the attention model and BLIP, scored on the same test images

Every setting of the scripts that it runs is an option here too; those of train_model.py and direct_caption.py
begin with blip_ (--blip_epochs). What is not given is as at the top of each script. A step whose result is
there, made from the same input with the same settings, is skipped. An interrupted training goes on, as with
--resume: with a setting that was changed since, too, where it can; else it begins anew, and a line says why.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import caption
import create_input_files
import direct_caption
import eval as evaluation
import make_demo_data
import train
import train_model as blip_training
from captioning.command_line import (
    AnySettings,
    Step,
    allow_single,
    check_at_least,
    check_different_files,
    describe_settings,
    make_settings,
    run_script,
)
from captioning.data.annotations import read_annotations, sources, test_records
from captioning.data.fingerprints import files_are_as_recorded, is_same_training_data, stamp_files
from captioning.data.images import walk_images
from captioning.data.prepared import read_prepared
from captioning.data.tables import Columns
from captioning.files import lock_folder
from captioning.folders.plan import test_csv_places
from captioning.report.scoring import score_submission
from captioning.training.monitor import repair_outputs
from captioning.training.resume import (
    IN_MID_EPOCH,
    TrainingSettings,
    best_epoch,
    differing_settings,
    is_complete,
    newest_history,
)
from captioning.weights.checkpoints import HISTORY, LAST, check_content, epoch_checkpoints, read_checkpoint
from captioning.weights.pretrained import check_encoder_name
from utils import Device, UserError, check_output, read_json, say, write_json


@dataclass
class Settings:
    # what to train, and on what
    model: Literal["attention", "blip", "both"] = "attention"  # what to train and to caption with
    annotations: tuple[str, ...] = ("train.csv",)  # captions to train on, any layout
    image_folder: tuple[str, ...] = ("train/train",)  # their images
    test_annotations: tuple[str, ...] = ()  # if empty: test_captions.csv or test.csv beside train.csv
    test_folder: str = "test/test"  # images to caption; without it those of the annotations' test split
    # what to write
    data_folder: str = "data_output"  # prepared data goes here
    output_folder: str = "output_models"  # checkpoints go here
    output_csv: str = "submission.csv"  # captions go here
    # BLIP
    blip_base: str | None = None  # hub id or folder to fine-tune; None: the hub's; tiny for the demonstration
    blip_folder: str = "blip_finetuned_model"  # the fine-tuned BLIP goes here
    blip_csv: str = "blip_submission.csv"  # its captions go here
    # the run
    device: Device = "auto"  # auto: a GPU where there is one
    demo_images: int = 0  # training scenes that the demonstration draws; 0: make_demo_data.py's own number

    def __post_init__(self):
        allow_single(self, "annotations", "image_folder", "test_annotations")
        self.step_values: dict[str, object] = {}  # what was given of the steps' own settings
        self.is_demo = False
        self.own_test = False  # whether the images to caption are the annotations' own test split
        check_at_least(self, 0, "demo_images")
        folders = ("data_folder", "output_folder", "blip_folder")
        check_different_files(self, folders, ("image_folder", "test_folder"))
        check_different_files(self, ("output_csv", "blip_csv"), ("annotations", "test_annotations"))


# settings of the steps that are not offered as options here; of `num_captions`, the last step scores one
SET_BY_PIPELINE = {
    "annotations", "image_folder", "test_annotations", "test_image_folder", "output_folder", "data_folder",
    "test_folder", "output_csv", "word_map", "resume", "checkpoint", "model", "encoder_path", "decoder_path",
    "model_path", "base_model", "images", "img", "figure", "show", "num_captions",
}  # fmt: skip
Settings.pipeline_steps = [
    Step("settings of create_input_files.py", create_input_files.Settings, "", frozenset(SET_BY_PIPELINE)),
    Step("settings of train.py", train.Settings, "", frozenset(SET_BY_PIPELINE)),
    Step("settings of caption.py", caption.Settings, "", frozenset(SET_BY_PIPELINE)),
    Step("settings of train_model.py", blip_training.Settings, "blip_", frozenset(SET_BY_PIPELINE)),
    Step("settings of direct_caption.py", direct_caption.Settings, "blip_", frozenset(SET_BY_PIPELINE)),
]
# once given, for BLIP too
FOR_BOTH = {"seed", "val_fraction", "test_csv", "recursive", "save_every", "id_column", "caption_column"}

# what the demonstration is trained with: small, so that it learns in minutes without a GPU
DEMO = {"encoder_name": "efficientnet_lite0", "emb_dim": 64, "attention_dim": 48, "decoder_dim": 192,
        "epochs": 8, "decoder_lr": 2e-3, "alpha_c": 0.1, "workers": 0}  # fmt: skip


def main(settings: Settings) -> None:
    check_before_work(settings)
    announce = announce_steps({"attention": 4, "blip": 3, "both": 6}[settings.model])
    settings = choose_data(settings, announce)
    best, blip_best = {}, {}
    if settings.model != "blip":
        prepare(settings, announce)
        best = train_attention(settings, announce)
        caption_with_attention(settings, announce)
    if settings.model != "attention":
        blip_best = fine_tune_blip(settings, announce)
        caption_with_blip(settings, announce)
    report(settings, best, blip_best)


def check_before_work(settings: Settings) -> None:
    """Raise UserError for what a later step would refuse."""
    for folder in (settings.data_folder, settings.output_folder, settings.blip_folder):
        check_output(folder, folder=True)
    for file in (settings.output_csv, settings.blip_csv):
        check_output(file)
    if settings.test_folder != Settings.test_folder and not Path(settings.test_folder).is_dir():
        raise UserError(f"{settings.test_folder}: no such folder; give the one with images to caption")
    for step in Settings.pipeline_steps:
        step_settings(settings, step.settings_class, step.prefix)
    check_encoder_name(step_settings(settings, train.Settings).encoder_name)


def step_settings(settings: Settings, settings_class: type, prefix: str = "", **decided):
    """A step's settings: what was given of them, what is `decided` here, else the script's own."""
    values = DEMO if settings.is_demo and settings_class is train.Settings else {}
    for name in settings_class.__dataclass_fields__:
        for option in (name, prefix + name) if name in FOR_BOTH else (prefix + name,):
            if option in settings.step_values and name not in SET_BY_PIPELINE:
                values = values | {name: settings.step_values[option]}
    return make_settings(settings_class, values | decided)


def announce_steps(count: int) -> Callable[..., None]:
    """A function that prints a text with the number of the step, and its settings that are no defaults."""
    numbers = itertools.count(1)

    def announce(text: str, non_defaults: dict[str, object] | None = None) -> None:
        say(f"[{next(numbers)}/{count}] {text}")
        if non_defaults:
            say(f"      settings other than the defaults: {describe_settings(non_defaults)}")

    return announce


def non_default_settings(step: AnySettings) -> dict[str, object]:
    """The settings of a step that are not the defaults, without those in SET_BY_PIPELINE."""
    names = [name for name in step.__dataclass_fields__ if name not in SET_BY_PIPELINE]
    return {name: getattr(step, name) for name in names if getattr(step, name) != getattr(type(step), name)}


def choose_data(settings: Settings, announce: Callable[..., None]) -> Settings:
    """The user's data, or the demonstration's where there are none of the user's."""
    are_given = settings.annotations != Settings.annotations or settings.image_folder != Settings.image_folder
    if are_given or Path(settings.annotations[0]).exists():
        announce(f"data: {', '.join((*settings.annotations, *filter(os.path.isdir, settings.image_folder)))}")
        return settings if Path(settings.test_folder).is_dir() else choose_own_test(settings)
    drawing = make_demo_data.Settings()
    if settings.demo_images:
        drawing = replace(drawing, train_images=settings.demo_images)
    folder = Path(drawing.output_folder)
    say(f"no {settings.annotations[0]} here: using the demonstration set in {folder}/ (coloured shapes)")
    if make_demo_data.is_drawn(drawing):
        announce(f"data: {folder}/ is there, skipped")
    else:
        announce(f"data: drawing {folder}/")
        make_demo_data.make_demo_data(drawing)
    settings = copy.copy(settings)
    settings.annotations = (str(folder / "train.csv"),)
    settings.image_folder = (str(folder / "train" / "train"),)
    settings.test_annotations = (str(folder / "test_captions.csv"),)
    settings.test_folder, settings.is_demo = str(folder / "test" / "test"), True
    return settings


def choose_own_test(settings: Settings) -> Settings:
    """The settings for captioning the test split that the annotations name, if they do."""
    records = read_annotations(settings.annotations, None, columns(settings))
    if settings.test_annotations or not any(record.split == "test" for record in records):
        say(f"      no {settings.test_folder}/: there will be a model, but no captions")
        return settings
    if len(settings.annotations) > 1 or len(settings.image_folder) > 1:
        say("      its test split is of several files: eval.py scores it, after the training")
        return settings
    given, settings = settings.annotations[0], copy.copy(settings)
    say(f"      no {settings.test_folder}/: the test split of {given} is captioned and scored")
    settings.test_folder = given if Path(given).is_dir() else settings.image_folder[0]
    settings.own_test = True
    return settings


def columns(settings: Settings) -> Columns:
    return Columns(settings.step_values.get("id_column"), settings.step_values.get("caption_column"))


def prepare(settings: Settings, announce: Callable[..., None]) -> None:
    has_test = bool(settings.test_annotations)
    wanted = step_settings(
        settings,
        create_input_files.Settings,
        annotations=settings.annotations,
        image_folder=settings.image_folder,
        test_annotations=settings.test_annotations,
        test_image_folder=(settings.test_folder,) if has_test else (),
        output_folder=settings.data_folder,
    )
    if create_input_files.is_prepared(wanted):
        announce(f"preparation: {settings.data_folder}/ is up to date, skipped")
        return
    source = ", ".join(settings.annotations)
    announce(f"preparation: {source} -> {settings.data_folder}/", non_default_settings(wanted))
    create_input_files.create_input_files(wanted)


def train_attention(settings: Settings, announce: Callable[..., None]) -> dict:
    """Train, go on with an interrupted training, or skip; return the best epoch's row of the history."""
    wanted = step_settings(
        settings, train.Settings, data_folder=settings.data_folder, output_folder=settings.output_folder
    )
    if settings.is_demo:
        say("the demonstration trains a small model: DEMO in run_pipeline.py")
    record = read_prepared(settings.data_folder)

    def has_same_data(checkpoint: dict) -> bool:
        return is_same_training_data(checkpoint.get("data"), record)

    source = f"{settings.data_folder}/ -> {settings.output_folder}/"
    return run_training("training", train.train, wanted, has_same_data, source, announce)


def run_training(
    step: str,
    run: Callable,
    wanted: TrainingSettings,
    has_same_data: Callable[[dict], bool],
    source: str,
    announce: Callable[..., None],
) -> dict:
    """Train with the `wanted` settings: go on with the training in the output folder where it can, or skip it
    where it is complete and the same.

    Args:
        has_same_data: a checkpoint -> whether it was trained on the data that are there now.
    """
    with lock_folder(wanted.output_folder):  # which removes what a killed run left unfinished
        repair_outputs(Path(wanted.output_folder))
    earlier = find_earlier_run(wanted, has_same_data)
    if earlier and not earlier.obstacles:
        if not is_complete(wanted, earlier.history):
            announce(f"{step}: going on after {earlier.file}", non_default_settings(wanted))
            return run(make_settings(type(wanted), asdict(wanted) | {"resume": True}))
        if not earlier.changed:
            announce(f"{step}: {wanted.output_folder}/ is up to date, skipped")
            return earlier.history[best_epoch(earlier.history, wanted.score)]
    announce(f"{step}: {source}", non_default_settings(wanted))
    if earlier:
        reasons = describe_settings(earlier.obstacles or earlier.changed)
        say(f"      anew, and not on from {earlier.file}: {reasons}")
    return run(wanted)


class EarlierRun(NamedTuple):
    """The newest state in an output folder, beside what is wanted now."""

    file: Path
    history: list[dict]
    changed: dict[str, str]  # settings that are now others: "8 (was 16)"
    obstacles: dict[str, str]  # what keeps a training from going on: some of these, or other data


def find_earlier_run(wanted: TrainingSettings, has_same_data: Callable[[dict], bool]) -> EarlierRun | None:
    """The newest state that the wanted training can go on from; where there is none such, the newest one."""
    files, earlier_run = epoch_checkpoints(wanted.output_folder), None
    newest = newest_history(files)
    for file in (Path(wanted.output_folder) / LAST, *files[-1:]):
        try:
            checkpoint = read_checkpoint(file)
            check_content(file, checkpoint, {"settings": dict, "history": HISTORY})
        except (ValueError, UserError):  # no file, or none of ours
            continue
        if checkpoint["history"] == newest:
            earlier = differing_settings(wanted, checkpoint["settings"])
            earlier.pop("epochs", None)
            changed = {name: f"{getattr(wanted, name)} (was {value})" for name, value in earlier.items()}
            fixed = changed.keys() - IN_MID_EPOCH if file.name == LAST else {*wanted.fixed}
            obstacles = {name: text for name, text in changed.items() if name in fixed}
            if not has_same_data(checkpoint):
                obstacles["training data"] = "(others)"
            earlier_run = EarlierRun(file, newest, changed, obstacles)
            if not obstacles:
                break
    return earlier_run


def caption_with_attention(settings: Settings, announce: Callable[..., None]) -> None:
    models = [Path(settings.output_folder) / name for name in ("encoder.pth", "decoder.pth")]
    decided = {"encoder_path": str(models[0]), "decoder_path": str(models[1])} | captioning_places(settings)
    wanted = step_settings(settings, caption.Settings, output_csv=settings.output_csv, **decided)
    caption_test_images("captions", caption.main, wanted, models, announce)


def caption_with_blip(settings: Settings, announce: Callable[..., None]) -> None:
    decided = {"model_path": settings.blip_folder, "output_csv": settings.blip_csv}
    if "beam_size" in settings.step_values and "blip_num_beams" not in settings.step_values:
        decided["num_beams"] = settings.step_values["beam_size"]  # the two are compared
    decided |= captioning_places(settings)
    wanted = step_settings(settings, direct_caption.Settings, "blip_", **decided)
    models = sorted(Path(settings.blip_folder).glob("*.safetensors"))  # of the model, or of an adapter
    caption_test_images("BLIP captions", direct_caption.main, wanted, models, announce)


def captioning_places(settings: Settings) -> dict[str, object]:
    """What both captioning scripts caption."""
    images = {"test_folder": settings.test_folder, "num_captions": 1}
    return images | ({"test_csv": settings.annotations[0]} if settings.own_test else {})


def caption_test_images(
    step: str, run: Callable, wanted: AnySettings, models: list[Path], announce: Callable[..., None]
) -> None:
    """Caption the test images, unless there are none or the captions are up to date."""
    if not Path(wanted.test_folder).is_dir():
        announce(f"{step}: no {wanted.test_folder}/, skipped")
        return
    if is_up_to_date(wanted, models):
        announce(f"{step}: {wanted.output_csv} is up to date, skipped")
        return
    shown = non_default_settings(replace(wanted, test_csv=None))  # it names the images, as the folder does
    announce(f"{step}: {wanted.test_folder}/ -> {wanted.output_csv}", shown)
    inputs = stamp_files(inputs_of_captions(wanted, models))  # before they are read
    run(wanted)
    files = inputs | stamp_files([wanted.output_csv])
    write_json(record_file(wanted, models), {"settings": deciding_settings(wanted), "files": files})


def is_up_to_date(wanted: AnySettings, models: list[Path]) -> bool:
    file = record_file(wanted, models)
    record = read_json(file) if file.is_file() else {}
    if not isinstance(record, dict) or record.get("settings") != deciding_settings(wanted):
        return False
    files = [*inputs_of_captions(wanted, models), wanted.output_csv]
    return files_are_as_recorded(record.get("files"), files)


def record_file(wanted: AnySettings, models: list[Path]) -> Path:
    """The file beside the model that keeps the captions' fingerprint."""
    return models[0].parent / f"{Path(wanted.output_csv).stem}_fingerprint.json"


def deciding_settings(wanted: AnySettings) -> dict[str, object]:
    values = {name: value for name, value in asdict(wanted).items() if name not in SET_BY_PIPELINE}
    return json.loads(json.dumps(values))  # tuples as lists, as they are read again


def inputs_of_captions(wanted: AnySettings, models: list[Path]) -> list[str | Path]:
    """The files that the captions depend on."""
    images = walk_images(wanted.test_folder, True, in_order=False).paths(wanted.test_folder)
    lists = [*test_csv_places(wanted.test_folder), *(sources(wanted.test_csv) if wanted.test_csv else [])]
    return [*models, *images, *lists]


def fine_tune_blip(settings: Settings, announce: Callable[..., None]) -> dict:
    """Fine-tune, go on, or skip, as `train_attention` does."""
    base = settings.blip_base or ("tiny" if settings.is_demo else blip_training.Settings.base_model)
    wanted = step_settings(
        settings,
        blip_training.Settings,
        "blip_",
        annotations=settings.annotations,
        image_folder=settings.image_folder,
        base_model=base,
        output_folder=settings.blip_folder,
    )
    splits = blip_training.read_records(wanted)
    digest = blip_training.data_digest(*splits)
    paths = [record.path for records in splits for record in records if record.path]

    def has_same_data(checkpoint: dict) -> bool:
        images = checkpoint.get("images")  # earlier releases did not note them
        return checkpoint.get("data") == digest and (images is None or files_are_as_recorded(images, paths))

    source = f"{base} -> {settings.blip_folder}/"
    return run_training("BLIP training", blip_training.train, wanted, has_same_data, source, announce)


def report(settings: Settings, best: dict, blip_best: dict) -> None:
    """Print the scores, where there are references, three examples, and where the files are."""
    made = []  # model, captions, where it is, best epoch
    if best:
        made.append(("attention", Path(settings.output_csv), settings.output_folder, best))
    if blip_best:
        made.append(("BLIP", Path(settings.blip_csv), settings.blip_folder, blip_best))
    say()
    for model, _, _, line in made:
        say(f"{model}: validation BLEU-4 {line['val_bleu4']:.4f} (greedy, epoch {line['epoch']})")
    references, captioned = find_references(settings), Path(settings.test_folder).is_dir()
    if references and captioned and all(result.is_file() for _, result, _, _ in made):
        how = {"columns": columns(settings)}
        rows = [{"model": model} | score_submission(file, references, **how) for model, file, _, _ in made]
        say("test scores:")
        evaluation.print_table(rows)
        records = test_records(read_annotations(references, None, columns(settings)))
        images = {image.image_id: image for image in records}
        for image_id in list(rows[0]["captions"])[:3]:
            say()
            say(f"  {image_id}")
            for row in rows:
                say(f"      {row['model'] + ':':10} {row['captions'][image_id]}")
            for text in images[image_id].captions:
                say(f"      reference: {text}")
    say()
    for model, result, folder, _ in made:
        captions = f"captions in {result}, " if captioned and result.is_file() else ""
        say(f"{model}: {captions}model and history.csv in {folder}/")


def find_references(settings: Settings) -> Sequence[str]:
    """The test annotations, where they have captions."""
    if settings.own_test:
        return settings.annotations
    given = {"annotations": settings.annotations, "test_annotations": settings.test_annotations}
    annotations, _ = create_input_files.find_test(create_input_files.Settings(**given))
    images = read_annotations(annotations, None, columns(settings)) if annotations else []
    return annotations if any(image.captions for image in images) else ()


if __name__ == "__main__":
    run_script(main, Settings)
