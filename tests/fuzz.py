"""Thousands of damaged, odd and hostile inputs, through every script.

    python tests/fuzz.py --cases 4000 --seed 1
    python tests/fuzz.py --seed 1 --case 1234      # one of them again, with what it printed

A case (tests/fuzz_inputs.py) is a folder with files of which one is damaged, or settings that cannot be, and
a script that is run on it in a process of its own. It fails where the script ends with a traceback, a signal
or an exit status that the docs do not know, does not end within two minutes, prints what is not printable, or
says that all is well and has not written what it says.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from fork_server import Run, Server
from fuzz_inputs import KINDS, Case, Samples

SECONDS = 120  # of the clock, for a case; more is a hang
ENDS_WELL = {0, 1, 2}  # done; done, but for images that cannot be read; wrong input


def run_case(samples: Samples, server: Server, seed: int, number: int) -> tuple[str, Case, Run, str]:
    """Its kind, the case, how it ended, and what is wrong; "" where nothing is."""
    rng = random.Random(f"{seed} {number}")
    make = rng.choices(list(KINDS), list(KINDS.values()))[0]
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name).resolve()
        case = make(samples, folder, rng)
        run = server.run(folder, case.script, *case.arguments, seconds=SECONDS)
        return make.__name__.removesuffix("_case"), case, run, find_fault(case, run, folder)


def find_fault(case: Case, run: Run, folder: Path) -> str:
    if run.status == -14:
        return f"no end within {SECONDS} s"
    if "Traceback (most recent call last)" in run.output:
        return f"a traceback: {run.output.strip().splitlines()[-1]}"
    if run.status not in ENDS_WELL:
        return f"exit status {run.status}"
    if run.status == 2 and "error: " not in run.output:
        return "exit status 2 without a line"
    for line in run.output.replace("\r", "\n").split("\n"):
        if not line.isprintable():
            return f"prints {line!a}"
    return case.check(folder, run.status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="run this one alone, and show what it prints")
    arguments = parser.parse_args()
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz_samples") as folder, Server() as server:
        samples = Samples.make(Path(folder).resolve())
        for number in [arguments.case] if arguments.case is not None else range(arguments.cases):
            kind, case, run, fault = run_case(samples, server, arguments.seed, number)
            counts[kind, "tried"] += 1
            counts[kind, "refused"] += run.status == 2
            counts[kind, "failed"] += bool(fault)
            if fault or arguments.case is not None:
                command = " ".join([case.script, *map(ascii, map(str, case.arguments))])
                print(f"case {number} ({kind}): {fault!a}\n    {command[:1000]}", flush=True)
            if arguments.case is not None:
                print(run.output)
    print(f"{'kind':12} tried  refused  failed")
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(f"{kind:12} {counts[kind, 'tried']:5}  {counts[kind, 'refused']:7}  {counts[kind, 'failed']:6}")
    return 1 if any(counts[kind, "failed"] for kind, _ in list(counts)) else 0


if __name__ == "__main__":
    sys.exit(main())
