"""The worst relative error of each result, by dtype and backend, against the equations in float64.

    python -m benchmarks.accuracy [--write] [--cases 60]      # --write: the table into docs/accuracy.md

Beside each backend stands the dense form, W' built anew by the reference's equations in the same dtype: what the
rounding of the operands alone costs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():  # before the kernels are imported: then Triton interprets them, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, reference
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.ops.dispatch import without_triton

from .kernel_table import put

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULTS = ("y", "dx", "d inner_rotation", "d inner_scale", "d outer")
FORMS = {"reference": ("factored", "folded", "core", "merged"), "auto": ("factored", "folded", "core", "merged"),
         "triton": ("folded", "merged")}  # fmt: skip
SIZES = ((24, 8), (8, 24), (96, 32), (64, 256), (33, 70), (40, 40))


@dataclass(frozen=True)
class Case:
    """A layer.

    kind: "normal"; "deficient": half the rank; "repeated": singular values equal in groups; scale: of W0's entries.
    angle: |K|_2, and the size of L's natural entries up to 3; dS is at most a third of S.
    """

    m: int
    n: int
    p: float = 0.5
    l: int = 3  # noqa: E741
    kind: str = "normal"
    scale: float = 1.0
    tau: float = 1e-2
    angle: float = 0.3
    seed: int = 0

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W0 rounded to dtype; float16 holds scales near 1 alone."""
        generator, d = torch.Generator().manual_seed(self.seed), min(self.m, self.n)
        u, s, vt = torch.linalg.svd(
            torch.randn(self.m, self.n, generator=generator, dtype=torch.float64) / self.n**0.5, full_matrices=False)
        if self.kind == "deficient":
            s[(d + 1) // 2 :] = 0
        elif self.kind == "repeated":
            s = 2.0 - (torch.arange(d) // 4).double() / d
        return (u @ torch.diag(s) @ vt * (1.0 if dtype == torch.float16 else self.scale)).to(dtype)


def cases(count: int) -> Iterator[Case]:
    """A fixed random choice from the grid; every second one is small in everything that is hard."""
    draw = Random(0)
    for number in range(count):
        m, n = draw.choice(SIZES)
        made = Case(m, n, draw.choice((0.25, 1.0)), min(3, abs(m - n)), seed=number)
        if number % 2:
            made = replace(made, l=min(m, n, abs(m - n)), kind=draw.choice(("normal", "deficient", "repeated")),
                           scale=draw.choice((1e-20, 1.0, 1e20)), tau=draw.choice((1e-6, 1e-2)),
                           angle=draw.choice((1e-3, 10.0, 1e3)))  # fmt: skip
        yield made


def results(layer: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """y and the gradients (zeros where a parameter has no part in y)."""
    x = x.clone().requires_grad_()
    y = layer(x)
    owner = layer.adapter if isinstance(layer, SSVDOLinear) else layer
    parts = [getattr(owner, part) for part in PARAMETER_NAMES]
    there = [x, *(p for p in parts if p is not None)]
    grads = iter(torch.autograd.grad(y, there, cotangent, allow_unused=True, materialize_grads=True))
    found = [next(grads), *(x.new_zeros(0) if p is None else next(grads) for p in parts)]
    return dict(zip(RESULTS, [y.detach(), *found], strict=True))


class Dense(nn.Module):
    """x W'^T with W' by `reference.adapted_weight`, every number in one dtype."""

    def __init__(self, weight: Tensor, parameters: list[Tensor], config: SSVDOConfig, factors: tuple[Tensor, ...]):
        super().__init__()
        self.weight, self.config, self.factors = weight, config, factors
        for name, value in zip(PARAMETER_NAMES, parameters, strict=True):
            setattr(self, name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> Tensor:
        """... x in_features -> ... x out_features."""
        parameters = [getattr(self, part) for part in PARAMETER_NAMES]
        return x @ reference.adapted_weight(self.weight, *parameters, self.config, self.factors).mT  # type: ignore[arg-type]


def sizes(truth: nn.Module, case: Case) -> dict[str, float]:
    """|result|_F, the largest of four draws of inputs: a result of few numbers may cancel for one of them."""
    torch.manual_seed(case.seed + 1)
    inputs = [(torch.randn(20, case.n).double(), torch.randn(20, case.m).double()) for _ in range(4)]
    found = [results(truth, x, cotangent) for x, cotangent in inputs]
    return {name: max(float(one[name].norm()) for one in found) or 1.0 for name in RESULTS}


def parameters_of(case: Case, layer: SSVDOLinear, singular: Tensor) -> list[Tensor]:
    """K, dS and L of the case, in float64; the same for every dtype but for dS, which follows S."""
    torch.manual_seed(case.seed)
    shape = layer.adapter.shape
    sizes = (shape.rotated,), (shape.k,), (shape.c, shape.l)
    rotation, scale, outer = (torch.randn(size, dtype=torch.float64) for size in sizes)
    if rotation.numel():
        rotation *= case.angle / float(torch.linalg.matrix_norm(reference.skew(rotation, shape.k), 2))
    return [rotation, 0.3 * min(case.angle, 1.0) * singular * torch.tanh(scale), min(case.angle, 3.0) * outer]


def errors(case: Case, dtype: torch.dtype, backends: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """(result, "dense" or a backend) -> error; of a backend's forms the worst."""
    weight = case.weight(dtype)
    config = SSVDOConfig(inner_ratio=case.p, outer_rank=case.l, tau=case.tau)
    linear = nn.Linear(case.n, case.m, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(weight)
    first = SSVDOLinear.from_linear(linear, config)
    exact = reference.dense_factors(weight.double(), first.adapter.shape)
    drawn = parameters_of(case, first, exact[1][: first.adapter.shape.k])
    parameters = [value.to(first.adapter.inner_scale.dtype) for value in drawn]
    x, cotangent = torch.randn(20, case.n).to(dtype), torch.randn(20, case.m).to(dtype)
    truth = Dense(weight.double(), [v.double() for v in parameters], config, exact)
    want = results(truth, x.double(), cotangent.double())
    work = dtype if dtype in (torch.float64, torch.float32) else torch.float32  # torch solves in no half type
    dense = Dense(weight.to(work), [v.to(work) for v in parameters], config, tuple(f.to(dtype).to(work) for f in exact))
    rounded, size = results(dense, x.to(work), cotangent.to(work)), sizes(truth, case)

    def error(name: str, got: Tensor) -> float:
        return float((got.double() - want[name]).norm()) / max(size[name], float(want[name].norm()))

    found = {(name, "dense"): error(name, rounded[name].to(dtype)) for name in RESULTS}
    for backend in backends:
        for form in FORMS[backend]:
            layer = SSVDOLinear.from_linear(linear, replace(config, path=form, backend=backend))
            with torch.no_grad():
                for part, value in zip(layer.adapter.parts, parameters, strict=True):
                    if part is not None:
                        part.copy_(value)
            for name, got in results(layer, x, cotangent).items():
                found[name, backend] = worse(found.get((name, backend), 0.0), error(name, got))
    return found


def worse(a: float, b: float) -> float:
    """The larger; NaN, which `max` may pass over, is the worst."""
    return b if math.isnan(b) or b > a else a


def backends_for(dtype: torch.dtype) -> tuple[str, ...]:
    """Triton's interpreter has no right bfloat16 product, and torch cannot multiply float16 quickly on a CPU."""
    return ("reference", "auto") if dtype == torch.bfloat16 or without_triton() else ("reference", "auto", "triton")


def table(count: int) -> str:
    """The worst over the cases, easy and hard ones apart."""
    worst: dict[tuple[int, str, str, str], float] = defaultdict(float)
    for number, case in enumerate(cases(count)):
        for label, dtype in DTYPES.items():
            for (name, by), value in errors(case, dtype, backends_for(dtype)).items():
                key = number % 2, name, label, by
                worst[key] = worse(worst[key], value)
    columns = ("dense", "reference", "auto", "triton")
    lines = ["| cases | result | dtype | dense form | PyTorch | compiled core | Triton |", "|---" * 7 + "|"]
    for hard, name, label in ((h, r, t) for h in (0, 1) for t in DTYPES for r in RESULTS):
        cells = [f"{worst[hard, name, label, by]:.1e}" if (hard, name, label, by) in worst else "-" for by in columns]
        lines.append(f"| {('plain', 'hard')[hard]} | {name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints the table and, with --write, puts it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cases", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = table(options.cases)
    print(made)
    if options.write:
        put(made, BEGIN, END, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
