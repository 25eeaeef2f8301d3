"""Train Show, Attend and Tell on what create_input_files.py prepared: data_output/ -> output_models/.

    python train.py
    python train.py --encoder_name efficientnet_lite2 --epochs 20
    python train.py --checkpoint output_models/checkpoint_epoch_3.pth --epochs 10    # go on after epoch 3
    python train.py --fine_tune_encoder --fine_tune_after 10 --augment --epochs 30   # decoder, then both
    torchrun --nproc_per_node 4 train.py                                             # on four GPUs

After every epoch the model captions the validation images by itself (greedy decoding, no true words put
in) and is scored with BLEU-4 and CIDEr against all their references; the best epoch is kept as
best_checkpoint.pth, encoder.pth, decoder.pth.
"""

from __future__ import annotations

import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor
from torch.utils.data import DataLoader

from captioning.captioner import Captioner
from captioning.checkpoints import decoder_from, encoder_from, load_checkpoint, save_checkpoint
from captioning.features import cache_features, encode_images
from captioning.fused_decoder import caption_logits
from captioning.pretrained import build_encoder, load_embeddings
from datasets import BatchSampler, CaptionDataset, read_prepared
from metrics import CiderD, bleu4, tokenize
from models import DecoderWithAttention, Encoder, normalize_images
from utils import (
    UserError,
    archive_previous_run,
    atomic_write,
    check_at_least,
    check_output,
    pick_device,
    processes,
    progress_bar,
    read_json,
    run_script,
    write_table,
)


@dataclass
class Settings:
    data_folder: str = "data_output"  # what create_input_files.py wrote
    output_folder: str = "output_models"  # where checkpoints go
    encoder_name: str = "resnet101"  # any torchvision ResNet, efficientnet_lite0, efficientnet_lite2
    encoder_weights: str = "imagenet"  # imagenet (download or pip package), a file, or none
    emb_dim: int = 512  # width of word embeddings
    attention_dim: int = 512  # width of the attention's hidden layer
    decoder_dim: int = 512  # width of the LSTM
    dropout: float = 0.5  # before the word scores
    epochs: int = 3  # in all, those before a resumed checkpoint counted
    batch_size: int = 16  # images that go through the models at once; each brings all its captions
    grad_accumulation: int = 1  # batches a step: big steps on a small GPU
    workers: int = 2  # processes that load batches
    encoder_lr: float = 1e-4  # learning rate of the encoder, where it is fine-tuned
    decoder_lr: float = 4e-4  # learning rate of the decoder
    grad_clip: float = 5.0  # gradients are clipped to [-grad_clip, grad_clip]
    alpha_c: float = 1.0  # weight of the doubly stochastic penalty (Xu et al., equation 14)
    fine_tune_encoder: bool = False  # train the encoder's convolutional blocks 2 to 4 too
    fine_tune_after: int = 0  # but only after this many epochs
    augment: bool = False  # crop, recolour and flip images at random while the encoder is trained
    cache_features: bool = True  # encode each image once and keep the result, where the encoder is frozen
    checkpoint: str | None = None  # resume from this file
    embeddings: str | None = None  # start from these word vectors (GloVe text file); sets emb_dim
    fine_tune_embeddings: bool = True  # train the word embeddings
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # on CUDA
    select_by: Literal["bleu4", "cider"] = "bleu4"  # score by which the best epoch is chosen
    seed: int = 123  # of weights, order and dropout

    def __post_init__(self):
        check_at_least(self, 1, "emb_dim", "attention_dim", "decoder_dim", "epochs", "batch_size")
        check_at_least(self, 1, "grad_accumulation")
        check_at_least(self, 0, "fine_tune_after", "workers", "encoder_lr", "decoder_lr", "alpha_c")
        if not self.grad_clip > 0:
            raise UserError(f"--grad_clip is {self.grad_clip}: give more than 0 (inf for no clipping)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}: give 0 or more and less than 1")
        if (self.augment or self.fine_tune_after) and not self.fine_tune_encoder:
            raise UserError("--augment and --fine_tune_after go with --fine_tune_encoder: add it")


