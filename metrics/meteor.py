"""METEOR 1.5 for English captions without Java: the scores of `pycocoevalcap`'s Meteor, to the last digit.

    meteor = Meteor()
    meteor.score(["a dog runs in the snow", "a dog in snow"], "a dog plays in the snow")
    corpus_score, scores = meteor.compute_score(references, hypotheses)  # dictionaries with the same keys

METEOR aligns the words of a hypothesis with those of a reference in four stages (same word, same stem, shared
WordNet synset, listed paraphrase), chooses the alignment that covers most words in the fewest chunks, and
scores it by a weighted harmonic mean of precision and recall, with a penalty for fragmentation into chunks.

Papers: Banerjee and Lavie 2005, "METEOR: An Automatic Metric for MT Evaluation with Improved Correlation with
Human Judgments"; Denkowski and Lavie 2014, "Meteor Universal: Language Specific Translation Evaluation for
Any Target Language". Published numbers come from the latter's Java program, run as `-stdio -l en -norm`. Some
of its behaviour is described in neither paper, but changes scores; it is reproduced, and marked "as in the
original" where it looks like a mistake.

Stems, synonyms and paraphrases come from `meteor_data.py`, which reads them from an installed
`pycocoevalcap`. The first Meteor takes a few seconds to prepare them in the user's cache directory.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from .meteor_data import Lexicon, MeteorDataError, ParaphraseTable, find_data, stem, user_cache

__all__ = ["Meteor", "MeteorDataError"]

# For English (2014): balance of the F-mean, exponent and weight of fragmentation, weight of content words
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75
EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
STAGE_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # of a matched word in the score; the alignment search has its own
BEAM = 40  # partial alignments kept at each reference word
LONGEST_PHRASE = 7  # words, on either side of the paraphrase table

# Sizes of a Meteor's caches: references that are scored repeatedly are analysed once. A caption takes about
# 8 kB; 2^15 captions are the hypotheses and references of COCO's usual 5,000 validation images.
KEPT_TEXTS, KEPT_WORDS = 2**15, 2**16
TEXTS_PER_WORKER = 2**13  # at least: a worker takes some 0.3 s to start, and starts with empty caches

WORKER = "import sys; sys.path.insert(0, sys.argv[1]); from metrics.meteor import work; work()"


# ---------------------------------------------------------------------------------------------- normalization

_LETTER = "A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\u017e\u0178\u0400-\u0527\ua640-\ua66e\ua67e-\ua697\u1d00-\u1d7f"
_ELLIPSIS_DOT = "\ud800"  # a dot hidden from the rules: half a surrogate pair, which no valid text contains
_JAVA_TRIM = "".join(map(chr, range(0x21)))
_LINE_ENDS = str.maketrans("\r\n", "  ")

# Each rule is applied once, from left to right, without overlaps: `a-b-c` loses only its first hyphen.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (rf"([^{_LETTER}0-9 \t\n\v\f\r.'`,\-\u2018\u2019])", r" \1 "),
        (r"\.\.+", lambda match: f" {_ELLIPSIS_DOT * len(match[0])} "),
        (r"([^0-9]),([^0-9])", r"\1 , \2"),
        (r"([0-9]),([^0-9])", r"\1 , \2"),
        (r"([^0-9]),([0-9])", r"\1 , \2"),
        (r"[`\u2018\u2019]", "'"),
        (r"[\u201c\u201d]|''", ' " '),
        (r"\u2013", "-"),
        (r"--", "-"),
        (rf"([{_LETTER}0-9.])-([{_LETTER}0-9])", r"\1 \2"),
        (rf"([^{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([^{_LETTER}0-9])'([{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([{_LETTER}])", r"\1 '\2"),
        (r"([0-9])'(s)", r"\1 '\2"),
    ]
]


def normalize(text: str, abbreviations: Mapping[str, str]) -> list[str]:
    """Split a line into lower-case words as the program's `-norm` does; punctuation stays.

    Tokenized captions change too: `the boy 's t-shirt` becomes `the boy ' s t shirt`.
    `abbreviations` keep their dot: those with the value "always" anywhere, the others only before a number.
    """
    if re.fullmatch("[A-Za-z0-9 ]*", text):  # most captions: no rule applies
        return text.lower().split()
    text = f" {text} "
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    words = _split(text)
    kept = []
    for word, following in zip(words, [*words[1:], ""]):
        body = word[:-1]
        if not body or word[-1] != ".":
            kept.append(word)
        elif "." in body and re.search(f"[{_LETTER}]", body):
            kept.append(word.replace(".", ""))
        else:
            before_number = body in abbreviations and re.match("[0-9]", following)
            keeps_dot = abbreviations.get(body) == "always" or re.match("[a-z]", following) or before_number
            kept += [word] if keeps_dot else [body, "."]
    text = " ".join(kept).replace(_ELLIPSIS_DOT, ".")
    text = re.sub("[ \xa0\u2000-\u200a\u202f\u205f\u3000]+", " ", text).strip(_JAVA_TRIM)
    return _split(text.lower())


def _split(text: str) -> list[str]:
    # str.split() would also split at Unicode's other spaces.
    return [word for word in re.split("[ \t\n\f\r]+", text) if word]


# -------------------------------------------------------------------------------------------------- alignment


def java_hash(word: str) -> int:
    """Java's 32-bit hash of a string, by which the original compares words: it takes `as` for `c5`."""
    units = word.encode("utf-16-be", "surrogatepass")
    value = 0
    for high, low in zip(units[::2], units[1::2]):
        value = (31 * value + 256 * high + low) & 0xFFFFFFFF
    return value


