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
from .device import Verdict
from .dispatch import preparation
from .engines import Inner, adjoint, prepare
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
    left: Tensor | None = None  # Y_bot^T L, r x l: the CUDA kernels' backward


def check_pivot(info: int, name: str, config: SSVDOConfig) -> None:
    """Raises ArithmeticError where info, a bad pivot from 1, is not 0."""
    if info:
        raise ArithmeticError(
            f"{name}: Cholesky of L^T L + tau I failed at pivot {info} with tau={config.tau}; "
            "`outer` is not finite or too large for tau: use a larger tau or a smaller learning rate")


class Prepared(Matrices):
    """The matrices of one layer made from its parameters, and the way back to the parameters' gradients."""

    state: State
    _verdict: tuple[Verdict, int] | None = None

    def __init__(
        self, parameters: Gradients, factors: Factors, shape: LayerShape, config: SSVDOConfig, name: str = "layer"
    ) -> None:
        self.read(parameters, factors, shape, config, name)
        check_pivot(prepare([self])[0], name, config)

    def finish(
        self, inner: Inner, X: Tensor, columns: Tensor, left: Tensor | None, verdict: tuple[Verdict, int] | None
    ) -> None:
        """Takes what `engines.prepare` made of this layer."""
        G, saved, mixer = inner
        self.state, self._verdict = State(G, saved, X, left), verdict
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
        self.read(parameters, factors, shape, config, "layer")
        self.state = state
        return self

    def read(
        self, parameters: Gradients, factors: Factors, shape: LayerShape, config: SSVDOConfig, name: str
    ) -> None:
        """Takes the parameters, in the dtype of the work."""
        rotation, shift, outer = (p.detach().to(compute_dtype(p.dtype)).contiguous() for p in parameters)
        self.name, self.shape, self.config, self.factors, self.dtype = name, shape, config, factors, rotation.dtype
        self.rotation, self.shift, self.outer = rotation, shift, outer
        self.engine = preparation(config.backend, rotation.device)[0]
        self.null = factors.null_basis.shape[1]
        self.singular = factors.singular_values.to(self.dtype)

    @property
    def _scale(self) -> Tensor:
        """S_k + dS."""
        return self.singular[: self.shape.k] + self.shift

    @property
    def _inverse(self) -> Tensor:
        """1 / S where that is of use."""
        return 1 / self.singular[: self.shape.k - self.null]

    def verify(self, wait: bool = True) -> None:
        """Raises ArithmeticError if a GPU has bad news of this preparation. wait: for news, where there is none yet."""
        if self._verdict is None or not (wait or self._verdict[0].there()):
            return
        verdict, i = self._verdict
        inverses, pivots = verdict.read()
        check_pivot(pivots[i], self.name, self.config)
        if inverses[i]:
            raise ArithmeticError(f"{self.name}: found no inverse of I + K in {self.dtype}; `inner_rotation` is not "
                                  "finite or too large: use a smaller learning rate")
        self._verdict = None

    # -- forward -----------------------------------------------------------------------------------------------------
    def inner_reference(self) -> Inner:
        """(G, saved, mixer) by PyTorch."""
        G, saved = rotation_forward(self.rotation, self.shape.k, self.config.rotation, self.config.neumann_terms)
        return G, saved, self._mixer(G)

    def _mixer(self, G: Tensor) -> Tensor:
        k, l, q, width = self.shape.k, self.shape.l, self.null, self.shape.width  # noqa: E741
        S, scale = self.singular, self._scale
        mixer = G.new_zeros(width + l + q, width)
        N = mixer[: k - q, :k]
        torch.mul(G[: k - q], (scale[: k - q] * self._inverse)[:, None], out=N)
        N.diagonal().sub_(1)
        first = min(l, k)
        torch.mul(G[:first], scale[:first, None], out=mixer[width : width + first, :k])
        if l > k:
            mixer[width + k : width + l, k:].diagonal().copy_(S[k:])
        if q:
            torch.mul(G[k - q :], scale[k - q :, None], out=mixer[width + l :, :k])
            mixer[width + l :, k - q : k].diagonal().sub_(S[k - q : k])  # A holds S_i u_i v_i^T already
        return mixer

    def outer_factors(self) -> tuple[Tensor, Tensor]:
        """Y and U_l in the dtype of the work; the CUDA kernels read half types as they are."""
        both = self.factors.reflector, self.factors.outer_basis
        halves = (torch.float16, torch.bfloat16)
        if self.engine != "cuda" or self.dtype != torch.float32 or both[0].dtype not in halves:
            both = both[0].to(self.dtype), both[1].to(self.dtype)
        return both[0].contiguous(), both[1].contiguous()

    def new_columns(self) -> Tensor:
        """Room for F, its null-space columns filled in."""
        l = self.shape.l  # noqa: E741
        columns = torch.empty(self.shape.large, l + self.null, dtype=self.dtype, device=self.outer.device)
        if self.null:
            columns[:, l:] = self.factors.null_basis
        return columns

    def outer_reference(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(X, info) by PyTorch; writes F."""
        l, config = self.shape.l, self.config  # noqa: E741
        Y, U = self.outer_factors()
        L = self.outer * self.shape.outer_scale(config)
        gram = L.mT @ L
        gram.diagonal().add_(config.tau)
        R, status = torch.linalg.cholesky_ex(gram)
        identity = torch.eye(l, dtype=self.dtype, device=L.device)
        X = torch.linalg.solve_triangular(R, identity, upper=False).mT
        F = apply_complement(Y, L @ X)
        if config.outer == "rotation":
            F.addmm_(U, X * config.tau**0.5 - identity)
        columns[:, :l] = F
        return X, status

    # -- backward ----------------------------------------------------------------------------------------------------
    def wants_rows(self, tokens: int) -> bool:
        """Whether `backward` is cheaper with the mixer's gradient given as `Rows`."""
        return self.config.rotation == "cayley" and self.engine != "cuda" and tokens < self.shape.k

    def backward(self, d_mixer: Tensor | Rows, d_columns: Tensor) -> Gradients:
        """(d inner_rotation, d inner_scale, d outer) from the gradients of mixer and columns, in `self.dtype`."""
        return adjoint([self], [d_mixer], [d_columns])[0]

    def inner_reference_backward(self, d_mixer: Tensor | Rows) -> tuple[Tensor, Tensor]:
        """(d inner_rotation, d inner_scale) by PyTorch."""
        if isinstance(d_mixer, Rows):  # dB = g^T h, dG = (g diag(S + dS))^T h
            k = self.shape.k
            g, h = self._to_b(d_mixer.left.mT.to(self.dtype)).mT, d_mixer.right[:, :k].to(self.dtype)
            d_rotation, hGt = cayley_backward_low_rank(g * self._scale, h, self.state.saved)
            return d_rotation, (g * hGt).sum(0)
        dB = self._to_b(d_mixer[:, : self.shape.k].to(self.dtype))
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

    def outer_reference_backward(self, d_columns: Tensor) -> Tensor:
        """d outer by PyTorch."""
        shape, config, X = self.shape, self.config, self.state.X
        Y, U = (f.to(self.dtype) for f in self.outer_factors())
        L, dF = self.outer * shape.outer_scale(config), d_columns[:, : shape.l].contiguous()
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
