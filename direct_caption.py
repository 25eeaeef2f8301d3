"""Caption images, or a folder of them, with a pretrained captioner: model + images -> blip_submission.csv.

    python direct_caption.py --model_path blip_finetuned_model/
    python direct_caption.py            # with nothing: Salesforce/blip-image-captioning-base, from the hub
    python direct_caption.py --prompt "a photo of" --conditional
    python direct_caption.py photo.jpg other.jpg    # with a figure each of where the model looked
    python direct_caption.py --model_path Qwen/Qwen2.5-VL-3B-Instruct --prompt "Describe the photo."

docs/captioners.md has the families that work: BLIP, GIT, BLIP-2, Florence-2, PaliGemma, and chat models such
as LLaVA, Qwen-VL and SmolVLM. Figures are for BLIP without a prompt. docs/folders.md has more on folders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from captioning import HUB_MODEL
from captioning.command_line import check_at_least, run_script
from captioning.data.images import check_image
from captioning.data.sidecars import Sidecars
from captioning.decoding.options import CHECKS, CommonDecodingOptions, DecodingOptions, check_names
from captioning.folders.plan import FolderOptions
from captioning.folders.run import caption_folder
from captioning.report.figures import caption_files, caption_line
from utils import Device, UserError, say, tell

if TYPE_CHECKING:
    from captioning.captioners.vision_language import VisionLanguageCaptioner

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
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: the checkpoint's on CUDA, fp32 elsewhere
    load_in_4bit: bool = False  # weights of 4 bits; needs CUDA and bitsandbytes
    load_in_8bit: bool = False  # weights of 8 bits; needs CUDA and bitsandbytes
    device_map: Literal["auto"] | None = None  # auto: spread the model over the GPUs and the CPU
    device: Device = "auto"  # auto: a GPU where there is one
    batch_size: int = 16  # images captioned at a time; halved where the GPU's memory is full
    max_pixels: int = 0  # larger images are made smaller, to this area; 0: as the model's processor does it
    # what it is asked
    prompt: str = ""  # the task, with {name}, {folder}, {caption} of the image; BLIP's captions begin with it
    system_prompt: str = ""  # how a chat model is to answer
    conditional: bool = False  # leave the prompt in the captions of BLIP, from which it is cut otherwise
    # captions
    num_beams: int = 3  # hypotheses searched at a time; 1 is greedy
    num_captions: int = 1  # of each image: the best of the beam, no two alike, or so many samples
    max_new_tokens: int | None = None  # longest caption, in tokens; None: 256 of chat models, 30 of others
    checks: tuple[str, ...] = tuple(CHECKS)  # what no caption may be; none: any caption will do
    retries: int = 2  # times that a caption which fails the checks is drawn again, before the image is named

    def __post_init__(self):
        check_at_least(self, 1, "num_beams", *["max_new_tokens"] * (self.max_new_tokens is not None))
        check_at_least(self, 0, "retries")
        if self.max_pixels:
            check_at_least(self, 10_000, "max_pixels")  # fewer pixels of a long image are none
        self.checks = check_names(self.checks)
        options = DecodingOptions.of(self, beam_size=self.num_beams)
        FolderOptions.of(self, DEFAULT_OUTPUT).check(options)  # refuses what cannot be
        if self.max_new_tokens is not None and self.min_length > self.max_new_tokens:
            raise UserError(f"--min_length is {self.min_length}: give --max_new_tokens of as many")
        if self.conditional and not self.prompt.strip():
            raise UserError('--conditional needs a prompt: give --prompt "a photo of", or the like')
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit: give one of them")


def main(settings: Settings) -> int:
    if settings.images:
        failed = caption_single_images(settings)
    else:
        names = ("dtype", "load_in_4bit", "load_in_8bit", "max_pixels", "max_new_tokens", "prompt",
                 "system_prompt", "conditional", "checks", "retries")  # fmt: skip
        failed = caption_folder(
            FolderOptions.of(settings, DEFAULT_OUTPUT),
            lambda: load(settings),
            model_files(settings.model_path),
            DecodingOptions.of(settings, beam_size=settings.num_beams),
            depends_on={name: getattr(settings, name) for name in names} | {"checks": [*settings.checks]},
        )
    return 1 if failed else 0


def caption_single_images(settings: Settings) -> list[str]:
    """Print each image's captions, and draw where the model looked if it is BLIP without a prompt.

    Returns:
        The images without a caption that keeps to the rules.
    """
    for image in settings.images:
        check_image(image)  # complain before the model is loaded
    captioner = load(settings)
    options = DecodingOptions.of(settings, beam_size=settings.num_beams)
    if captioner.model.config.model_type == "blip" and not settings.prompt:
        caption_files(captioner, settings.images, options, with_scores=settings.with_scores)
        return []
    failed = []
    for image in settings.images:
        prepared = [captioner.prepare(image)]
        (captions,) = captioner.decode_prepared(prepared, options, [Path(image).stem], settings.with_scores)
        if isinstance(captions, UserError):
            tell(f"no caption: {image}: {captions}")
            failed.append(image)
            continue
        for caption in captions:
            name = "" if len(settings.images) == 1 else image
            say(caption_line(caption, settings.with_scores, name))
    tell("no figures: these are for BLIP without a prompt")
    return failed


def load(settings: Settings) -> VisionLanguageCaptioner:
    """The captioner on its device and in its precision, with what it is asked."""
    from captioning.captioners.loading import load_captioner  # here, as it takes seconds

    bits = 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else 0
    captioner = load_captioner(settings.model_path, settings.dtype, bits, settings.device_map)
    captioner.max_new_tokens, captioner.max_pixels = settings.max_new_tokens, settings.max_pixels
    captioner.checks, captioner.retries = settings.checks, settings.retries
    captioner.sidecars = Sidecars(settings.sidecar_extension)
    captioner.set_prompt(settings.prompt, settings.system_prompt, settings.conditional)
    return captioner.to_device()


def model_files(model_path: str | Path) -> str | list[Path]:
    """The files of a model's folder that captions depend on. For a hub model its name: once it has been
    fetched, it stays the same."""
    folder = Path(model_path)
    if not folder.is_dir():
        return str(model_path)
    patterns = (
        "*.safetensors",
        "*.bin",
        "*config.json",
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "chat_template*",
    )
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


if __name__ == "__main__":
    run_script(main, Settings)
