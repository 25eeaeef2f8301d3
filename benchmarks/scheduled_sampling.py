"""Scheduled sampling: train.py's parallel form beside the sequential form of Bengio et al. (2015).

    python run_pipeline.py                      # trains a model on the demonstration set, if there is none
    python benchmarks/scheduled_sampling.py
    python benchmarks/scheduled_sampling.py --checkpoint best_checkpoint.pth --data_folder data_output

Both forms replace words of the ground-truth captions by words that the decoder predicts. The parallel form
draws all of them from the distributions after the ground-truth words, in one pass; the sequential form
draws each after the words that were replaced before it, step by step. Then the loss is that of a pass
over the mixed words.

Times: training steps in turn, on cached features of training images. Differences: both forms replace the same
places with the same random numbers, many times over in the same captions; the loss is the cross-entropy. The
weights stay those of the checkpoint, and dropout is off, so that only the form differs. The script stops with
an error if the forms differ where they must not, or the parallel one is not that of `sample_inputs`.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from common import timed
from torch import Tensor

import train
from captioning.captioners.attention import load_models
from captioning.command_line import check_at_least, check_share, run_script
from captioning.data.features import cache_features
from captioning.decoding.beam_search import search_states
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.sampling import draw_words
from captioning.decoding.teacher_forcing import TokenLogits, token_logits
from captioning.training.losses import CrossEntropy, sample_inputs
from captioning.training.optimization import Run
from datasets import BatchSampler, CaptionDataset
from models import DecoderWithAttention
from utils import UserError, pick_device

Batch = tuple[Tensor, Tensor, Tensor]  # features (N, h, w, D), captions (N, G, L), lengths (N, G)


@dataclass
class Settings:
    checkpoint: str = "output_models/best_checkpoint.pth"  # a trained model
    data_folder: str = "data_output"  # what it was trained on
    probability: float = 0.25  # with which a word is replaced
    batch_size: int = 16  # images a step, as in train.py
    batches: int = 2  # different ones, of training images
    steps: int = 11  # timed, the first for warming up
    draws: int = 30  # of replacements in all batches, for the differences
    seed: int = 0  # of batches and draws

    def __post_init__(self):
        check_share(self, "probability")
        check_at_least(self, 1, "batch_size", "batches")
        check_at_least(self, 2, "steps")
        check_at_least(self, 4, "draws")


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    decoder, batches, word_map = load(settings)
    captions = sum(lengths.numel() for _, _, lengths in batches)
    print(
        f"{settings.checkpoint}: {len(word_map)} words, {captions} training captions in "
        f"{len(batches)} batches, probability {settings.probability}, on {pick_device()} "
        f"({torch.get_num_threads()} threads)",
        flush=True,
    )
    check_forms(decoder, batches[0])
    compare_times(decoder, batches, word_map, settings)
    compare_draws(decoder, batches, settings)


def load(settings: Settings) -> tuple[DecoderWithAttention, list[Batch], dict[str, int]]:
    source, word_map = settings.checkpoint, Path(settings.data_folder) / "word_map.json"
    for path in (source, word_map):
        if not Path(path).is_file():
            raise UserError(
                f"{path}: no such file; `python run_pipeline.py` trains a model on the demonstration set, or "
                f"give --checkpoint and --data_folder"
            )
    encoder, decoder, words = load_models(source, source, word_map)
    decoder.dropout.p = 0.0
    use_fast_energies(decoder)
    features = cache_features(encoder, settings.data_folder, "train", pick_device())
    data = CaptionDataset(settings.data_folder, "train", features)
    sampler = BatchSampler(len(data), settings.batch_size, shuffle=True, seed=settings.seed)
    return decoder, [data[request] for request in islice(sampler, settings.batches)], words


# --- the two forms ------------------------------------------------------------------------------------------


def feed_parallel(tokens: TokenLogits, captions: Tensor, replaced: Tensor, numbers: Tensor) -> Tensor:
    """Words drawn after the ground-truth ones: what to feed (N, G, L).

    Args:
        tokens: of the ground-truth captions.
        captions: (N, G, L). replaced: whether to replace a word. numbers: uniform in [0, 1), one for each.
    """
    packing, fed = tokens.packing, captions.flatten(0, 1).clone()
    chosen = replaced.flatten(0, 1)[packing.captions, packing.steps + 1]
    places = packing.captions[chosen], packing.steps[chosen] + 1
    logits = tokens.logits[chosen.to(tokens.logits.device)]
    fed[places] = draw_words(logits, numbers.flatten(0, 1)[places].to(logits.device)).cpu()
    return fed.view(captions.shape)


@torch.no_grad()
def feed_sequential(
    decoder: DecoderWithAttention, grid: Tensor, captions: Tensor, replaced: Tensor, numbers: Tensor
) -> Tensor:
    """Words drawn after those that are fed before them; arguments and result as in `feed_parallel`."""
    (state,) = search_states([decoder], [grid])
    state.reorder(torch.zeros(captions.shape[:2], dtype=torch.long, device=grid.device))
    fed = captions.clone()
    for step in range(captions.shape[2] - 2):  # the last word that is fed stands before `<end>`
        logits, _ = state.step(fed[:, :, step].to(grid.device))
        rows = replaced[:, :, step + 1]
        drawn = draw_words(logits[rows.to(grid.device)], numbers[:, :, step + 1][rows].to(grid.device))
        fed[:, :, step + 1][rows] = drawn.cpu()
    return fed


def fed_places(captions: Tensor, lengths: Tensor) -> Tensor:
    """The places (N, G, L) of the words that may be replaced: those that are fed, but for the first."""
    places = torch.arange(captions.shape[2])
    return (places > 0) & (places < lengths.unsqueeze(2) - 1)


def draw_places(captions: Tensor, lengths: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Whether to replace each word (N, G, L), and the numbers to draw with."""
    numbers, places = torch.rand(2, *captions.shape)
    return (places < probability) & fed_places(captions, lengths), numbers


