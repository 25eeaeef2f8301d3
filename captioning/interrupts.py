"""Ctrl-C and SIGTERM while a script is still importing: one line instead of a traceback, or of nothing.

Every script imports this first, as torch and the like take seconds; `command_line.run_script` takes over.
In a program that merely imports one of the scripts nothing changes.
"""

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    os.write(2, b"\ninterrupted before the work began\n")
    os._exit(128 + number)


def _is_ours(script: str | None) -> bool:
    """Whether the program that runs is a script of this repository."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return script is not None and os.path.dirname(os.path.abspath(script)) == here


if _is_ours(getattr(sys.modules["__main__"], "__file__", None)):
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _leave)
