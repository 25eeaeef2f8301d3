"""The numbers of `models.DecoderWithAttention`, computed faster from the same modules.

Everything here is a function of the decoder; the decoder knows nothing of it. What makes it fast:

* attention's projection of an image is computed once, for all steps and all captions of the image;
* an encoder's grid is small (8 x 8 for 256 pixels) and pooled to 14 x 14: pooling is a matrix whose rows sum
  to one, so it commutes with every linear layer and is applied last, to the projection;
* all tokens' logits, and all gradients of weights, are one matrix product each after the last step;
* the backward pass of teacher forcing is written out (`fused_recurrence.py`).

Letters, not the paper's (its L, C and K are P, L and V here): N images, G captions (or beams) of each,
C cells of an encoder's grid, P pixels (196), D encoder_dim, A attention_dim, E embed_dim, H decoder_dim,
V vocab_size, L words of a padded caption. T steps, W tokens in all. Captions are packed as in
`torch.nn.utils.rnn.PackedSequence`: the first token of every caption, then the second of those that have one,
and so on, captions by decreasing length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.decoding.fused_recurrence import (
    PackedCaptions,
    ProjectedImages,
    TeacherForcing,
    attention_energies,
    copy_to_device,
    pack_captions,
)
from models import ENCODED_SIZE, Attention, DecoderWithAttention, draw_locations
from utils import UserError

# --- an image as attention needs it ------------------------------------------------------------------------


def project(attention: Attention, grid: Tensor) -> ProjectedImages:
    """The grid of N images (N, h, w, D), seen as 14 x 14 pixels, with its projection."""
    height, width = grid.shape[1:3]
    cells = grid.flatten(1, 2)
    projection = attention.encoder_att(cells)  # (N, C, A)
    if (height, width) == (ENCODED_SIZE, ENCODED_SIZE):
        return ProjectedImages(cells, projection, None)
    pooling = pooling_matrix(height, width, like=cells)
    return ProjectedImages(cells, pooling @ projection, pooling)  # the bias passes: rows sum to one


def pooling_matrix(height: int, width: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of a (height, width) grid to 14 x 14 as a matrix (196, height * width)."""
    cells = torch.eye(height * width, dtype=like.dtype, device=like.device).view(-1, 1, height, width)
    return F.adaptive_avg_pool2d(cells, ENCODED_SIZE).flatten(1).T


def initial_state(decoder: DecoderWithAttention, images: ProjectedImages) -> tuple[Tensor, Tensor]:
    """h and c (N, H) from the mean over the pixels; in the weights' dtype, also under autocast."""
    if images.pooling is None:
        mean = images.cells.mean(dim=1)
    else:
        mean = (images.pooling.mean(dim=0, keepdim=True) @ images.cells).squeeze(1)  # (1, C) @ (N, C, D)
    dtype = decoder.fc.weight.dtype
    return decoder.init_h(mean).to(dtype), decoder.init_c(mean).to(dtype)


class StepWeights(NamedTuple):
    """The weights of a step, arranged once for all steps."""

    context: Tensor  # (4 H, D) weight_ih's columns for the context
    hidden: Tensor  # (4 H + D + A, H) the weights that h is multiplied with: weight_hh, f_beta, decoder_att
    hidden_bias: Tensor  # (4 H + D + A,)
    energy_weight: Tensor  # (A,) full_att's; its bias is left out, as the softmax does not depend on it


def step_weights(decoder: DecoderWithAttention) -> StepWeights:
    cell, gate, query = decoder.decode_step, decoder.f_beta, decoder.attention.decoder_att
    return StepWeights(
        cell.weight_ih[:, decoder.embedding.embedding_dim :],
        torch.cat([cell.weight_hh, gate.weight, query.weight]),
        torch.cat([cell.bias_hh, gate.bias, query.bias]),
        decoder.attention.full_att.weight.flatten(),
    )


