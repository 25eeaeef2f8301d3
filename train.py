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
those that are given on the command line, or were edited below since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from captioning.command_line import check_at_least, check_share, run_script
from captioning.data.features import cache_features
from captioning.data.prepared import END, PAD, START, UNK, Prepared, Record, training_data
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.teacher_forcing import token_logits
from captioning.files import lock_folder
from captioning.training.loop import Epoch, Training
from captioning.training.losses import (
    CrossEntropy,
    coverage_penalty,
    drop_embeddings,
    encode,
    sampling_probability,
)
from captioning.training.monitor import caption_scores, repair_outputs
from captioning.training.optimization import Run
from captioning.training.resume import REWARD, Resumed, TrainingSettings, find_resumable
from captioning.weights.checkpoints import STATES, check_content, decoder_from, encoder_from, load_checkpoint
from captioning.weights.pretrained import build_encoder
from datasets import BatchLoader, BatchSampler, CaptionDataset
from metrics import tokenize
from models import Attention, DecoderWithAttention, Encoder, HardAttention
from utils import UserError, check_output, progress_bar, say

if TYPE_CHECKING:
    from captioning.training.reinforce import LocationLoss, SelfCritical


class Stage(NamedTuple):
    """What the epochs of a stage have in common."""

    is_fine_tuned: bool  # the encoder is trained too
    is_self_critical: bool  # the training maximizes CIDEr-D


