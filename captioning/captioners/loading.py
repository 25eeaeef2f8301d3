"""A captioning model from a folder or the hub, and what such a folder may not hold.

    captioner = load_captioner("blip_finetuned_model")                     # or "Qwen/Qwen2.5-VL-3B-Instruct"

transformers trusts the files that it reads: a pipe makes it wait for ever, a compressed archive can fill the
memory, and a wrong size shows only at the first image. So the files are checked before. No code that comes
with a model is run, and weights are read from safetensors, or by torch with `weights_only`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from captioning import HUB_MODEL
from captioning.captioners.blip import BlipCaptioner
from captioning.captioners.model_inputs import FAMILIES, first_line
from captioning.captioners.vision_language import VISION, VisionLanguageCaptioner
from captioning.files import Number, find_mismatch
from captioning.weights.pretrained import check_archive
from utils import UserError, pick_device, processes, read_json, require_regular_file

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_captioner(
    model_path: str | Path,
    dtype: Precision = "auto",
    load_in: Literal[0, 4, 8] = 0,
    device_map: str | None = None,
) -> VisionLanguageCaptioner:
    """A captioner in evaluation mode, from a folder or the hub; what was fetched from the hub before is used
    without asking it again. It is on the CPU, unless it is quantized or has a device map.

    Args:
        dtype: "auto" is the checkpoint's own on CUDA, float32 elsewhere.
        load_in: so many bits a weight, by bitsandbytes, on CUDA; 0: as `dtype` says.
        device_map: "auto" spreads the model over GPUs and the CPU.

    Raises:
        UserError: no such folder or hub model, the hub cannot be reached, damaged files, no captioning model,
            a family that is not in FAMILIES, a package that is missing.
    """
    name = str(model_path)
    in_folder = Path(name).is_dir()
    if Path(name).is_file():
        raise UserError(f"{name}: is a file; give the folder that train_model.py wrote or a hub model")
    if (Path(name) / ADAPTER).is_file():
        return _load_with_adapter(name, dtype, load_in, device_map)
    if in_folder and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name}: no model in it (no config.json); give the folder that train_model.py wrote")
    if not in_folder and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name}: no such folder; train_model.py writes one, {HUB_MODEL} is on the hub")
    if in_folder:
        check_files(name)
    how = _placement(dtype, load_in, device_map)
    try:
        return _read_captioner(name, how, local_files_only=True)
    except UserError:
        raise
    except ImportError as error:  # as num2words for SmolVLM
        raise UserError(f"{name}: {first_line(error)}") from None
    except Exception as error:  # files from anywhere fail in any of transformers' and its readers' ways
        if in_folder:
            raise _refusal(name, error) from None
    _require_on_hub(name)
    try:
        return _read_captioner(name, how, local_files_only=False)
    except UserError:
        raise
    except Exception as error:
        raise _refusal(name, error) from None


def _refusal(name: str, error: Exception) -> UserError:
    """What stands in the way of a model, and how to mend it."""
    if isinstance(error, UnpicklingError):
        return UserError(f"{name}: its weights would run code when they are read; take them as safetensors")
    if "trust_remote_code" in str(error):
        return UserError(f"{name}: brings code of its own, which is not run here; give another model")
    return UserError(f"{name}: not a complete captioning model ({first_line(error)}); fetch or train it anew")


def _placement(dtype: Precision, load_in: int, device_map: str | None) -> dict[str, Any]:
    """Options of `from_pretrained`: precision, quantization and place. Raises UserError where a package or
    device for them is missing."""
    device = pick_device()
    how: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto" if device.type == "cuda" else torch.float32)}
    if device_map:
        if processes().num_processes > 1:
            raise UserError("--device_map is for one process, which then has all GPUs: leave torchrun out")
        how["device_map"] = device_map
    if load_in:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"--load_in_{load_in}bit needs bitsandbytes: pip install -r requirements-captioners.txt"
            )
        if device.type != "cuda":
            raise UserError(
                f"--load_in_{load_in}bit is for CUDA; leave it out, and give --dtype bf16 to save memory"
            )
        computed = torch.bfloat16 if how["dtype"] == "auto" else how["dtype"]
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computed}
        how["quantization_config"] = BitsAndBytesConfig(**(four if load_in == 4 else {"load_in_8bit": True}))
        how.setdefault("device_map", {"": device})
    return how


def _read_captioner(name: str, how: dict[str, Any], local_files_only: bool) -> VisionLanguageCaptioner:
    options = {"trust_remote_code": False, "local_files_only": local_files_only}
    config = AutoConfig.from_pretrained(name, **options)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"{name}: a {config.model_type} model, which captions no images; give BLIP or the like"
        )
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{name}: {config.model_type} is none of the families that are known here ({', '.join(FAMILIES)})"
        )
    check_config(name, config)
    loaded_model = AutoModelForImageTextToText.from_pretrained(
        name, output_loading_info=True, **options, **how
    )
    model, loaded = loaded_model
    classes = config.architectures or [type(model).__name__]
    missing = find_missing(model, loaded["missing_keys"])
    if type(model).__name__ not in classes or missing:
        lacking = f" ({missing[0]} is missing)" if missing else ""
        raise UserError(f"{name}: weights of {classes[0]} that do not make a whole captioning model{lacking}")
    damaged = next((key for key, tensor in model.state_dict().items() if not _is_finite(tensor)), None)
    if damaged:
        raise UserError(f"{name}: damaged weights ({damaged} is not finite); fetch or train them anew")
    if FAMILIES[config.model_type].form == "pixels":  # what AutoProcessor gives for these differs
        parts = (
            AutoImageProcessor.from_pretrained(name, **options),
            AutoTokenizer.from_pretrained(name, **options),
        )
    else:
        processor = AutoProcessor.from_pretrained(name, **options)
        if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
            raise UserError(f"{name}: has no processor (processor_config.json); fetch it anew")
        parts = processor.image_processor, processor.tokenizer, processor
    build = BlipCaptioner if config.model_type == "blip" else VisionLanguageCaptioner
    captioner = build(model.eval(), *parts)
    captioner.set_prompt()
    check_preparation(name, captioner)
    return captioner


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or not tensor.is_floating_point() or bool(tensor.isfinite().all())


# --- adapters -----------------------------------------------------------------------------------------------

ADAPTER = "adapter_config.json"


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the language model's linear layers, but for its output."""
    words = model.get_input_embeddings().weight
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not VISION.search(name)
        and module.weight.shape != words.shape  # often the same as the input's embeddings
    ]


