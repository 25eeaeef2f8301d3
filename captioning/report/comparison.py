"""How the captions of two models differ: paired bootstrap intervals, wins and losses, agreement.

The images are drawn again with replacement, the same ones for both models, and the difference of their scores
is taken each time (Koehn, 2004, "Statistical significance tests for machine translation evaluation"). CIDEr's
document frequencies stay those of the whole set.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from captioning.data.text_files import read_text
from captioning.report.scoring import COLUMNS, matched_bleu, report_scores
from metrics import Scores, rouge_l, tokenize
from utils import UserError, counted, require_regular_file, say

RESAMPLES = 2000
DIGITS = 4  # to which scores are printed: a difference that is 0 there is 0
TIE = 1e-9  # CIDEr scores that differ by less are equal

OF_CORPUS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")  # of summed counts
OF_IMAGES = ("METEOR", "ROUGE_L", "CIDEr")  # mean over the images


class Interval(NamedTuple):
    """The second model's score less the first's, with its 95 % interval."""

    difference: float
    low: float
    high: float

    @property
    def more_than_chance(self) -> bool:
        """Whether the interval, as it is printed, leaves out 0."""
        return round(self.low, DIGITS) > 0 or round(self.high, DIGITS) < 0


def signed(value: float) -> str:
    """`+0.0123`; a negative value that rounds to 0 is `+0.0000` too."""
    return f"{round(value, DIGITS) + 0.0:+.{DIGITS}f}"


def bootstrap_difference(
    first: np.ndarray,
    second: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> Interval:
    """Paired bootstrap of a score that is computed from sums over the images.

    Args:
        first, second: the summands of each image for either model, (images, k), images in the same order.
        score: sums (n, k) -> scores (n,). None: k is 1 and the score is the mean over the images.

    Raises:
        UserError: fewer than two images.
    """
    images = len(first)
    if images < 2:
        raise UserError("a comparison needs at least two images; with one there is no telling chance apart")
    score = score or (lambda sums: sums[:, 0] / images)
    rng = np.random.default_rng(seed)
    differences = []
    for _ in range(0, RESAMPLES, 100):  # a hundred at a time, so that memory stays small
        counts = rng.multinomial(images, np.full(images, 1 / images), size=100).astype(np.float64)
        differences.append(score(counts @ second) - score(counts @ first))
    low, high = np.percentile(np.concatenate(differences), (2.5, 97.5))
    whole = score(second.sum(axis=0, keepdims=True)) - score(first.sum(axis=0, keepdims=True))
    return Interval(float(whole[0]), float(low), float(high))


def compare_columns(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> dict[str, Interval]:
    """Intervals of the scores that both models have, each taken as the mean of the images' own scores."""
    columns = {
        name: [np.asarray(scores[name], dtype=np.float64)[:, None] for scores in (first, second)]
        for name in (*OF_CORPUS, *OF_IMAGES)
        if name in first and name in second
    }
    return {name: bootstrap_difference(*pair) for name, pair in columns.items()}


def compare_models(
    references: Mapping[str, Sequence[str]],
    captions: Sequence[Mapping[str, str]],
    scores: Sequence[Scores],
) -> dict:
    """Compare two models on the same images.

    Args:
        references: the reference captions of each image.
        captions: both models' captions by image.
        scores: both models' scores, from `report_scores` or `score_captions`; they may cover more images.

    Returns:
        "intervals": {score: Interval}, for BLEU of the whole set, for the others of the mean over the images.
        "wins", "losses", "ties": images on which the second model has a higher, lower or equal CIDEr.
        "identical": share of the images for which both captions are the same. "overlap": mean ROUGE-L of the
        second model's captions against the first's.
    """
    ids = list(references)
    counts = [np.array([of_model.bleu_counts[key] for key in ids], dtype=np.float64) for of_model in scores]
    intervals = {}
    for name in OF_CORPUS:
        intervals[name] = bootstrap_difference(
            *counts, lambda sums, name=name: np.array([matched_bleu(row)[name] for row in sums])
        )
    columns = [
        {
            name: [of_model.per_image[key][name] for key in ids]
            for name in OF_IMAGES
            if name in of_model.overall
        }
        for of_model in scores
    ]
    intervals |= compare_columns(*columns)
    gains = np.subtract(columns[1]["CIDEr"], columns[0]["CIDEr"])
    words = [[tokenize(of_model[key]) for key in ids] for of_model in captions]
    return {
        "intervals": intervals,
        "wins": int((gains > TIE).sum()),
        "losses": int((gains < -TIE).sum()),
        "ties": int((abs(gains) <= TIE).sum()),
        "identical": float(np.mean([first == second for first, second in zip(*words)])),
        "overlap": float(np.mean([rouge_l([first], second) for first, second in zip(*words)])),
    }


