"""The decoder's recurrence over true words, with its backward pass written out.

Automatic differentiation would keep the energies relu(projection + query) of every step, (N, G, P, A)
numbers, and add up the weights' gradients at every step. Here

* energies are computed an image at a time on the CPU, where they stay in the cache, and again in the
  backward pass instead of being kept;
* gradients of the weights are one product each after the last step, over all words at once;
* captions that have ended take no further part.

The numbers are those of the formulae (Xu et al., 2015, sections 3.1.2 and 4.2.1).

Words are packed: first the first word of every caption, then the second of those that have one, and so on,
captions by falling length; W words in all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Plan(NamedTuple):
    """Which captions take part in which step. A slot is a place in (N, G): images and, of each image, its
    captions, both by falling length. A row is a caption's place by falling length among all."""

    images: Tensor  # (N,) on the CPU: which image is where among the slots
    slots: Tensor  # (N * G,) each row's slot
    captions: Tensor  # (N * G,) each row's caption, counted through the images
    counts: list[int]  # for each step the rows that take part: the first ones
    parts: list[list[tuple[int, int, int]]]  # for each step (a, b, k): images a to b, the first k captions
    packed_captions: Tensor  # (W,) on the CPU: each word's caption
    packed_steps: Tensor  # (W,) on the CPU: and its step


def plan_steps(steps: Tensor, device: torch.device) -> Plan:
    """steps (N, G): words to put in of each caption, at least 1. On the CPU, or the device is waited for."""
    steps = steps.cpu()
    group = steps.shape[1]
    images = steps.max(dim=1).values.argsort(descending=True, stable=True)
    in_slots, order = steps[images].sort(dim=1, descending=True, stable=True)
    caption_of_slot = (images.unsqueeze(1) * group + order).flatten()
    slots = in_slots.flatten().argsort(descending=True, stable=True)
    captions = caption_of_slot[slots]
    taking_part = in_slots.unsqueeze(0) > torch.arange(int(steps.max())).view(-1, 1, 1)  # (T, N, G)
    counts = taking_part.sum(dim=(1, 2)).tolist()
    at_work = taking_part.sum(dim=2).tolist()  # (T, N), falling along N's longest captions
    if device.type == "cpu":
        parts = [[(i, i + 1, k) for i, k in enumerate(row) if k] for row in at_work]
    else:
        parts = [[(0, sum(k > 0 for k in row), max(row))] for row in at_work]
    return Plan(
        images,
        slots.to(device, non_blocking=True),
        captions.to(device, non_blocking=True),
        counts,
        parts,
        torch.cat([captions[:count] for count in counts]),
        torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
    )


def attention_scores(
    projection: Tensor, query: Tensor, weight: Tensor, parts: Iterable[tuple[int, int, int]]
) -> Tensor:
    """weight . relu(projection + query), without full_att's bias, to which the softmax is blind.

    Args:
        projection: (N, P, A). query: (N, G, A). weight: (A,).
        parts: (a, b, k): what to compute at a time, images a to b and the first k states of each.

    Returns:
        (N, G, P), zero where no part was.
    """
    scores = projection.new_zeros(*query.shape[:2], projection.shape[1])
    for a, b, k in parts:
        energy = projection[a:b].unsqueeze(1) + query[a:b, :k].unsqueeze(2)  # (b - a, k, P, A)
        scores[a:b, :k] = energy.relu_() @ weight
    return scores


