"""A small BLIP with random weights, for which nothing has to be downloaded: the one that tests and the
demonstration train.

    captioner = tiny_captioner(captions_of_the_training_set, image_paths)

It has BLIP's architecture (Li et al., 2022) at a hundredth of its size, and starts from weights that let it
learn from a thousand images in minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError

if TYPE_CHECKING:
    from transformers import BertTokenizerFast, BlipForConditionalGeneration

    from captioning.captioners.blip import BlipCaptioner

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
MOST_WORDS = 4000  # in the vocabulary; rarer words are spelled letter by letter
IMAGE_SIZE, PATCH_SIZE = 64, 8  # pixels
WIDTH, HEADS = 96, 4
VISION_LAYERS, TEXT_LAYERS = 3, 2


def tiny_captioner(captions: Iterable[str], paths: Sequence[str] = ()) -> BlipCaptioner:
    """A small BLIP with random weights (from torch's generator) and the vocabulary of the captions.

    Its vision half starts with what a vision transformer otherwise takes long to learn: positions, attention
    of each patch to patches like it, and a patch embedding that whitens the patches of the images `paths`.
    """
    from transformers import BlipImageProcessor

    from captioning.captioners.blip import BlipCaptioner

    tokenizer = build_tokenizer(captions)
    model = build_model(tokenizer)
    processor = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    captioner = BlipCaptioner(model.eval(), processor, tokenizer)
    images = []
    for path in paths:
        with suppress(UserError):  # the training names those that cannot be read
            images.append(captioner.prepare(path))
    if images:
        whiten_patches(model.vision_model.embeddings.patch_embedding, torch.stack(images))
    return captioner


def build_tokenizer(captions: Iterable[str]) -> BertTokenizerFast:
    """BERT's WordPiece tokenizer with a vocabulary of the captions' most frequent words and all letters."""
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from transformers import BertTokenizerFast

    split = BertPreTokenizer().pre_tokenize_str
    words = Counter(word for caption in captions for word, _ in split(caption.lower()))
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(words, key=lambda word: (-words[word], word))[:MOST_WORDS]
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *frequent]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    word_pieces = BertWordPieceTokenizer(vocab=vocabulary, strip_accents=False)
    return BertTokenizerFast(tokenizer_object=word_pieces._tokenizer, bos_token="[DEC]")


def build_model(tokenizer: BertTokenizerFast) -> BlipForConditionalGeneration:
    """BLIP of the sizes above, its positions and its attention initialized."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
        "hidden_act": "relu",
        "initializer_range": WIDTH**-0.5,  # BLIP's own 0.02 is meant for large widths or loaded weights
    }
    pad, _, _, sep, _, start = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    text = {"pad_token_id": pad, "bos_token_id": start, "sep_token_id": sep, "eos_token_id": sep}
    text |= {"vocab_size": len(tokenizer), "num_hidden_layers": TEXT_LAYERS}
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_hidden_layers": VISION_LAYERS}
    model = BlipForConditionalGeneration(BlipConfig(text_config=shared | text, vision_config=shared | vision))
    with torch.no_grad():
        positions = model.vision_model.embeddings.position_embedding  # (1, 1 + num_patches, WIDTH)
        positions[0, 1:] = 0.5 * sine_positions(IMAGE_SIZE // PATCH_SIZE, WIDTH)
        for layer in model.vision_model.encoder.layers:
            start_attention(layer.self_attn.qkv.weight, layer.self_attn.projection.weight, HEADS)
    return model


def sine_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of each patch's column and row: (side * side, width), row by row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rates = 100 ** (-torch.arange(width // 4) / (width // 4))  # radians per patch
    angles = [place.flatten().unsqueeze(1) * rates for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def start_attention(qkv: Tensor, projection: Tensor, heads: int) -> None:
    """Initialize self-attention so that each patch attends to patches like it and subtracts what they share.

    This is how trained vision transformers attend (Trockman and Kolter, 2023, "Mimetic Initialization of
    Self-Attention Layers"): the product of the query and key weights is close to the identity, that of the
    value and output weights close to its negative.

    Args:
        qkv: (3 * width, width), written in place.
        projection: the output weights (width, width), written in place.
    """
    width = len(projection)
    head_width = width // heads

    def factors_near_identity(scale: float) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is `scale` times the identity, with noise."""
        noise = torch.randn(width, width) / width**0.5
        left, singular_values, right = torch.linalg.svd(scale * (noise + torch.eye(width)))
        return left * singular_values.sqrt(), singular_values.sqrt().unsqueeze(1) * right

    for head in range(heads):
        left, right = factors_near_identity(0.7)
        own = slice(head * head_width, (head + 1) * head_width)
        qkv[:width][own], qkv[width : 2 * width][own] = left[:, :head_width].T, right[:head_width]
    projection[:], qkv[2 * width :] = factors_near_identity(-0.4)


@torch.no_grad()
def whiten_patches(embedding: nn.Conv2d, images: Tensor) -> None:
    """Initialize the patch embedding with the principal components of the patches, each scaled to variance 1.

    In raw patches, brightness drowns the edges by which shapes differ.

    Args:
        embedding: written in place; it has at most as many channels as a patch has values.
        images: prepared (N, 3, S, S).
    """
    patches = F.unfold(images, embedding.kernel_size, stride=embedding.stride).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(dim=0)
    variances, components = torch.linalg.eigh((patches - mean).T.cov(correction=0))  # ascending
    largest = slice(-embedding.out_channels, None)
    weight = (components[:, largest] / (variances[largest] + 0.01).sqrt()).T
    embedding.weight.copy_(weight.view_as(embedding.weight))
    embedding.bias.copy_(-weight @ mean)