class Word(NamedTuple):
    """What the stages and the score need to know of a word."""

    hash: int
    stem_hash: int
    synsets: frozenset[str]
    is_function: bool


class Text(NamedTuple):
    """A normalized hypothesis or reference."""

    tokens: list[str]
    words: list[Word]
    phrases: frozenset[str]  # all sequences of 1 to 7 consecutive tokens
    paraphrases: list[tuple[int, int, dict[str, None]]]  # start, length, targets of the phrases in the table


class Match(NamedTuple):
    """Reference words start, ..., start + length - 1 match hypothesis words hyp_start, ... likewise."""

    start: int
    length: int
    hyp_start: int
    hyp_length: int
    stage: int


def find_matches(reference: Text, hypothesis: Text) -> list[list[Match]]:
    """The matches of all stages, listed by their first reference word, in the order that decides ties.

    As in the original, a pair found twice (by stem and by synonym, or in both directions) is listed twice.
    """
    by_hash: dict[int, list[int]] = {}
    by_stem: dict[int, list[int]] = {}
    with_synsets = []
    for i, word in enumerate(hypothesis.words):
        by_hash.setdefault(word.hash, []).append(i)
        by_stem.setdefault(word.stem_hash, []).append(i)
        if word.synsets:
            with_synsets.append((i, word.hash, word.synsets))
    matches = []
    for j, word in enumerate(reference.words):
        matches.append([Match(j, 1, i, 1, EXACT) for i in by_hash.get(word.hash, ())])
    if [word.hash for word in reference.words] == [word.hash for word in hypothesis.words]:
        return matches
    for j, (word_hash, stem_hash, synsets, _) in enumerate(reference.words):
        for i in by_stem.get(stem_hash, ()):
            if hypothesis.words[i].hash != word_hash:
                matches[j].append(Match(j, 1, i, 1, STEM))
        if synsets:
            for i, other_hash, other_synsets in with_synsets:
                if not synsets.isdisjoint(other_synsets) and other_hash != word_hash:
                    matches[j].append(Match(j, 1, i, 1, SYNONYM))
    for j, length, i, hyp_length in _paraphrases(reference, hypothesis):
        matches[j].append(Match(j, length, i, hyp_length, PARAPHRASE))
    for i, hyp_length, j, length in _paraphrases(hypothesis, reference):
        matches[j].append(Match(j, length, i, hyp_length, PARAPHRASE))
    return matches


def _paraphrases(source: Text, target: Text) -> Iterator[tuple[int, int, int, int]]:
    """Pairs of phrases that the table lists: (start, length) in the source, (start, length) in the target."""
    for start, length, phrases in source.paraphrases:
        if phrases.keys().isdisjoint(target.phrases):
            continue
        for phrase in phrases:
            if phrase in target.phrases:
                tokens = phrase.split(" ")
                for i in range(len(target.tokens) - len(tokens) + 1):
                    if target.tokens[i : i + len(tokens)] == tokens:
                        yield start, length, i, len(tokens)


