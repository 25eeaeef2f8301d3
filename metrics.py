"""Scores of captions, those of the official evaluation without Java: BLEU, METEOR, ROUGE-L, CIDEr-D.

    result = score_captions({"1.jpg": ["A dog runs.", "A dog in snow."]}, {"1.jpg": "A dog plays in snow."})
    result.overall["CIDEr"], result.per_picture["1.jpg"]["Bleu_4"]

    cider = CiderD.from_references(training_references)  # lists of words, as `tokenize` makes them
    rewards = cider.score(references_of_the_batch, hypotheses_of_the_batch)

Papers quote the numbers of `pycocoevalcap`; `score_captions` gives the same ones, from captions as people
wrote them. Nothing here knows about models or files.
"""

import html
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from meteor import Meteor, MeteorDataError

LONGEST_NGRAM = 4  # words, in BLEU and CIDEr
CIDER_SIGMA = 6.0  # words, of the Gaussian penalty for another length
ROUGE_BETA = 1.2  # weight of recall against precision
KEPT_CHUNKS = 2**16  # pieces of text between blanks whose tokens are remembered, about 0.3 kB each
KEPT_REFERENCES = 2**11  # whose CIDEr weights are remembered, for the other hypotheses of a batch

# -------------------------------------------------------------------------------------------------- tokenizer

_NUMBER_SIGNS = "\xb2\xb3\xb9\xbc-\xbe\u2070-\u209f\u2150-\u215f"  # Python counts these as word characters
_LETTER = rf"[^\W\d_{_NUMBER_SIGNS}]"
_WORD_CHARACTER = rf"(?:[^\W_{_NUMBER_SIGNS}]|[\u0300-\u036f])"
_APOSTROPHE = "['\u2019]"
_CLITIC = f"{_APOSTROPHE}(?:[msd]|re|ve|ll)"
_NOT = "n['`\u2018\u2019]t"
_ELIDED = f"(?:[dol]{_APOSTROPHE}(?={_LETTER}{{2}}))?"  # o'neil, d'art
_WORD = f"{_ELIDED}{_WORD_CHARACTER}+(?:[-_\u2010\u2011]{_ELIDED}{_WORD_CHARACTER}+)*"  # x-ray, a_b
_SLASH_PART = "[a-z0-9]+(?:-[a-z]+){0,2}"
_END = rf"(?![-.!?'\u2019]?{_WORD_CHARACTER})"  # of a whole word
_IN_URL, _IN_HOST = r'[^\s"<>|()]', r'[^\s"<>|.!?(){},]'
_PATH = rf"{_IN_URL}+[^\s\"<>|.!?(){{}},-]"

_KEEP_DOT = (
    "adj adm adv al ala apr ariz assoc asst aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col "
    "colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga "
    "gen gov hon inc ind insp intl invt jan jos jr jul jun kan ky lt ltd maj mar md messrs mfg mich minn "
    "mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc prof pte pty "
    "pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs "
    "tue tues univ va vs vt wed wis wm wyo"
).replace(" ", "|")
_KEEP_DOT_AS_NAME = "ark|az|del|ill|la|mass|miss|ore|pa|tex|wash"  # with a capital letter
_KEEP_DOT_BEFORE_NUMBER = "no|nos|art|figs?|ca|op|pp|prop"

