"""All scores of a set of captions, equal to the official evaluation's."""

import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from .meteor import Meteor, MeteorDataError
from .ngrams import CiderD, bleu_counts, named_bleu, rouge_l
from .tokenizer import tokenize


@dataclass(frozen=True)
class Scores:
    """Scores by name: Bleu_1 to Bleu_4, METEOR and ROUGE_L in [0, 1], CIDEr in [0, 10].

    METEOR is absent where its data are not installed.

    Attributes:
        overall: scores of the whole set. ROUGE_L and CIDEr are means over the images; BLEU and METEOR are
            computed from the counts of all images, added up.
        per_image: the scores of each image, in the order of the references, by the keys given; where lists
            were given, by position.
        bleu_counts: of each image what `metrics.ngrams.bleu_counts` gives; BLEU of any part of the set is
            that of their sums.
    """

    overall: dict[str, float]
    per_image: dict[Hashable, dict[str, float]]
    bleu_counts: dict[Hashable, list[int]]


def score_captions(
    references: Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]],
    hypotheses: Mapping[Hashable, str] | Sequence[str],
    meteor: Meteor | None = None,
) -> Scores:
    """All scores of a set of captions, the same as the official evaluation's.

    Args:
        references: the reference captions of each image, not tokenized: a dictionary by image, or a list.
        hypotheses: one caption per image, not tokenized: a dictionary with the same keys, or a list in the
            same order.
        meteor: a Meteor to use, which remembers the references that it has scored; by default a new one.

    Where METEOR's data are missing, the other scores are computed and a line on stderr says what to install.
    CIDEr takes document frequencies from these references, so it depends on the whole set.

    Raises:
        ValueError: an image is in only one of the two or has no reference, or there are no images.
        TypeError: an image's references are not a list of strings, its hypothesis is not a string, or one of
            the two is a list and the other a dictionary.
    """
    references, hypotheses = _by_key(references, hypotheses)
    _check(references, hypotheses)
    targets = {key: [tokenize(caption) for caption in captions] for key, captions in references.items()}
    tokens = {key: tokenize(hypotheses[key]) for key in references}

    counts = {key: bleu_counts(targets[key], tokens[key]) for key in targets}
    overall = named_bleu([sum(column) for column in zip(*counts.values())])
    per_image = {key: named_bleu(own_counts) for key, own_counts in counts.items()}

    columns = {}  # name -> score per image
    try:
        overall["METEOR"], columns["METEOR"] = (meteor or Meteor()).compute_score(
            {key: [" ".join(words) for words in captions] for key, captions in targets.items()},
            {key: " ".join(words) for key, words in tokens.items()},
        )
    except MeteorDataError as error:
        print(f"METEOR left out: {error}", file=sys.stderr)
    columns["ROUGE_L"] = [rouge_l(targets[key], tokens[key]) for key in targets]
    columns["CIDEr"] = CiderD.from_references(targets.values()).score(targets.values(), tokens.values())
    for name in ("ROUGE_L", "CIDEr"):
        overall[name] = math.fsum(columns[name]) / len(columns[name])
    for name, column in columns.items():
        for scores, score in zip(per_image.values(), column):
            scores[name] = score
    return Scores(overall, per_image, counts)


def _by_key(references, hypotheses) -> tuple[Mapping, Mapping]:
    """Both as dictionaries; the key of a list's item is its position."""
    if isinstance(references, Mapping) and isinstance(hypotheses, Mapping):
        return references, hypotheses
    for captions in (references, hypotheses):
        if isinstance(captions, str) or not isinstance(captions, Sequence):
            raise TypeError(
                f"references and hypotheses: two dictionaries or two lists are expected, not "
                f"{type(references).__name__} and {type(hypotheses).__name__}"
            )
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} images have references, but {len(hypotheses)} have a hypothesis")
    return dict(enumerate(references)), dict(enumerate(hypotheses))


def _check(references: Mapping[Hashable, Sequence[str]], hypotheses: Mapping[Hashable, str]) -> None:
    if not references and not hypotheses:
        raise ValueError("there are no captions to score")
    missing = {
        "hypothesis": [key for key in references if key not in hypotheses],
        "reference": [key for key in hypotheses if key not in references or not references[key]],
    }
    for what, keys in missing.items():
        if keys:
            named = ", ".join(map(repr, keys[:10])) + (", ..." if len(keys) > 10 else "")
            images = "1 image" if len(keys) == 1 else f"{len(keys)} images"
            raise ValueError(f"{images} without a {what}: {named}")
    for key, captions in references.items():
        if isinstance(captions, str):
            raise TypeError(f"references of {key!r}: a list of captions is expected, not a single string")
        if not isinstance(hypotheses[key], str):
            raise TypeError(
                f"hypothesis of {key!r}: a string is expected, not {type(hypotheses[key]).__name__}"
            )
