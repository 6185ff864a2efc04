"""What commands print, on whatever console there is."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def print_anything() -> None:
    """Makes stdout escape what its encoding lacks, as stderr does: no command ends in an error over a name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show(text: str, command: str, done: str = "") -> int:
    """Prints all that a command has to say, and returns its exit code: 1, with a line on stderr, where it cannot.

    A reader that closes the pipe has seen enough: no error. done: what is true whether it was printed or not.
    """
    try:
        print(text, end="", flush=True)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # the flush at the end would fail again
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"{command}: stdout cannot be written: {error.strerror or error}{done}", file=sys.stderr)
        return 1
    return 0
