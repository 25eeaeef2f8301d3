"""How captions are decoded: the settings that the captioning scripts and eval.py inherit."""

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


@dataclass(kw_only=True)
class CommonDecodingOptions:
    """Decoding by any captioner.

    Where `temperature` or `top_p` (Holtzman et al., 2020) is given, captions are sampled; otherwise they are
    searched with a beam. The seed and an image's id decide its samples. An attention model counts words, BLIP
    counts tokens.

    Raises:
        UserError: values that cannot be, or do not go together.
    """

    no_repeat_ngram: int = 0  # no sequence of so many words occurs twice in a caption; 0: any may
    min_length: int = 0  # words of a caption, at least
    temperature: float | None = None  # draw samples, from the probabilities to the power of 1 / this
    top_p: float | None = None  # draw samples, from the likeliest words, of which this share is made up
    seed: int = 123  # of the samples

    def __post_init__(self):
        check_at_least(self, 0, "no_repeat_ngram", "min_length", "seed")
        check_above_zero(
            self, *(name for name in ("temperature", "top_p") if getattr(self, name) is not None)
        )

    @property
    def samples(self) -> bool:
        """Whether captions are sampled, not searched."""
        return self.temperature is not None or self.top_p is not None


@dataclass(kw_only=True)
class AttentionDecodingOptions(CommonDecodingOptions):
    """Decoding by attention models alone."""

    length_penalty: float = 0.0  # compare captions by log-probability / length ** this
    remove_bad_endings: bool = False  # no caption ends in "a", "of", "and" or the like
    allow_unk: bool = False  # captions may have <unk>, as the 2018 tutorial's

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, -100, "length_penalty")


@dataclass
class DecodingOptions(AttentionDecodingOptions):
    """Decoding: search and samples. All that decides which captions a model gives for an image."""

    beam_size: int = 3  # hypotheses searched at a time; 1 is greedy
    num_captions: int = 1  # of each image: the best of the beam, no two alike, or so many samples

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "beam_size", "num_captions")
        if self.num_captions > self.beam_size and not self.samples:
            raise UserError(
                f"--num_captions is {self.num_captions}: a beam of {self.beam_size} gives no more than "
                f"{self.beam_size}; give a larger beam, or --temperature 1 for samples"
            )

    @classmethod
    def of(cls, settings: CommonDecodingOptions, **other_values: Any) -> DecodingOptions:
        """Those that a script's settings have, and for the rest other_values or the defaults."""
        known = {name: getattr(settings, name) for name in cls.names() if hasattr(settings, name)}
        return cls(**known | other_values)

    @classmethod
    def taken_from(cls, options: dict[str, Any], **other_values: Any) -> DecodingOptions:
        """Those among keyword arguments, which are removed there."""
        return cls(**{name: options.pop(name) for name in cls.names() if name in options} | other_values)

    @classmethod
    def names(cls) -> list[str]:
        return [option.name for option in fields(cls)]
