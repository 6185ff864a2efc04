"""Memory of a layer by each method, without times: what it keeps beside W0 and what training steps take (memory.py).

`python -m benchmarks.bench_memory [--dtypes float32 bfloat16] [--kinds tall wide] [--d 1024] [--tokens 1024] [--p 0.5]
[--rank 64] [--device cuda] [--out DIR]`; for where products of a half type are slow, as on many CPUs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import memory
from .bench_layer import EVERY, Case, adapted, make_peers, peak_of, training_step
from .peers import peers
from .record import facts, stem
from .report import as_markdown, memory_table


def measure(case: Case, device: str, dtype: torch.dtype, cache: Path) -> dict[str, Any]:
    """The row of one layer, as bench_layer writes it, without times."""
    kind, d, tokens, p, rank = case
    linear, make = make_peers(kind, d, p, rank, device, dtype)
    modules = {**{name: make(name) for name in peers(p, rank)}, EVERY: adapted(linear, p, rank, cache)}
    x = torch.randn(tokens, linear.in_features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, linear.out_features, device=device, dtype=dtype)
    for module in modules.values():
        training_step(module, x, dy)()
    kept = memory.beside(modules, linear, linear.weight.nbytes)
    most = memory.peaks(modules, partial(peak_of, case, cache, device, dtype))
    return {"case": {"kind": kind, "d": d, "tokens": tokens, "p": p, "l": rank},
            "methods": {name: {**kept[name], "peak_mib": most[name]} for name in modules}}  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """A table for each dtype."""
    lines = [f"{results['device']}, {results['threads']} threads, torch {results['torch']}, commit "
             f"{results['commit']}, {results['date']}. Multiples of W0's bytes; peaks less the frozen layer's."]
    for dtype, rows in results["dtypes"].items():
        lines += ["", f"**{dtype}**", "", *as_markdown(*memory_table({"rows": rows}))]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", choices=["tall", "wide", "square"], default=["tall", "wide"])
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--rank", type=int, default=64, help="l; a square layer has 0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {**facts(options.device), "dtypes": {}}
    with tempfile.TemporaryDirectory() as cache:
        for dtype in options.dtypes:
            results["dtypes"][dtype] = [
                measure((kind, options.d, options.tokens, options.p, 0 if kind == "square" else options.rank),
                        options.device, getattr(torch, dtype), Path(cache)) for kind in options.kinds]  # fmt: skip
    path = stem(options.out, results, "memory")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results), f"results: {path}.json and .md", sep="\n")


if __name__ == "__main__":
    main()
