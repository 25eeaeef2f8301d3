"""Scores of captions, equal to the official evaluation's, without Java: BLEU, METEOR, ROUGE-L, CIDEr-D.

    result = score_captions({"1.jpg": ["A dog runs.", "A dog in snow."]}, {"1.jpg": "A dog plays in snow."})
    result.overall["CIDEr"], result.per_image["1.jpg"]["Bleu_4"]

    cider = CiderD.from_references(training_references)  # each a list of words, see `tokenize`
    rewards = cider.score(references_of_the_batch, hypotheses_of_the_batch)

Papers quote the numbers of `pycocoevalcap`; `score_captions` computes the same ones from captions that are
not tokenized. The folder imports nothing of this project: it can be copied into another one.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .ngrams import CiderD, bleu4, rouge_l
from .tokenizer import tokenize

if TYPE_CHECKING:
    from .meteor import Meteor, MeteorDataError
    from .scores import Scores, score_captions

__all__ = ["CiderD", "Meteor", "MeteorDataError", "Scores", "bleu4", "rouge_l", "score_captions", "tokenize"]

# loaded where they are first asked for: a training scores its captions without METEOR
MODULE_OF = {"Meteor": "meteor", "MeteorDataError": "meteor", "Scores": "scores", "score_captions": "scores"}


def __getattr__(name: str) -> object:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f".{MODULE_OF[name]}", __name__), name)
