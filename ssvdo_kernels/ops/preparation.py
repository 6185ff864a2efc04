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
from . import host, own_dtypes
from .dispatch import preparation
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


def _check_pivot(info: int, name: str, config: SSVDOConfig) -> None:
    if info:
        raise ArithmeticError(
            f"{name}: Cholesky of L^T L + tau I failed at pivot {info} with tau={config.tau}; "
            "`outer` is not finite or too large for tau: use a larger tau or a smaller learning rate")


class Prepared(Matrices):
    """The matrices of one layer made from its parameters, and the way back to the parameters' gradients."""

    state: State

    def __init__(
        self, parameters: Gradients, factors: Factors, shape: LayerShape, config: SSVDOConfig, name: str = "layer"
    ) -> None:
        self._read(parameters, factors, shape, config)
        self._finish(self._inner_forward(), self._outer_forward(name))

    def _finish(self, inner: tuple[Tensor, Tensor, Tensor], outer: tuple[Tensor, Tensor]) -> None:
        (G, saved, mixer), (X, columns) = inner, outer
        self.state = State(G, saved, X)
        super().__init__(self.shape, mixer, columns, self.factors.inner_basis)
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

    def _read(self, parameters: Gradients, factors: Factors, shape: LayerShape, config: SSVDOConfig) -> None:
        rotation, scale, outer = (p.detach().to(compute_dtype(p.dtype)).contiguous() for p in parameters)
        self.shape, self.config, self.factors, self.dtype = shape, config, factors, rotation.dtype
        self._rotation, self._outer = rotation, outer
        self._host = preparation(config.backend, rotation.device)[0] == "host"
        self.null = factors.null_basis.shape[1]
        self._singular = factors.singular_values.to(self.dtype)
        self._scale, self._inverse = self._singular[: shape.k] + scale, 1 / self._singular[: shape.k - self.null]

    # -- forward -----------------------------------------------------------------------------------------------------
    def _inner_forward(self) -> tuple[Tensor, Tensor, Tensor]:
        shape, config = self.shape, self.config
        if self._host and host.invertible(self._rotation):
            return host.inner_forward([self._rotation], [self._scale], [self._singular], self.null, shape, config)[0]
        G, saved = rotation_forward(self._rotation, shape.k, config.rotation, config.neumann_terms)
        return G, saved, self._mixer(G)

    def _mixer(self, G: Tensor) -> Tensor:
        k, l, q, width = self.shape.k, self.shape.l, self.null, self.shape.width  # noqa: E741
        S = self._singular
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

    def _outer_factors(self) -> tuple[Tensor, Tensor]:
        """Y and U_l in the dtype of the work."""
        return self.factors.reflector.to(self.dtype), self.factors.outer_basis.to(self.dtype)

    def _new_columns(self) -> Tensor:
        """Room for F, its null-space columns filled in."""
        l = self.shape.l  # noqa: E741
        columns = torch.empty(self.shape.large, l + self.null, dtype=self.dtype, device=self._outer.device)
        columns[:, l:] = self.factors.null_basis
        return columns

    def _outer_forward(self, name: str) -> tuple[Tensor, Tensor]:
        l, config, columns = self.shape.l, self.config, self._new_columns()  # noqa: E741
        if not l:
            return self._outer.new_zeros(0, 0), columns
        Y, U = self._outer_factors()
        if self._host:
            (X,), (info,) = host.outer_forward([self._outer], [Y], [U], [columns], self.shape, config)
            _check_pivot(info, name, config)
            return X, columns
        L = self._outer * self.shape.outer_scale(config)
        gram = L.mT @ L
        gram.diagonal().add_(config.tau)
        R, status = torch.linalg.cholesky_ex(gram)
        if L.device.type == "cpu":  # on a GPU the test would stall the stream
            _check_pivot(int(status), name, config)
        identity = torch.eye(l, dtype=self.dtype, device=L.device)
        X = torch.linalg.solve_triangular(R, identity, upper=False).mT
        F = apply_complement(Y, L @ X)
        if config.outer == "rotation":
            F.addmm_(U, X * config.tau**0.5 - identity)
        columns[:, :l] = F
        return X, columns

    # -- backward ----------------------------------------------------------------------------------------------------
    def wants_rows(self, tokens: int) -> bool:
        """Whether `backward` is cheaper with the mixer's gradient given as `Rows`."""
        return self.config.rotation == "cayley" and tokens < self.shape.k

    def backward(self, d_mixer: Tensor | Rows, d_columns: Tensor) -> Gradients:
        """(d inner_rotation, d inner_scale, d outer) from the gradients of mixer and columns, in `self.dtype`."""
        inner = self._inner_backward_on_host if self._host else self._inner_backward
        return *inner(d_mixer), self._outer_backward(d_columns.to(self.dtype))

    def _inner_backward_on_host(self, d_mixer: Tensor | Rows) -> tuple[Tensor, Tensor]:
        rows, dense = None, [self._rotation]
        if isinstance(d_mixer, Rows):
            rows = ([d_mixer.left.to(self.dtype).contiguous()], [d_mixer.right.to(self.dtype).contiguous()])
        else:
            dense = [d_mixer.to(self.dtype).contiguous()]
        state = self.state
        return host.inner_backward(
            [self._rotation], [self._scale], [self._singular], [state.G.contiguous()], [state.saved.contiguous()],
            dense, self.null, self.shape, self.config, rows)[0]

    def _inner_backward(self, d_mixer: Tensor | Rows) -> tuple[Tensor, Tensor]:
        if isinstance(d_mixer, Rows):  # dB = g^T h, dG = (g diag(S + dS))^T h
            k = self.shape.k
            g, h = self._to_b(d_mixer.left.mT.to(self.dtype)).mT, d_mixer.right[:, :k].to(self.dtype)
            d_rotation, hGt = cayley_backward_low_rank(g * self._scale, h, self.state.saved)
            return d_rotation, (g * hGt).sum(0)
        dB = self._to_b(d_mixer[:, : self.shape.k])
        d_rotation = rotation_backward(
            dB * self._scale[:, None], self.state.saved, self.config.rotation, self.config.neumann_terms)
        return d_rotation, (dB * self.state.G).sum(1)

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

    def _outer_backward(self, d_columns: Tensor) -> Tensor:
        shape, config, X = self.shape, self.config, self.state.X
        if not shape.l:
            return d_columns.new_zeros(shape.c, 0)
        Y, U = self._outer_factors()
        if self._host:
            return host.outer_backward(
                [self._outer], [Y], [U], [X.contiguous()], [d_columns.contiguous()], shape, config)[0]
        L, dF = self._outer * shape.outer_scale(config), d_columns[:, : shape.l].contiguous()
        dQ = apply_complement_transposed(Y, dF, shape.d)
        dX = L.mT @ dQ
        if config.outer == "rotation":
            dX.addmm_(U.mT, dF, alpha=config.tau**0.5)
        # X = R^-T: R^T dR = -dX^T X; Cholesky adjoint: dGram = X Phi(R^T dR) X^T, Phi = lower triangle, diagonal halved
        phi = torch.tril(dX.mT @ X).neg_()
        phi.diagonal().mul_(0.5)
        d_gram = X @ phi @ X.mT
        dL = torch.addmm(dQ @ X.mT, L, d_gram + d_gram.mT)
        return dL.mul_(shape.outer_scale(config))


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
