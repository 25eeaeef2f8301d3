"""What a pretrained captioner is trained on: images, or a frozen vision model's outputs, and captions as
tokens. BLIP has a data set of its own; all other families have one of prompted images."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captioning.data.features import REMEDY, is_up_to_date, weights_digest, write_features
from captioning.data.image_names import require_image
from captioning.data.images import parallel_map, read_image
from captioning.data.prepared import Record, Rows, open_dataset
from datasets import LEFT_OR_RIGHT, augment_image
from utils import UserError, pick_device, processes, progress_bar, say

if TYPE_CHECKING:
    from captioning.captioners.blip import BlipCaptioner
    from captioning.captioners.vision_language import VisionLanguageCaptioner

Inputs = dict[str, Tensor]

KEPT_BYTES = 2**31  # of resized images in memory; further ones are read from their files in every epoch


class PromptedDataset:
    """The images of a training, each with its prompt; those that cannot be read are left out.

    Args:
        records: images with their captions.
        workers: threads that read images.

    Attributes:
        records: those whose images can be read.
        problems: what is wrong with the others, a line each.
        features: the vision model's outputs, where they are kept on disk.
    """

    features: Rows | None = None

    def __init__(self, captioner: VisionLanguageCaptioner, records: list[Record], workers: int):
        self.captioner = captioner
        self.workers = workers
        problems = self._find_problems(records)
        self.problems = list(problems.values())
        self.records = [record for record in records if record.image_id not in problems]

    def _find_problems(self, records: list[Record]) -> dict[str, str]:
        """Read all images, each process a share: image_id -> what is wrong, for those that cannot be read."""

        def problem(record: Record) -> tuple[str, str] | None:
            try:
                self.read(record)
            except UserError as error:
                return record.image_id, str(error)
            return None

        state = processes()
        own = records[state.process_index :: state.num_processes]
        results = progress_bar(
            parallel_map(problem, own, self.workers), total=len(own), desc="reading", unit="image"
        )
        problems = [result for result in results if result]
        if state.num_processes > 1:
            from accelerate.utils import gather_object

            problems = gather_object(problems)
        return dict(problems)

    def read(self, record: Record) -> Any:
        """An image as `batches` needs it."""
        return self.captioner.prepare(require_image(record.image_id, record.path))

    def batches(self, batches: list[list[int]], augment_seed: str | None = None) -> Iterator[list[Inputs]]:
        """For each batch of indices what `prepare` gives of its images; threads read ahead."""
        return parallel_map(
            lambda batch: [self.read(self.records[index]) for index in batch], batches, self.workers
        )

    def encode_captions(self, max_length: int, log: Callable[[str], None] = say) -> list[list[list[int]]]:
        """For each record its captions, as they are written, as the tokens that the model is to answer."""
        texts = [[text for text in record.captions if text.strip()] for record in self.records]
        return [[self.captioner.encode_caption(text, max_length) for text in own] for own in texts]

    def inputs(self, images: list[Inputs], captions: list[list[list[int]]]) -> Inputs:
        """A batch for the model: each image once for each of its captions, padded on the right."""
        rows = [
            self.captioner.training_inputs(image, tokens)
            for image, own in zip(images, captions, strict=True)
            for tokens in own
        ]
        return self.captioner.join(rows)

    def predicted(self, tokens: list[int]) -> int:
        """How many of a caption's tokens the loss is on: GIT is given the first."""
        return len(tokens) - (self.captioner.model.config.model_type == "git")


