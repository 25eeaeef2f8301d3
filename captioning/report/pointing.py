"""Whether a model looks at what it names: attention against boxes of the objects (Zhang et al., 2018, the
pointing game of "Top-down neural attention by excitation backprop").

For each word of a caption that names an object which the image has, the attention's maximum is a hit where it
lies in one of that object's boxes. A guess that takes every cell of the grid with the same probability would
hit as often as the share of cells whose centres lie in the boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from captioning.captioners.base import Caption
from captioning.data.image_names import coco_id
from captioning.data.images import open_image
from utils import UserError, read_json

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
