"""Checkpoints: what they hold, writing them, loading them without executing code, models from them.

A checkpoint is a dictionary of tensors and plain values: `settings` of the training, `word_map`, `data` (the
record of the prepared data), `history` (a dictionary an epoch), the state_dicts `encoder`, `decoder`,
`optimizer`, `unaveraged` where weights are averaged, `rates` and `scaler`, the states of the schedule and of
mixed precision; in `last.pth` also `progress`, the mid-epoch state with that of the random generators.
docs/file_formats.md lists all keys; `training/loop.py` collects them. `encoder.pth` and `decoder.pth` have
one of the models each.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from captioning.command_line import LARGEST
from captioning.data.prepared import find_word_map_problem, require_disk_space
from captioning.files import Number, OutputFile, find_mismatch
from captioning.weights.pretrained import build_encoder, load_torch_file
from models import Attention, DecoderWithAttention, Encoder, HardAttention
from utils import UserError, atomic_write, read_json, readable_size, say


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a dictionary of tensors and plain values such that `torch.load(path, weights_only=True)` reads
    it."""
    with atomic_write(path) as tmp_path, OutputFile(tmp_path, path) as stream:
        torch.save(checkpoint, stream)


def read_checkpoint(path: str | Path) -> object:
    """What `torch.save` wrote, on the CPU, without running anything that the file says.

    Raises:
        UserError: no such file, it is damaged, or `load_torch_file` refuses it. ValueError: no file of
            torch's, or one that names more than tensors and plain values.
    """
    return load_torch_file(path, "no such checkpoint; train.py writes them to output_models/")


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
    except ValueError:  # not one of ours
        from captioning.weights.tutorial_checkpoint import read_tutorial_checkpoint

        checkpoint = read_tutorial_checkpoint(path, word_map)
    check_content(path, checkpoint, CHECKPOINT | {name: WEIGHTS for name in needed})
    checkpoint["settings"].setdefault("attention", "soft")  # as the tutorial's is
    problem = find_word_map_problem(checkpoint["word_map"])
    if problem:
        raise UserError(f"{path}: a damaged checkpoint ({problem}); train it anew")
    if word_map not in (None, checkpoint["word_map"]):
        raise UserError(
            f"{word_map_path}: not the word map that {path} was trained with "
            f"({len(checkpoint['word_map'])} words); give the --word_map or data that belong to it"
        )
    return checkpoint


