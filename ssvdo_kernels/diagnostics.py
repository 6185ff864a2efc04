"""What training has done to the adapted layers, in numbers: orthonormality, angles, drift; and what is trained."""

from __future__ import annotations

import csv
import io
import math
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from .adapter import Adapter
from .console import tabulate
from .factorize import departure
from .host import Host
from .model import require_adapted
from .ops import own_dtypes
from .ops.preparation import Prepared
from .ops.products import times
from .ops.rotation import unpack_skew


@dataclass(frozen=True)
class LayerReport:
    """One layer's state.

    name; orthonormality: max |C^T C + Q^T Q - I| (rounding for outer="rotation"; |Q^T Q| for "additive", whose basis
    I + Q^T Q departs by that much); inner_orthonormality: max |G^T G - I|; inner_angle, outer_angle: the largest
    rotation angles of G and of the outer basis (radians); drift: |W' - W0|_F / |W0|_F; scale_change: max |dS_i| / S_i;
    cholesky_condition: of Z^T Z + tau I; basis: dtype of V and, with an outer part, how often P is applied (twice where
    V is of half precision: see `complement_departure`).
    """

    name: str
    orthonormality: float
    inner_orthonormality: float
    inner_angle: float
    outer_angle: float
    drift: float
    scale_change: float
    cholesky_condition: float
    basis: str


HEADINGS = ("[C;Q] ortho", "G ortho", "inner angle", "outer angle", "drift", "scale change", "chol. cond.", "V")


def _eye(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _inner(prepared: Prepared) -> tuple[float, float]:
    """max |G^T G - I| and the largest angle: the argument of G's eigenvalues on the unit circle.

    For the Cayley form the angle is 2 atan |K|_2; the series agree with it to their own order.
    """
    G, K = prepared.G, unpack_skew(prepared.rotation, prepared.shape.k)
    departure = float((G.mT @ G - _eye(G)).abs().max())
    return departure, float(2 * torch.atan(_largest_singular_value(K)))


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
def layer_report(layer: Host, name: str = "", adapter: Adapter | None = None) -> LayerReport:
    """The numbers of one layer (of its first adapter, unless another is given); costs about one preparation."""
    adapter = layer.adapters()[0] if adapter is None else adapter
    prepared = adapter.prepared(layer.base(adapter))
    shape, config = adapter.shape, adapter.config
    inner_departure, inner_angle = _inner(prepared)
    outer_departure = outer_angle = 0.0
    condition = 1.0
    if prepared.outer is not None:
        Q, C = prepared.Q, prepared.X * config.tau**0.5
        small = Q.mT @ Q
        departure = small + C.mT @ C - _eye(small) if config.outer == "rotation" else small
        outer_departure = float(departure.abs().max())
        sine = float(torch.linalg.matrix_norm(small, 2).clamp(0, 1).sqrt())
        outer_angle = math.asin(sine)
        condition = float(torch.linalg.cond(prepared.X)) ** 2  # R R^T = Z^T Z + tau I, X = R^-T
    S = prepared.singular[: shape.k]
    ratio = float((prepared.shift.abs() / S.clamp_min(torch.finfo(S.dtype).tiny)).max())
    kept = str(prepared.basis.dtype).removeprefix("torch.")
    passes = f" x{prepared.outer.projector.passes}" if prepared.outer is not None else ""
    return LayerReport(name, outer_departure, inner_departure, inner_angle, outer_angle,
                       _drift(prepared), ratio, condition, kept + passes)


def _drift(p: Prepared) -> float:
    """|W' - W0|_F / |W0|_F from small matrices: A' - A = [A V | F] M V^T, V orthonormal."""
    tall = p.source.base.tall(p.shape.transposed)
    change = torch.cat([times(tall, p.basis.to(p.dtype)), p.columns], 1) @ p.mixer
    norm = torch.linalg.vector_norm(tall, dtype=p.dtype)
    return float(torch.linalg.vector_norm(change) / norm) if norm > 0 else 0.0


@torch.no_grad()
def complement_departure(layer: Host) -> float:
    """By how much U' departs from orthonormality because V is rounded, at an angle of 0.3 rad: `factorize.departure`.

    Factorises the weight again in float64.
    """
    adapter = layer.adapters()[0]
    return departure(layer.base(adapter).dense(), adapter.factors, adapter.shape)


def orthogonality(model: nn.Module, *, limit: float | None = None) -> list[LayerReport]:
    """A report per adapted layer; warns where tau or a condition number makes the Cholesky factor unsafe.

    Args:
        limit: condition number of Z^T Z + tau I above which to warn; None takes 0.01 / eps of the parameters' dtype.

    Examples:
        >>> [report.name for report in orthogonality(model) if report.orthonormality < 1e-5]
        ['0', '2']
    """
    reports = []
    for name, layer in require_adapted(model).items():
        report = layer_report(layer, name)
        adapter = layer.adapters()[0]
        bound = 0.01 / torch.finfo(adapter.inner_scale.dtype).eps if limit is None else limit
        if report.cholesky_condition > bound:
            warnings.warn(
                f"{name}: the condition number {report.cholesky_condition:.1e} of Z^T Z + tau I "
                f"(tau={adapter.config.tau}) exceeds {bound:.1e}; Cholesky may fail: use a larger tau or a smaller "
                "learning rate", stacklevel=2)
        reports.append(report)
    return reports


def diagnose(
    model: nn.Module, *, csv_path: str | os.PathLike[str] | None = None, console: Console | None = None
) -> list[LayerReport]:
    """Prints a table of `orthogonality(model)` and, with csv_path, writes it as CSV. Returns the reports.

    Examples:
        >>> reports = diagnose(model, csv_path="layers.csv")  # prints the table
        <BLANKLINE>
        ...
        >>> reports[0].inner_angle
        0.0
    """
    reports = orthogonality(model)
    rows = []
    for report in reports:
        numbers = list(asdict(report).values())[1:-1]
        shown = (f"{v:.2g}" if v == 0 or 1e-3 <= v < 1e4 else f"{v:.0e}" for v in numbers)
        rows.append([report.name, *shown, report.basis])
    tabulate(console or Console(), "SSVD-O layers", ["layer", *HEADINGS], rows)
    if csv_path is not None:
        Path(csv_path).write_text(to_csv(reports), encoding="utf-8")
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
    """Prints the budget (unless quiet) and returns it. Shared parameters count once.

    Examples:
        >>> summary = trainable_summary(model)
        7,200 trainable of 33,088 parameters (21.76%): 2 layers, inner 1,056, outer 6,144
        >>> summary.outer
        6144
    """
    layers = require_adapted(model)
    adapters = [adapter for layer in layers.values() for adapter in layer.adapters()]
    inner = sum(p.numel() for a in adapters for p in (a.inner_rotation, a.inner_scale) if p is not None)
    outer = sum(a.outer.numel() for a in adapters if a.outer is not None)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    factors = {id(t) for a in adapters for t in a.factors.tensors().values()}
    base = sum(p.numel() for p in model.parameters() if id(p) not in factors) - inner - outer
    summary = TrainableSummary(inner, outer, trainable, base, len(layers))
    if not quiet:
        (console or Console()).print(str(summary), highlight=False)
    return summary
