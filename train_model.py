"""Fine-tune BLIP or another pretrained captioner: annotations + images -> blip_finetuned_model/.

    python train_model.py                                               # train.csv, train/train/
    python train_model.py --annotations captions.txt --image_folder Images --freeze_vision
    python train_model.py --base_model tiny --annotations demo/train.csv --image_folder demo/train/train
    python train_model.py --resume                                      # go on where it was interrupted
    python train_model.py --base_model Qwen/Qwen2.5-VL-3B-Instruct --lora    # an adapter; docs/captioners.md
    torchrun --nproc_per_node 4 train_model.py --mixed_precision bf16   # several GPUs or machines

After every epoch the model captions the validation images by itself and is scored with BLEU-4 and CIDEr
against all their references; the best epoch's model and processor are kept, to be loaded by direct_caption.py
or by transformers. `--base_model tiny` is a small BLIP with random weights, for which nothing is downloaded.
A resumed training keeps the checkpoint's settings, but for those that are given on the command line, or were
edited below since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from captioning import HUB_MODEL
from captioning.command_line import (
    allow_single,
    check_above_zero,
    check_at_least,
    check_share,
    run_script,
)
from captioning.data.annotations import read_training_splits
from captioning.data.fingerprints import Stamps, stamp_files
from captioning.data.prepared import Record
from captioning.data.tables import Columns
from captioning.decoding.options import DecodingOptions
from captioning.files import lock_folder, named_in_errors
from captioning.training.blip_data import (
    BlipDataset,
    CaptionLoss,
    ModelLoss,
    PromptedDataset,
    draw_captions,
)
from captioning.training.loop import Epoch, Training
from captioning.training.monitor import caption_scores, repair_outputs
from captioning.training.optimization import Run
from captioning.training.resume import (
    Resumed,
    TrainingSettings,
    epochs_since_improvement,
    find_resumable,
)
from captioning.weights.checkpoints import STATES, WEIGHTS, check_content, read_checkpoint
from datasets import BatchSampler
from utils import UserError, check_output, progress_bar, replace_file

if TYPE_CHECKING:  # they import transformers, which takes seconds
    from captioning.captioners.vision_language import VisionLanguageCaptioner


@dataclass
class Settings(TrainingSettings):  # more, such as --resume: captioning/training/resume.py
    # data
    annotations: tuple[str, ...] = ("train.csv",)  # captions to train on, any layout of docs/file_formats.md
    image_folder: tuple[str, ...] = ("train/train",)  # their images
    id_column: str | None = None  # column of the images in tables of any names; None: recognized
    caption_column: str | None = None  # column of the captions; None: recognized
    val_fraction: float = 0.1  # share of images to validate on, where the file names no splits
    output_folder: str = "blip_finetuned_model"  # where the best epoch's model and the checkpoint go
    # model
    base_model: str = HUB_MODEL  # hub id or folder to start from; tiny: a small one with random weights
    freeze_vision: bool = False  # train the text half alone
    max_length: int = 40  # tokens; longer captions are cut
    prompt: str = ""  # what models other than BLIP are asked; empty: as direct_caption.py asks them
    system_prompt: str = ""  # how a chat model is to answer
    # low-rank adapters
    lora: bool = False  # train low-rank adapters of the layers, and save these alone; needs peft
    lora_rank: int = 16  # of the adapters
    lora_alpha: float = 32.0  # what they give is multiplied by this / rank
    lora_dropout: float = 0.05  # share of their inputs that is dropped
    lora_targets: tuple[str, ...] = ()  # ends of layers' names; none: all linear ones of the language model
    load_in_4bit: bool = False  # with lora: the base model's weights in 4 bits, on CUDA
    merge: bool = False  # with lora: at the end write the whole model too, to output_folder/merged
    # optimization
    epochs: int | None = None  # in all, those before a resume counted; None: 3; 50 for tiny
    batch_size: int | None = None  # images that go through the model at once; None: 8; 16 for tiny
    captions_per_image: int | None = None  # drawn anew every epoch; None: 1; 2 for tiny
    learning_rate: float | None = None  # highest; None: 1e-5; 2e-3 for tiny
    lr_schedule: Literal["plateau", "cosine"] = "cosine"  # how the rate falls
    warmup: float = 0.1  # cosine: share of the steps in which the rate rises
    patience: int | None = None  # epochs without a better score; 0: never stop; None: 5; 0 for tiny
    grad_clip: float = 1.0  # bound of the gradients; inf: none
    grad_clip_by: Literal["value", "norm"] = "norm"  # clip each gradient's value or the norm of all together
    gradient_checkpointing: bool = False  # less memory, a third more time
    # regularization
    augment: bool | None = None  # crop, recolour and flip images at random; None: for tiny alone
    weight_decay: float = 0.05  # of AdamW, on matrices alone
    label_smoothing: float | None = None  # share of probability spread over all words; None: 0.1; 0 for tiny
    # run
    cache_features: bool = True  # with freeze_vision: keep the images' features on disk
    keep_checkpoints: int = 1  # epochs whose checkpoints stay, each three times the model's size; 0: all
    val_batch_size: int = 32  # images captioned at a time, greedily
    workers: int = 4  # threads that read images
    seed: int = 123  # of the validation split, order and draws, and tiny's weights

    fixed = ("base_model", "lora", "lora_rank", "lora_targets")
    rate_names = ("learning_rate", "learning_rate")  # with and without weight decay
    output_files = (
        "*.safetensors", "*config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.txt", "merges.txt", "*.jinja", "checkpoint_epoch_*.pth", "last.pth", "history.csv",
        "curves.png", "train.log",
    )  # fmt: skip

    def __post_init__(self):
        allow_single(self, "annotations", "image_folder")
        for name, value in self.model_defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        check_at_least(self, 1, "captions_per_image", "val_batch_size", "workers")
        check_at_least(self, 3, "max_length")
        check_at_least(self, 0, "learning_rate")
        check_share(self, "val_fraction", "lora_dropout")
        check_at_least(self, 1, "lora_rank")
        check_above_zero(self, "lora_alpha")
        if (self.merge or self.load_in_4bit) and not self.lora:
            raise UserError("--merge and --load_in_4bit are for --lora: add it")

    def model_defaults(self) -> dict[str, object]:
        """What None stands for, with this base model."""
        return FOR_TINY if self.base_model == "tiny" else FOR_PRETRAINED

    def defaults(self) -> dict[str, object]:
        """The settings of a run of this base model for which no other was given."""
        defaults = super().defaults()
        unset = {name: value for name, value in self.model_defaults().items() if defaults[name] is None}
        return defaults | unset


FOR_PRETRAINED = {"epochs": 3, "batch_size": 8, "captions_per_image": 1, "learning_rate": 1e-5}
FOR_PRETRAINED |= {"augment": False, "patience": 5, "label_smoothing": 0.1}
FOR_TINY = {"epochs": 50, "batch_size": 16, "captions_per_image": 2, "learning_rate": 2e-3}
FOR_TINY |= {"augment": True, "patience": 0, "label_smoothing": 0.0}


def main(settings: Settings) -> None:
    train(settings)


def train(settings: Settings) -> dict:
    """Run the training; return the best epoch's row of the history: "epoch", "train_loss", "val_cider",
    "val_bleu4", "learning_rate", "seconds".

    Raises:
        UserError: wrong input, or a loss that is no longer a number.
    """
    check_output(settings.output_folder, folder=True, utf8=True)
    threads = torch.get_num_threads()
    try:
        if settings.base_model == "tiny":
            torch.set_num_threads(1)  # too little work in an operation for more: they would wait
        with lock_folder(settings.output_folder):
            repair_outputs(Path(settings.output_folder))
            return run_training(settings)
    finally:
        torch.set_num_threads(threads)


def run_training(settings: Settings) -> dict:
    settings, resumed = resume(settings)
    train_records, val_records = read_records(settings)
    digest = data_digest(train_records, val_records)
    if resumed and resumed.checkpoint["data"] != digest:
        raise UserError(f"{resumed.source}: trained on other images or captions; start without --resume")
    run = Run.start(settings.mixed_precision)
    settings = replace(settings, mixed_precision=run.mixed_precision)  # what is used
    torch.manual_seed(settings.seed)
    captioner, model = build_captioner(settings, train_records, resumed)
    train_set, val_set = build_datasets(captioner, train_records, val_records, settings, run)
    captions = train_set.encode_captions(settings.max_length, run.log)
    captioner.to_device()
    loss_module = (CaptionLoss if isinstance(train_set, BlipDataset) else ModelLoss)(captioner.model)
    optimizer = build_optimizer(model, settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    images = f"{len(captions)} images to train on, {len(val_set.records)} to validate on"
    run.log(f"{settings.base_model}, {trained:,} trained parameters, {images}, {run.describe()}")
    training = Training(
        settings,
        run,
        {"model": model},
        optimizer,
        build_sampler(len(captions), settings, run),
        about={"data": digest, "images": stamp_images(train_records + val_records, settings, run)},
        resumed=resumed,
    )
    with training.stopping_on_signals():
        for epoch in training.epochs():
            epoch.note(learning_rate=optimizer.param_groups[0]["lr"])
            train_one_epoch(epoch, loss_module, train_set, captions, optimizer, settings, run)
            scores, texts = evaluate(captioner, val_set, settings, run)
            is_best = epochs_since_improvement([*training.history, scores], settings.score) == 0
            if run.is_main and is_best:  # before its checkpoint: the best model of any is always there
                save_model(Path(settings.output_folder), captioner)
            epoch.finish(scores, texts)
    if settings.merge and run.is_main:
        save_merged(Path(settings.output_folder))
    return training.report_best()


# --- what is trained, and on what ---------------------------------------------------------------------------


def resume(settings: Settings) -> tuple[Settings, Resumed | None]:
    """The checkpoint to go on from, if there is one, and the settings that then hold."""

    def read(source: Path) -> dict:
        try:
            checkpoint = read_checkpoint(source)
            complete = {"settings", "data", "history", "model"} <= checkpoint.keys()
        except (ValueError, AttributeError):
            complete = False
        if not complete:
            raise UserError(f"{source}: not a checkpoint of train_model.py; start without it")
        check_content(source, checkpoint, STATES | {"settings": dict, "data": str, "model": WEIGHTS})
        return checkpoint

    return find_resumable(settings, read)


def read_records(settings: Settings) -> tuple[list[Record], list[Record]]:
    """The captioned images to train and to validate on: the file's own splits, else `val_fraction`."""
    splits = read_training_splits(
        settings.annotations,
        settings.image_folder,
        settings.val_fraction,
        settings.seed,
        Columns(settings.id_column, settings.caption_column),
    )
    train, val = ([record for record in splits[name] if any(record.tokens)] for name in ("train", "val"))
    return train, val


