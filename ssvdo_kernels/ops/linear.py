"""y = x W'^T + b without W': the adapted linear map and its gradients, for tall and wide layers.

Two maps on the small side, adjoint to one another (V: d x width, M = [N; B_z]):

    expand    x  ->  [x + (x V) N^T V^T | (x V) B_z^T]                 T x d  ->  T x (d + e)
    contract  [u | z]  ->  u + ((u V) N + z B_z) V^T                   T x (d + e)  ->  T x d

    tall   y = expand(x) [A | F]^T + b         dx = contract(dy [A | F])
    wide   y = contract(x [A | F]) + b         dx = expand(dy) [A | F]^T

with A = W0 or W0^T (large x d), F large x e. With h = x V and g = [(u V) | z] on the two ends of the pair, the
parameter gradients are dM = g^T h and dF = (large side)^T z. Each map has three forms: factored (through V and M),
folded (M V^T multiplied out once) and core (one dense d x (d + e) matrix E). A fourth, merged, multiplies by W'.

Kept for backward is what one end of the pair has made, so that nothing is computed twice: [h | z] of a tall layer,
which needs no x then, g of a wide one beside x (core: x and z, or x and [u | z]). The maps themselves are in sides.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import by_hand, straight
from .attach import NO_SUMS, StandIns, stand_ins
from .base import Base
from .preparation import Prepared, Rows
from .products import added, times
from .sides import SmallSide, small_side


def keeps_x(form: str, wide: bool) -> bool:
    """Whether a backward to the parameters wants the forward's input itself."""
    return wide or form in ("core", "merged")


def linear_forward(
    x: Tensor, base: Base, bias: Tensor | None, side: SmallSide, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, saved); keep: whether a backward to the parameters will want `saved`."""
    if side.wide:
        u, g, z, _ = side.shrink(x, base)
        return side.contract(u, g, z, bias, keep), g if keep else None
    x, z, saved = side.expand(x, keep)
    return side.grow(x, z, base, bias), saved


def linear_backward(
    dy: Tensor, x: Tensor | None, base: Base, side: SmallSide, saved: Tensor | None, needs: tuple[bool, bool, bool],
    pulled: bool = False, total: Tensor | None = None,
) -> tuple[Tensor | None, tuple[Tensor, Tensor | None, Tensor | None] | None, Tensor | None]:  # fmt: skip
    """(dx, (g, x, h) for `SmallSide.mixer_gradient`, dF) for those of (x, mixer, columns) that need it; pulled:
    `SmallSide.pulled_gradient` in dF's place. total: where dF may be added, and None comes instead."""
    need_x, need_mixer, need_columns = needs
    trains, core = need_mixer or need_columns, side.form == "core"
    h: Tensor | None = None
    z: Tensor | None = None
    if side.wide:
        rows, z, inner = side.expand(dy, trains and not core)
        dx = side.grow(rows, z, base, None) if need_x else None
        if not trains:
            return dx, None, None
        assert saved is not None and x is not None
        if inner is not None:
            h, z = inner.split_with_sizes((side.width, side.extra), 1)
        return dx, (saved, dy, h) if need_mixer else None, side.columns_gradient(x, z, total) if need_columns else None
    if trains:
        assert saved is not None
        h, z = (None, saved) if core else saved.split_with_sizes((side.width, side.extra), 1)
    u, g, last, d_columns = side.shrink(dy, base, z if need_columns and not pulled else None, total)
    if pulled and need_columns:
        assert z is not None
        d_columns = side.pulled_gradient(dy, u, z)
    dx = side.contract(u, g, last, None, need_mixer) if need_x or need_mixer else None
    return dx, (g, x, h) if need_mixer else None, d_columns


class Sums(Protocol):
    """Gradients of one layer's stand-ins, summed over several backwards."""

    def totals(self, like: Tensor) -> Sequence[Tensor | None]:
        """Those that a backward on the current stream of `like` may add its own to, in the order of `StandIns`; None
        where the gradient is to go through the graph."""


