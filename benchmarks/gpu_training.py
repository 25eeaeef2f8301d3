"""What benchmarks/gpu.py measures of training: a frozen encoder, a trainable one, the kernels."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

from common import end_samples, synchronize, timed, words_of  # isort: skip
import torch
import torch.nn.functional as F
from gpu_data import Data, precision
from torch import Tensor, nn

from captioning.decoding.teacher_forcing import token_logits
from captioning.training.optimization import Run
from captioning.training.reinforce import Reward, SelfCritical
from models import normalize_images
from tests.reference import pool, textbook_loss

if TYPE_CHECKING:
    from gpu import Bench

COCO_CAPTIONS = 566_000  # in an epoch
TOLERANCES = {"float32": 1e-4, "tf32": 1e-2, "bf16": 1e-2}  # largest difference of a loss from the textbook's


class Trainer:
    """A step of train.py, or the textbook's, with Adam; the encoder takes part where it is trained."""

    def __init__(self, data: Data, name: str, encoder: nn.Module | None = None, textbook: bool = False):
        self.device, self.name, self.textbook = data.device, name, textbook
        self.decoder = data.textbook() if textbook else data.decoder()
        self.encoder = encoder
        modules = [self.decoder, *([] if encoder is None else [encoder])]
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4, fused=True)

    def loss(self, images: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        with precision(self.name, self.device):
            if self.textbook:  # every caption has its own copy of the image
                copies = images.repeat_interleave(captions.shape[1], dim=0)
                if images.dtype == torch.uint8:
                    copies = self.encoder(normalize_images(copies))
                else:
                    copies = pool(copies.float())
                flat = captions.flatten(0, 1).to(self.device), lengths.flatten().to(self.device)
                return textbook_loss(self.decoder, copies, *flat)
            grid = self.encoder.grid(normalize_images(images)) if images.dtype == torch.uint8 else images
            tokens = token_logits(self.decoder, grid.float(), captions, lengths)
            penalty = ((1 - tokens.coverage()) ** 2).mean(dim=1).sum() / lengths.numel()
            return F.cross_entropy(tokens.logits, tokens.targets) + penalty

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """One step; its loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_value_(self.parameters, 5.0)
        self.optimizer.step()
        return loss.detach()


def rate(bench: Bench, step: Callable, batches: Iterator, units: Callable = lambda batch: batch[2].numel()):
    """(units a second, the first step's result, share of the time waiting for `batches`)."""
    first = step(next(batches))
    _, seconds = timed(lambda: step(next(batches)), device=bench.device)
    steps = max(2, min(200, int(bench.settings.seconds / seconds)))
    done = waiting = 0

    def run() -> None:
        nonlocal done, waiting
        for _ in range(steps):
            began = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - began
            step(batch)
            done += units(batch)

    _, seconds = timed(run, device=bench.device)
    return done / seconds, first, waiting / seconds


def frozen(bench: Bench, data: Data) -> None:
    """Training with a frozen encoder, whose features are kept; captions/s."""
    smallest = bench.settings.batch_sizes[0]

    def textbook() -> float:  # as it reads: every caption's image through the encoder at every step
        def images() -> Iterator:
            while True:
                yield data.images[:smallest], data.captions[:smallest], data.lengths[:smallest]

        data.textbook_encoder.requires_grad_(False)
        trainer = Trainer(data, "float32", data.textbook_encoder, textbook=True)
        captions, _, _ = rate(bench, trainer.step, images())
        bench.add("frozen", name="textbook", precision="float32", batch=smallest, captions_per_s=captions,
                  epoch_s=COCO_CAPTIONS / captions)  # fmt: skip
        return captions

    plain = bench.attempt("frozen textbook", textbook)
    places = itertools.product(("device", "host", "disk"), bench.precisions, bench.settings.batch_sizes)
    for place, name, batch_size in places:

        def ours(place: str = place, name: str = name, batch_size: int = batch_size) -> None:
            batches = data.batches(place, batch_size)
            batch = next(batches)
            trainer = Trainer(data, name)
            part = [values[:smallest] for values in batch]
            with torch.no_grad():
                difference = trainer.loss(*part) - Trainer(data, "float32", textbook=True).loss(*part)
            captions, _, waiting = rate(bench, trainer.step, batches)
            apart, ratio = abs(float(difference)), captions / plain if plain else None
            bench.add("frozen", name=f"features: {place}", precision=name, batch=batch_size,
                      captions_per_s=captions, epoch_s=COCO_CAPTIONS / captions, waiting=waiting,
                      ratio=ratio, difference=apart)  # fmt: skip
            bench.require("the loss", apart, TOLERANCES[name])

        bench.attempt(f"frozen {place} {name} {batch_size}", ours)


def self_critical(bench: Bench, data: Data) -> None:
    """Self-critical training on features on the device, beside cross-entropy; captions/s.

    The references are those of the first images, whatever the batch: scoring takes as long.
    """
    run = Run.start("no")
    words = words_of(data.captions, data.lengths, bench.settings.vocabulary)
    reward, longest = Reward(words), int(data.lengths.max()) - 1

    def measure(name: str, batch_size: int) -> None:
        batches = data.batches("device", batch_size)
        plain, _, _ = rate(bench, Trainer(data, name).step, batches)
        trainer = Trainer(data, name)
        mean_words = float(data.lengths.float().mean()) - 1
        options = SimpleNamespace(self_critical_samples=5, feature_dropout=0.0, seed=0)
        encoder, decoder = data.encoder, end_samples(trainer.decoder, mean_words)
        objective = SelfCritical(encoder, decoder, options, run, data.word_map, reward, longest, epoch=1)

        def step(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            trainer.optimizer.zero_grad(set_to_none=True)
            objective.start_step(batch[2].numpy())
            with precision(name, data.device):
                loss = objective(range(len(batch[0])), *batch)
            loss.backward()
            divisor = objective.finish_step()
            torch._foreach_div_([p.grad for p in trainer.parameters if p.grad is not None], divisor)
            torch.nn.utils.clip_grad_value_(trainer.parameters, 5.0)
            trainer.optimizer.step()
            return loss.detach()

        captions, _, _ = rate(bench, step, batches, lambda batch: 5 * len(batch[0]))
        bench.add("self_critical", name="ours", precision=name, batch=batch_size, captions_per_s=captions,
                  share_of_cross_entropy=captions / plain)  # fmt: skip

    for name, batch_size in itertools.product(bench.precisions, bench.settings.batch_sizes):
        bench.attempt(f"self-critical {name} {batch_size}", partial(measure, name, batch_size))


def trainable(bench: Bench, data: Data) -> None:
    """Training with a trainable encoder, images loaded from disk; captions/s."""
    smallest = bench.settings.batch_sizes[0]
    data.encoder.fine_tune()
    data.textbook_encoder.fine_tune()
    start = {key: value.clone() for key, value in data.encoder.state_dict().items()}

    def measure(name: str, batch_size: int, textbook: bool) -> None:
        encoder = data.textbook_encoder if textbook else data.encoder
        encoder.load_state_dict(start)
        trainer = Trainer(data, name, encoder, textbook)
        captions, _, waiting = rate(bench, trainer.step, data.batches("images on disk", batch_size))
        values = {"name": "textbook" if textbook else "ours", "precision": name, "batch": batch_size}
        values |= {"captions_per_s": captions, "epoch_s": COCO_CAPTIONS / captions, "waiting": waiting}
        if not textbook:
            alone = encoder_rate(bench, data, name, batch_size)
            values |= {"encoder_alone_images_per_s": alone, "share_of_encoder_alone": captions / 5 / alone}
        bench.add("trainable", **values)

    def compare() -> None:
        batch = [values[: min(smallest, 4)] for values in (data.images, data.captions, data.lengths)]
        losses, gradients = [], []
        for textbook in (True, False):
            encoder = data.textbook_encoder if textbook else data.encoder
            encoder.load_state_dict(start)
            trainer = Trainer(data, "float32", encoder, textbook)
            trainer.optimizer.zero_grad()
            loss = trainer.loss(*batch)
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append({key: p.grad for key, p in encoder.named_parameters() if p.grad is not None})
        theirs, ours = gradients
        length = sum(float(g.square().sum()) for g in theirs.values()) ** 0.5
        apart = sum(float((ours[key] - g).square().sum()) for key, g in theirs.items()) ** 0.5 / length
        bench.add("trainable", name="agreement", loss=abs(losses[0] - losses[1]), gradient=apart)
        bench.require("the loss", abs(losses[0] - losses[1]), TOLERANCES["float32"])
        bench.require("the encoder's gradient, as a share of its length,", apart, 1e-2)

    bench.attempt("trainable agreement", compare)
    configurations = [("float32", smallest, True)]
    configurations += [(n, size, False) for n in bench.precisions for size in bench.settings.batch_sizes[:2]]
    for configuration in configurations:
        bench.attempt(f"trainable {configuration}", lambda c=configuration: measure(*c))
    for encoder in (data.encoder, data.textbook_encoder):
        encoder.load_state_dict(start)
        encoder.requires_grad_(False)


def encoder_rate(bench: Bench, data: Data, name: str, batch_size: int) -> float:
    """Images a second of the encoder's forward and backward passes, images on the device."""
    images = data.images[:batch_size].to(data.device)

    def step(_) -> None:
        with precision(name, data.device):
            grid = data.encoder.grid(normalize_images(images))
        grid.float().sum().backward()

    images_per_s, _, _ = rate(bench, step, itertools.repeat(None), units=lambda _: batch_size)
    data.encoder.zero_grad()
    return images_per_s


def profile(bench: Bench, data: Data) -> None:
    """The ten longest kernels of a training step on cached features; ms a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    batch_size, steps, cuda = bench.settings.batch_sizes[:2][-1], 3, bench.device.type == "cuda"
    batches, trainer = data.batches("device", batch_size), Trainer(data, "bf16")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    for _ in range(2):
        trainer.step(next(batches))
    synchronize(bench.device)
    with record(activities=activities) as profiler:
        for _ in range(steps):
            trainer.step(next(batches))
        synchronize(bench.device)
    events = [
        e for e in profiler.key_averages() if not cuda or e.device_type == torch.autograd.DeviceType.CUDA
    ]
    key = "self_device_time_total" if cuda else "self_cpu_time_total"  # microseconds
    events.sort(key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    for event in events[:10]:
        spent = getattr(event, key)
        bench.add("profile", name=event.key[:90], ms=spent / 1e3 / steps, share=spent / total,
                  calls=event.count / steps)  # fmt: skip
