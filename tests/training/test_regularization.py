"""What makes the attention model memorize less: each part does what it says, and in training alone."""

import copy
import random
from functools import partial

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_captions, small_settings
from torch.utils.data import DataLoader

import train
from captioning.data.features import cache_features, encode_images
from captioning.data.prepared import UNK
from captioning.decoding.teacher_forcing import token_logits
from captioning.training import loop, losses
from captioning.training.losses import (
    CrossEntropy,
    coverage_penalty,
    drop_channels,
    drop_embeddings,
    sample_inputs,
    sampling_probability,
)
from captioning.training.optimization import Run, TrainedWeights
from captioning.training.reinforce import draw_samples
from captioning.weights.checkpoints import load_checkpoint
from datasets import CaptionDataset, Request, augment_image
from models import DecoderWithAttention, Encoder

VOCABULARY, START = 20, 18


def make_decoder() -> DecoderWithAttention:
    decoder = DecoderWithAttention(12, 10, 14, VOCABULARY, encoder_dim=16, dropout=0.0)
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # attention and words far from uniform
    return decoder


def make_captions(images: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, G, L) and (N, G), `<start>` first."""
    captions, lengths = random_captions(images, group, START - 1, 9)
    captions[:, :, 0] = START
    return captions, lengths


def make_objective(decoder, scheduled_sampling: float = 0.0, **options) -> CrossEntropy:
    settings = train.Settings(**{"dropout": 0.0} | options)
    return CrossEntropy(None, decoder, settings, Run.start("no"), {UNK: 17}, scheduled_sampling)


def fed_words(monkeypatch, objective, grid, captions, lengths) -> torch.Tensor:
    """What the objective feeds last, (N, G, L)."""
    seen = []

    def record(decoder, grid, captions, lengths, fed=None, draw_locations=None):
        seen.append(captions if fed is None else fed)
        return token_logits(decoder, grid, captions, lengths, fed, draw_locations)

    monkeypatch.setattr(losses, "token_logits", record)
    objective.start_step(lengths.numpy())
    objective(range(len(grid)), grid, captions, lengths)
    return seen[-1]


# --- in training alone --------------------------------------------------------------------------------------

ALL = {"label_smoothing": 0.3, "embedding_dropout": 0.5, "feature_dropout": 0.5, "word_dropout": 0.5,
       "scheduled_sampling": 0.5, "weight_decay": 0.5, "cached_views": 2}  # fmt: skip


def test_validation_is_as_without(prepared, tmp_path):
    """At a rate of 0 the models stay as they began, and so does what is found on the validation images."""
    rows = []
    for name, options in (("plain", {}), ("all", ALL)):
        options = options | {
            "encoder_name": "resnet18",
            "encoder_weights": "none",
            "epochs": 1,
            "decoder_lr": 0.0,
        }
        train.train(small_settings(prepared, tmp_path / name, **options))
        rows.append(load_checkpoint(tmp_path / name / "checkpoint_epoch_1.pth")["history"][0])
    for name in ("val_loss", "val_top5", "val_bleu4", "val_cider"):
        assert rows[0][name] == rows[1][name], name
    assert rows[0]["train_loss"] != pytest.approx(rows[1]["train_loss"], abs=1e-3)


def test_a_regularized_training_learns_and_resumes_to_the_bit(prepared, tmp_path):
    options = ALL | {"encoder_name": "resnet18", "encoder_weights": "none", "weight_decay": 1e-2}
    options |= {"scheduled_sampling": 0.0}  # which rises over the epochs, of which the first run has fewer
    options |= {"word_dropout": 0.1, "average_weights": 0.9, "batch_size": 8}
    train.train(small_settings(prepared, tmp_path / "a", **options, epochs=3))
    train.train(small_settings(prepared, tmp_path / "b", **options, epochs=2))
    train.train(small_settings(prepared, tmp_path / "b", **options, epochs=3, resume=True))
    a, b = (load_checkpoint(tmp_path / name / "checkpoint_epoch_3.pth") for name in "ab")
    assert a["history"][-1]["val_loss"] < a["history"][0]["val_loss"]
    for ours, theirs in ((a, b), (a["unaveraged"], b["unaveraged"])):
        assert all(torch.equal(theirs["decoder"][name], value) for name, value in ours["decoder"].items())


# --- label smoothing, dropout -------------------------------------------------------------------------------


def test_label_smoothing_follows_its_formula():
    decoder, grid, (captions, lengths) = make_decoder(), torch.rand(3, 8, 8, 16), make_captions(3, 2)
    objective = make_objective(decoder, label_smoothing=0.2, alpha_c=0.5)
    objective.start_step(lengths.numpy())
    loss = objective([0, 1, 2], grid, captions, lengths)
    found = token_logits(decoder, grid, captions, lengths)
    log_probs = found.logits.log_softmax(dim=1)
    of_target = log_probs.gather(1, found.targets.unsqueeze(1)).squeeze(1)
    expected = -(0.8 * of_target + 0.2 * log_probs.mean(dim=1)).mean()
    penalty = coverage_penalty(found.coverage()) / lengths.numel()
    torch.testing.assert_close(loss, expected + 0.5 * penalty)


def test_word_dropout_replaces_its_share_but_never_start(monkeypatch):
    decoder, grid, (captions, lengths) = make_decoder(), torch.rand(60, 2, 2, 16), make_captions(60, 5)
    captions[captions == 17] = 1
    before = captions.clone()
    fed = fed_words(monkeypatch, make_objective(decoder, word_dropout=0.25), grid, captions, lengths)
    replaced = fed != captions
    assert (fed[replaced] == 17).all() and not replaced[:, :, 0].any()
    words = torch.arange(captions.shape[2] - 1) < (lengths - 1).unsqueeze(2)
    count = int(words.sum())
    assert abs(int(replaced[:, :, 1:][words].sum()) / count - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    assert torch.equal(captions, before), "the targets stay"


def test_feature_dropout_drops_whole_channels():
    grid = torch.rand(8, 3, 3, 500) + 1
    dropped = drop_channels(grid, 0.3)
    zero = dropped == 0
    assert torch.equal(zero, zero[:, :1, :1].expand_as(zero))
    assert abs(zero.float().mean() - 0.3) < 0.04 and len({int(image.sum()) for image in zero}) > 1
    torch.testing.assert_close(dropped[~zero], grid[~zero] / 0.7)
    assert drop_channels(grid, 0.0) is grid


def test_embedding_dropout_acts_while_training():
    decoder, grid, (captions, lengths) = make_decoder(), torch.rand(3, 8, 8, 16), make_captions(3, 2)

    def logits() -> torch.Tensor:
        return token_logits(decoder, grid, captions, lengths).logits

    plain = logits()
    drop_embeddings(decoder, 0.5)
    assert not torch.equal(logits(), logits())
    values = decoder.embedding(torch.arange(VOCABULARY).repeat(50))
    zero = values == 0
    assert abs(zero.float().mean() - 0.5) < 0.05
    torch.testing.assert_close(values[~zero], 2 * decoder.embedding.weight.repeat(50, 1)[~zero])
    decoder.eval()
    torch.testing.assert_close(logits(), plain)


def test_weight_decay_shrinks_the_weights():
    decoder, encoder = make_decoder(), torch.nn.Linear(2, 2).requires_grad_(False)
    optimizer = train.build_optimizer(encoder, decoder, train.Settings(weight_decay=0.1, decoder_lr=0.5))
    before = copy.deepcopy(decoder)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for ours, theirs in zip(decoder.parameters(), before.parameters()):
        torch.testing.assert_close(ours, theirs * (1 - 0.5 * 0.1))


# --- scheduled sampling -------------------------------------------------------------------------------------


def test_scheduled_sampling_replaces_its_share_but_never_start(monkeypatch):
    """The ground truth has only words that the decoder never predicts, so that what is drawn is seen."""
    decoder, grid, (captions, lengths) = make_decoder(), torch.rand(60, 2, 2, 16), make_captions(60, 5)
    captions = torch.where((captions > 0) & (captions != START), 5, captions)
    decoder.fc.bias.data[5] = -1000.0
    fed = fed_words(monkeypatch, make_objective(decoder, 0.25), grid, captions, lengths)
    replaced = fed != captions
    assert not replaced[:, :, 0].any()
    words = torch.arange(captions.shape[2] - 1) < (lengths - 1).unsqueeze(2)
    assert not replaced[:, :, 1:][~words].any()
    count = int(words.sum())
    assert abs(int(replaced[:, :, 1:][words].sum()) / count - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5


def test_scheduled_sampling_draws_from_the_decoders_distribution():
    """Of 5,000 times the same caption: step by step, given the ground-truth tokens before."""
    decoder, grid, count = make_decoder(), torch.rand(1, 4, 4, 16), 5000
    caption, length = torch.tensor([[[START, 3, 7, 2]]]), torch.tensor([[4]])
    (fed,) = sample_inputs(decoder, grid, caption.expand(1, count, -1), length.expand(1, count), 1.0)
    with torch.no_grad():
        found = token_logits(decoder, grid, caption, length)
    for step in range(3):
        frequencies = F.one_hot(fed[:, step + 1], VOCABULARY).double().mean(dim=0)
        expected = found.logits[step].softmax(dim=0).double()
        assert ((frequencies - expected).abs() < 5 * (expected / count) ** 0.5 + 1e-3).all()


@pytest.mark.parametrize("drawn", ["next words", "whole captions"])
def test_words_drawn_in_16_bits_take_no_gradient_from_the_loss(drawn):
    """The loss that follows in the same autocast block needs the weights in 16 bits with their gradients."""
    decoder, grid, (captions, lengths) = make_decoder(), torch.rand(3, 4, 4, 16), make_captions(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        if drawn == "next words":
            captions = sample_inputs(decoder, grid, captions, lengths, 0.5)
        else:
            captions, lengths = draw_samples(decoder, grid, torch.rand(3, 2, 8), START, START + 1)
        tokens = token_logits(decoder, grid, captions, lengths)
        loss = F.cross_entropy(tokens.logits, tokens.targets)
    loss.backward()
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []


def test_the_probability_rises_in_steps():
    values = [sampling_probability(0.25, epoch, 20) for epoch in range(1, 21)]
    assert values[0] == 0 and values == sorted(values) and values[10:] == [0.25] * 10
    assert sorted(set(values)) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25])


# --- the average of the weights -----------------------------------------------------------------------------


def test_the_average_follows_its_formula_and_is_what_is_kept(prepared, tmp_path, monkeypatch):
    averages = []

    class Recorded(TrainedWeights):
        def __init__(self, models, decay):
            super().__init__(models, decay)
            averages.append(self)
            self.expected = {name: value.double() for name, value in models["decoder"].state_dict().items()}
            self.count = 0

        def update(self, steps):
            super().update(steps)
            self.count += 1
            assert steps == self.count
            decay = min(0.9, (1 + self.count) / (10 + self.count))
            for name, value in self.models["decoder"].state_dict().items():
                self.expected[name] = decay * self.expected[name] + (1 - decay) * value.double()

    monkeypatch.setattr(loop, "TrainedWeights", Recorded)
    options = {"encoder_name": "resnet18", "encoder_weights": "none", "average_weights": 0.9}
    train.train(small_settings(prepared, tmp_path, **options, batch_size=4))
    (average,) = averages
    assert average.count == 16
    last = load_checkpoint(tmp_path / "checkpoint_epoch_2.pth")
    for name, value in average.expected.items():
        torch.testing.assert_close(last["decoder"][name].double(), value, atol=1e-6, rtol=1e-5, msg=name)
        if not name.endswith("full_att.bias"):
            assert not torch.equal(last["decoder"][name], last["unaveraged"]["decoder"][name]), name
    assert "encoder" not in last["unaveraged"], "it is frozen"
    best = load_checkpoint(tmp_path / "best_checkpoint.pth")
    of_epoch = load_checkpoint(tmp_path / f"checkpoint_epoch_{len(best['history'])}.pth")
    for file in ("best_checkpoint.pth", "decoder.pth"):
        for name, value in load_checkpoint(tmp_path / file)["decoder"].items():
            assert torch.equal(value, of_epoch["decoder"][name]), name


@pytest.mark.slow
def test_the_average_of_a_trainable_encoder_resumes_to_the_bit(prepared, tmp_path):
    options = {"encoder_name": "resnet18", "encoder_weights": "none", "average_weights": 0.9}
    options |= {"fine_tune_encoder": True, "batch_size": 8}
    train.train(small_settings(prepared, tmp_path / "a", **options))
    train.train(small_settings(prepared, tmp_path / "b", **options, epochs=1))
    train.train(small_settings(prepared, tmp_path / "b", **options, resume=True))
    a, b = (load_checkpoint(tmp_path / name / "checkpoint_epoch_2.pth") for name in "ab")
    for ours, theirs in ((a, b), (a["unaveraged"], b["unaveraged"])):
        for part in ("encoder", "decoder"):
            for name, value in ours[part].items():
                assert torch.equal(theirs[part][name], value), name
    assert any(not torch.equal(a["encoder"][n], v) for n, v in a["unaveraged"]["encoder"].items())


def test_without_a_decay_the_models_are_their_own_average():
    decoder = make_decoder()
    weights = TrainedWeights({"decoder": decoder})
    weights.update(1)
    assert weights.averaged("decoder") is decoder and "unaveraged" not in weights.states()


# --- cached views -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def views(prepared):
    """A cache of three views of each training image: (encoder, the data set that drew them, the file)."""
    torch.manual_seed(0)
    encoder, dataset = Encoder("resnet18"), CaptionDataset(prepared, "train", augment=True)
    draw = partial(dataset.draw_views, count=3)
    return encoder, dataset, cache_features(encoder, prepared, "train", torch.device("cpu"), 3, draw)


def test_cached_views_are_the_image_and_changes_of_it(prepared, views):
    encoder, dataset, file = views
    with h5py.File(prepared / "train_images.hdf5") as stored, h5py.File(file) as cache:
        images, features = torch.from_numpy(stored["images"][:4]), cache["features"]
        assert features.shape == (len(dataset), 3, 2, 2, 512)
        for index, image in enumerate(images):
            drawn = dataset.draw_views(index, 3)
            assert torch.equal(drawn[0], image) and torch.equal(dataset.draw_views(index, 3), drawn)
            assert not torch.equal(drawn[1], image) and not torch.equal(drawn[1], drawn[2])
            flip = dataset.may_flip[index]
            assert torch.equal(drawn[2], augment_image(image, random.Random(f"{index} 2"), flip))
            truth = encode_images(encoder, drawn).numpy()
            assert np.abs(features[index] - truth).max() < 1e-3 * np.abs(truth).max()


def test_one_view_is_drawn_by_the_requests_seed(prepared, views):
    *_, file = views
    dataset, indices = CaptionDataset(prepared, "train", file), np.arange(32)
    with h5py.File(file) as cache:
        features = torch.from_numpy(cache["features"][:])  # (I, views, h, w, D)

    def drawn(seed: int) -> list[int]:
        images = dataset[Request(indices, seed)][0]
        same = (images.unsqueeze(1) == features).flatten(2).all(dim=2)  # (I, views)
        assert (same.sum(dim=1) == 1).all()
        return same.int().argmax(dim=1).tolist()

    first = drawn(1)
    assert first == drawn(1) and first != drawn(2) and set(first) == {0, 1, 2}
    requests = [Request(indices[:8], 1), Request(indices[8:], 2)]
    batches = [
        [images for images, *_ in DataLoader(dataset, batch_size=None, sampler=requests, num_workers=workers)]
        for workers in (0, 2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*batches))


def test_caches_of_other_views_are_other_files(prepared, views):
    encoder, dataset, file = views
    made = file.stat().st_mtime_ns
    two = cache_features(
        encoder, prepared, "train", torch.device("cpu"), 2, partial(dataset.draw_views, count=2)
    )
    one = cache_features(encoder, prepared, "train", torch.device("cpu"))
    assert len({one, two, file}) == 3 and file.stat().st_mtime_ns == made
    draw = partial(dataset.draw_views, count=3)
    assert cache_features(encoder, prepared, "train", torch.device("cpu"), 3, draw) == file
    assert file.stat().st_mtime_ns == made


def test_validation_images_are_never_changed(prepared, tmp_path):
    settings = small_settings(prepared, tmp_path, cached_views=2)
    encoder = Encoder("resnet18")
    run, stage = Run.start("no"), train.Stage(is_fine_tuned=False, is_self_critical=False)
    sampler = train.build_sampler(32, settings, run, training=True)
    training, validation = train.start_stage(stage, 1, encoder, sampler, settings, run)
    assert training.dataset._open().shape[1] == 2 and not validation.dataset.augment
    with h5py.File(prepared / "val_images.hdf5") as stored:
        truth = encode_images(encoder, torch.from_numpy(stored["images"][:])).numpy()
    features = validation.dataset._open()
    assert len(features.shape) == 4 and np.abs(features[:] - truth).max() < 1e-3 * np.abs(truth).max()
