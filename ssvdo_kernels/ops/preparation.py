"""Preparation: everything of a layer that depends on its parameters alone, once per optimiser step.

    B  = diag(S_k + dS) G                        (k x k)
    N  = diag(1 / S_k) B - I                     (k x k; zero rows where S_i has no usable inverse)
    F  = U_l' - U_l = U_l (C - I) + U2 Q         (large x l; additive: U2 Q), then the q null-space columns
    M  = [N; B[:l]; (B - diag(S_k))[k-q:k]]      ((width + l + q) x width), padded with G = I, dS = 0 where l > k

M is called `mixer` in code and F `columns`. With x on the small side, x' = x + (x V) N^T V^T and z = (x V) B_z^T
give y = x' A^T + z F^T; every form of the layer is built from M and F. Gradients come back by hand, through the
standard adjoint of the Cholesky factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from ..factorize import Factors, apply_complement, apply_complement_transposed, compute_dtype
from . import own_dtypes
from .rotation import cayley_backward_low_rank, rotation_backward, rotation_forward

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass
class Rows:
    """The mixer's gradient as its factors: dM = left^T right. left: T x (width + l + q); right: T x width."""

    left: Tensor
    right: Tensor


@dataclass
class _OuterSaved:
    L: Tensor  # c x l
    X: Tensor  # R^-T, l x l, upper triangular
    C: Tensor | None  # sqrt(tau) X, or None for the additive form


