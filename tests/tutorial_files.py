"""Files like the 2018 tutorial's checkpoint: its classes, as its pickles have them, and how it saves them."""

import contextlib
import sys
import types

import pytest
import torch
import torchvision
from torch import nn

VOCABULARY = 30
SPECIAL = {"<pad>": 0, "<unk>": VOCABULARY - 3, "<start>": VOCABULARY - 2, "<end>": VOCABULARY - 1}
WORD_MAP = {f"word{index}": index for index in range(1, VOCABULARY - 3)} | SPECIAL


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc_image_size = 14
        self.resnet = nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d((14, 14))

    def forward(self, images):
        return self.adaptive_pool(self.resnet(images)).permute(0, 2, 3, 1)


class Attention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu = nn.ReLU()
        self.softmax = nn.Softmax(dim=1)

    def forward(self, pixels, hidden):
        energy = self.relu(self.encoder_att(pixels) + self.decoder_att(hidden).unsqueeze(1))
        alpha = self.softmax(self.full_att(energy).squeeze(2))
        return (pixels * alpha.unsqueeze(2)).sum(dim=1)


class DecoderWithAttention(nn.Module):
    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim, dropout):
        super().__init__()
        self.vocab_size = vocab_size
        self.dropout = dropout  # a number first, then the layer takes its name
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(p=self.dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim, 1)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def forward(self, encoding, captions):
        """Captions (N, L) of one length -> logits (N, L - 1, V)."""
        pixels = encoding.flatten(1, 2)
        h, c = self.init_h(pixels.mean(dim=1)), self.init_c(pixels.mean(dim=1))
        logits = []
        for t in range(captions.shape[1] - 1):
            context = self.sigmoid(self.f_beta(h)) * self.attention(pixels, h)
            h, c = self.decode_step(torch.cat([self.embedding(captions[:, t]), context], dim=1), (h, c))
            logits.append(self.fc(self.dropout(h)))
        return torch.stack(logits, dim=1)


for tutorial_class in (Encoder, Attention, DecoderWithAttention):
    tutorial_class.__module__ = "models"


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@contextlib.contextmanager
def tutorial_modules():
    """What the files name, importable while they are written (and by the controls, read)."""
    thnn = types.ModuleType("torch.nn.backends.thnn")
    thnn._get_thnn_function_backend = _get_thnn_function_backend
    stub = types.ModuleType("models")
    stub.__file__ = __file__  # torch.save puts the classes' source into the file
    stub.Encoder, stub.Attention, stub.DecoderWithAttention = Encoder, Attention, DecoderWithAttention
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "models", stub)
        patch.setitem(sys.modules, "torch.nn.backends", types.ModuleType("torch.nn.backends"))
        patch.setitem(sys.modules, "torch.nn.backends.thnn", thnn)
        yield patch


def _get_thnn_function_backend():
    return None


_get_thnn_function_backend.__module__ = "torch.nn.backends.thnn"


def make_tutorial() -> dict:
    """What the tutorial saves, after a step of training; in eval mode for the tests."""
    torch.manual_seed(1)
    encoder = Encoder()
    decoder = DecoderWithAttention(12, 10, 14, VOCABULARY, encoder_dim=512, dropout=0.25)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    captions = torch.randint(VOCABULARY, (2, 5))
    decoder(encoder(torch.randn(2, 3, 64, 64)), captions).square().mean().backward()  # moves batch-norm too
    optimizer.step()
    return {
        "epoch": 7,
        "epochs_since_improvement": 0,
        "bleu-4": 0.24,
        "encoder": encoder.eval(),
        "decoder": decoder.eval(),
        "encoder_optimizer": None,
        "decoder_optimizer": optimizer,
    }


def save(content, path, file_format, **options):
    with tutorial_modules():
        torch.save(content, path, _use_new_zipfile_serialization=file_format == "zip", **options)
    return path
