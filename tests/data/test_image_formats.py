"""One photo in every format, orientation and colour profile: one array."""

import io
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from icc_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    reckon_srgb,
    rgb_profile,
)
from PIL import Image, ImageCms, features

from captioning.data import images
from captioning.data.images import check_image, read_image
from utils import UserError

try:
    from pillow_heif import register_heif_opener
except ImportError:
    register_heif_opener = None
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
needs_heif = pytest.mark.skipif(register_heif_opener is None, reason="pillow-heif is not installed")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth, colourful, and different when it is turned or mirrored."""
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((64, 48), Image.Resampling.BICUBIC)


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(int)


LOSSLESS = {
    "a.png": {},
    "a.webp": {"lossless": True},
    "a.bmp": {},
    "a.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "a.ppm": {},
    "a.jp2": {"irreversible": False},
}
LOSSY = {  # and the mean difference, of 255, that is allowed
    "a.jpg": ({"quality": 95}, 2),
    "progressive.jpg": ({"quality": 95, "progressive": True}, 2),
    "a.webp": ({"quality": 95}, 4),
    "a.gif": ({}, 8),  # of 256 colours
    "a.avif": ({"quality": 95}, 3),
    "a.heic": ({"quality": 95}, 4),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_same_array(photo, name, tmp_path):
    photo.save(tmp_path / name, **LOSSLESS[name])
    assert (read_image(tmp_path / name) == pixels_of(photo)).all()
    photo.save(tmp_path / "reference.png")
    assert (read_image(tmp_path / name, 32) == read_image(tmp_path / "reference.png", 32)).all()


def lossy(name: str):
    marks = [needs_avif] * name.endswith("avif") + [needs_heif] * name.endswith("heic")
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [lossy(name) for name in LOSSY])
def test_lossy_formats_give_nearly_the_same_array(photo, name, tmp_path):
    options, allowed = LOSSY[name]
    if name.endswith("heic"):
        register_heif_opener()
    photo.save(tmp_path / name, **options)
    found = read_image(tmp_path / name).astype(int)
    assert found.shape == (3, 48, 64)
    assert np.abs(found - pixels_of(photo)).mean() < allowed


ANIMATED = [
    ("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.tif", {}),
    pytest.param("a.avif", {"quality": 100}, marks=needs_avif),
]  # fmt: skip


@pytest.mark.parametrize("name, options", ANIMATED)
def test_of_an_animation_the_first_frame(photo, name, options, tmp_path):
    others = [photo.rotate(180), photo.convert("L").convert("RGB")]
    photo.save(tmp_path / name, save_all=True, append_images=others, duration=100, **options)
    found = read_image(tmp_path / name).astype(int)
    assert np.abs(found - pixels_of(photo)).mean() < 8


def test_deep_and_separated_tiffs(photo, tmp_path):
    """16 bits of grey and of colour, and CMYK."""
    grey = np.asarray(photo.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey.tif")
    assert (read_image(tmp_path / "grey.tif") == grey).all()
    write_deep_tiff(tmp_path / "deep.tif", np.asarray(photo).astype(np.uint16) * 257)
    assert (read_image(tmp_path / "deep.tif") == pixels_of(photo)).all()
    photo.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(read_image(tmp_path / "cmyk.tif").astype(int) - pixels_of(photo)).max() <= 1


def write_deep_tiff(path: Path, values: np.ndarray) -> None:
    """uint16 RGB (height, width, 3) as a TIFF without compression: Pillow writes none of 16-bit colour."""
    height, width, _ = values.shape
    short, long = 3, 4
    start = 8 + 2 + 9 * 12 + 4  # header, number of tags, tags, end of their list
    tags = [  # number, type, count, value
        (256, short, 1, width), (257, short, 1, height), (258, short, 3, start), (259, short, 1, 1),
        (262, short, 1, 2), (273, long, 1, start + 6), (277, short, 1, 3), (278, short, 1, height),
        (279, long, 1, values.nbytes),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(head + struct.pack("<IHHH", 0, 16, 16, 16) + values.astype("<u2").tobytes())


# --- orientation --------------------------------------------------------------------------------------------


def turned(photo: Image.Image, orientation: int) -> np.ndarray:
    """What a viewer shows of these stored pixels, by the words of the EXIF standard: which side of the
    photo row 0 and column 0 are."""
    stored = pixels_of(photo)
    rows, columns = stored[:, ::-1], stored[:, :, ::-1]
    return {
        1: stored, 2: columns, 3: rows[:, :, ::-1], 4: rows,
        5: stored.transpose(0, 2, 1), 6: rows.transpose(0, 2, 1),
        7: rows[:, :, ::-1].transpose(0, 2, 1), 8: columns.transpose(0, 2, 1),
    }[orientation]  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "name", ["a.png", "a.webp", "a.tif", "a.jpg", pytest.param("a.avif", marks=needs_avif)]
)
def test_orientation(photo, name, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"a.png": {}, "a.webp": {"lossless": True}, "a.tif": {}}
    photo.save(tmp_path / name, exif=exif, **lossless.get(name, {"quality": 95}))
    found, expected = read_image(tmp_path / name).astype(int), turned(photo, orientation)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() <= (0 if name in lossless else 3)


@needs_heif
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_of_heic(photo, orientation, tmp_path):
    register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "a.heic", exif=exif.tobytes(), quality=95)
    found, expected = read_image(tmp_path / "a.heic").astype(int), turned(photo, orientation)
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 4


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_data_do_not_cost_the_image(photo, tmp_path):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(stream, "JPEG", quality=95, exif=exif)
    content = stream.getvalue()
    start = content.index(b"Exif\0\0") + 6
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content)
        for place in rng.integers(start, start + 26, 4):
            damaged[place] = rng.integers(256)
        (tmp_path / "a.jpg").write_bytes(damaged)
        assert read_image(tmp_path / "a.jpg").shape in ((3, 64, 48), (3, 48, 64))


# --- colours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("primaries, gamma", [(DISPLAY_P3, 2.2), (ADOBE_RGB, 2.19921875)])
@pytest.mark.parametrize(
    "name",
    [
        "a.png", "a.webp", "a.tif", "palette.png", "clear.png", "a.jpg",
        pytest.param("a.avif", marks=needs_avif), pytest.param("a.heic", marks=needs_heif),
    ],
)  # fmt: skip
def test_colours_of_a_profile_become_srgb(photo, name, primaries, gamma, tmp_path):
    if name.endswith("heic"):
        register_heif_opener()
    profile, image = rgb_profile(primaries, gamma), photo
    options = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 95}, "a.heic": {"quality": 95}}
    if name == "palette.png":
        image = photo.quantize(64)
    if name == "clear.png":
        image = photo.convert("RGBA")
        image.putpixel((0, 0), (0, 0, 0, 254))
    image.save(tmp_path / name, icc_profile=profile, **options.get(name, {}))
    expected = reckon_srgb(np.asarray(image.convert("RGB")), primaries, gamma).transpose(2, 0, 1).astype(int)
    found = read_image(tmp_path / name).astype(int)
    difference = np.abs(found - expected)[:, 1:, 1:]
    lossless = name in ("a.png", "a.webp", "a.tif", "palette.png", "clear.png")
    assert difference.max() <= 2 if lossless else difference.mean() < 4
    assert np.abs(found - pixels_of(image)).mean() > 2 * difference.mean() + 1  # as it was without


def test_a_profile_of_srgb_changes_nothing(photo, tmp_path):
    """Most photographs have one; ours is a gamma of 2.2, not quite sRGB's curve, and Pillow's is exact."""
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo.save(tmp_path / "a.png", icc_profile=own)
    assert (read_image(tmp_path / "a.png") == pixels_of(photo)).all()
    photo.save(tmp_path / "b.png", icc_profile=rgb_profile(SRGB, 2.2))
    expected = reckon_srgb(np.asarray(photo), SRGB, 2.2).transpose(2, 0, 1).astype(int)
    assert np.abs(read_image(tmp_path / "b.png").astype(int) - expected).max() <= 2


def test_grey_and_printed_profiles(photo, tmp_path):
    grey = photo.convert("L")
    values = np.asarray(grey)[..., np.newaxis].repeat(3, axis=2)
    expected = reckon_srgb(values, SRGB, 1.0).transpose(2, 0, 1).astype(int)
    for name, image in (("grey.png", grey), ("clear.png", grey.convert("LA"))):
        image.save(tmp_path / name, icc_profile=grey_profile(1.0))
        assert np.abs(read_image(tmp_path / name).astype(int) - expected).max() <= 2
    ink = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    ink.paste((255, 0, 0, 0), (0, 0, 4, 8))  # cyan, of which this press makes black
    for name in ("ink.tif", "ink.jpg"):
        ink.save(tmp_path / name, icc_profile=cmyk_profile())
        found = read_image(tmp_path / name)
        assert found[:, :, :3].max() <= 3 and found[:, :, 5:].min() >= 252


def test_lab_colours(tmp_path):
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    colours = Image.fromarray(np.array([[(180, 60, 70), (60, 150, 90), (128, 128, 128)]], np.uint8))
    ImageCms.applyTransform(colours, to_lab).save(tmp_path / "lab.tif")
    assert np.abs(read_image(tmp_path / "lab.tif").astype(int) - pixels_of(colours)).max() <= 4


def test_damaged_profiles_are_ignored(photo, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(40):
        profile = bytearray(rgb_profile(ADOBE_RGB, 2.2))
        for place in rng.integers(0, len(profile), 1 + number // 4):
            profile[place] = rng.integers(256)
        photo.save(tmp_path / "a.png", icc_profile=bytes(profile))
        assert read_image(tmp_path / "a.png").shape == (3, 48, 64)
    for profile in (b"x", cmyk_profile(), grey_profile(2.0)):  # of another kind of image
        photo.save(tmp_path / "a.png", icc_profile=profile)
        assert (read_image(tmp_path / "a.png") == pixels_of(photo)).all() or profile == grey_profile(2.0)


# --- packages -----------------------------------------------------------------------------------------------


@needs_heif
def test_what_is_heic_is_read_whatever_its_name_says(photo, tmp_path):
    """In a process of its own: there nobody has registered the package yet."""
    register_heif_opener()
    photo.save(tmp_path / "a.heic", quality=95)
    (tmp_path / "a.heic").rename(tmp_path / "photo.jpg")
    code = "import sys; from captioning.data.images import read_image; print(read_image(sys.argv[1]).shape)"
    command = [sys.executable, "-c", code, str(tmp_path / "photo.jpg")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "(3, 48, 64)", result.stderr


@pytest.mark.parametrize(
    "brand, package", [(b"heic", "pip install pillow-heif"), (b"avif", 'pip install "pillow>=11.3"')]
)
def test_a_missing_package_is_named(brand, package, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_heif_is_readable", lambda: False)
    monkeypatch.setattr(images, "FORMATS", ("JPEG", "PNG"))
    for name in ("photo.jpg", f"photo.{brand.decode()}"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(99))
        with pytest.raises(UserError, match=name) as error:
            read_image(tmp_path / name)
        assert package in str(error.value)


# --- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (30000, 40), (40, 30000), (2, 5000)])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_odd_shapes(shape, extension, tmp_path):
    path = tmp_path / f"a.{extension}"
    Image.new("RGB", shape, (200, 10, 60)).save(path)
    width, height = shape
    assert read_image(path).shape == (3, height, width)
    square, small = read_image(path, 32), read_image(path, longest=100)
    assert square.shape == (3, 32, 32) and max(small.shape) <= 100 and min(small.shape) >= 1
    for found in (square, small):
        assert np.abs(found.astype(int).mean(axis=(1, 2)) - (200, 10, 60)).max() < 6
    check_image(path)


def test_large_images_are_read_smaller(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    large = Image.fromarray(values).resize((800, 600), Image.Resampling.BICUBIC)
    large.save(tmp_path / "a.jpg", quality=95)
    large.save(tmp_path / "a.png")
    assert all(read_image(tmp_path / name).shape == (3, 600, 800) for name in ("a.jpg", "a.png"))
    monkeypatch.setattr(images, "FULL", 100_000)
    found = [read_image(tmp_path / name).astype(int) for name in ("a.jpg", "a.png")]
    expected = pixels_of(large.resize((200, 150), Image.Resampling.BOX))
    for pixels in found:
        side = 200 if pixels.shape[2] == 200 else 400
        assert pixels.shape == (3, side * 3 // 4, side)
        reduced = pixels.reshape(3, 150, side // 200, 200, side // 200).mean(axis=(2, 4))
        assert np.abs(reduced - expected).mean() < 2


def test_more_pixels_than_any_image_has(tmp_path, monkeypatch):
    Image.new("1", (30000, 10000)).save(tmp_path / "a.png")  # 40 kB
    with pytest.raises(UserError, match=r"a\.png: says it has more than 268 million pixels") as error:
        read_image(tmp_path / "a.png", 64)
    assert "\n" not in str(error.value)

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(images, "to_array", no_memory)
    Image.new("1", (10, 10)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png: too large for this machine's memory"):
        read_image(tmp_path / "b.png", 64)


def test_an_image_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        Image.new("RGB", (4, 4)).save(path)
        path.chmod(0)
        os.chmod(folder, 0o755)
        root = os.geteuid() == 0
        if root:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"a\.png: cannot be read \(Permission denied\)"):
                read_image(path)
        finally:
            if root:
                os.seteuid(0)
