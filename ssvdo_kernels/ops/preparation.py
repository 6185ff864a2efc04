"""Preparation: everything of a layer that depends on its parameters alone, once per optimiser step.

    B  = diag(S_k + dS) G                        (k x k)
    N  = diag(1 / S_k) B - I                     (k x k; zero rows where S_i has no usable inverse)
    F  = U_l' - U_l (outer.py)                   (large x l), then the q columns of U that have no usable inverse
    M  = [N; B[:l]; (B - diag(S_k))[k-q:k]]      ((width + l + q) x width), padded with G = I, dS = 0 where l > k

M is called `mixer` in code and F `columns`. With x on the small side, x' = x + (x V) N^T V^T and z = (x V) B_z^T
give y = x' A^T + z F^T; every form of the layer is built from M and F (matrices.py). Gradients come back by hand.

Kept between steps are F and (I + K)^-1 (or K, and G where it is a series), which the way back needs; M is made again
from these where it has been let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from ..factorize import Factors, compute_dtype
from ..origin import Origin
from ..watchers import not_there
from . import host
from .base import Base
from .complement import Projector
from .device import Verdict
from .dispatch import preparation
from .matrices import Matrices
from .outer import Outer, turned_part
from .products import cast, over_tokens, times
from .rotation import cayley_backward_low_rank, rotation_backward, rotation_forward

Parameters = tuple[Tensor | None, Tensor, Tensor | None]
"""inner_rotation (None where k = 1), inner_scale, outer (None where l = 0)."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


Formula = tuple[LayerShape, SSVDOConfig, float]
"""Sizes, configuration, and what the parameters are multiplied by."""


@dataclass(frozen=True)
class Source:
    """What a preparation is made from. name: how errors call the layer; origin: what knows the factors' weight; scale:
    what the parameters are multiplied by.

    What follows from the frozen tensors is made once, as views alone: a cache keeps a source while these are the same.
    """

    parameters: Parameters
    factors: Factors
    base: Base
    shape: LayerShape
    config: SSVDOConfig
    name: str
    origin: Origin | None
    scale: float = 1.0
    kept: ClassVar[bool] = True
    """Whether what is made from it may outlive a step."""

    @cached_property
    def formula(self) -> Formula:
        return self.shape, self.config, self.scale

    @cached_property
    def watched(self) -> tuple[Tensor, ...]:
        """The frozen tensors."""
        return *self.base.tensors, *self.factors.tensors().values()

    @property
    def parts(self) -> tuple[Formula, tuple[Tensor, ...], Parameters]:
        """What a cache compares."""
        return self.formula, self.watched, self.parameters

    def check_there(self) -> None:
        """Raises RuntimeError where FSDP or DeepSpeed has taken W0's numbers away."""
        if self.base.held and self.base.dense().ndim < 2:  # their shards are flat
            raise RuntimeError(not_there(f"{self.name}.weight", self.base.dense()))

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of the work."""
        return compute_dtype(self.parameters[1].dtype)

    @cached_property
    def engine(self) -> str:
        """What prepares: see `dispatch.preparation`."""
        return preparation(self.config.backend, self.parameters[1].device)[0]

    @cached_property
    def null(self) -> int:
        """Columns of the null basis that belong to adapted components: the first of up to max(k, l)."""
        return max(0, self.factors.null - (self.shape.width - self.shape.k))

    @cached_property
    def singular(self) -> Tensor:
        """S (width)."""
        return self.factors.singular_values.detach()[: self.shape.width]

    @cached_property
    def basis(self) -> Tensor:
        """V, d x width."""
        return self.factors.basis.detach()[:, : self.shape.width]

    @cached_property
    def tall(self) -> Tensor | None:
        """A, large x d; None where the base makes it anew."""
        return self.base.tall(self.shape.transposed) if self.base.held else None

    @cached_property
    def outer_scale(self) -> float:
        """L / outer."""
        return self.scale * self.shape.outer_scale(self.config)

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """What layers of one batch have in common, beside the parameters' sizes, which follow from it."""
        frozen = [(t.dtype, t.device, t.shape, t.stride(), t.untyped_storage().nbytes() > 0) for t in self.watched]
        return *self.formula, self.base.layout, self.parameters[1].dtype, self.factors.null, *frozen


