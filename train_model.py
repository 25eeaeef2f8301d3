"""Fine-tune BLIP on captioned images: annotations + images -> blip_finetuned_model/.

    python train_model.py                                               # train.csv, train/train/
    python train_model.py --annotations captions.txt --image_folder Images --freeze_vision
    python train_model.py --base_model tiny --annotations demo/train.csv --image_folder demo/train/train
    python train_model.py --resume                                      # go on after the last complete epoch
    accelerate launch train_model.py --mixed_precision bf16             # several GPUs or machines

After every epoch the model captions the validation images by itself and is scored with CIDEr against all
their references; the best epoch's model and processor are kept, to be loaded by direct_caption.py or by
transformers. `--base_model tiny` is a small BLIP with random weights, for which nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn

from captioning.annotations import Record, read_training_splits
from captioning.blip import HUB_MODEL, BlipCaptioner, load_captioner, require_blip
from captioning.tiny_blip import tiny_captioner
from datasets import BlipDataset, encode_captions, pad_captions
from metrics import CiderD, bleu4, tokenize
from utils import (
    UserError,
    archive_previous_run,
    atomic_write,
    check_at_least,
    check_output,
    natural_order,
    progress_bar,
    run_script,
    write_table,
)


@dataclass
class Settings:
    annotations: str = "train.csv"  # captions to train on, any layout that create_input_files.py reads
    image_folder: str = "train/train"  # their images
    val_fraction: float = 0.1  # share of images to validate on, where the file names no splits
    base_model: str = HUB_MODEL  # hub id or folder to start from; tiny: a small one with random weights
    output_folder: str = "blip_finetuned_model"  # where the best epoch's model and the checkpoint go
    resume: bool = False  # go on after the last complete epoch in output_folder
    epochs: int | None = None  # None: 3; 50 for tiny
    batch_size: int | None = None  # images a device and pass; None: 8; 16 for tiny
    captions_per_image: int | None = None  # drawn anew every epoch; None: 1; 2 for tiny
    grad_accumulation: int = 1  # passes a step: a step has batch_size * this * devices images
    augment: bool | None = None  # vary place, size and light of the images a little; None: for tiny alone
    learning_rate: float | None = None  # highest; None: 1e-5; 2e-3 for tiny
    warmup: float = 0.1  # share of the steps in which the rate rises; then it falls as a cosine
    weight_decay: float = 0.05  # of AdamW, on matrices alone
    label_smoothing: float | None = None  # share of probability spread over all words; None: 0.1; 0 for tiny
    grad_clip: float = 1.0  # largest norm of the gradient
    max_length: int = 40  # tokens; longer captions are cut
    freeze_vision: bool = False  # train the text half alone
    cache_features: bool = True  # with freeze_vision: keep the images' features on disk
    gradient_checkpointing: bool = False  # less memory, a third more time
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # on CUDA
    early_stopping: int | None = None  # epochs without a better CIDEr; 0: never; None: 5; 0 for tiny
    val_batch_size: int = 32  # images captioned at a time, greedily
    workers: int = 4  # threads that read images
    seed: int = 123  # of the validation split, order and draws, and tiny's weights

    def __post_init__(self):
        for name, value in (FOR_TINY if self.base_model == "tiny" else FOR_PRETRAINED).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_at_least(self, 1, "epochs", "batch_size", "captions_per_image", "grad_accumulation")
        check_at_least(self, 1, "val_batch_size", "workers")
        check_at_least(self, 3, "max_length")
        check_at_least(self, 0, "learning_rate", "weight_decay", "early_stopping")
        if not self.grad_clip > 0:
            raise UserError(f"--grad_clip is {self.grad_clip}: give more than 0 (inf for no clipping)")
        for name in ("val_fraction", "warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give 0 or more and less than 1")


FOR_PRETRAINED = {"epochs": 3, "batch_size": 8, "captions_per_image": 1, "learning_rate": 1e-5}
FOR_PRETRAINED |= {"augment": False, "early_stopping": 5, "label_smoothing": 0.1}
FOR_TINY = {"epochs": 50, "batch_size": 16, "captions_per_image": 2, "learning_rate": 2e-3}
FOR_TINY |= {"augment": True, "early_stopping": 0, "label_smoothing": 0.0}


def main(settings: Settings) -> None:
    train(settings)


def train(settings: Settings) -> dict:
    """Run the training; return the history's line of the best epoch: "epoch", "train_loss", "val_cider",
    "val_bleu4", "learning_rate", "seconds".

    Raises:
        UserError: wrong input, or a loss that is no longer a number.
    """
    threads = torch.get_num_threads()
    try:
        if settings.base_model == "tiny":
            torch.set_num_threads(1)  # too little work in an operation for more: they would wait
        return run_training(settings)
    finally:
        torch.set_num_threads(threads)


def run_training(settings: Settings) -> dict:
    check_output(settings.output_folder, folder=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    accelerator = start_accelerator(settings)
    torch.manual_seed(settings.seed)
    train_images, val_images = read_images(settings)
    resumed = load_checkpoint(settings, train_images, val_images) if settings.resume else None
    captioner = build_captioner(settings, train_images)
    train_set = BlipDataset(captioner, train_images, settings.workers)
    val_set = BlipDataset(captioner, val_images, settings.workers)
    if not train_set.records:
        raise UserError(f"{settings.image_folder}: none of the training images can be used")
    if settings.freeze_vision and settings.cache_features:
        train_set.cache_features(Path(f"{Path(settings.output_folder)}_features.hdf5"))
    captions = encode_captions(captioner, train_set.records, settings.max_length)

    loss_module = CaptionLoss(captioner.model)
    per_step = settings.batch_size * settings.grad_accumulation * accelerator.num_processes
    steps = math.ceil(len(train_set.records) / per_step)
    optimizer, schedule = build_optimizer(captioner.model, steps * settings.epochs, settings)
    if resumed:
        captioner.model.load_state_dict(resumed["model"])
    loss_module, optimizer = accelerator.prepare(loss_module, optimizer)
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        schedule.load_state_dict(resumed["schedule"])
        if accelerator.scaler and resumed["scaler"]:
            accelerator.scaler.load_state_dict(resumed["scaler"])
    history = resumed["history"] if resumed else []
    trained = sum(p.numel() for p in captioner.model.parameters() if p.requires_grad)
    accelerator.print(
        f"{settings.base_model}, {trained:,} trained parameters, {len(train_set.records)} images to train "
        f"on, {len(val_set.records)} to validate on, {accelerator.num_processes} x {accelerator.device.type}"
    )

    for epoch in range(len(history) + 1, settings.epochs + 1):
        waited = len(history) - 1 - best_epoch(history) if history else 0
        if settings.early_stopping and waited >= settings.early_stopping:
            accelerator.print(f"stopped: no better CIDEr for {waited} epochs")
            break
        torch.manual_seed(settings.seed + epoch)  # an epoch does not depend on what ran before a resume
        began = time.monotonic()
        line = {"epoch": epoch, "learning_rate": schedule.get_last_lr()[0]}
        line["train_loss"] = train_one_epoch(
            loss_module, train_set, captions, optimizer, schedule, settings, accelerator, epoch
        )
        line |= validate(captioner, val_set, settings, accelerator)
        line["seconds"] = time.monotonic() - began
        history.append(line)
        if accelerator.is_main_process:
            checkpoint = {
                "settings": asdict(settings),
                "data": data_digest(train_images, val_images),
                "history": history,
                "model": captioner.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }
            save_epoch(Path(settings.output_folder), captioner, checkpoint)
        accelerator.wait_for_everyone()
        accelerator.print(
            f"epoch {epoch}: loss {line['train_loss']:.3f}; "
            f"validation CIDEr {line['val_cider']:.4f}, BLEU-4 {line['val_bleu4']:.4f}"
        )
    best = history[best_epoch(history)]
    accelerator.print(
        f"best: epoch {best['epoch']} with validation CIDEr {best['val_cider']:.4f}; "
        f"written to {settings.output_folder}/"
    )
    return best


def start_accelerator(settings: Settings) -> Accelerator:
    on_cuda = torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=not on_cuda,  # several processes on the CPU are found only so
        mixed_precision=settings.mixed_precision if on_cuda else "no",
        # the others wait while the main process computes features or writes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    if not on_cuda and settings.mixed_precision != "no":
        accelerator.print("mixed precision is for CUDA; training in float32")
    return accelerator


# --- what is trained on -------------------------------------------------------------------------------------


def read_images(settings: Settings) -> tuple[list[Record], list[Record]]:
    """The captioned images to train and to validate on: the file's own splits, else `val_fraction`."""
    splits = read_training_splits(
        settings.annotations, settings.image_folder, settings.val_fraction, settings.seed
    )
    train, val = ([record for record in splits[name] if any(record.tokens)] for name in ("train", "val"))
    return train, val