# The original takes the longest match of some hundred rules. Here the first match counts, so these stand in
# the order that gives the same: what may be longer comes first.
_TOKENS = [
    r"</?[a-z!?][^>]*>",  # markup
    r"-[lr][rcs]b-|(?:pro|anti)-(?!\w)",
    rf"(?-i:[A-HJ-XZn]){_APOSTROPHE}(?!(?:re|ve|ll){_END}){_LETTER}{{2,}}|"  # D'Angelo
    rf"{_LETTER}+[aeiouy]{_APOSTROPHE}(?!(?:[msd]|re|ve|ll){_END})(?-i:[aeiouA-Z]){_LETTER}*",  # ski'ing
    _NOT,
    r"\d{1,4}-\d{1,4}/\d{1,4}",  # 1-1/2
    r"ph\.d\.",
    rf"https?://{_PATH}",
    rf"(?:www\.(?:{_IN_HOST}+\.)+[a-z]{{2,4}}|(?:{_WORD_CHARACTER}+\.)+(?:com|net|org|edu))(?!{_LETTER})"
    rf"(?:/{_PATH})?",
    rf"[a-z0-9]{_IN_URL}*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+",  # mail address
    rf"can(?=not{_END})|(?:gon|wan)(?=na{_END})|got(?=ta{_END})|(?:lem|gim)(?=me{_END})",
    rf"{_SLASH_PART}(?:/{_SLASH_PART}){{1,2}}(?!{_APOSTROPHE}n)",  # and/or, 1/2, 3/4-inch
    rf"{_WORD}\.(?=[,;:])",
    rf"[a-z0-9][a-z0-9.,]*(?:-(?:[a-z](?:\.[a-z])*\.|[a-z0-9]+))+(?!\w|(?<=-[dol]){_APOSTROPHE}\w)",
    "(?:c'mon|s'mores|o'clock|gov't|int'l|ass'n|ha'penny|cap'n|c'est)".replace("'", _APOSTROPHE) + _END,
    rf"(?:ol|dunkin|somethin){_APOSTROPHE}",
    rf"[a-z]*[a-mo-z](?={_NOT})",
    rf"{_WORD_CHARACTER}+(?={_CLITIC}(?!(?<=[dol]{_APOSTROPHE}[msd]){_WORD_CHARACTER}))",
    rf"y(?={_APOSTROPHE}know)|[jy]{_APOSTROPHE}(?={_LETTER})|[djl]{_APOSTROPHE}(?!{_LETTER}{{2}})",
    r"(?-i:[A-Z]+(?:[+&][A-Z]+)+)",  # AT&T
    r"c\+\+|[cf]#",
    rf"[a-z](?:\.[a-z])+\.(?!{_LETTER})",  # u.s.
    rf"{_LETTER}{_WORD_CHARACTER}*(?:[.!?]{_LETTER}{_WORD_CHARACTER}*)+",  # cat.dog
    rf"(?:[a-z]|{_KEEP_DOT})\.|(?-i:(?=[A-Z]))(?:{_KEEP_DOT_AS_NAME})\.",
    rf"(?:{_KEEP_DOT_BEFORE_NUMBER})\.(?=\s?[0-9])",
    r"[-+]?\d*(?:[.:,]\d+)+|[-+]\d+",  # 2.5, 1,000, 5:30
    r"(?-i:[A-Z]+)\$",  # US$
    _WORD,
    r"'(?:[msd]|re|ve|ll)(?![a-z])|\u2019(?:[msd]|re|ve|ll)",
    rf"{_APOSTROPHE}(?:em|cause|till?|[2-9]0s|n{_APOSTROPHE}|\d\d(?!\S))|'n(?!{_WORD_CHARACTER})|\u2019n",
    rf"'t(?=(?:is|was){_END})",
    rf"@[a-z_]+|\#{_LETTER}+",
    r"[<>]?[:;=][-o*']?(?:[()dp\\{@|\[\]]|(?-i:O))(?![a-z0-9])",  # :-)
    r"-{5,}|[!?]{2,}|\*+|_+|@+|\#+",
    r"[$%&+<=>\\^|~/(){}\[\]\xa1-\xa9\xac\xae-\xba\xbc-\xbf\xd7\xf7\u201a\u201e-\u2022\u2030-\u2038\u203b"
    r"\u2070-\u208e\u20a0\u20a4\u20ac\u2100-\u2bff]",
]
# What stands in no group, or matches nothing, is dropped: single marks, dashes, quotes, ellipses, emoji.
_LEXER = re.compile(rf"\.{{3,5}}|''|-{{2,4}}(?!-)|({'|'.join(_TOKENS)})", re.IGNORECASE)
_ENTITY = re.compile("&(?:amp|lt|gt|quot|apos|nbsp|[mn]dash);")

_REWRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "\xa2": "cents",
    "\xa3": "#", "\xa4": "$", "\u20a0": "$", "\u20ac": "$", "\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4",
    "\u2153": "1/3", "\u2154": "2/3", "n\u2018t": "n`t",
    **{clitic.replace("'", "\u2019"): clitic for clitic in ("n't", "'s", "'m", "'d", "'re", "'ve", "'ll")},
}  # fmt: skip


def tokenize(caption: str) -> list[str]:
    """The words of a caption: lower case, split as the Penn Treebank splits, punctuation dropped.

    >>> tokenize("The man's dog isn't here.")
    ['the', 'man', "'s", 'dog', 'is', "n't", 'here']

    These are the tokens of the official evaluation (Stanford's PTBTokenizer of CoreNLP 3.4.1, `-preserveLines
    -lowerCase`, less pycocoevalcap's list of punctuation), its oddities included: brackets stay, as `-lrb-`,
    since that list has them in capitals; `dog?!` keeps `?!`, `dog.,` its dot, `red,blue-green` stays whole.

    Known differences, none of them seen in captions of Flickr8k or COCO: numbers that the original joins by
    a blank that does not break (`1 1/2`, telephone numbers) are several tokens here, as its scorers but
    ROUGE-L see them too; a letter with a dot (`plan b.`) keeps its dot, where the original drops it in front
    of `A`, `The` and the like, and keeps that of `no.` in front of a number, both even where the next caption
    begins so; emoticons such as `^_^`; curly quotes side by side; `>>`; `5.x`; character references by number
    (`&#39;`); scripts with vowel signs (Hindi, Thai).
    """
    words = []
    for chunk in caption.split():
        tokens = _tokens_of_chunk(chunk)
        if tokens is None:
            return _lex(caption)
        words += tokens
    return words


