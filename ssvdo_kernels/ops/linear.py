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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..planner import joins
from . import own_dtypes
from .matrices import Matrices
from .preparation import Rows


class SmallSide:
    """expand and contract of one layer's matrices, in the dtype of the tokens, through PyTorch's own products."""

    def __init__(self, matrices: Matrices, form: str, dtype: torch.dtype) -> None:
        self.form, self.d, self.width = form, matrices.shape.d, matrices.shape.width
        self.extra = matrices.columns.shape[1]
        self.V = matrices.cast("basis", dtype)
        self.M = matrices.cast("mixer", dtype)
        if form == "folded":
            self.MV, self.NtV = matrices.cast("folded", dtype), matrices.cast("folded_transposed", dtype)
        elif form == "core":
            self.E = matrices.cast("core", dtype)

    def expand(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """([x' | z], h = x V); h is None for the core form."""
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
        return h, h @ self.M[self.width :].mT

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

    def __init__(self, matrices: Matrices, dtype: torch.dtype) -> None:
        super().__init__(matrices, "folded", dtype)
        self.R = matrices.cast("expansion", dtype)

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


def small_side(matrices: Matrices, form: str, dtype: torch.dtype, backend: str) -> SmallSide:
    """The engine of a form."""
    fused = backend == "triton" and form == "folded"
    return _TritonSide(matrices, dtype) if fused else SmallSide(matrices, form, dtype)


def _join(weight: Tensor, F: Tensor, wide: bool) -> Tensor:
    """[W0 | F], large x (d + e), or its transpose for a wide layer."""
    return torch.cat([weight, F.mT], 0) if wide else torch.cat([weight, F], 1)


def _shrink(rows: Tensor, weight: Tensor, F: Tensor, side: SmallSide, wide: bool) -> Tensor:
    """[u | z] = rows [A | F]: T x large -> T x (d + e)."""
    if side.joins(len(rows)):
        joined = _join(weight, F, wide)
        return rows @ (joined.mT if wide else joined)
    uz = rows.new_empty(rows.shape[0], side.d + side.extra)
    torch.mm(rows, weight.mT if wide else weight, out=uz[:, : side.d])
    torch.mm(rows, F, out=uz[:, side.d :])
    return uz


def _grow(uz: Tensor, weight: Tensor, bias: Tensor | None, F: Tensor, side: SmallSide, wide: bool) -> Tensor:
    """[u | z] [A | F]^T + bias: T x (d + e) -> T x large."""
    if side.joins(len(uz)):
        joined = _join(weight, F, wide)
        joined = joined if wide else joined.mT
        return uz @ joined if bias is None else torch.addmm(bias, uz, joined)
    u, right = uz[:, : side.d], weight if wide else weight.mT
    y = u @ right if bias is None else torch.addmm(bias, u, right)
    return y.addmm_(uz[:, side.d :], F.mT) if side.extra else y


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, F: Tensor, side: SmallSide, wide: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, saved); keep: whether a backward to the parameters will want `saved` (None for a tall layer)."""
    if wide:
        return side.contract(_shrink(x, weight, F, side, wide), bias, keep)
    xz, saved = side.expand(x, False)
    return _grow(xz, weight, bias, F, side, wide), saved


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    F: Tensor,
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
            dx = _grow(uz, weight, None, F, side, wide)
        if need_mixer:
            assert saved is not None
            rows = (saved, dy, h)
        if need_columns:
            d_columns = side.over_tokens(x, uz[:, side.d :])
        return dx, rows, d_columns
    dx, g = side.contract(_shrink(dy, weight, F, side, wide), None, need_mixer)
    if need_mixer or need_columns:
        h, z = side.inner(x, saved)
        if need_mixer:
            assert g is not None
            rows = (g, x, h)
        d_columns = side.over_tokens(dy, z) if need_columns else None
    return dx, rows, d_columns


class AdaptedLinear(torch.autograd.Function):
    """Forward and backward of the factored, folded and core forms; x is T x in_features, contiguous or not."""

    @staticmethod
    def forward(ctx, x, mixer, columns, weight, bias, prepared, form, backend, sink):  # type: ignore[no-untyped-def]
        side = small_side(prepared, form, x.dtype, backend)
        F, wide = prepared.cast("columns", x.dtype), prepared.shape.transposed
        keep = mixer.requires_grad or columns.requires_grad
        y, saved = linear_forward(x, weight, bias, F, side, wide, keep)
        ctx.side, ctx.wide, ctx.grad_dtype = side, wide, mixer.dtype
        ctx.sink = sink if form != "core" and prepared.wants_rows(x.shape[0]) else None
        ctx.save_for_backward(x if keep else None, F, weight, saved if keep else None)
        return y

    @staticmethod
    @once_differentiable
    @own_dtypes()
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        need_x, need_mixer, need_columns, _, need_bias = ctx.needs_input_grad[:5]
        x, F, weight, saved = ctx.saved_tensors
        side, d_mixer = ctx.side, None
        dy = dy.contiguous()
        dx, rows, d_columns = linear_backward(
            dy, x, weight, F, side, ctx.wide, saved, (need_x, need_mixer, need_columns))
        if rows is not None and ctx.sink is not None:
            g, _, h = rows
            assert h is not None  # the core form has none, and no sink
            ctx.sink[:] = [Rows(g, h)]
        elif rows is not None:
            d_mixer = side.mixer_gradient(*rows)
        d_bias = dy.sum(0) if need_bias else None

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(ctx.grad_dtype)

        return dx, cast(d_mixer), cast(d_columns), None, d_bias, None, None, None, None


class MergedLinear(torch.autograd.Function):
    """y = x W'^T + b with W' built once per preparation; dM and dF through dW' = dy^T x."""

    @staticmethod
    def forward(ctx, x, mixer, columns, weight, bias, prepared, backend):  # type: ignore[no-untyped-def]
        merged = prepared.merged(weight, backend).to(x.dtype)
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
        p: Matrices = ctx.prepared
        dx = dy @ merged if need_x else None
        d_mixer = d_columns = None
        if need_mixer or need_columns:
            d_mixer, d_columns = p.merged_backward(weight, dy.mT @ x, need_mixer, need_columns)
        return dx, d_mixer, d_columns, None, dy.sum(0) if need_bias else None, None, None


def adapted_linear(
    x: Tensor,
    mixer: Tensor,
    columns: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: Matrices,
    form: str,
    backend: str = "reference",
    sink: list[Rows] | None = None,
) -> Tensor:
    """y = x W'^T + b.

    Args:
        x: T x in_features. mixer, columns: from `attach`, or leaves.
        form: factored, folded, core or merged. backend: reference or triton (which serves folded and merged).
        sink: that of `attach`, where few rows leave the mixer's gradient in factored form; None: always dense.
    """
    if not torch.is_grad_enabled():  # a token at a time, autograd's bookkeeping would cost as much as the product
        if form == "merged":
            return torch.nn.functional.linear(x, prepared.merged(weight, backend).to(x.dtype), bias)
        side, F = small_side(prepared, form, x.dtype, backend), prepared.cast("columns", x.dtype)
        return linear_forward(x, weight, bias, F, side, prepared.shape.transposed, False)[0]
    if form == "merged":
        return MergedLinear.apply(x, mixer, columns, weight, bias, prepared, backend)  # type: ignore[no-untyped-call,no-any-return]
    return AdaptedLinear.apply(x, mixer, columns, weight, bias, prepared, form, backend, sink)  # type: ignore[no-untyped-call,no-any-return]