DECAY_AFTER, DECAY, STOP_AFTER = 8, 0.8, 20  # epochs without a better score


def main(settings: Settings) -> None:
    train(settings)


def train(settings: Settings) -> dict:
    """Run the training; return the history's line of the best epoch."""
    torch.manual_seed(settings.seed)
    state, device = processes(), pick_device()
    say = print if state.is_main_process else lambda *_: None
    check_output(settings.output_folder, folder=True)
    if "val" not in read_prepared(settings.data_folder)["splits"]:
        raise UserError(
            f"{settings.data_folder}: no val split to choose the best epoch by; prepare it with "
            f"--val_fraction 0.1"
        )
    word_map = read_json(Path(settings.data_folder) / "word_map.json")
    resumed = None
    if settings.checkpoint:
        own_words = Path(settings.data_folder) / "word_map.json"
        resumed = load_checkpoint(settings.checkpoint, "encoder", "decoder", word_map_path=own_words)
    settings, encoder, decoder = build_models(settings, word_map, resumed)
    decoder.embedding.requires_grad_(settings.fine_tune_embeddings)
    encoder, decoder = encoder.to(device), decoder.to(device)
    scaler = torch.amp.GradScaler(
        device.type, enabled=device.type == "cuda" and settings.mixed_precision == "fp16"
    )
    if device.type == "cpu" and settings.mixed_precision != "no":
        say("mixed precision is for CUDA; training in float32")
    references = [[tokenize(c) for c in captions] for captions in load_references(settings, "val")]

    # a checkpoint of elsewhere brings weights, but no epochs that were scored as ours are
    history = [line for line in resumed["history"] if "val_bleu4" in line] if resumed else []
    done = len(history)
    if done >= settings.epochs:
        raise UserError(f"{settings.checkpoint} has its {done} epochs: raise --epochs to go on")
    output = Path(settings.output_folder)
    same_folder = resumed and Path(settings.checkpoint).resolve().parent == output.resolve()
    count = sum(parameter.numel() for parameter in decoder.parameters())
    say(f"{settings.encoder_name}, decoder of {count:,} parameters, on {state.num_processes} x {device.type}")

    optimizers: dict[str, torch.optim.Optimizer] = {}
    fine_tuned = None  # whether the encoder is open; not yet known
    for epoch in range(done + 1, settings.epochs + 1):
        open_encoder = settings.fine_tune_encoder and epoch > settings.fine_tune_after
        if open_encoder != fine_tuned:
            fine_tuned = open_encoder
            encoder.fine_tune(fine_tuned)
            say(f"from epoch {epoch} on the encoder is {'fine-tuned' if fine_tuned else 'frozen'}")
            earlier = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            earlier = earlier or (resumed or {}).get("optimizers", {})
            optimizers = build_optimizers(encoder, decoder, settings, earlier)
            train_loader, val_loader = build_loaders(encoder, settings, device, fine_tuned)
        if epoch == done + 1 and not same_folder and state.is_main_process:
            archive_previous_run(output, *OUTPUT_FILES)
        waited = epochs_since_best(history, settings.select_by)
        if waited >= STOP_AFTER:
            say(f"stopped: no better {settings.select_by} for {STOP_AFTER} epochs")
            break
        if waited and waited % DECAY_AFTER == 0:
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] *= DECAY
        # order and dropout of an epoch do not depend on a resume; dropout differs between processes
        torch.manual_seed(settings.seed + epoch + 1000 * state.process_index)
        train_loader.sampler.start_epoch(epoch)
        began = time.monotonic()
        line = {"epoch": epoch}
        line |= train_one_epoch(encoder, decoder, train_loader, optimizers, scaler, settings, device, epoch)
        line |= validate(encoder, decoder, val_loader, references, word_map, settings, device)
        line |= {
            "decoder_lr": optimizers["decoder"].param_groups[0]["lr"],
            "seconds": time.monotonic() - began,
        }
        history.append(line)
        if state.is_main_process:
            save_epoch(output, encoder, decoder, optimizers, history, word_map, settings)
        say(
            f"epoch {epoch}: loss {line['train_loss']:.3f}, {line['captions_per_second']:.0f} captions/s; "
            f"validation loss {line['val_loss']:.3f}, top-5 {line['val_top5']:.1%}, "
            f"BLEU-4 {line['val_bleu4']:.4f}, CIDEr {line['val_cider']:.4f}"
        )
    best = history[best_epoch(history, settings.select_by)]
    say(
        f"best: epoch {best['epoch']} with validation BLEU-4 {best['val_bleu4']:.4f}, "
        f"CIDEr {best['val_cider']:.4f}; written to {output}/"
    )
    return best