@dataclass
class Settings(TrainingSettings):  # more, such as --resume: captioning/training/resume.py
    # data
    data_folder: str = "data_output"  # what create_input_files.py wrote
    output_folder: str = "output_models"  # where checkpoints go
    # model
    encoder_name: str = "resnet101"  # a torchvision ResNet, EfficientNetV2, ConvNeXt; efficientnet_lite2
    encoder_weights: str = "imagenet"  # imagenet (download or pip package), a file, or none
    emb_dim: int = 512  # width of word embeddings
    attention_dim: int = 512  # width of the attention's hidden layer
    decoder_dim: int = 512  # width of the LSTM
    embeddings: str | None = None  # start from these word vectors (GloVe text file); sets emb_dim
    fine_tune_embeddings: bool = True  # train the word embeddings
    attention: Literal["soft", "hard"] = "soft"  # hard: look at one sampled location per word (section 4.1)
    hard_decoding: Literal["expectation", "maximum"] = "expectation"  # hard: the location when captioning
    # optimization
    epochs: int = 3  # in all, those before a resumed checkpoint counted; give 20 or more for real use
    batch_size: int = 16  # images that go through the models at once; each brings all its captions
    decoder_lr: float = 4e-4  # learning rate of the decoder
    encoder_lr: float = 1e-4  # learning rate of the encoder, where it is fine-tuned
    lr_schedule: Literal["plateau", "cosine"] = "plateau"  # how the rates fall
    warmup: float = 0.0  # cosine: share of the steps in which the rates rise
    patience: int = 20  # epochs without a better score after which the training stops; 0: never
    grad_clip: float = 5.0  # bound of the gradients; inf: none
    grad_clip_by: Literal["value", "norm"] = "value"  # clip each gradient's value or the norm of all together
    fine_tune_encoder: bool = False  # train the encoder's layers from stride 8 on too
    fine_tune_after: int = 0  # but only after this many epochs
    alpha_c: float = 1.0  # weight of the doubly stochastic penalty: 196 lambda of Xu et al., equation 14
    lambda_r: float = 0.1  # hard: weight of the REINFORCE term
    lambda_e: float = 0.01  # hard: weight of the attention's entropy
    # regularization
    dropout: float = 0.5  # share of the hidden units dropped before the logits
    label_smoothing: float = 0.0  # share of each target's probability that is spread over all words
    embedding_dropout: float = 0.0  # share of the word vectors' values that is dropped
    feature_dropout: float = 0.0  # share of the encoding's channels that is dropped
    word_dropout: float = 0.0  # share of the fed words that <unk> replaces
    weight_decay: float = 0.0  # of AdamW
    average_weights: float = 0.0  # decay of the moving average of the weights, which is kept; 0: no average
    scheduled_sampling: float = 0.0  # largest share of the fed words that the model's own words replace
    augment: bool = False  # crop, recolour and flip images at random while the encoder is trained
    cached_views: int = 1  # views of each image in a frozen encoder's cache, all but one of them augmented
    # self-critical
    self_critical_after: int | None = None  # epochs before the self-critical stage; None: no such stage
    self_critical_lr: float = 5e-5  # learning rate of that stage, for decoder and encoder
    self_critical_samples: int = 5  # captions that are sampled of each image
    reward_bleu4: float = 0.0  # weight of BLEU-4 in the reward, beside CIDEr-D
    # run
    cache_features: bool = True  # encode each image once and keep the result, where the encoder is frozen
    keep_checkpoints: int = 0  # epochs whose checkpoints stay; 0: all
    workers: int = 2  # processes that load batches
    seed: int = 123  # of weights, order and dropout

    fixed = ("encoder_name", "encoder_weights", "emb_dim", "attention_dim", "decoder_dim", "embeddings",
             "attention")  # fmt: skip
    rate_names = ("decoder_lr", "encoder_lr")
    output_files = ("checkpoint_epoch_*.pth", "last.pth", "best_checkpoint.pth", "encoder.pth", "decoder.pth",
                    "history.csv", "curves.png", "train.log")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "emb_dim", "attention_dim", "decoder_dim", "cached_views")
        check_at_least(self, 0, "fine_tune_after", "workers", "encoder_lr", "decoder_lr", "alpha_c")
        check_at_least(self, 0, "lambda_r", "lambda_e", "self_critical_lr", "reward_bleu4")
        check_at_least(self, 2, "self_critical_samples")
        check_share(self, "dropout", "embedding_dropout", "feature_dropout", "word_dropout")
        check_share(self, "average_weights", "scheduled_sampling")
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

    def stage_of(self, epoch: Epoch) -> Stage:
        after = self.self_critical_after
        return Stage(
            is_fine_tuned=self.fine_tune_encoder and epoch.number > self.fine_tune_after,
            is_self_critical=after is not None and epoch.number > after,
        )

    @property
    def scheduled_epochs(self) -> int:
        """The epochs before the self-critical stage."""
        return min(self.epochs, self.epochs if self.self_critical_after is None else self.self_critical_after)

    @property
    def has_self_critical_stage(self) -> bool:
        return self.self_critical_after is not None


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
    word_map, val_records = read_data(settings.data_folder)
    settings, resumed = resume(settings)
    run = Run.start(settings.mixed_precision)
    settings = replace(settings, mixed_precision=run.mixed_precision)  # what is used
    torch.manual_seed(settings.seed)
    settings, encoder, decoder = build_models(settings, word_map, resumed, run.log)
    encoder, decoder = encoder.to(run.device), decoder.to(run.device)
    optimizer = build_optimizer(encoder, decoder, settings)
    size = sum(parameter.numel() for parameter in decoder.parameters())
    run.log(f"{settings.encoder_name}, decoder of {size:,} parameters, on {run.describe()}")
    data = Prepared(settings.data_folder)
    training = Training(
        settings,
        run,
        {"encoder": encoder, "decoder": decoder},
        optimizer,
        build_sampler(data.require_split("train"), settings, run, training=True),
        about={"word_map": word_map, "data": training_data(data.record)},
        resumed=resumed,
        data=data.digests_of("train"),
        average=settings.average_weights,
    )
    with training.stopping_on_signals():
        for stage, epochs in groupby(training.epochs(), settings.stage_of):
            number = training.epoch.number
            train_loader, val_loader = start_stage(stage, number, encoder, training.sampler, settings, run)
            if stage.is_self_critical:
                self_critical = start_self_critical(training, train_loader.dataset, settings)
            for epoch in epochs:
                if stage.is_self_critical:
                    objective = self_critical(
                        encoder, decoder, settings, run, word_map, epoch=epoch.number, totals=epoch.totals
                    )
                else:
                    largest, epochs_in_all = settings.scheduled_sampling, settings.scheduled_epochs
                    probability = sampling_probability(largest, epoch.number, epochs_in_all)
                    hard = location_loss(settings, run, training.history, epoch.totals)
                    objective = CrossEntropy(encoder, decoder, settings, run, word_map, probability, hard)
                train_one_epoch(epoch, train_loader, objective, optimizer, settings, run)
                models = training.weights.averaged("encoder"), training.weights.averaged("decoder")
                scores, captions = evaluate(*models, val_loader, val_records, word_map, settings, run)
                epoch.finish(scores | {"decoder_lr": optimizer.param_groups[0]["lr"]}, captions)
    return training.report_best()


# --- what is trained, and on what ---------------------------------------------------------------------------


def read_data(data_folder: str) -> tuple[dict[str, int], list[Record]]:
    """The word map, and the validation images with their tokenized references."""
    data = Prepared(data_folder)
    if "val" not in data.record["splits"]:
        problem = "no val split to choose the best epoch by"
        raise UserError(f"{data_folder}: {problem}; prepare two images or more, with --val_fraction above 0")
    records = data.records("val")
    return data.word_map(), [replace(r, tokens=[tokenize(text) for text in r.captions]) for r in records]


