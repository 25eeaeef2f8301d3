"""Train Show, Attend and Tell on what create_input_files.py prepared: data_output/ -> output_models/.

    python train.py
    python train.py --encoder_name efficientnet_lite2 --epochs 20
    python train.py --resume                                                 # go on where it was interrupted
    python train.py --checkpoint output_models/checkpoint_epoch_3.pth --epochs 10    # go on after epoch 3
    python train.py --fine_tune_encoder --fine_tune_after 10 --augment --epochs 30   # decoder, then both
    torchrun --nproc_per_node 4 train.py                                             # on four GPUs

After every epoch the model captions the validation images by itself (greedy decoding, no ground-truth tokens)
and is scored with BLEU-4 and CIDEr against all their references; the best epoch is kept as
best_checkpoint.pth, encoder.pth, decoder.pth. A resumed training keeps the checkpoint's settings, but for
those given on the command line.
"""

from __future__ import annotations

import captioning.interrupts  # noqa: F401  before what takes seconds

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader

from captioning.command_line import check_above_zero, check_at_least, check_share, run_script
from captioning.data.features import cache_features
from captioning.data.prepared import Prepared
from captioning.decoding.fast_energies import use_fast_energies
from captioning.files import lock_folder
from captioning.training.averaging import WeightAverage
from captioning.training.curves import REWARD
from captioning.training.interruption import Progress, Saver
from captioning.training.loop import (
    LearningRate,
    Run,
    copy_best,
    epochs_of_patience,
    epochs_since_improvement,
    repair_outputs,
    report_best,
    save_epoch,
)
from captioning.training.losses import CrossEntropy, drop_embeddings, sampling_probability
from captioning.training.monitor import Monitor
from captioning.training.resume import Resumed, begin_outputs
from captioning.training.self_critical import Reward, SelfCritical, start_self_critical
from captioning.training.validation import validate
from captioning.weights.checkpoints import (
    STATES,
    check_content,
    checkpoint_content,
    decoder_from,
    encoder_from,
    load_checkpoint,
    write_best,
)
from captioning.weights.pretrained import build_encoder, load_embeddings
from datasets import BatchSampler, CaptionDataset, make_loader
from metrics import tokenize
from models import Attention, DecoderWithAttention, Encoder, HardAttention
from utils import Device, UserError, check_output, read_json