# --- what is trained ----------------------------------------------------------------------------------------


def build_models(
    settings: Settings, word_map: dict[str, int], resumed: dict | None
) -> tuple[Settings, Encoder, DecoderWithAttention]:
    """New models, or those of the checkpoint, whose shape then replaces that of the settings."""
    if resumed:
        shape = ("encoder_name", "emb_dim", "attention_dim", "decoder_dim")
        for name in shape:
            if resumed["settings"][name] != getattr(settings, name) and processes().is_main_process:
                print(f"--{name} is the checkpoint's: {resumed['settings'][name]}")
        settings = replace(settings, **{name: resumed["settings"][name] for name in shape})
        decoder = decoder_from(resumed, settings.checkpoint)
        decoder.dropout.p = settings.dropout
        return settings, encoder_from(resumed, settings.checkpoint), decoder
    embeddings = None
    if settings.embeddings:
        embeddings, found = load_embeddings(settings.embeddings, word_map)
        print(f"{settings.embeddings}: has {found} of {len(word_map)} words")
        settings = replace(settings, emb_dim=embeddings.shape[1])
    encoder = build_encoder(settings.encoder_name, settings.encoder_weights)
    decoder = DecoderWithAttention(
        settings.attention_dim,
        settings.emb_dim,
        settings.decoder_dim,
        len(word_map),
        encoder.dim,
        settings.dropout,
    )
    if embeddings is not None:
        decoder.embedding.weight.data.copy_(embeddings)
    return settings, encoder, decoder


def build_optimizers(
    encoder: Encoder, decoder: DecoderWithAttention, settings: Settings, earlier: dict[str, dict]
) -> dict[str, torch.optim.Optimizer]:
    """Adam for what is open to training, with its `earlier` state where that fits."""
    optimizers = {}
    for name, module, lr in (
        ("decoder", decoder, settings.decoder_lr),
        ("encoder", encoder, settings.encoder_lr),
    ):
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if parameters:
            optimizers[name] = torch.optim.Adam(parameters, lr=lr, fused=True)
    for name, state in earlier.items():
        same = name in optimizers and len(state["param_groups"][0]["params"]) == len(
            optimizers[name].param_groups[0]["params"]
        )
        if same:  # not where what is trained has changed, as when the encoder is opened
            optimizers[name].load_state_dict(state)
    return optimizers


def build_loaders(
    encoder: Encoder, settings: Settings, device: torch.device, fine_tuned: bool
) -> tuple[DataLoader, DataLoader]:
    """Batches of this process for training and validation: images, or a frozen encoder's features."""
    state, loaders = processes(), []
    for split in ("train", "val"):
        shuffle, features = split == "train", None
        augment = settings.augment and fine_tuned and split == "train"
        dataset = CaptionDataset(settings.data_folder, split, augment=augment)  # complain before long work
        if settings.cache_features and not fine_tuned:
            with state.main_process_first():
                features = cache_features(encoder, settings.data_folder, split, device)
            dataset = CaptionDataset(settings.data_folder, split, features)
        sampler = BatchSampler(
            len(dataset),
            settings.batch_size,
            settings.grad_accumulation if split == "train" else 1,
            state.process_index,
            state.num_processes,
            shuffle,
            settings.seed,
        )
        loader = DataLoader(
            dataset,
            batch_size=None,  # the dataset reads a batch at a time
            sampler=sampler,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # so that starting workers draws nothing from the training's
        )
        loaders.append(loader)
    return loaders[0], loaders[1]


