"""The prepared matrices in the autograd graph: gradients on M and F become gradients of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import by_hand, straight
from .engines import adjoint
from .preparation import Parameters, Prepared, Rows

Arrived = Callable[[Any, Sequence[Tensor | None]], bool]
"""(node, gradients of its stand-ins) -> whether they are taken, so that the parameters get none now."""


class StandIns(NamedTuple):
    """Tensors that hold one number, which nobody reads: they carry gradients, the values are the preparation's.

    mixer, columns: of the shapes of M and F; pulled: of [F; A^T F], for tokens that have A^T dF beside dF
    (`Prepared.lends`); product: of C = [A V | F] M, large x width, where tokens that go through W' are to sum its
    gradient. A consumer gives gradients to the first and one of the next two, or to the last.
    """

    mixer: Tensor
    columns: Tensor
    pulled: Tensor | None
    product: Tensor | None

    @property
    def dense(self) -> tuple[Tensor | None, Tensor]:
        """Those that W' is a function of: M's and F's, or None and C's."""
        return (self.mixer, self.columns) if self.product is None else (None, self.product)


NO_SUMS = (None,) * len(StandIns._fields)
"""In place of sums of the stand-ins' gradients, in their order."""


def stand_ins(prepared: Sequence[Prepared], sums: bool = False) -> list[StandIns]:
    """Those of layers of one shape, layer by layer; sums: with C's."""
    one, n, made = prepared[0], len(prepared), prepared[0].columns.new_empty_strided
    (large, extra), width, d = one.columns.shape, one.shape.width, one.shape.d

    def each(wanted: bool, *size: int) -> Sequence[Any]:
        return made((n, *size), (0, 0, 0)).unbind() if wanted else [None] * n

    lends = [p.lends for p in prepared]
    kinds = (each(True, width + extra, width), each(True, large, extra), each(any(lends), large + d, extra),
             each(sums, large, width))  # fmt: skip
    return [StandIns(mixer, columns, pulled if lent else None, product)
            for mixer, columns, pulled, product, lent in zip(*kinds, lends, strict=True)]


def by_layer(tensors: Sequence[Any]) -> list[StandIns]:
    """What belongs to the stand-ins of several layers, layer by layer."""
    step = len(StandIns._fields)
    return [StandIns(*tensors[i : i + step]) for i in range(0, len(tensors), step)]


class Attach(torch.autograd.Function):
    """The stand-ins of every layer of a batch, as differentiable functions of all their parameters.

    One backward for all: it runs when the last consumer has delivered. A layer that nothing used gets no gradient.
    sink: where the only consumer of a single layer may leave the mixer's gradient as `Rows`, and return none.
    arrived: who is asked at first. sums: of `stand_ins`.
    """

    @staticmethod
    def forward(ctx, prepared, sink, arrived, sums, *parameters):  # type: ignore[no-untyped-def]
        ctx.prepared, ctx.sink, ctx.arrived = prepared, sink, arrived
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        ctx.set_materialize_grads(False)
        return tuple(t for own in stand_ins(prepared, sums) for t in own)

    @staticmethod
    @by_hand
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        result: list[Tensor | None] = [None] * len(ctx.dtypes)
        if ctx.arrived is not None and ctx.arrived(ctx, gradients):
            return None, None, None, None, *result
        if ctx.sink:
            found = adjoint(ctx.prepared, [ctx.sink.pop()], [_whole(ctx.prepared[0], gradients)[1]])
            those = [0]
        else:
            each = by_layer(gradients)
            those = used(each)
            pairs = [_whole(ctx.prepared[i], each[i]) for i in those]
            prepared = [ctx.prepared[i] for i in those]
            found = adjoint(prepared, [d for d, _ in pairs], [d for _, d in pairs]) if those else []
        needed = ctx.needs_input_grad
        for i, three in zip(those, found, strict=True):
            for j, gradient in enumerate(three, 3 * i):
                if gradient is not None and needed[4 + j]:
                    result[j] = gradient if gradient.dtype == ctx.dtypes[j] else gradient.to(ctx.dtypes[j])
        return None, None, None, None, *result


_apply = straight(Attach)


def used(gradients: Sequence[StandIns]) -> list[int]:
    """Which layers of a node have any gradient on their stand-ins."""
    return [i for i, own in enumerate(gradients) if any(d is not None for d in own)]


def below(node: Any) -> list[Any]:
    """The nodes to which a node's gradients go: those of `Attach` leave them in the parameters."""
    return [found for found, _ in node.next_functions if found is not None]


def all_wanted(nodes: Sequence[Any]) -> bool:
    """Whether the backward that runs goes on to all of these nodes, to leave gradients there."""
    try:
        return all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:  # autograd.grad takes them away
        return False


def without_product(prepared: Prepared, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of one layer's stand-ins, with that of C brought to M and F."""
    d_mixer, d_columns, pulled, product = gradients
    if product is None:
        return [d_mixer, d_columns, pulled, None]
    more = prepared.of_product(product)
    summed = [m if d is None else d + m for d, m in zip((d_mixer, d_columns), more, strict=True)]
    return [*summed, pulled, None]


def _whole(prepared: Prepared, gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """(dM, dF) or (dM, [dF; A^T dF / S_0]): the latter where all of dF came with it."""
    d_mixer, d_columns, pulled, _ = without_product(prepared, gradients)
    F, width = prepared.columns, prepared.shape.width
    if d_mixer is None:
        d_mixer = F.new_zeros(()).expand(width + F.shape[1], width)
    if pulled is not None:
        return d_mixer, pulled if d_columns is None else d_columns + pulled[: F.shape[0]]
    return d_mixer, F.new_zeros(()).expand(F.shape) if d_columns is None else d_columns


def attach(
    prepared: Sequence[Prepared],
    parameters: Sequence[Parameters],
    sink: list[Rows] | None = None,
    arrived: Arrived | None = None,
    sums: bool = False,
) -> list[StandIns]:
    """The stand-ins of each layer of one preparation, with gradients to all parameters."""
    flat = [p for three in parameters for p in three]
    return by_layer(_apply(prepared, sink, arrived, sums, *flat))
