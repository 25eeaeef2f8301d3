"""Look at captions: images, captions, scores and attention -> gallery/index.html, to be opened in a browser.

    python view_captions.py                                     # best_checkpoint.pth on the test images
    python view_captions.py --checkpoint a.pth b.pth                    # compare models
    python view_captions.py --checkpoint a.pth --model_path blip_finetuned_model/
    python view_captions.py --submission submission.csv blip_submission.csv --references test_captions.csv
    python view_captions.py --img photo.jpg --beam_size 5               # one image: the n best captions

A word's attention is laid over the image under the mouse, the finger or the keyboard. The page also compares
the models (paired bootstrap over the images) and says what their captions are like; quality.json has the same
numbers. With --figures each image's attention is drawn as a PNG too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captioning.command_line import allow_single, check_at_least, run_script
from captioning.data.images import check_image
from captioning.data.prepared import Record
from captioning.data.tables import Columns
from captioning.decoding.options import DecodingOptions
from captioning.folders.plan import find_images
from captioning.report.comparison import compare_pairs
from captioning.report.figures import draw_attention, draw_maps
from captioning.report.gallery import ShownCaption, ShownModel, check_folder, write_gallery
from captioning.report.quality import attention_summary, caption_quality
from captioning.report.scoring import (
    find_common,
    find_image_folders,
    match_submission,
    names_of,
    prepared_records,
    reference_records,
    report_scores,
    training_texts,
)
from metrics import tokenize
from utils import Device, UserError, check_output, counted, progress_bar, say, write_json

if TYPE_CHECKING:  # files of captions are shown without torch, which takes seconds to import
    from captioning.captioners.base import BaseCaptioner


@dataclass
class Settings:
    # what to look at
    checkpoint: tuple[str, ...] = ()  # models of train.py; none: output_models/best_checkpoint.pth
    model_path: tuple[str, ...] = ()  # BLIP: folders of train_model.py, or models of the hub
    submission: tuple[str, ...] = ()  # files of captions: CSV, JSON, JSON lines
    word_map: str | None = None  # word_map.json, for checkpoints that have none
    # on which images
    references: tuple[str, ...] = ()  # annotations of the images, any layout; none: those of data_folder
    image_folder: tuple[str, ...] = ()  # the images of --references; none: test/test, if it is there
    id_column: str | None = None  # column of the images in tables of any names; None: recognized
    caption_column: str | None = None  # column of the captions; None: recognized
    img: str | None = None  # one image, with the n best captions of one model
    data_folder: str = "data_output"  # what create_input_files.py wrote
    split: str = "test"  # train, val or test
    limit: int = 0  # only the first so many images; 0: all
    # how they are captioned
    beam_size: int = 3  # hypotheses searched at a time; 1 is greedy
    batch_size: int = 16  # images captioned at a time
    device: Device = "auto"  # auto: a GPU where there is one
    # files to write
    output_folder: str = "gallery"  # index.html and its data
    figures: str | None = None  # a folder: draw each image's attention there as a PNG

    def __post_init__(self):
        allow_single(self, "checkpoint", "model_path", "submission", "references", "image_folder")
        self.columns = Columns(self.id_column, self.caption_column)
        check_at_least(self, 1, "beam_size", "batch_size")
        check_at_least(self, 0, "limit")
        if self.img and (self.submission or len(self.checkpoint) + len(self.model_path) > 1):
            raise UserError("--img is for one model: give one --checkpoint or one --model_path")


def main(settings: Settings) -> None:
    check_folder(settings.output_folder)
    if settings.figures:
        check_output(settings.figures, folder=True)
    if settings.img:
        view_image(settings)
        return
    records = choose_records(settings)
    models = caption_all(settings, records)
    captioned = {image_id for model in models for image_id in model.captions}
    records = [record for record in records if record.image_id in captioned]
    score_models(models, records)
    judge_captions(models, records, settings)
    comparisons = compare_all(models, records)
    index, problems = write_gallery(
        settings.output_folder,
        records,
        models,
        comparisons,
        f"{counted(len(records), 'image')} of {source(settings)}",
    )
    for problem in problems[:10]:
        say(f"shown without image: {problem}")
    if len(problems) > 10:
        say(f"shown without image: {len(problems) - 10} more; --image_folder tells where they are")
    quality = Path(settings.output_folder) / "quality.json"
    write_json(quality, {model.name: model.quality for model in models})
    if settings.figures:
        draw_figures(Path(settings.figures), models, records)
    say(f"written: {quality}")
    say(f"open in a browser: {index}")


def view_image(settings: Settings) -> None:
    """Write a gallery of one image, in which each of the n best captions has a row."""
    check_image(settings.img)  # complain before the model is loaded
    (name, captioner), *_ = load_captioners(settings)
    n_best = captioner.caption(settings.img, settings.beam_size, details=True).n_best
    key = Path(settings.img).name
    models = [
        ShownModel(f"{rank}. best", {key: ShownCaption.of(caption)})
        for rank, caption in enumerate(n_best, start=1)
    ]
    for caption in n_best:
        say(f"{caption.log_prob:9.3f}  {caption.text}")
    records = [Record(key, settings.img)]
    index, _ = write_gallery(settings.output_folder, records, models, title=f"{key}, {name}")
    if settings.figures:
        draw_figures(Path(settings.figures), models, records)
    say(f"open in a browser: {index}")


def load_captioners(settings: Settings) -> Iterator[tuple[str, BaseCaptioner]]:
    """Yield the name and the captioner of each model; one model is in memory at a time."""
    from captioning.captioners.attention import Captioner

    checkpoints = settings.checkpoint
    if not (checkpoints or settings.model_path):
        checkpoints = ("output_models/best_checkpoint.pth",)
    for file in checkpoints:
        yield file, Captioner.load(file, settings.word_map)
    for name in settings.model_path:
        yield name, Captioner.load(name)


# --- images and captions ------------------------------------------------------------------------------------


def choose_records(settings: Settings) -> list[Record]:
    """The images to look at, with their references where there are any."""
    prepared = (Path(settings.data_folder) / "prepared.json").is_file()
    if settings.references or settings.submission or settings.image_folder or not prepared:
        folders = find_image_folders(settings.references, settings.image_folder)
        if settings.references:
            records = reference_records(settings.references, settings.split, folders, settings.columns)
        elif folders:
            found = [image for folder in folders for image in find_images(folder)]
            records = [Record(image_id, path) for image_id, path in found]
        elif settings.submission and prepared:
            records = prepared_records(settings.data_folder, settings.split)
        else:
            raise UserError(
                f"{settings.data_folder}: no prepared data in it; give --references FILE and --image_folder "
                f"FOLDER, or run create_input_files.py first"
            )
    else:
        records = prepared_records(settings.data_folder, settings.split)
    return records[: settings.limit] if settings.limit else records


def caption_all(settings: Settings, records: Sequence[Record]) -> list[ShownModel]:
    """Read the captions of each file, and let each model caption the images."""
    whose = names_of(settings.references) or "the folder of images"
    models = read_submissions(settings, records, whose)
    if settings.submission and not (settings.checkpoint or settings.model_path):
        return give_short_names(models)
    from captioning.captioners.base import describe_files

    paths = {record.image_id: record.path for record in records if record.path}
    if not paths:
        raise UserError(f"{whose}: no image file of any id; give --image_folder, where the images are")
    for name, captioner in load_captioners(settings):
        captions, problems = describe_files(
            captioner, paths, DecodingOptions(settings.beam_size), settings.batch_size
        )
        for problem in problems:
            say(f"left out: {problem}")
        if not captions:
            raise UserError(f"not one readable image among {len(paths)}; the lines above name them")
        shown_captions = {key: ShownCaption.of(caption) for key, caption in captions.items()}
        models.append(ShownModel(name, shown_captions))
    return give_short_names(models)


def read_submissions(settings: Settings, records: Sequence[Record], whose: str) -> list[ShownModel]:
    """Read the captions that each file has for the images of the records.

    whose: where these are from, for messages.
    """
    models = []
    for file in settings.submission:
        captions, missing, unknown = match_submission(file, records, whose, True, settings.columns)
        left_out = [f"{counted(len(missing), 'image')} without a caption"] if missing else []
        left_out += (
            [f"{counted(len(unknown), 'unknown row')} left out"] if unknown and not settings.limit else []
        )
        if left_out:
            say(f"{file}: {', '.join(left_out)}")
        shown_captions = {key: ShownCaption(text, text.split()) for key, text in captions.items()}
        models.append(ShownModel(file, shown_captions))
    settings.columns.check()
    return models


def give_short_names(models: list[ShownModel]) -> list[ShownModel]:
    """Shorten the models' names to the files' names, as long as they stay different."""
    names = [Path(model.name).name for model in models]
    if len(set(names)) < len(names):
        names = [model.name for model in models]
    for i, model in enumerate(models):
        model.name = names[i] if names.count(names[i]) == 1 else f"{names[i]} ({i + 1})"
    return models


def source(settings: Settings) -> str:
    """Where the images come from, for the page's title."""
    if settings.references or settings.image_folder:
        return ", ".join(Path(file).name for file in settings.references or settings.image_folder)
    return f"{settings.data_folder}, {settings.split}"


