"""Preparation of a model's layers, forward and backward: the compiled core in one batch against PyTorch.

`python -m benchmarks.bench_preparation [--device cuda] [--out DIR]`; 1024 -> 4096, float32. In each round: plain
autograd through torch operations (what one writes first), layer by layer and, on a GPU, batched over stacked layers;
our own hand-written gradients on PyTorch's products (backend="reference"); the compiled core, layer by layer and in one
batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.factorize import Factors
from ssvdo_kernels.ops.batch import prepare_batch
from ssvdo_kernels.ops.engines import adjoint
from ssvdo_kernels.ops.preparation import Gradients, Prepared

from .record import facts, stem
from .runner import launches


def autograd(
    parameters: Gradients, f: Factors, shape: LayerShape, config: SSVDOConfig, d: tuple[Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    """The parameters' gradients: M and F by the equations of docs/method.md (cayley, rotation), then autograd.

    One layer's tensors, or those of several stacked.
    """
    rotation, scale, outer = (p.detach().requires_grad_() for p in parameters)
    k, l, S = shape.k, shape.l, f.singular_values  # noqa: E741
    i, j = torch.triu_indices(k, k, 1, device=rotation.device)
    upper = rotation.new_zeros(*rotation.shape[:-1], k, k)
    upper[..., i, j] = rotation
    K, eye, one = upper - upper.mT, torch.eye(k).to(rotation), torch.eye(l).to(rotation)
    B = (S[..., :k] + scale)[..., None] * torch.linalg.solve_ex(eye + K, eye - K)[0]
    mixer = torch.cat([B / S[..., :k, None] - eye, B[..., :l, :]], -2)
    L = outer * shape.outer_scale(config)
    R = torch.linalg.cholesky_ex(L.mT @ L + config.tau * one)[0]
    Q = torch.linalg.solve_triangular(R, L.mT, upper=False).mT
    X = torch.linalg.solve_triangular(R, one.expand_as(R), upper=False).mT
    Y, lifted = f.reflector, nn.functional.pad(Q, (0, 0, shape.large - shape.c, 0))
    columns = lifted - Y @ (Y[..., shape.large - shape.c :, :].mT @ Q) + f.outer_basis @ (config.tau**0.5 * X - one)
    torch.autograd.backward([mixer, columns], list(d))
    return rotation.grad, scale.grad, outer.grad


def measure(layers: int, p: float, l: int, rounds: int, device: str) -> dict[str, Any]:  # noqa: E741
    """Median milliseconds of each way and the medians, over rounds, of their ratios to the batch."""
    config = SSVDOConfig(inner_ratio=p, outer_rank=l)
    shape, plain = LayerShape.of(4096, 1024, config), replace(config, backend="reference")
    torch.manual_seed(0)

    def factors() -> Factors:
        U = torch.linalg.qr(torch.randn(4096, 1024, device=device))[0].contiguous()
        S = torch.rand(shape.width, device=device).sort(descending=True)[0] + 0.5
        V = torch.randn(1024, shape.width, device=device) / 32
        return Factors(V, S, U[:, :l].contiguous(), U, U[:, :0].contiguous())

    def draw(*sizes: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(sizes, device=device)

    all_factors = [factors() for _ in range(layers)]
    parameters = [(draw(shape.k * (shape.k - 1) // 2, spread=1e-3), draw(shape.k, spread=1e-3),
                   draw(shape.c, l, spread=1e-2)) for _ in range(layers)]
    given = [(draw(shape.width + l, shape.width), draw(4096, l)) for _ in range(layers)]

    def loop(config: SSVDOConfig) -> None:
        made = [Prepared(q, f, shape, config) for q, f in zip(parameters, all_factors, strict=True)]
        for one, d in zip(made, given, strict=True):
            one.backward(*d)

    def batch() -> None:
        made = [m for m in prepare_batch(parameters, all_factors, [""] * layers, shape, config) if m is not None]
        adjoint(made, [d for d, _ in given], [d for _, d in given])

    def first() -> None:
        for q, f, d in zip(parameters, all_factors, given, strict=True):
            autograd(q, f, shape, config, d)

    def stacked() -> None:
        many = [torch.stack(ts) for ts in zip(*parameters, strict=True)]
        d = [torch.stack(ts) for ts in zip(*given, strict=True)]
        autograd((many[0], many[1], many[2]), frozen, shape, config, (d[0], d[1]))

    ways: dict[str, Callable[[], None]] = {"torch, autograd": first}
    if device == "cuda":  # the frozen factors stacked beforehand, at no cost
        names = ("inner_basis", "singular_values", "outer_basis", "reflector", "null_basis")
        frozen = Factors(*(torch.stack([getattr(f, name) for f in all_factors]) for name in names))
        ways["torch, autograd, batched"] = stacked
    ways |= {"torch, hand-written": lambda: loop(plain), "compiled, layer by layer": lambda: loop(config),
             "compiled, one batch": batch}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, way in ways.items():
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    base = seconds["compiled, one batch"]
    ratios = {n: statistics.median(a / b for a, b in zip(s, base, strict=True)) for n, s in seconds.items()}
    return {"layers": layers, "p": p, "l": l, "ms": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
            "ratio_to_batch": ratios,
            "launches": {n: launches(way) for n, way in ways.items()} if device == "cuda" else {}}  # fmt: skip


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    cases = [(24, p, 64) for p in (0.25, 0.5)]
    if options.device == "cuda":
        cases = [(24, p, 64) for p in (0.125, 0.25, 0.5, 1.0)] + [(24, 0.25, n) for n in (32, 128, 256)]
        cases += [(12, 0.25, 64), (48, 0.25, 64)]
    rows = [measure(*case, options.rounds, options.device) for case in cases]
    results = {**facts(options.device), "rows": rows}
    path = stem(options.out, results, "preparation").with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    for row in rows:
        ratio = row["ratio_to_batch"]
        print(f"{row['layers']} layers, p = {row['p']}, l = {row['l']}:",
              *(f"{n} {ms:.2f} ms ({ratio[n]:.2f})" for n, ms in row["ms"].items()), row["launches"], sep="  ")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
