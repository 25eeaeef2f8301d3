"""The fast models against plain ones written from the formulae of Xu et al. (2015)."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from captioning.data.features import encode_images
from captioning.decoding.fused_decoder import caption_logits, require_same_as_plain
from captioning.decoding.fused_recurrence import pack_captions
from captioning.decoding.plain_decoder import caption_logits as plain_caption_logits
from captioning.weights.pretrained import build_encoder, fold_batch_norms, load_embeddings
from models import DecoderWithAttention, Encoder, normalize_images, pool_grid
from tests.reference import TextbookDecoder
from utils import UserError

VOCABULARY = 50


def make_decoder(**options) -> DecoderWithAttention:
    sizes = {
        "attention_dim": 24,
        "embed_dim": 20,
        "decoder_dim": 28,
        "vocab_size": VOCABULARY,
        "encoder_dim": 32,
    }
    decoder = DecoderWithAttention(**(sizes | options), dropout=0.5).eval()
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # attention far from uniform
    return decoder


def make_captions(images: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(3, 12, (images * group,))
    captions = torch.randint(1, VOCABULARY, (images * group, 13))
    return captions * (torch.arange(13) < lengths.unsqueeze(1)), lengths


def textbook_decoding(decoder, grid, captions, lengths):
    """The independent implementation: logits (N * G, T, V), alphas (N * G, T, 196), in the batch's order."""
    sizes = (24, 20, 28, VOCABULARY, 32)
    textbook = TextbookDecoder(*sizes).to(grid.dtype)
    textbook.load_state_dict(decoder.state_dict())
    copies = pool_grid(grid).repeat_interleave(len(captions) // len(grid), dim=0)
    order = lengths.sort(descending=True).indices.argsort()
    logits, _, _, alphas = textbook(copies, captions, lengths)
    return textbook, logits[order], alphas[order]


def valid(values, lengths):
    """The tokens of captions (N, T, ...) -> (W, ...)"""
    return values[torch.arange(values.shape[1]) < (lengths - 1).unsqueeze(1)]


def unpack(packed, order, batch_sizes):
    """Packed tokens (W, ...) -> (N * G, T, ...) in the batch's order."""
    sequence = PackedSequence(packed, torch.tensor(batch_sizes), order, order.argsort())
    return pad_packed_sequence(sequence, batch_first=True)[0]


@pytest.mark.parametrize("group", [1, 3])
def test_forward_equals_independent_reference(group):
    decoder, grid = make_decoder(), torch.rand(4, 8, 8, 32)
    captions, lengths = make_captions(4, group)
    encodings = pool_grid(grid).repeat_interleave(group, dim=0)
    predictions, sorted_captions, decode_lengths, alphas, order = decoder(
        encodings, captions, lengths.unsqueeze(1)
    )
    assert decode_lengths == sorted(decode_lengths, reverse=True)
    assert torch.equal(sorted_captions, captions[order])
    _, logits, maps = textbook_decoding(decoder, grid, captions, lengths)
    torch.testing.assert_close(predictions, logits[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alphas, maps[order], atol=1e-5, rtol=1e-5)
    for row, steps in enumerate(decode_lengths):
        assert not predictions[row, steps:].any() and not alphas[row, steps:].any()


@pytest.mark.parametrize("side, group", [(2, 1), (7, 3), (8, 1), (8, 3), (14, 3), (16, 2)])
def test_fused_decoder_equals_forward(side, group):
    """Logits, alphas summed over each caption, and all gradients, the encoder's too; in float64."""
    decoder, grid = make_decoder().double(), torch.rand(3, side, side, 32, dtype=torch.float64)
    grid.requires_grad_()  # as where the encoder is fine-tuned
    captions, lengths = make_captions(3, group)
    results = []
    for form in (caption_logits, plain_caption_logits):
        decoder.zero_grad()
        grid.grad = None
        logits, targets, coverage, *_ = form(decoder, grid, captions, lengths)
        (F.cross_entropy(logits, targets) + ((1 - coverage) ** 2).mean()).backward()
        gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
        results.append((logits, targets, coverage, gradients | {"grid": grid.grad}))
    (logits, targets, coverage, fused), (plain_logits, plain_targets, plain_coverage, plain) = results
    packing = pack_captions((lengths - 1).view(-1, group), grid.device)
    plain_order = lengths.sort(descending=True, stable=True).indices  # of equal lengths another one
    for ours, theirs in ((logits, plain_logits), (targets, plain_targets)):
        ours = unpack(ours, packing.sorted_indices, packing.batch_sizes)
        torch.testing.assert_close(ours, unpack(theirs, plain_order, packing.batch_sizes))
    torch.testing.assert_close(coverage, plain_coverage)
    # the softmax does not depend on a bias of all energies
    assert fused.pop("attention.full_att.bias") is None
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("output", [0, 3], ids=["logits", "alphas"])
def test_a_decoder_with_other_logits_or_alphas_is_refused(output):
    class Changed(DecoderWithAttention):
        def forward(self, *arguments):
            results = super().forward(*arguments)
            return (*results[:output], results[output] + 0.01, *results[output + 1 :])

    decoder = make_decoder().train()
    require_same_as_plain(decoder)
    decoder.__class__ = Changed
    with pytest.raises(UserError, match="--fused False"):
        require_same_as_plain(decoder)
    assert decoder.training


def test_gradients_equal_independent_reference():
    decoder, grid = make_decoder().double(), torch.rand(3, 8, 8, 32, dtype=torch.float64)
    captions, lengths = make_captions(3, 2)
    logits, targets, coverage, *_ = caption_logits(decoder, grid, captions, lengths)
    (F.cross_entropy(logits, targets) + ((1 - coverage) ** 2).mean()).backward()
    textbook, logits, alphas = textbook_decoding(decoder, grid, captions, lengths)
    penalty = ((1 - alphas.sum(dim=1)) ** 2).mean()
    (F.cross_entropy(valid(logits, lengths), valid(captions[:, 1:], lengths)) + penalty).backward()
    for (name, ours), theirs in zip(decoder.named_parameters(), textbook.parameters()):
        if name != "attention.full_att.bias":
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_half_precision_follows_full():
    decoder, grid = make_decoder(), torch.rand(3, 8, 8, 32)
    captions, lengths = make_captions(3, 2)
    gradients = []
    for half in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            scores, targets, coverage, *_ = caption_logits(decoder, grid, captions, lengths)
            loss = F.cross_entropy(scores, targets) + ((1 - coverage) ** 2).mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert F.cosine_similarity(gradients[1][name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_attention_follows_its_formula():
    attention = make_decoder().attention
    pixels, hidden = torch.rand(5, 196, 32), torch.randn(5, 28)
    context, alpha = attention(pixels, hidden)
    energy = attention.full_att(
        F.relu(attention.encoder_att(pixels) + attention.decoder_att(hidden).unsqueeze(1))
    )
    torch.testing.assert_close(alpha, energy.squeeze(2).softmax(dim=1))
    torch.testing.assert_close(context, (alpha.unsqueeze(2) * pixels).sum(dim=1))


def test_captions_do_not_depend_on_their_neighbours():
    decoder, grid = make_decoder(), torch.rand(6, 8, 8, 32)
    captions, lengths = make_captions(6, 1)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    scores, _, _, alphas, rank = decoder(grid, captions, lengths)
    other_scores, _, _, other_alphas, other_rank = decoder(grid[order], captions[order], lengths[order])
    here, there = rank.argsort()[order], other_rank.argsort()
    torch.testing.assert_close(other_alphas[there], alphas[here])
    torch.testing.assert_close(other_scores[there], scores[here])


def test_parameter_names_are_the_published_ones():
    modules = {name.rsplit(".", 1)[0] for name, _ in make_decoder().named_parameters()}
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
    captions, lengths = make_captions(32, 1)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=4e-4)
    losses = []
    for _ in range(3):
        scores, targets, *_ = caption_logits(decoder, grid, captions, lengths)
        loss = F.cross_entropy(scores, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    found = beam_search([decoder.eval()], [grid], start=9488, end=9489, beam_size=3, max_steps=10)
    assert len(found) == 32
