"""The fast models against plain ones written from the formulae of Xu et al. (2015)."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from models import DecoderWithAttention, Encoder, _efficientnet, load_embeddings, normalize_images
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


def plain_decoding(decoder, encoding, caption, length):
    """One caption of one image, word by word: encoding (196, D) -> scores (length - 1, V), alphas (length
    - 1, 196)."""
    attention = decoder.attention
    mean = encoding.mean(dim=0)
    h, c = decoder.init_h(mean), decoder.init_c(mean)
    scores, alphas = [], []
    for t in range(length - 1):
        energy = attention.full_att(
            F.relu(attention.encoder_att(encoding) + attention.decoder_att(h))
        ).squeeze(1)
        alpha = energy.softmax(dim=0)
        context = torch.sigmoid(decoder.f_beta(h)) * (alpha.unsqueeze(1) * encoding).sum(dim=0)
        word = torch.cat([decoder.embedding(caption[t]), context])
        h, c = decoder.decode_step(word.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
        h, c = h.squeeze(0), c.squeeze(0)
        scores.append(decoder.fc(h))
        alphas.append(alpha)
    return torch.stack(scores), torch.stack(alphas)


def pool(grid: torch.Tensor) -> torch.Tensor:
    """(N, h, w, D) -> (N, 14, 14, D)"""
    return F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), 14).permute(0, 2, 3, 1)


@pytest.mark.parametrize("side", [2, 7, 8, 14, 16])
@pytest.mark.parametrize("group", [1, 3])
def test_forward_equals_plain_reference(side, group):
    decoder, grid = make_decoder(), torch.rand(4, side, side, 32)
    captions, lengths = make_captions(4, group)
    scores, sorted_captions, decode_lengths, alphas, order = decoder(grid, captions, lengths.unsqueeze(1))
    assert decode_lengths == sorted(decode_lengths, reverse=True)
    assert torch.equal(sorted_captions, captions[order])
    for row, index in enumerate(order.tolist()):
        encoding = pool(grid)[index // group].flatten(0, 1)
        plain_scores, plain_alphas = plain_decoding(decoder, encoding, captions[index], int(lengths[index]))
        steps = decode_lengths[row]
        torch.testing.assert_close(scores[row, :steps], plain_scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alphas[row, :steps], plain_alphas, atol=1e-5, rtol=1e-5)
        assert not scores[row, steps:].any() and not alphas[row, steps:].any()


@pytest.mark.parametrize("side, group", [(8, 2), (14, 3), (4, 1)])
def test_gradients_equal_plain_reference(side, group):
    decoder, grid = make_decoder().double(), torch.rand(3, side, side, 32, dtype=torch.float64)
    grid.requires_grad_()  # as where the encoder is fine-tuned
    captions, lengths = make_captions(3, group)
    scores, targets, coverage = decoder.score_words(grid, captions, lengths)
    (F.cross_entropy(scores, targets) + ((1 - coverage) ** 2).mean()).backward()
    fast = {name: parameter.grad for name, parameter in decoder.named_parameters()} | {"grid": grid.grad}
    decoder.zero_grad()
    grid.grad = None
    plain_scores, plain_targets, penalty = [], [], 0
    for index in range(3 * group):
        length = int(lengths[index])
        s, a = plain_decoding(decoder, pool(grid)[index // group].flatten(0, 1), captions[index], length)
        plain_scores.append(s)
        plain_targets.append(captions[index, 1:length])
        penalty = penalty + ((1 - a.sum(dim=0)) ** 2).mean() / (3 * group)
    (F.cross_entropy(torch.cat(plain_scores), torch.cat(plain_targets)) + penalty).backward()
    # the softmax is blind to what is added to all scores
    assert fast.pop("attention.full_att.bias") is None
    for name, parameter in [*decoder.named_parameters(), ("grid", grid)]:
        if name in fast:
            torch.testing.assert_close(fast[name], parameter.grad, msg=name)


def test_half_precision_follows_full():
    decoder, grid = make_decoder(), torch.rand(3, 8, 8, 32)
    captions, lengths = make_captions(3, 2)
    gradients = []
    for half in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            scores, targets, coverage = decoder.score_words(grid, captions, lengths)
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


@pytest.mark.parametrize("name, dim", [("resnet18", 512), ("resnet50", 2048), ("efficientnet_lite0", 1280)])
def test_encoder_shapes_and_fine_tuning(name, dim):
    encoder = Encoder(name, "none")
    images = normalize_images(torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    encoding, grid = encoder(images), encoder.grid(images)
    assert encoding.shape == (2, 14, 14, dim) and grid.shape == (2, 8, 8, dim) and encoder.dim == dim
    torch.testing.assert_close(encoding, pool(grid))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.fine_tune(True)
    encoder(images)
    assert all(
        torch.equal(value, before[key]) for key, value in encoder.state_dict().items()
    )  # statistics too
    closed = [key for key, parameter in encoder.named_parameters() if not parameter.requires_grad]
    opened = [key for key, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert opened and closed
    if name.startswith("resnet"):
        assert {key.split(".")[1] for key in opened} == {"5", "6", "7"}  # blocks 2 to 4


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0"])
def test_folded_batch_norms_give_the_same_features_and_gradients(name):
    encoder = Encoder(name, "none").double()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in (
                (module.weight.data, 0.5, 1.5), (module.bias.data, -1, 1),
                (module.running_mean, -1, 1), (module.running_var, 0.5, 2),
            ):  # fmt: skip
                values.uniform_(low, high)
    if name.startswith("resnet"):
        plain = torchvision.models.get_model(name, weights=None)
        plain = torch.nn.Sequential(*list(plain.children())[:-2])
    else:
        plain = _efficientnet(name)
        plain._fc = torch.nn.Identity()
    plain = plain.double().eval()
    plain.load_state_dict(encoder.network.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    encoder.fine_tune()
    ours = encoder.grid(images)
    images = images * encoder.scale + encoder.shift
    theirs = (plain if name.startswith("resnet") else plain.extract_features)(images).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    gradients = dict(plain.named_parameters())
    opened = [(key, p) for key, p in encoder.network.named_parameters() if p.requires_grad]
    assert opened and all(parameter.grad is not None for _, parameter in opened)
    for key, parameter in opened:
        torch.testing.assert_close(parameter.grad, gradients[key].grad, msg=key)


def test_encoder_of_many_images_equals_one_by_one():
    encoder = Encoder("resnet18", "none")
    images = torch.randint(0, 256, (11, 3, 64, 64), dtype=torch.uint8)
    single = torch.cat([encoder.encode(image.unsqueeze(0)) for image in images])
    difference = (encoder.encode(images) - single).abs().max()
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
    features = Encoder("efficientnet_lite0", "imagenet").encode(torch.stack(resized)).mean(dim=(1, 2))
    cosine = F.cosine_similarity(features[0], features[1:])
    assert cosine[0] > cosine[1] + 0.3


def test_weights_from_a_file(tmp_path):
    network = torchvision.models.resnet18(weights=None)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder("resnet18", str(tmp_path / "weights.pth"))
    assert torch.equal(encoder.network[0].weight, network.conv1.weight)
    with pytest.raises(UserError, match="resnet34"):
        Encoder("resnet34", str(tmp_path / "weights.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pth"):
        Encoder("resnet18", str(tmp_path / "text.pth"))
    with pytest.raises(UserError, match="unknown"):
        Encoder("resnet1", "none")


def test_failed_download_names_the_three_ways_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError) as error:
        Encoder("resnet18", "imagenet")
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
    decoder = make_decoder(embed_dim=3, vocab_size=5)
    decoder.load_pretrained_embeddings(embeddings)
    decoder.fine_tune_embeddings(False)
    assert torch.equal(decoder.embedding.weight, embeddings) and not decoder.embedding.weight.requires_grad
    file.write_text("dog 1 2 3\ncat 1 x 3\n")
    with pytest.raises(UserError, match="line 2"):
        load_embeddings(file, word_map)


def test_tutorial_size_model_trains_and_captions_on_the_cpu():
    from captioning.beam_search import beam_search

    encoder = Encoder("resnet101", "none")
    decoder = DecoderWithAttention(512, 512, 512, 9490, dropout=0.0)
    images = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8)
    grid = encoder.encode(images).clone()
    grid /= grid.std()  # untrained, it is large
    captions, lengths = make_captions(32, 1)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=4e-4)
    losses = []
    for _ in range(3):
        scores, targets, _ = decoder.score_words(grid, captions, lengths)
        loss = F.cross_entropy(scores, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    found = beam_search([decoder.eval()], [grid], start=9488, end=9489, beam_size=3, max_steps=10)
    assert len(found) == 32
