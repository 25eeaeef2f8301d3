"""BLEU, ROUGE-L and CIDEr-D of tokenized captions, equal to the official evaluation's."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

LONGEST_NGRAM = 4  # words, in BLEU and CIDEr
CIDER_SIGMA = 6.0  # words; standard deviation of the Gaussian that penalizes a difference in length
ROUGE_BETA = 1.2  # weight of recall against precision
KEPT_REFERENCES = 2**11  # whose tf-idf vectors are cached: a batch scores several hypotheses against each

# ------------------------------------------------------------------------------------------------------- BLEU


def bleu4(references: Sequence[Sequence[Sequence[str]]], hypotheses: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in [0, 1] (Papineni et al., 2002), unsmoothed, with NLTK.

    It equals `Bleu_4` of `score_captions` to 1e-9, with two exceptions. NLTK counts one 4-gram in a
    hypothesis of fewer than four words. And where no 4-gram matches, this is 0, while the small constants of
    the official evaluation leave a score of up to about 1e-4.

    Args:
        references: for each image its reference captions, each a list of words.
        hypotheses: for each image one caption as a list of words.
    """
    from nltk.translate.bleu_score import corpus_bleu  # imported here, as it takes a second

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="nltk")  # "0 counts of 4-gram overlaps": the score says so
        score = float(corpus_bleu(references, hypotheses))
    return score if score > 1e-70 else 0.0  # for 0, NLTK takes the smallest float


def _ngrams(words: Sequence[str]) -> list[Iterator[tuple[str, ...]]]:
    """The n-grams of a caption, for n = 1 to 4."""
    starts = [words[start:] for start in range(LONGEST_NGRAM)]
    return [zip(*starts[:n]) for n in range(1, LONGEST_NGRAM + 1)]