# --- numbers ------------------------------------------------------------------------------------------------


def score_models(models: Sequence[ShownModel], records: Sequence[Record]) -> None:
    """Score each model on the images that it has captioned and that have references; its scores of all images
    together are of those that all models have captioned, where there are any."""
    references = {record.image_id: record.captions for record in records if record.captions}
    texts = [
        {key: caption.text for key, caption in model.captions.items() if key in references}
        for model in models
    ]
    common = find_common([model.name for model in models], texts)
    for model, own in zip(models, texts):
        if not own:
            continue
        model.scores = report_scores({key: references[key] for key in own}, own)
        if 0 < len(common) < len(own):
            own = {key: text for key, text in own.items() if key in common}
            shared = report_scores({key: references[key] for key in own}, own)
            model.scores = replace(model.scores, overall=shared.overall)


def judge_captions(models: Sequence[ShownModel], records: Sequence[Record], settings: Settings) -> None:
    """Describe each model's captions: its `quality`."""
    references = {record.image_id: [tokenize(text) for text in record.captions] for record in records}
    known_words, training_captions = training_texts(settings.data_folder)
    for model in models:
        words = {key: tokenize(caption.text) for key, caption in model.captions.items()}
        references_of_model = {key: references[key] for key in words if references[key]}
        model.quality = caption_quality(words, references_of_model, known_words, training_captions)
        with_attention = [
            caption
            for caption in model.captions.values()
            if caption.attention is not None and len(caption.attention)
        ]
        model.quality["attention"] = attention_summary(
            [caption.words for caption in with_attention], [caption.attention for caption in with_attention]
        )


