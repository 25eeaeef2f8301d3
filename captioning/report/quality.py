"""What a model's captions are like, apart from being right: length, vocabulary, diversity, bad endings; and
whether its attention points at what the words name.

Captions are lists of words here, as `metrics.tokenize` makes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from captioning.data.image_names import coco_id
from captioning.data.images import open_image
from captioning.decoding.options import UNFINISHED
from captioning.report.scoring import matched_bleu
from metrics import tokenize
from metrics.ngrams import bleu_counts
from utils import UserError, read_json, say

if TYPE_CHECKING:
    from captioning.captioners.base import Caption

PARTS = ("beginning", "middle", "end")  # thirds of a caption
SHOWN_WORDS = 12  # most over-used and under-used words


def distinct_ngrams(captions: Sequence[Sequence[str]], n: int) -> float:
    """Div-n, the share of the captions' n-grams that are different, in [0, 1]; 0 if there are none."""
    ngrams = [tuple(words[i : i + n]) for words in captions for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def has_repetition(words: Sequence[str]) -> bool:
    """Whether two words in a row occur again, as in "a man in a man in", or a word follows itself."""
    pairs = list(pairwise(words))
    return len(set(pairs)) < len(pairs) or any(first == second for first, second in pairs)


def has_bad_ending(words: Sequence[str]) -> bool:
    """Whether the last word cannot end a caption (an article, a preposition, a conjunction)."""
    return bool(words) and words[-1] in UNFINISHED


def usage(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[dict[str, object]]:
    """Words that are used more, or less, often than in the references.

    references: the reference captions of each image.

    Returns:
        "word", "rate" and "reference_rate" (occurrences per hundred words) of each, from the most over-used
        to the most under-used.
    """
    counts = Counter(word for words in captions for word in words)
    reference_counts = Counter(word for several in references for words in several for word in words)
    total, reference_total = max(counts.total(), 1), max(reference_counts.total(), 1)
    rates = [
        {
            "word": word,
            "rate": 100 * counts[word] / total,
            "reference_rate": 100 * reference_counts[word] / reference_total,
        }
        for word in counts | reference_counts
    ]
    rates.sort(key=lambda row: (row["reference_rate"] - row["rate"], row["word"]))
    if len(rates) > 2 * SHOWN_WORDS:
        return rates[:SHOWN_WORDS] + rates[-SHOWN_WORDS:]
    return rates


def entropy(attention: np.ndarray) -> np.ndarray:
    """Entropy of attention maps (words, height, width) in bits: 0 if all is on one cell, log2(cells) if it is
    even."""
    cells = attention.reshape(len(attention), -1).astype(np.float64)
    return -(cells * np.log2(np.where(cells > 0, cells, 1))).sum(axis=1)


def attention_summary(words: Sequence[Sequence[str]], maps: Sequence[np.ndarray]) -> dict:
    """Where a model looks, over all its captions.

    Args:
        words: of each caption.
        maps: each caption's attention, (words, height, width), with one height and width for all.

    Returns:
        "entropy": the mean over all words, in bits. "largest_entropy": that of an even map. "words": "word",
        "entropy" and "count" of each different word, the sharpest first. "mean_maps": the mean attention of
        "all words", then of the "beginning", "middle" and "end" of captions, as lists (height, width).
    """
    by_word: dict[str, list[float]] = {}
    everything, parts = [], {part: [] for part in PARTS}
    for caption_words, attention in zip(words, maps):
        for i, (word, value) in enumerate(zip(caption_words, entropy(attention))):
            by_word.setdefault(word, []).append(float(value))
            everything.append(attention[i])
            parts[PARTS[3 * i // len(caption_words)]].append(attention[i])
    if not everything:
        return {}
    rows = [
        {"word": word, "entropy": float(np.mean(values)), "count": len(values)}
        for word, values in by_word.items()
    ]
    rows.sort(key=lambda row: (row["entropy"], row["word"]))
    maps_of = {"all words": everything} | {part: of_part for part, of_part in parts.items() if of_part}
    return {
        "entropy": float(np.mean([value for values in by_word.values() for value in values])),
        "largest_entropy": float(np.log2(everything[0].size)),
        "words": rows,
        "mean_maps": {name: np.mean(several, axis=0).tolist() for name, several in maps_of.items()},
    }


def caption_quality(
    captions: Mapping[str, Sequence[str]],
    references: Mapping[str, Sequence[Sequence[str]]] | None = None,
    vocabulary: Collection[str] | None = None,
    training_captions: Collection[tuple[str, ...]] | None = None,
) -> dict:
    """What a model's captions are like: the content of quality.json.

    Args:
        captions: the words of each image's caption.
        references: the words of each image's reference captions.
        vocabulary: words that the model could use.
        training_captions: the words of the captions that it was trained on.

    Returns:
        Numbers: "captions", "mean_length", "lengths" {words: captions}, "words_used", "words_known". Shares
        in [0, 1]: "distinct", "in_training", "div1", "div2", "repetitions", "bad_endings", "empty". And
        "usage", as `usage` returns it. An entry is None if it needs an argument that was not given.
    """
    texts = list(captions.values())
    used = {word for words in texts for word in words}

    def share(is_so: Sequence[bool]) -> float:
        return sum(is_so) / max(len(texts), 1)

    lengths = Counter(map(len, texts))
    return {
        "captions": len(texts),
        "mean_length": sum(map(len, texts)) / max(len(texts), 1),
        "lengths": {length: lengths[length] for length in sorted(lengths)},
        "words_used": len(used),
        "words_known": None if vocabulary is None else len(vocabulary),
        "distinct": len({tuple(words) for words in texts}) / max(len(texts), 1),
        "in_training": (
            None
            if training_captions is None
            else share([tuple(words) in training_captions for words in texts])
        ),
        "div1": distinct_ngrams(texts, 1),
        "div2": distinct_ngrams(texts, 2),
        "repetitions": share([has_repetition(words) for words in texts]),
        "bad_endings": share([has_bad_ending(words) for words in texts]),
        "empty": share([not words for words in texts]),
        "usage": usage(texts, list(references.values())) if references else None,
    }


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
        captions: the best one of each image.
        training_captions: the words of the captions that the model was trained on.
        samples: two or more of each image, the same number for all.

    Returns:
        Of the captions "distinct", "bad_endings", "repetitions" and "words_used", as in `caption_quality`,
        and "novel", the share that is not among the training captions (None if these are not known). If there
        are samples, also what `sample_diversity` returns.
    """
    words = {image_id: tokenize(text) for image_id, text in captions.items()}
    quality = caption_quality(words, training_captions=training_captions)
    quality["novel"] = None if training_captions is None else 1 - quality["in_training"]
    diversity = {name: quality[name] for name in COLUMNS}
    if samples:
        diversity |= sample_diversity([[tokenize(text) for text in texts] for texts in samples.values()])
    return diversity


def sample_diversity(samples: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """How the samples of an image differ from each other.

    Args:
        samples: two or more of each image, the same number for all; each is a list of words.

    Returns:
        "samples": how many an image has. "div1", "div2": number of different words, or pairs of words, in an
        image's samples divided by that of all, mean over the images. "mbleu": corpus BLEU-4 of the images'
        k-th samples against their other ones, mean over k (Shetty et al., 2017). Diverse samples have a high
        Div and a low mBLEU.
    """
    count = len(samples[0])

    def bleu_against_others(k: int) -> float:
        counts = [bleu_counts([*of_image[:k], *of_image[k + 1 :]], of_image[k]) for of_image in samples]
        return matched_bleu([sum(column) for column in zip(*counts)])["Bleu_4"]

    return {
        "samples": count,
        "div1": fmean(distinct_ngrams(of_image, 1) for of_image in samples),
        "div2": fmean(distinct_ngrams(of_image, 2) for of_image in samples),
        "mbleu": fmean(bleu_against_others(k) for k in range(count)),
    }


def print_diversity(first: str, names: Sequence[str], rows: Sequence[dict[str, float | None]]) -> None:
    """Print one line for each model or beam size, and the diversity of the samples if there are any.

    Args:
        first: title of the column of names.
        names: of the models, or the beam sizes.
        rows: what `caption_diversity` returned for each of them.
    """
    width = max(map(len, [first, *names]))
    say()
    say(f"{first:{width}} {' '.join(f'{title:>11}' for title in COLUMNS.values())}")
    for name, row in zip(names, rows):
        values = [row[key] for key in COLUMNS]
        cells = ["-" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values]
        say(f"{name:{width}} {' '.join(f'{cell:>11}' for cell in cells)}")
    if "samples" in rows[0]:
        say(
            f"{rows[0]['samples']} samples per image: Div-1 {rows[0]['div1']:.4f}, Div-2 "
            f"{rows[0]['div2']:.4f}, mBLEU-4 {rows[0]['mbleu']:.4f}"
        )


# --- the pointing game --------------------------------------------------------------------------------------
# Attention against boxes of the objects (Zhang et al., 2018, "Top-down neural attention by excitation
# backprop"). For each word of a caption that names an object which the image has, the attention's maximum is
# a hit where it lies in one of that object's boxes. A guess that takes every cell of the grid with the same
# probability would hit as often as the share of cells whose centres lie in the boxes.

# names of COCO's categories as captions have them
SYNONYMS = {
    "person": "man men woman women boy boys girl girls child children kid kids people lady guy player baby",
    "bicycle": "bike bikes",
    "motorcycle": "motorbike motorbikes",
    "airplane": "plane planes jet airplanes",
    "car": "taxi suv",
    "boat": "ship sailboat canoe",
    "cat": "kitten",
    "dog": "puppy",
    "cow": "calf cattle",
    "sheep": "lamb",
    "couch": "sofa",
    "tv": "television monitor",
    "cell phone": "cellphone phone",
    "dining table": "table",
    "potted plant": "plant",
    "donut": "doughnut",
    "sports ball": "ball",
    "hot dog": "hotdog",
    "fire hydrant": "hydrant",
}
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "knives": "knife", "mice": "mouse"}
Box = tuple[float, float, float, float]  # left, top, right, bottom in parts of width and height, in [0, 1]
Objects = dict[str, list[Box]]  # of an image: for each object's name its boxes


@dataclass
class Pointing:
    """The pointing score of a set of captions: `hits` out of `words`; a uniform guess scores `chance`.

    absent: number of words that name an object of which the image has no box; they do not count.
    by_name: (words, hits) for each object's name.
    """

    words: int = 0
    hits: int = 0
    expected: float = 0.0
    absent: int = 0
    by_name: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        return self.hits / self.words if self.words else float("nan")

    @property
    def chance(self) -> float:
        return self.expected / self.words if self.words else float("nan")

    def add(self, name: str, hit: bool, chance: float) -> None:
        self.words += 1
        self.hits += hit
        self.expected += chance
        words, hits = self.by_name.get(name, (0, 0))
        self.by_name[name] = (words + 1, hits + hit)


# --- reading ------------------------------------------------------------------------------------------------


def read_boxes(file: str | Path, paths: Mapping[str, str]) -> tuple[dict[str, Objects], dict[str, str]]:
    """Read which objects images have, and which words name these.

    The file is COCO's instances JSON, or has the layout of make_demo_data.py: {image id: [{"shape": ...,
    "box": [left, top, right, bottom] in pixels}, ...]}.

    Args:
        paths: the image files by id, whose sizes the second layout needs.

    Returns:
        The objects by image id (for COCO the image's number, as text); {word or words: object's name}.

    Raises:
        UserError: the file is missing or has another layout.
    """
    content = read_json(file)
    try:
        if isinstance(content, dict) and "annotations" in content:
            return _read_coco_instances(content)
        objects, names = {}, set()
        for image_id, entries in content.items():
            size = _size(paths.get(image_id))
            if size is None:
                continue
            width, height = size
            boxes_by_name = objects.setdefault(image_id, {})
            for entry in entries:
                left, top, right, bottom = entry["box"]
                box = (left / width, top / height, right / width, bottom / height)
                boxes_by_name.setdefault(entry["shape"], []).append(box)
                names.add(entry["shape"])
        return objects, _names_of(names)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: not boxes of objects ({type(error).__name__}: {error}); give COCO's instances JSON or "
            f'{{image id: [{{"shape": "circle", "box": [left, top, right, bottom]}}]}}'
        ) from None


def _size(path: str | Path | None) -> tuple[int, int] | None:
    """Width and height of an image file; None if it cannot be read."""
    try:
        with open_image(path) as image:
            return image.size
    except (OSError, UserError, AttributeError):
        return None


def _read_coco_instances(content: dict) -> tuple[dict[str, Objects], dict[str, str]]:
    categories = {category["id"]: category["name"] for category in content["categories"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    objects = {str(number): {} for number in sizes}
    for annotation in content["annotations"]:
        left, top, width, height = annotation["bbox"]
        across, down = sizes[annotation["image_id"]]
        box = (left / across, top / down, (left + width) / across, (top + height) / down)
        name = categories[annotation["category_id"]]
        objects[str(annotation["image_id"])].setdefault(name, []).append(box)
    return objects, _names_of(categories.values())


def _names_of(names: Iterable[str]) -> dict[str, str]:
    """The objects' names by the words for them: {"circle": "circle", "circles": "circle", "man":
    "person"}."""
    words = {}
    for name in names:
        for form in (name, *SYNONYMS.get(name, "").split()):
            for spelling in (form, f"{form}s", f"{form}es"):
                words.setdefault(spelling, name)
    return words | {plural: words[one] for plural, one in IRREGULAR.items() if one in words}


# --- scoring ------------------------------------------------------------------------------------------------


def named_objects(words: Sequence[str], names: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """The objects that a caption names: (object's name, index of its first word, index after its last word).
    A name may have two words ("traffic light")."""
    objects, i = [], 0
    while i < len(words):
        length = next((n for n in (2, 1) if " ".join(words[i : i + n]) in names and i + n <= len(words)), 0)
        if length:
            objects.append((names[" ".join(words[i : i + length])], i, i + length))
        i += max(length, 1)
    return objects


def inside(boxes: Sequence[Box], height: int, width: int) -> np.ndarray:
    """Whether the centre of each cell of a grid lies in one of the boxes: bool (height, width)."""
    x, y = (np.arange(width) + 0.5) / width, ((np.arange(height) + 0.5) / height)[:, None]
    cells = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in boxes:
        cells |= (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    return cells


def pointing_score(
    captions: Mapping[str, Caption], objects: Mapping[str, Objects], names: Mapping[str, str]
) -> Pointing:
    """The pointing score of captions with attention. Images whose objects are not known are left out."""
    result = Pointing()
    for image_id, caption in captions.items():
        boxes_by_name = objects.get(image_id, objects.get(str(coco_id(image_id))))
        if boxes_by_name is None:
            continue
        for name, first, behind in named_objects([word.lower() for word in caption.words], names):
            if name not in boxes_by_name:
                result.absent += 1
                continue
            attention = np.asarray(caption.attention[first:behind]).mean(axis=0)
            cells = inside(boxes_by_name[name], *attention.shape)
            result.add(name, bool(cells.flat[attention.argmax()]), float(cells.mean()))
    return result