def resume(settings: Settings) -> tuple[Settings, Resumed | None]:
    """The checkpoint to go on from, if there is one, and the settings that then hold."""

    def read(source: Path) -> dict:
        word_map_path = Path(settings.data_folder) / "word_map.json"
        checkpoint = load_checkpoint(source, "encoder", "decoder", word_map_path=word_map_path)
        check_content(source, checkpoint, STATES)
        # a checkpoint from elsewhere has weights, but no epochs that were scored as ours are
        checkpoint["history"] = [line for line in checkpoint["history"] if settings.score in line]
        return checkpoint

    return find_resumable(settings, read, Prepared(settings.data_folder).digests_of("train"))


def build_models(
    settings: Settings, word_map: dict[str, int], resumed: Resumed | None = None,
    log: Callable[[str], None] = say,
) -> tuple[Settings, Encoder, DecoderWithAttention]:  # fmt: skip
    """New models, or the checkpoint's; `emb_dim` becomes that of the word vectors, where there are any."""
    if resumed:
        decoder = decoder_from(resumed.checkpoint, resumed.source)
        decoder.dropout.p = settings.dropout
        encoder = encoder_from(resumed.checkpoint, resumed.source)
    else:
        embeddings = None
        if settings.embeddings:
            from captioning.data.text_files import load_embeddings  # most trainings have none

            embeddings, known_words = load_embeddings(settings.embeddings, word_map)
            log(f"{settings.embeddings} has vectors for {known_words} of the {len(word_map)} words")
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
        log("the attention formula was changed: it runs as models.py has it, without the faster version")
    return settings, encoder, decoder


