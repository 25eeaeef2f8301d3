"""Exponential moving average of the weights: what is validated and kept is smoother than what is trained."""

from __future__ import annotations

import copy

import torch

from models import DecoderWithAttention, Encoder


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every step.

    In the first steps the decay is lower, (1 + steps) / (10 + steps), so that the average soon forgets the
    random weights that it began with.

    Args:
        decay: in [0, 1); 0: no average, the models themselves.

    Attributes:
        encoder, decoder: with the averaged weights; the encoder is the one that is trained until it first
            changes.
    """

    def __init__(self, encoder: Encoder, decoder: DecoderWithAttention, decay: float):
        self.decay, self.steps, self.trained = decay, 0, (encoder, decoder)
        self.encoder, self.decoder = encoder, copy.deepcopy(decoder) if decay else decoder

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step; those that are frozen do not change."""
        if not self.decay:
            return
        if self.encoder is self.trained[0] and any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder = copy.deepcopy(self.encoder)
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for average, module in zip((self.encoder, self.decoder), self.trained):
            pairs = zip(average.parameters(), module.parameters())
            pairs = [(old, new) for old, new in pairs if new.requires_grad and old is not new]
            if pairs:
                torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)

    def restart(self, checkpoint: dict, steps: int) -> None:
        """Load a checkpoint's weights, taken after `steps` steps. If `decay` is not 0 and the checkpoint has
        `unaveraged` weights, the trained models get those and the averages get the others."""
        encoder, decoder = self.trained
        self.steps, self.encoder = steps, encoder
        unaveraged = checkpoint.get("unaveraged", {}) if self.decay else {}
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            module.load_state_dict(unaveraged.get(name, checkpoint[name]))
        if "encoder" in unaveraged:
            self.encoder = copy.deepcopy(encoder)
            self.encoder.load_state_dict(checkpoint["encoder"])
        self.decoder.load_state_dict(checkpoint["decoder"])

    def states(self) -> dict[str, dict]:
        """The weights as stored in a checkpoint: "encoder" and "decoder" are the averages; "unaveraged" holds
        the weights being trained, of each module whose average is a separate copy."""
        states = {"encoder": self.encoder.state_dict(), "decoder": self.decoder.state_dict()}
        if self.decay:
            trained = zip(("encoder", "decoder"), self.trained, (self.encoder, self.decoder))
            states["unaveraged"] = {
                name: module.state_dict() for name, module, average in trained if module is not average
            }
        return states
