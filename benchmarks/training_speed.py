"""Training captions a second, beside a plain textbook implementation on the same captions and weights.

    python benchmarks/training_speed.py

Frozen encoder: the textbook encodes an image for each of its captions in every step; we train on features
kept as train.py keeps them. First both train on the same features, then the textbook on those of its own
encoder, in float32 where ours are kept in float16. Fine-tuned encoder: the textbook runs it forward and back
for each caption's copy of the image; we run it once an image. Here each step starts from the textbook's
weights: Adam makes large steps of the smallest rounding differences in a deep network.

Self-critical training, on the same features: captions sampled, rewarded and learned from a second, beside
those that cross-entropy learns from, steps in turn. Samples are as long as the captions, and stay so, as the
learning rate is 0. Less than half the captions a second is an error.

Both get the same captions, the textbook first. Losses, and gradients of the fine-tuned models, must agree, or
the script stops with an error. The first step of each warms up and is not counted. Weights, images and
captions are random; reading them from disk is left out on both sides, and so is dropout. On two CPU cores it
takes about five minutes.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import dataclass

import torch
from common import (
    end_samples,
    make_captions,
    make_images,
    make_word_map,
    random_encoder,
    timed,
    words_of,
)
from torch import Tensor, nn

import train
from captioning.command_line import check_at_least, run_script
from captioning.data.features import encode_images
from captioning.data.prepared import UNK
from captioning.decoding.fast_energies import use_fast_energies
from captioning.training.losses import CrossEntropy
from captioning.training.optimization import Run
from captioning.training.reinforce import Reward, SelfCritical
from models import DecoderWithAttention, Encoder, normalize_images
from tests.reference import TextbookDecoder, TextbookEncoder, pool, textbook_loss
from utils import pick_device

Batch = tuple[Tensor, Tensor, Tensor]  # images (N, 3, S, S), captions (N, G, L), lengths (N, G)


@dataclass
class Settings:
    encoder_name: str = "resnet101"  # a torchvision ResNet
    image_size: int = 256  # pixels
    vocabulary: int = 9490  # entries of the word map; COCO has as many with words seen five times
    width: int = 512  # of embeddings, attention and LSTM
    batch_size: int = 16  # images a step, as in train.py
    captions_per_image: int = 5  # each a copy of its image for the textbook
    batches: int = 3  # different ones, used in turn
    steps: int = 20  # frozen encoder, on the same features
    textbook_steps: int = 1  # frozen encoder, the textbook's running
    self_critical_steps: int = 6  # encoder frozen, the first for warming up
    fine_tuned_steps: int = 2  # encoder fine-tuned, the first for warming up
    tolerance: float = 1e-4  # largest difference of a loss
    gradient_tolerance: float = 1e-2  # of the gradient, as a share of its length; float32 turns ReLUs over
    seed: int = 0  # of weights, images and captions

    def __post_init__(self):
        check_at_least(self, 1, "batch_size", "captions_per_image", "batches", "textbook_steps")
        check_at_least(self, 2, "steps", "self_critical_steps", "fine_tuned_steps")
        check_at_least(self, 5, "vocabulary")


def main(settings: Settings) -> None:
    device = pick_device()
    encoder = random_encoder(settings.encoder_name, settings.seed, device)
    batches = make_batches(settings)
    print(
        f"{settings.encoder_name}, {settings.batch_size} images of {settings.image_size} pixels with "
        f"{settings.captions_per_image} captions each a step, {settings.vocabulary} words, on {device} "
        f"({torch.get_num_threads()} threads)",
        flush=True,
    )
    compare_frozen(encoder, batches, settings, device)
    compare_self_critical(encoder, batches, settings, device)
    compare_fine_tuned(encoder, batches, settings, device)


def make_batches(settings: Settings) -> list[Batch]:
    size, count = settings.image_size, settings.batch_size
    return [
        (
            make_images(count, size, size, settings.seed + number),
            *make_captions(
                count, settings.captions_per_image, settings.vocabulary, 50, settings.seed + number
            ),
        )
        for number in range(settings.batches)
    ]


def compare_frozen(encoder: Encoder, batches: list[Batch], settings: Settings, device: torch.device) -> None:
    textbook, ours = make_pair(encoder, settings, device)
    features = [(encode_images(encoder, batch[0].to(device)).half().cpu(), *batch[1:]) for batch in batches]
    textbook.encoder(normalize_images(batches[0][0].to(device)))  # warms up
    record = Record(settings)
    for step in range(settings.steps + settings.textbook_steps):
        same_features = step < settings.steps
        batch, our_batch = batches[step % len(batches)], features[step % len(batches)]
        encodings = pool(our_batch[0].float().to(device)) if same_features else None
        loss, seconds = timed(textbook.step, batch, encodings, device=device)
        our_loss, our_seconds = timed(ours.step, our_batch, device=device)
        if step > 0:
            record.seconds["textbook, its decoder alone" if same_features else "textbook"].append(seconds)
            record.seconds["ours"].append(our_seconds)
        record.differ("loss" if same_features else "loss, float16 against float32", abs(loss - our_loss))
    record.report("encoder frozen")


def compare_self_critical(
    encoder: Encoder, batches: list[Batch], settings: Settings, device: torch.device
) -> None:
    features = [(encode_images(encoder, batch[0].to(device)).half().cpu(), *batch[1:]) for batch in batches]
    lengths = torch.cat([batch[2] for batch in batches])
    trainers = {"cross-entropy": make_pair(encoder, settings, device)[1]}
    words = float(lengths.float().mean()) - 1
    decoder = end_samples(make_pair(encoder, settings, device)[1].decoder, words)
    trainers["self-critical"] = trainer = OursSelfCritical(encoder, decoder, device, batches, settings)
    for batch in features:  # until samples are as long as the captions
        trainer.objective.start_step(batch[2].numpy())
        with torch.no_grad():
            trainer.objective(range(len(batch[0])), *batch)
        decoder.fc.bias.data[-1] += math.log(
            trainer.objective.step_words / trainer.objective.captions / words
        )
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = 0.0  # so that the samples keep their length
    seconds, captions = defaultdict(float), defaultdict(int)
    for step in range(settings.self_critical_steps):
        for name, trainer in trainers.items():
            _, passed = timed(trainer.step, features[step % len(batches)], device=device)
            if step > 0:
                seconds[name] += passed
                captions[name] += trainer.objective.captions
    rates = {name: captions[name] / seconds[name] for name in trainers}
    share = rates["self-critical"] / rates["cross-entropy"]
    print("encoder frozen, captions a second:")
    for name, rate in rates.items():
        print(f"    {name}: {rate:.2f} ({settings.self_critical_steps - 1} steps)")
    sampled = trainer.objective.step_words / trainer.objective.captions
    print(
        f"    {share:.2f} times those of cross-entropy; {sampled:.1f} words a sample, {words:.1f} a caption"
    )
    sys.stdout.flush()
    if share < 0.5:
        sys.exit("self-critical training takes more than twice the time of cross-entropy")


def compare_fine_tuned(
    encoder: Encoder, batches: list[Batch], settings: Settings, device: torch.device
) -> None:
    encoder.fine_tune()
    textbook, ours = make_pair(encoder, settings, device)
    record = Record(settings)
    for step in range(settings.fine_tuned_steps):
        ours.encoder.load_state_dict(textbook.encoder.state_dict())
        ours.decoder.load_state_dict(textbook.decoder.state_dict())
        batch = batches[step % len(batches)]
        loss, seconds = timed(textbook.step, batch, device=device)
        our_loss, our_seconds = timed(ours.step, batch, device=device)
        if step > 0:
            record.seconds["textbook"].append(seconds)
            record.seconds["ours"].append(our_seconds)
        record.differ("loss", abs(loss - our_loss))
        record.differ("gradient", gradient_difference(ours, textbook))
    record.report("encoder fine-tuned")


def make_pair(encoder: Encoder, settings: Settings, device: torch.device) -> tuple[Textbook, Ours]:
    """Both implementations with the same weights; ours trains `encoder` itself."""
    torch.manual_seed(settings.seed)
    sizes = (settings.width, settings.width, settings.width, settings.vocabulary, encoder.dim)
    decoder, textbook_decoder = DecoderWithAttention(*sizes, dropout=0), TextbookDecoder(*sizes)
    use_fast_energies(decoder)
    textbook_decoder.load_state_dict(decoder.state_dict())
    textbook_encoder = TextbookEncoder(encoder.name)
    textbook_encoder.load_state_dict(encoder.state_dict())
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        textbook_encoder.fine_tune()
    return (
        Textbook(textbook_encoder.to(device), textbook_decoder.to(device), device),
        Ours(encoder, decoder.to(device), device),
    )


class Trainer:
    """Models and their optimizer; rates and clipping are the defaults of train.py."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, device: torch.device):
        self.encoder, self.decoder, self.device = encoder, decoder, device
        self.settings = train.Settings(dropout=0)
        self.optimizers = self.make_optimizers()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate)
            for module, rate in (
                (self.decoder, self.settings.decoder_lr),
                (self.encoder, self.settings.encoder_lr),
            )
            if any(p.requires_grad for p in module.parameters())
        ]

    def follow(self, loss: Tensor) -> float:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_value_(parameters, self.settings.grad_clip)
            optimizer.step()
        return float(loss.detach())


