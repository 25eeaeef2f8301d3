"""The recurrence of `fused_decoder` over ground-truth tokens, with its backward pass written out.

Automatic differentiation would keep the hidden layer relu(att1 + att2) of every step, (N, G, P, A) numbers,
and add up the weights' gradients at every step. Here that layer is computed again in the backward pass;
gradients of the weights are one matrix product each after the last step; captions that have ended take no
further part.

Equations are those of Xu et al. (2015), in other letters: the paper's L, C and K are P, L and V here. As in
`fused_decoder`: N images, G captions of each, C cells of an encoder's grid, P pixels, D encoder_dim,
A attention_dim, H decoder_dim; T steps, W tokens in all. In a step n captions take part. Tokens are packed as
in `torch.nn.utils.rnn.PackedSequence`: the first token of every caption, then the second of those that have
one, and so on, captions by decreasing length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models import draw_locations

# (start, stop, k): images[start:stop], the first k captions of each. Attention computes a block at a time: on
# the CPU an image per block, so that its numbers stay in the cache; on a GPU one block for all images.
Block = tuple[int, int, int]


class ProjectedImages(NamedTuple):
    """What attention needs of N images at every step, computed once."""

    cells: Tensor  # (N, C, D) the encoder's grid
    projection: Tensor  # (N, P, A) encoder_att of the pooled grid
    pooling: Tensor | None  # (P, C) from cells to pixels; None where they are the same


class PackedCaptions(NamedTuple):
    """Which captions take part in which step.

    Tensors "by image" are (N, G, ...): images by the length of their longest caption, the captions of an
    image by their own, both descending, so that a step's captions are the first ones of the first images.
    """

    image_order: Tensor  # (N,) the images by their longest caption
    by_image: Tensor  # (N * G,) by_image[r]: place in the flattened (N, G) layout of the r-th longest caption
    sorted_indices: Tensor  # (N * G,) sorted_indices[r]: index in the batch of the r-th longest caption
    group: int  # G
    batch_sizes: list[int]  # (T) captions that take part: the first ones
    blocks: list[list[Block]]  # (T) of each step
    token_captions: Tensor  # (W,) each token's caption, as an index in the batch
    token_steps: Tensor  # (W,) and its step
    cpu_tokens: tuple[Tensor, Tensor]  # token_captions and token_steps on the CPU, where the captions are

    def to_images(self, rows: Tensor) -> Tensor:
        """rows (n, X), one for each of the first n captions -> (N, G, X) by image, zero elsewhere."""
        filled = rows.new_zeros(len(self.by_image), rows.shape[1])
        return filled.index_copy_(0, self.by_image[: len(rows)], rows).unflatten(0, (-1, self.group))

    def from_images(self, values: Tensor, count: int) -> Tensor:
        """values (N, G, X) by image -> (count, X), a row for each of the first captions."""
        return values.flatten(0, 1)[self.by_image[:count]]


def pack_captions(steps: Tensor, device: torch.device) -> PackedCaptions:
    """steps (N, G): tokens to feed of each caption, at least 1; on the CPU, or the host waits for it."""
    steps = steps.cpu()
    group = steps.shape[1]
    image_order = steps.max(dim=1).values.argsort(descending=True, stable=True)
    grouped_steps, order = steps[image_order].sort(dim=1, descending=True, stable=True)
    caption_at = (image_order.unsqueeze(1) * group + order).flatten()  # of each place in (N, G)
    by_image = grouped_steps.flatten().argsort(descending=True, stable=True)
    sorted_indices = caption_at[by_image]
    takes_part = grouped_steps.unsqueeze(0) > torch.arange(int(steps.max())).view(-1, 1, 1)  # (T, N, G)
    batch_sizes = takes_part.sum(dim=(1, 2)).tolist()
    captions_of_image = takes_part.sum(dim=2).tolist()  # (T, N)
    if device.type == "cpu":
        blocks = [[(i, i + 1, k) for i, k in enumerate(row) if k] for row in captions_of_image]
    else:
        blocks = [[(0, sum(k > 0 for k in row), max(row))] for row in captions_of_image]
    cpu_tokens = (
        torch.cat([sorted_indices[:size] for size in batch_sizes]),
        torch.arange(len(batch_sizes)).repeat_interleave(torch.tensor(batch_sizes)),
    )
    image_order, by_image, sorted_indices, *tokens = copy_to_device(
        [image_order, by_image, sorted_indices, *cpu_tokens], device
    )
    return PackedCaptions(
        image_order, by_image, sorted_indices, group, batch_sizes, blocks, *tokens, cpu_tokens
    )


def copy_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype on the CPU -> on the device, in one copy that the host does not wait for."""
    if device.type == "cpu":
        return list(tensors)
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        joined = joined.pin_memory()  # from other memory the driver may wait for the device
    parts = joined.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def attention_energies(projection: Tensor, query: Tensor, weight: Tensor, blocks: list[Block]) -> Tensor:
    """weight . relu(projection + query), equation 4.

    Args:
        projection: (N, P, A). query: (N, G, A). weight: (A,).
        blocks: which of these to compute, a block at a time.

    Returns:
        (N, G, P), zero where no block was.
    """
    energies = projection.new_zeros(*query.shape[:2], projection.shape[1])
    for start, stop, k in blocks:
        images = slice(start, stop)
        hidden = projection[images].unsqueeze(1) + query[images, :k].unsqueeze(2)  # (stop - start, k, P, A)
        energies[images, :k] = hidden.relu_() @ weight
    return energies


