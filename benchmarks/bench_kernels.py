"""Each Triton kernel alone against its floor: `python -m benchmarks.bench_kernels [--dtype bfloat16] [--out DIR]`.

The floor of a launch is the larger of its bytes over the measured bandwidth and its operations over the measured rate
of a large product (traffic.py, ceiling.py). Times are medians by device events with warm caches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssvdo_kernels import traffic
from ssvdo_kernels.traffic import Machine, Traffic

from .ceiling import measure, seconds_of
from .record import facts, stem

TOKENS = (2048, 16384)
WIDTHS = (64, 128, 256, 512)


def kernels(T: int, d: int, large: int, w: int, e: int, dtype: torch.dtype, device: torch.device
            ) -> dict[str, tuple[Callable[[], object], Traffic]]:  # fmt: skip
    """Name -> (launch, what it must move and compute) for one layer's token path."""
    from ssvdo_kernels.triton import launch

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype) / max(shape) ** 0.5

    x, V, R, Q, uz, g = draw(T, d), draw(d, w), draw(w, d + e), draw(w + e, d), draw(T, d + e), draw(T, w + e)
    size, fused = dtype.itemsize, launch.one_pass(dtype, w, e)
    splits = launch.splits_of(T, -(-(w + e) // 128) * -(-w // 64), 132)
    A, F = draw(large, d), draw(large, e)
    return {
        "expand": (lambda: launch.expand(x, V, R), traffic.expand(T, d, w, e, size, one_pass=fused)),
        "contract, keeping g": (lambda: launch.contract(uz[:, :d], uz[:, d:], V, Q, True),
                                traffic.contract(T, d, w, e, size, one_pass=fused, store_g=True)),
        "token_product g^T h": (lambda: launch.token_product(g, g[:, :w]),
                                traffic.token_product(T, w + e, w, size, splits)),
        "merge": (lambda: launch.merge(A, F, V, Q, False), traffic.contract(large, d, w, e, size, one_pass=fused)),
    }  # fmt: skip


def rows(machine: Machine, tokens: tuple[int, ...], widths: tuple[int, ...], d: int, e: int, dtype: torch.dtype,
         device: torch.device) -> list[dict[str, Any]]:  # fmt: skip
    """Measured and floor milliseconds of every kernel and size."""
    found = []
    for T in tokens:
        for w in widths:
            for name, (call, cost) in kernels(T, d, 4 * d, w, e, dtype, device).items():
                ms, floor = 1e3 * seconds_of(call, device, 25), 1e3 * cost.seconds(machine)
                found.append({"kernel": name, "tokens": T, "d": d, "w": w, "e": e, "ms": ms, "floor_ms": floor,
                              "bound": "bytes" if cost.bytes / machine.bandwidth > cost.flops / machine.rate else
                              "flops", "share": floor / ms})  # fmt: skip
    return found


def markdown(results: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    m = results["machine"]
    lines = [f"{results['device']}, {results['dtype']}, {results['date']}; measured {m['bandwidth'] / 1e12:.2f} TB/s, "
             f"{m['rate'] / 1e12:.0f} Tflop/s.", "", "| kernel | T | d | w | e | ms | floor, ms | bound | floor / ms |",
             "|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| {r['kernel']} | {r['tokens']} | {r['d']} | {r['w']} | {r['e']} | {r['ms']:.4f} | "
              f"{r['floor_ms']:.4f} | {r['bound']} | {r['share']:.0%} |" for r in results["rows"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the kernels are timed on an NVIDIA GPU, and there is none")
    dtype, device = getattr(torch, options.dtype), torch.device("cuda")
    machine = measure(device, dtype)
    results = {**facts("cuda"), "dtype": options.dtype,
               "machine": {"bandwidth": machine.bandwidth, "rate": machine.rate},
               "rows": rows(machine, TOKENS, WIDTHS, 1024, 64, dtype, device)}  # fmt: skip
    path = stem(options.out, results, options.dtype, "kernels")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