class Prepared:
    """The prepared matrices of one layer and the larger ones that can be built from them on demand.

    Attributes: mixer M ((width + l + q) x width); columns F (large x (l + q)); basis V (d x width), in mixer's dtype.
    """

    def __init__(
        self, parameters: Gradients, factors: Factors, shape: LayerShape, config: SSVDOConfig, name: str = "layer"
    ) -> None:
        self.shape, self.config, self.factors = shape, config, factors
        rotation, scale, outer = (p.detach().to(compute_dtype(p.dtype)) for p in parameters)
        self.dtype = rotation.dtype
        self.null = factors.null_basis.shape[1]
        self._prepare_inner(rotation, scale)
        self._prepare_outer(outer, name)
        self.basis = factors.inner_basis.to(self.dtype)
        self.tokens = 0  # rows that have passed through this preparation: the planner's clock
        self.trained = 0  # those among them with gradients
        self.expected = 0  # rows with gradients that the preparation before this one served
        self.choices: dict[int, str] = {}  # by number of rows: what a forward with gradients saves for backward
        self._casts: dict[tuple[str, torch.dtype], Tensor] = {}
        self._folded: Tensor | None = None
        self._folded_transposed: Tensor | None = None
        self._core: Tensor | None = None
        self._merged: Tensor | None = None

    # -- forward -----------------------------------------------------------------------------------------------------
    def _prepare_inner(self, rotation: Tensor, scale: Tensor) -> None:
        k, l, q, width = self.shape.k, self.shape.l, self.null, self.shape.width  # noqa: E741
        G, self._rotation_saved = rotation_forward(rotation, k, self.config.rotation, self.config.neumann_terms)
        S = self.factors.singular_values.to(self.dtype)
        self._G, self._scale, self._inverse = G, S[:k] + scale, 1 / S[: k - q]
        mixer = G.new_zeros(width + l + q, width)
        N = mixer[: k - q, :k]
        torch.mul(G[: k - q], (self._scale[: k - q] * self._inverse)[:, None], out=N)
        N.diagonal().sub_(1)
        first = min(l, k)
        torch.mul(G[:first], self._scale[:first, None], out=mixer[width : width + first, :k])
        if l > k:
            mixer[width + k : width + l, k:].diagonal().copy_(S[k:])
        if q:
            torch.mul(G[k - q :], self._scale[k - q :, None], out=mixer[width + l :, :k])
            mixer[width + l :, k - q : k].diagonal().sub_(S[k - q : k])  # A holds S_i u_i v_i^T already
        self.mixer = mixer

    def _prepare_outer(self, outer: Tensor, name: str) -> None:
        f, l = self.factors, self.shape.l  # noqa: E741
        self.columns = torch.empty(self.shape.large, l + self.null, dtype=self.dtype, device=outer.device)
        self.columns[:, l:] = f.null_basis
        self._outer: _OuterSaved | None = None
        if not l:
            return
        L = outer * self.shape.outer_scale(self.config)
        gram = L.mT @ L
        gram.diagonal().add_(self.config.tau)
        R, info = torch.linalg.cholesky_ex(gram)
        if outer.device.type == "cpu" and int(info) != 0:  # on a GPU the test would stall the stream
            raise ArithmeticError(
                f"{name}: Cholesky of L^T L + tau I failed at pivot {int(info)} with tau={self.config.tau}; "
                "`outer` is not finite or too large for tau: use a larger tau or a smaller learning rate")
        identity = torch.eye(l, dtype=self.dtype, device=outer.device)
        X = torch.linalg.solve_triangular(R, identity, upper=False).mT
        F = apply_complement(f.reflector.to(self.dtype), L @ X)
        C = None
        if self.config.outer == "rotation":
            C = X * self.config.tau**0.5
            F.addmm_(f.outer_basis.to(self.dtype), C - identity)
        self.columns[:, :l] = F
        self._outer = _OuterSaved(L, X, C)

    # -- backward ----------------------------------------------------------------------------------------------------
    def wants_rows(self, tokens: int) -> bool:
        """Whether `backward` is cheaper with the mixer's gradient given as `Rows`."""
        return self.config.rotation == "cayley" and tokens < self.shape.k

    def backward(self, d_mixer: Tensor | Rows, d_columns: Tensor) -> Gradients:
        """(d inner_rotation, d inner_scale, d outer) from the gradients of mixer and columns, in `self.dtype`."""
        if isinstance(d_mixer, Rows):  # dB = g^T h, dG = (g diag(S + dS))^T h
            k = self.shape.k
            g, h = self._to_b(d_mixer.left.mT.to(self.dtype)).mT, d_mixer.right[:, :k].to(self.dtype)
            d_rotation, hGt = cayley_backward_low_rank(g * self._scale, h, self._rotation_saved)
            d_scale = (g * hGt).sum(0)
        else:
            dB = self._to_b(d_mixer[:, : self.shape.k])
            d_scale = (dB * self._G).sum(1)
            d_rotation = rotation_backward(
                dB * self._scale[:, None], self._rotation_saved, self.config.rotation, self.config.neumann_terms)
        return d_rotation, d_scale, self._outer_backward(d_columns[:, : self.shape.l])

    def _to_b(self, d_mixer: Tensor) -> Tensor:
        """Rows of dB (k) from rows of dM (width + l + q): the adjoint of how the mixer is put together from B."""
        k, l, q, width = self.shape.k, self.shape.l, self.null, self.shape.width  # noqa: E741
        dB = d_mixer.new_zeros(k, d_mixer.shape[1])
        torch.mul(d_mixer[: k - q], self._inverse[:, None], out=dB[: k - q])
        first = min(l, k)
        dB[:first] += d_mixer[width : width + first]
        if q:
            dB[k - q :] += d_mixer[width + l :]
        return dB

    def _outer_backward(self, dF: Tensor) -> Tensor:
        saved, f = self._outer, self.factors
        if saved is None:
            return dF.new_zeros(self.shape.c, 0)
        dF = dF.contiguous()
        dQ = apply_complement_transposed(f.reflector.to(self.dtype), dF, self.shape.d)
        dX = saved.L.mT @ dQ
        if saved.C is not None:
            dX.addmm_(f.outer_basis.to(self.dtype).mT, dF, alpha=self.config.tau**0.5)
        # X = R^-T: R^T dR = -dX^T X; Cholesky adjoint: dGram = X Phi(R^T dR) X^T, Phi = lower triangle, diagonal halved
        phi = torch.tril(dX.mT @ saved.X).neg_()
        phi.diagonal().mul_(0.5)
        d_gram = saved.X @ phi @ saved.X.mT
        dL = torch.addmm(dQ @ saved.X.mT, saved.L, d_gram + d_gram.mT)
        return dL.mul_(self.shape.outer_scale(self.config))

    # -- larger matrices, built when the planner asks ----------------------------------------------------------------
    @property
    def folded(self) -> Tensor:
        """M V^T = [N V^T; B_z V^T], (width + l + q) x d."""
        if self._folded is None:
            self._folded = self.mixer @ self.basis.mT
        return self._folded

    @property
    def folded_transposed(self) -> Tensor:
        """N^T V^T, width x d."""
        if self._folded_transposed is None:
            self._folded_transposed = self.mixer[: self.shape.width].mT @ self.basis.mT
        return self._folded_transposed

    @property
    def expansion(self) -> Tensor:
        """R = [N^T V^T | B_z^T], width x (d + l + q)."""
        return torch.cat([self.folded_transposed, self.mixer[self.shape.width :].mT], 1)

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """One of the matrices (an attribute's name) in a dtype; kept, so that each is converted once."""
        found = self._casts.get((name, dtype))
        if found is None:
            matrix: Tensor = getattr(self, name)
            found = self._casts[name, dtype] = matrix.to(dtype)
        return found

    @property
    def core(self) -> Tensor:
        """E = [I + V N^T V^T | V B_z^T], d x (d + l + q)."""
        if self._core is None:
            d, width, extra = self.shape.d, self.shape.width, self.columns.shape[1]
            core = torch.empty(d, d + extra, dtype=self.dtype, device=self.basis.device)
            torch.mm(self.basis, self.folded_transposed, out=core[:, :d])
            core[:, :d].diagonal().add_(1)
            core[:, d:] = self.folded[width:].mT
            self._core = core
        return self._core

    def merged(self, weight: Tensor, backend: str = "reference") -> Tensor:
        """W' (out x in) in weight's dtype, from W0: A' = A + [A V | F] M V^T, which is `contract` over A's rows."""
        if self._merged is None:
            tall = weight.mT if self.shape.transposed else weight
            if backend == "triton":
                from ..triton import launch

                F, V, Q = (self.cast(name, weight.dtype) for name in ("columns", "basis", "folded"))
                self._merged = launch.merge(tall, F, V, Q, self.shape.transposed)
                return self._merged
            tall = tall.to(self.dtype)
            left = torch.cat([tall @ self.basis, self.columns], 1)
            if self.shape.transposed:
                self._merged = torch.addmm(weight.to(self.dtype), self.folded.mT, left.mT).to(weight.dtype)
            else:
                self._merged = torch.addmm(tall, left, self.folded).to(weight.dtype)
        return self._merged

    @property
    def built(self) -> frozenset[str]:
        """The forms whose matrices exist already."""
        have = {"folded": self._folded is not None and self._folded_transposed is not None,
                "core": self._core is not None, "merged": self._merged is not None}
        return frozenset(name for name, there in have.items() if there)