def bleu_counts(references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> list[int]:
    """The ten counts that BLEU is computed from; those of a corpus are the sums over its images.

    Length of the hypothesis; length of the reference closest to it in length; number of n-grams in the
    hypothesis for n = 1 to 4; number of them that match a reference, for n = 1 to 4.
    """
    length = len(hypothesis)
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    matched = []
    for ngrams, *of_references in zip(_ngrams(hypothesis), *map(_ngrams, references)):
        reference_counts = [Counter(others) for others in of_references]
        clipped = [
            min(count, max([counts.get(ngram, 0) for counts in reference_counts]))
            for ngram, count in Counter(ngrams).items()
        ]
        matched.append(sum(clipped))
    return [length, closest, *(max(0, length - n) for n in range(LONGEST_NGRAM)), *matched]


def named_bleu(counts: Sequence[int]) -> dict[str, float]:
    """Bleu_1 to Bleu_4 of `bleu_counts`: geometric mean of the n-gram precisions, times the brevity penalty.

    The penalty is exp(1 - r / c) where the hypothesis length c is below the reference length r (Papineni et
    al., 2002, section 2.3). The small constants are the official evaluation's.
    """
    length, closest, *ngram_counts = counts
    ratio = (length + 1e-15) / (closest + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, {}
    for n in range(1, LONGEST_NGRAM + 1):
        ngrams, matched = ngram_counts[n - 1], ngram_counts[n - 1 + LONGEST_NGRAM]
        product *= (matched + 1e-15) / (ngrams + 1e-9)
        scores[f"Bleu_{n}"] = penalty * product ** (1 / n)
    return scores


# ---------------------------------------------------------------------------------------------------- ROUGE-L


def rouge_l(references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> float:
    """ROUGE-L of a caption in [0, 1] (Lin, 2004, section 3); each caption is a list of words.

    F = (1 + beta^2) P R / (R + beta^2 P) with beta = 1.2. P is the length of the longest common subsequence
    divided by that of the hypothesis, R by that of the reference; each is the maximum over the references,
    as in the official evaluation.
    """
    hypothesis = hypothesis or [""]  # as in the original, a text without words has one word, the empty one
    positions: dict[str, int] = {}  # word -> bits of the positions where it stands in the hypothesis
    for i, word in enumerate(hypothesis):
        positions[word] = positions.get(word, 0) | 1 << i
    precision = recall = 0.0
    for reference in references:
        reference = reference or [""]
        common = _longest_common_subsequence(positions, len(hypothesis), reference)
        precision = max(precision, common / len(hypothesis))
        recall = max(recall, common / len(reference))
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common_subsequence(positions: Mapping[str, int], length: int, words: Sequence[str]) -> int:
    # Bit-parallel (Hyyrö, 2004): bit i is zero where the common subsequence grows at word i.
    all_ones = row = (1 << length) - 1
    for word in words:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & all_ones
    return length - row.bit_count()


# -------------------------------------------------------------------------------------------------- CIDEr-D


class CiderD:
    """CIDEr-D (Vedantam et al., 2015, section 5) with fixed document frequencies: fast enough for a reward.

    It is what the official evaluation calls CIDEr: 10 times the mean, over references and n = 1 to 4, of the
    cosine similarity of tf-idf vectors, with the hypothesis's weights clipped to the reference's, times
    exp(-(difference in length)^2 / (2 sigma^2)).

        cider = CiderD.from_references(training_references)
        rewards = cider.score(references_of_batch, sampled_captions)

    Args:
        document_frequencies: for each n-gram the number of images with a reference that contains it.
        n_documents: number of images.

    Raises:
        ValueError: there are no documents, or an n-gram is in more documents than there are.
    """

    def __init__(self, document_frequencies: Mapping[tuple[str, ...], int], n_documents: int) -> None:
        if n_documents < max(1, max(document_frequencies.values(), default=0)):
            raise ValueError(f"document frequencies do not fit {n_documents} documents")
        self._n_documents = n_documents
        self._highest_idf = math.log(n_documents)  # that of n-grams in one reference or in none
        idf_of = [math.log(n_documents / max(1, count)) for count in range(n_documents + 1)]
        self._idf = {ngram: idf_of[count] for ngram, count in document_frequencies.items()}
        self._cached_vectors = lru_cache(KEPT_REFERENCES)(self._vectors)

    @classmethod
    def from_references(cls, references: Iterable[Sequence[Sequence[str]]]) -> "CiderD":
        """With the document frequencies of these: for each image its references, each a list of words."""
        frequencies: Counter[tuple[str, ...]] = Counter()
        n_documents = 0
        for captions in references:
            frequencies.update({ngram for words in captions for ngrams in _ngrams(words) for ngram in ngrams})
            n_documents += 1
        return cls(frequencies, n_documents)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "CiderD":
        """The inverse of `to_dict`."""
        frequencies = {tuple(text.split(" ")): count for text, count in saved["document_frequencies"].items()}
        return cls(frequencies, saved["n_documents"])

    def to_dict(self) -> dict[str, Any]:
        """The document frequencies as a dictionary that can be written as JSON."""
        frequencies = {" ".join(ngram): self._n_documents / math.exp(idf) for ngram, idf in self._idf.items()}
        return {
            "n_documents": self._n_documents,
            "document_frequencies": {ngram: round(count) for ngram, count in frequencies.items()},
        }

    def score(
        self, references: Iterable[Sequence[Sequence[str]]], hypotheses: Iterable[Sequence[str]]
    ) -> list[float]:
        """CIDEr-D in [0, 10] of each hypothesis against the references of its image, all lists of words.

        Raises:
            ValueError: the two are not equally long, or an image has no reference.
        """
        return [self._score(captions, words) for captions, words in zip(references, hypotheses, strict=True)]

    def _score(self, references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> float:
        if not references:
            raise ValueError("a caption cannot be scored without a reference")
        n_bigrams, vectors, norms = self._vectors(tuple(hypothesis))
        total = 0.0
        for reference in references:
            other_n_bigrams, other_vectors, other_norms = self._cached_vectors(tuple(reference))
            similarity = 0.0  # summed over n
            for vector, other, norm, other_norm in zip(vectors, other_vectors, norms, other_norms):
                product = 0.0
                for ngram, weight in vector.items():
                    if ngram in other:
                        other_weight = other[ngram]
                        product += (weight if weight < other_weight else other_weight) * other_weight
                if product:
                    similarity += product / (norm * other_norm)
            total += similarity * math.exp(-((n_bigrams - other_n_bigrams) ** 2) / (2 * CIDER_SIGMA**2))
        return 10 * total / LONGEST_NGRAM / len(references)

    def _vectors(self, words: tuple[str, ...]) -> tuple[int, list[dict[tuple[str, ...], float]], list[float]]:
        """Number of bigrams, the original's measure of length; tf-idf vectors for n = 1 to 4; their norms."""
        idf, highest_idf = self._idf, self._highest_idf
        vectors, norms = [], []
        for ngrams in _ngrams(words):
            weights: dict[tuple[str, ...], float] = {}
            for ngram in ngrams:
                weights[ngram] = weights.get(ngram, 0.0) + idf.get(ngram, highest_idf)
            vectors.append(weights)
            norms.append(math.sqrt(sum([weight * weight for weight in weights.values()])))
        return max(0, len(words) - 1), vectors, norms
