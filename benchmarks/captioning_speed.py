"""Images captioned a second, beside a plain textbook implementation on the same images and weights.

    python benchmarks/captioning_speed.py

Evaluation: the textbook goes over a split as its data set holds it, each image once for each of its
captions, one at a time, encoder included; we search batches of images, each once, from the images and
from their cached features. Both must find the same captions, or the script stops with an error.

The search from cached features with and without `no_repeat_ngram` 3, in turn.

Captioning a folder: `caption_images` on JPEG files, from the call to the written CSV, beside the encoder's
forward passes alone on the same images, already read; and the share of the journal in it.

The encoder's weights are random. The decoder is first trained for a few steps on a made-up caption of each
image of the split, so that captions end as captions do and hypotheses are clearly apart. On two CPU cores
it takes about five minutes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import make_captions, make_images, make_word_map, random_encoder, timed, write_images
from torch import Tensor

import train
from caption import caption_images
from captioning.command_line import check_at_least, run_script
from captioning.data.features import encode_images
from captioning.data.images import read_image
from captioning.data.prepared import END, START
from captioning.decoding.beam_search import beam_search
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.options import NO_RULES, WordRules
from captioning.decoding.teacher_forcing import token_logits
from captioning.folders.journal import Journal
from models import DecoderWithAttention, Encoder, normalize_images
from tests.reference import TextbookDecoder, TextbookEncoder, textbook_search
from utils import pick_device


@dataclass
class Settings:
    encoder_name: str = "resnet101"  # a torchvision ResNet
    image_size: int = 256  # pixels
    vocabulary: int = 9490  # entries of the word map; COCO has as many with words seen five times
    width: int = 512  # of embeddings, attention and LSTM
    images: int = 32  # in the split
    textbook_images: int = 6  # of these, which the textbook captions too
    captions_per_image: int = 5  # how often the textbook captions each
    batch_size: int = 32  # images that we search at a time
    rule_rounds: int = 15  # searches with and without no_repeat_ngram, of which the medians are compared
    training_steps: int = 40  # of the decoder, before anything is timed
    folder_images: int = 128  # JPEG files of 640 x 480 pixels
    folder_beam_size: int = 3  # hypotheses, for the folder
    seed: int = 0  # of weights, images and captions

    def __post_init__(self):
        check_at_least(self, 1, "captions_per_image", "batch_size", "textbook_images", "folder_images")
        check_at_least(self, 1, "rule_rounds")
        check_at_least(self, self.textbook_images, "images")


def main(settings: Settings) -> None:
    device = pick_device()
    print(
        f"{settings.encoder_name}, images of {settings.image_size} pixels, {settings.vocabulary} words, "
        f"on {device} ({torch.get_num_threads()} threads)"
    )
    word_map = make_word_map(settings.vocabulary)
    encoder = random_encoder(settings.encoder_name, settings.seed, device)
    images = make_images(settings.images, settings.image_size, settings.image_size, settings.seed)
    features = torch.cat([encode_images(encoder, part.to(device)).half().cpu() for part in images.split(32)])
    decoder = train_decoder(features, settings, device)
    compare_evaluation(encoder, decoder, images, features, word_map, settings, device)
    compare_rules(decoder, features, word_map, settings, device)
    with tempfile.TemporaryDirectory() as folder:
        compare_folder(encoder, decoder, word_map, Path(folder), settings, device)


def train_decoder(features: Tensor, settings: Settings, device: torch.device) -> DecoderWithAttention:
    """A decoder that has half learned a caption of each image."""
    torch.manual_seed(settings.seed)
    width = settings.width
    decoder = DecoderWithAttention(width, width, width, settings.vocabulary, features.shape[3], dropout=0)
    use_fast_energies(decoder.to(device))
    captions, lengths = make_captions(len(features), 1, settings.vocabulary, 50, settings.seed)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    for _ in range(settings.training_steps):
        tokens = token_logits(decoder, features.float().to(device), captions, lengths)
        loss = F.cross_entropy(tokens.logits, tokens.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder.eval()


def compare_evaluation(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    images: Tensor,
    features: Tensor,
    word_map: dict[str, int],
    settings: Settings,
    device: torch.device,
) -> None:
    start, end, size = word_map[START], word_map[END], settings.batch_size
    textbook_encoder, textbook = make_textbook(encoder, decoder, settings, device)

    def textbook_captions(beam_size: int, chosen: Tensor) -> list[list[int]]:
        captions = []
        for image in chosen:
            for _ in range(settings.captions_per_image):
                normalized = normalize_images(image.to(device))
                found = textbook_search(textbook_encoder, textbook, normalized, start, end, beam_size)
            captions.append(found)
        return captions

    def search(grids: Iterable[Tensor], beam_size: int) -> list[list[int]]:
        found = (beam_search([decoder], [grid], start, end, beam_size) for grid in grids)
        return [hypothesis.words for batch in found for hypothesis in batch]

    def from_images(beam_size: int, chosen: Tensor) -> list[list[int]]:
        return search((encode_images(encoder, part.to(device)) for part in chosen.split(size)), beam_size)

    def from_features(beam_size: int, chosen: Tensor) -> list[list[int]]:
        return search((part.to(device).float() for part in chosen.split(size)), beam_size)

    ways = {
        "textbook": (textbook_captions, images[: settings.textbook_images]),
        "ours, from images": (from_images, images),
        "ours, from cached features": (from_features, features),
    }
    for way, chosen in ways.values():
        way(1, chosen[:1])  # warms up
    for beam_size in (1, 3, 5):
        print(f"evaluation with beam {beam_size}, images a second:")
        rate, expected = None, None
        for name, (way, chosen) in ways.items():
            captions, seconds = timed(way, beam_size, chosen, device=device)
            line = f"    {name}: {len(chosen) / seconds:.2f} ({len(chosen)} images"
            if expected is None:
                rate, expected = len(chosen) / seconds, captions
                print(f"{line}, {settings.captions_per_image} times each)")
                continue
            print(f"{line}, {len(chosen) / seconds / rate:.1f} times the textbook's)", flush=True)
            different = sum(ours != theirs for ours, theirs in zip(captions, expected))
            if different:
                sys.exit(f"{different} of {len(expected)} captions differ from the textbook's")
        words = sum(map(len, captions)) / len(captions)
        print(
            f"    the same captions, {words:.1f} words on average, {len(set(map(tuple, captions)))} different"
        )


def make_textbook(
    encoder: Encoder, decoder: DecoderWithAttention, settings: Settings, device: torch.device
) -> tuple[TextbookEncoder, TextbookDecoder]:
    """The textbook's models with the weights of ours."""
    textbook_encoder = TextbookEncoder(encoder.name)
    textbook_encoder.load_state_dict(encoder.state_dict())
    width = settings.width
    textbook = TextbookDecoder(width, width, width, settings.vocabulary, encoder.dim)
    textbook.load_state_dict(decoder.state_dict())
    return textbook_encoder.to(device), textbook.to(device)