COVERED, CHUNK = 1 << 80, 1 << 60  # units of an alignment's cost: words covered, then chunks, then distance


def choose_alignment(matches: list[list[Match]]) -> list[Match]:
    """Matches without common words that cover most words in the fewest chunks.

    They are found by a beam search along the reference (2005, section 2.1; 2014, section 2). As in the
    original, the distance between the two sides of a match is added to the cost of the other extensions of a
    partial alignment, not to the one with that match.
    """
    options, in_several = _weigh(matches)
    # A match whose words are in no other match is part of every alignment.
    fixed = [at_word[0] for at_word in options if len(at_word) == 1 and not at_word[0][0] & in_several]
    if len(fixed) == sum(map(len, options)):
        return [option[-1] for option in fixed]
    fixed_words = sum(option[0] for option in fixed)

    # A partial alignment: its cost, the end of its current chunk in the hypothesis (-1 for none), the next
    # reference word, the words used, and its matches as a linked list.
    paths = [(0, -1, 0, fixed_words, None)]
    cost_of = itemgetter(0)
    for current, at_word in enumerate(options):
        paths.sort(key=cost_of)  # stable: of equal ones the first found
        extended = []
        for path in paths[:BEAM]:
            cost, end, following, used, chosen = path
            if used >> current & 1:
                if current == following:
                    _, gain, hyp_start, hyp_end, distance, match = at_word[0]
                    cost += distance - gain + (CHUNK if end not in (-1, hyp_start) else 0)
                    path = (cost, hyp_end, current + match.length, used, (match, chosen))
                extended.append(path)
                continue
            for words, gain, hyp_start, hyp_end, distance, match in at_word:
                if not used & words:
                    new_cost = cost - gain + (CHUNK if end != -1 and end != hyp_start else 0)
                    longer = (match, chosen)
                    extended.append((new_cost, hyp_end, current + match.length, used | words, longer))
                    cost += distance
            extended.append((cost if end == -1 else cost + CHUNK, -1, current + 1, used, chosen))
        paths = extended
    paths.sort(key=cost_of)
    chosen = min(paths[:BEAM], key=lambda path: path[0] if path[1] == -1 else path[0] + CHUNK)[-1]
    alignment = []
    while chosen:
        match, chosen = chosen
        alignment.append(match)
    return alignment[::-1]


def _weigh(matches: list[list[Match]]) -> tuple[list[list[tuple]], int]:
    """Each match with its words, gain, start and end in the hypothesis, and distance; the words in several.

    Sets of words are integers, with a bit per reference word and above those a bit per hypothesis word.
    """
    options, in_any, in_several = [], 0, 0
    for at_word in matches:
        options.append([])
        for match in at_word:
            start, length, hyp_start, hyp_length, stage = match
            words = ((1 << length) - 1) << start | ((1 << hyp_length) - 1) << hyp_start + len(matches)
            in_several |= in_any & words
            in_any |= words
            # As in the original, halves are rounded down: one word matched by stem or synonym weighs nothing.
            weight = length + hyp_length if stage == EXACT else length // 2 + hyp_length // 2
            distance = abs(start - hyp_start)
            option = (words, weight * COVERED, hyp_start, hyp_start + hyp_length, distance, match)
            options[-1].append(option)
    return options, in_several


# ------------------------------------------------------------------------------------------------------ score


def count(reference: Text, hypothesis: Text) -> list[int]:
    """The statistics of the best alignment: 23 counts, in the order of the Java program.

    They are the words of hypothesis and reference (2), their function words (2), for each of the four stages
    their matched content words and their matched function words (16), chunks (1), and matched words (2).
    """
    counts = [len(hypothesis.words), len(reference.words)] + [0] * 21
    counts[2] = sum(word.is_function for word in hypothesis.words)
    counts[3] = sum(word.is_function for word in reference.words)
    chunk_end = None
    for start, length, hyp_start, hyp_length, stage in choose_alignment(find_matches(reference, hypothesis)):
        for word in hypothesis.words[hyp_start : hyp_start + hyp_length]:
            counts[4 + 4 * stage + 2 * word.is_function] += 1
        for word in reference.words[start : start + length]:
            counts[5 + 4 * stage + 2 * word.is_function] += 1
        counts[20] += chunk_end != (start, hyp_start)
        counts[21] += hyp_length
        counts[22] += length
        chunk_end = (start + length, hyp_start + hyp_length)
    return counts


