"""Scores that count n-grams and common words: BLEU, ROUGE-L, CIDEr-D, equal to the official evaluation's."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

LONGEST_NGRAM = 4  # words, in BLEU and CIDEr
CIDER_SIGMA = 6.0  # words, of the Gaussian penalty for another length
ROUGE_BETA = 1.2  # weight of recall against precision
KEPT_REFERENCES = 2**11  # whose CIDEr weights are remembered, for the other hypotheses of a batch

# ------------------------------------------------------------------------------------------------------- BLEU


def bleu4(references: Sequence[Sequence[Sequence[str]]], hypotheses: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in [0, 1] (Papineni et al., 2002), unsmoothed, with NLTK.

    It is `Bleu_4` of `score_captions` to 1e-9, but for two habits of NLTK: a hypothesis of less than four
    words counts as if it had one sequence of four, and without any match of four words in a row the score is
    0 to 70 digits, where the official evaluation's small constants leave up to some 1e-4.

    Args:
        references: for each image its reference captions, each a list of words.
        hypotheses: for each image one caption as a list of words.
    """
    from nltk.translate.bleu_score import corpus_bleu  # imported here, as it takes a second

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="nltk")  # "0 counts of 4-gram overlaps": the score says so
        return float(corpus_bleu(references, hypotheses))


def _ngrams(words: Sequence[str]) -> list[Iterator[tuple[str, ...]]]:
    """The runs of n words, for n = 1 to 4."""
    starts = [words[start:] for start in range(LONGEST_NGRAM)]
    return [zip(*starts[:n]) for n in range(1, LONGEST_NGRAM + 1)]


