"""Image files of any kind as uint8 RGB arrays."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from utils import UserError, natural_order

IMAGE_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".jfif",
    ".ppm",
    ".pgm",
)
# formats that not every Pillow reads, and what makes it read them
PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": '"pillow>=11.3"'}


def read_image(path: str | Path, size: int | None = None) -> np.ndarray:
    """An image file as RGB, uint8 in [0, 255], (3, height, width); (3, size, size) where a size is given.

    The whole image is kept and stretched to the square, as the encoder's training data was in Xu et al.
    and its successors. EXIF rotation is applied, transparency is laid on white, 16 bits become 8, and of an
    animation the first frame is taken.

    Raises:
        UserError: the file is missing or holds no readable image.
    """
    try:
        _check_file(path)
        with open_image(path) as image:
            if size:
                image.draft(
                    None, (2 * size, 2 * size)
                )  # a JPEG decodes at a fraction of its size, never below
            with DECODING.share(image.width * image.height):
                return to_array(image, size)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (MemoryError, PermissionError, UserError):
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        reason = str(error)
        if "cannot identify" in reason:
            package = PACKAGES.get(Path(path).suffix.lower())
            if package and not (package == "pillow-heif" and _heif_is_readable()):
                raise UserError(
                    f"{path}: this Pillow does not read {Path(path).suffix} files: pip install {package}, or "
                    f"convert it to JPEG"
                ) from None
            reason = "none of the formats " + ", ".join(_formats())
        raise UserError(f"{path}: not a readable image ({reason}); replace or remove it") from None


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "JPEG2000", "ICO", "AVIF", "HEIF")


def open_image(path: str | Path) -> Image.Image:
    """`Image.open` for files from anywhere: of Pillow's formats those that are decoded by a library, and not,
    as EPS is, by a program of another vendor."""
    return Image.open(path, formats=_formats())


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


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
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
        raise UserError(f"{path}: a {kind}, not an image file; remove it")
    if status.st_size == 0:
        raise UserError(f"{path}: an empty file; replace or remove it")
    if PACKAGES.get(Path(path).suffix.lower()) == "pillow-heif":
        _heif_is_readable()


@cache
def _heif_is_readable() -> bool:
    """Let Pillow read HEIC files, where the package for it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def to_array(image: Image.Image, size: int | None = None) -> np.ndarray:
    """An image in memory as `read_image` gives that of a file."""
    if image.getexif().get(0x0112, 1) != 1:  # rotated or mirrored
        image = ImageOps.exif_transpose(image)
    image = _to_rgb(image)
    if size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # one channel of 16 or 32 bits
        values = np.asarray(image).astype(np.float64)
        largest = values.max(initial=0)
        white = next((white for white in (1.0, 255.0, 65535.0) if largest <= white), largest)
        if image.mode[0] == "I":
            white = max(white, 65535.0)  # integers: a dark 16-bit image is dark, not an 8-bit one
        image = Image.fromarray((values.clip(0) * (255.0 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        page = Image.new("RGB", image.size)
        for top in range(0, image.height, 256):  # in strips, as a large image would take much memory
            strip = image.crop((0, top, image.width, min(top + 256, image.height)))
            white = Image.new("RGBA", strip.size, "white")
            page.paste(Image.alpha_composite(white, strip), (0, top))
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


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


def walk_images(folder: str | Path, recursive: bool = False) -> ImageFiles:
    """The files of a folder, or of all folders in it too, whose names end as those of images do.

    Broken links, pipes and the like are among them. Hidden files and folders are not, nor are the folders
    that links lead to.

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
        found = [name for name in files if not name.startswith(".") and _has_image_extension(name)]
        parts = Path(place).relative_to(folder).parts
        if parts and not recursive:
            left_out += len(found)
        else:
            names += ["/".join((*parts, name)) for name in found]
    return ImageFiles(sorted(names, key=natural_order), left_out, problems if recursive else [])


def _has_image_extension(name: str) -> bool:
    extension = os.path.splitext(name)[1].lower()
    return extension in IMAGE_EXTENSIONS or extension in PACKAGES


def list_images(folder: str | Path) -> list[Path]:
    """The image files of a folder (by extension) in natural order. Raises UserError where there are
    none."""
    folder = Path(folder)
    paths = [path for name in walk_images(folder).names if (path := folder / name).is_file()]
    if not paths:
        raise UserError(f"{folder}: no images in it ({', '.join(IMAGE_EXTENSIONS)})")
    return paths
