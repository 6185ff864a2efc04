"""Several changes of one weight in one forward: added, weighted, with dropout.

    y = x W0^T + b + sum_i w_i d_i(x) (W_i' - W0)^T,  d_i the dropout of adapter i, in training alone

is sum_i w_i d_i(x) W_i'^T and (x - sum_i w_i d_i(x)) W0^T + b: one product with W0 beside those of the adapters,
however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .ops import by_hand
from .ops.base import Base


class Change(NamedTuple):
    """An adapter of W0, and how often its W' - W0 is added."""

    adapter: Adapter
    weight: float = 1  # 1.0 would become a symbol in torch.compile(dynamic=True)


def _same(x: Tensor) -> Tensor:
    return x


def changed(
    x: Tensor,
    changes: Sequence[Change],
    base: Base,
    bias: Tensor | None,
    enter: Callable[[Tensor], Tensor] = _same,
) -> Tensor:
    """y as above. x: what the layer is given; enter: brings it to rows of in_features numbers, linearly."""
    undropped = enter(x) if any(not change.adapter.drops for change in changes) else x
    left, y = 1.0, None
    rest: Tensor | None = None  # what the dropped inputs leave of x, less x times `left`
    for adapter, weight in changes:
        if adapter.drops:
            given = adapter.dropped(x)
            rest = -weight * given if rest is None else torch.add(rest, given, alpha=-weight)
            given = enter(given)
        else:
            given, left = undropped, left - weight
        term: Tensor = adapter(given, base) if weight == 1 else weight * adapter(given, base)
        y = term if y is None else y + term
    assert y is not None
    if rest is not None:
        y = y + _product(enter(rest if left == 0 else torch.add(rest, x, alpha=left)), base)
    elif left:
        y = y + left * _product(undropped, base)
    return y if bias is None else y + bias.to(y.dtype)


def changed_weight(changes: Sequence[Change], base: Base, weight_of: Callable[[Adapter, Base], Tensor]) -> Tensor:
    """W0 + sum_i w_i (W_i' - W0), with W_i' from `weight_of`."""
    first, *more = changes
    W0 = base.dense()
    made = weight_of(first.adapter, base)
    if first.weight != 1:
        made = W0 + first.weight * (made - W0)
    for adapter, weight in more:
        made = made + weight * (weight_of(adapter, base) - W0)
    return made


def _product(x: Tensor, base: Base) -> Tensor:
    """x W0^T with a gradient to x. x: (..., in_features)."""
    kind = base.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    tokens = base.to(x.dtype)
    if base.held:
        return nn.functional.linear(x, tokens.dense())
    y: Tensor = _Quantized.apply(x.reshape(-1, x.shape[-1]), tokens)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


class _Quantized(torch.autograd.Function):
    """x W0^T of a quantised weight, of which nothing dense is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Base) -> Tensor:
        ctx.base = base
        return base.forward(x)

    @staticmethod
    @by_hand
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return ctx.base.transpose(dy), None
