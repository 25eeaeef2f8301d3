"""Runs scripts in processes that are forked from this one, which has imported everything: they start at once.

    python tests/fork_server.py    # then lines of JSON on stdin, see `Server`

Tests that kill hundreds of runs use it, as importing takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROCESSOR_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Server:
    """A running fork server, one run at a time; a context manager."""

    def __enter__(self) -> Server:
        command = [sys.executable, __file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(
        self, folder: Path, script: str, *arguments, end: int = signal.SIGKILL, after: float | None = None,
        before_rename: int = 0, seconds: int = 0,
    ) -> Run:  # fmt: skip
        """Run a script in a folder.

        after: send the signal `end` once the run has used so many seconds of a processor. before_rename: let
            it be killed before this rename, counted from 1. seconds: end it with SIGALRM after so many.
        """
        job = {"script": script, "arguments": [str(argument) for argument in arguments]}
        job |= {"folder": str(folder), "before_rename": before_rename, "seconds": seconds}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        number = int(self.process.stdout.readline())
        if after is not None and wait_for_work(number, after):
            os.kill(number, end)
        status, seconds = json.loads(self.process.stdout.readline())
        return Run(status, seconds, (folder / "output.log").read_text(errors="replace"))


class Run:
    """An ended run: exit status (of a signal: minus its number), seconds of a processor, what it printed."""

    def __init__(self, status: int, seconds: float, output: str):
        self.status, self.seconds, self.output = status, seconds, output


def wait_for_work(number: int, seconds: float) -> bool:
    """Wait until a process has used so many seconds of a processor; False where it ended before."""
    while True:
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        if fields[0] == "Z":
            return False
        if (int(fields[11]) + int(fields[12])) / PROCESSOR_TICK >= seconds:
            return True
        time.sleep(0.001)


# --- in the server ------------------------------------------------------------------------------------------


def serve() -> None:
    import_everything()
    for line in sys.stdin:
        job = json.loads(line)
        number = os.fork()
        if number == 0:
            run_job(job)
        print(number, flush=True)
        _, status, usage = os.wait4(number, 0)
        seconds = usage.ru_utime + usage.ru_stime
        print(json.dumps([os.waitstatus_to_exitcode(status), seconds]), flush=True)


def import_everything() -> None:
    sys.path.insert(0, str(ROOT))
    import accelerate.utils  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import skimage.data  # noqa: F401
    import torchvision.models  # noqa: F401

    import run_pipeline  # noqa: F401


def run_job(job: dict) -> None:
    """In the new process: run the script as the command line does, and end."""
    status = 1
    try:
        os.chdir(job["folder"])
        log = os.open("output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = [job["script"], *job["arguments"]]
        signal.alarm(job["seconds"])
        if job["before_rename"]:
            die_before_rename(job["before_rename"])

        from captioning import command_line

        module = __import__(job["script"].removesuffix(".py"))
        command_line.run_script(module.main, module.Settings)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_before_rename(number: int) -> None:
    """Let this process be killed when it is about to rename a file for the `number`th time."""
    count = 0

    def kill_in_time(rename):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(*arguments, **options)

        return wrapped

    os.replace, os.rename = kill_in_time(os.replace), kill_in_time(os.rename)


if __name__ == "__main__":
    serve()