class Textbook(Trainer):
    def step(self, batch: Batch, encodings: Tensor | None = None) -> float:
        """One step on a batch; its loss. `encodings` (N, 14, 14, D): of its images, where known."""
        images, captions, lengths = batch
        group = captions.shape[1]
        if encodings is None:
            copies = images.repeat_interleave(group, dim=0).to(self.device)
            encodings = self.encoder(normalize_images(copies))
        else:
            encodings = encodings.repeat_interleave(group, dim=0)
        captions, lengths = captions.flatten(0, 1).to(self.device), lengths.flatten().to(self.device)
        return self.follow(textbook_loss(self.decoder, encodings, captions, lengths))


class Ours(Trainer):
    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        run = Run.start("no")
        self.objective = CrossEntropy(self.encoder, self.decoder, self.settings, run, {UNK: 0})
        return [train.build_optimizer(self.encoder, self.decoder, self.settings)]

    def step(self, batch: Batch) -> float:
        """One step on a batch, which may have features in place of its images; its loss."""
        self.objective.start_step(batch[2].numpy())
        loss = self.objective(range(len(batch[0])), *batch)
        return self.follow(loss / self.objective.finish_step())


class OursSelfCritical(Ours):
    """Self-critical training; whatever its images, the references are the first batch's captions."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        device: torch.device,
        batches: list[Batch],
        settings: Settings,
    ):
        super().__init__(encoder, decoder, device)
        reward = Reward(words_of(*batches[0][1:], settings.vocabulary))
        longest = int(max(batch[2].max() for batch in batches)) - 1
        word_map, training = make_word_map(settings.vocabulary), train.Settings(dropout=0)
        self.objective = SelfCritical(
            encoder, decoder, training, Run.start("no"), word_map, reward, longest, epoch=1
        )


def gradient_difference(ours: Ours, textbook: Textbook) -> float:
    """Length of the difference of the last step's gradients, as a share of the gradient's length."""
    difference = length = 0.0
    for our_module, module in ((ours.encoder, textbook.encoder), (ours.decoder, textbook.decoder)):
        our_gradients = {name: parameter.grad for name, parameter in our_module.named_parameters()}
        for name, parameter in module.named_parameters():
            # ours has none where it is zero: the softmax is blind to a bias of all scores
            if parameter.grad is not None and our_gradients[name] is not None:
                difference += float((our_gradients[name] - parameter.grad).square().sum())
                length += float(parameter.grad.square().sum())
    return (difference / length) ** 0.5


class Record:
    """Times of both implementations' steps, and how far their results differ."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.differences: dict[str, list[float]] = defaultdict(list)

    def differ(self, what: str, difference: float) -> None:
        self.differences[what].append(difference)

    def report(self, title: str) -> None:
        captions = self.settings.batch_size * self.settings.captions_per_image
        rates = {name: captions * len(times) / sum(times) for name, times in self.seconds.items()}
        print(f"{title}, captions a second:")
        for name, rate in sorted(rates.items(), reverse=True):
            ratio = f", {rate / rates['textbook']:.1f} times the textbook's" if name == "ours" else ""
            print(f"    {name}: {rate:.2f} ({len(self.seconds[name])} steps{ratio})")
        for what, differences in self.differences.items():
            print(f"    largest difference of the {what}: {max(differences):.1e} ({len(differences)} steps)")
            gradient = what == "gradient"
            limit = self.settings.gradient_tolerance if gradient else self.settings.tolerance
            if not all(difference <= limit for difference in differences):  # nan fails too
                sys.exit(f"the {what} differs by more than {limit}")
        sys.stdout.flush()


if __name__ == "__main__":
    run_script(main, Settings)