def load_references(settings: Settings, split: str) -> list[list[str]]:
    return read_json(Path(settings.data_folder) / f"{split}_references.json")


# --- an epoch -----------------------------------------------------------------------------------------------


def train_one_epoch(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    loader: DataLoader,
    optimizers: dict[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    settings: Settings,
    device: torch.device,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training images: {"train_loss", "captions_per_second"}."""
    decoder.train()
    state, sampler = processes(), loader.sampler
    lengths_of = loader.dataset.lengths  # (I, N_c)
    parameters = [
        p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]
    ]
    total, captions_done, began = torch.zeros((), device=device), 0, time.monotonic()
    batches = iter(loader)
    with progress_bar(
        sampler.steps, desc=f"epoch {epoch}", unit="step", disable=not state.is_main_process
    ) as progress:
        for step, indices in enumerate(progress, start=1):
            # the step's words and captions, of all processes: every word counts alike, wherever it is
            words, captions = int((lengths_of[indices] - 1).sum()), lengths_of[indices].size
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            for _ in range(sampler.accumulation_steps):
                with autocast(settings, device):
                    entropy, penalty, _, _ = caption_loss(encoder, decoder, *next(batches), device)
                    loss = entropy / words + settings.alpha_c * penalty / captions
                scaler.scale(loss).backward()
                total += loss.detach()
            add_gradients(parameters, state)
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_value_(parameters, settings.grad_clip)
            for optimizer in optimizers.values():
                scaler.step(optimizer)
            scaler.update()
            captions_done += captions
            if step % 10 == 0 or step == len(sampler.steps):  # seldom: reading the loss waits for the device
                if not math.isfinite(total):
                    raise UserError(
                        f"the loss is no longer a number in epoch {epoch}: lower --decoder_lr or --encoder_lr"
                    )
                rate = captions_done / (time.monotonic() - began)
                shown = total * state.num_processes / step  # the others' shares are about as large
                progress.set_postfix_str(f"loss {shown:.3f}, {rate:.0f} captions/s")
    total = reduce(total, "sum")
    return {"train_loss": float(total) / len(sampler.steps), "captions_per_second": rate}


def add_gradients(parameters: list[Tensor], state: PartialState) -> None:
    """Add up the processes' gradients, each a share of the step's."""
    if state.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    added = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    for gradient, values in zip(gradients, added.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(values.view_as(gradient))


@torch.no_grad()
def validate(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    loader: DataLoader,
    references: list[list[list[str]]],
    word_map: dict[str, int],
    settings: Settings,
    device: torch.device,
) -> dict[str, float]:
    """Teacher-forced loss and top-5 accuracy, BLEU-4 and CIDEr of greedy captions: {"val_loss", "val_top5",
    "val_bleu4", "val_cider"}, of all processes' images."""
    decoder.eval()
    captioner = Captioner([(encoder, decoder)], word_map)
    sums, hypotheses = torch.zeros(5, dtype=torch.float64), []
    for images, captions, lengths in progress_bar(
        loader, desc="validation", unit="batch", leave=False, disable=not processes().is_main_process
    ):
        with autocast(settings, device):
            entropy, penalty, scores, targets = caption_loss(
                encoder, decoder, images, captions, lengths, device
            )
            found = captioner.search([encode(encoder, images, device)], beam_size=1)
        right = (scores.topk(min(5, scores.shape[1])).indices == targets.unsqueeze(1)).sum()
        counts = (entropy, penalty, right, len(targets), lengths.numel())
        sums += torch.tensor([float(count) for count in counts], dtype=torch.float64)
        hypotheses += [tokenize(captioner.text(hypothesis)) for hypothesis in found]
    indices = [index for request in loader.sampler for index in request.indices.tolist()]
    gathered = gather_object([(sums, dict(zip(indices, hypotheses, strict=True)))])
    entropy, penalty, right, words, captions = sum(part[0] for part in gathered).tolist()
    by_index = {index: words_ for part in gathered for index, words_ in part[1].items()}
    hypotheses = [by_index[index] for index in range(len(references))]
    return {
        "val_loss": entropy / words + settings.alpha_c * penalty / captions,
        "val_top5": right / words,
        "val_bleu4": bleu4(references, hypotheses),
        "val_cider": fmean(CiderD.from_references(references).score(references, hypotheses)),
    }


def caption_loss(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    images: Tensor,
    captions: Tensor,
    lengths: Tensor,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy summed over the words, doubly stochastic penalty summed over the captions.

    Args:
        images: uint8 (N, 3, S, S) or features (N, h, w, D); captions (N, G, L); lengths (N, G).

    Returns:
        entropy (), penalty (), scores (W, V), targets (W,).
    """
    grid = encode(encoder, images, device)
    scores, targets, coverage = caption_logits(decoder, grid, captions.flatten(0, 1), lengths.flatten())
    entropy = F.cross_entropy(scores, targets, reduction="sum")
    # every pixel should get a total weight of one over the caption (Xu et al., section 4.2.1)
    penalty = ((1 - coverage) ** 2).mean(dim=1).sum()
    return entropy, penalty, scores, targets


def encode(encoder: Encoder, images: Tensor, device: torch.device) -> Tensor:
    """Images of a batch, or their features, as the decoder's grid (N, h, w, D)."""
    images = images.to(device, non_blocking=True)
    if images.dtype != torch.uint8:
        return images.float()
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters()):
        return encoder.grid(normalize_images(images))
    return encode_images(encoder, images).clone()  # an inference tensor may not take part in training


def autocast(settings: Settings, device: torch.device):
    if device.type != "cuda" or settings.mixed_precision == "no":
        return nullcontext()
    return torch.autocast("cuda", {"bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision])


# --- what is kept -------------------------------------------------------------------------------------------


OUTPUT_FILES = ("checkpoint_epoch_*.pth", "best_checkpoint.pth", "encoder.pth", "decoder.pth", "history.csv")


def best_epoch(history: list[dict], select_by: str) -> int:
    """Index of the first epoch with the highest validation score."""
    return max(range(len(history)), key=lambda index: history[index][f"val_{select_by}"])


def epochs_since_best(history: list[dict], select_by: str) -> int:
    return len(history) - 1 - best_epoch(history, select_by) if history else 0


def save_epoch(
    output: Path,
    encoder: Encoder,
    decoder: DecoderWithAttention,
    optimizers: dict[str, torch.optim.Optimizer],
    history: list[dict],
    word_map: dict[str, int],
    settings: Settings,
) -> None:
    """Write the epoch's checkpoint and history.csv; where it is the best so far, the files of the best
    too."""
    about = {
        "settings": asdict(settings),
        "word_map": word_map,
        "data": {key: read_prepared(settings.data_folder)[key] for key in ("settings", "inputs")},
        "history": history,
    }
    weights = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    states = {"optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
    checkpoint = output / f"checkpoint_epoch_{len(history)}.pth"
    save_checkpoint(checkpoint, about | weights | states)
    if epochs_since_best(history, settings.select_by) == 0 or not (output / "best_checkpoint.pth").is_file():
        for name, state in weights.items():
            save_checkpoint(output / f"{name}.pth", about | {name: state})
        with atomic_write(output / "best_checkpoint.pth") as tmp_path:
            shutil.copyfile(checkpoint, tmp_path)
    write_table(output / "history.csv", history)


if __name__ == "__main__":
    run_script(main, Settings)