def build_captioner(settings: Settings, images: list[Record]) -> BlipCaptioner:
    """The model to start from, with the settings that its own forward pass looks at."""
    if settings.base_model == "tiny":
        texts = [" ".join(words) for image in images for words in image.tokens]
        captioner = tiny_captioner(texts, [image.path for image in images if image.path][:300])
    else:
        captioner = load_captioner(settings.base_model)
        require_blip(captioner, settings.base_model, "fine-tuning")
    model = captioner.model
    model.config.text_config.label_smoothing = settings.label_smoothing
    model.text_decoder.label_smoothing = settings.label_smoothing
    model.vision_model.requires_grad_(not settings.freeze_vision)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return captioner


# --- an epoch -----------------------------------------------------------------------------------------------


class CaptionLoss(nn.Module):
    """BLIP's own training loss, with one encoding of an image for all its captions.

    A module of its own, as it is what Accelerate wraps for several devices.
    """

    def __init__(self, blip: transformers.BlipForConditionalGeneration):
        super().__init__()
        self.blip = blip

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy () over the words of the captions.

        Args:
            images: pixels (N, 3, S, S) or the vision model's output (N, tokens, D).
            input_ids, attention_mask, labels: (N * G, L), G captions of each image in turn; padding has 0
                in the mask and -100 in the labels.
        """
        if images.dim() == 4:
            images = self.blip.vision_model(pixel_values=images).last_hidden_state
        states = images.repeat_interleave(len(input_ids) // len(images), dim=0)
        return self.blip.text_decoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=states, labels=labels
        ).loss


@dataclass
class Pass:
    """What one device sees at once: images by index, their captions, the share of the step's words."""

    images: list[int]
    captions: list[list[int]]
    weight: float


