"""Caption images, or a folder of them, with BLIP: model + images -> blip_submission.csv.

    python direct_caption.py --model_path blip_finetuned_model/
    python direct_caption.py            # with nothing: Salesforce/blip-image-captioning-base, from the hub
    python direct_caption.py --prompt "a photo of" --conditional
    python direct_caption.py photo.jpg other.jpg    # with a figure each of where the model looked

Other captioners of the hub with the same interface (GIT, ViT-GPT2, BLIP-2) work by --model_path too; figures
are for BLIP without a prompt. docs/folders.md has more on folders.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from captioning import HUB_MODEL
from captioning.command_line import check_at_least, run_script
from captioning.data.images import check_image
from captioning.decoding.options import CommonDecodingOptions, DecodingOptions
from captioning.folders.plan import FolderOptions
from captioning.folders.run import caption_folder
from captioning.report.figures import caption_files, caption_line
from utils import Device, UserError, is_main_process, pick_device, say, tell

if TYPE_CHECKING:
    from captioning.captioners.blip import BlipCaptioner

DEFAULT_OUTPUT = "blip_submission.csv"


@dataclass
class Settings(FolderOptions, CommonDecodingOptions):
    """The settings of this script. `--help` also lists those of FolderOptions (captioning/folders/plan.py)
    and CommonDecodingOptions (captioning/decoding/options.py); to change one of these for this script, repeat
    its line here."""

    # what to caption
    images: tuple[str, ...] = field(default=(), metadata={"positional": True})  # image files; none: a folder
    test_folder: str = "test/test"  # images to caption
    output_csv: str | None = None  # .csv, .json or .jsonl; None: blip_submission.csv, none with sidecars
    # the model
    model_path: str = HUB_MODEL  # a folder that train_model.py wrote, or a model of the hub
    mixed_precision: bool = False  # bfloat16 on CUDA
    device: Device = "auto"  # auto: a GPU where there is one
    batch_size: int = 16  # images captioned at a time
    # captions
    num_beams: int = 3  # hypotheses searched at a time; 1 is greedy
    num_captions: int = 1  # of each image: the best of the beam, no two alike, or so many samples
    max_new_tokens: int = 30  # longest caption, in tokens
    prompt: str = ""  # words that every caption begins with (BLIP); they are cut from the result
    conditional: bool = False  # leave the prompt in the captions

    def __post_init__(self):
        check_at_least(self, 1, "num_beams", "max_new_tokens")
        options = DecodingOptions.of(self, beam_size=self.num_beams)
        FolderOptions.of(self, DEFAULT_OUTPUT).check(options)  # refuses what cannot be
        if self.min_length > self.max_new_tokens:
            raise UserError(f"--min_length is {self.min_length}: give --max_new_tokens of as many")
        if self.conditional and not self.prompt.strip():
            raise UserError('--conditional needs a prompt: give --prompt "a photo of", or the like')


def main(settings: Settings) -> int:
    if settings.images:
        return caption_single_images(settings)
    decoding = asdict(DecodingOptions.of(settings, beam_size=settings.num_beams))
    failed = caption_images(
        settings.model_path,
        num_beams=decoding.pop("beam_size"),
        max_new_tokens=settings.max_new_tokens,
        prompt=settings.prompt,
        conditional=settings.conditional,
        mixed_precision=settings.mixed_precision,
        **decoding,
        **asdict(FolderOptions.of(settings, DEFAULT_OUTPUT)),
    )
    return 1 if failed else 0


def caption_single_images(settings: Settings) -> int:
    """Print each image's captions, and draw where the model looked if it is BLIP without a prompt."""
    for image in settings.images:
        check_image(image)  # complain before the model is loaded
    half = settings.mixed_precision and torch.cuda.is_available()
    captioner = _load(settings.model_path, half, settings.mixed_precision, settings.prompt)
    options = DecodingOptions.of(settings, beam_size=settings.num_beams)
    search = {"with_scores": settings.with_scores, "max_new_tokens": settings.max_new_tokens}
    if captioner.model.config.model_type == "blip" and not settings.prompt:
        caption_files(captioner, settings.images, options, **search)
        return 0
    search |= {"prompt": settings.prompt, "keep_prompt": settings.conditional}
    for image in settings.images:
        prepared = captioner.prepare(image).unsqueeze(0)
        (captions,) = captioner.decode_prepared(prepared, options, [Path(image).stem], **search)
        for caption in captions:
            name = "" if len(settings.images) == 1 else image
            say(caption_line(caption, settings.with_scores, name))
    tell("no figures: these are for BLIP without a prompt")
    return 0


def caption_images(
    model_path: str | Path = HUB_MODEL,
    test_folder: str | Path = "test/test",
    output_csv: str | Path | None = DEFAULT_OUTPUT,
    test_csv: str | Path | None = None,
    batch_size: int = 16,
    num_beams: int = 3,
    max_new_tokens: int = 30,
    prompt: str = "",
    conditional: bool = False,
    mixed_precision: bool = False,
    workers: int = 4,
    **options,
) -> list[str]:
    """Caption the images of a folder into a CSV `image_id,caption`, with the same rows as caption.py.

    Captions do not depend on batch_size or on the order of the images. With a prompt, BLIP continues it; the
    prompt is cut from the captions unless `conditional` is true.

    Args:
        options: more of `FolderOptions`, such as recursive or sidecars, and of `DecodingOptions`, such as
            num_captions.

    Returns:
        One line for each image that could not be read, with the reason; its caption is empty.

    Raises:
        UserError: wrong input, or not one readable image.
    """
    half = mixed_precision and torch.cuda.is_available()
    decoding = DecodingOptions.taken_from(options, beam_size=num_beams)
    search = {"max_new_tokens": max_new_tokens, "prompt": prompt, "keep_prompt": conditional}
    return caption_folder(
        FolderOptions(
            test_folder,
            test_csv=test_csv,
            output_csv=output_csv,
            batch_size=batch_size,
            workers=workers,
            **options,
        ),
        lambda: _load(model_path, half, mixed_precision, prompt),
        _model_files(model_path),
        decoding,
        search,
        depends_on={"precision": "bfloat16" if half else "float32"},
    )


def _load(model_path: str | Path, half: bool, mixed_precision: bool, prompt: str) -> BlipCaptioner:
    """The captioner on its device and in its precision."""
    from captioning.captioners.blip import load_captioner, require_blip

    captioner = load_captioner(model_path)
    if prompt:
        require_blip(captioner, model_path, "--prompt")
    if mixed_precision and not half and is_main_process():
        say("mixed precision is for CUDA; captioning in float32")
    captioner.model.to(pick_device(), torch.bfloat16 if half else torch.float32)
    return captioner


def _model_files(model_path: str | Path) -> str | list[Path]:
    """The files of a model's folder that captions depend on. For a hub model its name: once it has been
    fetched, it stays the same."""
    folder = Path(model_path)
    if not folder.is_dir():
        return str(model_path)
    patterns = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "vocab*", "merges.txt")
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


if __name__ == "__main__":
    run_script(main, Settings)
