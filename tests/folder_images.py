"""Folders of images, and a captioner that needs no model: what the tests of folders stand on."""

import os

import torch
from PIL import Image

from captioning.data.images import read_image
from captioning.data.submissions import ScoredCaption
from captioning.decoding.options import DecodingOptions
from captioning.folders.plan import FolderOptions
from captioning.folders.run import caption_folder

BATCH = 4


class ColourCaptioner:
    """Captions an image by its mean colour; counts the images that it has seen.

    kill_at: the number of the batch during which the process "dies": it raises what nobody catches.
    """

    def __init__(self, kill_at: float = float("inf"), word: str = "colour"):
        self.seen, self.batches, self.kill_at, self.word = 0, 0, kill_at, word

    def prepare(self, path):
        return torch.from_numpy(read_image(path, 8))

    def decode_prepared(self, images, options, ids, with_scores=False):
        self.seen += len(images)
        self.batches += 1
        if self.batches == self.kill_at:
            raise Killed
        colours = [" ".join(map(str, image.flatten(1)[:, 0].tolist())) for image in images]
        return [[ScoredCaption(f"{self.word} {colour}")] for colour in colours]


class Killed(BaseException):
    pass


def make_images(folder, count: int, suffix: str = ".png"):
    """Images of one colour each, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (9, 7), (number % 256, number // 256, 200)).save(folder / f"img{number}{suffix}")
    return folder


def run(captioner, folder, output=None, model="model", beam_size=1, decoding=None, **options) -> list[str]:
    options = FolderOptions(folder, output_csv=output, batch_size=BATCH, workers=2, **options)
    return caption_folder(options, lambda: captioner, model, decoding or DecodingOptions(beam_size))


def no_captioner():
    raise AssertionError("a captioner was loaded for nothing")


def add_unreadable_files(folder) -> int:
    """Files with names of images that are none, each in another way; returns how many."""
    before = len(os.listdir(folder))
    good = next(folder.glob("*.png")).read_bytes()
    contents = {
        "empty.jpg": b"",
        "text.jpg": b"no image",
        "cut.png": good[:45],
        "zeros.gif": bytes(4096),
        "header.webp": b"RIFF\x24\0\0\0WEBPVP8 ",
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "broken_link.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "two\nlines.png").write_text("x")
    return len(os.listdir(folder)) - before
