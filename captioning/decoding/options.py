"""How captions are decoded: the settings that the captioning scripts and eval.py inherit, the rules on words
that search and sampling keep to, and the rules on what comes out."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from captioning.command_line import check_above_zero, check_at_least
from utils import UserError, copy_to_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# --- settings -----------------------------------------------------------------------------------------------

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


# --- words that may not come next ---------------------------------------------------------------------------


class WordRules(NamedTuple):
    """What a caption must not be like; words are indices.

    forbidden: words that it must not have.
    no_repeat_ngram: no sequence of so many words occurs twice in it; 0: any may.
    min_length: words that it has at least, `<end>` not counted.
    unfinished: words after which it must not end. In search and sampling `<end>` cannot follow them, so that
        the model goes on to what is missing; to cut them off afterwards would also take "in" from "in a
        park". Only from a caption that has no end, for the step limit came or no word is left that may
        follow, these words are cut off.
    """

    forbidden: Collection[int] = ()
    no_repeat_ngram: int = 0
    min_length: int = 0
    unfinished: Collection[int] = ()

    def cut(self, words: list[int]) -> list[int]:
        """Unfinished words without those at the end after which something is missing."""
        length = len(words)
        while length and words[length - 1] in self.unfinished:
            length -= 1
        return words[:length]


NO_RULES = WordRules()


class WordMasks:
    """The rules on a device; applying them neither reads from it nor loops over words."""

    def __init__(self, rules: WordRules, end: int, device: torch.device):
        import torch  # here, as --help needs the settings above, but not the seconds that torch takes

        self.rules, self.end = rules, end
        indices = [torch.tensor([*words], dtype=torch.long) for words in (rules.forbidden, rules.unfinished)]
        self.forbidden, self.unfinished = copy_to_device(indices, device)

    def applied(self, log_probs: Tensor, history: Tensor) -> Tensor:
        """What `apply` makes of a copy."""
        if self.rules == NO_RULES:
            return log_probs
        log_probs = log_probs.clone()
        self.apply(log_probs, history)
        return log_probs

    def apply(self, log_probs: Tensor, history: Tensor) -> None:
        """Set what may not come next to -inf, in place.

        Args:
            log_probs: of the next word (N, K, V).
            history: the words so far (N, K, L), `<start>` first.
        """
        log_probs.index_fill_(2, self.forbidden, -math.inf)
        if history.shape[2] <= self.rules.min_length:  # L - 1 words so far
            log_probs[:, :, self.end] = -math.inf
        if self.rules.unfinished:
            ends_badly = (history[:, :, -1:] == self.unfinished).any(dim=2)
            log_probs[:, :, self.end].masked_fill_(ends_badly, -math.inf)
        if self.rules.no_repeat_ngram:
            _mask_repeated(log_probs, history[:, :, 1:], self.rules.no_repeat_ngram)


def _mask_repeated(log_probs: Tensor, words: Tensor, n: int) -> None:
    """Set the words that would complete an n-gram of `words` (N, K, L) a second time to -inf, in place."""
    ngrams = words.shape[2] - n + 1
    if ngrams < 1:
        return
    import torch

    # (N, K, ngrams): whether the first n - 1 words of an n-gram are the last n - 1 of the caption
    same = torch.ones_like(words[:, :, :ngrams], dtype=torch.bool)
    for i in range(n - 1):
        same &= words[:, :, i : i + ngrams] == words[:, :, ngrams + i : ngrams + i + 1]
    penalties = torch.zeros_like(same, dtype=log_probs.dtype).masked_fill_(same, -math.inf)
    log_probs.scatter_add_(2, words[:, :, n - 1 :], penalties)


# --- what no caption may be ---------------------------------------------------------------------------------
# of models that may answer with something other than a caption

REFUSAL = re.compile(
    r"""\W*(
        (i'?m|i\ am)\ (very\ |so\ |really\ )?(sorry|unable|not\ able|afraid)
      | (sorry|unfortunately),?\ (but\ )?(i|we|there\ is\ no\ image)\b
      | i\ (can'?t|can\ ?not|could\ ?n[o']t|do\ not|don'?t|won'?t|am\ not)\b
      | i\ (apologi[sz]e|must\ decline)
      | as\ an?\ (ai|artificial|large\ language|language\ model)
      | (please\ )?(upload|provide|share)\ (an?|the|your)\ image
    )""",
    re.IGNORECASE | re.VERBOSE,
)
PREAMBLE = re.compile(
    r"""\W*(
        (sure|certainly|of\ course|absolutely|okay|ok|got\ it)\s*[!,.:]
      | (here(\ is|\ are|'?s)|this\ is|below\ is)\b[^.:\n]{0,80}\b(captions?|descriptions?)\b[^.:\n]{0,40}:
      | (the\ |a\ |possible\ |image\ |short\ )*(caption|description)s?\b[^.\n]{0,40}:
      | (the|a)\ (possible\ |good\ |suitable\ )?(caption|description)\ (for|of|could|would|might|is)\b
      | <think>
      | (assistant|user|system)\s*[:\n]
    )""",
    re.IGNORECASE | re.VERBOSE,
)
WORD_TIMES, PHRASE_TIMES = 4, 3  # so many times in a row are too many; "very very very" is English
LONGEST_PHRASE = 12  # words


def repeats_itself(text: str) -> bool:
    """Whether the same words stand there over and over, or a sentence of five words or more twice."""
    words = re.findall(r"\w+(?:'\w+)?|[^\w\s]", text.lower())
    for n in range(1, LONGEST_PHRASE + 1):
        times = WORD_TIMES if n == 1 else PHRASE_TIMES
        run = 0  # words in a row that are those n places before them
        for word, earlier in zip(words[n:], words):
            run = run + 1 if word == earlier else 0
            if run >= n * (times - 1):
                return True
    sentences = [sentence.split() for sentence in re.split(r"[.!?\n]+", text.lower())]
    long = [tuple(sentence) for sentence in sentences if len(sentence) >= 5]
    return len(set(long)) < len(long)


CHECKS = {  # name: what is reported, and whether a text is that; "cut" is known to the captioner alone
    "empty": ("empty", lambda text: not re.search(r"\w", text)),
    "cut": ("cut by --max_new_tokens", lambda text: False),
    "repetition": ("repeats itself", repeats_itself),
    "refusal": ("a refusal", REFUSAL.match),
    "preamble": ("begins with a preamble", PREAMBLE.match),
}


def find_fault(text: str, is_complete: bool, checks: Collection[str] = tuple(CHECKS)) -> str:
    """What is wrong with a caption, "" if nothing is.

    Args:
        is_complete: the model ended it; it was not cut by the limit of tokens.
        checks: names of CHECKS that count.
    """
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    for name in (name for name in CHECKS if name in checks):
        what, is_fault = CHECKS[name]
        if is_fault(text) or (name == "cut" and not is_complete):
            return what
    return ""


def check_names(checks: Collection[str]) -> tuple[str, ...]:
    """The setting --checks; "none" stands for no rules. Raises UserError for a name that is no rule's."""
    for name in checks:
        if name not in CHECKS and [*checks] != ["none"]:
            raise UserError(f"--checks {name}: give some of {', '.join(CHECKS)}, or none")
    return tuple(name for name in checks if name in CHECKS)
