"""Checkpoint files: writing them, reading them without running what they say, models out of them.

A checkpoint is a dictionary of tensors and plain values: `settings` of the training, `word_map`, `data` (the
record of the prepared data), `history` (a line an epoch), and the state_dicts `encoder`, `decoder`,
`optimizers`. `encoder.pth` and `decoder.pth` have one of the models each.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from captioning.pretrained import build_encoder
from captioning.tutorial_checkpoint import read_tutorial_checkpoint
from models import DecoderWithAttention, Encoder
from utils import UserError, atomic_write, natural_order, pick_device, read_json


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a dictionary of tensors and plain values such that `torch.load(path, weights_only=True)` reads
    it."""
    with atomic_write(path) as tmp_path:
        torch.save(checkpoint, tmp_path)


def read_checkpoint(path: str | Path) -> object:
    """What `torch.save` wrote, on the CPU, without running anything that the file says.

    Raises:
        UserError: no such file. ValueError: no file of torch's, or one that names more than tensors and
            plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train.py writes them to output_models/")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each fail in their own ways
        raise ValueError(f"{path}: not a checkpoint") from error


def load_checkpoint(path: str | Path, *needed: str, word_map_path: str | Path | None = None) -> dict:
    """Read a checkpoint of the attention model.

    Args:
        path: a file of train.py, or the published checkpoint of the 2018 PyTorch tutorial.
        needed: keys that it must have, such as "encoder", "decoder".
        word_map_path: the word map's JSON file; the tutorial's checkpoint has none of its own. One that is
            not the checkpoint's is refused.

    Raises:
        UserError: no such file, no checkpoint, or one without the `needed` parts; another word map.
    """
    word_map = None if word_map_path is None else read_json(word_map_path)
    try:
        checkpoint = read_checkpoint(path)
    except ValueError:
        checkpoint = read_tutorial_checkpoint(path, word_map)
    keys = ("settings", "word_map", *needed)
    missing = [
        key for key in keys if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict)
    ]
    if missing:
        raise UserError(
            f"{path}: has no {', '.join(missing)}; give a whole checkpoint, as best_checkpoint.pth is"
        )
    if word_map not in (None, checkpoint["word_map"]):
        raise UserError(
            f"{word_map_path}: not the word map that {path} was trained with "
            f"({len(checkpoint['word_map'])} words); give the --word_map or data that belong to it"
        )
    return checkpoint


def epoch_checkpoints(folder: str | Path) -> list[Path]:
    """The files checkpoint_epoch_N.pth of a folder, by their epochs."""
    return sorted(Path(folder).glob("checkpoint_epoch_*.pth"), key=lambda file: natural_order(file.name))


def checkpoint_to_resume(output_folder: str | Path, resume: bool, checkpoint: str | None) -> Path | None:
    """The file that --resume (the last of the output folder) or --checkpoint names; None to start anew.

    Raises:
        UserError: both are given, or there is nothing to resume.
    """
    if resume and checkpoint:
        raise UserError("--resume and --checkpoint are two ways to say where to go on: give one")
    if not resume:
        return Path(checkpoint) if checkpoint else None
    files = epoch_checkpoints(output_folder)
    if not files:
        raise UserError(f"{output_folder}: no checkpoint_epoch_N.pth in it; start without --resume")
    return files[-1]


def archive_previous_run(folder: Path, *patterns: str) -> None:
    """Move the files of an earlier run in the folder to its subfolder earlier_N, so that runs do not mix."""
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    if not any(file.suffix in (".pth", ".safetensors") for file in files):
        return
    numbers = [int(name) for path in folder.glob("earlier_*") if (name := path.name[8:]).isdecimal()]
    archive = folder / f"earlier_{max(numbers, default=0) + 1}"
    archive.mkdir()
    for file in files:
        file.rename(archive / file.name)
    print(f"the earlier run in {folder}/ is now in {archive}/")


def load_models(
    encoder_path: str | Path, decoder_path: str | Path, word_map_path: str | Path | None = None
) -> tuple[Encoder, DecoderWithAttention, dict[str, int]]:
    """Encoder, decoder and word map of one checkpoint, or of two files, on the best device, in eval mode.

    Raises:
        UserError: a file is missing or damaged, or the files do not belong together.
    """
    decoder_file = load_checkpoint(decoder_path, "decoder", word_map_path=word_map_path)
    encoder_file = decoder_file
    if encoder_path != decoder_path:
        encoder_file = load_checkpoint(encoder_path, "encoder", word_map_path=word_map_path)
    if "encoder" not in encoder_file:
        raise UserError(
            f"{encoder_path}: has no encoder; give a checkpoint, or --encoder_path and --decoder_path"
        )
    encoder, decoder = encoder_from(encoder_file, encoder_path), decoder_from(decoder_file, decoder_path)
    encoder_dim = decoder.f_beta.out_features
    if encoder.dim != encoder_dim:
        raise UserError(
            f"{encoder_path} gives {encoder.dim} channels, {decoder_path} takes {encoder_dim}: "
            f"give files of one run"
        )
    device = pick_device()
    return encoder.to(device), decoder.to(device), decoder_file["word_map"]


def encoder_from(checkpoint: dict, source: str | Path) -> Encoder:
    """The encoder of a checkpoint read from the file `source`, in eval mode."""
    try:
        encoder = build_encoder(checkpoint["settings"]["encoder_name"], "none")
        encoder.image_size = checkpoint["data"]["settings"]["image_size"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{source}: a damaged checkpoint: {error} is missing or misused") from None
    _load_state(encoder, checkpoint["encoder"], source)
    return encoder


def decoder_from(checkpoint: dict, source: str | Path) -> DecoderWithAttention:
    """The decoder of a checkpoint read from the file `source`, in eval mode."""
    settings, weights = checkpoint["settings"], checkpoint["decoder"]
    try:
        decoder = DecoderWithAttention(
            settings["attention_dim"],
            settings["emb_dim"],
            settings["decoder_dim"],
            vocab_size=len(checkpoint["word_map"]),
            encoder_dim=weights["f_beta.weight"].shape[0],
            dropout=settings["dropout"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: a damaged checkpoint: {error} is missing or misused") from None
    decoder.fused = settings.get("fused", True)  # the form to run it in; see train.py
    _load_state(decoder, weights, source)
    return decoder.eval()


def _load_state(module: nn.Module, state: dict, source: str | Path) -> None:
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: its weights do not fit its settings ({reason}); train it anew") from None
