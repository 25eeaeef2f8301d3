"""Image files of any kind as uint8 RGB arrays."""

from __future__ import annotations

import os
import re
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from captioning.files import OUT_OF_FILES
from utils import UserError, kind_of_file

# formats that not every Pillow reads, and what makes it read them
PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": '"pillow>=11.3"'}
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", *PACKAGES,
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "JPEG2000", "ICO", "AVIF", "HEIF")

LARGEST = 2**28  # pixels of a file; what says it has more is damaged, or made to fill the memory
FULL = 2**24  # pixels that are read of it where no size is asked for: more is of no use to any model
Image.MAX_IMAGE_PIXELS = LARGEST // 2  # Pillow warns from here on, and refuses twice as many
warnings.filterwarnings("ignore", module=r"PIL\.")  # of what is odd in a file that it reads all the same


def read_image(path: str | Path, size: int | None = None, longest: int | None = None) -> np.ndarray:
    """An image file as RGB, uint8 in [0, 255], (3, height, width).

    EXIF rotation is applied, transparency is laid on white, 16 bits become 8, of an animation the first frame
    is taken, and colours are those of sRGB, whatever profile the file has. Of an image of more than `FULL`
    pixels a smaller copy is given.

    Args:
        size: stretch the whole image to a square, (3, size, size), as the encoder's training data was in
            Xu et al. and its successors.
        longest: make it smaller, keeping its shape, such that no side is longer; for display.

    Raises:
        UserError: the file is missing or holds no readable image.
    """
    try:
        _check_file(path)
        with open_image(path) as image:
            _decode_smaller(image, size, longest)
            with DECODING.share(image.width * image.height):
                return to_array(image, size, longest)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: too large for this machine's memory; make it smaller") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{path}: says it has more than {LARGEST // 10**6} million pixels; make it smaller or remove it"
        ) from None
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in OUT_OF_FILES:
                raise  # it is not this image's fault
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "none of the formats " + ", ".join(FORMATS)
        raise UserError(f"{path}: not a readable image ({reason}); replace or remove it") from None


def check_image(path: str | Path) -> None:
    """Raise UserError where `read_image` would, in less time."""
    read_image(path, longest=64)


def open_image(path: str | Path) -> Image.Image:
    """`Image.open` for files from anywhere: of Pillow's formats those that are decoded by a library, and not,
    as EPS is, by a program of another vendor.

    Raises:
        UserError: it needs a package that is not installed. OSError, and whatever else Pillow raises.
    """
    try:
        return Image.open(path, formats=_formats())
    except UnidentifiedImageError:
        package = _needed_package(path)
        if package is None:
            raise
        if package == "pillow-heif" and _heif_is_readable():
            return Image.open(path, formats=_formats())
        raise UserError(
            f"{path}: this Pillow does not read its format: pip install {package}, or convert it to JPEG"
        ) from None


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _needed_package(path: str | Path) -> str | None:
    """What reads a file of HEIF's family, whatever its name says: phones send HEIC as photo.jpg."""
    with open(path, "rb") as stream:
        start = stream.read(12)
    if start[4:8] != b"ftyp":
        return None
    if start[8:12] in (b"avif", b"avis"):
        return None if "AVIF" in _formats() else PACKAGES[".avif"]
    return PACKAGES[".heic"]