class PassingSource(Source):
    """One whose frozen tensors are there for their module's use alone (ZeRO-3, accelerate's offloading): a view would
    hold them in memory."""

    kept = False
    tall = None

    @property
    def basis(self) -> Tensor:
        """V, d x width, as it is there now."""
        return self.factors.basis.detach()[:, : self.shape.width]


@dataclass
class Rows:
    """The mixer's gradient as its factors: dM = left^T right. left: T x (width + l + q); right: T x width."""

    left: Tensor
    right: Tensor


def check_pivot(info: int, name: str, config: SSVDOConfig) -> None:
    """Raises ArithmeticError where info, a bad pivot from 1, is not 0."""
    if info:
        raise ArithmeticError(
            f"{name}: Cholesky of Z^T Z + tau I failed at pivot {info} with tau={config.tau}; "
            "`outer` is not finite or too large for tau: use a larger tau or a smaller learning rate")


class Numbers:
    """What parameters held, where they can be looked at: on a CPU, as hashes by the compiled core, or as copies."""

    def __init__(self, parameters: Parameters) -> None:
        present = [p.detach() for p in parameters if p is not None]
        self._hashes = self._hashed(present)
        self._copies = [p.clone() for p in present] if None in self._hashes else []

    @staticmethod
    def _hashed(present: list[Tensor]) -> tuple[int | None, int | None]:
        """Of all but the last, and of the last; None where one is not contiguous, or there is no core."""
        return host.fingerprint(present[:-1]), host.fingerprint(present[-1:])

    def same(self, parameters: Parameters) -> bool:
        """Whether `parameters` hold the same bits (the same numbers, without the core)."""
        present = [p.detach() for p in parameters if p is not None]
        return all(map(torch.equal, self._copies, present)) if self._copies else self._hashed(present) == self._hashes

    def last_same(self, parameter: Tensor) -> bool:
        """The same of the last parameter that there is."""
        if self._copies:
            return torch.equal(self._copies[-1], parameter)
        return host.fingerprint([parameter.detach()]) == self._hashes[1]


def version(tensor: Tensor | None) -> int | None:
    """The counter of writes into the tensor; None where it has none."""
    return None if tensor is None or tensor.is_inference() else tensor._version


class News(NamedTuple):
    """What a GPU says of a preparation, later: of which layer, and as which of its batch."""

    verdict: tuple[Verdict, int] | None
    name: str
    config: SSVDOConfig
    dtype: torch.dtype

    def there(self) -> bool:
        """Whether `read` returns at once."""
        return self.verdict is None or self.verdict[0].there()

    def read(self) -> None:
        """Raises ArithmeticError if it is bad; waits for it if need be."""
        if self.verdict is None:
            return
        verdict, i = self.verdict
        inverses, pivots = verdict.read()
        check_pivot(pivots[i], self.name, self.config)
        if inverses[i]:
            raise ArithmeticError(f"{self.name}: found no inverse of I + K in {self.dtype}; `inner_rotation` is not "
                                  "finite or too large: use a smaller learning rate")


