"""Train Show, Attend and Tell on what create_input_files.py prepared: data_output/ -> output_models/.

    python train.py
    python train.py --encoder_name efficientnet_lite2 --epochs 20
    python train.py --checkpoint output_models/checkpoint_epoch_3.pth --epochs 10    # go on after epoch 3

After every epoch the model captions the validation pictures by itself (greedy decoding, no true words put
in) and is scored with BLEU-4 and CIDEr against all their references; the best epoch is kept as
best_checkpoint.pth, encoder.pth, decoder.pth.
"""

from __future__ import annotations

import csv
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
from torch import Tensor
from torch.utils.data import DataLoader

from captioner import Captioner
from checkpoints import decoder_from, encoder_from, load_checkpoint, save_checkpoint
from datasets import CaptionDataset, cache_features, read_prepared
from metrics import CiderD, bleu4, tokenize
from models import DecoderWithAttention, Encoder, load_embeddings
from utils import (
    UserError,
    check_at_least,
    normalize_pictures,
    pick_device,
    progress_bar,
    read_json,
    run_script,
    written_aside,
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
    batch_size: int = 16  # pictures; each brings all its captions
    workers: int = 2  # processes that load batches
    encoder_lr: float = 1e-4  # learning rate of the encoder, where it is fine-tuned
    decoder_lr: float = 4e-4  # learning rate of the decoder
    grad_clip: float = 5.0  # gradients are clipped to [-grad_clip, grad_clip]
    alpha_c: float = 1.0  # weight of the doubly stochastic penalty (Xu et al., equation 14)
    fine_tune_encoder: bool = False  # train the encoder's convolutional blocks 2 to 4 too
    cache_features: bool = True  # encode each picture once and keep the result, where the encoder is frozen
    checkpoint: str | None = None  # resume from this file
    embeddings: str | None = None  # start from these word vectors (GloVe text file); sets emb_dim
    fine_tune_embeddings: bool = True  # train the word embeddings
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # on CUDA
    select_by: Literal["bleu4", "cider"] = "bleu4"  # score by which the best epoch is chosen
    seed: int = 123  # of weights, order and dropout

    def __post_init__(self):
        check_at_least(self, 1, "emb_dim", "attention_dim", "decoder_dim", "epochs", "batch_size")
        check_at_least(self, 0, "workers", "encoder_lr", "decoder_lr", "alpha_c")
        if not self.grad_clip > 0:
            raise UserError(f"--grad_clip is {self.grad_clip}: give more than 0 (inf for no clipping)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}: give 0 or more and less than 1")


DECAY_AFTER, DECAY, STOP_AFTER = 8, 0.8, 20  # epochs without a better score


def main(settings: Settings) -> None:
    train(settings)


def train(settings: Settings) -> dict:
    """Run the training; return the history's line of the best epoch."""
    torch.manual_seed(settings.seed)
    device = pick_device()
    read_prepared(settings.data_folder)  # complains where it is not complete
    word_map = read_json(Path(settings.data_folder) / "word_map.json")
    resumed = load_checkpoint(settings.checkpoint, "encoder", "decoder") if settings.checkpoint else None
    settings, encoder, decoder = build_models(settings, word_map, resumed)
    encoder.fine_tune(settings.fine_tune_encoder)
    decoder.fine_tune_embeddings(settings.fine_tune_embeddings)
    encoder, decoder = encoder.to(device), decoder.to(device)
    optimizers = build_optimizers(encoder, decoder, settings, resumed)
    scaler = torch.amp.GradScaler(
        device.type, enabled=device.type == "cuda" and settings.mixed_precision == "fp16"
    )
    if device.type == "cpu" and settings.mixed_precision != "no":
        print("mixed precision is for CUDA; training in float32")
    train_loader, val_loader = build_loaders(encoder, settings, device)
    references = [[tokenize(c) for c in captions] for captions in load_references(settings, "val")]

    # a checkpoint of elsewhere brings weights, but no epochs that were scored as ours are
    history = [line for line in resumed["history"] if "val_bleu4" in line] if resumed else []
    done = len(history)
    if done >= settings.epochs:
        raise UserError(f"{settings.checkpoint} has its {done} epochs: raise --epochs to go on")
    output = Path(settings.output_folder)
    if not (resumed and Path(settings.checkpoint).resolve().parent == output.resolve()):
        set_aside_earlier_run(output)
    count = sum(parameter.numel() for parameter in decoder.parameters())
    print(
        f"{settings.encoder_name} {'fine-tuned' if settings.fine_tune_encoder else 'frozen'}, "
        f"decoder of {count:,} parameters, {len(train_loader.dataset)} pictures, on {device}"
    )

    for epoch in range(done + 1, settings.epochs + 1):
        waited = epochs_since_best(history, settings.select_by)
        if waited >= STOP_AFTER:
            print(f"stopped: no better {settings.select_by} for {STOP_AFTER} epochs")
            break
        if waited and waited % DECAY_AFTER == 0:
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] *= DECAY
        torch.manual_seed(settings.seed + epoch)  # order and dropout of an epoch do not depend on a resume
        train_loader.generator.manual_seed(settings.seed + epoch)
        began = time.monotonic()
        line = {"epoch": epoch}
        line |= train_one_epoch(encoder, decoder, train_loader, optimizers, scaler, settings, device, epoch)
        line |= validate(encoder, decoder, val_loader, references, word_map, settings, device)
        line |= {
            "decoder_lr": optimizers["decoder"].param_groups[0]["lr"],
            "seconds": time.monotonic() - began,
        }
        history.append(line)
        save_epoch(output, encoder, decoder, optimizers, history, word_map, settings)
        print(
            f"epoch {epoch}: loss {line['train_loss']:.3f}, {line['captions_per_second']:.0f} captions/s; "
            f"validation loss {line['val_loss']:.3f}, top-5 {line['val_top5']:.1%}, "
            f"BLEU-4 {line['val_bleu4']:.4f}, CIDEr {line['val_cider']:.4f}"
        )
    best = history[best_epoch(history, settings.select_by)]
    print(
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
        if resumed["word_map"] != word_map:
            raise UserError(
                f"{settings.checkpoint}: its word map is not that of {settings.data_folder}; start a new run"
            )
        shape = ("encoder_name", "emb_dim", "attention_dim", "decoder_dim")
        settings = replace(settings, **{name: resumed["settings"][name] for name in shape})
        decoder = decoder_from(resumed, settings.checkpoint)
        decoder.dropout.p = settings.dropout
        return settings, encoder_from(resumed, settings.checkpoint), decoder
    embeddings = None
    if settings.embeddings:
        embeddings, found = load_embeddings(settings.embeddings, word_map)
        print(f"{settings.embeddings}: has {found} of {len(word_map)} words")
        settings = replace(settings, emb_dim=embeddings.shape[1])
    encoder = Encoder(settings.encoder_name, settings.encoder_weights)
    decoder = DecoderWithAttention(
        settings.attention_dim,
        settings.emb_dim,
        settings.decoder_dim,
        len(word_map),
        encoder.dim,
        settings.dropout,
    )
    if embeddings is not None:
        decoder.load_pretrained_embeddings(embeddings)
    return settings, encoder, decoder


def build_optimizers(
    encoder: Encoder, decoder: DecoderWithAttention, settings: Settings, resumed: dict | None
) -> dict[str, torch.optim.Optimizer]:
    optimizers = {}
    for name, module, lr in (
        ("decoder", decoder, settings.decoder_lr),
        ("encoder", encoder, settings.encoder_lr),
    ):
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if parameters:
            optimizers[name] = torch.optim.Adam(parameters, lr=lr)
    for name, state in (resumed or {}).get("optimizers", {}).items():
        same = name in optimizers and len(state["param_groups"][0]["params"]) == len(
            optimizers[name].param_groups[0]["params"]
        )
        if same:  # not where what is trained has changed, as when the encoder is opened
            optimizers[name].load_state_dict(state)
    return optimizers


def build_loaders(
    encoder: Encoder, settings: Settings, device: torch.device
) -> tuple[DataLoader, DataLoader]:
    loaders = []
    for split in ("train", "val"):
        features = None
        CaptionDataset(settings.data_folder, split)  # complain before the encoder's long work
        if settings.cache_features and not settings.fine_tune_encoder:
            features = cache_features(encoder, settings.data_folder, split, device)
        loader = DataLoader(
            CaptionDataset(settings.data_folder, split, features),
            batch_size=settings.batch_size,
            shuffle=split == "train",
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
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
    """One pass over the training pictures: {"train_loss", "captions_per_second"}."""
    decoder.train()
    parameters = [
        p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]
    ]
    total, captions_done, began = torch.zeros((), device=device), 0, time.monotonic()
    with progress_bar(loader, desc=f"epoch {epoch}", unit="batch") as progress:
        for step, (pictures, captions, lengths) in enumerate(progress, start=1):
            with autocast(settings, device):
                loss, _, _ = caption_loss(encoder, decoder, pictures, captions, lengths, settings, device)
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_value_(parameters, settings.grad_clip)
            for optimizer in optimizers.values():
                scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
            captions_done += lengths.numel()
            if step % 10 == 0 or step == len(loader):  # seldom: reading the loss waits for the device
                if not math.isfinite(total):
                    raise UserError(
                        f"the loss is no longer a number in epoch {epoch}: lower --decoder_lr or --encoder_lr"
                    )
                rate = captions_done / (time.monotonic() - began)
                progress.set_postfix_str(f"loss {total / step:.3f}, {rate:.0f} captions/s")
    return {"train_loss": float(total / len(loader)), "captions_per_second": rate}


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
    "val_bleu4", "val_cider"}."""
    decoder.eval()
    captioner = Captioner([(encoder, decoder)], word_map)
    total, right, positions, hypotheses = 0.0, 0, 0, []
    for pictures, captions, lengths in progress_bar(loader, desc="validation", unit="batch", leave=False):
        with autocast(settings, device):
            loss, scores, targets = caption_loss(
                encoder, decoder, pictures, captions, lengths, settings, device
            )
            found = captioner.search([encode(encoder, pictures, device)], beam_size=1)
        total += float(loss) * len(targets)
        right += int((scores.topk(min(5, scores.shape[1])).indices == targets.unsqueeze(1)).sum())
        positions += len(targets)
        hypotheses += [tokenize(captioner.text(hypothesis)) for hypothesis in found]
    return {
        "val_loss": total / positions,
        "val_top5": right / positions,
        "val_bleu4": bleu4(references, hypotheses),
        "val_cider": fmean(CiderD.from_references(references).score(references, hypotheses)),
    }


def caption_loss(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    pictures: Tensor,
    captions: Tensor,
    lengths: Tensor,
    settings: Settings,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy over the valid positions plus the doubly stochastic penalty.

    Args:
        pictures: uint8 (N, 3, S, S) or features (N, h, w, D); captions (N, G, L); lengths (N, G).

    Returns:
        loss (), scores (W, V), targets (W,).
    """
    grid = encode(encoder, pictures, device)
    scores, targets, coverage = decoder.score_words(grid, captions.flatten(0, 1), lengths.flatten())
    # every pixel should get a total weight of one over the caption (Xu et al., section 4.2.1)
    penalty = ((1 - coverage) ** 2).mean()
    return F.cross_entropy(scores, targets) + settings.alpha_c * penalty, scores, targets


