"""Preparation: everything of a layer that depends on its parameters alone, once per optimiser step.

    B  = diag(S_k + dS) G                        (k x k)
    N  = diag(1 / S_k) B - I                     (k x k; zero rows where S_i has no usable inverse)
    F  = U_l' - U_l = U_l (C - I) + U2 Q         (large x l; additive: U2 Q), then the q null-space columns
    M  = [N; B[:l]; (B - diag(S_k))[k-q:k]]      ((width + l + q) x width), padded with G = I, dS = 0 where l > k

M is called `mixer` in code and F `columns`. With x on the small side, x' = x + (x V) N^T V^T and z = (x V) B_z^T
give y = x' A^T + z F^T; every form of the layer is built from M and F (matrices.py). Gradients come back by hand,
through the standard adjoint of the Cholesky factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from ..factorize import Factors, apply_complement, apply_complement_transposed, compute_dtype
from . import own_dtypes
from .matrices import Matrices
from .rotation import cayley_backward_low_rank, rotation_backward, rotation_forward

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass
class Rows:
    """The mixer's gradient as its factors: dM = left^T right. left: T x (width + l + q); right: T x width."""

    left: Tensor
    right: Tensor


@dataclass
class State:
    """What a preparation keeps for its backward."""

    G: Tensor  # k x k
    saved: Tensor  # k x k: (I + K)^-1 for the Cayley form, else K
    X: Tensor  # R^-T, l x l, upper triangular


class Prepared(Matrices):
    """The matrices of one layer made from its parameters, and the way back to the parameters' gradients."""

    state: State

    def __init__(
        self, parameters: Gradients, factors: Factors, shape: LayerShape, config: SSVDOConfig, name: str = "layer"
    ) -> None:
        rotation, _, _ = self._read(parameters, factors, shape, config)
        G, saved = rotation_forward(rotation, shape.k, config.rotation, config.neumann_terms)
        X, columns = self._outer_forward(name)
        self.state = State(G, saved, X)
        super().__init__(shape, self._mixer(), columns, factors.inner_basis)
        self.tokens = 0  # rows that have passed through this preparation: the planner's clock
        self.trained = 0  # those among them with gradients
        self.expected = 0  # rows with gradients that the preparation before this one served
        self.choices: dict[int, str] = {}  # by number of rows: what a forward with gradients saves for backward

    @classmethod
    def restored(
        cls, parameters: Gradients, factors: Factors, shape: LayerShape, config: SSVDOConfig, state: State
    ) -> Prepared:
        """For `backward` alone, from the state of an earlier preparation of the same parameters."""
        self = cls.__new__(cls)
        self._read(parameters, factors, shape, config)
        self.shape, self.state = shape, state
        return self

    def _read(self, parameters: Gradients, factors: Factors, shape: LayerShape, config: SSVDOConfig) -> Gradients:
        rotation, scale, outer = (p.detach().to(compute_dtype(p.dtype)) for p in parameters)
        self.shape, self.config, self.factors, self.dtype = shape, config, factors, rotation.dtype
        self.null = factors.null_basis.shape[1]
        self._singular = factors.singular_values.to(self.dtype)
        self._scale, self._inverse = self._singular[: shape.k] + scale, 1 / self._singular[: shape.k - self.null]
        self._L = outer * shape.outer_scale(config)  # c x l
        return rotation, scale, outer

    # -- forward -----------------------------------------------------------------------------------------------------
    def _mixer(self) -> Tensor:
        k, l, q, width = self.shape.k, self.shape.l, self.null, self.shape.width  # noqa: E741
        G, S = self.state.G, self._singular
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
        return mixer

    def _outer_forward(self, name: str) -> tuple[Tensor, Tensor]:
        f, l, L = self.factors, self.shape.l, self._L  # noqa: E741
        columns = torch.empty(self.shape.large, l + self.null, dtype=self.dtype, device=L.device)
        columns[:, l:] = f.null_basis
        if not l:
            return L.new_zeros(0, 0), columns
        gram = L.mT @ L
        gram.diagonal().add_(self.config.tau)
        R, info = torch.linalg.cholesky_ex(gram)
        if L.device.type == "cpu" and int(info) != 0:  # on a GPU the test would stall the stream
            raise ArithmeticError(
                f"{name}: Cholesky of L^T L + tau I failed at pivot {int(info)} with tau={self.config.tau}; "
                "`outer` is not finite or too large for tau: use a larger tau or a smaller learning rate")
        identity = torch.eye(l, dtype=self.dtype, device=L.device)
        X = torch.linalg.solve_triangular(R, identity, upper=False).mT
        F = apply_complement(f.reflector.to(self.dtype), L @ X)
        if self.config.outer == "rotation":
            F.addmm_(f.outer_basis.to(self.dtype), X * self.config.tau**0.5 - identity)
        columns[:, :l] = F
        return X, columns

    # -- backward ----------------------------------------------------------------------------------------------------
    def wants_rows(self, tokens: int) -> bool:
        """Whether `backward` is cheaper with the mixer's gradient given as `Rows`."""
        return self.config.rotation == "cayley" and tokens < self.shape.k

    def backward(self, d_mixer: Tensor | Rows, d_columns: Tensor) -> Gradients:
        """(d inner_rotation, d inner_scale, d outer) from the gradients of mixer and columns, in `self.dtype`."""
        if isinstance(d_mixer, Rows):  # dB = g^T h, dG = (g diag(S + dS))^T h
            k = self.shape.k
            g, h = self._to_b(d_mixer.left.mT.to(self.dtype)).mT, d_mixer.right[:, :k].to(self.dtype)
            d_rotation, hGt = cayley_backward_low_rank(g * self._scale, h, self.state.saved)
            d_scale = (g * hGt).sum(0)
        else:
            dB = self._to_b(d_mixer[:, : self.shape.k])
            d_scale = (dB * self.state.G).sum(1)
            d_rotation = rotation_backward(
                dB * self._scale[:, None], self.state.saved, self.config.rotation, self.config.neumann_terms)
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
        L, X, f = self._L, self.state.X, self.factors
        if not self.shape.l:
            return dF.new_zeros(self.shape.c, 0)
        dF = dF.contiguous()
        dQ = apply_complement_transposed(f.reflector.to(self.dtype), dF, self.shape.d)
        dX = L.mT @ dQ
        if self.config.outer == "rotation":
            dX.addmm_(f.outer_basis.to(self.dtype).mT, dF, alpha=self.config.tau**0.5)
        # X = R^-T: R^T dR = -dX^T X; Cholesky adjoint: dGram = X Phi(R^T dR) X^T, Phi = lower triangle, diagonal halved
        phi = torch.tril(dX.mT @ X).neg_()
        phi.diagonal().mul_(0.5)
        d_gram = X @ phi @ X.mT
        dL = torch.addmm(dQ @ X.mT, L, d_gram + d_gram.mT)
        return dL.mul_(self.shape.outer_scale(self.config))


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
