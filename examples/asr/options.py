"""The examples' command lines. A wrong value is refused in one line: the option, the value, what is allowed."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")


def checked(kind: Callable[[str], T], allowed: str, holds: Callable[[T], bool]) -> Callable[[str], T]:
    """A `type` for argparse: `kind` of the text, where `holds` is true of it; `allowed` says what that means."""

    def read(text: str) -> T:
        try:
            value = kind(text)
            if holds(value):
                return value
        except (ValueError, OSError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is refused; allowed: {allowed}")

    return read


def _can_be_folder(path: Path) -> bool:
    there = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
    return there.is_dir() and os.access(there, os.W_OK)


COUNT = checked(int, "a whole number of at least 1", lambda n: 1 <= n < 1 << 31)
SEED = checked(int, "a whole number from 0 to 4294967295", lambda n: 0 <= n < 1 << 32)
LEARNING_RATE = checked(float, "a finite number above 0", lambda x: 0 < x < math.inf)
MINUTES = checked(float, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
FILE = checked(Path, "a file that is there", lambda p: p.exists() and not p.is_dir())
FOLDER = checked(Path, "a folder that is there", Path.is_dir)
TARGET = checked(Path, "a folder, or where one can be made", _can_be_folder)


def as_script(main: Callable[[], int], *mended: type[Exception]) -> NoReturn:
    """Exits with what `main` returns; a ValueError, an OSError and those that are `mended` by a user are one line."""
    try:
        sys.exit(main())
    except (ValueError, OSError, *mended) as error:
        sys.exit(f"error: {error}")
