"""What tests/test_change_the_model.py runs in its copy of the repository, on the changed models.py.

    python changed_model.py data_output photo.jpg      # writes results.json

Trains, goes on with a training, captions by search, samples and an ensemble, draws a figure and a gallery,
and scores.
"""

import importlib
import json
import sys
from collections.abc import Iterable

import h5py
import torch

from captioning.captioners.attention import load_models
from captioning.command_line import parse_settings
from captioning.data.features import encode_images
from captioning.decoding.beam_search import Hypothesis, beam_search
from captioning.decoding.sampling import sample_captions
from captioning.weights.checkpoints import load_checkpoint
from models import DecoderWithAttention, pool_grid

SIZES = ("--encoder_name", "efficientnet_lite0", "--emb_dim", 64, "--attention_dim", 32, "--decoder_dim", 128)
RATES = ("--batch_size", 2, "--decoder_lr", 5e-3, "--alpha_c", 0.1, "--dropout", 0.1, "--workers", 0)


def run(script: str, *arguments) -> None:
    module = importlib.import_module(script)
    assert not module.main(parse_settings(module.Settings, list(map(str, arguments))))


def train(data_folder: str, output: str, epochs: int, *arguments) -> dict:
    """The checkpoint of the last epoch."""
    folders = "--data_folder", data_folder, "--output_folder", output
    run("train", *folders, *SIZES, *RATES, "--epochs", epochs, *arguments)
    return load_checkpoint(f"{output}/checkpoint_epoch_{epochs}.pth")


def compare(
    decoders: list[DecoderWithAttention],
    grid: torch.Tensor,
    found: Iterable[tuple[int, Hypothesis]],
    ends: tuple[int, int],
) -> list[dict]:
    """The log-probabilities of captions, each with its image's index, as they were found and by the decoders'
    own call."""
    lines = []
    for i, hypothesis in found:
        words = [*hypothesis.words, *[ends[1]] * hypothesis.finished]
        captions, lengths = torch.tensor([[ends[0], *words]]), torch.tensor([[len(words) + 1]])
        with torch.inference_mode():
            calls = [decoder(pool_grid(grid[i : i + 1]), captions, lengths)[0][0] for decoder in decoders]
        log_probs = torch.stack([logits.softmax(dim=1) for logits in calls]).mean(dim=0).log()
        forced = log_probs[range(len(words)), words]
        below_best = float((log_probs.amax(dim=1) - forced).max())
        lines.append({"found": hypothesis.log_probs, "forced": forced.tolist(), "below_best": below_best})
    return lines


def main(data_folder: str, image: str) -> None:
    whole = train(data_folder, "whole", 3)
    train(data_folder, "parts", 2)
    parts = train(data_folder, "parts", 3, "--resume")
    train(data_folder, "hard", 1, "--attention", "hard", "--hard_decoding", "maximum")
    results = {"losses": [line["train_loss"] for line in whole["history"]]}
    results["resumed"] = all(torch.equal(parts["decoder"][name], v) for name, v in whole["decoder"].items())

    checkpoints = [f"whole/checkpoint_epoch_{epoch}.pth" for epoch in (3, 2)]
    (encoder, last, word_map), (_, earlier, _) = (load_models(file, file) for file in checkpoints)
    ends = word_map["<start>"], word_map["<end>"]
    images = torch.from_numpy(h5py.File(f"{data_folder}/val_images.hdf5")["images"][:6])
    grid = encode_images(encoder, images)
    ways = {"greedy": ([last], 1), "beam": ([last], 3), "ensemble": ([last, earlier], 3)}
    for name, (decoders, beam_size) in ways.items():
        found = beam_search(decoders, [grid] * len(decoders), *ends, beam_size, max_steps=20)
        results[name] = compare(decoders, grid, enumerate(found), ends)
    drawn = sample_captions([last], [grid], *ends, range(6), 3, max_steps=20)
    found = [(i, hypothesis) for i, hypotheses in enumerate(drawn) for hypothesis in hypotheses]
    results["samples"] = compare([last], grid, found, ends)

    run("caption", "--img", image, "--model", checkpoints[0], "--figure", "figure.png")
    data = "--data_folder", data_folder, "--split", "val"
    run("eval", "--checkpoint", *checkpoints, *data, "--beam_sizes", 2, "--output_json", "scores.json")
    run("view_captions", "--checkpoint", checkpoints[0], *data, "--limit", 2)
    with open("results.json", "w") as stream:
        json.dump(results, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
