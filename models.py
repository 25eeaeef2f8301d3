"""Show, Attend and Tell (Xu et al., 2015), soft or hard attention: Encoder, Attention, DecoderWithAttention.

Written to be read beside the paper, with three differences: beta is a vector, with one gate per channel of
the encoding; the output layer is linear in h, without equation 7's terms for the word and the context; h0 and
c0 come from one linear layer each. This file needs torch and torchvision alone. By default
`captioning/decoding/fused_decoder.py` runs, which computes the same numbers faster from the same modules;
tests compare the two. After a change of Attention or DecoderWithAttention here, run with --fused False.

Sizes: batch_size captions, each with its own copy of its image's encoding; num_pixels locations for attention
to look at, 14 x 14 = 196; encoder_dim channels, 2048 for ResNet-101.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODED_SIZE = 14  # height and width of the encoding, as in the paper (section 4.3)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) in [0, 255] -> float32 with ImageNet's mean 0 and deviation 1 per channel."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def pool_grid(grid: Tensor) -> Tensor:
    """A network's grid (N, h, w, encoder_dim) -> encoding (N, 14, 14, encoder_dim). At 256 pixels the grid is
    8 x 8: adaptive average pooling to 14 x 14 enlarges it, and neighbouring pixels share cells."""
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


def efficientnet_v2(name: str) -> EncoderSpec:
    build = partial(torchvision_network, name)
    return EncoderSpec(build, "classifier.", lambda net: net.features, 1280, lambda body: list(body)[3:])


def convnext(name: str, dim: int) -> EncoderSpec:
    def body(network: nn.Module) -> nn.Module:  # with the layer norm in front of the classifier
        return nn.Sequential(network.features, network.classifier[0])

    build = partial(torchvision_network, name)
    return EncoderSpec(build, "classifier.2.", body, dim, lambda body: [*list(body[0])[2:], body[1]])


RESNETS = ("resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
           "wide_resnet50_2", "wide_resnet101_2")  # fmt: skip
CONVNEXTS = {"convnext_tiny": 768, "convnext_small": 768, "convnext_base": 1024, "convnext_large": 1536}
# Add an encoder here; captioning/weights/pretrained.py adds those whose weights come with pip.
ENCODERS: dict[str, EncoderSpec] = {
    **{name: resnet(name, 512) for name in ("resnet18", "resnet34")},
    **{name: resnet(name) for name in RESNETS},
    **{f"efficientnet_v2_{size}": efficientnet_v2(f"efficientnet_v2_{size}") for size in "sml"},
    **{name: convnext(name, dim) for name, dim in CONVNEXTS.items()},
}


class Encoder(nn.Module):
    """A convolutional network without its classifier.

    Args:
        encoder_name: one of `ENCODERS`.
        weights: state_dict of the classification network; None leaves the weights random.

    Attributes:
        name, dim: encoder_name and encoder_dim.
        image_size: side of its training images in pixels; 256 unless loaded from a checkpoint.

    Raises:
        KeyError: unknown name. ValueError: a weight is missing or of another shape; the message names it.
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


def draw_locations(alpha: Tensor, noise: Tensor) -> Tensor:
    """Hard attention (section 4.1): the weights of the locations (..., num_pixels), 1 for one and 0 for all
    others. With noise from an exponential distribution that one is a sample of alpha; with noise 1 it is the
    maximum of alpha. Infinite noise gives alpha itself, the sample's expected value."""
    drawn = F.one_hot((alpha / noise).argmax(dim=-1), alpha.shape[-1])
    return torch.where(noise.isinf(), alpha, drawn.to(alpha.dtype))