def compare_pairs(
    references: Mapping[str, Sequence[str]],
    names: Sequence[str],
    captions: Sequence[Mapping[str, str]],
    scores: Sequence[Scores | None],
) -> list[dict]:
    """Compare every two of several models on the images that both have captioned.

    Two models that have captioned different images are scored anew on those that they share. Pairs that share
    fewer than two are left out, and a line says so.

    Args:
        references: the reference captions of each image.
        names: of the models.
        captions: each model's captions by image.
        scores: each model's `report_scores`.

    Returns:
        For each pair what `compare_models` returns, and "first" and "second", the models' indices, "images",
        their number, and "verdict", one line.
    """
    comparisons = []
    for first, second in combinations(range(len(names)), 2):
        common = {
            key: texts
            for key, texts in references.items()
            if key in captions[first] and key in captions[second]
        }
        if len(common) < 2:
            shared = counted(len(common), "scored image")
            say(f"{names[first]} and {names[second]}: {shared} in common, not compared")
            continue
        both = [{key: captions[index][key] for key in common} for index in (first, second)]
        pair_scores = [scores[first], scores[second]]
        if any(of_model.per_image.keys() != common.keys() for of_model in pair_scores):
            pair_scores = [report_scores(common, texts) for texts in both]
        comparison = compare_models(common, both, pair_scores)
        line = verdict(comparison["intervals"]["CIDEr"], "CIDEr", names[first], names[second])
        comparisons.append(
            comparison | {"first": first, "second": second, "images": len(common), "verdict": line}
        )
    return comparisons


def verdict(interval: Interval, score: str, first: str, second: str) -> str:
    """Say in words whether the difference is more than chance."""
    numbers = (
        f"{signed(interval.difference)}, 95 % interval {signed(interval.low)} to {signed(interval.high)}"
    )
    if interval.more_than_chance:
        better, worse = (second, first) if interval.difference > 0 else (first, second)
        return f"{better} is better than {worse} by {score}, and by more than chance ({numbers})"
    return f"by {score} the difference of {second} and {first} may be chance ({numbers})"


def print_comparisons(comparisons: Sequence[dict], names: Sequence[str]) -> None:
    """Print what `compare_pairs` returned."""
    for comparison in comparisons:
        first, second = names[comparison["first"]], names[comparison["second"]]
        images = comparison["images"]
        say()
        say(f"{second} less {first}, 95 % interval of a paired bootstrap over {images} images:")
        print_intervals(comparison["intervals"])
        wins = counted(comparison["wins"], "image")
        say(
            f"by CIDEr {second} wins {wins}, loses {comparison['losses']}, ties {comparison['ties']}; "
            f"{comparison['identical']:.1%} of the captions are the same"
        )
        say(comparison["verdict"])


def print_intervals(intervals: Mapping[str, Interval]) -> None:
    """A line for each score."""
    for name, interval in intervals.items():
        chance = "" if interval.more_than_chance else "  may be chance"
        numbers = f"{signed(interval.difference):>8}  [{signed(interval.low)}, {signed(interval.high)}]"
        say(f"  {COLUMNS[name]:8} {numbers}{chance}")


# --- files of --per_image_csv ----------------------------------------------------------------------------


def compare_files(first: str, second: str) -> None:
    """Compare two files of --per_image_csv and print the result; BLEU is the mean of the images' own BLEU."""
    tables = [read_per_image(file) for file in (first, second)]
    ids = [image_id for image_id in tables[0] if image_id in tables[1]]
    apart = len(tables[0]) + len(tables[1]) - 2 * len(ids)
    if len(ids) < 2:
        raise UserError(
            f"{second}: has {counted(len(ids), 'image')} of {first}; a comparison needs two or more"
        )
    columns = [
        {name: [table[image_id][name] for image_id in ids] for name in COLUMNS if name in table[ids[0]]}
        for table in tables
    ]
    intervals = compare_columns(*columns)
    say(f"{second} less {first}, means over {len(ids)} images, 95 % interval of a paired bootstrap:")
    print_intervals(intervals)
    if any(name in intervals for name in OF_CORPUS):
        say("BLEU here is the mean of each image's own; --submission compares that of all images together")
    if apart:
        say(f"left out: {counted(apart, 'image')} that only one of the files has")
    say(verdict(intervals["CIDEr"], "CIDEr", first, second))


def read_per_image(file: str) -> dict[str, dict[str, float]]:
    """Read a file of --per_image_csv that has one row per image: {image id: scores}."""
    require_regular_file(file, f"no such file; eval.py --per_image_csv {file} writes one")
    text, _ = read_text(file)
    table: dict[str, dict[str, float]] = {}
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        names = [name for name in COLUMNS if name in (reader.fieldnames or ())]
        if "CIDEr" not in names or "image_id" not in reader.fieldnames:
            raise UserError(
                f"{file}: no scores of images, as eval.py --per_image_csv writes them; files of captions are "
                f"compared by eval.py --submission FIRST SECOND --references FILE"
            )
        rows = list(reader)
        for row in rows:
            if row["image_id"] in table:
                raise UserError(_refuse_several(file, row["image_id"], {own.get("model") for own in rows}))
            table[row["image_id"]] = {name: float(row[name]) for name in names}
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file}: not a file of --per_image_csv ({error}); write it anew") from None
    return table


def _refuse_several(file: str, image_id: str, models: set[str | None]) -> str:
    """The message for a file that has an image more than once."""
    if len(models) == 1:
        return f"{file}: has {image_id} more than once; write it with one of --beam_sizes"
    names = " ".join(sorted(map(str, models)))
    return (
        f"{file}: has the scores of {len(models)} files, which eval.py --submission {names} --references "
        f"FILE compares; for --compare write a file of each"
    )
