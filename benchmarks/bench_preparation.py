"""Preparation of a model's layers, forward and backward: the compiled core in one batch against PyTorch.

`python -m benchmarks.bench_preparation [--device cuda] [--out DIR]`; d -> 4 d, float32. In each round: plain
autograd through torch operations (what one writes first), layer by layer and, on a GPU, batched over stacked layers;
our own hand-written gradients on PyTorch's products (backend="reference"); the compiled core, layer by layer and in one
batch.
"""

from __future__ import annotations

import argparse
import sys
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

from .record import Rows
from .report import as_markdown
from .runner import interleave, launches


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


def measure(layers: int, p: float, l: int, rounds: int, device: str, d: int = 1024) -> dict[str, Any]:  # noqa: E741
    """Median milliseconds of each way and the medians, over rounds, of their ratios to the batch."""
    config = SSVDOConfig(inner_ratio=p, outer_rank=l)
    shape, plain = LayerShape.of(4 * d, d, config), replace(config, backend="reference")
    torch.manual_seed(0)

    def layer() -> tuple[Tensor, Factors]:
        """A and what is kept of it."""
        U = torch.linalg.qr(torch.randn(4 * d, d, device=device))[0].contiguous()
        S = torch.rand(d, device=device).sort(descending=True)[0] + 0.5
        V = torch.linalg.qr(torch.randn(d, d, device=device))[0].contiguous()
        return (U * S) @ V.mT, Factors(V, S, U[:, :l].contiguous(), None)

    def draw(*sizes: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(sizes, device=device)

    made = [layer() for _ in range(layers)]
    parameters = [(draw(shape.rotated, spread=1e-3), draw(shape.k, spread=1e-3), draw(shape.c, l, spread=1e-2))
                  for _ in range(layers)]  # fmt: skip
    given = [(draw(shape.width + l, shape.width), draw(4 * d, l)) for _ in range(layers)]

    def sources(config: SSVDOConfig) -> list[Source]:
        return [Source(three, f, DenseBase(tall), shape, config, "layer", None)
                for three, (tall, f) in zip(parameters, made, strict=True)]  # fmt: skip

    def loop(config: SSVDOConfig) -> None:
        prepared = [prepare_one(source) for source in sources(config)]
        for one, (d_mixer, d_columns) in zip(prepared, given, strict=True):
            adjoint([one], [d_mixer], [d_columns])

    def batch() -> None:
        prepared = [m for m in prepare(sources(config)) if m is not None]
        adjoint(prepared, [d for d, _ in given], [d for _, d in given])

    def first() -> None:
        for three, (tall, f), gradients in zip(parameters, made, given, strict=True):
            autograd(three, tall, f, shape, config, gradients)

    def stacked() -> None:
        rotation, scale, outer = (torch.stack(ts) for ts in zip(*parameters, strict=True))
        d_mixer, d_columns = (torch.stack(ts) for ts in zip(*given, strict=True))
        autograd((rotation, scale, outer), talls, frozen, shape, config, (d_mixer, d_columns))

    ways: dict[str, Callable[[], None]] = {"torch, autograd": first}
    if device == "cuda":  # what is frozen stacked beforehand, at no cost
        talls = torch.stack([tall for tall, _ in made])
        frozen = Factors.of({n: torch.stack([f.tensors()[n] for _, f in made]) for n in made[0][1].tensors()})
        ways["torch, autograd, batched"] = stacked
    ways |= {"torch, hand-written": lambda: loop(plain), "compiled, layer by layer": lambda: loop(config),
             "compiled, one batch": batch}  # fmt: skip
    found = interleave(ways, rounds, "compiled, one batch", torch.device(device))
    return {"layers": layers, "d": d, "p": p, "l": l, "ms": {n: t.median_ms for n, t in found.items()},
            "ratio_to_batch": {n: t.ratio for n, t in found.items()},
            "host_ms": {n: t.host_ms for n, t in found.items()}, "queued": {n: t.queued for n, t in found.items()},
            "launches": {n: launches(way) for n, way in ways.items()} if device == "cuda" else {}}  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [f"{results['device']}, {results['threads']} threads, float32, torch {results['torch']}, commit "
             f"{results['commit']}, {results['date']}. Forward + backward; a star: the GPU waited for the host."]
    header = ["layers", "d", "p", "l", "way", "ms", "ratio to one batch", "host, ms", "launches"]
    rows = []
    for r in results["rows"]:
        for way, ms in r["ms"].items():
            host = r["host_ms"][way]
            rows.append([*(str(r[n]) for n in ("layers", "d", "p", "l")), way,
                         f"{ms:.2f}{'*' if r['queued'][way] is False else ''}", f"{r['ratio_to_batch'][way]:.2f}",
                         "-" if host is None else f"{host:.2f}", str(r["launches"].get(way, "-"))])  # fmt: skip
    return "\n".join([*lines, "", *as_markdown(header, rows)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="one case of so many, p = 0.25")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no NVIDIA GPU")
    l = options.rank  # noqa: E741
    cases = [(24, p, l) for p in (0.25, 0.5)]
    if options.layers:
        cases = [(options.layers, 0.25, l)]
    elif options.device == "cuda":
        cases += [(24, p, l) for p in (0.125, 1.0)] + [(24, 0.25, n) for n in (32, 128, 256)]
        cases += [(12, 0.25, l), (48, 0.25, l)]
    keys = {f"{layers} layers, p={p}, l={rank}": (layers, p, rank) for layers, p, rank in cases}
    rows = Rows(options.out, options.device, "preparation", d=options.d)
    missing = rows.fill(keys, lambda key: measure(*keys[key], options.rounds, options.device, options.d),
                        options.minutes)  # fmt: skip
    return rows.finish(markdown, missing)


if __name__ == "__main__":
    sys.exit(main())
