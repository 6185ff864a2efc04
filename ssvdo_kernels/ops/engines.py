"""Preparation of layers of one shape by the engine that serves them: PyTorch (reference), the compiled core (host) or
the CUDA kernels (cuda). One layer is a list of one.

The outer part is products with W0 and V, which PyTorch's library serves on a CPU; the compiled core does the inner part
there, the CUDA kernels do both on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import device, host, outer
from .complement import Product, one_by_one
from .preparation import Gradients, Prepared, Rows, Source, check_pivot
from .products import cast, exact
from .streams import Queued

Inner = tuple[Tensor | None, Tensor, Tensor]  # G where it is a series, saved, mixer


def prepare(sources: Sequence[Source]) -> list[Prepared | None]:
    """Prepares layers of one shape, configuration, dtype and null space together; None: bad pivot."""
    many = [Prepared(source) for source in sources]
    return [None if bad else one for one, bad in zip(many, _prepare(many), strict=True)]


def prepare_one(source: Source) -> Prepared:
    """Prepares one layer; ArithmeticError where a pivot is bad."""
    made = Prepared(source)
    check_pivot(_prepare([made])[0], source.name, source.config)
    return made


def _product(engine: str) -> Product:
    return host.product if engine == "host" else one_by_one


def _prepare(many: Sequence[Prepared]) -> list[int]:
    """Fills in all. Returns each layer's bad pivot from 1, or 0; on a GPU 0, see `Verdict`."""
    one, info = many[0], [0] * len(many)
    for p, own in zip(many, torch.stack([p.shift for p in many]), strict=True):
        p.shift = own
    F: Sequence[Tensor]
    X: Sequence[Tensor] | Tensor
    late = one.shift.is_cuda or one.engine == "cuda"  # waiting for a GPU's news would stall its stream
    counts = torch.zeros(5, len(many), dtype=torch.int32, device=one.shift.device) if late else None
    inner = _inner(many, counts)
    parts = [p.outer for p in many if p.outer is not None]
    if not parts:
        F, X = [p.shift.new_zeros(p.shape.large, 0) for p in many], [p.shift.new_zeros(0, 0) for p in many]
    elif one.engine == "cuda" and counts is not None:
        F, X = device.outer_forward(parts, gate=counts[3:], info=counts[2])
    else:
        F, X, status = outer.forward(parts, _product(one.engine))
        if counts is None:
            info = status.tolist()
        else:
            counts[2] = status
    watch = counts is not None and not (counts.is_cuda and torch.cuda.is_current_stream_capturing())
    verdict = device.Verdict(counts[1:3]) if watch and counts is not None else None
    queued = Queued(one.shift)
    for i, p in enumerate(many):
        p.finish(inner[i], F[i], X[i], None if verdict is None else (verdict, i))
        p.queued = queued
    return info


def _inner(many: Sequence[Prepared], counts: Tensor | None) -> list[Inner]:
    one = many[0]
    fit: list[Prepared] = []
    if one.engine == "host":
        fit = [p for p in many if host.invertible(p.rotation)]
    elif one.engine == "cuda" and one.config.rotation != "neumann":
        fit = list(many)
    found: dict[int, Inner] = {}
    if fit:
        operands = ([p.rotation for p in fit], [p.shift for p in fit], [p.singular for p in fit], one.null, one.shape,
                    one.config)  # fmt: skip
        if one.engine == "host":
            made: Sequence[Inner] = host.inner_forward(*operands)
        else:
            assert counts is not None
            made = [(None, *two) for two in device.inner_forward(*operands, gate=counts[0], info=counts[1])]
        found = dict(zip(map(id, fit), made, strict=True))
    return [found[id(p)] if id(p) in found else p.inner_reference() for p in many]


def adjoint(
    many: Sequence[Prepared], d_mixer: Sequence[Tensor | Rows], d_columns: Sequence[Tensor]
) -> list[Gradients]:
    """(d inner_rotation, d inner_scale, d outer) of each layer, in the dtype of the work; None for what is absent.

    d_columns: dF, large x e; or [dF; A^T dF / S_0], (large + d) x e, where the tokens gave both.
    """
    one = many[0]
    for p in many:
        p.check_unedited()
        p.verify()
    parts = [p.outer for p in many if p.outer is not None]
    d_outer: Sequence[Tensor | None] = [None] * len(many)
    if parts:
        l, large = one.shape.l, one.shape.large  # noqa: E741
        dF = [cast(_corner(d, large, l), one.dtype) for d in d_columns]
        state = [p.X for p in many], [_corner(p.columns, large, l) for p in many], dF
        if one.engine == "cuda":
            d_outer = device.outer_backward(parts, *state)
        else:
            known = exact(one.dtype)
            pulled = [d[large:, :l].to(one.dtype) if known and d.shape[0] > large else None for d in d_columns]
            d_outer = outer.backward(parts, *state, _product(one.engine), pulled)
    inner = _inner_gradients(many, d_mixer)
    return [(_through(p, pair[0]) if p.rotation.numel() else None, _through(p, pair[1]), outer)
            for p, pair, outer in zip(many, inner, d_outer, strict=True)]  # fmt: skip


def _corner(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows and columns; the matrix itself where there are no more, as a view takes time."""
    return matrix if matrix.shape == (rows, columns) else matrix[:rows, :columns]


def _through(prepared: Prepared, gradient: Tensor) -> Tensor:
    """The gradient of a parameter from that of its multiple; `Outer` has the scale among its own."""
    scale = prepared.source.scale
    return gradient if scale == 1 else gradient * scale


def _inner_gradients(many: Sequence[Prepared], d_mixer: Sequence[Tensor | Rows]) -> list[tuple[Tensor, Tensor]]:
    one = many[0]
    rows = [d for d in d_mixer if not isinstance(d, Tensor)]
    if one.engine == "reference" or (one.engine == "cuda" and (rows or one.config.rotation == "neumann")):
        return [p.inner_reference_backward(d) for p, d in zip(many, d_mixer, strict=True)]
    state = [p.rotation for p in many], [p.shift for p in many], [p.singular for p in many]
    saved, rest = [p.saved.contiguous() for p in many], (one.null, one.shape, one.config)
    dense = [cast(d, one.dtype).contiguous() for d in d_mixer if isinstance(d, Tensor)]
    if one.engine == "cuda":
        return device.inner_backward(*state, saved, dense, *rest)
    if not rows:
        return host.inner_backward(*state, [p.G.contiguous() for p in many], saved, dense, *rest)
    pairs = [(d.left.to(one.dtype).contiguous(), d.right.to(one.dtype).contiguous()) for d in rows]
    left, right = ([pair[i] for pair in pairs] for i in range(2))
    return host.inner_backward(*state, saved, saved, left, *rest, rows=(left, right))  # rows do without G