class Attach(torch.autograd.Function):
    """(mixer, columns) of a cached preparation, as differentiable functions of the three parameters.

    A consumer may leave the mixer's gradient in `sink` as `Rows` and return none; there is one consumer an Attach.
    """

    @staticmethod
    def forward(ctx, prepared: Prepared, sink: list[Rows], rotation: Tensor, scale: Tensor, outer: Tensor):  # type: ignore[no-untyped-def]
        ctx.prepared, ctx.sink, ctx.dtypes = prepared, sink, (rotation.dtype, scale.dtype, outer.dtype)
        return prepared.mixer.detach(), prepared.columns.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @own_dtypes()
    def backward(ctx, d_mixer: Tensor, d_columns: Tensor):  # type: ignore[no-untyped-def]
        gradients = ctx.prepared.backward(ctx.sink.pop() if ctx.sink else d_mixer, d_columns)
        return (None, None, *(g.to(t) if need else None
                              for g, t, need in zip(gradients, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)))


def attach(prepared: Prepared, sink: list[Rows], parameters: Gradients) -> tuple[Tensor, Tensor]:
    """mixer and columns with gradients to the parameters; the preparation itself is not repeated."""
    return Attach.apply(prepared, sink, *parameters)  # type: ignore[no-untyped-call,no-any-return]
