"""One command that measures a GPU: training, evaluation, a folder of images and BLIP, beside the textbook.

    python benchmarks/gpu.py                      # under 8 minutes; writes gpu_benchmark.json
    python benchmarks/gpu.py --tiny --device cpu  # all of it at a tiny size: a test, its times mean nothing

Weights are random, images and captions made up, in COCO's sizes; an epoch has 566,000 captions. Every
configuration is timed for a few seconds, after steps that warm up, and what it computes is compared in the
same run with the textbook of tests/reference.py in float32: losses, gradients, captions. A configuration that
fails, or whose results differ, prints one line, the others go on, and the exit status is 1; those that the
time did not allow are named. "waiting" is the share of the time in which the host waited for a batch to be
loaded. Files were just written, so that they are read from the memory that caches the disk.
"""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import timed, write_images  # isort: skip
import torch
import torch.nn.functional as F
from gpu_data import PRECISIONS, Data, precision
from gpu_training import COCO_CAPTIONS, frozen, profile, rate, self_critical, trainable
from torch import Tensor

from captioning.captioners.attention import Captioner
from captioning.command_line import check_at_least, run_script
from captioning.data.images import parallel_map
from captioning.data.prepared import END, START
from captioning.decoding.options import DecodingOptions
from captioning.decoding.teacher_forcing import token_logits
from captioning.folders.plan import FolderOptions
from captioning.folders.run import caption_folder
from models import DecoderWithAttention, normalize_images
from tests.reference import textbook_search
from utils import Device, UserError, pick_device, write_json

COCO_TEST_IMAGES = 5_000


@dataclass
class Settings:
    tiny: bool = False  # all sizes tiny, to test
    device: Device = "auto"  # where to compute
    output: str = "gpu_benchmark.json"  # the results
    minutes: float = 7.5  # configurations that would start later are left out
    seconds: float = 2.0  # for which a configuration is timed
    encoder_name: str = "resnet101"  # a torchvision ResNet
    image_size: int = 256  # pixels
    vocabulary: int = 9490  # entries of the word map; COCO has as many with words seen five times
    width: int = 512  # of embeddings, attention and LSTM
    images: int = 1024  # different ones, each with five captions
    batch_sizes: tuple[int, ...] = (16, 64, 256)  # images a step
    textbook_images: int = 8  # that the textbook captions, one at a time
    folder_images: int = 256  # JPEG files of 640 x 480 pixels
    workers: int = min(os.cpu_count() or 1, 8)  # processes that load batches, threads that read images
    seed: int = 0  # of weights, images and captions

    def __post_init__(self):
        check_at_least(self, 1, "images", "textbook_images", "folder_images")
        check_at_least(self, 0, "minutes", "seconds", "workers")
        check_at_least(self, 10, "vocabulary")


TINY = {
    "seconds": 0.0, "encoder_name": "resnet18", "image_size": 64, "vocabulary": 60, "width": 16, "images": 8,
    "batch_sizes": (2, 4), "textbook_images": 2, "folder_images": 3, "workers": 0,
}  # fmt: skip


def main(settings: Settings) -> int:
    if settings.tiny:
        settings = replace(settings, **TINY)
    if settings.images < max(settings.batch_sizes):
        raise UserError(f"--images is {settings.images}: give at least the largest of --batch_sizes")
    device = pick_device(settings.device)
    bench = Bench(settings, device)
    with tempfile.TemporaryDirectory() as folder:
        data = bench.attempt("data", lambda: Data(settings, device, Path(folder)))
        if data:
            for section in (frozen, self_critical, trainable, profile, evaluation, jpeg_folder, blip):
                print(f"{section.__name__}: {section.__doc__.splitlines()[0]}", flush=True)
                bench.attempt(section.__name__, lambda section=section: section(bench, data))
    bench.write()
    for line in bench.errors:
        print(f"failed: {line}")
    return 1 if bench.errors else 0