@torch.no_grad()
def check_forms(decoder: DecoderWithAttention, batch: Batch) -> None:
    """Stop if a form is not what it should be; in float64, so that no draw depends on rounding."""
    decoder, (grid, captions, lengths) = copy.deepcopy(decoder).double(), batch
    grid = grid.to(decoder.fc.weight)
    allowed, numbers = fed_places(captions, lengths), torch.rand(captions.shape, dtype=grid.dtype)

    def both(replaced: Tensor) -> tuple[Tensor, Tensor]:
        tokens = token_logits(decoder, grid, captions, lengths)
        sequential = feed_sequential(decoder, grid, captions, replaced, numbers)
        return feed_parallel(tokens, captions, replaced, numbers), sequential

    def ours(probability: float) -> Tensor:
        return sample_inputs(decoder, grid, captions, lengths, probability)

    parallel, sequential = both(allowed)
    tokens = token_logits(decoder, grid, captions, lengths, sequential)
    again = feed_parallel(tokens, captions, allowed, numbers)
    order = torch.rand(captions.shape).masked_fill(~allowed, -1)
    differ = not parallel.equal(sequential)
    single = both(F.one_hot(order.argmax(dim=2), captions.shape[2]).bool() & allowed)
    checks = {
        "probability 0 feeds the ground truth": all(
            w.equal(captions) for w in [*both(allowed & False), ours(0)]
        ),
        "the first word stays": all(
            w[:, :, 0].equal(captions[:, :, 0]) for w in (parallel, sequential, ours(1))
        ),
        "the forms replace words, and not by the same": not single[0].equal(captions) and differ,
        "sequential words are drawn after those before them": again.equal(sequential),
        "a caption's only replaced word is the same in both forms": single[0].equal(single[1]),
    }
    decoder.fc.weight *= 1e6  # from here on the most probable word is drawn, whatever the number
    decoder.fc.bias *= 1e6
    alike = both(allowed)[0].equal(ours(1).where(allowed, captions))
    for condition, holds in (checks | {"the parallel form is that of sample_inputs": alike}).items():
        if not holds:
            sys.exit(f"not as it should be: {condition}")


# --- times --------------------------------------------------------------------------------------------------


class SequentialSampling(CrossEntropy):
    """Cross-entropy with the sequential form of scheduled sampling."""

    def _fed(self, grid: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        replaced, numbers = draw_places(captions, lengths, self.scheduled_sampling)
        return feed_sequential(self.decoder, grid, captions, replaced, numbers)


def compare_times(
    decoder: DecoderWithAttention, batches: list[Batch], word_map: dict[str, int], settings: Settings
) -> None:
    training = train.Settings()
    common = None, decoder, training, Run.start("no"), word_map  # no encoder: its features are cached
    objectives = {
        "cross-entropy": CrossEntropy(*common),
        "parallel": CrossEntropy(*common, settings.probability),
        "sequential": SequentialSampling(*common, settings.probability),
    }
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, fused=True)  # the weights stay

    def run_step(objective: CrossEntropy, batch: Batch) -> None:
        objective.start_step(batch[2].numpy())
        optimizer.zero_grad(set_to_none=True)
        objective(range(len(batch[0])), *batch).backward()
        torch.nn.utils.clip_grad_value_(decoder.parameters(), training.grad_clip)
        optimizer.step()

    decoder.train()
    seconds = dict.fromkeys(objectives, 0.0)
    for step in range(settings.steps):
        for name, objective in objectives.items():
            _, passed = timed(run_step, objective, batches[step % len(batches)], device=pick_device())
            seconds[name] += passed if step > 0 else 0.0
    print(f"a training step, mean of {settings.steps - 1}:")
    for name, passed in seconds.items():
        mean, ratio = passed / (settings.steps - 1), passed / seconds["cross-entropy"]
        print(f"    {name}: {mean:.3f} s, {ratio:.2f} times cross-entropy alone", flush=True)


# --- what is fed and learned --------------------------------------------------------------------------------


