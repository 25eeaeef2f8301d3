"""Draw the demonstration data set: coloured shapes on grass, gravel and brick, with captions -> demo/.

    python make_demo_data.py

The layout is that of a Kaggle download: train.csv (image_id,caption), train/train/, test.csv (image_id) and
test/test/. Beside them are test_captions.csv, the references of the test images, and boxes.json, the place of
each shape. Test scenes show combinations that no training scene shows. The same seed gives the same files.
"""

from __future__ import annotations

import csv
import itertools
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from captioning.command_line import check_at_least, run_script
from captioning.files import remove_unfinished, write_encoded
from utils import UserError, atomic_write, progress_bar, say, write_json

SIZE = 256  # pixels, width and height
COLOURS = {
    "red": (225, 25, 25),
    "blue": (70, 150, 255),
    "yellow": (255, 225, 30),
    "white": (250, 250, 250),
    "black": (10, 10, 12),
}
SHAPES = ("circle", "square", "triangle", "star")
RADII = {"small": (27, 30), "large": (54, 58)}  # pixels
TINTS = {  # by which the grey photographs of scikit-image are coloured
    "grass": (0.75, 0.90, 0.65),
    "gravel": (0.85, 0.83, 0.80),
    "brick": (0.97, 0.80, 0.75),
}
RELATIONS = {  # direction (x, y) from the second shape to the first
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
INVERSES = dict(zip(RELATIONS, ("to the right of", "to the left of", "below", "above")))
GAP = 24  # pixels, at least, between shapes
NUMBERS = ("zero", "one", "two", "three")


@dataclass
class Settings:
    output_folder: str = "demo"  # where the data set is written
    train_images: int = 1000  # number of scenes to train on
    test_images: int = 100  # number of scenes to test on
    seed: int = 7  # decides every scene and caption

    def __post_init__(self):
        check_at_least(self, 10, "train_images", "test_images")


@dataclass(frozen=True)
class Group:
    """One or more shapes of one kind: "two small red circles"."""

    count: int
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """On a ground, one group of shapes, or a large shape in a relation to a small one."""

    ground: str
    first: Group
    relation: str | None = None
    second: Group | None = None


def main(settings: Settings) -> None:
    make_demo_data(settings)


def make_demo_data(settings: Settings) -> None:
    """Draw the images and write the files; images of an earlier drawing are replaced one by one.

    `boxes.json` is written last: where it is missing, the data set is not complete.
    """
    import skimage.data

    output = Path(settings.output_folder)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give another --output_folder")
    rng = random.Random(settings.seed)
    train, test = choose_scenes(settings, rng)
    textures = {name: getattr(skimage.data, name)() for name in TINTS}  # uint8 (512, 512)
    boxes = {}
    (output / "boxes.json").unlink(missing_ok=True)
    remove_unfinished(output)
    for split, scenes in (("train", train), ("test", test)):
        folder = output / split / split
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        rows = []
        for number, scene in enumerate(
            progress_bar(scenes, desc=f"drawing {split} scenes", unit="image"), start=1
        ):
            image_id = f"{split}_{number:04d}"
            image, boxes[image_id] = draw(scene, textures[scene.ground], TINTS[scene.ground], rng)
            write_encoded(folder / f"{image_id}.jpg", partial(image.save, format="JPEG", quality=90))
            rows += [(image_id, caption) for caption in describe(scene, rng)]
        for stale in {path.stem for path in folder.glob("*.jpg")} - {image_id for image_id, _ in rows}:
            (folder / f"{stale}.jpg").unlink()  # of an earlier drawing of more scenes
        if split == "test":
            write_csv(output / "test.csv", ("image_id",), [(image_id,) for image_id, _ in rows[::5]])
        write_csv(
            output / ("train.csv" if split == "train" else "test_captions.csv"), ("image_id", "caption"), rows
        )
    write_json(output / "boxes.json", boxes)
    say(f"{len(train)} training and {len(test)} test scenes drawn in {output}/")


def is_drawn(settings: Settings) -> bool:
    """Whether the output folder has a complete drawing, of as many training images."""
    output = Path(settings.output_folder)
    count = len([*(output / "train" / "train").glob("*.jpg")])
    return (output / "boxes.json").is_file() and count == settings.train_images


def choose_scenes(settings: Settings, rng: random.Random) -> tuple[list[Scene], list[Scene]]:
    """Training and test scenes, half of them with one group, half with a relation; the two sets are disjoint.

    One in seven combinations of a group and a ground is kept out of training, so that a test can show "two
    small red circles on gravel" where training has shown such circles on grass alone.
    """
    alone = [
        Scene(ground, Group(*group))
        for ground in TINTS
        for group in itertools.product((1, 2, 3), RADII, COLOURS, SHAPES)
        if group[0] == 1 or group[1] == "small"  # several large ones would cover the ground
    ]
    rng.shuffle(alone)
    held_out, known = alone[: len(alone) // 7], alone[len(alone) // 7 :]

    def choose(alone: list[Scene]) -> Scene:
        if rng.random() < 0.5:
            return rng.choice(alone)
        first = Group(1, "large", rng.choice(list(COLOURS)), rng.choice(SHAPES))
        second = Group(1, "small", rng.choice(list(COLOURS)), rng.choice(SHAPES))
        return Scene(rng.choice(list(TINTS)), first, rng.choice(list(RELATIONS)), second)

    train = [choose(known) for _ in range(settings.train_images)]
    seen, test = set(train), []
    while len(test) < settings.test_images:
        scene = choose(held_out)
        if scene not in seen:
            test.append(scene)
    return train, test


# --- drawing ------------------------------------------------------------------------------------------------


def draw(
    scene: Scene, texture: np.ndarray, tint: tuple[float, float, float], rng: random.Random
) -> tuple[Image.Image, list[dict]]:
    """The image and, for each shape, its size, colour, name and box [left, top, right, bottom] in pixels."""
    image = background(texture, tint, rng)
    boxes = []
    for group, (x, y), radius in place(scene, rng):
        outline = corners(group.shape, x, y, radius, rng)
        brightness = rng.uniform(0.85, 1.1)
        colour = tuple(min(int(value * brightness), 255) for value in COLOURS[group.colour])
        image = paint(image, outline, colour)
        left, top = outline.min(axis=0)
        right, bottom = outline.max(axis=0)
        box = [round(float(value), 1) for value in (left, top, right, bottom)]
        boxes.append({"size": group.size, "colour": group.colour, "shape": group.shape, "box": box})
    return image, boxes


def background(texture: np.ndarray, tint: tuple[float, float, float], rng: random.Random) -> Image.Image:
    """A random crop of the texture, mirrored in half of the cases and tinted."""
    side = rng.randint(300, 512)
    left, top = rng.randint(0, 512 - side), rng.randint(0, 512 - side)
    crop = Image.fromarray(texture).crop((left, top, left + side, top + side)).resize((SIZE, SIZE))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    grey = np.asarray(crop, dtype=np.float32)[:, :, None] * rng.uniform(0.8, 1.1)
    return Image.fromarray((grey * np.array(tint, dtype=np.float32)).clip(0, 255).astype(np.uint8))


def place(scene: Scene, rng: random.Random) -> list[tuple[Group, tuple[float, float], float]]:
    """Group, centre and radius of each shape: a group stands in a row, two groups in their relation."""
    groups = [scene.first] if scene.second is None else [scene.first, scene.second]
    while True:
        placed, centres = [], []
        for group in groups:
            radius = rng.uniform(*RADII[group.size])
            spacing = 2.5 * radius
            reach = (group.count - 1) / 2 * spacing  # from the middle of the row to its outer centres
            margin = radius + 4
            x, y = rng.uniform(reach + margin, SIZE - reach - margin), rng.uniform(margin, SIZE - margin)
            centres.append((x, y))
            row = [
                (group, (x - reach + i * spacing, y + rng.uniform(-4, 4)), radius) for i in range(group.count)
            ]
            if any(
                np.hypot(a[0] - b[0], a[1] - b[1]) < r + radius + GAP for _, a, r in placed for _, b, _ in row
            ):
                break
            placed += row
        else:
            if scene.second is None or related(*centres, scene.relation):
                return placed


def related(first: tuple[float, float], second: tuple[float, float], relation: str) -> bool:
    """Whether the first centre lies clearly in the relation's direction from the second."""
    offset, direction = np.subtract(first, second), np.array(RELATIONS[relation])
    along, across = offset @ direction, abs(offset @ direction[::-1])
    return bool(along > 3 * across)


def corners(shape: str, x: float, y: float, radius: float, rng: random.Random) -> np.ndarray:
    """The outline as a polygon (corners, 2)."""
    if shape == "circle":
        angles, radii = np.linspace(0, 2 * np.pi, 64, endpoint=False), 0.9
    elif shape == "star":
        angles, radii = np.arange(10) * np.pi / 5 - np.pi / 2, np.where(np.arange(10) % 2, 0.45, 1.1)
    else:
        sides = {"square": 4, "triangle": 3}[shape]
        angles = np.arange(sides) * 2 * np.pi / sides + {"square": np.pi / 4, "triangle": -np.pi / 2}[shape]
        radii = 1.1
    angles = angles + rng.uniform(-0.15, 0.15)
    return np.stack([x + radius * radii * np.cos(angles), y + radius * radii * np.sin(angles)], axis=1)


def paint(image: Image.Image, outline: np.ndarray, colour: tuple[int, ...]) -> Image.Image:
    """Paint a shape with a soft shadow on the image; it is drawn at four times the size for smooth edges."""
    mask = Image.new("L", (4 * SIZE, 4 * SIZE))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in outline * 4], fill=255)
    mask = mask.resize((SIZE, SIZE), Image.Resampling.BOX)
    shadow = mask.transform(mask.size, Image.Transform.AFFINE, (1, 0, -3, 0, 1, -4))
    shadow = shadow.filter(ImageFilter.GaussianBlur(3)).point(lambda value: value // 2)
    image.paste((0, 0, 0), mask=shadow)
    image.paste(colour, mask=mask)
    return image


# --- captions -----------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions, each phrased differently."""
    first, ground = phrase(scene.first, rng), scene.ground
    is_, lies = ("is", "lies") if scene.first.count == 1 else ("are", "lie")
    if scene.second is None:
        forms = [
            f"{first} on {ground}",
            f"{first} on the {ground}",
            f"there {is_} {phrase(scene.first, rng)} on {ground}",
            f"{phrase(scene.first, rng)} {lies} on {ground}",
            f"a picture of {phrase(scene.first, rng)} on {ground}",
            f"on the {ground} {lies} {phrase(scene.first, rng)}",
        ]
    else:
        second, relation, inverse = phrase(scene.second, rng), scene.relation, INVERSES[scene.relation]
        again = phrase(scene.first, rng)
        forms = [
            f"{first} {relation} {second} on {ground}",
            f"{first} {relation} {second} on the {ground}",
            f"{again} {is_} {relation} {phrase(scene.second, rng)} on {ground}",
            f"there {is_} {first} {relation} {phrase(scene.second, rng)}",
            f"{phrase(scene.second, rng)} {inverse} {again} on {ground}",
            f"on {ground} , {again} {relation} {second}",
        ]
    chosen = rng.sample(forms, 5)
    return [f"{form[0].upper()}{form[1:]} ." for form in chosen]


def phrase(group: Group, rng: random.Random) -> str:
    """ "a small red circle", "two big blue squares"."""
    size = rng.choices([group.size, {"small": "little", "large": "big"}[group.size]], weights=[4, 1])[0]
    if group.count > 1:
        return f"{NUMBERS[group.count]} {size} {group.colour} {group.shape}s"
    return f"a {size} {group.colour} {group.shape}"


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with atomic_write(path) as tmp_path, tmp_path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    run_script(main, Settings)
