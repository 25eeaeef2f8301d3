"""Scores of captions, those of the official evaluation without Java: BLEU, METEOR, ROUGE-L, CIDEr-D.

    result = score_captions({"1.jpg": ["A dog runs.", "A dog in snow."]}, {"1.jpg": "A dog plays in snow."})
    result.overall["CIDEr"], result.per_image["1.jpg"]["Bleu_4"]

    cider = CiderD.from_references(training_references)  # lists of words, as `tokenize` makes them
    rewards = cider.score(references_of_the_batch, hypotheses_of_the_batch)

Papers quote the numbers of `pycocoevalcap`; `score_captions` gives the same ones, from captions as people
wrote them. Nothing here knows about models or files.
"""

import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from .meteor import Meteor, MeteorDataError
from .ngrams import CiderD, bleu4, bleu_counts, named_bleu, rouge_l
from .tokenizer import tokenize

__all__ = ["CiderD", "Meteor", "MeteorDataError", "Scores", "bleu4", "rouge_l", "score_captions", "tokenize"]


@dataclass(frozen=True)
class Scores:
    """Scores by name: Bleu_1 to Bleu_4, METEOR and ROUGE_L in [0, 1], CIDEr in [0, 10].

    `overall` is of the whole set: mean over the images for ROUGE_L and CIDEr; BLEU and METEOR are computed
    from the summed counts of all images. `per_image` has the scores of each, in the references' order.
    METEOR is absent from both where its data are not installed.
    """

    overall: dict[str, float]
    per_image: dict[Hashable, dict[str, float]]


def score_captions(
    references: Mapping[Hashable, Sequence[str]],
    hypotheses: Mapping[Hashable, str],
    meteor: Meteor | None = None,
) -> Scores:
    """All scores of a set of captions, the same as the official evaluation's.

    Args:
        references: the reference captions of each image, not tokenized.
        hypotheses: one caption for each of the same images, not tokenized.
        meteor: a Meteor to use again, which remembers the references; by default a new one.

    Where METEOR's data are missing, the other scores are given and a line on stderr says what to install.
    CIDEr takes document frequencies from these references, so it depends on the whole set.

    Raises:
        ValueError: an image is only in one of the two or has no reference, or there is no image.
        TypeError: the references of an image, or its hypothesis, are no list of strings, or no string.
    """
    _check(references, hypotheses)
    wanted = {key: [tokenize(caption) for caption in captions] for key, captions in references.items()}
    found = {key: tokenize(hypotheses[key]) for key in references}

    counts = [bleu_counts(wanted[key], found[key]) for key in wanted]
    overall = named_bleu([sum(column) for column in zip(*counts)])
    per_image = {key: named_bleu(count) for key, count in zip(wanted, counts)}

    scores = {}
    try:
        lines = {key: [" ".join(words) for words in captions] for key, captions in wanted.items()}
        overall["METEOR"], scores["METEOR"] = (meteor or Meteor()).compute_score(
            lines, {key: " ".join(words) for key, words in found.items()}
        )
    except MeteorDataError as error:
        print(f"METEOR left out: {error}", file=sys.stderr)
    scores["ROUGE_L"] = [rouge_l(wanted[key], found[key]) for key in wanted]
    scores["CIDEr"] = CiderD.from_references(wanted.values()).score(wanted.values(), found.values())
    for name in ("ROUGE_L", "CIDEr"):
        overall[name] = math.fsum(scores[name]) / len(scores[name])
    for name, column in scores.items():
        for own, score in zip(per_image.values(), column):
            own[name] = score
    return Scores(overall, per_image)


def _check(references: Mapping[Hashable, Sequence[str]], hypotheses: Mapping[Hashable, str]) -> None:
    if not references and not hypotheses:
        raise ValueError("there are no captions to score")
    without = {
        "hypothesis": [key for key in references if key not in hypotheses],
        "reference": [key for key in hypotheses if key not in references or not references[key]],
    }
    for what, keys in without.items():
        if keys:
            some = ", ".join(map(repr, keys[:10])) + (", ..." if len(keys) > 10 else "")
            raise ValueError(f"{len(keys)} images without a {what}: {some}")
    for key, captions in references.items():
        if isinstance(captions, str):
            raise TypeError(f"references of {key!r}: a list of captions is expected, not one string")
        if not isinstance(hypotheses[key], str):
            raise TypeError(
                f"hypothesis of {key!r}: a string is expected, not {type(hypotheses[key]).__name__}"
            )
