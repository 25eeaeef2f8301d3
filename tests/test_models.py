"""The models against plain ones written from the formulae of Xu et al. (2015)."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import random_captions

from captioning.data.features import encode_images
from captioning.data.text_files import load_embeddings
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.teacher_forcing import PackedCaptions, token_logits
from captioning.weights.pretrained import build_encoder, fold_batch_norms
from models import DecoderWithAttention, Encoder, HardAttention, LSTMCell, normalize_images, pool_grid
from tests.reference import TextbookDecoder
from utils import UserError

VOCABULARY = 50
SIZES = {"attention_dim": 24, "embed_dim": 20, "decoder_dim": 28, "vocab_size": VOCABULARY, "encoder_dim": 32}


def make_decoder(fast: bool = False, **options) -> DecoderWithAttention:
    decoder = DecoderWithAttention(**SIZES | options, dropout=0.5).eval()
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # attention far from uniform
    assert not fast or use_fast_energies(decoder)
    return decoder


def textbook_decoding(decoder, grid, captions, lengths):
    """The independent implementation: itself; logits (N * G, T, V), alphas (N * G, T, 196) in the batch's
    order."""
    textbook = TextbookDecoder(**SIZES).to(grid.dtype)
    textbook.load_state_dict(decoder.state_dict())
    copies, lengths = pool_grid(grid).repeat_interleave(captions.shape[1], dim=0), lengths.flatten()
    order = lengths.sort(descending=True).indices.argsort()
    logits, _, _, alphas = textbook(copies, captions.flatten(0, 1), lengths)
    return textbook, logits[order], alphas[order]


def total_loss(logits, targets, coverage):
    return F.cross_entropy(logits, targets) + ((1 - coverage) ** 2).mean()


def test_the_tutorials_call_gives_its_five_values():
    decoder, encodings = make_decoder(), torch.rand(7, 14, 14, 32)
    captions, lengths = random_captions(7, 1, VOCABULARY - 1, 12)
    lengths[3] = lengths[5]  # captions of one length keep their order
    captions, lengths = captions[:, 0], lengths
    predictions, sorted_captions, decode_lengths, alphas, order = decoder(encodings, captions, lengths)
    textbook = TextbookDecoder(**SIZES)
    textbook.load_state_dict(decoder.state_dict())
    logits, textbook_captions, steps, maps = textbook(encodings, captions, lengths[:, 0])
    assert torch.equal(order, lengths[:, 0].sort(descending=True, stable=True).indices)
    assert torch.equal(sorted_captions, captions[order]) and torch.equal(sorted_captions, textbook_captions)
    assert decode_lengths == steps.tolist() == sorted(decode_lengths, reverse=True)
    assert predictions.shape == (7, decode_lengths[0], VOCABULARY) and alphas.shape == maps.shape
    torch.testing.assert_close(predictions, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alphas, maps, atol=1e-5, rtol=1e-5)
    for row, length in enumerate(decode_lengths):
        assert not predictions[row, length:].any() and not alphas[row, length:].any()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("side, group", [(2, 1), (7, 3), (8, 1), (8, 3), (14, 3), (16, 2)])
def test_teacher_forcing_equals_independent_reference(side, group, fast):
    """Logits, alphas, and all gradients, the encoder's too; in float64."""
    decoder, grid = make_decoder(fast).double(), torch.rand(3, side, side, 32, dtype=torch.float64)
    grid.requires_grad_()  # as where the encoder is fine-tuned
    captions, lengths = random_captions(3, group, VOCABULARY - 1, 12)
    tokens = token_logits(decoder, grid, captions, lengths)
    total_loss(tokens.logits, tokens.targets, tokens.coverage()).backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()} | {"grid": grid.grad}

    grid.grad = None
    textbook, logits, alphas = textbook_decoding(decoder, grid, captions, lengths)
    assert len(tokens.logits) == int((lengths - 1).sum())
    places = tokens.packing.captions, tokens.packing.steps
    targets = captions.flatten(0, 1)[:, 1:][places]
    assert torch.equal(tokens.targets, targets) and torch.equal(tokens.captions, places[0])
    torch.testing.assert_close(tokens.logits, logits[places])
    torch.testing.assert_close(tokens.alphas, alphas[places])
    torch.testing.assert_close(tokens.coverage(), alphas.sum(dim=1))
    total_loss(logits[places], targets, alphas.sum(dim=1)).backward()
    expected = {name: parameter.grad for name, parameter in textbook.named_parameters()} | {"grid": grid.grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("fast", [True, False])
def test_captions_side_by_side_are_captions_one_at_a_time(fast):
    """Logits, alphas and the gradients of their sums; in float64."""
    decoder, grid = make_decoder(fast).double(), torch.rand(4, 8, 8, 32, dtype=torch.float64)
    captions, lengths = random_captions(4, 5, VOCABULARY - 1, 12)

    def results(images: slice, group: slice):
        tokens = token_logits(decoder, grid[images], captions[images, group], lengths[images, group])
        (
            F.cross_entropy(tokens.logits, tokens.targets, reduction="sum") + tokens.alphas.square().sum()
        ).backward()
        order = torch.argsort(tokens.captions * 100 + tokens.packing.steps)  # caption by caption
        return tokens.logits[order].detach(), tokens.alphas[order].detach()

    together = results(slice(None), slice(None))
    gradients = [parameter.grad.clone() for parameter in decoder.parameters()]
    decoder.zero_grad()
    alone = [results(slice(n, n + 1), slice(g, g + 1)) for n in range(4) for g in range(5)]
    for ours, theirs in zip(together, zip(*alone)):
        torch.testing.assert_close(ours, torch.cat(theirs))
    for (name, parameter), gradient in zip(decoder.named_parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


def test_captions_are_packed_by_length():
    lengths = torch.tensor([[2, 4], [1, 1], [5, 3]])
    packing = PackedCaptions(lengths)
    assert packing.image_order.tolist() == [2, 0, 1]
    assert packing.caption_order.tolist() == [[4, 5], [1, 0], [2, 3]]
    assert torch.equal(packing.decode_lengths, lengths.flatten()[packing.caption_order])
    assert packing.batch_sizes == [6, 4, 3, 2, 1]
    assert packing.captions[:6].tolist() == [4, 1, 5, 0, 2, 3] and packing.captions[10:].tolist() == [
        4,
        1,
        5,
        4,
        1,
        4,
    ]
    numbers = torch.arange(6).view(3, 2) * 10
    steps = []  # a number for each caption and step, as `teacher_forcing` gives its results
    for t in range(5):
        n, g = (int((packing.decode_lengths > t).any(dim=dim).sum()) for dim in (1, 0))
        steps.append((packing.sort(numbers) + t)[:n, :g].unsqueeze(2))
    assert torch.equal(packing.pack(steps)[:, 0], packing.captions * 10 + packing.steps)


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_follows_full(fast):
    decoder, grid = make_decoder(fast), torch.rand(3, 8, 8, 32)
    captions, lengths = random_captions(3, 2, VOCABULARY - 1, 12)
    gradients = []
    for half in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            tokens = token_logits(decoder, grid, captions, lengths)
            loss = total_loss(tokens.logits, tokens.targets, tokens.coverage())
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in decoder.named_parameters()})
    for name, gradient in gradients[0].items():
        if name != "attention.full_att.bias":  # the softmax does not depend on it
            assert F.cosine_similarity(gradients[1][name].flatten(), gradient.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("fast", [True, False])
def test_attention_follows_its_formula(fast):
    attention = make_decoder(fast).attention
    pixels, hidden = torch.rand(5, 196, 32), torch.randn(5, 3, 28)
    context, alpha = attention(pixels, attention.encoder_att(pixels), hidden)
    for g in range(3):
        queries = attention.decoder_att(hidden[:, g]).unsqueeze(1)
        energy = attention.full_att(F.relu(attention.encoder_att(pixels) + queries)).squeeze(2)
        torch.testing.assert_close(alpha[:, g], energy.softmax(dim=1))
        torch.testing.assert_close(context[:, g], (energy.softmax(dim=1).unsqueeze(2) * pixels).sum(dim=1))


def test_the_lstm_cell_is_torchs_for_any_leading_dimensions():
    cell, torchs = LSTMCell(6, 4), torch.nn.LSTMCell(6, 4)
    torchs.load_state_dict(cell.state_dict())
    inputs, h, c = torch.randn(3, 2, 6), torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    expected = torchs(inputs.flatten(0, 1), (h.flatten(0, 1), c.flatten(0, 1)))
    for ours, theirs in zip(cell(inputs, (h, c)), expected):
        torch.testing.assert_close(ours.flatten(0, 1), theirs)


def test_captions_do_not_depend_on_their_neighbours():
    decoder, grid = make_decoder(), torch.rand(6, 8, 8, 32)
    captions, lengths = (values.squeeze(1) for values in random_captions(6, 1, VOCABULARY - 1, 12))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    scores, _, _, alphas, rank = decoder(grid, captions, lengths)
    other_scores, _, _, other_alphas, other_rank = decoder(grid[order], captions[order], lengths[order])
    here, there = rank.argsort()[order], other_rank.argsort()
    torch.testing.assert_close(other_alphas[there], alphas[here])
    torch.testing.assert_close(other_scores[there], scores[here])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("options", [{}, {"attention": HardAttention}], ids=["soft", "hard"])
def test_parameter_names_are_the_published_ones(fast, options):
    modules = {name.rsplit(".", 1)[0] for name in make_decoder(fast, **options).state_dict()}
    assert modules == {
        "attention.encoder_att", "attention.decoder_att", "attention.full_att",
        "embedding", "decode_step", "init_h", "init_c", "f_beta", "fc",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, dim",
    [
        ("resnet18", 512),
        ("resnet50", 2048),
        ("efficientnet_lite0", 1280),
        ("efficientnet_v2_s", 1280),
        ("convnext_tiny", 768),
    ],
)
def test_encoder_shapes_and_fine_tuning(name, dim):
    encoder = build_encoder(name, "none")
    images = normalize_images(torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    encoding, grid = encoder(images), encoder.grid(images)
    assert encoding.shape == (2, 14, 14, dim) and grid.shape == (2, 8, 8, dim) and encoder.dim == dim
    torch.testing.assert_close(encoding, pool_grid(grid))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.fine_tune(True)
    encoder(images)
    assert all(
        torch.equal(value, before[key]) for key, value in encoder.state_dict().items()
    )  # statistics too
    frozen = [key for key, parameter in encoder.named_parameters() if not parameter.requires_grad]
    trainable = [key for key, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert trainable and frozen
    if name.startswith("resnet"):
        assert {key.split(".")[1] for key in trainable} == {"5", "6", "7"}  # blocks 2 to 4


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0", "efficientnet_v2_s"])
def test_folded_batch_norms_give_the_same_features_and_gradients(name):
    plain = Encoder(name).double()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in (
                (module.weight.data, 0.5, 1.5), (module.bias.data, -1, 1),
                (module.running_mean, -1, 1), (module.running_var, 0.5, 2),
            ):  # fmt: skip
                values.uniform_(low, high)
    folded = fold_batch_norms(Encoder(name).double())
    folded.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for encoder in (plain, folded):
        encoder.fine_tune()
        encoder.grid(images).square().mean().backward()
    torch.testing.assert_close(folded.grid(images), plain.grid(images))
    trainable = [key for key, parameter in plain.named_parameters() if parameter.requires_grad]
    ours, theirs = dict(folded.named_parameters()), dict(plain.named_parameters())
    assert trainable
    for key in trainable:
        torch.testing.assert_close(ours[key].grad, theirs[key].grad, msg=key)


def test_a_convolution_with_a_bias_is_not_folded():
    encoder = Encoder("resnet18")
    encoder.network[0] = torch.nn.Conv2d(3, 64, 7, 2, 3)
    images = torch.randn(2, 3, 64, 64)
    expected = encoder.grid(images)
    torch.testing.assert_close(fold_batch_norms(encoder).grid(images), expected, rtol=1e-3, atol=1e-4)


def test_encoder_of_many_images_equals_one_by_one():
    encoder = build_encoder("resnet18", "none")
    images = torch.randint(0, 256, (11, 3, 64, 64), dtype=torch.uint8)
    single = torch.cat([encode_images(encoder, image.unsqueeze(0)) for image in images])
    difference = (encode_images(encoder, images) - single).abs().max()
    assert difference < 1e-5 * single.abs().max()  # untrained, its values are large


def test_pip_shipped_weights_know_what_they_see():
    """The ImageNet weights are real: a cat is like its mirror image, and unlike a rocket."""
    import skimage.data

    cat, rocket = skimage.data.chelsea(), skimage.data.rocket()
    images = [cat, cat[:, ::-1].copy(), rocket]
    resized = [
        F.interpolate(torch.from_numpy(p).permute(2, 0, 1)[None].float(), (256, 256)).byte()[0]
        for p in images
    ]
    features = encode_images(build_encoder("efficientnet_lite0"), torch.stack(resized)).mean(dim=(1, 2))
    cosine = F.cosine_similarity(features[0], features[1:])
    assert cosine[0] > cosine[1] + 0.3


def test_weights_from_a_file(tmp_path):
    network = torchvision.models.resnet18(weights=None)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = build_encoder("resnet18", str(tmp_path / "weights.pth"))
    assert torch.equal(encoder.network[0].weight, network.conv1.weight)
    with pytest.raises(UserError, match="resnet34"):
        build_encoder("resnet34", str(tmp_path / "weights.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pth"):
        build_encoder("resnet18", str(tmp_path / "text.pth"))
    with pytest.raises(UserError, match="unknown"):
        build_encoder("resnet1", "none")


def test_failed_download_names_the_three_ways_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError) as error:
        build_encoder("resnet18", "imagenet")
    message = str(error.value)
    assert "--encoder_weights FILE" in message and "efficientnet_lite2" in message and "none" in message
    assert "\n" not in message


def test_load_embeddings(tmp_path):
    file = tmp_path / "glove.txt"
    file.write_text("dog 1 2 3\n. . . 4 5 6\ncat 0.5 -1 2e-1\n")
    word_map = {"<pad>": 0, "cat": 1, "dog": 2, ". . .": 3, "<unk>": 4}
    embeddings, found = load_embeddings(file, word_map)
    assert found == 3 and embeddings.shape == (5, 3)
    assert embeddings[1].tolist() == pytest.approx([0.5, -1, 0.2]) and embeddings[3].tolist() == [4, 5, 6]
    cased, found = load_embeddings(file, {"Dog": 0, "dog": 1, "Bird": 2})
    assert found == 2 and cased[0].tolist() == cased[1].tolist() == [1, 2, 3]
    file.write_text("dog 1 2 3\ncat 1 x 3\n")
    with pytest.raises(UserError, match="line 2"):
        load_embeddings(file, word_map)


def test_tutorial_size_model_trains_and_captions_on_the_cpu():
    from captioning.decoding.beam_search import beam_search

    encoder = build_encoder("resnet101", "none")
    decoder = DecoderWithAttention(512, 512, 512, 9490, dropout=0.0)
    images = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8)
    grid = encode_images(encoder, images).clone()
    grid /= grid.std()  # untrained, it is large
    captions, lengths = random_captions(32, 1, VOCABULARY - 1, 12)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=4e-4)
    losses = []
    for _ in range(3):
        tokens = token_logits(decoder, grid, captions, lengths)
        loss = F.cross_entropy(tokens.logits, tokens.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    found = beam_search([decoder.eval()], [grid], start=9488, end=9489, beam_size=3, max_steps=10)
    assert len(found) == 32