def bleu_counts(references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> list[int]:
    """Length of hypothesis, of closest reference; for n = 1 to 4 the n-grams, then the matched n-grams."""
    length = len(hypothesis)
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    matched = []
    for own, *others in zip(_ngrams(hypothesis), *map(_ngrams, references)):
        in_references = [Counter(ngrams) for ngrams in others]
        clipped = [
            min(count, max([counts.get(ngram, 0) for counts in in_references]))
            for ngram, count in Counter(own).items()
        ]
        matched.append(sum(clipped))
    return [length, closest, *(max(0, length - n) for n in range(LONGEST_NGRAM)), *matched]


def named_bleu(counts: Sequence[int]) -> dict[str, float]:
    """Bleu_1 to Bleu_4: geometric means of precisions, times exp(1 - r / c) where c, the length, is below r.

    (Papineni et al., 2002, section 2.3.) The small constants are the official evaluation's.
    """
    length, closest, *of_ngrams = counts
    ratio = (length + 1e-15) / (closest + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, {}
    for n in range(1, LONGEST_NGRAM + 1):
        ngrams, matched = of_ngrams[n - 1], of_ngrams[n - 1 + LONGEST_NGRAM]
        product *= (matched + 1e-15) / (ngrams + 1e-9)
        scores[f"Bleu_{n}"] = penalty * product ** (1 / n)
    return scores


# ---------------------------------------------------------------------------------------------------- ROUGE-L


def rouge_l(references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> float:
    """ROUGE-L of a caption in [0, 1] (Lin, 2004, section 3), with beta = 1.2; all are lists of words.

    F = (1 + beta^2) P R / (R + beta^2 P), where P and R are the longest common subsequence's share of
    hypothesis and reference, each the highest of any reference (as the official evaluation has it).
    """
    hypothesis = hypothesis or [""]  # as the original: a text without words has one, the empty one
    places: dict[str, int] = {}
    for i, word in enumerate(hypothesis):
        places[word] = places.get(word, 0) | 1 << i
    precision = recall = 0.0
    for reference in references:
        reference = reference or [""]
        common = _longest_common_subsequence(places, len(hypothesis), reference)
        precision = max(precision, common / len(hypothesis))
        recall = max(recall, common / len(reference))
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common_subsequence(places: Mapping[str, int], length: int, words: Sequence[str]) -> int:
    # Bit-parallel (Hyyrö, 2004): a zero at bit i says that the common subsequence grows at word i.
    all_ones = row = (1 << length) - 1
    for word in words:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & all_ones
    return length - row.bit_count()


# -------------------------------------------------------------------------------------------------- CIDEr-D


class CiderD:
    """CIDEr-D (Vedantam et al., 2015, section 5) with fixed document frequencies: quick enough for a reward.

    The official evaluation's CIDEr: 10 times the mean, over references and n = 1 to 4, of the cosine
    similarity of tf-idf vectors, with the hypothesis's weights clipped to the reference's, times
    exp(-(difference of lengths)^2 / (2 sigma^2)).

        cider = CiderD.from_references(training_references)
        rewards = cider.score(references_of_batch, sampled_captions)

    Args:
        document_frequencies: for each n-gram, in how many images a reference has it.
        n_documents: number of images.

    Raises ValueError where there is no document, or an n-gram is in more documents than there are.
    """

    def __init__(self, document_frequencies: Mapping[tuple[str, ...], int], n_documents: int) -> None:
        if n_documents < max(1, max(document_frequencies.values(), default=0)):
            raise ValueError(f"document frequencies do not fit {n_documents} documents")
        self._n_documents = n_documents
        self._highest_idf = math.log(n_documents)  # of n-grams in no reference, too
        idf_of = [math.log(n_documents / max(1, count)) for count in range(n_documents + 1)]
        self._idf = {ngram: idf_of[count] for ngram, count in document_frequencies.items()}
        self._remembered = lru_cache(KEPT_REFERENCES)(self._vectors)

    @classmethod
    def from_references(cls, references: Iterable[Sequence[Sequence[str]]]) -> "CiderD":
        """With the frequencies in these: for each image its reference captions, each a list of words."""
        frequencies: Counter[tuple[str, ...]] = Counter()
        n_documents = 0
        for captions in references:
            frequencies.update({ngram for words in captions for ngrams in _ngrams(words) for ngram in ngrams})
            n_documents += 1
        return cls(frequencies, n_documents)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "CiderD":
        """From what `to_dict` gave."""
        frequencies = {tuple(text.split(" ")): count for text, count in saved["document_frequencies"].items()}
        return cls(frequencies, saved["n_documents"])

    def to_dict(self) -> dict[str, Any]:
        """The document frequencies in a form that JSON can hold."""
        frequencies = {" ".join(ngram): self._n_documents / math.exp(idf) for ngram, idf in self._idf.items()}
        return {
            "n_documents": self._n_documents,
            "document_frequencies": {ngram: round(count) for ngram, count in frequencies.items()},
        }

    def score(
        self, references: Iterable[Sequence[Sequence[str]]], hypotheses: Iterable[Sequence[str]]
    ) -> list[float]:
        """CIDEr-D in [0, 10] of each hypothesis against the references of its image, all lists of words.

        Raises ValueError where the two are not equally long, or an image has no reference.
        """
        return [self._score(captions, words) for captions, words in zip(references, hypotheses, strict=True)]

    def _score(self, references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> float:
        if not references:
            raise ValueError("a caption cannot be scored without a reference")
        n_bigrams, vectors, norms = self._vectors(tuple(hypothesis))
        total = 0.0
        for reference in references:
            other_n_bigrams, other_vectors, other_norms = self._remembered(tuple(reference))
            similarity = 0.0  # summed over n
            for own, other, norm, other_norm in zip(vectors, other_vectors, norms, other_norms):
                product = 0.0
                for ngram, weight in own.items():
                    if ngram in other:
                        other_weight = other[ngram]
                        product += (weight if weight < other_weight else other_weight) * other_weight
                if product:
                    similarity += product / (norm * other_norm)
            total += similarity * math.exp(-((n_bigrams - other_n_bigrams) ** 2) / (2 * CIDER_SIGMA**2))
        return 10 * total / LONGEST_NGRAM / len(references)

    def _vectors(self, words: tuple[str, ...]) -> tuple[int, list[dict[tuple[str, ...], float]], list[float]]:
        """Length in bigrams, as the original has it; for each n the n-grams' tf-idf weights; their norms."""
        idf, highest_idf = self._idf, self._highest_idf
        vectors, norms = [], []
        for ngrams in _ngrams(words):
            weights: dict[tuple[str, ...], float] = {}
            for ngram in ngrams:
                weights[ngram] = weights.get(ngram, 0.0) + idf.get(ngram, highest_idf)
            vectors.append(weights)
            norms.append(math.sqrt(sum([weight * weight for weight in weights.values()])))
        return max(0, len(words) - 1), vectors, norms
