"""A tiny model with random weights of each family of captioners, as its folder on the hub has it.

    save_tiny("llava", folder)        # config, weights, tokenizer, processor, chat template

The matrices are enlarged: with small weights a model hardly looks at what stands before, and padding on the
wrong side would change nothing.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from captioning.captioners.blip import tiny_captioner

CAPTIONS = [
    "a red circle on grass", "two blue squares on gravel", "a large star above a small circle",
    "Write a caption for this image in one sentence. Answer with the caption alone.", "user assistant system",
]  # fmt: skip
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIDE, PATCH = 28, 14  # pixels of an image that a vision transformer takes, of a patch of it
VISION = {**SIZES, "image_size": SIDE, "patch_size": PATCH}
SQUARE = {"height": SIDE, "width": SIDE}
CHATML = (
    "START{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(image: str, start: str = "") -> str:
    """A chat template that writes `image` where an image is, and `start` before the first message."""
    return CHATML.replace("START", start).replace("IMAGE", image)


def tiny_tokenizer(
    *marks: str, bos: str | None = "<s>", adds_bos: bool = False, **named: str
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of CAPTIONS. marks: more special tokens. named: such as image_token="<image>"."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *marks, *named.values()]
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(CAPTIONS, 300, special_tokens=[*dict.fromkeys(special)], show_progress=False)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        ids = [("<s>", pieces.token_to_id("<s>"))]
        pieces._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=ids)
    end = "<|im_end|>" if bos is None else "</s>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, bos_token=bos, eos_token=end, pad_token="<pad>",
        padding_side="right", extra_special_tokens={**named}, additional_special_tokens=[*marks],
    )  # fmt: skip


def text_ids(tokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id or 1, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip


def blip(folder: Path):
    captioner = tiny_captioner(CAPTIONS)
    captioner.save(folder)
    return captioner.model, None


def git(folder: Path):
    bert = tiny_captioner(CAPTIONS).tokenizer
    ids = {
        "bos_token_id": bert.cls_token_id,
        "eos_token_id": bert.sep_token_id,
        "pad_token_id": bert.pad_token_id,
    }
    config = transformers.GitConfig(vision_config=VISION, vocab_size=len(bert), **ids, **SIZES)
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return transformers.GitForCausalLM(config), transformers.GitProcessor(image_processor, bert)


def vit_gpt2(folder: Path):
    tokenizer = tiny_tokenizer()
    text = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), transformers.GPT2Config(**text, **text_ids(tokenizer))
    )
    both.decoder_start_token_id = both.eos_token_id = tokenizer.eos_token_id
    both.pad_token_id = tokenizer.pad_token_id
    transformers.ViTImageProcessor(size=SQUARE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.VisionEncoderDecoderModel(config=both), None


def blip2(folder: Path, t5: bool = False):
    tokenizer = tiny_tokenizer(adds_bos=not t5)
    former = {**SIZES, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)}
    image_processor = transformers.BlipImageProcessor(size=SQUARE)
    processor = transformers.Blip2Processor(image_processor, tokenizer, num_query_tokens=4)
    ids = text_ids(tokenizer)
    text = {
        "model_type": "opt",
        **SIZES,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 99,
    }
    if t5:
        text = {"model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        text["decoder_start_token_id"] = tokenizer.pad_token_id
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=former, num_query_tokens=4, text_config=text | ids,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(config), processor


def blip2_t5(folder: Path):
    return blip2(folder, t5=True)


def llava(folder: Path):
    tokenizer = tiny_tokenizer(image_token="<image>", adds_bos=True)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(**SIZES, **text_ids(tokenizer), max_position_embeddings=400),
        image_token_id=tokenizer.image_token_id, image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    processor = transformers.LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chatml("<image>\\n", "{{ bos_token }}"),
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_next(folder: Path):
    tokenizer = tiny_tokenizer(image_token="<image>", adds_bos=True)
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(**SIZES, **text_ids(tokenizer), max_position_embeddings=400),
        image_token_id=tokenizer.image_token_id, image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    image_processor = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chatml("<image>\\n", "{{ bos_token }}"),
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config), processor


def llava_onevision(folder: Path):
    tokenizer = tiny_tokenizer(image_token="<image>", video_token="<video>", bos=None)
    pinpoints = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(**SIZES, **text_ids(tokenizer), num_key_value_heads=2),
        image_token_id=tokenizer.image_token_id, image_token_index=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id, video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    image_processor = transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=pinpoints)
    video_processor = transformers.LlavaOnevisionVideoProcessor(size=SQUARE)
    processor = transformers.LlavaOnevisionProcessor(
        image_processor, tokenizer, video_processor, num_image_tokens=4,
        vision_feature_select_strategy="full", chat_template=chatml("<image>\\n"),
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


QWEN_MARKS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
}  # fmt: skip


def qwen(kind: str) -> Callable:
    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]

    def build(folder: Path):
        tokenizer = tiny_tokenizer(bos=None, **QWEN_MARKS)
        patch = 16 if kind == "qwen3_vl" else 14
        rope = {
            "rope_type": "default",
            "mrope_section": [2, 1, 1],
            "rope_theta": 1e4,
            "mrope_interleaved": True,
        }
        text = {
            **SIZES,
            **text_ids(tokenizer),
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": rope,
        }
        vision = {"depth": 2, "num_heads": 4, "patch_size": patch, "spatial_merge_size": 2, "in_channels": 3}
        vision |= {
            "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            "qwen2_5_vl": {**SIZES, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56},
            "qwen3_vl": {
                "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32,
                "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
            },
        }[kind]  # fmt: skip
        ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in QWEN_MARKS}
        config = getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=vision, **ids)
        size = {"shortest_edge": 4 * patch**2, "longest_edge": 64 * patch**2}
        shape = {"patch_size": patch, "merge_size": 2, "size": size}
        shape |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        image_processor = transformers.Qwen2VLImageProcessor(**shape)
        video = (
            transformers.Qwen3VLVideoProcessor if kind == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
        )
        template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
        processor = getattr(transformers, f"{prefix}Processor")(
            image_processor, tokenizer, video(**shape), chat_template=template
        )
        return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor

    return build


def idefics3(folder: Path, smol: bool = False):
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows]
    tokenizer = tiny_tokenizer(*marks, adds_bos=not smol)
    prefix = "SmolVLM" if smol else "Idefics3"
    config = getattr(transformers, f"{prefix}Config")(
        vision_config=VISION, scale_factor=2,
        text_config=transformers.LlamaConfig(**SIZES, **text_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    parts = [getattr(transformers, f"{prefix}ImageProcessor")(**sizes), tokenizer]
    if smol:
        parts.append(
            transformers.SmolVLMVideoProcessor(size={"longest_edge": SIDE}, **{"fps": 1, "num_frames": 4})
        )
    template = chatml("<image>", "{{ bos_token }}")
    processor = getattr(transformers, f"{prefix}Processor")(*parts, image_seq_len=1, chat_template=template)
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor


def smolvlm(folder: Path):
    return idefics3(folder, smol=True)


def paligemma(folder: Path):
    tokenizer = tiny_tokenizer(image_token="<image>")
    image_processor = transformers.SiglipImageProcessor(size=SQUARE)
    image_processor.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False), projection_dim=32,
        text_config=transformers.GemmaConfig(
            **SIZES, **text_ids(tokenizer), num_key_value_heads=2, head_dim=8, num_image_tokens=4
        ),
        image_token_id=tokenizer.image_token_id, image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def gemma3(folder: Path):
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = tiny_tokenizer(adds_bos=True, **named)
    image_processor = transformers.Gemma3ImageProcessor(size=SQUARE, do_pan_and_scan=None)
    template = chatml("<start_of_image>", "{{ bos_token }}")
    processor = transformers.Gemma3Processor(
        image_processor, tokenizer, image_seq_length=4, chat_template=template
    )
    text = {**SIZES, **text_ids(tokenizer), "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(**text), mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id, image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config), processor


def internvl(folder: Path):
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = tiny_tokenizer(bos=None, **named)
    image_processor = transformers.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4)
    template = chatml("<IMG_CONTEXT>\\n")
    processor = transformers.InternVLProcessor(
        image_processor, tokenizer, transformers.InternVLVideoProcessor(size=SQUARE), image_seq_length=1,
        chat_template=template,
    )  # fmt: skip
    vision = {**SIZES, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    config = transformers.InternVLConfig(
        vision_config=vision, downsample_ratio=0.5, image_seq_length=1,
        text_config=transformers.Qwen2Config(**SIZES, **text_ids(tokenizer), num_key_value_heads=2),
        image_token_id=tokenizer.context_image_token_id,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config), processor


def florence2(folder: Path):
    tokenizer = tiny_tokenizer(image_token="<image>")
    image_processor = transformers.CLIPImageProcessor(size=SQUARE, do_center_crop=False)
    image_processor.image_seq_length = 17  # a 4 x 4 grid and its mean
    processor = transformers.Florence2Processor(image_processor, tokenizer)
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4],
        "window_size": 4, "projection_dim": 32, "max_position_embeddings": 50,
    }  # fmt: skip
    text = {
        **text_ids(tokenizer), "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "max_position_embeddings": 200, "decoder_start_token_id": 2,
    }  # fmt: skip
    config = transformers.Florence2Config(
        text_config={"model_type": "bart", **text}, vision_config=vision, is_encoder_decoder=True,
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    return transformers.Florence2ForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable] = {
    "blip": blip, "git": git, "vision-encoder-decoder": vit_gpt2, "blip-2": blip2, "blip-2 with T5": blip2_t5,
    "llava": llava, "llava_next": llava_next, "llava_onevision": llava_onevision,
    "qwen2_vl": qwen("qwen2_vl"), "qwen2_5_vl": qwen("qwen2_5_vl"), "qwen3_vl": qwen("qwen3_vl"),
    "idefics3": idefics3, "smolvlm": smolvlm, "paligemma": paligemma, "gemma3": gemma3, "internvl": internvl,
    "florence2": florence2,
}  # fmt: skip


def save_tiny(family: str, folder: Path, factor: float = 8.0, seed: int = 0) -> Path:
    """Save a model of the family into the folder. factor: by which its matrices are enlarged."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = BUILDERS[family](folder)
    if processor is not None:
        processor.save_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mm_input_projection" in name:  # of Gemma 3, which starts from zeros
                torch.nn.init.normal_(parameter, std=0.02)
            # Gemma's embeddings are its output weights too, and large ones have it repeat its last token
            if parameter.ndim >= 2 and not ("embed_tokens" in name and "emma" in type(model).__name__):
                parameter.mul_(factor)
    model.save_pretrained(folder)
    return folder