def compare_all(models: Sequence[ShownModel], records: Sequence[Record]) -> list[dict]:
    """Compare every two models on the images that both have captioned and that have references."""
    comparisons = compare_pairs(
        {record.image_id: record.captions for record in records if record.captions},
        [model.name for model in models],
        [{key: caption.text for key, caption in model.captions.items()} for model in models],
        [model.scores for model in models],
    )
    for comparison in comparisons:
        say(comparison["verdict"])
    return comparisons


# --- figures ------------------------------------------------------------------------------------------------


def draw_figures(folder: Path, models: Sequence[ShownModel], records: Sequence[Record]) -> None:
    """Write a numbered PNG of each image's attention, and one of each model's mean attention."""
    count = 0
    for number, model in enumerate(models, start=1):
        prefix = f"model{number}_" if len(models) > 1 else ""
        for i, record in enumerate(progress_bar(records, desc=f"figures, {model.name}", unit="image")):
            caption = model.captions.get(record.image_id)
            if caption is None or caption.attention is None or not record.path:
                continue
            title = f"{caption.text}   ({caption.log_prob:.2f})"
            file = folder / f"{prefix}{i:05d}_{file_name(record.image_id)}.png"
            draw_attention(file, record.path, caption.words, caption.attention, title)
            count += 1
        maps = model.quality.get("attention", {}).get("mean_maps")
        if maps:
            maps = {name: np.array(values) for name, values in maps.items()}
            draw_maps(folder / f"{prefix}mean_attention.png", maps)
            count += 1
    say(
        f"written: {counted(count, 'figure')} in {folder}/"
        if count
        else "no figures: no caption has attention"
    )


def file_name(image_id: str) -> str:
    """An image's id as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in image_id)[:60]


if __name__ == "__main__":
    run_script(main, Settings)
