"""Time and peak memory of `meteor.py` beside the Java program that pycocoevalcap runs, on the same captions.

    python benchmarks/meteor_speed.py

Three fresh processes score the same images: ours with an empty cache directory (a user's first run), ours
again (every later run), and METEOR 1.5's jar, driven as pycocoevalcap drives it. Each is timed from its start
to its end. The scores of all three must agree to 1e-6, or the script stops with an error. Needs
pycocoevalcap's data, and `java` for the comparison; peak memory is measured on Unix only.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scored_images import ROOT, make_images

sys.path.insert(0, str(ROOT))
from metrics import Meteor, MeteorDataError
from metrics.meteor_data import find_data

# Settings
N_IMAGES = 1000
N_REFERENCES = 5
SEED = 0
JAVA = ["java", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]


def main() -> None:
    if sys.argv[1:]:
        score_in_this_process(*map(Path, sys.argv[1:]))
        return
    try:
        data_dir = find_data()
    except MeteorDataError as error:
        sys.exit(str(error))
    images, origin = make_images(N_IMAGES, N_REFERENCES, SEED, plain=True)
    n_texts = len({text for references, hypothesis in images for text in [*references, hypothesis]})
    print(f"{len(images)} images, {N_REFERENCES} references each, {n_texts} different texts, {origin}")

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        task, cache_dir, output = (Path(folder, name) for name in ("images.json", "cache", "scores.json"))
        task.write_text(json.dumps(images))
        for name in ("first run", "later run"):
            with Measured([sys.executable, __file__, str(task), str(cache_dir), str(output)]) as run:
                pass
            run.scores = json.loads(output.read_text())
            runs[name] = run
    if shutil.which("java"):
        with Measured(JAVA, cwd=data_dir, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as run:
            run.scores = score_with_java(run.process, images)
        runs["Java"] = run
    else:
        print("no java here: nothing to compare with")
    report(runs)


def score_in_this_process(task: Path, cache_dir: Path, output: Path) -> None:
    images = dict(enumerate(json.loads(task.read_text())))
    corpus, scores = Meteor(cache_dir=cache_dir).compute_score(
        {key: references for key, (references, _) in images.items()},
        {key: hypothesis for key, (_, hypothesis) in images.items()},
    )
    output.write_text(json.dumps([*scores, corpus]))


def score_with_java(process: subprocess.Popen, images: list[tuple[list[str], str]]) -> list[float]:
    """Scores of the images, then of the corpus; afterwards the process ends by itself."""

    def ask(*parts: str) -> str:
        process.stdin.write((" ||| ".join(parts) + "\n").encode())
        process.stdin.flush()
        return process.stdout.readline().decode().strip()

    statistics = [ask("SCORE", *references, hypothesis) for references, hypothesis in images]
    scores = [float(ask("EVAL", *statistics))]
    scores += [float(process.stdout.readline()) for _ in images]  # the last is the corpus
    process.stdin.close()
    return scores


class Measured:
    """A process, and after the `with` block its seconds from start to end and its peak memory in MB."""

    def __init__(self, command: list[str], **options) -> None:
        self.command, self.options = command, options
        self.scores: list[float] = []
        self.megabytes = float("nan")

    def __enter__(self) -> "Measured":
        self.start = time.perf_counter()
        self.process = subprocess.Popen(self.command, **self.options)
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type:
            self.process.kill()
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(self.process.pid, 0)
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.megabytes = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        failed = self.process.wait() != 0
        self.seconds = time.perf_counter() - self.start
        if failed and not error_type:
            sys.exit(f"{self.command[0]} failed")


def report(runs: dict[str, Measured]) -> None:
    java = runs.get("Java")
    print(f"{'':<10} {'seconds':>8} {'peak MB':>8}" + ("  Java's time / its, memory" if java else ""))
    for name, run in runs.items():
        ratios = ""
        if java:
            ratios = f"  {java.seconds / run.seconds:5.1f} x, {java.megabytes / run.megabytes:4.1f} x"
        print(f"{name:<10} {run.seconds:8.2f} {run.megabytes:8.0f}{ratios}")
    print(f"corpus score {runs['later run'].scores[-1]:.9f}")
    expected = (java or runs["first run"]).scores
    for name, run in runs.items():
        largest = max(abs(score - other) for score, other in zip(run.scores, expected))
        print(f"{name}: largest difference of a score {largest:.1e}")
        if len(run.scores) != len(expected) or largest > 1e-6:
            sys.exit("the scores differ")


if __name__ == "__main__":
    main()
