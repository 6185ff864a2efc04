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
from ssvdo_kernels.ops.base import DenseBase
from ssvdo_kernels.ops.engines import adjoint, prepare, prepare_one
from ssvdo_kernels.ops.preparation import Source

from .record import facts, stem
from .runner import launches


def autograd(
    parameters: tuple[Tensor, Tensor, Tensor],
    tall: Tensor,
    f: Factors,
    shape: LayerShape,
    config: SSVDOConfig,
    d: tuple[Tensor, Tensor],
) -> tuple[Tensor | None, ...]:
    """The parameters' gradients: M and F by the equations of docs/method.md (cayley, rotation), then autograd.

    One layer's tensors, or those of several stacked. tall: A; all of S must have an inverse.
    """
    rotation, scale, outer = (p.detach().requires_grad_() for p in parameters)
    k, l, S, V = shape.k, shape.l, f.singular_values, f.basis  # noqa: E741
    assert f.outer_basis is not None
    i, j = torch.triu_indices(k, k, 1, device=rotation.device)
    upper = rotation.new_zeros(*rotation.shape[:-1], k, k)
    upper[..., i, j] = rotation
    K, eye, one = upper - upper.mT, torch.eye(k).to(rotation), torch.eye(l).to(rotation)
    B = (S[..., :k] + scale)[..., None] * torch.linalg.solve_ex(eye + K, eye - K)[0]
    mixer = torch.cat([B / S[..., :k, None] - eye, B[..., :l, :]], -2)
    L = outer * shape.outer_scale(config)
    inner = V.mT @ (tall[..., shape.large - shape.c :, :].mT @ L)
    Z = nn.functional.pad(L, (0, 0, shape.large - shape.c, 0)) - tall @ (V @ (inner / S[..., None] ** 2))
    R = torch.linalg.cholesky_ex(Z.mT @ Z + config.tau * one)[0]
    X = torch.linalg.solve_triangular(R, one.expand_as(R), upper=False).mT
    columns = Z @ X + f.outer_basis @ (config.tau**0.5 * X - one)
    torch.autograd.backward([mixer, columns], list(d))
    return rotation.grad, scale.grad, outer.grad


def measure(layers: int, p: float, l: int, rounds: int, device: str) -> dict[str, Any]:  # noqa: E741
    """Median milliseconds of each way and the medians, over rounds, of their ratios to the batch."""
    config = SSVDOConfig(inner_ratio=p, outer_rank=l)
    shape, plain = LayerShape.of(4096, 1024, config), replace(config, backend="reference")
    torch.manual_seed(0)

    def layer() -> tuple[Tensor, Factors]:
        """A and what is kept of it."""
        U = torch.linalg.qr(torch.randn(4096, 1024, device=device))[0].contiguous()
        S = torch.rand(1024, device=device).sort(descending=True)[0] + 0.5
        V = torch.linalg.qr(torch.randn(1024, 1024, device=device))[0].contiguous()
        return (U * S) @ V.mT, Factors(V, S, U[:, :l].contiguous(), None)

    def draw(*sizes: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(sizes, device=device)

    made = [layer() for _ in range(layers)]
    parameters = [(draw(shape.rotated, spread=1e-3), draw(shape.k, spread=1e-3), draw(shape.c, l, spread=1e-2))
                  for _ in range(layers)]  # fmt: skip
    given = [(draw(shape.width + l, shape.width), draw(4096, l)) for _ in range(layers)]

    def sources(config: SSVDOConfig) -> list[Source]:
        return [Source(three, f, DenseBase(tall), shape, config, "layer", None)
                for three, (tall, f) in zip(parameters, made, strict=True)]  # fmt: skip

    def loop(config: SSVDOConfig) -> None:
        prepared = [prepare_one(source) for source in sources(config)]
        for one, d in zip(prepared, given, strict=True):
            adjoint([one], [d[0]], [d[1]])

    def batch() -> None:
        prepared = [m for m in prepare(sources(config)) if m is not None]
        adjoint(prepared, [d for d, _ in given], [d for _, d in given])

    def first() -> None:
        for three, (tall, f), d in zip(parameters, made, given, strict=True):
            autograd(three, tall, f, shape, config, d)

    def stacked() -> None:
        rotation, scale, outer = (torch.stack(ts) for ts in zip(*parameters, strict=True))
        d = [torch.stack(ts) for ts in zip(*given, strict=True)]
        autograd((rotation, scale, outer), talls, frozen, shape, config, (d[0], d[1]))

    ways: dict[str, Callable[[], None]] = {"torch, autograd": first}
    if device == "cuda":  # what is frozen stacked beforehand, at no cost
        talls = torch.stack([tall for tall, _ in made])
        frozen = Factors.of({n: torch.stack([f.tensors()[n] for _, f in made]) for n in made[0][1].tensors()})
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
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        ratio = row["ratio_to_batch"]
        print(f"{row['layers']} layers, p = {row['p']}, l = {row['l']}:",
              *(f"{n} {ms:.2f} ms ({ratio[n]:.2f})" for n, ms in row["ms"].items()), row["launches"], sep="  ")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
