"""Preparation of layers of one shape by the engine that serves them: PyTorch (reference), the compiled core (host) or
the CUDA kernels (cuda). One layer is a list of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import device, host

if TYPE_CHECKING:
    from .preparation import Gradients, Prepared, Rows

Inner = tuple[Tensor, Tensor, Tensor]  # G, saved, mixer


def prepare(many: Sequence[Prepared]) -> list[int]:
    """Fills in state, mixer and columns. Returns each layer's bad pivot from 1, or 0; on a GPU 0, see `Verdict`."""
    one, columns = many[0], [p.new_columns() for p in many]
    info = [0] * len(many)
    lefts: Sequence[Tensor | None] = [None] * len(many)
    X: Sequence[Tensor] = [p.outer.new_zeros(0, 0) for p in many]
    counts = one.outer.new_zeros(3, len(many), dtype=torch.int32) if one.outer.is_cuda or one.engine == "cuda" else None
    inner = _inner(many, counts)
    if one.shape.l:
        Y, U = zip(*(p.outer_factors() for p in many), strict=True)
        operands = [p.outer for p in many], Y, U, columns, one.shape, one.config
        if one.engine == "host":
            X, info = host.outer_forward(*operands)
        elif one.engine == "cuda":
            assert counts is not None
            inverse, left = device.outer_forward(*operands, info=counts[2])
            X, lefts = inverse.mT.unbind(), left.unbind()
        else:
            found = [p.outer_reference(c) for p, c in zip(many, columns, strict=True)]
            X = [x for x, _ in found]
            if counts is None:
                info = [int(status) for _, status in found]
            else:
                torch.stack([status for _, status in found], out=counts[2])
    watch = counts is not None and not (counts.is_cuda and torch.cuda.is_current_stream_capturing())
    verdict = device.Verdict(counts[1:]) if watch and counts is not None else None
    for i, p in enumerate(many):
        p.finish(inner[i], X[i], columns[i], lefts[i], None if verdict is None else (verdict, i))
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
            made = host.inner_forward(*operands)
        else:
            assert counts is not None
            made = device.inner_forward(*operands, gate=counts[0], info=counts[1])
        found = dict(zip(map(id, fit), made, strict=True))
    return [found[id(p)] if id(p) in found else p.inner_reference() for p in many]


def adjoint(
    many: Sequence[Prepared], d_mixer: Sequence[Tensor | Rows], d_columns: Sequence[Tensor]
) -> list[Gradients]:
    """(d inner_rotation, d inner_scale, d outer) of each layer, in the dtype of the work."""
    for p in many:
        p.verify()
    inner = _inner_gradients(many, d_mixer)
    return [(*pair, outer) for pair, outer in zip(inner, _outer_gradients(many, d_columns), strict=True)]


def _inner_gradients(many: Sequence[Prepared], d_mixer: Sequence[Tensor | Rows]) -> list[tuple[Tensor, Tensor]]:
    one = many[0]
    rows = [d for d in d_mixer if not isinstance(d, Tensor)]
    if one.engine == "reference" or (one.engine == "cuda" and (rows or one.config.rotation == "neumann")):
        return [p.inner_reference_backward(d) for p, d in zip(many, d_mixer, strict=True)]
    state = ([p.rotation for p in many], [p.shift for p in many], [p.singular for p in many],
             [p.state.G.contiguous() for p in many], [p.state.saved.contiguous() for p in many])  # fmt: skip
    rest = one.null, one.shape, one.config
    if not rows:
        dense = [d.to(one.dtype).contiguous() for d in d_mixer if isinstance(d, Tensor)]
        if one.engine == "cuda":
            return device.inner_backward(*state, dense, *rest)
        return host.inner_backward(*state, dense, *rest)
    pairs = [(d.left.to(one.dtype).contiguous(), d.right.to(one.dtype).contiguous()) for d in rows]
    left, right = ([pair[i] for pair in pairs] for i in range(2))
    return host.inner_backward(*state, left, *rest, rows=(left, right))


def _outer_gradients(many: Sequence[Prepared], d_columns: Sequence[Tensor]) -> list[Tensor]:
    one, dense = many[0], [d.to(many[0].dtype).contiguous() for d in d_columns]
    if not one.shape.l:
        return [d.new_zeros(one.shape.c, 0) for d in dense]
    left = [p.state.left for p in many if p.state.left is not None]
    if one.engine == "reference" or (one.engine == "cuda" and len(left) < len(many)):  # restored without `left`
        return [p.outer_reference_backward(d) for p, d in zip(many, dense, strict=True)]
    Y, U = zip(*(p.outer_factors() for p in many), strict=True)
    outer, rest = [p.outer for p in many], (dense, one.shape, one.config)
    if one.engine == "host":
        return host.outer_backward(outer, Y, U, [p.state.X.contiguous() for p in many], *rest)
    return device.outer_backward(outer, Y, U, [p.state.X.mT for p in many], left, *rest)