def check_room(
    folder: Path, optimizer: torch.optim.Optimizer, epochs: int, keep: int, log: Callable[[str], None]
) -> None:
    """Look, before the first epoch, whether the folder's disk has room for what a training writes.

    Args:
        optimizer: with all the models' parameters; Adam keeps two averages of those that are trained.
        epochs: that will be trained. keep: how many epochs' checkpoints stay; 0: all.
        log: told where there is not enough for all of them.

    Raises:
        UserError: there is not enough for the first one.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = sum(parameter.nbytes for parameter in parameters)
    checkpoint = weights + 2 * sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    needed = 2 * checkpoint + weights  # of an epoch, of the best one, and the best one's models
    require_disk_space(folder, needed, "free some disk space, or give another --output_folder")
    room = (shutil.disk_usage(folder).free - needed) // checkpoint + 1
    wanted = min(epochs, keep or epochs)
    if room < wanted:
        log(
            f"{folder}: room for the checkpoints of {room} epochs, and {wanted} are to be kept, "
            f"{readable_size(checkpoint)} each: give --keep_checkpoints {max(1, room - 1)}"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, source: str | Path) -> None:
    """Load the state of Adam, read from the file `source`; rates and weight decay stay as they are set.

    Raises:
        UserError: it is damaged, or of other parameters.
    """
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        moments = [(p, s[name]) for p, s in optimizer.state.items() for name in ("exp_avg", "exp_avg_sq")]
        if any(m.shape != p.shape or not bool(m.isfinite().all()) for p, m in moments):
            raise ValueError
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError):
        raise UserError(f"{source}: its optimizer's state is damaged; go on from another") from None
    for group, values in zip(optimizer.param_groups, options):
        group.update(values)


class Weights:
    """A state_dict of finite numbers; a schema."""

    def describe(self) -> str:
        return "tensors of finite numbers"

    def accepts(self, value: object) -> bool:
        return isinstance(value, dict) and all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) and bool(torch.isfinite(tensor).all())
            for name, tensor in value.items()
        )


WEIGHTS = Weights()
SIZES = ("emb_dim", "attention_dim", "decoder_dim")
HISTORY = [{"epoch": Number(0, 10**9), str: float}]
CHECKPOINT = {
    "settings": {
        "encoder_name": str,
        "dropout": Number(0, 1, whole=False),
        **{name: Number(1, LARGEST[name]) for name in SIZES},
    },
    "word_map": dict,
    "data": {"settings": {"image_size": Number(1, LARGEST["image_size"])}},
    "history": HISTORY,
    "encoder?": WEIGHTS,
    "decoder?": WEIGHTS,
}
STATES = {  # what a training that goes on takes from a checkpoint, if it is there
    "unaveraged?": {"encoder?": WEIGHTS, "decoder": WEIGHTS},
    "history": HISTORY,
    "optimizer?": {"state": dict, "param_groups": [{"params": [int], "lr": Number(0, whole=False)}]},
    "rates?": {"steps": Number(0), "decays": [int]},
    "scaler?": dict,
}


class RandomState:
    """The state of a generator of torch; a schema."""

    def describe(self) -> str:
        return "the state of a random generator"

    def accepts(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1


class CpuRandomState(RandomState):
    def accepts(self, value: object) -> bool:
        try:
            return super().accepts(value) and bool(torch.Generator().set_state(value))
        except RuntimeError:
            return False


# the mid-epoch state, beside the epochs' checkpoints; see captioning/training/loop.py
LAST = "last.pth"
PROGRESS = {
    "epoch": Number(1),
    "steps": Number(1),
    "total_steps": Number(1),
    "captions": Number(0),
    "seconds": Number(0, whole=False),
    "line": {str: Number(whole=False)},
    "processes": [
        {
            "loss": Number(whole=False),
            "totals": {str: Number(whole=False)},
            "random": {"cpu": CpuRandomState(), str: RandomState()},
        }
    ],
}


def check_content(path: str | Path, checkpoint: object, schema: dict) -> None:
    """Raise UserError unless the checkpoint read from `path` is as the schema says."""
    mismatch = find_mismatch(checkpoint, schema)
    if mismatch:
        raise UserError(
            f"{path}: not a whole checkpoint ({mismatch}); give one as best_checkpoint.pth is, or train anew"
        )


BEST_FILES = ("encoder.pth", "decoder.pth", "best_checkpoint.pth")


def peek(path: str | Path) -> dict:
    """What is in a checkpoint, its tensors unread; {} where it cannot be read."""
    try:
        content = load_torch_file(path, mmap=True)
    except (UserError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_best(source: Path, checkpoint: dict, folder: Path | None = None) -> None:
    """Make the checkpoint in the file `source` the best of the folder, which is the file's own unless given:
    write encoder.pth, decoder.pth and best_checkpoint.pth."""
    folder = folder or source.parent
    about = {name: checkpoint[name] for name in ("settings", "word_map", "data", "history")}
    for name in ("encoder", "decoder"):
        save_checkpoint(folder / f"{name}.pth", about | {name: checkpoint[name]})
    with atomic_write(folder / "best_checkpoint.pth") as tmp_path:
        shutil.copyfile(source, tmp_path)


def epoch_checkpoints(folder: str | Path, after: int = 0) -> list[Path]:
    """The files checkpoint_epoch_N.pth of a folder with N above `after`, by N."""
    numbered = []
    for file in Path(folder).glob("checkpoint_epoch_*.pth"):
        match = re.fullmatch(r"checkpoint_epoch_(\d+)", file.stem)
        if match and int(match[1]) > after:
            numbered.append((int(match[1]), file))
    return [file for _, file in sorted(numbered)]


def archive_previous_run(folder: Path, *patterns: str) -> None:
    """Move the files of an earlier run in the folder to its subfolder earlier_N, so that runs do not mix."""
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    if any(file.suffix in (".pth", ".safetensors") for file in files):
        say(f"the earlier run in {folder}/ is now in {archive(folder, files)}/")


def archive(folder: Path, files: Iterable[Path]) -> Path:
    """Move files of the folder to its new subfolder earlier_N; return that."""
    numbers = [int(name) for path in folder.glob("earlier_*") if (name := path.name[8:]).isdecimal()]
    earlier = folder / f"earlier_{max(numbers, default=0) + 1}"
    earlier.mkdir()
    for file in files:
        file.rename(earlier / file.name)
    return earlier


def encoder_from(checkpoint: dict, source: str | Path) -> Encoder:
    """The encoder of a checkpoint read from the file `source`, in eval mode."""
    try:
        encoder = build_encoder(checkpoint["settings"]["encoder_name"], "none")
        encoder.image_size = checkpoint["data"]["settings"]["image_size"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{source}: a damaged checkpoint: {error} is missing or misused") from None
    _require_same_weights(encoder.state_dict(), checkpoint["encoder"], "encoder", source)
    encoder.load_state_dict(checkpoint["encoder"])
    return encoder


def decoder_from(checkpoint: dict, source: str | Path) -> DecoderWithAttention:
    """The decoder of a checkpoint read from the file `source`, in eval mode."""
    settings, weights = checkpoint["settings"], checkpoint["decoder"]
    attention = Attention
    if settings.get("attention") == "hard":
        attention = partial(HardAttention, takes_maximum=settings.get("hard_decoding") == "maximum")
    try:
        sizes = [settings[name] for name in ("attention_dim", "emb_dim", "decoder_dim")]
        sizes += [len(checkpoint["word_map"]), weights["f_beta.weight"].shape[0], settings["dropout"]]
        with torch.device("meta"):  # shapes without memory: damaged sizes would ask for much of it
            expected = DecoderWithAttention(*sizes, attention).state_dict()
        _require_same_weights(expected, weights, "decoder", source)
        decoder = DecoderWithAttention(*sizes, attention)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: a damaged checkpoint: {error} is missing or misused") from None
    decoder.load_state_dict(weights)
    return decoder.eval()


SHOWN = 6  # of the weights that differ


def _require_same_weights(
    expected: dict[str, Tensor], weights: dict[str, Tensor], part: str, source: str | Path
) -> None:
    """Raise UserError, which names those that differ, unless the weights are as `expected`."""
    differences = [f"lacks {name}" for name in expected if name not in weights]
    differences += [f"has {name}" for name in weights if name not in expected]
    differences += [
        f"has {name} of {tuple(weights[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if differences:
        more = f", and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise UserError(
            f"{source}: its {part} is not the one of models.py and its settings: it "
            f"{', '.join(differences[:SHOWN])}{more}; train it anew, or put models.py back as it was"
        )