def stamp_images(records: list[Record], settings: Settings, run: Run) -> Stamps:
    """By what run_pipeline.py knows whether the images have been replaced since."""
    paths = [record.path for record in records if record.path]
    return stamp_files(paths, settings.workers) if run.is_main else {}


def data_digest(*splits: list[Record]) -> str:
    """SHA-256 of image ids and captions; the images' pixels are not read."""
    content = [[(record.image_id, record.captions) for record in records] for records in splits]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def build_captioner(
    settings: Settings, records: list[Record], resumed: Resumed | None
) -> tuple[VisionLanguageCaptioner, nn.Module]:
    """The model to start from, or the checkpoint's, and what of it a checkpoint has: all, or the adapter."""
    from captioning.captioners.blip import tiny_captioner
    from captioning.captioners.loading import add_adapter, load_captioner
    from captioning.captioners.vision_language import freeze_vision

    if settings.base_model == "tiny":
        texts = [" ".join(tokens) for record in records for tokens in record.tokens]
        captioner = tiny_captioner(texts, [record.path for record in records if record.path][:300])
    else:
        captioner = load_captioner(settings.base_model, "fp32", 4 if settings.load_in_4bit else 0)
    model, captioner.max_new_tokens = captioner.model, settings.max_length
    is_blip = model.config.model_type == "blip"
    if is_blip:
        model.config.text_config.label_smoothing = settings.label_smoothing
        model.text_decoder.label_smoothing = settings.label_smoothing
    elif settings.augment:
        raise UserError(f"{settings.base_model}: --augment is for BLIP; leave it out")
    captioner.set_prompt("" if is_blip else settings.prompt, settings.system_prompt)
    if settings.freeze_vision:
        freeze_vision(model)
    trained = model
    if settings.lora:
        add_adapter(
            captioner,
            settings.lora_rank,
            settings.lora_alpha,
            settings.lora_dropout,
            settings.lora_targets,
        )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        trained = nn.ParameterDict({name.replace(".", "/"): p for name, p in named})
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if resumed:
        trained.load_state_dict(resumed.checkpoint["model"])
    return captioner, trained