def encode(encoder: Encoder, pictures: Tensor, device: torch.device) -> Tensor:
    """Pictures of a batch, or their features, as the decoder's grid (N, h, w, D)."""
    pictures = pictures.to(device, non_blocking=True)
    if pictures.dtype != torch.uint8:
        return pictures.float()
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters()):
        return encoder.grid(normalize_pictures(pictures))
    return encoder.encode(pictures).clone()  # a clone may take part in training, an inference tensor may not


def autocast(settings: Settings, device: torch.device):
    if device.type != "cuda" or settings.mixed_precision == "no":
        return nullcontext()
    return torch.autocast("cuda", {"bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision])


# --- what is kept -------------------------------------------------------------------------------------------


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
        with written_aside(output / "best_checkpoint.pth") as aside:
            shutil.copyfile(checkpoint, aside)
    with (
        written_aside(output / "history.csv") as aside,
        aside.open("w", encoding="utf-8", newline="") as stream,
    ):
        writer = csv.DictWriter(stream, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def set_aside_earlier_run(output: Path) -> None:
    """Move the files of an earlier run in the folder to its subfolder earlier_N, so that runs do not mix."""
    names = ("checkpoint_epoch_*.pth", "best_checkpoint.pth", "encoder.pth", "decoder.pth", "history.csv")
    files = [file for name in names for file in output.glob(name)]
    if not files:
        return
    number = 1 + sum(1 for _ in output.glob("earlier_*"))
    folder = output / f"earlier_{number}"
    folder.mkdir()
    for file in files:
        file.rename(folder / file.name)
    print(f"the earlier run in {output}/ is now in {folder}/")


if __name__ == "__main__":
    run_script(main, Settings)