def build_optimizer(encoder: Encoder, decoder: DecoderWithAttention, settings: Settings) -> torch.optim.AdamW:
    """AdamW with a group for each model; frozen parameters get no gradient and no update."""
    groups = [
        {"params": list(decoder.parameters()), "lr": settings.decoder_lr},
        {"params": list(encoder.parameters()), "lr": settings.encoder_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def build_sampler(images: int, settings: Settings, run: Run, training: bool) -> BatchSampler:
    """Batches of images, shuffled for training; each process gets a share of every one."""
    return BatchSampler(
        images,
        settings.batch_size,
        settings.grad_accumulation if training else 1,
        run.state.process_index,
        run.state.num_processes,
        shuffle=training,
        seed=settings.seed,
    )


def start_stage(
    stage: Stage, epoch: int, encoder: Encoder, sampler: BatchSampler, settings: Settings, run: Run
) -> tuple[BatchLoader, BatchLoader]:
    """Freeze or unfreeze the encoder; return the loaders of training and validation images or, with a frozen
    encoder, of their cached features.

    Args:
        epoch: the stage's first. sampler: of the training images.
    """
    encoder.fine_tune(stage.is_fine_tuned)
    run.log(f"from epoch {epoch} on the encoder is {'fine-tuned' if stage.is_fine_tuned else 'frozen'}")
    loaders = []
    for split in ("train", "val"):
        views = settings.cached_views if split == "train" and not stage.is_fine_tuned else 1
        augment = split == "train" and (settings.augment if stage.is_fine_tuned else views > 1)
        dataset = CaptionDataset(settings.data_folder, split, augment=augment)  # complain before long work
        if settings.cache_features and not stage.is_fine_tuned:
            drawn = (partial(dataset.draw_views, count=views), dataset.view_digest()) if views > 1 else ()
            with run.state.main_process_first():
                features = cache_features(encoder, settings.data_folder, split, run.device, views, *drawn)
            dataset = CaptionDataset(settings.data_folder, split, features)
        if split == "val":
            sampler = build_sampler(len(dataset), settings, run, training=False)
        loaders.append(BatchLoader(dataset, sampler, settings.workers, run.device, run.lose_worker))
    return loaders[0], loaders[1]


def location_loss(settings: Settings, run: Run, history: list[dict], totals: dict) -> LocationLoss | None:
    """What trains hard attention beside the cross-entropy."""
    if settings.attention == "soft":
        return None
    from captioning.training.reinforce import LocationLoss  # most trainings have none

    return LocationLoss(settings, run, history, totals)


def start_self_critical(
    training: Training, dataset: CaptionDataset, settings: Settings
) -> Callable[..., SelfCritical]:
    """Fix the stage's learning rate; return `SelfCritical` with its own arguments bound. Where the
    stage begins, it has a new Adam, and the weights of the best epoch or of the checkpoint that the user
    chose."""
    from captioning.training.reinforce import Reward, SelfCritical  # most trainings have no such stage

    run, history = training.run, training.history
    records = Prepared(settings.data_folder).records("train")
    reward = Reward([[tokenize(text) for text in r.captions] for r in records], settings.reward_bleu4)
    training.schedule.hold(settings.self_critical_lr, "self_critical_lr")
    run.log(f"    training is self-critical, with a rate of {settings.self_critical_lr:.2g}")
    objective = partial(SelfCritical, reward=reward, longest=int(dataset.lengths.max()) - 1)
    if training.epoch.is_resumed or (history and REWARD in history[-1]):
        return objective
    training.optimizer.state.clear()
    run.state.wait_for_everyone()  # until the best is written
    best = Path(settings.output_folder) / "best_checkpoint.pth"
    start = training.weights.states()
    if best.is_file() and not (settings.checkpoint and training.epoch.number == training.first_epoch):
        start = load_checkpoint(best, "encoder", "decoder")
        run.log(f"    it starts from the weights of epoch {len(start['history'])}, the best one")
    training.weights.load({name: start[name] for name in ("encoder", "decoder")})  # the averages
    return objective


# --- an epoch -----------------------------------------------------------------------------------------------


def train_one_epoch(
    epoch: Epoch,
    loader: BatchLoader,
    objective: CrossEntropy | SelfCritical,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    run: Run,
) -> None:
    """One pass over the training images, or the rest of one."""
    objective.decoder.train()
    lengths = loader.dataset.lengths  # (I, captions_per_image)
    for step in epoch.steps(loader, objective.report):
        objective.start_step(lengths[step.indices])
        step_loss = 0.0
        for indices, batch in step.batches:  # grad_accumulation of them
            with run.autocast():
                loss = objective(indices, *batch)
            run.backward(loss)
            step_loss += loss.detach()
        divisor = objective.finish_step()
        run.reduce_gradients(optimizer, divisor)  # over all processes
        run.clip_gradients(optimizer, settings.grad_clip, settings.grad_clip_by)
        run.step(optimizer)
        epoch.record(step_loss / divisor, objective.captions)


@torch.no_grad()
def evaluate(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    loader: BatchLoader,
    records: list[Record],
    word_map: dict[str, int],
    settings: Settings,
    run: Run,
) -> tuple[dict[str, float], dict[str, str]]:
    """Loss and top-5 accuracy with teacher forcing, BLEU-4 and CIDEr of greedy captions.

    Args:
        loader: of this process's share of the images; its sampler yields requests with their indices.
        records: all images, with their tokenized references.

    Returns:
        {"val_loss", "val_top5", "val_bleu4", "val_cider"}; the captions by image id. Both of all processes.
    """
    from captioning.decoding.beam_search import beam_search  # here, as no training step needs it
    from captioning.decoding.options import WordRules

    decoder.eval()
    words = {index: word for word, index in word_map.items()}
    rules = WordRules([word_map[word] for word in (PAD, START, UNK)])
    sums, texts = torch.zeros(5, dtype=torch.float64), []
    for images, captions, lengths in progress_bar(
        loader, desc="validation", unit="batch", leave=False, disable=not run.is_main
    ):
        with run.autocast():
            grid = encode(encoder, images, run.device)
            tokens = token_logits(decoder, grid, captions, lengths)
            cross_entropy = F.cross_entropy(tokens.logits, tokens.targets, reduction="sum")
            penalty = coverage_penalty(tokens.coverage())
            ends = word_map[START], word_map[END]
            greedy = beam_search([decoder], [grid.float()], *ends, beam_size=1, rules=rules)
        likeliest = tokens.logits.topk(min(5, len(word_map))).indices  # (W, 5)
        correct = (likeliest == tokens.targets.unsqueeze(1)).sum()
        counts = (cross_entropy, penalty, correct, len(likeliest), lengths.numel())
        sums += torch.tensor([float(count) for count in counts], dtype=torch.float64)
        texts += [" ".join(words[index] for index in hypothesis.words) for hypothesis in greedy]
    indices = [index for request in loader.sampler for index in request.indices.tolist()]
    cross_entropy, penalty, correct, count, captions = run.sum(sums).tolist()
    by_index = run.gather(dict(zip(indices, texts, strict=True)))
    return {
        "val_loss": cross_entropy / count + settings.alpha_c * penalty / captions,
        "val_top5": correct / count,
        **caption_scores([record.tokens for record in records], by_index),
    }, {record.image_id: by_index[index] for index, record in enumerate(records)}


if __name__ == "__main__":
    run_script(main, Settings)