class Bench:
    """The results so far, and the time."""

    def __init__(self, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device
        self.precisions = [name for name in PRECISIONS if name != "tf32" or device.type == "cuda"]
        self.began = time.monotonic()
        self.results: list[dict] = []
        self.errors: list[str] = []
        self.skipped: list[str] = []

    def attempt(self, name: str, work: Callable):
        """What `work()` returns; None where it failed, or there is no time left for it."""
        if time.monotonic() - self.began > 60 * self.settings.minutes:
            self.skipped.append(name)
            print(f"  {name}: left out, the {self.settings.minutes} minutes are over", flush=True)
            return None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            return work()
        except Exception as error:  # whatever fails, the others are still measured
            lines = str(error).strip().splitlines() or [""]
            self.errors.append(f"{name}: {type(error).__name__}: {lines[0][:200]}")
            print(f"  {self.errors[-1]}", flush=True)
            return None

    def add(self, section: str, **values) -> None:
        """Keep and print a result, with the peak memory since its `attempt` began."""
        if self.device.type == "cuda":
            values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.results.append({"section": section, **values})
        shown = [f"{k} {v:.3g}" if isinstance(v, float) and v < 1000 else f"{k} {v:,.0f}"
                 if isinstance(v, (int, float)) else f"{v}" for k, v in values.items()]  # fmt: skip
        print("  " + ", ".join(shown), flush=True)

    def require(self, what: str, difference: float, limit: float) -> None:
        if not difference <= limit:  # nan fails too
            raise ValueError(f"{what} differs from the textbook's by {difference:.2g}, more than {limit}")

    def write(self) -> None:
        cuda = self.device.type == "cuda"
        write_json(
            self.settings.output,
            {
                "device": torch.cuda.get_device_name() if cuda else self.device.type,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "settings": asdict(self.settings),
                "seconds": time.monotonic() - self.began,
                "results": self.results,
                "errors": self.errors,
                "skipped": self.skipped,
            },
        )
        print(f"{time.monotonic() - self.began:.0f} s, {len(self.results)} results in {self.settings.output}")


# --- captions -----------------------------------------------------------------------------------------------


def trained_decoder(data: Data) -> DecoderWithAttention:
    """A decoder that has half learned a caption of each image: captions end, words are apart."""
    decoder, count = data.decoder(), min(64, len(data.images))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1 / data.settings.width)
    grid = data.features[:count].float()
    for _ in range(100):
        tokens = token_logits(decoder, grid, data.captions[:count, :1], data.lengths[:count, :1])
        optimizer.zero_grad()
        F.cross_entropy(tokens.logits, tokens.targets).backward()
        optimizer.step()
    return decoder.eval()


def evaluation(bench: Bench, data: Data) -> None:
    """Beam search from images, the encoder included; images/s."""
    decoder, settings = trained_decoder(data), bench.settings
    textbook = data.textbook().eval()
    textbook.load_state_dict(decoder.state_dict())
    captioner = Captioner([(data.encoder, decoder)], data.word_map)
    few = data.images[: settings.textbook_images].to(data.device)

    def measure(beam_size: int) -> None:
        def plain() -> list[list[int]]:
            start, end = data.word_map[START], data.word_map[END]
            models = (data.textbook_encoder, textbook)
            return [textbook_search(*models, image, start, end, beam_size) for image in normalize_images(few)]

        def ours(images: Tensor) -> list[list[int]]:
            found = []
            for part in images.split(max(settings.batch_sizes)):
                found += captioner.search(captioner.encode(part), beam_size)
            return [hypothesis.words for hypothesis in found]

        with precision("float32", bench.device):
            expected, plain_seconds = timed(plain, device=bench.device)
        plain_rate = len(few) / plain_seconds
        bench.add("evaluation", name="textbook", beam=beam_size, precision="float32", images_per_s=plain_rate)
        for name in bench.precisions:
            with precision(name, bench.device):
                ours(data.images[: max(settings.batch_sizes)])  # warms up
                found, seconds = timed(ours, data.images, device=bench.device)
            images_per_s = len(found) / seconds
            same = sum(a == b for a, b in zip(found, expected)) / len(expected)
            bench.add("evaluation", name="ours", beam=beam_size, precision=name, images_per_s=images_per_s,
                      coco_test_s=COCO_TEST_IMAGES / images_per_s, ratio=images_per_s / plain_rate,
                      words=sum(map(len, found)) / len(found), same_captions=same)  # fmt: skip
            if name == "float32":  # in lower precision a hypothesis may overtake another
                bench.require("the share of captions", 1 - same, 0)

    for beam_size in (1, 3, 5):
        bench.attempt(f"evaluation, beam {beam_size}", lambda beam_size=beam_size: measure(beam_size))