@cache
def _heif_is_readable() -> bool:
    """Let Pillow read HEIC files, where the package for it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _decode_smaller(image: Image.Image, size: int | None, longest: int | None) -> None:
    """Where it is a JPEG, let it be decoded at a half, a quarter or an eighth of its size: never below twice
    the size that is wanted, which makes no difference that can be seen."""
    if size or longest:
        side = 2 * (size or longest)
        image.draft(None, (side, side))
        return
    width, height = image.size
    while width * height > FULL:
        width, height = width // 2, height // 2
    image.draft(None, (max(1, width), max(1, height)))


class Budget:
    """Bounds how much of something all threads use at once; a share of more than all is given out alone."""

    def __init__(self, total: int):
        self.total, self.free = total, total
        self.changed = threading.Condition()

    @contextmanager
    def share(self, amount: int) -> Iterator[None]:
        amount = min(amount, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= amount)
            self.free -= amount
        try:
            yield
        finally:
            with self.changed:
                self.free += amount
                self.changed.notify_all()


DECODING = Budget(2**26)  # pixels decoded at once by all threads: about 800 MB


def _check_file(path: str | Path) -> None:
    """Raise UserError for what is no file with something in it: opening a pipe would wait for ever."""
    try:
        status = os.stat(path)
    except OSError as error:
        if not os.path.islink(path) or isinstance(error, PermissionError):
            raise
        raise UserError(f"{path}: a link that leads to no file; replace or remove it") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: a {kind_of_file(status.st_mode)}, not an image file; remove it")
    if status.st_size == 0:
        raise UserError(f"{path}: an empty file; replace or remove it")


# --- pixels -------------------------------------------------------------------------------------------------


def to_array(image: Image.Image, size: int | None = None, longest: int | None = None) -> np.ndarray:
    """An image in memory as `read_image` gives that of a file."""
    image.load()
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    image = _to_rgb(image)
    if size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    elif longest and longest < max(image.size):
        sides = (max(1, round(side * longest / max(image.size))) for side in image.size)
        image = image.resize(tuple(sides), Image.Resampling.BICUBIC, reducing_gap=2.0)
    while image.width * image.height > FULL:
        image = image.reduce(2)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


TURNS = {  # what undoes each orientation of EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(0x0112)
    except Exception:  # damaged EXIF data, which make Pillow raise nearly anything; the pixels are sound
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    profile = profile if isinstance(profile, bytes) else None  # a damaged TIFF may have anything there
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        page = Image.new("RGB", image.size)
        for top in range(0, image.height, 256):  # in strips, as a large image would take much memory
            strip = image.crop((0, top, image.width, min(top + 256, image.height)))
            if profile:
                alpha = strip.getchannel("A")
                strip = _to_srgb(strip.convert("RGB"), profile)
                strip.putalpha(alpha)
            white = Image.new("RGBA", strip.size, "white")
            page.paste(Image.alpha_composite(white, strip), (0, top))
        return page
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image = _to_srgb(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """An image of one channel of 16 or 32 bits as one of mode L."""
    values = np.asarray(image).astype(np.float64)
    values[~np.isfinite(values)] = 0
    largest = values.max(initial=0)
    white = next((white for white in (1.0, 255.0, 65535.0) if largest <= white), largest)
    if image.mode[0] == "I":
        white = max(white, 65535.0)  # integers: a dark 16-bit image is dark, not an 8-bit one
    return Image.fromarray((values.clip(0) * (255.0 / white)).round().astype(np.uint8))


# --- colours ------------------------------------------------------------------------------------------------


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image of mode RGB, L or CMYK, whose colours are those of the ICC profile, as one of sRGB.

    A profile that is damaged, or of another kind of image, is ignored, as browsers do.
    """
    if image.mode == "RGB" and profile[16:20] == b"GRAY":
        image = image.getchannel("R")  # transparency has made it RGB
    transform = _srgb_transform(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform)


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the colours of an ICC profile to sRGB; None where these are sRGB's but for rounding, or the
    profile cannot be used."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=BLACK_POINT_COMPENSATION,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    return None if mode in ("RGB", "L") and _changes_little(transform, mode) else transform


BLACK_POINT_COMPENSATION = 0x2000  # black stays black; a flag of lcms


def _changes_little(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(levels.reshape(1, -1) if mode == "L" else colours)
    after = ImageCms.applyTransform(before, transform)
    change = np.asarray(after).astype(int) - np.asarray(before.convert("RGB")).astype(int)
    return bool(np.abs(change).max() <= 2)


# --- folders ------------------------------------------------------------------------------------------------


class ImageFiles(NamedTuple):
    """The image files of a folder.

    Attributes:
        names: paths relative to the folder, with "/", in natural order.
        left_out: images in subfolders that were not asked for.
        problems: subfolders that cannot be read, one line each.
    """

    names: list[str]
    left_out: int
    problems: list[str]

    def paths(self, folder: str | Path) -> list[str]:
        """str(Path(folder, name)) of each, without making as many Paths, which takes long."""
        start = str(Path(folder, "x"))[:-1]
        return [start + name for name in self.names]


def walk_images(folder: str | Path, recursive: bool = False, in_order: bool = True) -> ImageFiles:
    """The files of a folder, or of all folders in it too, whose names end as those of images do.

    Broken links, pipes and the like are among them. Hidden files and folders are not, nor are the folders
    that links lead to.

    Args:
        in_order: whether their order matters; to sort many takes longer than to find them.

    Raises:
        UserError: there is no such folder.
        OSError: it cannot be read.
    """
    folder, names, left_out, problems = Path(folder), [], 0, []
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images; give the one that holds the image files")

    def note(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        problems.append(f"{error.filename}: the folder cannot be read ({error.strerror})")

    for place, subfolders, files in os.walk(folder, onerror=note):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found = [name for name in files if not name.startswith(".") and has_image_extension(name)]
        parts = Path(place).relative_to(folder).parts
        if parts and not recursive:
            left_out += len(found)
        else:
            start = "".join(f"{part}/" for part in parts)
            names += [start + name for name in found]
    if in_order:
        names.sort(key=natural_order)
    return ImageFiles(names, left_out, problems if recursive else [])


def has_image_extension(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and os.path.splitext(name)[1] != ""


def list_images(folder: str | Path) -> list[Path]:
    """The image files of a folder (by extension) in natural order. Raises UserError where there are
    none."""
    folder = Path(folder)
    paths = [path for name in walk_images(folder).names if (path := folder / name).is_file()]
    if not paths:
        raise UserError(f"{folder}: no images in it ({', '.join(IMAGE_EXTENSIONS)})")
    return paths


def natural_order(name: str) -> list:
    """Sort key by which img2 comes before img10."""
    return [
        (0, int(part[:4000]), part) if part.isdecimal() else (1, 0, part)  # longer ones Python does not read
        for part in re.split(r"(\d+)", name)
        if part
    ]


def parallel_map(function: Callable, items: Iterable, workers: int, ahead: int = 0) -> Iterator:
    """`map(function, items)` on `workers` threads: in order, few results waiting, so that memory stays flat.

    At most `ahead` of them wait, or four for each thread if that is more.

    For work that leaves the interpreter lock, as Pillow's decoding and resizing does.
    """
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > max(4 * workers, ahead, 1):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