def compare_draws(decoder: DecoderWithAttention, batches: list[Batch], settings: Settings) -> None:
    parameters, device = list(decoder.parameters()), decoder.fc.weight.device
    count = sum(int((lengths - 1).sum()) for _, _, lengths in batches)  # of tokens
    losses = torch.zeros(2, settings.draws)  # of the forms
    halves: list[list] = [[0.0, 0.0], [0.0, 0.0]]  # of each form's draws: the summed gradients
    truth_loss, truth_gradient, totals = 0.0, 0.0, defaultdict(float)

    def learn(found: TokenLogits) -> tuple[float, Tensor]:
        """A batch's part of the mean cross-entropy, and of its gradient."""
        loss = F.cross_entropy(found.logits, found.targets, reduction="sum") / count
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients])

    for batch in batches:
        grid, captions, lengths = batch[0].float().to(device), *batch[1:]
        truth = token_logits(decoder, grid, captions, lengths)
        loss, gradient = learn(truth)
        truth_loss, truth_gradient = truth_loss + loss, truth_gradient + gradient
        truth = truth._replace(logits=truth.logits.detach())
        for draw in range(settings.draws):
            replaced, numbers = draw_places(captions, lengths, settings.probability)
            parallel = feed_parallel(truth, captions, replaced, numbers)
            sequential = feed_sequential(decoder, grid, captions, replaced, numbers)
            for form, fed in enumerate((parallel, sequential)):
                found = token_logits(decoder, grid, captions, lengths, fed)
                loss, gradient = learn(found)
                losses[form, draw] += loss
                halves[form][draw % 2] = halves[form][draw % 2] + gradient / settings.draws * 2
            distances, packing = torch.zeros(captions.shape), truth.packing
            difference = truth.logits.softmax(dim=1) - found.logits.detach().softmax(dim=1)
            distance = (difference.abs().sum(dim=1) / 2).cpu()
            distances.flatten(0, 1)[packing.captions, packing.steps + 1] = distance
            later = replaced & (replaced.cumsum(dim=2) > 1)
            for name, chosen in (("all", replaced), ("later", later)):
                totals[name] += int(chosen.sum())
                totals[name, "differ"] += int((parallel != sequential)[chosen].sum())
                totals[name, "distance"] += float(distances[chosen].sum())
            totals["truth"] += int((parallel == captions)[replaced].sum())
    report_words(totals)
    report_losses(truth_loss, losses)
    report_gradients("the gradient", halves, truth_gradient)
    changes = [[half - truth_gradient for half in form] for form in halves]
    report_gradients("what scheduled sampling adds to it", changes)


def report_words(totals: dict) -> None:
    places = totals["all"]
    print(
        f"{places:.0f} replaced words, {totals['truth'] / places:.1%} of the parallel ones the ground truth:"
    )
    for name, title in (("all", "all"), ("later", "with a replaced word before them")):
        count, differ, distance = totals[name], totals[name, "differ"], totals[name, "distance"]
        print(
            f"    {title} ({count / places:.1%}): {differ / count:.2%} differ between the forms; mean total "
            f"variation distance of the distributions {distance / count:.4f}"
        )


def report_losses(truth_loss: float, losses: Tensor) -> None:
    def describe(values: Tensor) -> str:
        return f"{float(values.mean()):.4f} +- {float(values.std()) / len(values) ** 0.5:.4f}"

    print(f"cross-entropy a word, mean and standard error over {losses.shape[1]} draws:")
    print(f"    ground truth fed {truth_loss:.4f}, parallel {describe(losses[0])}, ", end="")
    print(f"sequential {describe(losses[1])}, sequential - parallel {describe(losses[1] - losses[0])}")


def report_gradients(title: str, halves: list[list[Tensor]], truth: Tensor | None = None) -> None:
    """Print the cosines of summed gradients: of a half of one form's draws and the other half of the same or
    of the other form's, so that no random numbers are shared."""
    cosine = partial(F.cosine_similarity, dim=0)
    (p0, p1), (s0, s1) = halves
    between = float(cosine(p0, s1) + cosine(p1, s0)) / 2
    within = float(cosine(p0, p1)), float(cosine(s0, s1))
    print(f"{title}, cosines of the means over half of the draws and over the other half:")
    print(f"    parallel and sequential {between:.4f}; within parallel {within[0]:.4f}, ", end="")
    print(f"within sequential {within[1]:.4f}")
    if min(within) > 0:  # otherwise there are too few draws for it
        print(f"    the first without the noise of the draws: {between / (within[0] * within[1]) ** 0.5:.4f}")
    print(f"    lengths of the means: parallel {float((p0 + p1).norm()) / 2:.4f}, ", end="")
    print(f"sequential {float((s0 + s1).norm()) / 2:.4f}")
    if truth is not None:
        own = float(cosine(p0 + p1, truth)), float(cosine(s0 + s1, truth))
        print(f"    with the ground truth fed and parallel {own[0]:.4f}, and sequential {own[1]:.4f}")


if __name__ == "__main__":
    run_script(main, Settings)