class BlipDataset(PromptedDataset):
    """The images of a training of BLIP, resized once; after `cache_features`, its vision model's outputs."""

    def __init__(self, captioner: BlipCaptioner, records: list[Record], workers: int):
        self.kept: dict[str, Tensor] = {}  # path -> resized image, uint8 (3, S, S)
        self.bytes_left = KEPT_BYTES
        super().__init__(captioner, records, workers)
        self.may_flip = [
            not any(LEFT_OR_RIGHT.search(word) for tokens in record.tokens for word in tokens)
            for record in self.records
        ]

    def encode_captions(self, max_length: int, log: Callable[[str], None] = say) -> list[list[list[int]]]:
        return encode_captions(self.captioner, self.records, max_length, log)

    def inputs(self, images: Tensor, captions: list[list[list[int]]]) -> Inputs:
        """images: pixels (N, 3, S, S) or the vision model's outputs (N, tokens, D)."""
        texts = [tokens for own in captions for tokens in own]
        return {"images": images} | pad_captions(texts, self.captioner.tokenizer.pad_token_id)

    def predicted(self, tokens: list[int]) -> int:
        return len(tokens) - 1  # it is given the first

    def read(self, record: Record) -> Tensor:
        """The image as the processor resizes it, uint8 (3, S, S)."""
        path = require_image(record.image_id, record.path)
        if path in self.kept:
            return self.kept[path]
        image = Image.fromarray(read_image(path).transpose(1, 2, 0))
        pixels = self.captioner.process(image, do_rescale=False, do_normalize=False)[0]
        if self.bytes_left >= pixels.nbytes:
            self.bytes_left -= pixels.nbytes
            self.kept[path] = pixels
        return pixels

    def batches(self, batches: list[list[int]], augment_seed: str | None = None) -> Iterator[Tensor]:
        """For each batch of indices its images as the vision model takes them, float32 (N, 3, S, S).

        After `cache_features` these are the vision model's outputs instead, float16 (N, tokens, D). Threads
        read ahead.

        Args:
            augment_seed: change the images at random, see `augment_image`; how an image is changed depends
                on this seed and its index, not on its batch.
        """

        def image(index: int) -> Tensor:
            pixels = self.read(self.records[index])
            if augment_seed is None:
                return pixels
            return augment_image(pixels, random.Random(f"{augment_seed} {index}"), self.may_flip[index])

        def load(batch: list[int]) -> Tensor:
            if self.features is not None:
                return torch.from_numpy(self.features.read(batch))
            return self.captioner.process([image(index) for index in batch], do_resize=False)

        return parallel_map(load, batches, self.workers)

    @torch.no_grad()
    def cache_features(self, file: str | Path) -> None:
        """Replace the images by the vision model's outputs, read from `file` or first written to it.

        The file's fingerprints are of the vision model's weights, of how images are prepared, and of the
        image files' sizes and modification times.

        Raises:
            UserError: the disk has not enough space.
        """
        vision, device = self.captioner.model.vision_model, pick_device()
        stats = [(r.path, os.stat(r.path).st_size, os.stat(r.path).st_mtime_ns) for r in self.records]
        fingerprints = {
            "weights": weights_digest(vision),
            "preparation": self.captioner.image_processor.to_json_string(),
            "images": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        }
        with processes().main_process_first():
            if not is_up_to_date(file, fingerprints, len(self.records)):
                vision.to(device).eval()
                size, batch_size = len(self.records), 16

                def batches(first: int) -> Iterator[Tensor]:
                    starts = range(first, size, batch_size)
                    return self.batches([[*range(start, min(start + batch_size, size))] for start in starts])

                write_features(
                    file,
                    fingerprints,
                    batches,
                    lambda pixels: vision(pixel_values=pixels.to(device)).last_hidden_state,
                    size,
                    batch_size,
                    "training images",
                )
        self.kept.clear()
        self.features = open_dataset(file, "features", np.float16, 3, REMEDY)


# --- losses -------------------------------------------------------------------------------------------------


class CaptionLoss(nn.Module):
    """BLIP's own training loss, with one encoding of an image for all its captions."""

    def __init__(self, blip: nn.Module):
        """blip: a transformers.BlipForConditionalGeneration."""
        super().__init__()
        self.blip = blip

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy () over the tokens of the captions.

        Args:
            images: pixels (N, 3, S, S) or the vision model's output (N, tokens, D).
            input_ids, attention_mask, labels: (N * G, L), G captions of each image in turn; padding has 0
                in the mask and -100 in the labels.
        """
        images = images.float()
        if images.dim() == 4:
            images = self.blip.vision_model(pixel_values=images).last_hidden_state
        states = images.repeat_interleave(len(input_ids) // len(images), dim=0)
        return self.blip.text_decoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=states, labels=labels
        ).loss


class ModelLoss(nn.Module):
    """The loss that a model of another family computes of its own inputs and labels."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Mean cross-entropy () over the labels."""
        dtype = self.model.dtype
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        return self.model(**inputs, return_dict=True).loss


# --- captions -----------------------------------------------------------------------------------------------


def encode_captions(
    captioner: BlipCaptioner, records: list[Record], max_length: int, log: Callable[[str], None] = say
) -> list[list[list[int]]]:
    """For each record its captions as token ids, `[DEC] ... [SEP]`, at most `max_length` of them.

    They are lower-cased and without punctuation, as in BLIP's own training. log: is told how many are cut.
    """
    start, encoded, lengths = captioner.model.config.text_config.bos_token_id, [], []
    for record in records:
        texts = [" ".join(words) for words in record.tokens if words]
        ids = captioner.tokenizer(texts)["input_ids"]
        encoded.append([[start, *tokens[1:-1][: max_length - 2], tokens[-1]] for tokens in ids])
        lengths += map(len, ids)
    cut = sum(length > max_length for length in lengths)
    if cut:
        share = f"{cut} of {len(lengths)} captions have more than {max_length} tokens, up to {max(lengths)}"
        log(f"{share}, and are cut; --max_length takes longer ones")
    return encoded


def draw_captions(captions: list[list[list[int]]], count: int, seed: str) -> list[list[list[int]]]:
    """`count` captions of each image, no one twice where it has enough; the same in all processes."""
    rng = random.Random(seed)
    return [
        rng.sample(texts, count) if len(texts) >= count else texts + rng.choices(texts, k=count - len(texts))
        for texts in captions
    ]


def pad_captions(captions: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Token ids of N captions -> input_ids, attention_mask, labels, each int64 (N, L).

    Labels are -100 at padding, which leaves it out of the loss.
    """
    length = max(map(len, captions))
    ids = torch.tensor([caption + [pad] * (length - len(caption)) for caption in captions])
    mask = torch.arange(length) < torch.tensor([len(caption) for caption in captions]).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
