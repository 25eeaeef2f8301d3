"""Image files of any kind as uint8 RGB arrays."""

from __future__ import annotations

from pathlib import Path

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


def read_image(path: str | Path, size: int | None = None) -> np.ndarray:
    """An image file as RGB, uint8 in [0, 255], (3, height, width); (3, size, size) where a size is given.

    The whole image is kept and stretched to the square, as the encoder's training data was in Xu et al.
    and its successors. EXIF rotation is applied, transparency is laid on white, 16 bits become 8, and of an
    animation the first frame is taken.

    Raises:
        UserError: the file is missing or holds no readable image.
    """
    try:
        with Image.open(path) as image:
            if size:
                image.draft(
                    None, (2 * size, 2 * size)
                )  # a JPEG decodes at a fraction of its size, never below
            return to_array(image, size)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        reason = "no image format that Pillow knows" if "cannot identify" in str(error) else error
        raise UserError(f"{path}: not a readable image ({reason}); replace or remove it") from None


def to_array(image: Image.Image, size: int | None = None) -> np.ndarray:
    """An image in memory as `read_image` gives that of a file."""
    image = _to_rgb(ImageOps.exif_transpose(image))
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
        image = image.convert("RGBA")
        white_page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white_page, image)
    return image.convert("RGB")


def list_images(folder: str | Path) -> list[Path]:
    """The image files of a folder (by extension) in natural order. Raises UserError where there are
    none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()]
    if not paths:
        raise UserError(f"{folder}: no images in it ({', '.join(IMAGE_EXTENSIONS)})")
    return sorted(paths, key=lambda path: natural_order(path.name))
