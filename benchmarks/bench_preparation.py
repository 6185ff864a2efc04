"""Preparation of a model's layers, forward and backward: the compiled core in one batch against PyTorch's loop.

`python -m benchmarks.bench_preparation [--layers 24] [--out DIR]` on a CPU; 1024 -> 4096, l = 64, float32. Four ways in
each round: plain autograd through torch operations (what one writes first), our own hand-written gradients on PyTorch's
products (backend="reference"), and the compiled core, layer by layer and all in one batch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.factorize import Factors, apply_complement
from ssvdo_kernels.ops.batch import backward_batch, prepare_batch
from ssvdo_kernels.ops.preparation import Gradients, Prepared

from .__main__ import commit, device_name


def autograd(
    parameters: Gradients, f: Factors, shape: LayerShape, config: SSVDOConfig, d: tuple[Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    """The parameters' gradients: M and F by the equations of docs/method.md (cayley, rotation), then autograd."""
    rotation, scale, outer = (p.detach().requires_grad_() for p in parameters)
    k, l, S = shape.k, shape.l, f.singular_values  # noqa: E741
    i, j = torch.triu_indices(k, k, 1)
    upper = rotation.new_zeros(k, k).index_put((i, j), rotation)
    K, eye, one = upper - upper.mT, torch.eye(k), torch.eye(l)
    B = (S[:k] + scale)[:, None] * torch.linalg.solve(eye + K, eye - K)
    mixer = torch.cat([B / S[:k, None] - eye, B[:l]])
    L = outer * shape.outer_scale(config)
    X = torch.linalg.solve_triangular(torch.linalg.cholesky(L.mT @ L + config.tau * one), one, upper=False).mT
    columns = apply_complement(f.reflector, L @ X) + f.outer_basis @ (config.tau**0.5 * X - one)
    torch.autograd.backward([mixer, columns], list(d))
    return rotation.grad, scale.grad, outer.grad


def measure(layers: int, p: float, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each way and the medians, over rounds, of their ratios to the batch."""
    config = SSVDOConfig(inner_ratio=p, outer_rank=64)
    shape, plain = LayerShape.of(4096, 1024, config), replace(config, backend="reference")
    torch.manual_seed(0)

    def factors() -> Factors:
        U = torch.linalg.qr(torch.randn(4096, 1024))[0].contiguous()
        S = torch.rand(shape.width).sort(descending=True)[0] + 0.5
        return Factors(torch.randn(1024, shape.width) / 32, S, U[:, :64].contiguous(), U, U[:, :0].contiguous())

    all_factors = [factors() for _ in range(layers)]
    parameters = [(1e-3 * torch.randn(shape.k * (shape.k - 1) // 2), 1e-3 * torch.randn(shape.k),
                   1e-2 * torch.randn(shape.c, 64)) for _ in range(layers)]
    given = [(torch.randn(shape.width + 64, shape.width), torch.randn(4096, 64)) for _ in range(layers)]

    def loop(config: SSVDOConfig) -> None:
        made = [Prepared(q, f, shape, config) for q, f in zip(parameters, all_factors, strict=True)]
        for one, d in zip(made, given, strict=True):
            one.backward(*d)

    def batch() -> None:
        made = [m for m in prepare_batch(parameters, all_factors, shape, config) if m is not None]
        backward_batch(made, [d for d, _ in given], [d for _, d in given])

    def first() -> None:
        for q, f, d in zip(parameters, all_factors, given, strict=True):
            autograd(q, f, shape, config, d)

    ways = {"torch, autograd": first, "torch, hand-written": lambda: loop(plain),
            "compiled, layer by layer": lambda: loop(config), "compiled, one batch": batch}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if index:
                seconds[name].append(time.perf_counter() - start)
    base = seconds["compiled, one batch"]
    ratios = {n: statistics.median(a / b for a, b in zip(s, base, strict=True)) for n, s in seconds.items()}
    return {"layers": layers, "p": p, "l": 64, "ms": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
            "ratio_to_batch": ratios}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    name, date = device_name("cpu"), datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    rows = [measure(options.layers, p, options.rounds) for p in (0.25, 0.5)]
    results = {"date": date, "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
               "commit": commit(), "rows": rows}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{date}-{name.lower().replace(' ', '-')}-preparation.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    for row in rows:
        print(f"p = {row['p']}, {row['layers']} layers:", *(f"{n} {ms:.0f} ms ({row['ratio_to_batch'][n]:.2f})"
                                                            for n, ms in row["ms"].items()), sep="  ")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
