"""Preparation of several layers of one shape together: two calls of the compiled core, one autograd node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from ..factorize import Factors
from . import host, own_dtypes
from .preparation import Gradients, Prepared


def prepare_batch(
    parameters: Sequence[Gradients], factors: Sequence[Factors], shape: LayerShape, config: SSVDOConfig
) -> list[Prepared | None]:
    """Several layers of one shape, dtype and null space in two calls of the compiled core; None: bad pivot."""
    made = [Prepared.__new__(Prepared) for _ in parameters]
    for one, p, f in zip(made, parameters, factors, strict=True):
        one._read(p, f, shape, config)
    fit = [one for one in made if host.invertible(one._rotation)]
    many = host.inner_forward([p._rotation for p in fit], [p._scale for p in fit], [p._singular for p in fit],
                              made[0].null, shape, config) if fit else []  # fmt: skip
    inner = dict(zip(map(id, fit), many, strict=True))
    columns, info = [p._new_columns() for p in made], [0] * len(made)
    X = [p._outer.new_zeros(0, 0) for p in made]
    if shape.l:
        Y, U = zip(*(p._outer_factors() for p in made), strict=True)
        X, info = host.outer_forward([p._outer for p in made], Y, U, columns, shape, config)
    for i, one in enumerate(made):
        one._finish(inner[id(one)] if id(one) in inner else one._inner_forward(), (X[i], columns[i]))
    return [None if bad else one for one, bad in zip(made, info, strict=True)]


def backward_batch(
    prepared: Sequence[Prepared], d_mixer: Sequence[Tensor], d_columns: Sequence[Tensor]
) -> list[Gradients]:
    """`Prepared.backward` of several layers of one `prepare_batch`."""
    one = prepared[0]
    shape, config, dtype = one.shape, one.config, one.dtype
    mixers, columns = ([d.to(dtype).contiguous() for d in ds] for ds in (d_mixer, d_columns))
    inner = host.inner_backward(
        [p._rotation for p in prepared], [p._scale for p in prepared], [p._singular for p in prepared],
        [p.state.G.contiguous() for p in prepared], [p.state.saved.contiguous() for p in prepared], mixers, one.null,
        shape, config)  # fmt: skip
    if not shape.l:
        return [(*pair, p._outer_backward(d)) for pair, p, d in zip(inner, prepared, columns, strict=True)]
    Y, U = zip(*(p._outer_factors() for p in prepared), strict=True)
    outer = host.outer_backward(
        [p._outer for p in prepared], Y, U, [p.state.X.contiguous() for p in prepared], columns, shape, config)
    return [(*pair, d) for pair, d in zip(inner, outer, strict=True)]


def _mixer(prepared: Prepared) -> Tensor:
    return prepared.mixer


def _columns(prepared: Prepared) -> Tensor:
    return prepared.columns


class AttachMany(torch.autograd.Function):
    """(mixer, columns) of every layer of a batch, as differentiable functions of all their parameters.

    One backward for all: it runs when the last consumer has delivered. A layer that nothing used gets no gradient.
    """

    @staticmethod
    def forward(ctx, prepared: Sequence[Prepared], *parameters: Tensor):  # type: ignore[no-untyped-def]
        ctx.prepared, ctx.dtypes = prepared, [p.dtype for p in parameters]
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for p in prepared for t in (p.mixer, p.columns))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @own_dtypes()
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        used = [i for i in range(len(ctx.prepared)) if any(d is not None for d in gradients[2 * i : 2 * i + 2])]
        prepared = [ctx.prepared[i] for i in used]
        d_mixer, d_columns = (
            [torch.zeros_like(like(p)) if gradients[2 * i + part] is None else gradients[2 * i + part]
             for i, p in zip(used, prepared, strict=True)]
            for part, like in enumerate((_mixer, _columns)))
        result: list[Tensor | None] = [None] * (3 * len(ctx.prepared))
        for i, found in zip(used, backward_batch(prepared, d_mixer, d_columns) if used else [], strict=True):
            for j, gradient in enumerate(found, 3 * i):
                if ctx.needs_input_grad[1 + j]:
                    result[j] = gradient.to(ctx.dtypes[j])
        return None, *result


def attach_many(prepared: Sequence[Prepared], parameters: Sequence[Gradients]) -> list[tuple[Tensor, Tensor]]:
    """(mixer, columns) of each layer of one `prepare_batch`, with gradients to all parameters."""
    flat = [p for three in parameters for p in three]
    found: tuple[Tensor, ...] = AttachMany.apply(prepared, *flat)  # type: ignore[no-untyped-call]
    return list(zip(found[::2], found[1::2], strict=True))
