"""The whole road in one command: data, training, captions, scores.

    python run_pipeline.py                # on train.csv, train/train/, test.csv, test/test/ where they are,
                                          # else on the demonstration set, which it draws first
    python run_pipeline.py --annotations captions.txt --image_folder Images --epochs 20
    python run_pipeline.py --model both   # the attention model and BLIP, scored on the same test images

A step whose result is there, made from the same input with the same settings, is skipped; an interrupted
training is taken up after its last complete epoch. Every setting of create_input_files.py, train.py and
train_model.py is in those scripts; here are the most used ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import caption
import create_input_files
import direct_caption
import eval as evaluation
import make_demo_data
import train
import train_model as blip_training
from captioning import HUB_MODEL
from captioning.annotations import read_annotations
from captioning.checkpoints import load_checkpoint
from captioning.images import list_images
from captioning.pretrained import check_encoder_name
from datasets import read_prepared
from utils import UserError, check_at_least, check_output, natural_order, read_json, run_script, write_json


@dataclass
class Settings:
    model: Literal["attention", "blip", "both"] = "attention"  # what to train and to caption with
    annotations: str = "train.csv"  # captions to train on, any layout
    image_folder: str = "train/train"  # their images
    test_annotations: str | None = None  # None: the test_captions.csv or test.csv beside a Kaggle train.csv
    test_folder: str = "test/test"  # images to caption
    data_folder: str = "data_output"  # prepared data goes here
    output_folder: str = "output_models"  # checkpoints go here
    output_csv: str = "submission.csv"  # captions go here
    blip_base: str | None = None  # hub id or folder to fine-tune; None: the hub's; tiny for the demonstration
    blip_folder: str = "blip_finetuned_model"  # the fine-tuned BLIP goes here
    blip_csv: str = "blip_submission.csv"  # its captions go here
    min_word_freq: int = 5  # words seen less often in training captions become <unk>
    encoder_name: str | None = None  # None: resnet101; the demonstration's own where that is used
    epochs: int | None = None  # None: train.py's own number; the demonstration's own where that is used
    blip_epochs: int | None = None  # None: train_model.py's own number
    batch_size: int = 16  # images a training step of the attention model
    beam_size: int = 3  # of the captions
    demo_images: int = 0  # training scenes that the demonstration draws; 0: make_demo_data.py's own number
    seed: int = 123  # of everything random

    def __post_init__(self):
        check_at_least(self, 1, "batch_size", "beam_size")
        check_at_least(self, 0, "demo_images")
        for name in ("epochs", "blip_epochs"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)
        if self.encoder_name is not None:
            check_encoder_name(self.encoder_name)


# what the demonstration is trained with: small, so that it learns in minutes without a GPU
DEMO = {
    "encoder_name": "efficientnet_lite0",
    "emb_dim": 64,
    "attention_dim": 48,
    "decoder_dim": 192,
    "epochs": 8,
    "decoder_lr": 2e-3,
    "alpha_c": 0.1,
    "workers": 0,
}


def main(settings: Settings) -> None:
    for folder in (settings.data_folder, settings.output_folder, settings.blip_folder):
        check_output(folder, folder=True)
    for file in (settings.output_csv, settings.blip_csv):
        check_output(file)
    if settings.test_folder != Settings.test_folder and not Path(settings.test_folder).is_dir():
        raise UserError(f"{settings.test_folder}: no such folder; give the one with images to caption")
    steps = announce_steps({"attention": 4, "blip": 3, "both": 6}[settings.model])
    settings, demo = choose_data(settings, steps)
    best, blip_best = {}, {}
    if settings.model != "blip":
        prepare(settings, steps)
        best = train_model(settings, DEMO if demo else {}, steps)
        caption_test_images(settings, steps)
    if settings.model != "attention":
        blip_best = fine_tune_blip(settings, demo, steps)
        caption_with_blip(settings, steps)
    report(settings, best, blip_best)


def announce_steps(count: int) -> Callable[[str], None]:
    """A function that prints a text with the number of the step."""
    numbers = itertools.count(1)
    return lambda text: print(f"[{next(numbers)}/{count}] {text}", flush=True)


def choose_data(settings: Settings, announce: Callable[[str], None]) -> tuple[Settings, bool]:
    """The user's data, or the demonstration's where there are none of the user's."""
    defaults = Settings()
    own = settings.annotations != defaults.annotations or settings.image_folder != defaults.image_folder
    if own or Path(settings.annotations).exists():
        announce(f"data: {settings.annotations}, {settings.image_folder}/")
        return settings, False
    drawing = make_demo_data.Settings()
    if settings.demo_images:
        drawing = replace(drawing, train_images=settings.demo_images)
    folder = Path(drawing.output_folder)
    print(f"no {settings.annotations} here: using the demonstration set in {folder}/ (coloured shapes)")
    if drawn_images(folder) == drawing.train_images:
        announce(f"data: {folder}/ is there, skipped")
    else:
        announce(f"data: drawing {folder}/")
        make_demo_data.make_demo_data(drawing)
    paths = {
        "annotations": str(folder / "train.csv"),
        "image_folder": str(folder / "train" / "train"),
        "test_annotations": str(folder / "test_captions.csv"),
        "test_folder": str(folder / "test" / "test"),
    }
    return replace(settings, **paths), True