@dataclass
class Settings:
    data_folder: str = "data_output"  # what create_input_files.py wrote
    output_folder: str = "output_models"  # where checkpoints go
    encoder_name: str = "resnet101"  # a torchvision ResNet, EfficientNetV2, ConvNeXt; efficientnet_lite2
    encoder_weights: str = "imagenet"  # imagenet (download or pip package), a file, or none
    emb_dim: int = 512  # width of word embeddings
    attention_dim: int = 512  # width of the attention's hidden layer
    decoder_dim: int = 512  # width of the LSTM
    dropout: float = 0.5  # share of the hidden units dropped before the logits
    epochs: int = 3  # in all, those before a resumed checkpoint counted; give 20 or more for real use
    batch_size: int = 16  # images that go through the models at once; each brings all its captions
    grad_accumulation: int = 1  # batches per step: big steps on a small GPU
    decoder_lr: float = 4e-4  # learning rate of the decoder
    encoder_lr: float = 1e-4  # learning rate of the encoder, where it is fine-tuned
    lr_schedule: Literal["plateau", "cosine"] = "plateau"  # how the rates fall
    decay_after: int = 8  # plateau: the rates fall after every this many epochs without a better score
    decay: float = 0.8  # plateau: factor by which they fall
    warmup: float = 0.0  # cosine: share of the steps in which the rates rise
    patience: int = 20  # epochs without a better score after which the training stops; 0: never
    grad_clip: float = 5.0  # bound of the gradients; inf: none
    grad_clip_by: Literal["value", "norm"] = "value"  # clip each gradient's value or the norm of all together
    alpha_c: float = 1.0  # weight of the doubly stochastic penalty: 196 lambda of Xu et al., equation 14
    attention: Literal["soft", "hard"] = "soft"  # hard: look at one sampled location per word (section 4.1)
    hard_decoding: Literal["expectation", "maximum"] = "expectation"  # hard: the location when captioning
    lambda_r: float = 0.1  # hard: weight of the REINFORCE term
    lambda_e: float = 0.01  # hard: weight of the attention's entropy
    fine_tune_encoder: bool = False  # train the encoder's layers from stride 8 on too
    fine_tune_after: int = 0  # but only after this many epochs
    label_smoothing: float = 0.0  # share of each target's probability that is spread over all words
    embedding_dropout: float = 0.0  # share of the word vectors' values that is dropped
    feature_dropout: float = 0.0  # share of the encoding's channels that is dropped
    word_dropout: float = 0.0  # share of the fed words that <unk> replaces
    weight_decay: float = 0.0  # of AdamW
    average_weights: float = 0.0  # decay of the moving average of the weights, which is kept; 0: no average
    scheduled_sampling: float = 0.0  # largest share of the fed words that the model's own words replace
    self_critical_after: int | None = None  # epochs before the self-critical stage; None: no such stage
    self_critical_lr: float = 5e-5  # learning rate of that stage, for decoder and encoder
    self_critical_samples: int = 5  # captions that are sampled of each image
    reward_bleu4: float = 0.0  # weight of BLEU-4 in the reward, beside CIDEr-D
    augment: bool = False  # crop, recolour and flip images at random while the encoder is trained
    cached_views: int = 1  # views of each image in a frozen encoder's cache, all but one of them augmented
    cache_features: bool = True  # encode each image once and keep the result, where the encoder is frozen
    embeddings: str | None = None  # start from these word vectors (GloVe text file); sets emb_dim
    fine_tune_embeddings: bool = True  # train the word embeddings
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # 16-bit autocast, on CUDA
    select_by: Literal["bleu4", "cider"] = "cider"  # score by which the best epoch is chosen
    resume: bool = False  # go on from the newest state in output_folder
    checkpoint: str | None = None  # or go on from this file
    log_with: Literal["none", "tensorboard", "wandb"] = "none"  # also report every epoch there
    keep_checkpoints: int = 0  # epochs whose checkpoints stay; 0: all
    save_every: float = 10  # minutes between saves of last.pth, for --resume; 0: saved on Ctrl-C and SIGTERM
    device: Device = "auto"  # auto: a GPU where there is one
    workers: int = 2  # processes that load batches
    seed: int = 123  # of weights, order and dropout

    def __post_init__(self):
        check_at_least(self, 1, "emb_dim", "attention_dim", "decoder_dim", "epochs", "batch_size")
        check_at_least(self, 1, "grad_accumulation", "decay_after", "cached_views")
        check_at_least(self, 0, "fine_tune_after", "workers", "encoder_lr", "decoder_lr", "alpha_c", "seed")
        check_at_least(self, 0, "patience", "keep_checkpoints", "save_every", "lambda_r", "lambda_e")
        check_at_least(self, 0, "self_critical_lr", "reward_bleu4", "weight_decay")
        check_at_least(self, 2, "self_critical_samples")
        check_share(self, "dropout", "warmup", "label_smoothing", "embedding_dropout", "feature_dropout",
                    "word_dropout", "average_weights", "scheduled_sampling")  # fmt: skip
        check_above_zero(self, "grad_clip", "decay")
        if (self.augment or self.fine_tune_after) and not self.fine_tune_encoder:
            raise UserError("--augment and --fine_tune_after go with --fine_tune_encoder: add it")
        if self.self_critical_after is not None:
            check_at_least(self, 0, "self_critical_after")
            if not (self.self_critical_after or self.checkpoint or self.resume):
                raise UserError("--self_critical_after 0 goes on from a trained model: give its --checkpoint")
            if self.self_critical_after >= self.epochs and not (self.checkpoint or self.resume):
                raise UserError(
                    f"--self_critical_after {self.self_critical_after}: the training has only {self.epochs} "
                    f"epochs; raise --epochs"
                )
        if self.hard_decoding == "maximum" and (self.attention, self.self_critical_after) != ("hard", None):
            raise UserError("--hard_decoding maximum is for --attention hard, without --self_critical_after")
        if self.cached_views > 1 and not self.cache_features:
            raise UserError("--cached_views needs --cache_features True")

    @property
    def score(self) -> str:
        """The column of the history by which the best epoch is chosen."""
        return f"val_{self.select_by}"

    def is_fine_tuned(self, epoch: int) -> bool:
        """Whether the encoder is trained in this epoch, counted from 1."""
        return self.fine_tune_encoder and epoch > self.fine_tune_after

    def is_self_critical(self, epoch: int) -> bool:
        """Whether this epoch trains towards the metric."""
        return self.self_critical_after is not None and epoch > self.self_critical_after

    @property
    def cross_entropy_epochs(self) -> int:
        return min(self.epochs, self.epochs if self.self_critical_after is None else self.self_critical_after)