class Attention(nn.Module):
    """Soft attention (section 4.2), or hard attention (section 4.1) where noise is given."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(
        self, encoder_out: Tensor, decoder_hidden: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the context (batch_size, encoder_dim), and alpha (batch_size, num_pixels) of sum 1.

        Args:
            encoder_out: (batch_size, num_pixels, encoder_dim).
            decoder_hidden: (batch_size, decoder_dim), the LSTM's last hidden state.
            noise: (batch_size, num_pixels) of `draw_locations`; None: soft attention.
        """
        att1 = self.encoder_att(encoder_out)  # (batch_size, num_pixels, attention_dim)
        att2 = self.decoder_att(decoder_hidden).unsqueeze(1)  # (batch_size, 1, attention_dim)
        energy = self.full_att(F.relu(att1 + att2)).squeeze(2)  # e, equation 4
        alpha = energy.softmax(dim=1)  # equation 5
        weights = alpha if noise is None else draw_locations(alpha, noise)  # soft or hard
        context = (weights.unsqueeze(2) * encoder_out).sum(dim=1)  # z, equation 13
        return context, alpha


class DecoderWithAttention(nn.Module):
    """An LSTM that looks at the image before each word (sections 3.1.2 and 4.2.1)."""

    def __init__(self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int,
                 encoder_dim: int = 2048, dropout: float = 0.5):  # fmt: skip
        super().__init__()
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    def init_hidden_state(self, encoder_out: Tensor) -> tuple[Tensor, ...]:
        """h and c (batch_size, decoder_dim) from encoder_out (batch_size, num_pixels, encoder_dim)."""
        mean = encoder_out.mean(dim=1)
        return self.init_h(mean), self.init_c(mean)

    def step(
        self, words: Tensor, encoder_out: Tensor, state: tuple[Tensor, ...], noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Feed one word of each caption; return the logits of the next word (batch_size, vocab_size), alpha
        (batch_size, num_pixels), and the new state.

        Args:
            words: (batch_size,) word indices.
            encoder_out: (batch_size, num_pixels, encoder_dim).
            state: what `init_hidden_state` or the last step returned; tensors (batch_size, ...).
            noise: of `Attention`.
        """
        h, c = state
        context, alpha = self.attention(encoder_out, h, noise)
        gate = torch.sigmoid(self.f_beta(h))  # beta, section 4.2.1; here one gate per channel
        lstm_input = torch.cat([self.embedding(words), gate * context], dim=1)
        h, c = self.decode_step(lstm_input, (h, c))  # equations 1 to 3
        return self.fc(self.dropout(h)), alpha, (h, c)

    def forward(self, encoder_out: Tensor, encoded_captions: Tensor, caption_lengths: Tensor,
                noise: Tensor | None = None) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:  # fmt: skip
        """Teacher forcing: every ground-truth token is fed, and the model predicts the next one.

        Args:
            encoder_out: (batch_size, 14, 14, encoder_dim), each caption's copy of its image's encoding.
            encoded_captions: (batch_size, max_caption_length) word indices.
            caption_lengths: (batch_size, 1), `<start>` and `<end>` counted.
            noise: (batch_size, max_caption_length - 1, num_pixels), each step's; None: soft attention.

        Returns:
            predictions (batch_size, max(decode_lengths), vocab_size): logits, 0 past a caption's end
            encoded_captions, by descending length, as are all that are returned
            decode_lengths: a list of caption_lengths - 1
            alphas (batch_size, max(decode_lengths), num_pixels), 0 past a caption's end
            sort_ind (batch_size,): each row's index in the arguments
        """
        caption_lengths, sort_ind = caption_lengths.flatten().sort(descending=True, stable=True)
        encoder_out, encoded_captions = encoder_out.flatten(1, 2)[sort_ind], encoded_captions[sort_ind]
        decode_lengths = (caption_lengths - 1).tolist()
        state = self.init_hidden_state(encoder_out)
        predictions = encoder_out.new_zeros(len(encoder_out), max(decode_lengths), self.fc.out_features)
        alphas = encoder_out.new_zeros(*predictions.shape[:2], encoder_out.shape[1])
        for t in range(max(decode_lengths)):
            n = sum(length > t for length in decode_lengths)  # captions that go on: the first, being sorted
            state = tuple(tensor[:n] for tensor in state)
            words, noise_t = encoded_captions[:n, t], None if noise is None else noise[sort_ind[:n], t]
            predictions[:n, t], alphas[:n, t], state = self.step(words, encoder_out[:n], state, noise_t)
        return predictions, encoded_captions, decode_lengths, alphas, sort_ind