def plan_epoch(
    captions: list[list[list[int]]], settings: Settings, processes: int, rank: int, epoch: int
) -> list[list[Pass]]:
    """The passes of each step for one process. All processes draw the same order and captions.

    The weights make a step the mean over all its words, however they are spread over passes and devices.
    """
    rng = random.Random(f"{settings.seed} {epoch}")
    order = rng.sample(range(len(captions)), len(captions))
    count, passes = settings.captions_per_image, settings.grad_accumulation
    drawn = [
        rng.sample(own, count) if len(own) >= count else own + rng.choices(own, k=count - len(own))
        for own in captions
    ]
    per_step = settings.batch_size * passes * processes
    plan = []
    for start in range(0, len(order), per_step):
        step = order[start : start + per_step]
        words = sum(len(caption) - 1 for index in step for caption in drawn[index])
        parts = [part.tolist() for part in np.array_split(step, passes * processes)]
        mine = []
        for part in parts[rank * passes : (rank + 1) * passes]:
            own = part or step[:1]  # an epoch's last step may have too few: that pass counts for nothing
            texts = [caption for index in own for caption in drawn[index]]
            share = sum(len(caption) - 1 for caption in texts) / words if part else 0.0
            mine.append(Pass(own, texts, share))
        plan.append(mine)
    return plan