def score_counts(counts: Sequence[int]) -> float:
    """METEOR in [0, 1] from the counts of an alignment, or from the sums over many (2014, section 2).

    F-mean = 1 / ((1 - alpha) / P + alpha / R), times 1 - gamma (chunks / matched words)^beta. In precision P
    and recall R content words weigh delta, function words 1 - delta, and matches also their stage's weight.
    """
    chunks, matched_hypothesis, matched_reference = counts[20:]
    if not (matched_hypothesis and matched_reference):
        return 0.0
    precision, recall = (_matched_share(counts, side) for side in (0, 1))
    f_mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
    fragmentation = 0.0 if _is_complete(counts) else chunks / ((matched_hypothesis + matched_reference) / 2)
    return max(0.0, f_mean * (1 - GAMMA * fragmentation**BETA))


def _matched_share(counts: Sequence[int], side: int) -> float:
    content = sum(n * weight * DELTA for n, weight in zip(counts[4 + side : 20 : 4], STAGE_WEIGHTS))
    function = sum(n * weight * (1 - DELTA) for n, weight in zip(counts[6 + side : 20 : 4], STAGE_WEIGHTS))
    n_words, n_function = counts[side], counts[2 + side]
    return (content + function) / (DELTA * (n_words - n_function) + (1 - DELTA) * n_function)


def score_corpus(all_counts: Sequence[Sequence[int]]) -> float:
    """METEOR of a corpus in [0, 1], computed from the sums of its images' counts; not a mean of scores."""
    # As in the original, a caption matched completely in one chunk adds no chunk.
    rows = [[*counts[:20], 0, *counts[21:]] if _is_complete(counts) else counts for counts in all_counts]
    return score_counts([sum(column) for column in zip(*rows)]) if rows else 0.0


def _is_complete(counts: Sequence[int]) -> bool:
    """Whether all words of both sides are matched, at any stages, in one chunk."""
    return counts[20] == 1 and counts[21] == counts[0] and counts[22] == counts[1]


