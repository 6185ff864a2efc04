"""Preparation of several layers of one shape together: one batch of work, one autograd node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from ..factorize import Factors
from . import own_dtypes
from .engines import adjoint, prepare
from .preparation import Gradients, Prepared


def prepare_batch(
    parameters: Sequence[Gradients],
    factors: Sequence[Factors],
    names: Sequence[str],
    shape: LayerShape,
    config: SSVDOConfig,
) -> list[Prepared | None]:
    """Several layers of one shape, dtype and null space together; None: bad pivot."""
    made = [Prepared.__new__(Prepared) for _ in parameters]
    for one, p, f, name in zip(made, parameters, factors, names, strict=True):
        one.read(p, f, shape, config, name)
    return [None if bad else one for one, bad in zip(made, prepare(made), strict=True)]


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
        for i, found in zip(used, adjoint(prepared, d_mixer, d_columns) if used else [], strict=True):
            for j, gradient in enumerate(found, 3 * i):
                if ctx.needs_input_grad[1 + j]:
                    result[j] = gradient.to(ctx.dtypes[j])
        return None, *result


def attach_many(prepared: Sequence[Prepared], parameters: Sequence[Gradients]) -> list[tuple[Tensor, Tensor]]:
    """(mixer, columns) of each layer of one `prepare_batch`, with gradients to all parameters."""
    flat = [p for three in parameters for p in three]
    found: tuple[Tensor, ...] = AttachMany.apply(prepared, *flat)  # type: ignore[no-untyped-call]
    return list(zip(found[::2], found[1::2], strict=True))