def train_one_epoch(
    loss_module: nn.Module,
    train_set: BlipDataset,
    captions: list[list[list[int]]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    settings: Settings,
    accelerator: Accelerator,
    epoch: int,
) -> float:
    """One pass over the training images; return the mean loss of its steps."""
    loss_module.train()
    processes, rank = accelerator.num_processes, accelerator.process_index
    plan = plan_epoch(captions, settings, processes, rank, epoch)
    augment_seed = f"{settings.seed} {epoch}" if settings.augment else None
    loaded = train_set.batches([one.images for step in plan for one in step], augment_seed)
    pad = train_set.captioner.tokenizer.pad_token_id
    total = torch.zeros((), device=accelerator.device)
    quiet = not accelerator.is_main_process
    with progress_bar(plan, desc=f"epoch {epoch}", unit="step", disable=quiet) as progress:
        for number, step in enumerate(progress, start=1):
            for one in step:
                images = next(loaded).to(accelerator.device, torch.float32, non_blocking=True)
                words = {
                    name: t.to(accelerator.device) for name, t in pad_captions(one.captions, pad).items()
                }
                last = one is step[-1]  # gradients are exchanged once a step
                with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(loss_module):
                    loss = loss_module(images, **words) * one.weight
                    accelerator.backward(loss * processes)  # gradients are averaged over the processes
                total += loss.detach()
            accelerator.clip_grad_norm_(loss_module.parameters(), settings.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if number % 10 == 0 or number == len(plan):  # seldom: reading the loss waits for the device
                mean = float(accelerator.reduce(total.clone(), "sum")) / number
                if not math.isfinite(mean):
                    raise UserError(f"the loss is no longer a number in epoch {epoch}: lower --learning_rate")
                progress.set_postfix_str(f"loss {mean:.3f}")
    return mean


@torch.no_grad()
def validate(
    captioner: BlipCaptioner, val_set: BlipDataset, settings: Settings, accelerator: Accelerator
) -> dict[str, float]:
    """Scores of the model's own greedy captions, each image's counted once: {"val_cider", "val_bleu4"}; 0
    where there is nothing to validate on."""
    if not val_set.records:
        return {"val_cider": 0.0, "val_bleu4": 0.0}
    captioner.model.eval()
    own = range(accelerator.process_index, len(val_set.records), accelerator.num_processes)
    size = settings.val_batch_size
    batches = [list(own[start : start + size]) for start in range(0, len(own), size)]
    found: list[tuple[int, str]] = []
    quiet = not accelerator.is_main_process
    progress = progress_bar(batches, desc="validation", unit="batch", leave=False, disable=quiet)
    for batch, pixels in zip(progress, val_set.batches(batches)):
        with accelerator.autocast():
            texts = captioner.caption_prepared(pixels, num_beams=1, max_new_tokens=settings.max_length)
        found += zip(batch, texts)
    hypotheses = dict(gather_object(found)) if accelerator.num_processes > 1 else dict(found)
    references = [image.tokens for image in val_set.records]
    words = [tokenize(hypotheses[index]) for index in range(len(references))]
    scores = CiderD.from_references(references).score(references, words)
    return {"val_cider": math.fsum(scores) / len(scores), "val_bleu4": bleu4(references, words)}


def build_optimizer(
    model: nn.Module, steps: int, settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and a rate that rises for `warmup` of the steps and falls to 0 as a cosine."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},  # biases and norms
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    warmup = round(settings.warmup * steps)
    return optimizer, transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)


# --- what is kept -------------------------------------------------------------------------------------------


OUTPUT_FILES = (
    "*.safetensors", "*config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "checkpoint_epoch_*.pth", "history.csv",
)  # fmt: skip


def best_epoch(history: list[dict]) -> int:
    """Index of the epoch with the highest CIDEr; of equal ones the first, or without validation the last."""
    if not any(line["val_cider"] for line in history):
        return len(history) - 1
    return max(range(len(history)), key=lambda index: history[index]["val_cider"])


def data_digest(*splits: list[Record]) -> str:
    """A fingerprint of images and captions."""
    content = [[(image.image_id, image.captions) for image in images] for images in splits]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def last_checkpoint(settings: Settings) -> Path | None:
    files = Path(settings.output_folder).glob("checkpoint_epoch_*.pth")
    return max(files, key=lambda file: natural_order(file.name), default=None)


def same_run(settings: Settings) -> list[dict] | None:
    """The history of what was trained in the output folder, if with these settings and on these data."""
    file = last_checkpoint(settings)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        same = checkpoint["settings"] | {"resume": False} == asdict(settings) | {"resume": False}
        same = same and checkpoint["data"] == data_digest(*read_images(settings))
    except UserError:
        raise
    except Exception:  # no file, or none of ours
        return None
    return checkpoint["history"] if same else None


def load_checkpoint(settings: Settings, train_images: list[Record], val_images: list[Record]) -> dict:
    """The checkpoint of the last complete epoch in the output folder.

    Raises:
        UserError: there is none, it is damaged, it has all its epochs, or is of other data or another model.
    """
    file = last_checkpoint(settings)
    if file is None:
        raise UserError(f"{settings.output_folder}: no checkpoint_epoch_N.pth in it; start without --resume")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        earlier, history = checkpoint["settings"], checkpoint["history"]
    except Exception:  # a file that is no checkpoint fails in any of pickle's, zipfile's or torch's ways
        raise UserError(f"{file}: not a checkpoint of train_model.py; start without --resume") from None
    for name in ("base_model", "freeze_vision"):
        if earlier[name] != getattr(settings, name):
            raise UserError(
                f"{file}: trained with --{name} {earlier[name]}; give that, or start without --resume"
            )
    if checkpoint["data"] != data_digest(train_images, val_images):
        raise UserError(f"{file}: trained on other images or captions; start without --resume")
    if len(history) >= settings.epochs:
        raise UserError(f"{file} has its {len(history)} epochs: raise --epochs to go on")
    return checkpoint


def save_epoch(output: Path, captioner: BlipCaptioner, checkpoint: dict) -> None:
    """Write the epoch's checkpoint in place of the one before, history.csv, and the model where it is the
    best."""
    history = checkpoint["history"]
    if len(history) == 1:
        archive_previous_run(output, *OUTPUT_FILES)
    if best_epoch(history) == len(history) - 1:
        save_model(output, captioner)
    file = output / f"checkpoint_epoch_{len(history)}.pth"
    with atomic_write(file) as tmp_path:
        torch.save(checkpoint, tmp_path)
    for older in output.glob("checkpoint_epoch_*.pth"):
        if older != file:
            older.unlink()
    write_table(output / "history.csv", history)


def save_model(output: Path, captioner: BlipCaptioner) -> None:
    """Put model and processor into the folder, the weights last: all other files are the same in every epoch
    of a run, so that at any moment what lies there is one complete model or, in the first epoch, none."""
    tmp_path = output / f".model.{os.getpid()}.partial"
    try:
        tmp_path.mkdir(parents=True)
        captioner.save(tmp_path)
        for file in sorted(tmp_path.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name)):
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


if __name__ == "__main__":
    run_script(main, Settings)
