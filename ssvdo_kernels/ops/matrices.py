"""The matrices by which a layer's tokens are multiplied: two small ones, and the larger ones built from them on demand.

    M  (mixer)     (width + e) x width     [N; B_z]
    F  (columns)   large x e               e = l + q
    V  (basis)     d x width

`preparation` makes M and F from the parameters; every form of `linear` is built from these three. A matrix is kept in
the dtypes in which tokens have asked for it, and in no other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import LayerShape
from .base import Base
from .joined import Joined
from .products import times
from .streams import Queued


def up(n: int) -> int:
    """The next multiple of 16."""
    return -(-n // 16) * 16


def aligned(matrix: Tensor) -> Tensor:
    """The matrix with columns of zeros up to a multiple of 16: rows of what is multiplied by it are aligned then."""
    more = up(matrix.shape[1]) - matrix.shape[1]
    return torch.nn.functional.pad(matrix, (0, more)) if more else matrix


def unaligned(matrix: Tensor, width: int, extra: int, above: int) -> Tensor:
    """The rows that are not there for alignment, of one whose first `above` rows are N's, as those of `contraction`."""
    if above == width:
        return matrix[: width + extra]
    return torch.cat([matrix[:width], matrix[above : above + extra]])


_OTHER = {"folded": "folded_transposed", "folded_transposed": "folded",
          "contraction": "expansion", "expansion": "contraction"}  # fmt: skip
"""By matrix of the folded form, the other one that it takes."""
_FOLDED = frozenset(("folded",))


class Batch(Protocol):
    """Layers that were prepared together."""

    prepared: Sequence[Any]


class Matrices:
    """M, F and V of one layer; the rest is built once, when it is first asked for.

    Attributes: dtype: float32 or float64, in which everything is built; columns: F in it; basis: V in any dtype; built:
    the forms whose matrices exist already.
    """

    shape: LayerShape
    dtype: torch.dtype
    columns: Tensor
    _mixer: Tensor | None

    @property
    def basis(self) -> Tensor:
        """V, d x width."""
        raise NotImplementedError

    def __init__(self) -> None:
        self._mixer = None
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self.built: frozenset[str] = frozenset()
        self.sides: dict[tuple[str, torch.dtype, str], Any] = {}  # what sides.py has made of these
        self._batch: Callable[[], Batch | None] | None = None
        self.queued: Queued | None = None  # where what is built was built last

    @cached_property
    def joined(self) -> Joined:
        """Its own; a layer's is given from one preparation to the next."""
        return Joined()

    @property
    def batch(self) -> Batch | None:
        """Those that were prepared with these, while somebody has them."""
        return None if self._batch is None else self._batch()

    @batch.setter
    def batch(self, batch: Batch) -> None:
        self._batch = weakref.ref(batch)

    @property
    def extra(self) -> int:
        """e."""
        return self.columns.shape[1]

    @property
    def mixer(self) -> Tensor:
        """M in `dtype`; made again where it has been let go."""
        return self.remade_mixer() if self._mixer is None else self._mixer

    def remade_mixer(self) -> Tensor:
        """M from what a preparation keeps."""
        raise NotImplementedError

    def queue(self) -> None:
        """Notes that something was built on the current stream; one on which it is used waits."""
        self.queued = Queued(self.columns)

    def settle(self, dtype: torch.dtype) -> None:
        """Lets M go where tokens use it in another dtype than that of the work."""
        if dtype != self.dtype:
            self._mixer = None

    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        """A matrix by its name: mixer, columns, basis, or a property of this class."""
        found = self.kept.get((name, dtype))
        if found is None:
            if name in ("aligned_basis", "aligned_columns"):
                plain = name.removeprefix("aligned_")  # kept once, not as it is beside it
                own = self.kept.get((plain, dtype))
                found = aligned(getattr(self, plain).to(dtype) if own is None else own)
            else:
                built: Tensor = getattr(self, name)
                found = built.to(dtype)
                if found is built and name in ("mixer", "columns", "basis"):
                    return found
            self._keep(name, dtype, found)
        return found

    def _keep(self, name: str, dtype: torch.dtype, made: Tensor) -> None:
        self.kept[name, dtype] = made
        if name in ("core", "merged"):
            self.built |= {name}
        elif name in _OTHER and (_OTHER[name], dtype) in self.kept:
            self.built |= _FOLDED

    def put(self, folded: Iterable[tuple[tuple[str, torch.dtype], Tensor]], queued: Queued) -> None:
        """Takes matrices of the folded form, both of them and others, by name and dtype, that were built elsewhere."""
        self.kept.update(folded)
        self.built |= _FOLDED
        self.queued = queued

    def _rotated(self, rows: Tensor) -> Tensor:
        """rows V^T."""
        return rows @ self.basis.mT if self.basis.dtype == rows.dtype else times(self.basis, rows.mT).mT

    @property
    def lower(self) -> Tensor:
        """B_z, e x width."""
        return self.mixer[self.shape.width :]

    @property
    def folded(self) -> Tensor:
        """M V^T = [N V^T; B_z V^T], (width + e) x d."""
        return self._rotated(self.mixer).contiguous()

    @property
    def folded_transposed(self) -> Tensor:
        """N^T V^T, width x d."""
        return self._rotated(self.mixer[: self.shape.width].mT).contiguous()

    @property
    def expansion(self) -> Tensor:
        """[N^T V^T | B_z^T], width x (d + e), with rows and columns of zeros up to multiples of 16."""
        w, e, d = up(self.shape.width), up(self.extra), self.shape.d
        made = self.columns.new_zeros(w, d + e)
        made[: self.shape.width, :d] = self.folded_transposed
        made[: self.shape.width, d : d + self.extra] = self.lower.mT
        return made

    @property
    def contraction(self) -> Tensor:
        """M V^T, (width + e) x d, with rows of zeros likewise, after those of N and after those of B_z."""
        width, w, e = self.shape.width, up(self.shape.width), up(self.extra)
        folded = self.folded
        if (w, e) == (width, self.extra):
            return folded
        made = folded.new_zeros(w + e, self.shape.d)
        made[:width], made[w : w + self.extra] = folded[:width], folded[width:]
        return made

    @property
    def core(self) -> Tensor:
        """E = [I + V N^T V^T | V B_z^T], d x (d + e)."""
        d = self.shape.d
        core = times(self.basis, torch.cat([self.get("folded_transposed", self.dtype), self.lower.mT], 1))
        core[:, :d].diagonal().add_(1)
        return core

    def merged(self, base: Base, backend: str = "reference", keep: bool = True) -> Tensor:
        """W' (out x in) in the base's dtype, from W0: A' = A + [A V | F] M V^T, which is `contract` over A's rows."""
        found = self.kept.get(("merged", base.dtype))
        if found is None:
            weight = base.dense()
            tall = weight.mT if self.shape.transposed else weight
            if backend == "triton":
                from ..triton import launch

                names = "aligned_columns", "aligned_basis", "contraction"
                F, V, Q = (self.get(name, weight.dtype) for name in names)
                found = launch.merge(tall, F, V, Q, self.shape.transposed)
            else:
                folded = self.get("folded", self.dtype) if weight.dtype == self.dtype else self.folded
                change = self._left(tall) @ folded
                change = change.mT if self.shape.transposed else change
                found = torch.add(weight, change).to(weight.dtype).contiguous()
            if keep and self.joined.keeps:
                self._keep("merged", base.dtype, found)
                self.queue()
        return found

    def _left(self, tall: Tensor) -> Tensor:
        """[A V | F]."""
        return torch.cat([times(tall, self.basis.to(self.dtype)), self.columns], 1)
