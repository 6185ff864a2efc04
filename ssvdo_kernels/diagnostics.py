"""What training has done to the adapted layers, in numbers: orthonormality, angles, drift; and what is trained."""

from __future__ import annotations

import csv
import io
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .linear import SSVDOLinear
from .model import require_adapted
from .ops import own_dtypes
from .ops.rotation import rotation_forward


@dataclass(frozen=True)
class LayerReport:
    """One layer's state.

    name; orthonormality: max |C^T C + Q^T Q - I| (rounding for outer="rotation"; |Q^T Q| for "additive", whose basis
    I + Q^T Q departs by that much); inner_orthonormality: max |G^T G - I|; inner_angle, outer_angle: the largest
    rotation angles of G and of the outer basis (radians); drift: |W' - W0|_F / |W0|_F; scale_change: max |dS_i| / S_i;
    cholesky_condition: of L^T L + tau I.
    """

    name: str
    orthonormality: float
    inner_orthonormality: float
    inner_angle: float
    outer_angle: float
    drift: float
    scale_change: float
    cholesky_condition: float


HEADINGS = ("[C;Q] ortho", "G ortho", "inner angle", "outer angle", "drift", "scale change", "chol. cond.")


def _eye(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _inner(layer: SSVDOLinear) -> tuple[Tensor, float, float]:
    """G, max |G^T G - I| and the largest angle: the argument of G's eigenvalues on the unit circle.

    For the Cayley form the angle is 2 atan |K|_2; the series agree with it to their own order.
    """
    packed = layer.inner_rotation.detach()
    G, _ = rotation_forward(packed, layer.shape.k, layer.config.rotation, layer.config.neumann_terms)
    departure = float((G.mT @ G - _eye(G)).abs().max())
    skew, _ = rotation_forward(packed, layer.shape.k, "first_order", 1)
    norm = float(_largest_singular_value((skew - _eye(skew)) / -2))
    return G, departure, float(2 * torch.atan(torch.tensor(norm)))


def _largest_singular_value(matrix: Tensor, steps: int = 24) -> Tensor:
    # A few block power steps: 24 products with 8 columns instead of a full decomposition, cheap at every 100 steps.
    columns = min(8, matrix.shape[0])
    probe = torch.cos(torch.arange(matrix.shape[0] * columns, dtype=matrix.dtype, device=matrix.device))
    probe = torch.linalg.qr(probe.view(-1, columns)).Q
    for _ in range(steps):
        probe = torch.linalg.qr(matrix.mT @ (matrix @ probe)).Q
    norm: Tensor = torch.linalg.matrix_norm(matrix @ probe, 2)
    return norm


@torch.no_grad()
@own_dtypes()
def layer_report(layer: SSVDOLinear, name: str = "") -> LayerReport:
    """The numbers of one layer; costs about one preparation."""
    prepared = layer.prepared()
    shape, config = layer.shape, layer.config
    G, inner_departure, inner_angle = _inner(layer)
    outer_departure = outer_angle = 0.0
    condition = 1.0
    if shape.l:
        L = layer.outer.detach() * shape.outer_scale(config)
        gram = L.mT @ L + config.tau * _eye(L[:1])
        R = torch.linalg.cholesky(gram)
        X = torch.linalg.solve_triangular(R, _eye(R), upper=False).mT
        Q, C = L @ X, X * config.tau**0.5
        small = Q.mT @ Q
        departure = small + C.mT @ C - _eye(small) if config.outer == "rotation" else small
        outer_departure = float(departure.abs().max())
        sine = float(torch.linalg.matrix_norm(small, 2).clamp(0, 1).sqrt())
        outer_angle = float(torch.asin(torch.tensor(sine)))
        condition = float(torch.linalg.cond(gram))
    S = prepared.factors.singular_values[: shape.k].to(prepared.dtype)
    ratio = float((layer.inner_scale.abs() / S.clamp_min(torch.finfo(S.dtype).tiny)).max())
    return LayerReport(name, outer_departure, inner_departure, inner_angle, outer_angle,
                       _drift(layer, G), ratio, condition)


def _drift(layer: SSVDOLinear, G: Tensor) -> float:
    """|W' - W0|_F / |W0|_F from small matrices: A' - A = [A V | F] M V^T, V orthonormal, A V = U S."""
    p = layer.prepared()
    weight = layer.weight.detach()
    tall = (weight.mT if layer.shape.transposed else weight).to(p.dtype)
    change = torch.cat([tall @ p.basis, p.columns], 1) @ p.mixer
    norm = torch.linalg.vector_norm(tall)
    return float(torch.linalg.vector_norm(change) / norm) if norm > 0 else 0.0


def orthogonality(model: nn.Module, *, limit: float | None = None) -> list[LayerReport]:
    """A report per adapted layer; warns where tau or a condition number makes the Cholesky factor unsafe.

    Args:
        limit: condition number of L^T L + tau I above which to warn; None takes 0.01 / eps of the parameters' dtype.
    """
    reports = []
    for name, layer in require_adapted(model).items():
        report = layer_report(layer, name)
        bound = 0.01 / torch.finfo(layer.prepared().dtype).eps if limit is None else limit
        if report.cholesky_condition > bound:
            warnings.warn(
                f"{name}: the condition number {report.cholesky_condition:.1e} of L^T L + tau I "
                f"(tau={layer.config.tau}) exceeds {bound:.1e}; Cholesky may fail: use a larger tau or a smaller "
                "learning rate", stacklevel=2)
        reports.append(report)
    return reports


def diagnose(
    model: nn.Module, *, csv_path: str | os.PathLike[str] | None = None, console: Console | None = None
) -> list[LayerReport]:
    """Prints a table of `orthogonality(model)` and, with csv_path, writes it as CSV. Returns the reports."""
    reports = orthogonality(model)
    table = Table(title="SSVD-O layers", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for report in reports:
        numbers = list(asdict(report).values())[1:]
        table.add_row(report.name, *(f"{v:.2g}" if v == 0 or 1e-3 <= v < 1e4 else f"{v:.0e}" for v in numbers))
    (console or Console()).print(table)
    if csv_path is not None:
        Path(csv_path).write_text(to_csv(reports))
    return reports


def to_csv(reports: list[LayerReport]) -> str:
    """The reports as CSV text with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(LayerReport)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(report) for report in reports)
    return text.getvalue()


@dataclass(frozen=True)
class TrainableSummary:
    """Counts of numbers, not bytes: of the adapters, all trained ones, and the model's parameters without adapters."""

    inner: int
    outer: int
    trainable: int
    base: int
    layers: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.base if self.base else 0.0
        return (f"{self.trainable:,} trainable of {self.base:,} parameters ({share:.2f}%): {self.layers} layers, "
                f"inner {self.inner:,}, outer {self.outer:,}")


def trainable_summary(model: nn.Module, *, console: Console | None = None, quiet: bool = False) -> TrainableSummary:
    """Prints the budget (unless quiet) and returns it. Shared parameters count once."""
    layers = require_adapted(model).values()
    inner = sum(x.inner_rotation.numel() + x.inner_scale.numel() for x in layers)
    outer = sum(x.outer.numel() for x in layers)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    factors = {id(t): t.numel() for layer in layers for t in layer.factors().tensors().values()}
    base = sum(p.numel() for p in model.parameters() if id(p) not in factors) - inner - outer
    summary = TrainableSummary(inner, outer, trainable, base, len(layers))
    if not quiet:
        (console or Console()).print(str(summary), highlight=False)
    return summary