class Call(NamedTuple):
    """How one forward is computed.

    form: factored, folded, core or merged. backend: reference or triton (which serves folded and merged). sink: that of
    `attach`, where few rows leave the mixer's gradient in factored form; None: always dense. pulled: whether dF comes
    with A^T dF, as `pulls` found. sums: what the stand-ins' gradients are summed in; None: they are not.
    """

    prepared: Prepared
    form: str
    backend: str
    sink: list[Rows] | None = None
    pulled: bool = False
    sums: Sums | None = None


def pulls(prepared: Prepared, form: str, rows: int, dtype: torch.dtype) -> bool:
    """Whether `rows` tokens of a dtype, all that are behind one dF, spare work by giving A^T dF as well, through
    PyTorch's own products.

    A^T dF = (dy A)^T z: rows d e multiply-adds in place of large d l. P divides what it takes along V by S: where the
    tokens' parts of dF are kappa times their sum, roundings grow by kappa S_0 / S_i, and by the larger of the two
    otherwise. Tokens of half precision would lose all digits.
    """
    if form == "merged" or dtype != prepared.dtype or not prepared.lends:
        return False
    return rows * prepared.extra < prepared.shape.large * prepared.shape.l


def run(x: Tensor, base: Base, bias: Tensor | None, call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(y, saved) outside of autograd; x: T x in_features."""
    if call.form == "merged":
        return torch.nn.functional.linear(x, call.prepared.merged(base, call.backend), bias), None
    return linear_forward(x, base, bias, small_side(call.prepared, call.form, x.dtype, call.backend), keep)


def merged_backward(
    dy: Tensor, x: Tensor | None, base: Base, call: Call, needs: tuple[bool, bool], total: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dC) for those that need it: C = [A V | F] M of A' = A + C V^T, so that dC = dA' V = (large side)^T (small
    side) V, without dA'. total: where dC may be added, and None comes instead."""
    prepared = call.prepared
    dx = torch.mm(dy, prepared.merged(base, call.backend)) if needs[0] else None
    if x is None or not needs[1]:
        return dx, None
    V = prepared.get("aligned_basis" if call.backend == "triton" else "basis", dy.dtype)
    dC = added(x, torch.mm(dy, V), total) if prepared.shape.transposed else added(dy, torch.mm(x, V), total)
    width = prepared.shape.width
    return dx, dC if dC is None or dC.shape[1] == width else dC[:, :width]


def pull_back(
    dy: Tensor, x: Tensor | None, base: Base, saved: Tensor | None, call: Call, needs: tuple[bool, bool, bool],
    totals: Sequence[Tensor | None] = NO_SUMS,
) -> tuple[Tensor | None, Tensor | Rows | None, Tensor | None]:  # fmt: skip
    """(dx, dM, dF) for those of (x, mixer, columns) that need it; dM as `Rows` where that is cheaper, dF as
    [dF; A^T dF / S_0] where `call` says so; None for what was added to `totals`."""
    prepared = call.prepared
    if call.form == "merged":
        dx, product = merged_backward(dy, x, base, call, (needs[0], needs[1] or needs[2]))
        return dx, *((None, None) if product is None else prepared.of_product(product))
    side = small_side(prepared, call.form, dy.dtype, call.backend)
    dx, rows, d_columns = linear_backward(dy, x, base, side, saved, needs, call.pulled, totals[1])
    if rows is None:
        return dx, None, d_columns
    g, _, h = rows
    if h is not None and prepared.wants_rows(dy.shape[0]):
        return dx, side.rows(g, h), d_columns
    return dx, side.mixer_gradient(*rows, totals[0]), d_columns


class AdaptedLinear(torch.autograd.Function):
    """y = x W'^T + b as a function of x, the stand-ins of M and F, and the bias; `tensors` are what the base saves.

    In the merged form these may be None and the stand-in of C: see `StandIns.dense`.
    """

    @staticmethod
    def forward(ctx, x, mixer, columns, bias, base, call, *tensors):  # type: ignore[no-untyped-def]
        trains = columns.requires_grad or (mixer is not None and mixer.requires_grad)
        y, saved = run(x, base, bias, call, trains)
        ctx.call, ctx.base, ctx.sums = call, base, mixer is None
        kept = x if trains and keeps_x(call.form, call.prepared.shape.transposed) else None
        ctx.save_for_backward(kept, saved, *tensors)
        return y

    @staticmethod
    @by_hand
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        need_x, need_mixer, need_columns, need_bias = ctx.needs_input_grad[:4]
        (x, saved, *tensors), call = ctx.saved_tensors, ctx.call
        dy, d_mixer = dy.contiguous(), None
        totals = NO_SUMS if call.sums is None else call.sums.totals(dy)
        if ctx.sums:
            dx, d_columns = merged_backward(dy, x, ctx.base, call, (need_x, need_columns), totals[3])
        else:
            needs = need_x, need_mixer, need_columns
            dx, d_mixer, d_columns = pull_back(dy, x, ctx.base, saved, call, needs, totals)
        if isinstance(d_mixer, Rows):
            if call.sink is None:
                d_mixer = d_mixer.left.mT @ d_mixer.right
            else:
                call.sink[:], d_mixer = [d_mixer], None
        dtype = call.prepared.dtype
        if d_mixer is not None and d_mixer.dtype != dtype:
            d_mixer = d_mixer.to(dtype)
        if d_columns is not None and d_columns.dtype != dtype:
            d_columns = d_columns.to(dtype)
        d_bias = dy.sum(0) if need_bias else None
        return dx, d_mixer, d_columns, d_bias, None, None, *[None] * len(tensors)


_apply = straight(AdaptedLinear)


class AdaptedWeight(torch.autograd.Function):
    """W', a new tensor, as a function of what `StandIns.dense` gives."""

    @staticmethod
    def forward(ctx, mixer, columns, base, prepared):  # type: ignore[no-untyped-def]
        ctx.prepared, ctx.sums = prepared, mixer is None
        ctx.save_for_backward(*base.saved)
        return prepared.merged(base, keep=False).detach()

    @staticmethod
    @by_hand
    def backward(ctx, d_weight):  # type: ignore[no-untyped-def]
        _ = ctx.saved_tensors  # raises where W0 has been written to
        d_tall = d_weight.mT if ctx.prepared.shape.transposed else d_weight
        product = times(ctx.prepared.basis.mT, d_tall.mT.to(ctx.prepared.dtype)).mT
        return *((None, product) if ctx.sums else ctx.prepared.of_product(product)), None, None


def adapted_matrix(pair: StandIns | None, base: Base, prepared: Prepared) -> Tensor:
    """W' (out_features x in_features), a new tensor, with gradients by way of `pair`."""
    if pair is None:
        return prepared.merged(base, keep=False).clone()
    return AdaptedWeight.apply(*pair.dense, base, prepared)  # type: ignore[no-untyped-call,no-any-return]


def adapted_linear(x: Tensor, pair: StandIns | None, base: Base, bias: Tensor | None, call: Call) -> Tensor:
    """y = x W'^T + b. x: T x in_features; pair: stand-ins from `attach` or leaves; None: parameters get no gradient."""
    if pair is None and not torch.is_grad_enabled():  # a token at a time, bookkeeping costs as much as a product
        return run(x, base, bias, call, False)[0]
    own = stand_ins([call.prepared])[0] if pair is None else pair
    two = own.dense if call.form == "merged" else (own.mixer, own.pulled if call.pulled else own.columns)
    return _apply(x, *two, bias, base, call, *base.saved)  # type: ignore[no-any-return]
