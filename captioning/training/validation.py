"""How good the attention model is on the validation images, after every epoch of its training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from captioning.captioners.attention import Captioner
from captioning.decoding.teacher_forcing import token_logits
from captioning.training.loop import Run, caption_scores
from captioning.training.losses import coverage_penalty, encode
from models import DecoderWithAttention, Encoder
from utils import progress_bar


@torch.no_grad()
def validate(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    loader: DataLoader,
    references: list[list[list[str]]],
    word_map: dict[str, int],
    settings,
    run: Run,
) -> tuple[dict[str, float], dict[int, str]]:
    """Loss and top-5 accuracy with teacher forcing, BLEU-4 and CIDEr of greedy captions.

    Args:
        loader: of this process's share of the images; its sampler yields requests with their indices.
        references: of all images, tokenized.
        settings: of the training: `alpha_c`.

    Returns:
        {"val_loss", "val_top5", "val_bleu4", "val_cider"} of all processes' images; the captions by index.
    """
    decoder.eval()
    captioner = Captioner([(encoder, decoder)], word_map)
    sums, texts = torch.zeros(5, dtype=torch.float64), []
    for images, captions, lengths in progress_bar(
        loader, desc="validation", unit="batch", leave=False, disable=not run.is_main
    ):
        with run.autocast():
            grid = encode(encoder, images, run.device)
            tokens = token_logits(decoder, grid, captions, lengths)
            logits, targets = tokens.logits, tokens.targets
            cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
            penalty = coverage_penalty(tokens.coverage())
            found = captioner.search([grid], beam_size=1)
        correct = (logits.topk(min(5, logits.shape[1])).indices == targets.unsqueeze(1)).sum()
        counts = (cross_entropy, penalty, correct, len(targets), lengths.numel())
        sums += torch.tensor([float(count) for count in counts], dtype=torch.float64)
        texts += [captioner.text(hypothesis) for hypothesis in found]
    indices = [index for request in loader.sampler for index in request.indices.tolist()]
    sums = sum(run.gather({run.state.process_index: sums}).values())
    cross_entropy, penalty, correct, tokens, captions = sums.tolist()
    by_index = run.gather(dict(zip(indices, texts, strict=True)))
    return {
        "val_loss": cross_entropy / tokens + settings.alpha_c * penalty / captions,
        "val_top5": correct / tokens,
        **caption_scores(references, by_index),
    }, by_index
