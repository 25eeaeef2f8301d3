"""Show, Attend and Tell (Xu et al., 2015), soft or hard attention: Encoder, Attention, DecoderWithAttention.

Written to be read beside the paper, with three differences: beta is a vector, with one gate per channel of
the encoding; the output layer is linear in h, without equation 7's terms for the word and the context; h0 and
c0 come from one linear layer each. This file needs torch and torchvision alone. Change a formula here, and
it holds in training and in search; unchanged ones run as faster equivalents (docs/change_the_model.md).

Sizes: batch_size images with num_captions each, decoded side by side (ground truth in training, hypotheses
in a beam search, samples); num_pixels locations to look at, 14 x 14 = 196; encoder_dim channels, 2048 for
ResNet-101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

ENCODED_SIZE = 14  # height and width of the encoding, as in the paper (section 4.3)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) in [0, 255] -> float32, normalized with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def pool_grid(grid: Tensor) -> Tensor:
    """A network's grid (N, h, w, encoder_dim) -> encoding (N, 14, 14, encoder_dim). At 256 pixels the grid is
    8 x 8: adaptive average pooling to 14 x 14 enlarges it, and neighbouring locations share cells."""
    return F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), ENCODED_SIZE).permute(0, 2, 3, 1)


class EncoderSpec(NamedTuple):
    """How a classification network becomes an encoder."""

    build: Callable[[], nn.Module]  # the classification network, with random weights
    head: str  # prefix of its classifier's weights, which are not used
    body: Callable[[nn.Module], nn.Module]  # its convolutional part: (N, 3, H, W) -> (N, dim, H / 32, W / 32)
    dim: int  # channels of the body's output
    fine_tuned: Callable[[nn.Module], list[nn.Module]]  # the body's modules from stride 8 on
    pixel_stats: tuple[float, float] | None = None  # (mean, deviation) in [0, 255]; None: ImageNet's


def torchvision_network(name: str) -> nn.Module:
    import torchvision  # here, as it takes longer than all the rest of a script's start

    return torchvision.models.get_model(name, weights=None)


def resnet(name: str, dim: int = 2048) -> EncoderSpec:
    def body(network: nn.Module) -> nn.Module:  # conv, bn, relu, pool, blocks 1 to 4
        return nn.Sequential(*list(network.children())[:-2])

    return EncoderSpec(partial(torchvision_network, name), "fc.", body, dim, lambda body: list(body)[5:])


RESNETS = ("resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
           "wide_resnet50_2", "wide_resnet101_2")  # fmt: skip
# Add an encoder here; captioning/weights/pretrained.py adds further families.
ENCODERS: dict[str, EncoderSpec] = {
    **{name: resnet(name, 512) for name in ("resnet18", "resnet34")},
    **{name: resnet(name) for name in RESNETS},
}


class Encoder(nn.Module):
    """A convolutional network without its classifier.

    encoder_name: one of `ENCODERS`. weights: state_dict of the classification network; None: random ones.
    Attributes: name, dim (encoder_name and encoder_dim); image_size, the side of its training images in
    pixels, 256 unless loaded from a checkpoint.
    Raises KeyError for an unknown name, ValueError for a missing weight or one of another shape.
    """

    def __init__(self, encoder_name: str = "resnet101", weights: dict[str, Tensor] | None = None):
        super().__init__()
        spec = ENCODERS[encoder_name]
        network = spec.build()
        if weights is not None:
            needed = {k: v for k, v in network.state_dict().items() if not k.startswith(spec.head)}
            for name, value in needed.items():
                if name not in weights or weights[name].shape != value.shape:
                    raise ValueError(f"{name} is missing or of another shape")
            network.load_state_dict({name: weights[name] for name in needed}, strict=False)
        self.name, self.dim, self.pixel_stats, self.image_size = encoder_name, spec.dim, spec.pixel_stats, 256
        self.network = spec.body(network)
        self.eval().fine_tune(False)

    def grid(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) -> the network's own grid (N, H / 32, W / 32, encoder_dim)."""
        if self.pixel_stats:  # of this network's training images: convert from ImageNet's normalization
            mean, std = self.pixel_stats
            scale = torch.tensor(IMAGENET_STD, device=images.device) * 255 / std
            shift = (torch.tensor(IMAGENET_MEAN, device=images.device) * 255 - mean) / std
            images = images * scale.view(3, 1, 1) + shift.view(3, 1, 1)
        return self.network(images).permute(0, 2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) -> encoding (N, 14, 14, encoder_dim)."""
        return pool_grid(self.grid(images))

    def fine_tune(self, fine_tune: bool = True) -> None:
        """Make the layers from stride 8 on trainable, or freeze them; the earlier ones stay frozen."""
        self.requires_grad_(False)
        for module in ENCODERS[self.name].fine_tuned(self.network):
            module.requires_grad_(fine_tune)

    def train(self, mode: bool = True) -> Encoder:
        """Ignore `mode`: batch norm uses its stored statistics; stochastic depth and dropout stay off."""
        return super().train(False)


class Attention(nn.Module):
    """Soft attention (section 4.2): a word sees the expected value over all locations."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, encoder_out: Tensor, att1: Tensor, decoder_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """From encoder_out (batch_size, num_pixels, encoder_dim), att1 = encoder_att(encoder_out) and the
        LSTM's last hidden state (batch_size, num_captions, decoder_dim): the context (batch_size,
        num_captions, encoder_dim), and alpha (batch_size, num_captions, num_pixels) of sum 1."""
        att2 = self.decoder_att(decoder_hidden)  # (batch_size, num_captions, attention_dim)
        alpha = self.energies(att1, att2).softmax(dim=2)  # equation 5
        return self.look(alpha) @ encoder_out, alpha  # z, equation 13

    def energies(self, att1: Tensor, att2: Tensor) -> Tensor:
        """e (batch_size, num_captions, num_pixels), equation 4."""
        return self.full_att(F.relu(att1.unsqueeze(1) + att2.unsqueeze(2))).squeeze(3)

    def look(self, alpha: Tensor) -> Tensor:
        """How much each location counts in the context, of alpha's shape."""
        return alpha


