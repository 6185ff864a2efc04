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
token, and the wide one another pass over W0. The core form keeps x alone if tall.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import own_dtypes
from .preparation import Prepared, Rows


class _SmallSide:
    """expand and contract of one preparation, in the dtype of the tokens."""

    def __init__(self, prepared: Prepared, form: str, dtype: torch.dtype) -> None:
        self.form, self.d, self.width = form, prepared.shape.d, prepared.shape.width
        self.extra = prepared.columns.shape[1]
        self.V = prepared.basis.to(dtype)
        self.M = prepared.mixer.to(dtype)
        if form == "folded":
            self.MV, self.NtV = prepared.folded.to(dtype), prepared.folded_transposed.to(dtype)
        elif form == "core":
            self.E = prepared.core.to(dtype)

    def expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """([x' | z], h = x V), h None for the core form."""
        if self.form == "core":
            return x @ self.E, None
        h = x @ self.V
        out = x.new_empty(x.shape[0], self.d + self.extra)
        if self.form == "folded":
            torch.addmm(x, h, self.NtV, out=out[:, : self.d])
            torch.mm(h, self.M[self.width :].mT, out=out[:, self.d :])
        else:
            mixed = h @ self.M.mT
            torch.addmm(x, mixed[:, : self.width], self.V.mT, out=out[:, : self.d])
            out[:, self.d :] = mixed[:, self.width :]
        return out, h

    def contract(self, uz: Tensor) -> tuple[Tensor, Tensor]:
        """(contracted, g): g = [u V | z], or uz itself for the core form."""
        if self.form == "core":
            return uz @ self.E.mT, uz
        u = uz[:, : self.d]
        g = uz.new_empty(uz.shape[0], self.width + self.extra)
        torch.mm(u, self.V, out=g[:, : self.width])
        g[:, self.width :] = uz[:, self.d :]
        if self.form == "folded":
            return torch.addmm(u, g, self.MV), g
        return torch.addmm(u, g @ self.M, self.V.mT), g

    def mixer_gradient(self, g: Tensor, x: Tensor, h: Tensor | None) -> Tensor:
        """dM ((width + e) x width) from contract's g and expand's x and h (None in the core form, and only there)."""
        if h is not None:
            return g.mT @ h
        dE = (g.mT @ x) @ self.V  # (d + e) x width
        return torch.cat([self.V.mT @ dE[: self.d], dE[self.d :]])


class AdaptedLinear(torch.autograd.Function):
    """Forward and backward of the factored, folded and core forms; x is T x in_features, contiguous or not."""

    @staticmethod
    def forward(ctx, x, mixer, columns, weight, bias, prepared, form, sink):  # type: ignore[no-untyped-def]
        side = _SmallSide(prepared, form, x.dtype)
        F, ctx.wide = columns.to(x.dtype), prepared.shape.transposed
        ctx.side, ctx.grad_dtype = side, mixer.dtype
        ctx.sink = sink if form != "core" and prepared.wants_rows(x.shape[0]) else None
        saved = None
        if ctx.wide:
            uz = x.new_empty(x.shape[0], side.d + side.extra)
            torch.mm(x, weight.mT, out=uz[:, : side.d])
            torch.mm(x, F, out=uz[:, side.d :])
            y, saved = side.contract(uz)
            if bias is not None:
                y += bias
        else:
            xz, saved = side.expand(x)
            u = xz[:, : side.d]
            y = u @ weight.mT if bias is None else torch.addmm(bias, u, weight.mT)
            if side.extra:
                y.addmm_(xz[:, side.d :], F.mT)
        needs_inner = mixer.requires_grad or columns.requires_grad
        ctx.save_for_backward(x if needs_inner else None, F, weight, saved if needs_inner else None)
        return y

    @staticmethod
    @once_differentiable
    @own_dtypes()
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        need_x, need_mixer, need_columns, _, need_bias = ctx.needs_input_grad[:5]
        x, F, weight, saved = ctx.saved_tensors
        side, dx, d_mixer, d_columns = ctx.side, None, None, None
        dy = dy.contiguous()
        if ctx.wide:
            uz, g = side.expand(dy)
            z = uz[:, side.d :]
            if need_x:
                dx = uz[:, : side.d] @ weight
                if side.extra:
                    dx.addmm_(z, F.mT)
            if need_mixer and ctx.sink is None:
                d_mixer = side.mixer_gradient(saved, dy, g)
            elif need_mixer:
                ctx.sink[:] = [Rows(saved, g)]
            if need_columns:
                d_columns = x.mT @ z
        else:
            uz = dy.new_empty(dy.shape[0], side.d + side.extra)
            torch.mm(dy, weight, out=uz[:, : side.d])
            torch.mm(dy, F, out=uz[:, side.d :])
            dx, g = side.contract(uz)
            if need_mixer and ctx.sink is None:
                d_mixer = side.mixer_gradient(g, x, saved)
            elif need_mixer:
                ctx.sink[:] = [Rows(g, saved)]
            if need_columns:
                z = x @ side.E[:, side.d :] if side.form == "core" else saved @ side.M[side.width :].mT
                d_columns = dy.mT @ z
        d_bias = dy.sum(0) if need_bias else None

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(ctx.grad_dtype)

        return dx, cast(d_mixer), cast(d_columns), None, d_bias, None, None, None


class MergedLinear(torch.autograd.Function):
    """y = x W'^T + b with W' built once per preparation; dM and dF through dW' = dy^T x.

    With dA' (large x d) = dW' or dW'^T, A' = A + [A V | F] M V^T:
    dM = ([A V | F]^T dA') V,  dF = dA' (B_z V^T)^T.
    """

    @staticmethod
    def forward(ctx, x, mixer, columns, weight, bias, prepared):  # type: ignore[no-untyped-def]
        merged = prepared.merged(weight).to(x.dtype)
        ctx.prepared = prepared
        needs_inner = mixer.requires_grad or columns.requires_grad
        ctx.save_for_backward(x if needs_inner else None, weight, merged)
        return torch.nn.functional.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    @own_dtypes()
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        need_x, need_mixer, need_columns, _, need_bias = ctx.needs_input_grad[:5]
        x, weight, merged = ctx.saved_tensors
        p: Prepared = ctx.prepared
        dx = dy @ merged if need_x else None
        d_mixer = d_columns = None
        if need_mixer or need_columns:
            wide = p.shape.transposed
            d_tall = (x.mT @ dy if wide else dy.mT @ x).to(p.dtype)
            if need_mixer:
                tall = (weight.mT if wide else weight).to(p.dtype)
                left = torch.cat([tall @ p.basis, p.columns], 1)
                d_mixer = (left.mT @ d_tall) @ p.basis
            if need_columns:
                d_columns = d_tall @ p.folded[p.shape.width :].mT
        return dx, d_mixer, d_columns, None, dy.sum(0) if need_bias else None, None


def adapted_linear(
    x: Tensor,
    mixer: Tensor,
    columns: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: Prepared,
    form: str,
    sink: list[Rows] | None = None,
) -> Tensor:
    """y = x W'^T + b.

    Args:
        x: T x in_features. mixer, columns: from `attach`, or leaves.
        form: factored, folded, core or merged.
        sink: that of `attach`, where few rows leave the mixer's gradient in factored form; None: always dense.
    """
    if form == "merged":
        return MergedLinear.apply(x, mixer, columns, weight, bias, prepared)  # type: ignore[no-untyped-call,no-any-return]
    return AdaptedLinear.apply(x, mixer, columns, weight, bias, prepared, form, sink)  # type: ignore[no-untyped-call,no-any-return]