# fixed by the checkpoint: these cannot change when a training is resumed
FIXED = ("encoder_name", "encoder_weights", "emb_dim", "attention_dim", "decoder_dim", "embeddings",
         "attention")  # fmt: skip
RATES = ("decoder_lr", "encoder_lr")  # the setting of each optimizer group's rate
OUTPUT_FILES = ("checkpoint_epoch_*.pth", "last.pth", "best_checkpoint.pth", "encoder.pth", "decoder.pth",
                "history.csv", "curves.png", "train.log")  # fmt: skip


def main(settings: Settings) -> None:
    train(settings)


def train(settings: Settings) -> dict:
    """Run the training; return the best epoch's row of the history.

    Raises:
        UserError: wrong input, or a loss that is no longer a number.
    """
    check_output(settings.output_folder, folder=True)
    with lock_folder(settings.data_folder, reading=True), lock_folder(settings.output_folder):
        repair_outputs(Path(settings.output_folder))
        return run_training(settings)


def run_training(settings: Settings) -> dict:
    word_map, references = read_data(settings.data_folder)
    settings, resumed = resume(settings)
    run, output, score = Run.start(settings.mixed_precision), Path(settings.output_folder), settings.score
    settings = replace(settings, mixed_precision=run.mixed_precision)
    history = list(resumed.history) if resumed else []
    torch.manual_seed(settings.seed)
    settings, encoder, decoder = build_models(settings, word_map, resumed, run.log)
    encoder, decoder = encoder.to(run.device), decoder.to(run.device)
    optimizer = build_optimizer(encoder, decoder, settings)
    size = sum(parameter.numel() for parameter in decoder.parameters())
    run.log(f"{settings.encoder_name}, decoder of {size:,} parameters, on {run.describe()}")
    fine_tuned, reward = settings.is_fine_tuned(len(history) + 1), None
    train_loader, val_loader = start_stage(encoder, settings, run, fine_tuned, len(history) + 1)
    steps_per_epoch = len(train_loader.sampler.steps)
    rates = LearningRate(optimizer, settings, steps_per_epoch * settings.cross_entropy_epochs)
    average = WeightAverage(encoder, decoder, settings.average_weights)
    if resumed:
        run.log(resumed.restore(optimizer, rates, run, (decoder, encoder), RATES))
        average.restart(resumed.checkpoint, rates.steps)
    begin_outputs(run, output, settings, optimizer, resumed, OUTPUT_FILES)
    if resumed and run.is_main:
        copy_best(resumed.source, history, score, output)
    monitor = Monitor(run, output, settings, read_json(Path(settings.data_folder) / "val_image_ids.json"))

    def checkpoint() -> dict:
        states = run.states(optimizer, rates) | average.states()
        return checkpoint_content(states, history, word_map, settings)

    data = Prepared(settings.data_folder).digests_of("train")
    saver = Saver(run, output, settings.save_every, checkpoint, resumed, data)
    for epoch in range(len(history) + 1, settings.epochs + 1):
        if settings.is_fine_tuned(epoch) != fine_tuned:
            fine_tuned = not fine_tuned
            train_loader, val_loader = start_stage(encoder, settings, run, fine_tuned, epoch)
        if run.patience_ends(epochs_of_patience(history, settings), settings):
            break
        if not saver.goes_on:
            rates.before_epoch(epochs_since_improvement(history, score))
        if settings.is_self_critical(epoch) and reward is None:
            given = bool(settings.checkpoint) and len(history) == len(resumed.history)
            begun = saver.goes_on
            reward = start_self_critical(settings, average, optimizer, rates, history, given, run, begun)
        # order and dropout of an epoch do not depend on a resume; dropout differs between processes
        seed = settings.seed + epoch + 1000 * run.state.process_index
        progress = saver.start_epoch(epoch, steps_per_epoch, seed)
        train_loader.sampler.start_epoch(epoch, progress.steps)
        chosen = encoder, decoder, settings, run, word_map, reward, history
        objective, line = choose_objective(*chosen, train_loader, progress), progress.line
        with saver.training():
            line |= train_one_epoch(objective, train_loader, optimizer, rates, average, settings, run, saver)
        with saver.finishing():
            models = average.encoder, average.decoder
            scores, captions = validate(*models, val_loader, references, word_map, settings, run)
            line |= scores | {"decoder_lr": optimizer.param_groups[0]["lr"], "seconds": progress.seconds()}
            history.append(line)
            if run.is_main:
                save_epoch(output, checkpoint(), score, write_best, settings.keep_checkpoints)
            monitor.report_epoch(history, captions, describe(line))
    return report_best(run, history, score, output)


