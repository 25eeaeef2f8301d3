"""Images per second of direct_caption.py beside the plain loop, an image at a time through `processor` and
`generate`.

    python benchmarks/blip_speed.py
    python benchmarks/blip_speed.py --images 256 --mixed_precision       # on CUDA

Both caption the same JPEG files with the same BLIP of full size (base, 384 x 384 pixels), whose weights are
random: speed does not depend on them. It never says that a caption ends, so both search `max_new_tokens`
steps; real captions have about 10 tokens. The captions must be the same, or the script stops with an error;
in bfloat16, where rounding depends on the batch, the share that is the same is printed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import timed, write_images  # isort: skip
import torch
import transformers
from PIL import Image
from tokenizers import BertWordPieceTokenizer

from captioning.captioners.blip import BlipCaptioner
from captioning.captioners.loading import load_captioner
from captioning.command_line import check_at_least, run_script
from captioning.data.submissions import read_submission
from captioning.decoding.options import DecodingOptions
from captioning.folders.plan import FolderOptions
from captioning.folders.run import caption_folder
from utils import UserError, pick_device


@dataclass
class Settings:
    images: int = 16  # captioned by both
    batch_size: int = 16  # of direct_caption.py
    num_beams: int = 3  # hypotheses searched at a time
    max_new_tokens: int = 12  # steps of the search
    mixed_precision: bool = False  # bfloat16, on CUDA
    workers: int = os.cpu_count() or 1  # threads that prepare images
    width: int = 640  # pixels of the JPEG files
    height: int = 480
    seed: int = 0

    def __post_init__(self):
        check_at_least(self, 1, "images", "batch_size", "num_beams", "max_new_tokens", "workers")


def main(settings: Settings) -> None:
    device = pick_device()
    dtype = torch.bfloat16 if settings.mixed_precision and device.type == "cuda" else torch.float32
    folder = Path(tempfile.mkdtemp())
    try:
        paths = write_images(
            folder / "images", settings.images, settings.height, settings.width, settings.seed
        )
        random_blip(settings.seed).save(folder / "model")
        print(
            f"{settings.images} images, {settings.num_beams} beams, {settings.max_new_tokens} tokens, "
            f"batches of {settings.batch_size}, {dtype} on {device.type}, {torch.get_num_threads()} threads"
        )
        captioner = load_captioner(folder / "model")
        captioner.model.to(device, dtype)
        processor = transformers.AutoProcessor.from_pretrained(folder / "model")
        for work in (lambda: plain_loop(paths[:1], captioner, processor, settings),) * (
            device.type == "cuda"
        ):
            work()  # the first pass chooses kernels
        plain, plain_seconds = timed(plain_loop, paths, captioner, processor, settings, device=device)
        _, seconds = timed(our_path, folder, captioner, settings, device=device)
        ours = [caption for _, caption in read_submission(folder / "captions.csv")]
    finally:
        shutil.rmtree(folder)
    same = sum(a == b for a, b in zip(ours, plain, strict=True))
    if same < len(plain) and dtype == torch.float32:
        raise UserError(f"only {same} of {len(plain)} captions are the same")
    print(f"plain loop         {len(plain) / plain_seconds:8.2f} images/s")
    print(f"direct_caption.py  {len(plain) / seconds:8.2f} images/s")
    print(f"ratio              {plain_seconds / seconds:8.2f}, {same} of {len(plain)} captions the same")


def random_blip(seed: int) -> BlipCaptioner:
    """A BLIP of the base configuration; weights large enough that words are far from equally likely."""
    torch.manual_seed(seed)
    text = {"initializer_range": 0.1}
    config = transformers.BlipConfig(text_config=text, vision_config={"initializer_range": 0.05})
    model = transformers.BlipForConditionalGeneration(config).eval()
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    taken = {number: token for token, number in special.items()}
    size = config.text_config.vocab_size
    vocabulary = {taken.get(number, f"word{number}"): number for number in range(size)}
    pieces = BertWordPieceTokenizer(vocab=vocabulary)
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=pieces._tokenizer)
    return BlipCaptioner(model, transformers.BlipImageProcessor(), tokenizer)


def plain_loop(paths: list[Path], captioner: BlipCaptioner, processor, settings: Settings) -> list[str]:
    model, captions = captioner.model, []
    for path in paths:
        inputs = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
        found = model.generate(
            **inputs.to(model.device, model.dtype),
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
        )
        captions.append(processor.decode(found[0], skip_special_tokens=True))
    return captions


def our_path(folder: Path, captioner: BlipCaptioner, settings: Settings) -> None:
    options = FolderOptions(
        folder / "images",
        output_csv=folder / "captions.csv",
        batch_size=settings.batch_size,
        workers=settings.workers,
    )
    captioner.max_new_tokens = settings.max_new_tokens
    caption_folder(options, lambda: captioner, "random weights", DecodingOptions(settings.num_beams))


if __name__ == "__main__":
    run_script(main, Settings)
