"""How captions are decoded: the settings that the captioning scripts share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from captioning.command_line import check_above_zero, check_at_least
from utils import UserError

# last words after which something is missing: articles, prepositions, conjunctions, forms of "to be"
BAD_LAST_WORDS = """
    a an the of in on at to by with from for into onto over under above below behind beside between near
    through across along around against toward towards up down off out and or but while as that which who is
    are was were be being its their his her my your this these those some
"""
UNFINISHED = frozenset(BAD_LAST_WORDS.split())


@dataclass(frozen=True)
class DecodingOptions:
    """How captions are decoded; the captioning scripts have settings of the same names.

    Where `temperature` or `top_p` is given, captions are sampled; otherwise they are searched with a beam.

    Attributes:
        beam_size: hypotheses searched at a time; 1 is greedy.
        length_penalty: hypotheses are compared by log-probability / length ** this.
        no_repeat_ngram: no sequence of so many words occurs twice in a caption; 0: any may.
        min_length: words of a caption, at least.
        remove_bad_endings: no caption ends in one of `UNFINISHED`.
        allow_unk: captions may have `<unk>`, and any other word of the word map, as those of the 2018
            tutorial.
        num_captions: of each image: the best of the beam, no two alike, or so many samples.
        temperature: words are drawn from the model's probabilities to the power of 1 / this, made to sum to
            one; None: 1, where samples are drawn.
        top_p: words are drawn from the likeliest ones alone, of which the model's probabilities sum to this
            (Holtzman et al., 2020); None: from all.
        seed: of the samples; with an image's id it decides them.

    Raises:
        UserError: values that cannot be, or do not go together.
    """

    beam_size: int = 3
    length_penalty: float = 0.0
    no_repeat_ngram: int = 0
    min_length: int = 0
    remove_bad_endings: bool = False
    allow_unk: bool = False
    num_captions: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 123

    def __post_init__(self):
        check_at_least(self, 1, "beam_size", "num_captions")
        check_at_least(self, 0, "no_repeat_ngram", "min_length", "seed")
        check_at_least(self, -100, "length_penalty")
        check_above_zero(
            self, *(name for name in ("temperature", "top_p") if getattr(self, name) is not None)
        )
        if self.num_captions > self.beam_size and not self.samples:
            raise UserError(
                f"--num_captions is {self.num_captions}: a beam of {self.beam_size} gives no more than "
                f"{self.beam_size}; give a larger beam, or --temperature 1 for samples"
            )

    @classmethod
    def of(cls, settings: Any, **given) -> DecodingOptions:
        """Those of a script's settings, where it has them, else the defaults. given: values of others."""
        known = {name: getattr(settings, name) for name in cls.names() if hasattr(settings, name)}
        return cls(**known | given)

    @classmethod
    def taken_from(cls, options: dict[str, Any], **given) -> DecodingOptions:
        """Those among keyword arguments, which are removed there."""
        return cls(**{name: options.pop(name) for name in cls.names() if name in options} | given)

    @classmethod
    def names(cls) -> list[str]:
        return [option.name for option in fields(cls)]

    @property
    def samples(self) -> bool:
        """Whether captions are sampled, not searched."""
        return self.temperature is not None or self.top_p is not None