class HardAttention(Attention):
    """Hard attention (section 4.1): within `sampling`, a word sees one location, drawn from alpha; elsewhere
    the likeliest one if `takes_maximum`, else the expected value."""

    def __init__(self, *sizes: int, takes_maximum: bool = False):
        super().__init__(*sizes)
        self.takes_maximum, self.is_soft, self.samples = takes_maximum, None, []

    @contextmanager
    def sampling(self, is_soft: Tensor) -> Iterator[list[Tensor]]:
        """Draw samples, in this context; yield the list that will have each step's, one-hot like alpha.
        is_soft: (batch_size, num_captions, 1), captions that see the expected value instead."""
        self.is_soft, self.samples = is_soft, []
        try:
            yield self.samples
        finally:
            self.is_soft = None

    def look(self, alpha: Tensor) -> Tensor:
        if self.is_soft is None:
            return F.one_hot(alpha.argmax(dim=2), alpha.shape[2]).to(alpha) if self.takes_maximum else alpha
        noise = torch.empty_like(alpha).exponential_()  # argmax of alpha / noise is a sample of alpha
        self.samples.append(F.one_hot((alpha / noise).argmax(dim=2), alpha.shape[2]).to(alpha))
        return torch.where(self.is_soft[: alpha.shape[0], : alpha.shape[1]], alpha, self.samples[-1])