def drawn_images(folder: Path) -> int:
    """How many training images of a complete drawing there are; boxes.json is written last."""
    return len(list((folder / "train" / "train").glob("*.jpg"))) if (folder / "boxes.json").is_file() else 0


def prepare(settings: Settings, announce: Callable[[str], None]) -> None:
    has_test = settings.test_annotations is not None
    wanted = create_input_files.Settings(
        annotations=settings.annotations,
        image_folder=settings.image_folder,
        test_annotations=settings.test_annotations,
        test_image_folder=settings.test_folder if has_test else None,
        output_folder=settings.data_folder,
        min_word_freq=settings.min_word_freq,
        seed=settings.seed,
    )
    if (Path(settings.data_folder) / "prepared.json").is_file():
        record = read_prepared(settings.data_folder)
        same = record["settings"] == asdict(wanted) and record["inputs"] == create_input_files.input_files(
            wanted
        )
        if same:
            announce(f"preparation: {settings.data_folder}/ is up to date, skipped")
            return
    announce(f"preparation: {settings.annotations} -> {settings.data_folder}/")
    create_input_files.create_input_files(wanted)


def train_model(settings: Settings, own: dict, announce: Callable[[str], None]) -> dict:
    """Train, go on with an interrupted training, or skip; return the history's line of the best epoch."""
    chosen = {
        name: value for name in ("encoder_name", "epochs") if (value := getattr(settings, name)) is not None
    }
    wanted = train.Settings(
        **own | chosen,
        data_folder=settings.data_folder,
        output_folder=settings.output_folder,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    last = last_checkpoint(wanted)
    if last is not None:
        history = load_checkpoint(last)["history"]
        if (
            len(history) >= wanted.epochs
            or train.epochs_since_best(history, wanted.select_by) >= train.STOP_AFTER
        ):
            announce(f"training: {settings.output_folder}/ is up to date, skipped")
            return history[train.best_epoch(history, wanted.select_by)]
        announce(f"training: going on after {last}")
        wanted = replace(wanted, checkpoint=str(last))
    else:
        announce(f"training: {settings.data_folder}/ -> {settings.output_folder}/")
    return train.train(wanted)


def last_checkpoint(wanted: train.Settings) -> Path | None:
    """The last checkpoint of a training on the same data with the same settings, the number of epochs
    apart."""
    checkpoints = Path(wanted.output_folder).glob("checkpoint_epoch_*.pth")
    last = max(checkpoints, key=lambda path: natural_order(path.name), default=None)
    if last is None:
        return None
    try:
        checkpoint = load_checkpoint(last)
    except UserError:
        return None  # no checkpoint of ours: train anew
    free = {"epochs": None, "checkpoint": None}
    record = read_prepared(wanted.data_folder)
    same_data = checkpoint.get("data") == {"settings": record["settings"], "inputs": record["inputs"]}
    return last if same_data and checkpoint["settings"] | free == asdict(wanted) | free else None


def caption_test_images(settings: Settings, announce: Callable[[str], None]) -> None:
    output, result = Path(settings.output_folder), Path(settings.output_csv)
    models = [output / "encoder.pth", output / "decoder.pth"]
    if nothing_to_caption("captions", settings, result, models, announce):
        return
    announce(f"captions: {settings.test_folder}/ -> {result}")
    caption.caption_images(
        *models, None, settings.test_folder, result, settings.beam_size, batch_size=settings.batch_size
    )
    write_json(record_file(result, models), made_of(settings, result, models))


def nothing_to_caption(
    step: str, settings: Settings, result: Path, models: list[Path], announce: Callable[[str], None]
) -> bool:
    """Say so where there are no test images, or where `result` is what was made of the same files."""
    if not Path(settings.test_folder).is_dir():
        announce(f"{step}: no {settings.test_folder}/, skipped")
        return True
    record = record_file(result, models)
    if record.is_file() and read_json(record) == made_of(settings, result, models):
        announce(f"{step}: {result} is up to date, skipped")
        return True
    return False


def record_file(result: Path, models: list[Path]) -> Path:
    """Where it is kept what the captions were made of: beside the model."""
    return models[0].parent / f"{result.stem}_made_of.json"


def made_of(settings: Settings, result: Path, models: list[Path]) -> dict:
    """What the captions depend on, and themselves: size and time of each file."""
    images = list_images(settings.test_folder)
    folder = images[0].parent.resolve()
    lists = [place / "test.csv" for place in (folder, folder.parent, folder.parent.parent)]
    files = [result, *models, *images, *lists]
    stats = {str(file): file.stat() for file in files if file.is_file()}
    sizes = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {"beam_size": settings.beam_size, "files": sizes}


def fine_tune_blip(settings: Settings, demo: bool, announce: Callable[[str], None]) -> dict:
    """Fine-tune, go on, or skip, as `train_model` does."""
    base = settings.blip_base or ("tiny" if demo else HUB_MODEL)
    wanted = blip_training.Settings(
        annotations=settings.annotations,
        image_folder=settings.image_folder,
        base_model=base,
        output_folder=settings.blip_folder,
        epochs=settings.blip_epochs,
        seed=settings.seed,
    )
    history = blip_training.same_run(wanted)
    if history and len(history) >= wanted.epochs:
        announce(f"BLIP training: {settings.blip_folder}/ is up to date, skipped")
        return history[blip_training.best_epoch(history)]
    announce(f"BLIP training: {base} -> {settings.blip_folder}/")
    return blip_training.train(replace(wanted, resume=bool(history)))


def caption_with_blip(settings: Settings, announce: Callable[[str], None]) -> None:
    result, weights = Path(settings.blip_csv), Path(settings.blip_folder) / "model.safetensors"
    if nothing_to_caption("BLIP captions", settings, result, [weights], announce):
        return
    announce(f"BLIP captions: {settings.test_folder}/ -> {result}")
    direct_caption.caption_images(
        settings.blip_folder, settings.test_folder, result, num_beams=settings.beam_size
    )
    write_json(record_file(result, [weights]), made_of(settings, result, [weights]))


def report(settings: Settings, best: dict, blip_best: dict) -> None:
    """Print the scores, where there are references, three examples, and where the files are."""
    made = []  # model, captions, where it is, best epoch
    if best:
        made.append(("attention", Path(settings.output_csv), settings.output_folder, best))
    if blip_best:
        made.append(("BLIP", Path(settings.blip_csv), settings.blip_folder, blip_best))
    print()
    for model, _, _, line in made:
        print(f"{model}: validation BLEU-4 {line['val_bleu4']:.4f} (greedy, epoch {line['epoch']})")
    references = find_references(settings)
    if references and all(result.is_file() for _, result, _, _ in made):
        rows = [
            {"model": model} | evaluation.score_submission(result, references) for model, result, _, _ in made
        ]
        print(f"test scores (beam {settings.beam_size}):")
        evaluation.print_table(rows)
        images = {image.image_id: image for image in read_annotations(references)}
        for image_id in list(rows[0]["captions"])[:3]:
            print(f"\n  {image_id}")
            for row in rows:
                print(f"      {row['model'] + ':':10} {row['captions'][image_id]}")
            for text in images[image_id].captions:
                print(f"      reference: {text}")
    print()
    for model, result, folder, _ in made:
        captions = f"captions in {result}, " if result.is_file() else ""
        print(f"{model}: {captions}model and history.csv in {folder}/")


def find_references(settings: Settings) -> str | None:
    """The test annotations, where they have captions."""
    annotations, _ = create_input_files.find_test(
        create_input_files.Settings(
            annotations=settings.annotations, test_annotations=settings.test_annotations
        )
    )
    images = read_annotations(annotations) if annotations else []
    return annotations if any(image.captions for image in images) else None


if __name__ == "__main__":
    run_script(main, Settings)
