"""An independent Show, Attend and Tell, written from the formulae of Xu et al. (2015): what tests and
benchmarks compare with.

Every caption has its own copy of its image, which the encoder sees again each time; at every step attention
projects all 196 pixels anew and all logits are computed; captions are searched one image at a time,
the encoding repeated for each hypothesis. Parameters have the names that `models.py` gives them, so that both
run on the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class TextbookEncoder(nn.Module):
    """A torchvision ResNet without its classifier, pooled to 14 x 14.

    In eval mode always: with batch statistics the results could not be compared.
    """

    def __init__(self, encoder_name: str):
        super().__init__()
        network = torchvision.models.get_model(encoder_name, weights=None)
        self.network = nn.Sequential(*list(network.children())[:-2])
        self.requires_grad_(False).eval()

    def fine_tune(self) -> None:
        for block in list(self.network)[5:]:  # convolutional blocks 2 to 4
            block.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) -> encoding (N, 14, 14, D)."""
        return pool(self.network(images).permute(0, 2, 3, 1))


def pool(grid: Tensor) -> Tensor:
    """The network's grid (N, h, w, D) -> encoding (N, 14, 14, D)."""
    return F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), 14).permute(0, 2, 3, 1)


class TextbookAttention(nn.Module):
    """Section 4.2: alpha = softmax(full_att(relu(encoder_att(a) + decoder_att(h)))), z = sum(alpha a)."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, pixels: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (N, 196, D), hidden (N, H) -> context (N, D), alpha (N, 196)."""
        energy = torch.relu(self.encoder_att(pixels) + self.decoder_att(hidden)[:, None])
        alpha = torch.softmax(self.full_att(energy)[:, :, 0], dim=1)
        return (alpha[:, :, None] * pixels).sum(dim=1), alpha


class TextbookDecoder(nn.Module):
    """Section 3.1.2, with the gate of section 4.2.1; no dropout, so that losses can be compared."""

    def __init__(
        self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int, encoder_dim: int
    ):
        super().__init__()
        self.attention = TextbookAttention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def initial_state(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = pixels.mean(dim=1)
        return self.init_h(mean), self.init_c(mean)

    def step(self, words: Tensor, pixels: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """Feed one word; the logits of the next come out.

        words holds embeddings (N, E), pixels is (N, 196, D), h and c are (N, H). Returns logits (N, V), h, c,
        alpha (N, 196).
        """
        context, alpha = self.attention(pixels, h)
        gated = torch.sigmoid(self.f_beta(h)) * context
        h, c = self.decode_step(torch.cat([words, gated], dim=1), (h, c))
        return self.fc(h), h, c, alpha

    def forward(self, encoding: Tensor, captions: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Teacher forcing.

        Takes encoding (N, 14, 14, D), captions (N, L), lengths (N,). Returns, by decreasing length: logits
        (N, T, V), captions (N, L), steps (N,), alphas (N, T, 196); T is the longest length less one.
        """
        lengths, order = lengths.sort(descending=True)
        pixels, captions = encoding.flatten(1, 2)[order], captions[order]
        steps = lengths - 1
        embeddings = self.embedding(captions)
        h, c = self.initial_state(pixels)
        longest = int(steps.max())
        all_logits = pixels.new_zeros(len(pixels), longest, self.fc.out_features)
        all_alphas = pixels.new_zeros(len(pixels), longest, pixels.shape[1])
        for t in range(longest):
            n = int((steps > t).sum())  # captions that go on
            logits, h, c, alpha = self.step(embeddings[:n, t], pixels[:n], h[:n], c[:n])
            all_logits[:n, t] = logits
            all_alphas[:n, t] = alpha
        return all_logits, captions, steps, all_alphas


def textbook_loss(decoder: TextbookDecoder, encoding: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
    """Cross-entropy plus the doubly stochastic penalty (equation 14, weight 1).

    Takes an encoding for each caption (N, 14, 14, D), captions (N, L), lengths (N,).
    """
    logits, captions, steps, alphas = decoder(encoding, captions, lengths)
    steps = steps.cpu()
    logits = pack_padded_sequence(logits, steps, batch_first=True).data
    targets = pack_padded_sequence(captions[:, 1:], steps, batch_first=True).data
    return F.cross_entropy(logits, targets) + ((1 - alphas.sum(dim=1)) ** 2).mean()


@torch.no_grad()
def textbook_search(
    encoder: TextbookEncoder,
    decoder: TextbookDecoder,
    image: Tensor,
    start: int,
    end: int,
    beam_size: int,
    max_steps: int = 50,
) -> list[int]:
    """The caption of one normalized image (3, H, W), by the rule of `beam_search`, encoder included."""
    pixels = encoder(image[None]).flatten(1, 2).expand(beam_size, -1, -1)
    h, c = decoder.initial_state(pixels)
    captions = torch.full((beam_size, 1), start, device=image.device)
    totals = torch.zeros(beam_size, 1, device=image.device)
    ended: list[tuple[float, list[int]]] = []
    for t in range(max_steps):
        logits, h, c, _ = decoder.step(decoder.embedding(captions[:, -1]), pixels[: len(h)], h, c)
        totals = totals + torch.log_softmax(logits, dim=1)
        if t == 0:
            totals = totals[:1]  # the hypotheses are all the same yet
        best, places = totals.flatten().topk(beam_size - len(ended))
        parents, words = places // logits.shape[1], places % logits.shape[1]
        captions = torch.cat([captions[parents], words[:, None]], dim=1)
        live = words != end
        ended += zip(best[~live].tolist(), captions[~live, 1:-1].tolist())
        if not live.any():
            break
        captions, totals = captions[live], best[live, None]
        h, c = h[parents[live]], c[parents[live]]
    if not ended:
        return captions[totals[:, 0].argmax(), 1:].tolist()
    return max(ended, key=lambda pair: pair[0])[1]
