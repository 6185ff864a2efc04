"""Each Triton kernel alone against its floor: `python -m benchmarks.bench_kernels [--dtype bfloat16] [--out DIR]`.

The floor of a launch is the larger of its bytes over the measured bandwidth and its operations over the measured rate
of a large product (traffic.py, ceiling.py). Times are medians of queued launches with an L2 cache written over before
each (`runner.Queue`); "host" is what Python takes for one. Where one pass is timed against two launches (w = 256), each
form has a row beside that of what was chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ssvdo_kernels import traffic
from ssvdo_kernels.ops.products import over_tokens
from ssvdo_kernels.traffic import Machine, Traffic

from .ceiling import measure, sample
from .kernel_table import describe
from .record import Rows
from .report import as_markdown

TOKENS = (2048, 16384)
WIDTHS = (64, 128, 256, 512)


@contextmanager
def taking(kernel: str, config: Any) -> Iterator[None]:
    """Launches of a kernel take this configuration, whatever has been timed."""
    from ssvdo_kernels.triton import launch, tuning

    def chosen(name: str, *arguments: Any, **options: Any) -> Any:
        return (config,) if name == kernel else choose(name, *arguments, **options)

    choose = tuning.choose
    with (mock.patch.object(tuning, "choose", chosen), mock.patch.object(launch, "_again", {}),
          mock.patch.object(launch, "_compiled", {})):  # fmt: skip
        yield


def forms(w: int, e: int, dtype: torch.dtype, device: torch.device) -> list[tuple[str, Any]]:
    """Kernels that are timed in several forms, each with its configurations, two launches first; [] at other widths."""
    from ssvdo_kernels.triton import configs, launch

    if not launch.timed(dtype, w, e):
        return []
    here = launch.capability(-1 if device.type == "cpu" else torch.cuda.current_device())
    return [(kernel, config) for kernel in ("wide_expand", "wide_contract")
            for config in configs.candidates(kernel, "half", here)]  # fmt: skip


def kernels(T: int, d: int, large: int, w: int, e: int, dtype: torch.dtype, device: torch.device
            ) -> dict[str, tuple[Callable[[], object], Callable[[bool], Traffic]]]:  # fmt: skip
    """Name -> (launch, what it must move and compute, in one pass or in two) for one layer's token path."""
    from ssvdo_kernels.triton import launch

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype) / max(shape) ** 0.5

    x, V, R, Q, uz, g = draw(T, d), draw(d, w), draw(w, d + e), draw(w + e, d), draw(T, d + e), draw(T, w + e)
    size = dtype.itemsize
    A, F = draw(large, d), draw(large, e)
    return {
        "expand": (lambda: launch.expand(x, V, R), lambda once: traffic.expand(T, d, w, e, size, one_pass=once)),
        "expand, keeping h and z": (lambda: launch.expand(x, V, R, True),
                                    lambda once: traffic.expand(T, d, w, e, size, one_pass=once, keep=True)),
        "contract, keeping g": (lambda: launch.contract(uz[:, :d], g[:, w:], V, Q, True, g=g),
                                lambda once: traffic.contract(T, d, w, e, size, one_pass=once, keep=True)),
        "g^T h": (lambda: over_tokens(g, g[:, :w]), lambda _: traffic.over_tokens(T, w + e, w, size)),
        "merge": (lambda: launch.merge(A, F, V, Q, False),
                  lambda once: traffic.contract(large, d, w, e, size, one_pass=once)),
    }  # fmt: skip


def rows(machine: Machine, tokens: int, width: int, d: int, e: int, dtype: torch.dtype, device: torch.device
         ) -> list[dict[str, Any]]:  # fmt: skip
    """Measured and floor milliseconds of every kernel at one size."""
    from ssvdo_kernels.triton import launch

    found = []

    def add(name: str, call: Callable[[], object], cost: Traffic) -> None:
        seconds, host = sample(call, device, 25)
        floor = cost.seconds(machine)
        found.append({"kernel": name, "tokens": tokens, "d": d, "w": width, "e": e, "ms": 1e3 * seconds,
                      "floor_ms": 1e3 * floor, "host_us": 1e6 * host,
                      "bound": "bytes" if cost.bytes / machine.bandwidth > cost.flops / machine.rate else "flops",
                      "share": floor / seconds})  # fmt: skip

    made, several = kernels(tokens, d, 4 * d, width, e, dtype, device), forms(width, e, dtype, device)
    for name, (call, cost) in made.items():
        add(name, call, cost(bool(several) or launch.one_pass(dtype, width, e)))
    for kernel, config in several:
        with taking(kernel, config):
            for name, (call, cost) in made.items():
                if name.split(",")[0] == kernel.removeprefix("wide_"):
                    add(f"{name}: {describe(config)}", call, cost(bool(config.blocks)))
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
