"""Caption a folder of images with BLIP: model + images -> blip_submission.csv.

    python direct_caption.py --model_path blip_finetuned_model/
    python direct_caption.py            # with nothing: Salesforce/blip-image-captioning-base, from the hub
    python direct_caption.py --prompt "a photo of" --conditional

Other captioners of the hub with the same interface (GIT, ViT-GPT2, BLIP-2) work by --model_path too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from captioning import HUB_MODEL
from captioning.blip import BlipCaptioner, load_captioner, require_blip
from captioning.submissions import caption_folder, find_images
from utils import UserError, check_at_least, check_output, pick_device, run_script


@dataclass
class Settings:
    model_path: str = HUB_MODEL  # a folder that train_model.py wrote, or a model of the hub
    test_folder: str = "test/test"  # images to caption
    test_csv: str | None = None  # ids and their order; None: test.csv in or up to two folders above, if any
    output_csv: str = "blip_submission.csv"  # image_id,caption; a name in .json: COCO results
    batch_size: int = 16  # images captioned at a time
    num_beams: int = 3  # hypotheses searched at a time; 1 is greedy
    max_new_tokens: int = 30  # longest caption, in tokens
    prompt: str = ""  # words that every caption begins with (BLIP); they are cut from the result
    conditional: bool = False  # leave the prompt in the captions
    mixed_precision: bool = False  # bfloat16 on CUDA
    workers: int = 4  # threads that read and prepare images

    def __post_init__(self):
        check_at_least(self, 1, "batch_size", "num_beams", "max_new_tokens", "workers")
        if self.conditional and not self.prompt.strip():
            raise UserError('--conditional needs a prompt: give --prompt "a photo of", or the like')


def main(settings: Settings) -> int:
    failed = caption_images(**vars(settings))
    return 1 if failed else 0


def caption_images(
    model_path: str | Path = HUB_MODEL,
    test_folder: str | Path = "test/test",
    output_csv: str | Path = "blip_submission.csv",
    test_csv: str | Path | None = None,
    batch_size: int = 16,
    num_beams: int = 3,
    max_new_tokens: int = 30,
    prompt: str = "",
    conditional: bool = False,
    mixed_precision: bool = False,
    workers: int = 4,
) -> list[str]:
    """Caption the images of a folder into a CSV `image_id,caption`; rows as caption.py has them.

    Captions do not depend on batch_size or on the order of the images. With a prompt, BLIP goes on from it;
    its words are cut from the captions, or kept where `conditional`.

    Returns:
        What was wrong with the images that could not be read, one line each; their captions are empty.

    Raises:
        UserError: wrong input, or not one readable image.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_output(output_csv)  # complain before the model is loaded
    find_images(test_folder, test_csv)
    captioner = load_captioner(model_path)
    if prompt:
        require_blip(captioner, model_path, "--prompt")
    device = pick_device()
    if mixed_precision and device.type != "cuda":
        print("mixed precision is for CUDA; captioning in float32")
    captioner.model.to(device, torch.bfloat16 if mixed_precision and device.type == "cuda" else torch.float32)
    options = (batch_size, num_beams, max_new_tokens, prompt, conditional, workers)
    return caption_loaded(captioner, test_folder, output_csv, test_csv, *options)


def caption_loaded(
    captioner: BlipCaptioner,
    test_folder: str | Path,
    output_csv: str | Path,
    test_csv: str | Path | None = None,
    batch_size: int = 16,
    num_beams: int = 3,
    max_new_tokens: int = 30,
    prompt: str = "",
    conditional: bool = False,
    workers: int = 4,
) -> list[str]:
    """`caption_images` with a captioner that is loaded, on its device and in its precision."""

    def caption(images: list[Tensor]) -> list[str]:
        return captioner.caption_prepared(torch.stack(images), num_beams, max_new_tokens, prompt, conditional)

    return caption_folder(test_folder, test_csv, output_csv, captioner.prepare, caption, batch_size, workers)


if __name__ == "__main__":
    run_script(main, Settings)
