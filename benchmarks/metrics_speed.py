"""Time of `score_captions` beside pycocoevalcap's run on the same captions, and rate of the CIDEr-D reward.

    python benchmarks/metrics_speed.py

Both score N_IMAGES hypotheses against five references each: first without METEOR (theirs with its Java
tokenizer), then with it (theirs in Java). The scores must agree to 1e-9, METEOR's to 1e-6, or the script
stops with an error. Without pycocoevalcap or `java` only our times are printed. No caption comes twice, as
the second time would be cheap for us. METEOR's data are prepared before the clock starts, as on any run but
a user's first.
"""

import contextlib
import io
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from scored_images import ROOT, make_images

sys.path.insert(0, str(ROOT))
import metrics
import metrics.tokenizer
from metrics import CiderD, Meteor, MeteorDataError, score_captions, tokenize

# Settings
N_IMAGES = 5000
N_REFERENCES = 5
N_SAMPLES = 5  # hypotheses an image in one batch of the reward, as in self-critical training
BATCH = 64  # images
SEED = 0


def main() -> None:
    images, origin = make_images(N_IMAGES, N_REFERENCES, SEED)
    references = {number: captions for number, (captions, _) in enumerate(images)}
    hypotheses = {number: hypothesis for number, (_, hypothesis) in enumerate(images)}
    print(f"{len(references)} hypotheses, {N_REFERENCES} references each, {origin}")
    tokenizer_rate([caption for captions in references.values() for caption in captions])

    try:
        meteor = Meteor()
    except MeteorDataError as error:
        meteor = None
        print(error)
    with without_meteor():
        result, seconds = timed(lambda: score_captions(references, hypotheses))
    print(f"BLEU, ROUGE-L, CIDEr: {seconds:.2f} s")
    theirs = official_scores(references, hypotheses) if shutil.which("java") else None
    if theirs:
        expected, words, guesses, their_seconds = theirs
        print(f"    pycocoevalcap: {their_seconds:.2f} s, {their_seconds / seconds:.1f} times as long")
        check(result, expected, 1e-9)
    if meteor:
        result, all_seconds = timed(lambda: score_captions(references, hypotheses, meteor))
        print(f"with METEOR: {all_seconds:.2f} s")
        if theirs:
            expected["METEOR"], java_seconds = official_meteor(words, guesses)
            their_seconds += java_seconds
            print(
                f"    pycocoevalcap: {their_seconds:.2f} s, {their_seconds / all_seconds:.1f} times as long"
            )
            check(result, expected, 1e-6)
    reward_rate(references, hypotheses)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


@contextlib.contextmanager
def without_meteor():
    def missing():
        raise MeteorDataError("not asked for")

    real, metrics.Meteor = metrics.Meteor, missing
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        metrics.Meteor = real


def tokenizer_rate(captions: list[str]) -> None:
    metrics.tokenizer._tokens_of_chunk.cache_clear()
    _, ours = timed(lambda: [tokenize(caption) for caption in captions])
    line = f"tokenizer: {len(captions) / ours:,.0f} captions a second"
    with contextlib.suppress(ImportError):
        from nltk.tokenize import TreebankWordTokenizer

        split = TreebankWordTokenizer().tokenize
        _, nltk = timed(lambda: [split(caption.lower()) for caption in captions])
        line += f"; NLTK's Treebank tokenizer takes {nltk / ours:.1f} times as long"
    print(line)


def official_scores(references: dict[int, list[str]], hypotheses: dict[int, str]):
    """pycocoevalcap's scores but METEOR, its tokens, and the time of both; None where it is not installed."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        return None

    def work():
        with contextlib.redirect_stdout(io.StringIO()):
            split = PTBTokenizer().tokenize
            words = split({key: [{"caption": c} for c in captions] for key, captions in references.items()})
            guesses = split({key: [{"caption": caption}] for key, caption in hypotheses.items()})
            overall, columns = Bleu(4).compute_score(words, guesses, verbose=0)
        expected = {f"Bleu_{n}": pair for n, pair in enumerate(zip(overall, columns), 1)}
        expected["ROUGE_L"] = Rouge().compute_score(words, guesses)
        expected["CIDEr"] = Cider().compute_score(words, guesses)
        return expected, words, guesses

    result, seconds = timed(work)
    return *result, seconds


def official_meteor(words: dict[int, list[str]], guesses: dict[int, list[str]]):
    from pycocoevalcap.meteor.meteor import Meteor as OfficialMeteor

    return timed(lambda: OfficialMeteor().compute_score(words, guesses))


def check(result: metrics.Scores, expected: dict[str, tuple[float, list[float]]], tolerance: float) -> None:
    largest = 0.0
    for name, (score, column) in expected.items():
        own = [image[name] for image in result.per_image.values()]
        differences = [abs(a - b) for a, b in zip(own, column, strict=True)]
        largest = max(largest, abs(result.overall[name] - score), *differences)
    print(f"    largest difference of a score, overall or of an image: {largest:.1e}")
    if not largest <= tolerance:
        sys.exit("the scores differ")


def reward_rate(references: dict[int, list[str]], hypotheses: dict[int, str]) -> None:
    words = {key: [tokenize(caption) for caption in captions] for key, captions in references.items()}
    guesses = {key: tokenize(caption) for key, caption in hypotheses.items()}

    def rate(cider: CiderD, keys: list[int]) -> float:
        start = time.perf_counter()
        for first in range(0, len(keys), BATCH):
            batch = keys[first : first + BATCH]
            cider.score([words[key] for key in batch], [guesses[key] for key in batch])
        return len(keys) / (time.perf_counter() - start)

    keys = list(words)
    cider = CiderD.from_references(words.values())
    print("CIDEr-D reward, captions a second:")
    print(f"    one hypothesis an image, its references not seen before: {rate(cider, keys):,.0f}")
    print(f"    one hypothesis an image, its references seen before: {rate(cider, keys[-BATCH:] * 20):,.0f}")
    cider = CiderD.from_references(words.values())
    samples = [key for key in keys for _ in range(N_SAMPLES)]
    print(f"    {N_SAMPLES} hypotheses an image, its references not seen before: {rate(cider, samples):,.0f}")


if __name__ == "__main__":
    main()