class Recurrence(Function):
    """The hidden states and attention maps of all words; see `forward`."""

    @staticmethod
    def forward(
        ctx,
        plan: Plan,
        word_gates: Tensor,
        h: Tensor,
        c: Tensor,
        cells: Tensor,
        projection: Tensor,
        pooling: Tensor | None,
        context_weight: Tensor,
        hidden_weight: Tensor,
        hidden_bias: Tensor,
        score_weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run all steps.

        Args:
            word_gates: (W, 4 H), the words' half of the LSTM's input product.
            h, c: (N * G, H), the first states, a row each.
            cells, projection: (N, C, D), (N, P, A) in the order of the slots; pooling: (P, C) or None.
            context_weight, hidden_weight, hidden_bias: as in `StepWeights`.
            score_weight: (A,), full_att's.

        Returns:
            hidden (W, H) and alphas (W, P), packed, both in h's dtype.
        """
        dtype, full = cells.dtype, h.dtype
        words, group = len(word_gates), len(plan.slots) // len(cells)
        sizes = [4 * h.shape[1], cells.shape[2], projection.shape[2]]

        def packed(width: int, kind: torch.dtype = dtype) -> Tensor:
            return word_gates.new_empty(words, width, dtype=kind)

        h_in, c_in, tanh_c, hidden = packed(h.shape[1]), *(packed(h.shape[1], full) for _ in range(3))
        gates, alphas = packed(4 * h.shape[1], full), packed(projection.shape[1], full)
        betas, contexts, queries = packed(sizes[1]), packed(sizes[1]), packed(sizes[2])
        start = 0
        with torch.autocast(cells.device.type, enabled=False):
            for count, parts in zip(plan.counts, plan.parts):
                end = start + count
                slots = plan.slots[:count]
                h_in[start:end] = h[:count]
                c_in[start:end] = c[:count]
                products = torch.addmm(hidden_bias, h_in[start:end], hidden_weight.T)
                own, gate, query = products.split(sizes, dim=1)
                queries[start:end] = query
                in_slots = _to_slots(query, slots, len(cells), group)
                scores = attention_scores(projection, in_slots, score_weight, parts)
                alpha = scores.flatten(0, 1)[slots].to(full).softmax(dim=1)
                alphas[start:end] = alpha
                weights = alpha.to(dtype)
                if pooling is not None:
                    weights = weights @ pooling
                context = _to_slots(weights, slots, len(cells), group) @ cells  # (N, G, D)
                context = contexts[start:end] = context.flatten(0, 1)[slots]
                beta = betas[start:end] = gate.sigmoid()
                z = torch.addmm(own, beta * context, context_weight.T).to(full) + word_gates[start:end]
                i, f, g, o = gates[start:end].chunk(4, dim=1)
                z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
                torch.sigmoid(z_i, out=i)
                torch.sigmoid(z_f, out=f)
                torch.tanh(z_g, out=g)
                torch.sigmoid(z_o, out=o)
                c = f * c_in[start:end] + i * g
                tanh_c[start:end] = c.tanh()
                h = hidden[start:end] = o * tanh_c[start:end]
                start = end
        ctx.plan = plan
        ctx.save_for_backward(
            h_in, c_in, tanh_c, gates, alphas, betas, contexts, queries, cells, projection, pooling,
            context_weight, hidden_weight, score_weight,
        )  # fmt: skip
        return hidden, alphas

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hidden: Tensor, d_alphas: Tensor):
        """Backpropagation through time, weights last. `d_x` is the loss's gradient by x."""
        (
            h_in, c_in, tanh_c, gates, alphas, betas, contexts, queries, cells, projection, pooling,
            context_weight, hidden_weight, score_weight,
        ) = ctx.saved_tensors  # fmt: skip
        plan, dtype, full = ctx.plan, cells.dtype, c_in.dtype
        images, group, width = len(cells), len(plan.slots) // len(cells), c_in.shape[1]
        d_products = h_in.new_empty(len(h_in), len(hidden_weight))
        d_own, d_gate, d_query = d_products.split([4 * width, cells.shape[2], projection.shape[2]], dim=1)
        open_encoder = ctx.needs_input_grad[4]
        d_contexts = torch.empty_like(contexts) if open_encoder else None
        # an energy's gradient is score_weight * slope; slopes are summed over words, and over pixels
        slopes = projection.new_zeros(projection.shape, dtype=full)
        query_slopes = torch.empty_like(queries)
        dh = dc = d_hidden.new_zeros(0, width)
        end = len(h_in)
        for count, parts in zip(reversed(plan.counts), reversed(plan.parts)):
            start = end - count
            slots = plan.slots[:count]
            now = slice(start, end)
            more = d_hidden[now].clone()  # what the words' scores say; `dh` is what the next step says
            more[: len(dh)] += dh
            i, f, g, o = gates[now].chunk(4, dim=1)
            d_c = more * o * (1 - tanh_c[now] ** 2)
            d_c[: len(dc)] += dc
            d_own[now] = torch.cat(
                [
                    d_c * g * i * (1 - i),
                    d_c * c_in[now] * f * (1 - f),
                    d_c * i * (1 - g**2),
                    more * tanh_c[now] * o * (1 - o),
                ],
                dim=1,
            )
            d_gated = d_own[now] @ context_weight
            beta = betas[now]
            d_gate[now] = d_gated * contexts[now] * beta * (1 - beta)
            d_context = d_gated.mul_(beta)
            if open_encoder:
                d_contexts[now] = d_context
            d_weights = _to_slots(d_context, slots, images, group) @ cells.mT  # (N, G, C)
            d_weights = d_weights.flatten(0, 1)[slots]
            d_alpha = d_weights if pooling is None else d_weights @ pooling.T
            d_alpha = d_alphas[now] + d_alpha
            alpha = alphas[now]
            d_score = alpha * (d_alpha - (alpha * d_alpha).sum(dim=1, keepdim=True))
            d_score = _to_slots(d_score.to(dtype), slots, images, group)
            query = _to_slots(queries[now], slots, images, group)
            by_query = torch.zeros_like(query)
            for a, b, k in parts:
                slope = projection.new_empty(b - a, k, *projection.shape[1:])
                torch.gt(projection[a:b].unsqueeze(1), -query[a:b, :k].unsqueeze(2), out=slope)  # 1 or 0
                slope *= d_score[a:b, :k].unsqueeze(3)
                by_query[a:b, :k] = slope.sum(dim=2)
                slopes[a:b] += slope.sum(dim=1)
            query_slopes[now] = by_query.flatten(0, 1)[slots]
            d_query[now] = query_slopes[now] * score_weight
            dh = (d_products[now] @ hidden_weight).to(full)
            dc = d_c * f
            end = start

        d_cells = None
        if open_encoder:
            weights = alphas.to(dtype) if pooling is None else alphas.to(dtype) @ pooling
            # each word's place among its image's words
            rows = torch.cat([plan.slots[:count] for count in plan.counts])
            places = rows * len(plan.counts) + plan.packed_steps.to(rows.device)
            size = len(plan.slots) * len(plan.counts)
            d_cells = _to_slots(weights, places, images, size // images).mT @ _to_slots(
                d_contexts, places, images, size // images
            )  # (N, C, D)
        return (
            None,
            d_own.to(full),
            dh,
            dc,
            d_cells,
            (slopes * score_weight).to(dtype),
            None,
            d_own.T @ (betas * contexts),
            d_products.T @ h_in,
            d_products.sum(dim=0),
            ((slopes * projection).sum(dim=(0, 1)) + (queries * query_slopes).sum(dim=0)).to(dtype),
        )


def _to_slots(rows: Tensor, slots: Tensor, images: int, group: int) -> Tensor:
    """rows (n, X) in their slots: (N, G, X), zero elsewhere."""
    return rows.new_zeros(images * group, rows.shape[1]).index_copy_(0, slots, rows).view(images, group, -1)
