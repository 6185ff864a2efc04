"""Each Triton kernel alone against its floor: `python -m benchmarks.bench_kernels [--dtype bfloat16] [--out DIR]`.

The floor of a launch is the larger of its bytes over the measured bandwidth and its operations over the measured rate
of a large product (traffic.py, ceiling.py). Times are medians of queued launches with an L2 cache written over before
each (`runner.Queue`); "host" is what Python takes for one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ssvdo_kernels import traffic
from ssvdo_kernels.ops.linear import over_tokens
from ssvdo_kernels.traffic import Machine, Traffic

from .ceiling import measure, sample
from .record import Rows
from .report import as_markdown

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
    A, F = draw(large, d), draw(large, e)
    return {
        "expand": (lambda: launch.expand(x, V, R), traffic.expand(T, d, w, e, size, one_pass=fused)),
        "expand, keeping h and z": (lambda: launch.expand(x, V, R, True),
                                    traffic.expand(T, d, w, e, size, one_pass=fused, keep=True)),
        "contract, keeping g": (lambda: launch.contract(uz[:, :d], g[:, w:], V, Q, True, g=g),
                                traffic.contract(T, d, w, e, size, one_pass=fused, keep=True)),
        "g^T h": (lambda: over_tokens(g, g[:, :w]), traffic.over_tokens(T, w + e, w, size)),
        "merge": (lambda: launch.merge(A, F, V, Q, False), traffic.contract(large, d, w, e, size, one_pass=fused)),
    }  # fmt: skip


def rows(machine: Machine, tokens: int, width: int, d: int, e: int, dtype: torch.dtype, device: torch.device
         ) -> list[dict[str, Any]]:  # fmt: skip
    """Measured and floor milliseconds of every kernel at one size."""
    found = []
    for name, (call, cost) in kernels(tokens, d, 4 * d, width, e, dtype, device).items():
        seconds, host = sample(call, device, 25)
        floor = cost.seconds(machine)
        found.append({"kernel": name, "tokens": tokens, "d": d, "w": width, "e": e, "ms": 1e3 * seconds,
                      "floor_ms": 1e3 * floor, "host_us": 1e6 * host,
                      "bound": "bytes" if cost.bytes / machine.bandwidth > cost.flops / machine.rate else "flops",
                      "share": floor / seconds})  # fmt: skip
    return found


def markdown(results: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [f"{results['device']}, {results['dtype']}, {results['date']}."]
    for m in [row["machine"] for row in results["rows"][:1]]:
        lines += [f"Measured {m['bandwidth'] / 1e12:.2f} TB/s, {m['rate'] / 1e12:.0f} Tflop/s."]
    header = ["kernel", "T", "d", "w", "e", "ms", "floor, ms", "bound", "floor / ms", "host, us"]
    lines += ["", *as_markdown(header, [
        [r["kernel"], *(str(r[n]) for n in ("tokens", "d", "w", "e")), f"{r['ms']:.4f}", f"{r['floor_ms']:.4f}",
         r["bound"], f"{r['share']:.0%}", f"{r['host_us']:.0f}"] for row in results["rows"] for r in row["kernels"]])]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("the kernels are timed on an NVIDIA GPU, and there is none")
    dtype, device = getattr(torch, options.dtype), torch.device("cuda")
    sizes = {f"T={T} w={w}": (T, w) for T in TOKENS for w in WIDTHS}
    table = Rows(options.out, "cuda", options.dtype, "kernels", dtype=options.dtype)
    peaks = lru_cache(maxsize=1)(lambda: measure(device, dtype))

    def one(key: str) -> dict[str, Any]:
        machine = peaks()
        return {"machine": {"bandwidth": machine.bandwidth, "rate": machine.rate},
                "kernels": rows(machine, *sizes[key], 1024, 64, dtype, device)}  # fmt: skip

    return table.finish(markdown, table.fill(sizes, one, options.minutes))


if __name__ == "__main__":
    sys.exit(main())
