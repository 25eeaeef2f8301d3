"""The whole road in one command: data, training, captions, scores.

    python run_pipeline.py                # on train.csv, train/train/, test.csv, test/test/ where they are,
                                          # else on the demonstration set, which it draws first
    python run_pipeline.py --annotations captions.txt --image_folder Images --epochs 20

A step whose result is there, made from the same input with the same settings, is skipped; an interrupted
training is taken up after its last complete epoch. Every setting of create_input_files.py and train.py is in
those scripts; here are the most used ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import caption
import create_input_files
import eval as evaluation
import make_demo_data
import train
from checkpoints import load_checkpoint
from datasets import read_annotations, read_prepared
from utils import UserError, check_at_least, natural_order, run_script


@dataclass
class Settings:
    annotations: str = "train.csv"  # captions to train on, any layout
    image_folder: str = "train/train"  # their pictures
    test_annotations: str | None = None  # None: the test_captions.csv or test.csv beside a Kaggle train.csv
    test_folder: str = "test/test"  # pictures to caption
    data_folder: str = "data_output"  # prepared data goes here
    output_folder: str = "output_models"  # checkpoints go here
    output_csv: str = "submission.csv"  # captions go here
    min_word_freq: int = 5  # words seen less often in training captions become <unk>
    encoder_name: str | None = None  # None: resnet101; the demonstration's own where that is used
    epochs: int | None = None  # None: train.py's own number; the demonstration's own where that is used
    batch_size: int = 16  # pictures a training step
    beam_size: int = 3  # of the captions
    demo_pictures: int = 0  # training scenes that the demonstration draws; 0: make_demo_data.py's own number
    seed: int = 123  # of everything random

    def __post_init__(self):
        check_at_least(self, 1, "batch_size", "beam_size")
        check_at_least(self, 0, "demo_pictures")


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
    settings, demo = choose_data(settings)
    prepare(settings)
    best = train_model(settings, DEMO if demo else {})
    caption_test_pictures(settings)
    report(settings, best)


def choose_data(settings: Settings) -> tuple[Settings, bool]:
    """The user's data, or the demonstration's where there are none of the user's."""
    defaults = Settings()
    own = settings.annotations != defaults.annotations or settings.image_folder != defaults.image_folder
    if own or Path(settings.annotations).exists():
        return settings, False
    drawing = make_demo_data.Settings()
    if settings.demo_pictures:
        drawing = replace(drawing, train_pictures=settings.demo_pictures)
    folder = Path(drawing.output_folder)
    print(f"no {settings.annotations} here: using the demonstration set in {folder}/ (coloured shapes)")
    if drawn_pictures(folder) == drawing.train_pictures:
        print(f"[1/4] data: {folder}/ is there, skipped")
    else:
        print(f"[1/4] data: drawing {folder}/")
        make_demo_data.make_demo_data(drawing)
    paths = {
        "annotations": str(folder / "train.csv"),
        "image_folder": str(folder / "train" / "train"),
        "test_annotations": str(folder / "test_captions.csv"),
        "test_folder": str(folder / "test" / "test"),
    }
    return replace(settings, **paths), True


def drawn_pictures(folder: Path) -> int:
    """How many training pictures of a complete drawing there are; boxes.json is written last."""
    return len(list((folder / "train" / "train").glob("*.jpg"))) if (folder / "boxes.json").is_file() else 0


def prepare(settings: Settings) -> None:
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
            print(f"[2/4] preparation: {settings.data_folder}/ is up to date, skipped")
            return
    print(f"[2/4] preparation: {settings.annotations} -> {settings.data_folder}/")
    create_input_files.create_input_files(wanted)


def train_model(settings: Settings, own: dict) -> dict:
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
            print(f"[3/4] training: {settings.output_folder}/ is up to date, skipped")
            return history[train.best_epoch(history, wanted.select_by)]
        print(f"[3/4] training: going on after {last}")
        wanted = replace(wanted, checkpoint=str(last))
    else:
        print(f"[3/4] training: {settings.data_folder}/ -> {settings.output_folder}/")
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


def caption_test_pictures(settings: Settings) -> None:
    output = Path(settings.output_folder)
    inputs = [output / "encoder.pth", output / "decoder.pth", Path(settings.test_folder)]
    result = Path(settings.output_csv)
    if not inputs[2].is_dir():
        print(f"[4/4] captions: no {settings.test_folder}/, skipped")
        return
    if result.is_file() and result.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        print(f"[4/4] captions: {result} is up to date, skipped")
        return
    print(f"[4/4] captions: {settings.test_folder}/ -> {result}")
    caption.caption_images(
        inputs[0],
        inputs[1],
        None,
        settings.test_folder,
        result,
        settings.beam_size,
        batch_size=settings.batch_size,
    )


def report(settings: Settings, best: dict) -> None:
    """Print the scores, where there are references, three examples, and where the files are."""
    print(f"\nvalidation BLEU-4 {best['val_bleu4']:.4f} (greedy, epoch {best['epoch']})")
    result = Path(settings.output_csv)
    references = find_references(settings)
    if references and result.is_file():
        row = evaluation.score_submission(result, references)
        print(f"test scores (beam {settings.beam_size}):")
        evaluation.print_table([row])
        pictures = {picture.image_id: picture for picture in read_annotations(references)}
        for image_id, caption_found in list(row["captions"].items())[:3]:
            print(f"\n  {image_id}: {caption_found}")
            for text in pictures[image_id].captions:
                print(f"      reference: {text}")
    print(f"\ncaptions: {result}\nmodels:   {settings.output_folder}/ (history.csv, best_checkpoint.pth)")
    print(f"data:     {settings.data_folder}/")


def find_references(settings: Settings) -> str | None:
    """The test annotations, where they have captions."""
    annotations, _ = create_input_files.find_test(
        create_input_files.Settings(
            annotations=settings.annotations, test_annotations=settings.test_annotations
        )
    )
    pictures = read_annotations(annotations) if annotations else []
    return annotations if any(picture.captions for picture in pictures) else None


if __name__ == "__main__":
    run_script(main, Settings)
