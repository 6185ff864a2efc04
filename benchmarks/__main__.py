"""Times layers by every method, and writes dated JSON, tables and a plot.

    python -m benchmarks --quick
    python -m benchmarks --device cuda --dtype bfloat16 --minutes 8
    python -m benchmarks --quick --kinds tall --p 0.5 --tokens 128 1024 --peers LoRA

Every row is on disk once it is measured; the same command goes on where a run was cut. Exit code 75: rows are missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .bench_layer import Case, grid, measure_layer
from .peers import peers
from .record import Rows
from .report import label, markdown, plot


def name_of(case: Case) -> str:
    """The case as tables call it."""
    return label(dict(zip(("kind", "d", "tokens", "p", "l"), case, strict=True)))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1024 <-> 4096, l = 64 only; some 3 minutes on 2 cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--threads", type=int, help="1: time of this process, for a machine that others use")
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    sizes = {"kinds": str, "d": int, "tokens": int, "p": float, "rank": int}
    for name, kind in sizes.items():
        parser.add_argument(f"--{name}", type=kind, nargs="+", help="in place of the grid's own")
    parser.add_argument("--peers", nargs="*", help="of the tables' columns, in place of all, and without our forms")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no NVIDIA GPU")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    given = {name: getattr(options, name) for name in sizes}
    cases = {name_of(c): c for c in grid(options.quick, options.device.startswith("cuda"), **given)}
    if unknown := sorted(set(options.peers or ()) - set(peers(0.5, 64))):
        parser.error(f"--peers: {unknown[0]!r} is unknown; allowed: {', '.join(peers(0.5, 64))}")
    rows = Rows(options.out, options.device, options.dtype, "quick" if options.quick else "full",
                dtype=options.dtype, quick=options.quick, peers=options.peers)
    with tempfile.TemporaryDirectory() as folder:
        missing = rows.fill(cases, lambda key: measure_layer(
            cases[key], options.quick, torch.device(options.device), getattr(torch, options.dtype), Path(folder),
            options.peers), options.minutes)  # fmt: skip
    code = rows.finish(markdown, missing)
    results: dict[str, Any] = {**rows.facts, "rows": rows.good}
    if rows.good:
        plot(results, rows.path.parent / (rows.path.name + ".png"))
    return code


if __name__ == "__main__":
    sys.exit(main())
