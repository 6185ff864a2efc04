"""Factorising 24 feed-forward pairs (1024 / 4096, float32, random weights): seconds, peak memory, reload from a cache.

`python -m benchmarks.bench_factorize [--pairs 24] [--out DIR]`; each run in a process of its own, for its own peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo

from .record import facts, stem


def one(pairs: int, cache: str) -> dict[str, float]:
    """Adapts the stack, p = 0.5, l = 64; sizes in GB."""
    torch.manual_seed(0)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = nn.Sequential(*(nn.Linear(*s) for _ in range(pairs) for s in ((1024, 4096), (4096, 1024))))
    begin = time.perf_counter()
    apply_ssvdo(model, SSVDOConfig(target_modules="all-linear"), cache_dir=cache)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": seconds, "finished_gb": size / 1e9, "peak_gb": peak / 1e9, "peak_over_finished": peak / size}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.pairs, options.one)))
        return
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.bench_factorize", "--pairs", str(options.pairs), "--one", cache]
        found = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(2)]
    results = {**facts("cpu"), "pairs": options.pairs, "first": found[0], "cached": found[1]}
    path = stem(options.out, results, "factorise").with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1), f"wrote {path}", sep="\n")


if __name__ == "__main__":
    main()
