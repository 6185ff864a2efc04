"""What commands print, on whatever console there is."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_anything() -> None:
    """Makes stdout escape what its encoding lacks, as stderr does: no command ends in an error over a name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(console: Console, text: str) -> None:
    """Prints a line as it is; a terminal breaks it, a file keeps it whole."""
    console.print(Text(text), soft_wrap=True)


def tabulate(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table of which nothing is cut: where it is wider than a terminal, a paragraph a row, and where there is
    none (a file, a pipe), lines as long as they must be."""
    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(Text(heading), justify="right" if table.columns else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    width = console.measure(table, options=console.options.update(width=10_000)).maximum
    if width <= console.width:
        console.print(table)
    elif console.is_terminal:
        lines = [title]
        for name, *values in rows:
            pairs = [f"{h}: {v}".replace(" ", "\0") for h, v in zip(headings[1:], values, strict=True)]
            said = textwrap.wrap("; ".join(pairs), console.width - 2, break_long_words=False, break_on_hyphens=False)
            lines += [name, *(f"  {line}" for line in said)]
        say(console, "\n".join(lines).replace("\0", " "))
    else:
        text = io.TextIOWrapper(io.BytesIO(), console.encoding, "backslashreplace", newline="")
        Console(file=text, width=width).print(table)
        text.seek(0)
        console.print(Text(text.read()), end="", soft_wrap=True)


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
