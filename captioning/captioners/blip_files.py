"""What a folder of BLIP may not hold: pipes, compressed archives, sizes and numbers that cannot be.

transformers reads such files with trust: it waits for ever, fills the memory, or fails at the first image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from captioning.captioners.base import BaseCaptioner
from captioning.files import Number, find_mismatch
from captioning.weights.pretrained import check_archive
from utils import UserError, require_regular_file


def check_files(folder: str | Path) -> None:
    """Raise UserError, before anything is read, where a file of the folder is none, or is compressed."""
    for file in Path(folder).iterdir():
        if not file.is_dir():
            require_regular_file(file)
        if file.suffix == ".bin":
            check_archive(file)


HALF = {
    "hidden_size": Number(1, 10**5),
    "intermediate_size": Number(1, 10**6),
    "num_hidden_layers": Number(1, 1000),  # as many as the file says would be built
    "num_attention_heads": Number(1, 1000),
}
SHARE, TOKEN = Number(0, 1, whole=False), Number(0, 10**7)
BLIP_CONFIG = {
    "vision_config": HALF
    | {"image_size": Number(1, 10**4), "patch_size": Number(1, 10**4), "attention_dropout": SHARE},
    "text_config": HALF
    | {"vocab_size": Number(1, 10**7), "max_position_embeddings": Number(1, 10**6)}
    | dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id"), TOKEN)
    | dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), SHARE),
}


def check_config(name: str, config: PretrainedConfig) -> None:
    """Raise UserError, before the model is built, where BLIP's sizes cannot be. Other models are not
    checked."""
    if config.model_type != "blip":
        return
    values = config.to_dict()
    mismatch = find_mismatch(values, BLIP_CONFIG)
    if mismatch is None:
        text = values["text_config"]
        tokens = [key for key in text if key.endswith("_token_id") and type(text[key]) is int]
        beyond = [key for key in tokens if text[key] >= text["vocab_size"]]
        mismatch = f"text_config.{beyond[0]} is beyond the vocabulary" if beyond else None
    if mismatch:
        raise UserError(f"{name}: its config.json is damaged ({mismatch}); fetch or train it anew")


def check_preparation(name: str, captioner: BaseCaptioner) -> None:
    """Raise UserError where the image processor's sizes or numbers are not the model's."""
    pixels = captioner.prepare_array(np.full((3, 8, 8), 100, np.uint8))
    config, shape = captioner.model.config, tuple(pixels.shape)
    side = config.vision_config.image_size if config.model_type == "blip" else shape[-1]
    is_finite = pixels.is_floating_point() and bool(pixels.isfinite().all())
    if len(shape) != 3 or shape[-1] != side or not is_finite:
        raise UserError(
            f"{name}: prepares images as {shape}, not as finite numbers of {side} x {side}; its "
            f"preprocessor_config.json is damaged, or of another model"
        )