@lru_cache(KEPT_CHUNKS)
def _tokens_of_chunk(chunk: str) -> tuple[str, ...] | None:
    """Tokens of what stands between blanks, None where they depend on what follows (`no.`, `<`)."""
    tokens = _lex(chunk)
    return None if "<" in chunk or _lex(chunk + " 5") != [*tokens, "5"] else tuple(tokens)


def _lex(text: str) -> list[str]:
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0].lower()), text).replace("\xad", "")
    words = []
    for token in filter(None, _LEXER.findall(text)):
        if len(token) > 1 and token[0] in ":;=<>" and token[-1] in "()":
            words.append(token[:-1].lower() + _REWRITTEN[token[-1]])
        else:
            words += _REWRITTEN.get(token.lower(), token.lower()).split()  # markup has blanks
    return words


# ------------------------------------------------------------------------------------------------ all at once


@dataclass(frozen=True)
class Scores:
    """Scores by name: Bleu_1 to Bleu_4, METEOR and ROUGE_L in [0, 1], CIDEr in [0, 10].

    `overall` is of the whole set: mean over the pictures for ROUGE_L and CIDEr; BLEU and METEOR are computed
    from the summed counts of all pictures. `per_picture` has the scores of each, in the references' order.
    METEOR is absent from both where its data are not installed.
    """

    overall: dict[str, float]
    per_picture: dict[Hashable, dict[str, float]]


def score_captions(
    references: Mapping[Hashable, Sequence[str]],
    hypotheses: Mapping[Hashable, str],
    meteor: Meteor | None = None,
) -> Scores:
    """All scores of a set of captions, the same as the official evaluation's.

    Args:
        references: the reference captions of each picture, not tokenized.
        hypotheses: one caption for each of the same pictures, not tokenized.
        meteor: a Meteor to use again, which remembers the references; by default a new one.

    Where METEOR's data are missing, the other scores are given and a line on stderr says what to install.
    CIDEr takes document frequencies from these references, so it depends on the whole set.

    Raises:
        ValueError: a picture is only in one of the two or has no reference, or there is no picture.
        TypeError: the references of a picture, or its hypothesis, are no list of strings, or no string.
    """
    _check(references, hypotheses)
    wanted = {key: [tokenize(caption) for caption in captions] for key, captions in references.items()}
    found = {key: tokenize(hypotheses[key]) for key in references}

    counts = [_bleu_counts(wanted[key], found[key]) for key in wanted]
    overall = _named_bleu([sum(column) for column in zip(*counts)])
    per_picture = {key: _named_bleu(count) for key, count in zip(wanted, counts)}

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
        for own, score in zip(per_picture.values(), column):
            own[name] = score
    return Scores(overall, per_picture)


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
            raise ValueError(f"{len(keys)} pictures without a {what}: {some}")
    for key, captions in references.items():
        if isinstance(captions, str):
            raise TypeError(f"references of {key!r}: a list of captions is expected, not one string")
        if not isinstance(hypotheses[key], str):
            raise TypeError(
                f"hypothesis of {key!r}: a string is expected, not {type(hypotheses[key]).__name__}"
            )


# ------------------------------------------------------------------------------------------------------- BLEU


def bleu4(references: Sequence[Sequence[Sequence[str]]], hypotheses: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in [0, 1] (Papineni et al., 2002), unsmoothed, with NLTK.

    It is `Bleu_4` of `score_captions` to 1e-9, but for two habits of NLTK: a hypothesis of less than four
    words counts as if it had one sequence of four, and without any match of four words in a row the score is
    0 to 70 digits, where the official evaluation's small constants leave up to some 1e-4.

    Args:
        references: for each picture its reference captions, each a list of words.
        hypotheses: for each picture one caption as a list of words.
    """
    from nltk.translate.bleu_score import corpus_bleu  # imported here, as it takes a second

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="nltk")  # "0 counts of 4-gram overlaps": the score says so
        return float(corpus_bleu(references, hypotheses))


def _ngrams(words: Sequence[str]) -> list[Iterator[tuple[str, ...]]]:
    """The runs of n words, for n = 1 to 4."""
    starts = [words[start:] for start in range(LONGEST_NGRAM)]
    return [zip(*starts[:n]) for n in range(1, LONGEST_NGRAM + 1)]


def _bleu_counts(references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> list[int]:
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


def _named_bleu(counts: Sequence[int]) -> dict[str, float]:
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
        document_frequencies: for each n-gram, in how many pictures a reference has it.
        n_documents: number of pictures.

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
        """With the frequencies in these: for each picture its reference captions, each a list of words."""
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
        """CIDEr-D in [0, 10] of each hypothesis against the references of its picture, all lists of words.

        Raises ValueError where the two are not equally long, or a picture has no reference.
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