class Activations(NamedTuple):
    """What the backward pass needs of the forward pass, packed. States, gates and alphas are in full
    precision; the others in that of the products, which is lower under autocast."""

    h_in: Tensor  # (W, H) the state that goes into each step
    c_in: Tensor  # (W, H)
    tanh_c: Tensor  # (W, H) of the state that comes out
    gates: Tensor  # (W, 4 H) i, f, g, o after their sigmoids and tanh
    alphas: Tensor  # (W, P)
    betas: Tensor  # (W, D) the gate of section 4.2.1
    contexts: Tensor  # (W, D)
    queries: Tensor  # (W, A) decoder_att of h_in
    noise: Tensor | None  # (W, P) of hard attention, given

    @classmethod
    def allocate(cls, tokens: int, c: Tensor, images: ProjectedImages, noise: Tensor | None) -> Activations:
        low = images.cells
        state, pixels, attention_dim = c.shape[1], *images.projection.shape[1:]
        full = [c.new_empty(tokens, width) for width in (state, state, 4 * state, pixels)]
        widths = (state, low.shape[2], low.shape[2], attention_dim)
        h_in, betas, contexts, queries = (low.new_empty(tokens, width) for width in widths)
        return cls(h_in, *full, betas, contexts, queries, noise)

    def cell_weights(self, now: slice, images: ProjectedImages) -> Tensor:
        """What each cell counts in the contexts of the tokens `now`, (n, C)."""
        alpha = self.alphas[now]
        weights = alpha if self.noise is None else draw_locations(alpha, self.noise[now])
        weights = weights.to(images.cells.dtype)
        return weights if images.pooling is None else weights @ images.pooling