def describe(line: dict) -> str:
    """An epoch's row of the history in words."""
    return (
        f"{describe_training(line)}; validation loss {line['val_loss']:.3f}, top-5 {line['val_top5']:.1%}, "
        f"BLEU-4 {line['val_bleu4']:.4f}, CIDEr {line['val_cider']:.4f}"
    )


def describe_training(line: dict) -> str:
    reward = f", reward {line[REWARD]:.3f}" if REWARD in line else ""
    return f"loss {line['train_loss']:.3f}{reward}, {line['captions_per_second']:.0f} captions/s"


# --- what is trained, and on what ---------------------------------------------------------------------------


def read_data(data_folder: str) -> tuple[dict[str, int], list[list[list[str]]]]:
    """The word map, and the tokenized references of the validation images."""
    data = Prepared(data_folder)
    if "val" not in data.record["splits"]:
        raise UserError(
            f"{data_folder}: no val split to choose the best epoch by; prepare it with --val_fraction 0.1"
        )
    return data.word_map(), [[tokenize(text) for text in record.captions] for record in data.records("val")]


def resume(settings: Settings) -> tuple[Settings, Resumed | None]:
    """The checkpoint to go on from, if there is one, and the settings that then hold."""

    def read(source: Path) -> dict:
        word_map_path = Path(settings.data_folder) / "word_map.json"
        checkpoint = load_checkpoint(source, "encoder", "decoder", word_map_path=word_map_path)
        check_content(source, checkpoint, STATES)
        # a checkpoint from elsewhere has weights, but no epochs that were scored as ours are
        checkpoint["history"] = [line for line in checkpoint["history"] if settings.score in line]
        checkpoint["settings"].setdefault("attention", "soft")  # of before there was a choice
        return checkpoint

    return Resumed.find(settings, read, FIXED, Prepared(settings.data_folder).digests_of("train"))


def build_models(
    settings: Settings, word_map: dict[str, int], resumed: Resumed | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Settings, Encoder, DecoderWithAttention]:  # fmt: skip
    """New models, or the checkpoint's; `emb_dim` becomes that of the word vectors, where there are any."""
    if resumed:
        decoder = decoder_from(resumed.checkpoint, resumed.source)
        decoder.dropout.p = settings.dropout
        encoder = encoder_from(resumed.checkpoint, resumed.source)
    else:
        embeddings = None
        if settings.embeddings:
            embeddings, found = load_embeddings(settings.embeddings, word_map)
            log(f"{settings.embeddings} has vectors for {found} of the {len(word_map)} words")
            settings = replace(settings, emb_dim=embeddings.shape[1])
        encoder = build_encoder(settings.encoder_name, settings.encoder_weights)
        sizes = (settings.attention_dim, settings.emb_dim, settings.decoder_dim, len(word_map), encoder.dim)
        attention = Attention
        if settings.attention == "hard":
            attention = partial(HardAttention, takes_maximum=settings.hard_decoding == "maximum")
        decoder = DecoderWithAttention(*sizes, settings.dropout, attention)
        if embeddings is not None:
            decoder.embedding.weight.data.copy_(embeddings)
    decoder.embedding.requires_grad_(settings.fine_tune_embeddings)
    drop_embeddings(decoder, settings.embedding_dropout)
    if not use_fast_energies(decoder):
        log("the attention's energies are not the paper's: they are computed as models.py has them")
    return settings, encoder, decoder