def build_datasets(
    captioner: VisionLanguageCaptioner,
    train_records: list[Record],
    val_records: list[Record],
    settings: Settings,
    run: Run,
) -> tuple[PromptedDataset, PromptedDataset]:
    """The images that can be read; what is wrong with the others goes to the log."""
    is_blip = captioner.model.config.model_type == "blip"
    build = BlipDataset if is_blip else PromptedDataset
    train_set, val_set = (
        build(captioner, records, settings.workers) for records in (train_records, val_records)
    )
    run.log_many("skipped", train_set.problems + val_set.problems)
    if not train_set.records:
        raise UserError(f"{', '.join(settings.image_folder)}: none of the training images can be used")
    if is_blip and settings.freeze_vision and settings.cache_features:
        train_set.cache_features(f"{Path(settings.output_folder)}_features.hdf5")
    return train_set, val_set


def build_sampler(images: int, settings: Settings, run: Run) -> BatchSampler:
    """Batches of shuffled images; each process gets a share of every one."""
    return BatchSampler(
        images,
        settings.batch_size,
        settings.grad_accumulation,
        run.state.process_index,
        run.state.num_processes,
        shuffle=True,
        seed=settings.seed,
    )


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices; what is frozen has no gradients, and does not change."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},  # biases and norms
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


