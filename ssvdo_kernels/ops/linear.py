"""y = x W'^T + b without W': the adapted linear map and its gradients, for tall and wide layers.

Two maps on the small side, adjoint to one another (V: d x width, M = [N; B_z]):

    expand    x  ->  [x + (x V) N^T V^T | (x V) B_z^T]                 T x d  ->  T x (d + e)
    contract  [u | z]  ->  u + ((u V) N + z B_z) V^T                   T x (d + e)  ->  T x d

    tall   y = expand(x) [A | F]^T + b         dx = contract(dy [A | F])
    wide   y = contract(x [A | F]) + b         dx = expand(dy) [A | F]^T

with A = W0 or W0^T (large x d), F large x e. With h = x V and g = [(u V) | z] on the two ends of the pair, the
parameter gradients are dM = g^T h and dF = (large side)^T z. Each map has three forms: factored (through V and M),
folded (M V^T multiplied out once) and core (one dense d x (d + e) matrix E). Kept for backward are x and the inner
activations, T x width (tall, h) or T x (width + e) (wide, g): recomputing h costs the tall layer 2dk operations a
token, and the wide one another pass over W0. The core form keeps x alone if tall, and so do the Triton kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..planner import joins
from . import by_hand
from .attach import Pair, stand_ins
from .base import Base
from .preparation import Prepared, Rows

NAMES = {"mixer": "M", "lower": "B", "folded": "MV", "folded_transposed": "NtV", "core": "E", "expansion": "R"}


class SmallSide:
    """expand and contract of one layer's matrices, in the dtype of the tokens, through PyTorch's own products."""

    def __init__(self, prepared: Prepared, form: str, dtype: torch.dtype) -> None:
        self.form, self.d, self.width, self.extra = form, prepared.shape.d, prepared.shape.width, prepared.extra
        self.V, self.F = prepared.get("basis", dtype), prepared.get("columns", dtype)
        for name in self.needed():
            setattr(self, NAMES[name], prepared.get(name, dtype))
        prepared.settle(dtype)

    M: Tensor
    B: Tensor
    MV: Tensor
    NtV: Tensor
    E: Tensor
    R: Tensor

    def needed(self) -> tuple[str, ...]:
        """The matrices of the form, beside V and F."""
        return {"factored": ("mixer",), "core": ("core",)}.get(self.form, ("lower", "folded", "folded_transposed"))

    @property
    def lower(self) -> Tensor:
        """B_z, e x width."""
        return self.M[self.width :] if self.form == "factored" else self.B

    def expand(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """([x' | z], h = x V); h is None for the core form."""
        if self.form == "core":
            return x @ self.E, None
        h = x @ self.V
        out = x.new_empty(x.shape[0], self.d + self.extra)
        if self.form == "folded":
            torch.addmm(x, h, self.NtV, out=out[:, : self.d])
            torch.mm(h, self.lower.mT, out=out[:, self.d :])
        else:
            mixed = h @ self.M.mT
            torch.addmm(x, mixed[:, : self.width], self.V.mT, out=out[:, : self.d])
            out[:, self.d :] = mixed[:, self.width :]
        return out, h

    def contract(self, uz: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """(contracted + bias, g): g = [u V | z], or uz itself for the core form."""
        if self.form == "core":
            return (uz @ self.E.mT if bias is None else torch.addmm(bias, uz, self.E.mT)), uz
        u = uz[:, : self.d]
        g = uz.new_empty(uz.shape[0], self.width + self.extra)
        torch.mm(u, self.V, out=g[:, : self.width])
        g[:, self.width :] = uz[:, self.d :]
        y = torch.addmm(u, g, self.MV) if self.form == "folded" else torch.addmm(u, g @ self.M, self.V.mT)
        return (y if bias is None else y.add_(bias)), g

    def joins(self, tokens: int) -> bool:
        """Whether [W0 | F] is put together for one product in place of two."""
        return False

    def inner(self, x: Tensor, saved: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """(h, z) of expand again, in backward; saved: its h, if that was kept."""
        if self.form == "core":
            return None, x @ self.E[:, self.d :]
        h = x @ self.V if saved is None else saved
        return h, h @ self.lower.mT

    def mixer_gradient(self, g: Tensor, x: Tensor, h: Tensor | None) -> Tensor:
        """dM ((width + e) x width) from contract's g and expand's x and h (None in the core form, and only there)."""
        if h is not None:
            return self.over_tokens(g, h)
        dE = (g.mT @ x) @ self.V  # (d + e) x width
        return torch.cat([self.V.mT @ dE[: self.d], dE[self.d :]])

    def over_tokens(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T b, summed over tokens."""
        return a.mT @ b


class _TritonSide(SmallSide):
    """The folded form through the Triton kernels; x V is computed again in backward rather than kept."""

    def needed(self) -> tuple[str, ...]:
        return "lower", "folded", "expansion"

    def expand(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        from ..triton import launch

        return launch.expand(x, self.V, self.R, keep)

    def contract(self, uz: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        from ..triton import launch

        return launch.contract(uz[:, : self.d], uz[:, self.d :], self.V, self.MV, keep, bias)

    def joins(self, tokens: int) -> bool:
        return joins(tokens, self.d, self.extra)

    def over_tokens(self, a: Tensor, b: Tensor) -> Tensor:
        from ..triton import launch

        return launch.token_product(a, b)


def small_side(prepared: Prepared, form: str, dtype: torch.dtype, backend: str) -> SmallSide:
    """The engine of a form."""
    return (_TritonSide if backend == "triton" and form == "folded" else SmallSide)(prepared, form, dtype)


def keeps(form: str, backend: str, wide: bool) -> bool:
    """Whether a forward keeps more than x for its backward."""
    if form == "merged":
        return False
    return wide or (form != "core" and backend != "triton")


def _join(base: Base, F: Tensor, wide: bool) -> Tensor:
    """[W0 | F], large x (d + e), or its transpose for a wide layer."""
    return torch.cat([base.dense(), F.mT], 0) if wide else torch.cat([base.dense(), F], 1)


def _shrink(rows: Tensor, base: Base, side: SmallSide, wide: bool) -> Tensor:
    """[u | z] = rows [A | F]: T x large -> T x (d + e)."""
    if base.held and side.joins(len(rows)):
        joined = _join(base, side.F, wide)
        return rows @ (joined.mT if wide else joined)
    uz = rows.new_empty(rows.shape[0], side.d + side.extra)
    (base.forward if wide else base.transpose)(rows, out=uz[:, : side.d])
    torch.mm(rows, side.F, out=uz[:, side.d :])
    return uz


def _grow(uz: Tensor, base: Base, bias: Tensor | None, side: SmallSide, wide: bool) -> Tensor:
    """[u | z] [A | F]^T + bias: T x (d + e) -> T x large."""
    if base.held and side.joins(len(uz)):
        joined = _join(base, side.F, wide)
        joined = joined if wide else joined.mT
        return uz @ joined if bias is None else torch.addmm(bias, uz, joined)
    u = uz[:, : side.d]
    y = base.transpose(u) if wide else base.forward(u, bias)
    return y.addmm_(uz[:, side.d :], side.F.mT) if side.extra else y


def linear_forward(
    x: Tensor, base: Base, bias: Tensor | None, side: SmallSide, wide: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, saved); keep: whether a backward to the parameters will want `saved` (None where there is none)."""
    if wide:
        return side.contract(_shrink(x, base, side, wide), bias, keep)
    xz, saved = side.expand(x, False)
    return _grow(xz, base, bias, side, wide), saved


def linear_backward(
    dy: Tensor,
    x: Tensor,
    base: Base,
    side: SmallSide,
    wide: bool,
    saved: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor | None] | None, Tensor | None]:
    """(dx, (g, x, h) for `SmallSide.mixer_gradient`, dF) for those of (x, mixer, columns) that need it."""
    need_x, need_mixer, need_columns = needs
    dx = rows = d_columns = None
    if wide:
        uz, h = side.expand(dy, need_mixer)
        if need_x:
            dx = _grow(uz, base, None, side, wide)
        if need_mixer:
            assert saved is not None
            rows = (saved, dy, h)
        if need_columns:
            d_columns = side.over_tokens(x, uz[:, side.d :])
        return dx, rows, d_columns
    dx, g = side.contract(_shrink(dy, base, side, wide), None, need_mixer)
    if need_mixer or need_columns:
        h, z = side.inner(x, saved)
        if need_mixer:
            assert g is not None
            rows = (g, x, h)
        d_columns = side.over_tokens(dy, z) if need_columns else None
    return dx, rows, d_columns


@dataclass(frozen=True)
class Call:
    """How one forward is computed.

    form: factored, folded, core or merged. backend: reference or triton (which serves folded and merged). sink: that of
    `attach`, where few rows leave the mixer's gradient in factored form; None: always dense.
    """

    prepared: Prepared
    form: str
    backend: str
    sink: list[Rows] | None = None


def run(x: Tensor, base: Base, bias: Tensor | None, call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(y, saved) outside of autograd; x: T x in_features."""
    if call.form == "merged":
        return torch.nn.functional.linear(x, call.prepared.merged(base, call.backend).to(x.dtype), bias), None
    side = small_side(call.prepared, call.form, x.dtype, call.backend)
    return linear_forward(x, base, bias, side, call.prepared.shape.transposed, keep)


def pull_back(
    dy: Tensor, x: Tensor, base: Base, saved: Tensor | None, call: Call, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | Rows | None, Tensor | None]:
    """(dx, dM, dF) for those of (x, mixer, columns) that need it; dM as `Rows` where that is cheaper."""
    prepared = call.prepared
    if call.form == "merged":
        dx = dy @ prepared.merged(base, call.backend).to(dy.dtype) if needs[0] else None
        if not (needs[1] or needs[2]):
            return dx, None, None
        return dx, *prepared.merged_backward(base.dense(), dy.mT @ x, *needs[1:])
    side = small_side(prepared, call.form, dy.dtype, call.backend)
    dx, rows, d_columns = linear_backward(dy, x, base, side, prepared.shape.transposed, saved, needs)
    d_mixer: Tensor | Rows | None = None
    if rows is not None:
        g, _, h = rows
        few = h is not None and prepared.wants_rows(len(x))
        d_mixer = Rows(g, h) if few and h is not None else side.mixer_gradient(*rows)
    return dx, d_mixer, d_columns


class AdaptedLinear(torch.autograd.Function):
    """y = x W'^T + b as a function of x, the stand-ins of M and F, and the bias; `tensors` are what the base saves."""

    @staticmethod
    def forward(ctx, x, mixer, columns, bias, base, call, *tensors):  # type: ignore[no-untyped-def]
        keep = mixer.requires_grad or columns.requires_grad
        y, saved = run(x, base, bias, call, keep)
        ctx.call, ctx.base = call, base
        ctx.save_for_backward(x if keep else None, saved if keep else None, *tensors)
        return y

    @staticmethod
    @by_hand
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        need_x, need_mixer, need_columns, need_bias = ctx.needs_input_grad[:4]
        (x, saved, *_), call = ctx.saved_tensors, ctx.call
        dx, d_mixer, d_columns = pull_back(
            dy.contiguous(), x, ctx.base, saved, call, (need_x, need_mixer, need_columns))
        dtype = call.prepared.dtype
        if isinstance(d_mixer, Rows):
            if call.sink is None:
                d_mixer = d_mixer.left.mT @ d_mixer.right
            else:
                call.sink[:], d_mixer = [d_mixer], None
        d_bias = dy.sum(0) if need_bias else None
        return (dx, None if d_mixer is None else d_mixer.to(dtype), None if d_columns is None else d_columns.to(dtype),
                d_bias, None, None, *[None] * len(ctx.base.saved))  # fmt: skip


class AdaptedWeight(torch.autograd.Function):
    """W' as a function of the stand-ins of M and F."""

    @staticmethod
    def forward(ctx, mixer, columns, base, prepared):  # type: ignore[no-untyped-def]
        ctx.base, ctx.prepared = base, prepared
        ctx.save_for_backward(*base.saved)
        return prepared.merged(base, keep=False)

    @staticmethod
    @by_hand
    def backward(ctx, d_weight):  # type: ignore[no-untyped-def]
        _ = ctx.saved_tensors  # raises where W0 has been written to
        return *ctx.prepared.merged_backward(ctx.base.dense(), d_weight, *ctx.needs_input_grad[:2]), None, None


def adapted_matrix(pair: Pair | None, base: Base, prepared: Prepared) -> Tensor:
    """W' (out_features x in_features), a new tensor, with gradients by way of `pair`."""
    if pair is None:
        return prepared.merged(base, keep=False).clone()
    return AdaptedWeight.apply(*pair, base, prepared)  # type: ignore[no-untyped-call,no-any-return]


def adapted_linear(x: Tensor, pair: Pair | None, base: Base, bias: Tensor | None, call: Call) -> Tensor:
    """y = x W'^T + b. x: T x in_features; pair: stand-ins from `attach` or leaves; None: parameters get no gradient."""
    if pair is None and not torch.is_grad_enabled():  # a token at a time, bookkeeping costs as much as a product
        return run(x, base, bias, call, False)[0]
    mixer, columns = stand_ins(call.prepared) if pair is None else pair
    return AdaptedLinear.apply(x, mixer, columns, bias, base, call, *base.saved)  # type: ignore[no-untyped-call,no-any-return]
