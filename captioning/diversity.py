"""How much a model's captions vary, beside how right they are: what eval.py --diversity prints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from captioning.quality import caption_quality, distinct_ngrams
from metrics import tokenize
from metrics.ngrams import bleu_counts, named_bleu

COLUMNS = {  # of the table, and how it calls them
    "distinct": "distinct",
    "novel": "novel",
    "words_used": "words used",
    "bad_endings": "bad endings",
    "repetitions": "repetitions",
}


def caption_diversity(
    captions: Mapping[str, str],
    training_captions: Collection[tuple[str, ...]] | None = None,
    samples: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float | None]:
    """The diversity of a model's captions and of its samples.

    Args:
        captions: of each image the best one.
        training_captions: the words of the captions that the model was trained on.
        samples: of each image two or more, as many for one as for another.

    Returns:
        Of the captions: "distinct", "bad_endings", "repetitions" (shares, as in `caption_quality`), "novel"
        (share that is not among the training captions; None where these are not known), "words_used". Of the
        samples, where there are any: what `sample_diversity` returns.
    """
    words = {image_id: tokenize(text) for image_id, text in captions.items()}
    quality = caption_quality(words, training_captions=training_captions)
    quality["novel"] = None if training_captions is None else 1 - quality["in_training"]
    found = {name: quality[name] for name in COLUMNS}
    if samples:
        found |= sample_diversity([[tokenize(text) for text in own] for own in samples.values()])
    return found


def sample_diversity(samples: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """How the samples of an image differ from each other.

    Args:
        samples: of each image two or more, each a list of words; as many for one image as for another.

    Returns:
        "samples": how many an image has; "div1", "div2": different words (pairs of words) by all of an
        image's samples, mean over the images; "mbleu": BLEU-4 of each image's k-th sample against its others,
        computed as of a corpus of all images, mean over k (Shetty et al., 2017). High Div and low mBLEU are
        diverse.
    """
    count = len(samples[0])

    def bleu_against_others(k: int) -> float:
        counts = [bleu_counts([*own[:k], *own[k + 1 :]], own[k]) for own in samples]
        return named_bleu([sum(column) for column in zip(*counts)])["Bleu_4"]

    return {
        "samples": count,
        "div1": fmean(distinct_ngrams(own, 1) for own in samples),
        "div2": fmean(distinct_ngrams(own, 2) for own in samples),
        "mbleu": fmean(bleu_against_others(k) for k in range(count)),
    }


def print_diversity(first: str, names: Sequence[str], rows: Sequence[dict[str, float | None]]) -> None:
    """A line for each model or beam size, and the diversity of the samples where there are any.

    Args:
        first: what the names are of.
        rows: what `caption_diversity` returns, for each name.
    """
    width = max(map(len, [first, *names]))
    print(f"\n{first:{width}} {' '.join(f'{title:>11}' for title in COLUMNS.values())}")
    for name, row in zip(names, rows):
        values = [row[key] for key in COLUMNS]
        cells = ["-" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values]
        print(f"{name:{width}} {' '.join(f'{cell:>11}' for cell in cells)}")
    if "samples" in rows[0]:
        print(
            f"{rows[0]['samples']} samples per image: Div-1 {rows[0]['div1']:.4f}, Div-2 "
            f"{rows[0]['div2']:.4f}, mBLEU-4 {rows[0]['mbleu']:.4f}"
        )
