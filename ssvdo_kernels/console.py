"""What commands print, on whatever console there is."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Makes stdout escape what its encoding lacks, as stderr does: no command ends in an error over a name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