class Prepared(Matrices):
    """The matrices of one layer made from its parameters, and the way back to the parameters' gradients.

    `engines.prepare` makes it whole. The way back reads `outer` again: a copy would be memory for nothing, so an edit
    in place before it is an error, as PyTorch says of its own operations.
    """

    numbers: Numbers | None  # of parameters on a CPU, from before they were read
    saved: Tensor  # k x k: (I + K)^-1 for the Cayley form, else K
    series: Tensor | None  # G, where rotation="neumann"
    X: Tensor  # R^-T, l x l, upper triangular
    _verdict: tuple[Verdict, int] | None

    def __init__(self, source: Source) -> None:
        super().__init__()
        if source.origin is not None:
            source.origin.check(source.base, source.name, factors=source.factors)
        self.source, self.shape, self.config, self.name = source, source.shape, source.config, source.name
        on_cpu = source.parameters[1].device.type == "cpu"
        self.numbers = Numbers(source.parameters) if on_cpu else None
        self._version = version(source.parameters[2])
        rotation, shift, outer = source.parameters
        self.dtype, self.engine, self.null = source.dtype, source.engine, source.null
        self.shift = self._worked(shift)  # `engines` copies it: the way back wants dS as it is now
        self.rotation = self.shift.new_zeros(0) if rotation is None else self._worked(rotation)
        if source.scale != 1:
            self.shift = self.shift * source.scale
            self.rotation = self.rotation * source.scale
        self.singular = cast(source.singular, self.dtype)
        self.outer = None if outer is None else self._outer(self._worked(outer))
        self._verdict = None
        self.tokens = 0  # rows that have passed through this preparation: the planner's clock
        self.trained = 0  # those among them with gradients
        self.expected = 0  # rows with gradients that the preparation before this one served
        self.plans: dict[tuple[object, ...], str] = {}  # what the planner has found for this layer
        self.choices: dict[int, str] = {}  # by number of rows: what a forward with gradients saves for backward

    def _worked(self, parameter: Tensor) -> Tensor:
        worked = parameter.detach()
        alike = worked.dtype == self.dtype and worked.is_contiguous()
        return worked if alike else worked.to(self.dtype).contiguous()

    def _outer(self, outer: Tensor) -> Outer:
        shape, factors = self.shape, self.source.factors
        singular = cast(factors.singular_values, self.dtype)
        projector = Projector(self.source.base, shape.transposed, factors.basis, singular, shape.width,
                              factors.null_basis, shape.large, self.source.tall)  # fmt: skip
        U = factors.outer_basis if self.config.outer == "rotation" else None
        return Outer(outer, self.source.outer_scale, U, projector, self.config.tau)

    @property
    def basis(self) -> Tensor:
        """V, d x width."""
        return self.source.basis

    @property
    def scale(self) -> Tensor:
        """S_k + dS."""
        return self.singular[: self.shape.k] + self.shift

    @property
    def inverse(self) -> Tensor:
        """1 / S where that is of use."""
        return 1 / self.singular[: self.shape.k - self.null]

    @property
    def G(self) -> Tensor:
        """k x k."""
        if self.series is not None:
            return self.series
        G = self.saved * (2 if self.config.rotation == "cayley" else -2)
        G.diagonal().add_(-1 if self.config.rotation == "cayley" else 1)
        return G

    @property
    def Q(self) -> Tensor:
        """Z R^-T, large x l: F less what it has of U_l."""
        assert self.outer is not None
        return turned_part([self.outer], [self.X], [self.columns[:, : self.shape.l]], self.shape.large)[0]

    def serve(self, rows: int, grad: bool) -> None:
        """Counts rows that pass through this preparation."""
        self.tokens += rows
        self.trained += rows if grad else 0

    @property
    def lends(self) -> bool:
        """Whether the way back can take A^T dF from the tokens: of a tall layer on a CPU, of no weak component."""
        if self.engine == "cuda" or self.outer is None or self.shape.transposed or not self.shift.is_cpu:
            return False
        return self.outer.projector.even

    def stands(self, parameters: Parameters) -> bool:
        """Whether parameters on a CPU hold the numbers that this was made from, where the way back will read them."""
        if self.numbers is None or not self.numbers.same(parameters):
            return False
        own, now = self.source.parameters[2], parameters[2]
        if own is not None and now is not None and version(own) != self._version:
            if own.data_ptr() != now.data_ptr():
                return False
            self._version = version(own)  # written to, but with the same numbers
        return True

    def check_unedited(self) -> None:
        """Raises RuntimeError where `outer`, which the way back reads again, has been written to since the forward; on
        a CPU through ``.data``, too."""
        outer = self.source.parameters[2]
        same = version(outer) == self._version
        if not same or (outer is not None and self.numbers is not None and not self.numbers.last_same(outer)):
            raise RuntimeError(f"{self.name}: `outer` was changed in place between a forward and its backward")

    def verify(self, wait: bool = True) -> None:
        """Raises ArithmeticError if a GPU has bad news of this preparation. wait: for news, where there is none yet."""
        if self._verdict is None or not (wait or self._verdict[0].there()):
            return
        self.news.read()
        self._verdict = None

    @property
    def news(self) -> News:
        """What a GPU will say of this preparation, to be asked for without it."""
        return News(self._verdict, self.name, self.config, self.dtype)

    # -- forward -----------------------------------------------------------------------------------------------------
    def finish(
        self, inner: tuple[Tensor | None, Tensor, Tensor], F: Tensor, X: Tensor, verdict: tuple[Verdict, int] | None
    ) -> None:
        """Takes what `engines.prepare` made of this layer. inner: (G, where rotation="neumann", saved, mixer);
        F: large x l."""
        G, self.saved, self._mixer = inner
        self.series = G if self.config.rotation == "neumann" else None
        null = self.source.factors.null_basis
        self.columns = torch.cat([F, null[:, : self.null].to(self.dtype)], 1) if null is not None and self.null else F
        self.X, self._verdict = X, verdict

    def inner_reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """(G, saved, mixer) by PyTorch."""
        G, saved = rotation_forward(self.rotation, self.shape.k, self.config.rotation, self.config.neumann_terms)
        return G, saved, self.mixer_of(G)

    def remade_mixer(self) -> Tensor:
        return self.mixer_of(self.G)

    def mixer_of(self, G: Tensor) -> Tensor:
        """M from G."""
        k, l, q, width = self.shape.k, self.shape.l, self.null, self.shape.width  # noqa: E741
        S, scale = self.singular, self.scale
        mixer = G.new_zeros(width + l + q, width)
        N = mixer[: k - q, :k]
        torch.mul(G[: k - q], (scale[: k - q] * self.inverse)[:, None], out=N)
        N.diagonal().sub_(1)
        first = min(l, k)
        torch.mul(G[:first], scale[:first, None], out=mixer[width : width + first, :k])
        if l > k:
            mixer[width + k : width + l, k:].diagonal().copy_(S[k:])
        if q:
            torch.mul(G[k - q :], scale[k - q :, None], out=mixer[width + l :, :k])
            mixer[width + l :, k - q : k].diagonal().sub_(S[k - q : k])  # A holds S_i u_i v_i^T already
        return mixer

    # -- backward ----------------------------------------------------------------------------------------------------
    def wants_rows(self, tokens: int) -> bool:
        """Whether the way back is cheaper with the mixer's gradient given as `Rows` of that many tokens."""
        return self.config.rotation == "cayley" and self.engine != "cuda" and tokens < self.shape.k

    def inner_reference_backward(self, d_mixer: Tensor | Rows) -> tuple[Tensor, Tensor]:
        """(d inner_rotation, d inner_scale) by PyTorch."""
        if isinstance(d_mixer, Rows):  # dB = g^T h, dG = (g diag(S + dS))^T h
            k = self.shape.k
            g, h = self._to_b(d_mixer.left.mT.to(self.dtype)).mT, d_mixer.right[:, :k].to(self.dtype)
            d_rotation, hGt = cayley_backward_low_rank(g * self.scale, h, self.saved)
            return d_rotation, (g * hGt).sum(0)
        dB = self._to_b(d_mixer[:, : self.shape.k].to(self.dtype))
        d_rotation = rotation_backward(
            dB * self.scale[:, None], self.saved, self.config.rotation, self.config.neumann_terms)
        return d_rotation, (dB * self.G).sum(1)

    def of_product(self, d_product: Tensor) -> tuple[Tensor, Tensor]:
        """(dM, dF) from dC, C = [A V | F] M: dM = [V^T A^T dC; F^T dC], dF = dC B_z^T."""
        tall, dC = self.source.base.tall(self.shape.transposed), d_product.to(self.dtype)
        pulled = over_tokens(tall, dC.to(tall.dtype)) if dC.is_cuda else times(tall.mT, dC)
        return torch.cat([times(self.basis.mT, pulled.to(self.dtype)), self.columns.mT @ dC]), dC @ self.lower.mT

    def _to_b(self, d_mixer: Tensor) -> Tensor:
        """Rows of dB (k) from rows of dM (width + l + q): the adjoint of how the mixer is put together from B."""
        k, l, q, width = self.shape.k, self.shape.l, self.null, self.shape.width  # noqa: E741
        dB = d_mixer.new_zeros(k, d_mixer.shape[1])
        torch.mul(d_mixer[: k - q], self.inverse[:, None], out=dB[: k - q])
        first = min(l, k)
        dB[:first] += d_mixer[width : width + first]
        if q:
            dB[k - q :] += d_mixer[width + l :]
        return dB


def by_batch(many: Sequence[Prepared]) -> list[list[int]]:
    """Which of them were prepared together, by their places."""
    found: dict[int, list[int]] = {}
    for i, one in enumerate(many):
        found.setdefault(id(one if one.batch is None else one.batch), []).append(i)
    return list(found.values())