def jpeg_folder(bench: Bench, data: Data) -> None:
    """A folder of JPEG files to a CSV of captions, beam 3, files read by threads; images/s."""
    settings, folder = bench.settings, data.folder / "jpegs"
    paths = write_images(folder, settings.folder_images, 480, 640, settings.seed)
    captioner = Captioner([(data.encoder, data.decoder().eval())], data.word_map)
    workers = max(settings.workers, 1)

    def run(number: int) -> None:
        output = data.folder / f"captions_{number}.csv"
        options = FolderOptions(folder, output_csv=output, batch_size=64, workers=workers)
        failed = caption_folder(
            options, lambda: captioner, [data.folder / "word_map.json"], DecodingOptions()
        )
        if failed:
            raise ValueError(f"{len(failed)} images were not captioned")

    with precision("bf16", bench.device):
        _, first = timed(run, 1, device=bench.device)
        _, seconds = timed(run, 2, device=bench.device)
    _, decoding = timed(lambda: list(parallel_map(captioner.prepare, paths, workers)))
    bench.add("jpeg_folder", name="ours", precision="bf16", images_per_s=len(paths) / seconds,
              first_run_s=first, reading_alone_images_per_s=len(paths) / decoding)  # fmt: skip


def blip(bench: Bench, data: Data) -> None:
    """BLIP base in bfloat16, random weights: captioning at 3 beams and 20 tokens, and a training step."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    from captioning.captioners.blip import shared_by_beams

    text, vision, batch_size = {"initializer_range": 0.1}, {"initializer_range": 0.05}, 64
    if bench.settings.tiny:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= small | {
            "vocab_size": 200,
            "encoder_hidden_size": 32,
            "bos_token_id": 198,
            "sep_token_id": 102,
        }
        vision, batch_size = vision | small | {"image_size": 32}, 2
    torch.manual_seed(bench.settings.seed)
    config = BlipConfig(text_config=text, vision_config=vision)
    model = BlipForConditionalGeneration(config).to(bench.device, torch.bfloat16).eval()
    size = config.vision_config.image_size
    pixels = torch.randn(batch_size, 3, size, size, device=bench.device, dtype=torch.bfloat16)

    @torch.no_grad()
    def generate(shared: bool) -> Tensor:
        options = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False}
        with shared_by_beams(model, 3) if shared else nullcontext({}) as cache:
            return model.generate(pixel_values=pixels, **options, **cache)

    def caption() -> None:
        generate(shared=True)  # warms up
        expected, plain = timed(generate, False, device=bench.device)
        found, seconds = timed(generate, True, device=bench.device)
        same = sum(a.tolist() == b.tolist() for a, b in zip(found, expected)) / batch_size
        bench.add("blip", name="captioning, beam 3", batch=batch_size, images_per_s=batch_size / seconds,
                  ratio=plain / seconds, same_captions=same)  # fmt: skip

    def train() -> None:
        tokens = data.captions[:, 0, :12].to(bench.device).clamp(max=config.text_config.vocab_size - 1)
        tokens = tokens.repeat(-(-batch_size // len(tokens)), 1)[:batch_size]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step(_) -> None:
            optimizer.zero_grad()
            model(pixel_values=pixels, input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()

        model.train()
        captions, _, _ = rate(bench, step, itertools.repeat(None), units=lambda _: batch_size)
        bench.add("blip", name="training", batch=batch_size, captions_per_s=captions,
                  epoch_s=COCO_CAPTIONS / captions)  # fmt: skip

    bench.attempt("blip captioning", caption)
    bench.attempt("blip training", train)


if __name__ == "__main__":
    run_script(main, Settings)