class TeacherForcing(Function):
    """The hidden states and attention maps of all tokens, with the backward pass written out."""

    @staticmethod
    def forward(
        ctx,
        packing: PackedCaptions,
        gates_of_words: Tensor,
        h: Tensor,
        c: Tensor,
        cells: Tensor,
        projection: Tensor,
        pooling: Tensor | None,
        context_weight: Tensor,
        hidden_weight: Tensor,
        hidden_bias: Tensor,
        energy_weight: Tensor,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run all steps.

        Args:
            gates_of_words: (W, 4 H), packed.
            h, c: (N * G, H), the first state of each caption, by decreasing length.
            cells, projection, pooling: `ProjectedImages`, in `image_order`. The weights are `StepWeights`.
            noise: (W, P) for `models.draw_locations`, packed; None: soft attention.

        Returns:
            hidden (W, H) and alphas (W, P), packed, both in h's dtype.
        """
        images = ProjectedImages(cells, projection, pooling)
        kept = Activations.allocate(len(gates_of_words), c, images, noise)
        hidden = torch.empty_like(kept.c_in)
        sizes = [4 * h.shape[1], cells.shape[2], projection.shape[2]]
        start = 0
        with torch.autocast(cells.device.type, enabled=False):
            for step, size in enumerate(packing.batch_sizes):
                now = slice(start, start + size)
                kept.h_in[now], kept.c_in[now] = h[:size], c[:size]
                products = torch.addmm(hidden_bias, kept.h_in[now], hidden_weight.T)
                from_hidden, gate, kept.queries[now] = products.split(sizes, dim=1)
                kept.betas[now] = gate.sigmoid()
                attend(kept, now, images, energy_weight, packing, step)
                gated = kept.betas[now] * kept.contexts[now]
                preactivations = torch.addmm(from_hidden, gated, context_weight.T).to(h.dtype)
                preactivations = preactivations + gates_of_words[now]
                h, c = lstm_cell(kept, now, preactivations)
                hidden[now] = h
                start += size
        ctx.packing = packing
        ctx.save_for_backward(*kept, *images, context_weight, hidden_weight, energy_weight)
        return hidden, kept.alphas

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hidden: Tensor, d_alphas: Tensor):
        """Backpropagation through time, the weights' gradients last. d_x is the loss's gradient with respect
        to x."""
        *saved, context_weight, hidden_weight, energy_weight = ctx.saved_tensors
        count = len(Activations._fields)
        kept, images = Activations(*saved[:count]), ProjectedImages(*saved[count:])
        packing, dtype, full = ctx.packing, images.cells.dtype, kept.c_in.dtype
        d_products = kept.h_in.new_empty(len(kept.h_in), len(hidden_weight))
        sizes = [kept.gates.shape[1], images.cells.shape[2], len(energy_weight)]
        d_preactivations, d_gate, d_query = d_products.split(sizes, dim=1)
        encoder_is_trained = ctx.needs_input_grad[4]
        d_contexts = torch.empty_like(kept.contexts) if encoder_is_trained else None
        # d_relu = d_energy x [projection + query > 0]; the gradient with respect to projection + query is
        # energy_weight x d_relu. Summed over steps and captions, and over pixels:
        d_relu_by_image = torch.zeros_like(images.projection, dtype=full)  # (N, P, A)
        d_relu_by_query = torch.empty_like(kept.queries)  # (W, A)
        # gradients with respect to this step's h and c, from step t + 1
        d_h = d_c = d_hidden.new_zeros(0, d_hidden.shape[1])
        end = len(kept.h_in)
        for step, size in reversed(list(enumerate(packing.batch_sizes))):
            now = slice(end - size, end)
            d_h = add_rows(d_hidden[now].clone(), d_h)  # and from this step's logits
            d_preactivations[now], d_c = lstm_cell_backward(kept, now, d_h, d_c)
            d_gated = d_preactivations[now] @ context_weight
            beta = kept.betas[now]
            d_gate[now] = d_gated * kept.contexts[now] * beta * (1 - beta)
            d_context = d_gated.mul_(beta)
            if encoder_is_trained:
                d_contexts[now] = d_context
            d_energies = attend_backward(kept, now, images, d_context, d_alphas[now], packing)
            d_relu_by_query[now] = energies_backward(
                kept, now, images, d_energies, d_relu_by_image, packing, step
            )
            d_query[now] = d_relu_by_query[now] * energy_weight
            d_h = (d_products[now] @ hidden_weight).to(full)
            end -= size
        # relu(p + q) = mask x (p + q), so the sum splits into a part of p and a part of q
        d_energy_weight = (d_relu_by_image * images.projection).sum(dim=(0, 1))
        d_energy_weight = d_energy_weight + (kept.queries * d_relu_by_query).sum(dim=0)
        return (
            None,  # packing
            d_preactivations.to(full),  # gates_of_words
            d_h,  # h
            d_c,  # c
            cells_backward(kept, images, d_contexts, packing) if encoder_is_trained else None,  # cells
            (d_relu_by_image * energy_weight).to(dtype),  # projection
            None,  # pooling
            d_preactivations.T @ (kept.betas * kept.contexts),  # context_weight
            d_products.T @ kept.h_in,  # hidden_weight
            d_products.sum(dim=0),  # hidden_bias
            d_energy_weight.to(dtype),  # energy_weight
            None,  # noise
        )


def attend(
    kept: Activations,
    now: slice,
    images: ProjectedImages,
    energy_weight: Tensor,
    packing: PackedCaptions,
    step: int,
) -> None:
    """Fill a step's alphas and contexts (equations 4, 5 and 13) from its queries."""
    query = packing.to_images(kept.queries[now])
    energies = attention_energies(images.projection, query, energy_weight, packing.blocks[step])
    energies = packing.from_images(energies, now.stop - now.start)
    kept.alphas[now] = energies.to(kept.alphas.dtype).softmax(dim=1)
    contexts = packing.to_images(kept.cell_weights(now, images)) @ images.cells  # (N, G, D)
    kept.contexts[now] = packing.from_images(contexts, len(energies))


def attend_backward(
    kept: Activations,
    now: slice,
    images: ProjectedImages,
    d_context: Tensor,
    d_alpha: Tensor,
    packing: PackedCaptions,
) -> Tensor:
    """The gradient with respect to a step's energies (n, P), from those with respect to its contexts (n, D)
    and alphas (n, P)."""
    alpha = kept.alphas[now]
    d_weights = packing.from_images(packing.to_images(d_context) @ images.cells.mT, len(alpha))  # (n, C)
    d_weights = d_weights if images.pooling is None else d_weights @ images.pooling.T  # (n, P)
    if kept.noise is not None:  # a drawn location has no gradient
        d_weights = d_weights * kept.noise[now].isinf()
    d_alpha = d_alpha + d_weights
    return alpha * (d_alpha - (alpha * d_alpha).sum(dim=1, keepdim=True))  # backward pass of the softmax


def energies_backward(
    kept: Activations,
    now: slice,
    images: ProjectedImages,
    d_energies: Tensor,
    d_relu_by_image: Tensor,
    packing: PackedCaptions,
    step: int,
) -> Tensor:
    """d_relu of a step, as defined in `TeacherForcing.backward`, from d_energies (n, P).

    Adds its sum over the step's captions to `d_relu_by_image` (N, P, A); returns its sum over the pixels,
    d_relu_by_query (n, A).
    """
    query = packing.to_images(kept.queries[now])
    d_energies = packing.to_images(d_energies.to(query.dtype))  # (N, G, P)
    d_relu_by_query = torch.zeros_like(query)
    for start, stop, k in packing.blocks[step]:
        projection = images.projection[start:stop]
        d_relu = projection.new_empty(stop - start, k, *projection.shape[1:])
        torch.gt(projection.unsqueeze(1), -query[start:stop, :k].unsqueeze(2), out=d_relu)  # 1 or 0
        d_relu *= d_energies[start:stop, :k].unsqueeze(3)
        d_relu_by_query[start:stop, :k] = d_relu.sum(dim=2)
        d_relu_by_image[start:stop] += d_relu.sum(dim=1)
    return packing.from_images(d_relu_by_query, now.stop - now.start)


def lstm_cell(kept: Activations, now: slice, preactivations: Tensor) -> tuple[Tensor, Tensor]:
    """h and c from the gates' preactivations (n, 4 H), equations 1 to 3; fills the step's gates and
    tanh_c."""
    i, f, g, o = kept.gates[now].chunk(4, dim=1)
    into_i, into_f, into_g, into_o = preactivations.chunk(4, dim=1)
    torch.sigmoid(into_i, out=i)
    torch.sigmoid(into_f, out=f)
    torch.tanh(into_g, out=g)
    torch.sigmoid(into_o, out=o)
    c = f * kept.c_in[now] + i * g
    kept.tanh_c[now] = c.tanh()
    return o * kept.tanh_c[now], c


def lstm_cell_backward(kept: Activations, now: slice, d_h: Tensor, d_c: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients with respect to the preactivations (n, 4 H) and to c_in (n, H); d_c has rows for the
    captions that have a step t + 1."""
    i, f, g, o = kept.gates[now].chunk(4, dim=1)
    tanh_c = kept.tanh_c[now]
    d_c = add_rows(d_h * o * (1 - tanh_c**2), d_c)
    d_preactivations = (
        d_c * g * i * (1 - i),
        d_c * kept.c_in[now] * f * (1 - f),
        d_c * i * (1 - g**2),
        d_h * tanh_c * o * (1 - o),
    )
    return torch.cat(d_preactivations, dim=1), d_c * f


def add_rows(values: Tensor, more: Tensor) -> Tensor:
    """Add `more` to the first rows of `values`, in place."""
    values[: len(more)] += more
    return values


def cells_backward(
    kept: Activations, images: ProjectedImages, d_contexts: Tensor, packing: PackedCaptions
) -> Tensor:
    """The gradient with respect to the cells (N, C, D) through the contexts, all steps at once."""
    steps = len(packing.batch_sizes)
    places = torch.cat([packing.by_image[:size] for size in packing.batch_sizes])
    places = places * steps + packing.token_steps  # among the tokens of its image

    def by_image(rows: Tensor) -> Tensor:
        filled = rows.new_zeros(len(packing.by_image) * steps, rows.shape[1])
        return filled.index_copy_(0, places, rows).unflatten(0, (len(images.cells), -1))

    return by_image(kept.cell_weights(slice(None), images)).mT @ by_image(d_contexts)