def compare_rules(
    decoder: DecoderWithAttention,
    features: Tensor,
    word_map: dict[str, int],
    settings: Settings,
    device: torch.device,
) -> None:
    start, end = word_map[START], word_map[END]
    grids = [part.to(device).float() for part in features.split(settings.batch_size)]

    def search(beam_size: int, rules: WordRules) -> list[list[int]]:
        found = (beam_search([decoder], [grid], start, end, beam_size, rules=rules) for grid in grids)
        return [hypothesis.words for batch in found for hypothesis in batch]

    for beam_size in (1, 3, 5):
        seconds, words = {}, {}
        for _ in range(settings.rule_rounds):
            for rules in (NO_RULES, WordRules(no_repeat_ngram=3)):
                captions, taken = timed(search, beam_size, rules, device=device)
                seconds.setdefault(rules, []).append(taken)
                words[rules] = sum(map(len, captions)) / len(captions)
        plain, bound = (median(own) for own in seconds.values())
        lengths = " and ".join(f"{own:.1f}" for own in words.values())
        print(
            f"no_repeat_ngram 3 with beam {beam_size}: {bound / plain:.3f} times as long as without, "
            f"medians of {settings.rule_rounds}, {lengths} words on average",
            flush=True,
        )


def compare_folder(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    word_map: dict[str, int],
    folder: Path,
    settings: Settings,
    device: torch.device,
) -> None:
    checkpoint = folder / "checkpoint.pth"
    write_checkpoint(checkpoint, encoder, decoder, word_map, settings)
    paths = write_images(folder / "images", settings.folder_images, 480, 640, settings.seed)
    write_images(folder / "one", 1, 480, 640, settings.seed)
    images = torch.stack([torch.from_numpy(read_image(path, settings.image_size)) for path in paths])

    def encode() -> None:
        for part in images.split(settings.batch_size):
            encode_images(encoder, part.to(device))

    def caption(images_folder: str) -> None:
        caption_images(
            checkpoint,
            checkpoint,
            None,
            folder / images_folder,
            folder / f"{images_folder}.csv",
            settings.folder_beam_size,
            batch_size=settings.batch_size,
        )

    print(f"a folder of {len(paths)} JPEG files, beam {settings.folder_beam_size}:", flush=True)
    _, one = timed(caption, "one", device=device)
    _, encoding = timed(encode, device=device)
    journal = 0.0
    append = Journal.append

    def timed_append(*arguments) -> None:
        nonlocal journal
        journal += timed(append, *arguments)[1]

    with patch.object(Journal, "append", timed_append):
        _, captioning = timed(caption, "images", device=device)
    print(f"    encoder alone: {len(paths) / encoding:.2f} images a second")
    print(f"    captioning: {len(paths) / captioning:.2f}, takes {captioning / encoding:.2f} times as long")
    print(f"    less the {one:.1f} s of a folder with one image: {(captioning - one) / encoding:.2f} times")
    print(f"    the journal takes {journal:.4f} s, {journal / captioning:.3%} of it")


def write_checkpoint(
    file: Path, encoder: Encoder, decoder: DecoderWithAttention, word_map: dict[str, int], settings: Settings
) -> None:
    """A checkpoint as train.py writes it, as far as captioning reads it."""
    width = settings.width
    trained = train.Settings(
        encoder_name=settings.encoder_name, emb_dim=width, attention_dim=width, decoder_dim=width
    )
    content = {
        "settings": asdict(trained),
        "word_map": word_map,
        "data": {"settings": {"image_size": settings.image_size}},
        "history": [],
        "encoder": encoder.state_dict(),
        "decoder": decoder.state_dict(),
    }
    torch.save(content, file)


if __name__ == "__main__":
    run_script(main, Settings)