# --- an epoch -----------------------------------------------------------------------------------------------


def train_one_epoch(
    epoch: Epoch,
    loss_module: CaptionLoss | ModelLoss,
    train_set: PromptedDataset,
    captions: list[list[list[int]]],
    optimizer: torch.optim.AdamW,
    settings: Settings,
    run: Run,
) -> None:
    """One pass over the training images, or the rest of one."""
    loss_module.train()
    seed = f"{settings.seed} {epoch.number}"
    drawn = draw_captions(captions, settings.captions_per_image, seed)
    batches = [request.indices.tolist() for request in epoch.sampler]  # of this process
    augment_seed = seed if settings.augment and train_set.features is None else None
    for step in epoch.steps(train_set.batches(batches, augment_seed)):
        # counted over all processes and micro-batches, so that every token has the same weight
        tokens = sum(train_set.predicted(caption) for index in step.indices for caption in drawn[index])
        for indices, images in step.batches:  # grad_accumulation of them
            texts = [drawn[index] for index in indices]
            inputs = train_set.inputs(images, texts)
            inputs = {name: values.to(run.device, non_blocking=True) for name, values in inputs.items()}
            with run.autocast():
                share = sum(train_set.predicted(caption) for own in texts for caption in own) / tokens
                loss = loss_module(**inputs) * share
            run.backward(loss)
            epoch.record(loss.detach())
        run.reduce_gradients(optimizer)  # over all processes
        run.clip_gradients(optimizer, settings.grad_clip, settings.grad_clip_by)
        run.step(optimizer)


@torch.no_grad()
def evaluate(
    captioner: VisionLanguageCaptioner, val_set: PromptedDataset, settings: Settings, run: Run
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of the model's own greedy captions, each image's counted once: {"val_bleu4", "val_cider"}, 0
    where there is nothing to validate on; the captions by image id."""
    if not val_set.records:
        return {"val_bleu4": 0.0, "val_cider": 0.0}, {}
    captioner.model.eval()
    share = range(run.state.process_index, len(val_set.records), run.state.num_processes)
    size = settings.val_batch_size
    batches = [list(share[start : start + size]) for start in range(0, len(share), size)]
    captions: dict[int, str] = {}
    progress = progress_bar(batches, desc="validation", unit="batch", leave=False, disable=not run.is_main)
    for batch, pixels in zip(progress, val_set.batches(batches)):
        with run.autocast():
            found = captioner.decode_prepared(pixels, DecodingOptions(1))
        captions.update(zip(batch, (own[0].text for own in found)))
    captions = run.gather(captions)
    scores = caption_scores([record.tokens for record in val_set.records], captions)
    return scores, {record.image_id: captions[index] for index, record in enumerate(val_set.records)}


# --- what is kept -------------------------------------------------------------------------------------------


def save_model(output: Path, captioner: VisionLanguageCaptioner) -> None:
    """Put model and processor into the folder, the weights last: all other files are the same in every epoch
    of a run, so that at any moment what lies there is one complete model or, in the first epoch, none."""
    tmp_path = output / f".model.{os.getpid()}.partial"
    try:
        tmp_path.mkdir(parents=True)
        with named_in_errors(output):
            captioner.save(tmp_path)
        for file in sorted(tmp_path.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name)):
            replace_file(file, output / file.name)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


def save_merged(output: Path) -> None:
    """The best epoch's adapter and its base as one whole model."""
    from captioning.captioners.loading import load_captioner, merge_adapter

    captioner = load_captioner(output, "fp32")
    merge_adapter(captioner)
    save_model(output / "merged", captioner)


if __name__ == "__main__":
    run_script(main, Settings)