class Meteor:
    """METEOR 1.5 of English captions that are PTB-tokenized, as `pycocoevalcap` hands them to its Meteor.

    Args:
        data_dir: where `meteor-1.5.jar` and `data/paraphrase-en.gz` are; by default in `pycocoevalcap`.
        cache_dir: where the paraphrase table is kept; by default `meteor-1.5` in the user's cache directory.
        workers: processes among which a corpus is divided; scores do not depend on it. By default one, or up
            to one per processor for a corpus with more texts than a Meteor caches.

    Raises:
        MeteorDataError: the data are not installed or damaged.

    Any string has a score, the one that the Java program gives, with one exception: a line end, which breaks
    that program's protocol, is read as a space. As in `pycocoevalcap`, `|||` is removed from a hypothesis and
    divides a reference into two. A hypothesis without words (empty, spaces, `|||`) scores 0, and the words of
    its reference still count in the corpus score.

    Texts, words and phrases are cached: a Meteor scores further hypotheses of references that it has seen
    faster than a new one would.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike | None = None,
        cache_dir: str | os.PathLike | None = None,
        workers: int | None = None,
    ) -> None:
        self._data_dir = Path(data_dir or find_data())
        self._cache_dir = Path(cache_dir or user_cache() / "meteor-1.5")
        self._workers = workers
        self._lexicon = Lexicon(self._data_dir / "meteor-1.5.jar")
        self._table = ParaphraseTable.open(self._data_dir / "data" / "paraphrase-en.gz", self._cache_dir)
        self._text = lru_cache(KEPT_TEXTS)(self._read_text)
        self._word = lru_cache(KEPT_WORDS)(self._read_word)

    def score(self, references: Sequence[str], hypothesis: str) -> float:
        """METEOR of a caption, in [0, 1]: the highest over its references.

        Raises:
            ValueError: there are no references.
        """
        return score_counts(self.statistics(references, hypothesis))

    def compute_score(
        self, references: Mapping[Hashable, Sequence[str]], hypotheses: Mapping[Hashable, str]
    ) -> tuple[float, list[float]]:
        """METEOR of a corpus, and of each of its images in the order of `references`, in [0, 1].

        Raises:
            ValueError: the keys of the two differ, or an image has no reference.
        """
        if references.keys() != hypotheses.keys():
            raise ValueError("references and hypotheses are not of the same images")
        all_counts = self._corpus_statistics([(list(references[key]), hypotheses[key]) for key in references])
        return score_corpus(all_counts), [score_counts(counts) for counts in all_counts]

    def statistics(self, references: Sequence[str], hypothesis: str) -> list[int]:
        """The 23 counts (see `count`) against the reference with the highest score, the first of equal ones.

        Raises:
            ValueError: there are no references.
        """
        # pycocoevalcap sends the texts as one line, separated by |||, and cleans the hypothesis like this.
        prepared = hypothesis.translate(_LINE_ENDS).replace("|||", "").replace("  ", " ").strip(_JAVA_TRIM)
        parts = (part for reference in references for part in reference.translate(_LINE_ENDS).split("|||"))
        candidates = [count(self._text(part.strip(_JAVA_TRIM)), self._text(prepared)) for part in parts]
        if not candidates:
            raise ValueError("a caption cannot be scored without a reference")
        return max(candidates, key=score_counts)

    def _read_text(self, line: str) -> Text:
        tokens = normalize(line, self._lexicon.abbreviations)
        phrases, paraphrases = [], []
        for start in range(len(tokens)):
            sequences = accumulate(tokens[start : start + LONGEST_PHRASE], "{} {}".format)
            for length, phrase in enumerate(sequences, 1):
                phrases.append(phrase)
                if targets := self._table.targets(phrase):
                    paraphrases.append((start, length, targets))
        return Text(tokens, [self._word(token) for token in tokens], frozenset(phrases), paraphrases)

    def _read_word(self, token: str) -> Word:
        is_function = token in self._lexicon.function_words
        return Word(java_hash(token), java_hash(stem(token)), self._lexicon.synsets(token), is_function)

    def _corpus_statistics(self, images: list[tuple[list[str], str]]) -> list[list[int]]:
        workers = self._workers
        if workers is None:
            n_texts = sum(1 + len(references) for references, _ in images)
            workers = min(os.cpu_count() or 1, n_texts // TEXTS_PER_WORKER) if n_texts > KEPT_TEXTS else 1
        workers = min(workers, len(images))
        if workers <= 1 or not self._table.is_shared:
            return self._all_statistics(images)
        bounds = [len(images) * i // workers for i in range(workers + 1)]
        own, *others = (images[start:end] for start, end in pairwise(bounds))
        with ThreadPoolExecutor(len(others)) as waiting:
            results = waiting.map(self._in_other_process, others)
            return self._all_statistics(own) + list(chain.from_iterable(results))

    def _all_statistics(self, images: list[tuple[list[str], str]]) -> list[list[int]]:
        return [self.statistics(*image) for image in images]

    def _in_other_process(self, images: list[tuple[list[str], str]]) -> list[list[int]]:
        # A new interpreter, not multiprocessing: spawned workers would run the caller's main script again,
        # with everything that it imports, and forking is not safe in a process with threads.
        task = json.dumps([str(self._data_dir), str(self._cache_dir), images]).encode()
        try:
            command = [sys.executable, "-c", WORKER, str(Path(__file__).resolve().parent.parent)]
            return json.loads(subprocess.run(command, input=task, stdout=subprocess.PIPE, check=True).stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            return self._all_statistics(images)


def work() -> None:
    """Work for a Meteor in another process: read images from stdin, write their statistics to stdout."""
    data_dir, cache_dir, images = json.load(sys.stdin.buffer)
    meteor = Meteor(data_dir, cache_dir)
    json.dump(meteor._all_statistics(images), sys.stdout)