class LSTMCell(nn.LSTMCell):
    """Equations 1 to 3, for inputs and states of any leading dimensions."""

    def forward(self, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = (s.to(self.weight_hh.dtype) for s in state)  # also under autocast
        gates = F.linear(inputs, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = gates.to(c.dtype).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class DecoderWithAttention(nn.Module):
    """An LSTM that looks at the image before each word (sections 3.1.2 and 4.2.1)."""

    def __init__(self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int,
                 encoder_dim: int = 2048, dropout: float = 0.5,
                 attention: Callable[..., Attention] = Attention):  # fmt: skip
        super().__init__()
        self.attention = attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    def init_hidden_state(self, encoder_out: Tensor) -> tuple[Tensor, ...]:
        """h and c (batch_size, 1, decoder_dim) from encoder_out (batch_size, num_pixels, encoder_dim)."""
        mean = encoder_out.mean(dim=1, keepdim=True)
        return self.init_h(mean), self.init_c(mean)

    def step(self, embeddings: Tensor, encoder_out: Tensor, att1: Tensor,
             state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Feed a word to each caption: embeddings (batch_size, num_captions, embed_dim); encoder_out and att1
        as in `Attention`; state as returned by `init_hidden_state` or by the last step.

        Return what `logits` takes (batch_size, num_captions, decoder_dim), alpha (batch_size, num_captions,
        num_pixels), and the new state, tensors (batch_size, num_captions, ...)."""
        h, c = state
        context, alpha = self.attention(encoder_out, att1, h)
        gate = torch.sigmoid(self.f_beta(h))  # beta, section 4.2.1; here one gate per channel
        h, c = self.decode_step(torch.cat([embeddings, gate * context], dim=2), (h, c))
        return h, alpha, (h, c)

    def logits(self, hidden: Tensor) -> Tensor:
        """The next word's logits (..., vocab_size), from what `step` returns first."""
        return self.fc(self.dropout(hidden))

    def teacher_forcing(self, encoder_out: Tensor, encoded_captions: Tensor,
                        decode_lengths: Tensor) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """Feed the ground-truth tokens. Images are sorted by their longest caption, the captions of an image
        by length, both descending: each step runs on the first n images and their first g captions.

        Args:
            encoder_out: (batch_size, num_pixels, encoder_dim).
            encoded_captions: word indices (batch_size, num_captions, max_caption_length).
            decode_lengths: tokens to feed (batch_size, num_captions); on the CPU, or each step waits for it.

        Returns what each step gives to `logits` (n, g, decoder_dim), and its alpha (n, g, num_pixels)."""
        words = self.embedding(encoded_captions[:, :, : int(decode_lengths.max())]).unbind(dim=2)
        att1 = self.attention.encoder_att(encoder_out)  # once for all steps and captions
        state = tuple(s.expand(-1, len(decode_lengths[0]), -1) for s in self.init_hidden_state(encoder_out))
        hidden, alphas = [], []
        for t in range(len(words)):
            goes_on = decode_lengths > t
            n, g = int(goes_on.any(dim=1).sum()), int(goes_on.any(dim=0).sum())
            if n < len(encoder_out):  # even a slice of everything costs time in the backward pass
                encoder_out, att1 = encoder_out[:n], att1[:n]
            state = tuple(s[:n, :g] for s in state)
            h, alpha, state = self.step(words[t][:n, :g], encoder_out, att1, state)
            hidden.append(h)
            alphas.append(alpha)
        return hidden, alphas

    def forward(self, encoder_out: Tensor, encoded_captions: Tensor, caption_lengths: Tensor
                ) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:  # fmt: skip
        """Teacher forcing with one caption per image: encoder_out (batch_size, 14, 14, encoder_dim), word
        indices (batch_size, max_caption_length), lengths (batch_size, 1) that count `<start>` and `<end>`.

        Returns:
            predictions (batch_size, max(decode_lengths), vocab_size): logits, 0 past a caption's end
            encoded_captions, by descending length, as are all that are returned
            decode_lengths: a list of caption_lengths - 1
            alphas (batch_size, max(decode_lengths), num_pixels), 0 past a caption's end
            sort_ind (batch_size,): each row's index in the arguments
        """
        caption_lengths, sort_ind = caption_lengths.flatten().sort(descending=True, stable=True)
        encoder_out, encoded_captions = encoder_out.flatten(1, 2)[sort_ind], encoded_captions[sort_ind]
        lengths = caption_lengths.cpu().unsqueeze(1) - 1
        hidden, alphas = self.teacher_forcing(encoder_out, encoded_captions.unsqueeze(1), lengths)
        predictions = pad_sequence([self.logits(h)[:, 0] for h in hidden])
        alphas = pad_sequence([alpha[:, 0] for alpha in alphas])
        return predictions, encoded_captions, lengths.flatten().tolist(), alphas, sort_ind
