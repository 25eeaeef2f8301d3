"""Captioners of transformers, of any family that model_inputs.py knows.

    captioner = load_captioner("Qwen/Qwen2.5-VL-3B-Instruct")              # loading.py; a folder or a hub id
    captioner.set_prompt("Describe the photo in one sentence.")
    captioner.caption("photo.jpg", beam_size=1)                            # a string

Model, processor and search are transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateOutput

from captioning.captioners.base import BaseCaptioner, Caption
from captioning.captioners.model_inputs import ModelInputs, first_line
from captioning.data.prepared import require_disk_space
from captioning.data.submissions import ScoredCaption
from captioning.decoding.options import DecodingOptions, find_fault
from captioning.decoding.sampling import draw_words, image_seed, uniform_numbers
from utils import UserError

AnyCaption = TypeVar("AnyCaption")
RETRY = {"temperature": 0.7, "top_p": 0.9}  # how a caption that failed the checks is drawn again


@dataclass
class VisionLanguageCaptioner(ModelInputs, BaseCaptioner):
    """A captioning model of transformers.

    Attributes:
        checks: rules of decoding/options.py that a caption must keep to. One that does not is drawn again,
            up to `retries` times.
        adapter: PEFT's model, where low-rank adapters of `model` are trained or loaded; else None.
    """

    checks: Sequence[str] = ()
    retries: int = 2
    adapter: Any = field(default=None, repr=False)

    def decode_prepared(
        self,
        images: Sequence[Any],
        options: DecodingOptions,
        ids: Sequence[str] = (),
        with_scores: bool = False,
    ) -> list[list[ScoredCaption] | UserError]:
        """The captions of each of the prepared images.

        Args:
            options: transformers ranks the captions of a beam by log-probability per token. Lengths and
                n-grams are counted in tokens.
            ids: the images' ids, for samples.
            with_scores: give log-probabilities, of what follows the prompt.
        """
        ids = list(ids) or [str(number) for number in range(len(images))]
        found: list[list[ScoredCaption] | UserError] = [UserError("no caption")] * len(images)
        pending = list(range(len(images)))
        for attempt in range(1 + (self.retries if self.checks else 0)):
            if not pending:
                break
            if attempt:  # search would find the same again
                drawn = {} if options.samples else RETRY
                options = replace(options, seed=options.seed + 1, **drawn)
            decoded = self._decode(
                [images[i] for i in pending], options, [ids[i] for i in pending], with_scores
            )
            for i, own in zip(pending, decoded):
                faults = [find_fault(caption.text, ended, self.checks) for caption, ended in own]
                sound = [caption for (caption, _), fault in zip(own, faults) if not fault]
                found[i] = sound or _rejected(own[0][0].text, faults[0], attempt)
            pending = [i for i in pending if isinstance(found[i], UserError)]
        return found

    def _decode(
        self, images: Sequence[Any], options: DecodingOptions, ids: Sequence[str], with_scores: bool
    ) -> list[list[tuple[ScoredCaption, bool]]]:
        """The captions of each image, and of each whether the model has ended it."""
        # of the beam all, where several are wanted: tokens that differ may spell the same caption
        count = options.num_captions if options.samples or options.num_captions == 1 else options.beam_size
        inputs = self.batch(images)
        output = self.generate(inputs, options, ids, count, with_scores)
        tokens = output.sequences[:, self.prompt_length(inputs) :]
        ends = torch.tensor(self.end_tokens(), device=tokens.device, dtype=tokens.dtype)
        is_end = torch.isin(tokens, ends)
        if self.scorer.generation_config.forced_eos_token_id is not None:
            is_end[:, max(self.limit, options.min_length) - 1 :] = (
                False  # BART's, whatever it would have said
            )
        ended = is_end.any(dim=1).tolist()
        scores = self._scores(output) if with_scores else [()] * len(tokens)
        kept = output.sequences if self.keep_prompt else tokens
        found = []
        for text, new, own, end in zip(self._texts(kept), self._texts(tokens), scores, ended):
            if with_scores:
                log_prob, words = own
                found.append((ScoredCaption.of(text, log_prob, len(new.split()), words), end))
            else:
                found.append((ScoredCaption(text), end))
        groups = [found[i : i + count] for i in range(0, len(found), count)]
        if not options.samples:
            groups = [distinct(own, lambda one: one[0].text) for own in groups]
        return [own[: options.num_captions] for own in groups]

    def _texts(self, sequences: Tensor) -> list[str]:
        return [
            " ".join(text.split())
            for text in self.tokenizer.batch_decode(sequences.tolist(), skip_special_tokens=True)
        ]

    @torch.no_grad()
    def generate(
        self,
        inputs: Mapping[str, Tensor],
        options: DecodingOptions,
        ids: Sequence[str],
        count: int,
        with_logits: bool = False,
    ) -> GenerateOutput:
        """transformers' search or samples: `count` sequences an image, one image after the other."""
        refused = [
            name for name in ("length_penalty", "remove_bad_endings", "allow_unk") if getattr(options, name)
        ]
        if refused:
            raise UserError(f"--{refused[0]} is for attention models alone: leave it out")
        limit = max(self.limit, options.min_length)  # never max_length, of which images and prompts are part
        search: dict[str, Any] = {"num_beams": options.beam_size, "do_sample": False}
        if options.samples:
            draw = DrawnWords(options, ids, count, limit, self.model.device)
            # the draws are ours, and depend on the image's seed alone
            search = {"num_beams": 1, "do_sample": True, "top_k": 0}
            search["logits_processor"] = LogitsProcessorList([draw])
        if options.no_repeat_ngram:
            search["no_repeat_ngram_size"] = options.no_repeat_ngram
        with self.searching(count if options.samples else options.beam_size) as more:
            try:
                return self.model.generate(
                    **inputs,
                    num_return_sequences=count,
                    max_new_tokens=limit,
                    min_new_tokens=options.min_length,
                    return_dict_in_generate=True,
                    output_logits=with_logits,
                    **search,
                    **more,
                )
            except (ValueError, IndexError) as error:  # such as another number of image tokens than features
                raise UserError(
                    f"{self.name}: its model and its processor do not fit ({first_line(error)}); "
                    f"fetch both anew"
                ) from None

    def searching(self, rows: int) -> AbstractContextManager[dict[str, Any]]:
        """What holds during a search with so many sequences an image: more options of `generate`."""
        return nullcontext({"pad_token_id": self.pad_token_id, "eos_token_id": self.end_tokens()})

    def end_tokens(self) -> list[int]:
        """The tokens that end a caption."""
        ends = {self.tokenizer.eos_token_id}
        for module in (self.model, self.scorer):
            own = module.generation_config.eos_token_id
            ends |= {*own} if isinstance(own, (list, tuple)) else {own}
        return sorted(ends - {None})

    @property
    def scorer(self) -> PreTrainedModel:
        """What generates: the model, or the language model in it whose `generate` it calls."""
        part = getattr(self.model, "language_model", None)
        return part if isinstance(part, GenerationMixin) and type(part).can_generate() else self.model

    def prompt_length(self, inputs: Mapping[str, Tensor]) -> int:
        """Tokens of a sequence before the caption's first. Encoder-decoders, and models that are given pixels
        alone, begin with one that starts a text; others repeat the prompt."""
        prompt = inputs.get("input_ids")
        return 1 if prompt is None or self.is_encoder_decoder else prompt.shape[1]

    def _scores(self, output: GenerateOutput) -> list[tuple[float, list[tuple[str, float]]]]:
        """The log-probability of each sequence under the model, with that of its end, and of each word."""
        scores = self.scorer.compute_transition_scores(
            output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
        )
        tokens = output.sequences[:, -scores.shape[1] :]
        ended = torch.isin(tokens, torch.tensor(self.end_tokens(), device=tokens.device, dtype=tokens.dtype))
        scores = scores.float().masked_fill(ended.cumsum(dim=1) > ended.int(), 0.0)
        found = []
        for own, values in zip(tokens.tolist(), scores.tolist()):
            words = [(word, sum(values[i] for i in places)) for word, places in self.words_of(own)]
            found.append((sum(values), words))
        return found

    def words_of(self, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Each word of a sequence, and the places of its tokens: a token is of the last word that the text up
        to it has."""
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        kept: list[int] = []
        words: list[str] = []
        places: list[list[int]] = []
        for place, token in enumerate(tokens):
            if token in special:
                continue
            kept.append(token)
            words = self.tokenizer.decode(kept).split()
            while len(places) < len(words):
                places.append([])
            if words:
                places[len(words) - 1].append(place)
        return list(zip(words, places))

    def describe_prepared(
        self, images: Sequence[Any], options: DecodingOptions, ids: Sequence[str] = ()
    ) -> list[Caption]:
        """Raises UserError: where these models look is not known."""
        raise UserError(
            f"{self.name}: a {self.model.config.model_type} model; where it looked is for BLIP and attention "
            f"models"
        )

    def save(self, folder: str | Path) -> None:
        """Write the files by which `load_captioner`, or transformers' own classes, read the model again; of a
        model with an adapter, the adapter alone."""
        parts = [self.adapter or self.model]
        if self.adapter is None:
            parts += [self.processor] if self.processor else [self.image_processor, self.tokenizer]
        weights = trainable(self.model) if self.adapter else self.model.state_dict().values()
        Path(folder).mkdir(parents=True, exist_ok=True)
        require_disk_space(Path(folder), sum(tensor.nbytes for tensor in weights), "free some disk space")
        try:
            for part in parts:
                part.save_pretrained(folder)
        except SafetensorError as error:
            raise UserError(f"{folder}: the model cannot be written ({error})") from None


VISION = re.compile(r"(^|\.)(vision_\w+|visual|image_encoder|qformer)\.|^encoder\.")  # of layers' names


def freeze_vision(model: nn.Module) -> None:
    """Let the language model alone be trained, with what leads from images to it."""
    for name, parameter in model.named_parameters():
        if VISION.search(name) and "projector" not in name:
            parameter.requires_grad_(False)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _rejected(text: str, fault: str, attempt: int) -> UserError:
    shown = f'"{text[:60]}..."' if len(text) > 60 else f'"{text}"'
    times = f", after {attempt + 1} attempts" if attempt else ""
    return UserError(f"{fault}{times}: {shown}")


def distinct(captions: Iterable[AnyCaption], text_of: Callable = lambda one: one.text) -> list[AnyCaption]:
    """The first caption of each text."""
    first: dict[str, AnyCaption] = {}
    for caption in captions:
        first.setdefault(text_of(caption), caption)
    return [*first.values()]


class DrawnWords(LogitsProcessor):
    """Leaves each sequence one word, drawn with the numbers of its image."""

    def __init__(
        self, options: DecodingOptions, ids: Sequence[str], count: int, steps: int, device: torch.device
    ):
        seeds = [image_seed(options.seed, image_id) for image_id in ids]
        numbers = uniform_numbers(seeds, count, steps).flatten(0, 1).to(device)  # (N * count, steps)
        self.columns = iter(numbers.unbind(dim=1))
        self.temperature, self.top_p = options.temperature or 1.0, options.top_p or 1.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        words = draw_words(scores, next(self.columns), self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, words.unsqueeze(1), 0.0)