def word_gates(decoder: DecoderWithAttention, words: Tensor) -> Tensor:
    """The embedding's part of weight_ih x + b_ih: word indices (...) -> (..., 4 H)."""
    cell, embeddings = decoder.decode_step, decoder.embedding(words)
    return F.linear(embeddings, cell.weight_ih[:, : embeddings.shape[-1]], cell.bias_ih)


# --- one step of a search -----------------------------------------------------------------------------------


def search_noise(decoder: DecoderWithAttention, grid: Tensor) -> Tensor | None:
    """The noise of `models.draw_locations` in a search: where the decoder `takes_maximum`, 1; None: a search
    runs on alpha, which is soft attention or hard attention's expectation."""
    return grid.new_ones(1) if getattr(decoder, "takes_maximum", False) else None


class FusedSearchState:
    """The hypotheses of a search: N images, K hypotheses each.

    `plain_decoder.PlainSearchState` has the same methods, for a decoder that was changed.
    """

    def __init__(self, decoder: DecoderWithAttention, grid: Tensor):
        """grid: (N, h, w, D). K is 1 at first."""
        self.decoder = decoder
        self.images = project(decoder.attention, grid)
        self.h, self.c = (state.unsqueeze(1) for state in initial_state(decoder, self.images))  # (N, K, H)
        self.weights = step_weights(decoder)
        self.noise = search_noise(decoder, grid)

    def step(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Feed a word to each hypothesis (N, K): logits (N, K, V), alpha (N, K, P)."""
        products = F.linear(self.h, self.weights.hidden, self.weights.hidden_bias)
        images, sizes = self.images, [4 * self.h.shape[2], self.images.cells.shape[2]]
        from_hidden, gate, query = products.split([*sizes, products.shape[2] - sum(sizes)], dim=2)
        blocks = [(0, *query.shape[:2])]
        if query.device.type == "cpu":
            blocks = [(i, i + 1, query.shape[1]) for i in range(len(query))]
        energies = attention_energies(images.projection, query, self.weights.energy_weight, blocks)
        alpha = energies.softmax(dim=2)
        weights = alpha if self.noise is None else draw_locations(alpha, self.noise)
        weights = weights if images.pooling is None else weights @ images.pooling  # (N, K, C)
        context = gate.sigmoid() * (weights @ images.cells)
        gates = from_hidden + word_gates(self.decoder, words) + F.linear(context, self.weights.context)
        i, f, g, o = gates.to(self.c.dtype).chunk(4, dim=2)
        self.c = f.sigmoid() * self.c + i.sigmoid() * g.tanh()
        self.h = o.sigmoid() * self.c.tanh()
        return self.decoder.fc(self.h), alpha

    def reorder(self, parents: Tensor) -> None:
        """Go on from these hypotheses of each image: indices (N, K')."""
        rows = torch.arange(len(parents), device=parents.device).unsqueeze(1)
        self.h, self.c = self.h[rows, parents], self.c[rows, parents]

    def keep(self, index: Tensor) -> None:
        """Go on with these images only."""
        self.h, self.c = self.h[index], self.c[index]
        cells, projection, pooling = self.images
        self.images = ProjectedImages(cells[index], projection[index], pooling)


# --- teacher forcing ----------------------------------------------------------------------------------------


def teacher_forcing(
    decoder: DecoderWithAttention,
    grid: Tensor,
    captions: Tensor,
    lengths: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, PackedCaptions]:
    """The hidden states when each ground-truth token but the last is fed.

    Args:
        grid: (N, h, w, D).
        captions: (N * G, L) word indices, caption i of image i // G.
        lengths: (N * G,), at least 2. For both pass CPU tensors; CUDA tensors work, but the device has to be
            waited for.
        noise: (N * G, L - 1, P) for `models.draw_locations`, on the device; None: soft attention.

    Returns:
        hidden (W, H) and alphas (W, P), packed, W = sum(lengths - 1); the packing.
    """
    device, group = grid.device, len(captions) // len(grid)
    packing = pack_captions((lengths - 1).view(-1, group), device)
    distinct_and_tokens = captions.cpu()[packing.cpu_tokens].unique(return_inverse=True)
    distinct, tokens = copy_to_device(distinct_and_tokens, device)
    gates = F.embedding(tokens, word_gates(decoder, distinct))  # computed once for each distinct word
    images = project(decoder.attention, grid[packing.image_order])
    image_of = torch.div(packing.by_image, group, rounding_mode="floor")
    h, c = (state[image_of] for state in initial_state(decoder, images))
    dtype = images.projection.dtype  # lower under autocast
    inputs = [value if value is None else value.to(dtype) for value in (*images, *step_weights(decoder))]
    if noise is not None:
        noise = noise[packing.token_captions, packing.token_steps]
    hidden, alphas = TeacherForcing.apply(packing, gates.to(h.dtype), h, c, *inputs, noise)
    return hidden, alphas, packing


class TokenLogits(NamedTuple):
    """The logits of W tokens of a batch of captions, packed."""

    logits: Tensor  # (W, V)
    targets: Tensor  # (W,) the ground-truth tokens that they should predict
    coverage: Tensor  # (captions, P) the alphas summed over each caption's tokens
    captions: Tensor  # (W,) each token's caption, as an index in the batch
    steps: Tensor  # (W,) and its step: the target is the caption's word steps + 1
    alphas: Tensor  # (W, P)


def caption_logits(
    decoder: DecoderWithAttention,
    grid: Tensor,
    captions: Tensor,
    lengths: Tensor,
    fed: Tensor | None = None,
    noise: Tensor | None = None,
) -> TokenLogits:
    """The logits of all tokens, W = sum(lengths - 1), for training; arguments as in `teacher_forcing`.

    fed: words (N * G, L) to feed in place of the ground-truth tokens of `captions`.
    """
    hidden, alphas, packing = teacher_forcing(decoder, grid, captions if fed is None else fed, lengths, noise)
    (targets,) = copy_to_device([captions[:, 1:].cpu()[packing.cpu_tokens]], grid.device)
    coverage = alphas.new_zeros(len(captions), alphas.shape[1]).index_add(0, packing.token_captions, alphas)
    logits = decoder.fc(decoder.dropout(hidden))
    return TokenLogits(logits, targets, coverage, packing.token_captions, packing.token_steps, alphas)


@torch.no_grad()
def require_same_as_plain(decoder: DecoderWithAttention) -> None:
    """Raise UserError if the fused decoder's logits or alphas differ from `decoder.forward`, as after an edit
    of models.py. One caption looks at single locations, the other as soft attention does.

    Compares in eval mode: a change that acts in training alone, such as another dropout, is not noticed.
    """
    mode, device = decoder.training, decoder.fc.weight.device
    decoder.eval()
    encoder_dim, vocab_size = decoder.f_beta.out_features, decoder.fc.out_features
    captions = torch.arange(6, device=device).view(2, 3) % vocab_size
    grid = torch.linspace(0, 1, 2 * ENCODED_SIZE**2 * encoder_dim, device=device)
    grid = grid.view(2, ENCODED_SIZE, ENCODED_SIZE, encoder_dim).cos()
    noise = torch.ones(2, 2, ENCODED_SIZE**2, device=device)
    noise[0, :, 0], noise[1] = 1e-30, torch.inf  # so small that the first location is drawn
    lengths = torch.tensor([3, 3])
    try:
        fused_logits, _, coverage, *_ = caption_logits(decoder, grid, captions, lengths, noise=noise)
        # captions of equal length stay in their order
        logits, _, _, alphas, _ = decoder(grid, captions, lengths.unsqueeze(1).to(device), noise)
        logits = logits.transpose(0, 1).flatten(0, 1)  # packed
        same = torch.allclose(fused_logits, logits, rtol=1e-3, atol=1e-3)
        same = same and torch.allclose(coverage, alphas.sum(dim=1), rtol=1e-3, atol=1e-3)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        same = False
    decoder.train(mode)
    if not same:
        raise UserError(
            "the decoder of models.py was changed, and captioning/decoding/fused_decoder.py computes the "
            "original: give --fused False"
        )