def build_optimizer(encoder: Encoder, decoder: DecoderWithAttention, settings: Settings) -> torch.optim.AdamW:
    """Adam with a group for each model; what is frozen has no gradients, and does not change."""
    groups = [
        {"params": list(decoder.parameters()), "lr": settings.decoder_lr},
        {"params": list(encoder.parameters()), "lr": settings.encoder_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def start_stage(
    encoder: Encoder, settings: Settings, run: Run, fine_tuned: bool, epoch: int
) -> tuple[DataLoader, DataLoader]:
    """Freeze or unfreeze the encoder; return the training and validation loaders, of images or, with a frozen
    encoder, of cached features."""
    encoder.fine_tune(fine_tuned)
    run.log(f"from epoch {epoch} on the encoder is {'fine-tuned' if fine_tuned else 'frozen'}")
    loaders = []
    for split in ("train", "val"):
        training = split == "train"
        views = settings.cached_views if training and not fine_tuned else 1
        augment = training and (settings.augment if fine_tuned else views > 1)
        dataset = CaptionDataset(settings.data_folder, split, augment=augment)  # complain before long work
        if settings.cache_features and not fine_tuned:
            drawn = (partial(dataset.draw_views, count=views), dataset.view_digest()) if views > 1 else ()
            with run.state.main_process_first():
                features = cache_features(encoder, settings.data_folder, split, run.device, views, *drawn)
            dataset = CaptionDataset(settings.data_folder, split, features)
        sampler = BatchSampler(
            len(dataset),
            settings.batch_size,
            settings.grad_accumulation if training else 1,
            run.state.process_index,
            run.state.num_processes,
            shuffle=training,
            seed=settings.seed,
        )
        loaders.append(make_loader(dataset, sampler, settings.workers, run.device))
    return loaders[0], loaders[1]


# --- an epoch -----------------------------------------------------------------------------------------------


def choose_objective(
    encoder: Encoder, decoder: DecoderWithAttention, settings: Settings, run: Run, word_map: dict[str, int],
    reward: Reward | None, history: list[dict], loader: DataLoader, progress: Progress,
) -> CrossEntropy | SelfCritical:  # fmt: skip
    """What an epoch minimizes."""
    decoder.train()
    epoch, totals, longest = progress.epoch, progress.totals, int(loader.dataset.lengths.max()) - 1
    if reward is not None:
        return SelfCritical(encoder, decoder, settings, run, word_map, reward, longest, epoch, totals)
    sampling = sampling_probability(settings.scheduled_sampling, epoch, settings.cross_entropy_epochs)
    return CrossEntropy(encoder, decoder, settings, run, word_map, sampling, history, totals)


def train_one_epoch(
    objective: CrossEntropy | SelfCritical,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    rates: LearningRate,
    average: WeightAverage,
    settings: Settings,
    run: Run,
    saver: Saver,
) -> dict[str, float]:
    """One pass over the training images, or the rest of one: {"epoch", "train_loss", "captions_per_second"},
    and of self-critical training "train_reward"."""
    sampler, lengths_of = loader.sampler, loader.dataset.lengths  # (I, captions_per_image)
    requests, batches = iter(sampler), iter(loader)
    done, bar = saver.progress, saver.steps_left(sampler.steps)

    def report() -> dict[str, float]:
        mean = run.mean_loss(done.loss, done.steps, done.epoch, objective.remedy)
        rate = done.captions / done.seconds()
        line = {"epoch": done.epoch, "train_loss": mean, "captions_per_second": rate}
        return line | objective.report()

    for indices in bar:
        objective.start_step(lengths_of[indices])
        step_loss = torch.zeros((), device=run.device)
        for _ in range(sampler.accumulation_steps):
            with run.autocast():
                loss = objective(next(requests).indices, *next(batches))
            run.backward(loss)
            step_loss += loss.detach()
        divisor = objective.finish_step()
        done.loss += step_loss / divisor
        run.step(optimizer, settings.grad_clip, settings.grad_clip_by, divisor)
        rates.after_step()
        average.update()
        done.captions += objective.captions
        done.steps += 1
        if done.steps % 10 == 0:  # seldom: reading the loss waits for the device
            bar.set_postfix_str(describe_training(report()))
        saver.after_step()
    return report()


if __name__ == "__main__":
    run_script(main, Settings)