def add_adapter(
    captioner: VisionLanguageCaptioner, rank: int, alpha: float, dropout: float, targets: Sequence[str] = ()
) -> None:
    """Freeze the model, and put trainable matrices of a low rank beside its layers (LoRA, Hu et al., 2021).

    targets: ends of the layers' names, such as q_proj; none: `linear_layers`.

    Raises:
        UserError: peft is missing, or no layer has such a name.
    """
    peft = _peft()
    chosen = [*targets] or linear_layers(captioner.model)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)
    config.base_model_name_or_path = captioner.name
    if getattr(captioner.model, "is_quantized", False):
        captioner.model = peft.prepare_model_for_kbit_training(captioner.model)
    try:
        captioner.adapter = peft.get_peft_model(captioner.model, config)
    except ValueError as error:
        raise UserError(f"--lora_targets {' '.join(targets)}: {first_line(error)}") from None


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs peft: pip install -r requirements-captioners.txt") from None
    return peft


def _load_with_adapter(folder: str, *how: Any) -> VisionLanguageCaptioner:
    """The base model that an adapter names, with the adapter beside its layers."""
    check_files(folder)
    config = read_json(Path(folder) / ADAPTER)
    config = config if isinstance(config, dict) else {}
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or (Path(base) / ADAPTER).is_file():
        raise UserError(f"{folder}: its {ADAPTER} names no base model; train it anew")
    if config.get("peft_type") != "LORA" or config.get("megatron_config"):  # which would import what it names
        raise UserError(f"{folder}: its {ADAPTER} is not that of a LoRA adapter; train it anew")
    captioner = load_captioner(base, *how)
    try:
        captioner.adapter = _peft().PeftModel.from_pretrained(captioner.model, folder, use_safetensors=True)
    except UserError:
        raise
    except Exception as error:  # of files from anywhere
        raise UserError(f"{folder}: not an adapter of {base} ({first_line(error)}); train it anew") from None
    captioner.model.eval()
    return captioner


def merge_adapter(captioner: VisionLanguageCaptioner) -> None:
    """Add the adapter to the weights of the model, which then is a whole one."""
    captioner.model = captioner.adapter.merge_and_unload()
    captioner.adapter = None


# --- checks of what was read --------------------------------------------------------------------------------


def find_missing(model: nn.Module, missing_keys: Iterable[str]) -> list[str]:
    """The parameters that are random, as no file has them, nor others that they are tied to."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in missing_keys if name in parameters]
    loaded = {parameters[name].data_ptr() for name in parameters.keys() - set(missing)}
    return [name for name in missing if parameters[name].data_ptr() not in loaded]


def _require_on_hub(name: str) -> None:
    """Raise UserError unless the hub answers and has the model; a model's own loading would try for long."""
    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: neither a folder nor a model on the hub; train_model.py writes blip_finetuned_model/"
        ) from None
    except Exception:  # of whichever network library the hub's own has
        raise UserError(
            f"{name}: no such folder, and the hub cannot be reached; where there is a network, run "
            f"`hf download {name} --local-dir blip_model`, copy the folder here, and give its name instead"
        ) from None


# --- what a folder may not hold -----------------------------------------------------------------------------


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


def check_preparation(name: str, captioner: VisionLanguageCaptioner) -> None:
    """Raise UserError where the processor's sizes, numbers or tokens are not the model's."""
    config = captioner.model.config
    if not isinstance(captioner.tokenizer.model_max_length, (int, float)):
        raise UserError(f"{name}: its tokenizer_config.json is damaged (model_max_length); fetch it anew")
    inputs = captioner.batch([captioner.prepare_array(np.full((3, 40, 30), 100, np.uint8))])
    pixels = inputs["pixel_values"]
    side = config.vision_config.image_size if config.model_type == "blip" else pixels.shape[-1]
    if not (pixels.is_floating_point() and pixels.isfinite().all() and pixels.shape[-1] == side):
        raise UserError(
            f"{name}: prepares images as {tuple(pixels.shape[1:])}, not as finite numbers of {side} x "
            f"{side}; its preprocessor_config.json is damaged, or of another model"
        )
    known = captioner.model.get_input_embeddings() if "input_ids" in inputs else None
    largest = inputs["input_ids"].max() if known is not None else 0
    if isinstance(known, nn.Embedding) and largest >= known.num_embeddings:
        raise UserError(
            f"{name}: its tokenizer has token {largest}, the model knows {known.num_embeddings}; fetch "
            f"both anew"
        )
