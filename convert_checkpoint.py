r"""Turn the published checkpoint of the 2018 PyTorch captioning tutorial into one of train.py.

    python convert_checkpoint.py --checkpoint BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar \
        --word_map WORDMAP_coco_5_cap_per_img_5_min_word_freq.json --output output_models/tutorial.pth

The new file has the word map in it and is small: the optimizers stay behind. Nothing that the tutorial's
file says is run.
"""

from __future__ import annotations

from dataclasses import dataclass

from captioning.command_line import run_script
from captioning.weights.checkpoints import load_checkpoint, save_checkpoint
from utils import UserError, say


@dataclass
class Settings:
    checkpoint: str | None = None  # the tutorial's BEST_checkpoint_*.pth.tar
    word_map: str | None = None  # the WORDMAP_*.json that belongs to it
    output: str = "output_models/tutorial.pth"  # file to write

    def __post_init__(self):
        if self.checkpoint is None:
            raise UserError("--checkpoint is missing: give the tutorial's BEST_checkpoint_*.pth.tar")


def main(settings: Settings) -> None:
    checkpoint = load_checkpoint(settings.checkpoint, "encoder", "decoder", word_map_path=settings.word_map)
    line = checkpoint["history"][0]
    if "teacher_forced_bleu4" not in line:
        say(f"{settings.checkpoint}: is a checkpoint of this project already")
        return
    save_checkpoint(settings.output, checkpoint)
    say(
        f"{settings.output}: encoder {checkpoint['settings']['encoder_name']}, "
        f"{len(checkpoint['word_map'])} words, after epoch {line['epoch']}; "
        f"the tutorial's BLEU-4 {line['teacher_forced_bleu4']:.4f} is teacher-forced: "
        f"score the model's own captions with eval.py"
    )


if __name__ == "__main__":
    run_script(main, Settings)
