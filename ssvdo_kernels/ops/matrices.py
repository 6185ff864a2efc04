"""The matrices by which a layer's tokens are multiplied: two small ones, and the larger ones built from them on demand.

    M  (mixer)     (width + e) x width     [N; B_z]
    F  (columns)   large x e               e = l + q
    V  (basis)     d x width

`preparation` makes M and F from the parameters; every form of `linear` is built from these three. A matrix is kept in
the dtypes in which tokens have asked for it, and in no other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LayerShape
from .base import Base
from .products import times


class Matrices:
    """M, F and V of one layer; the rest is built once, when it is first asked for.

    Attributes: dtype: float32 or float64, in which everything is built; columns: F in it; basis: V in any dtype.
    """

    shape: LayerShape
    dtype: torch.dtype
    columns: Tensor
    basis: Tensor
    _mixer: Tensor | None
    _kept: dict[tuple[str, torch.dtype], Tensor]

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

    def settle(self, dtype: torch.dtype) -> None:
        """Lets M go where tokens use it in another dtype than that of the work."""
        if dtype != self.dtype:
            self._mixer = None

    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        """A matrix by its name: mixer, columns, basis, lower, folded, folded_transposed, expansion or core."""
        found = self._kept.get((name, dtype))
        if found is None:
            built: Tensor = getattr(self, name)
            found = built.to(dtype)
            if found is not built or name not in ("mixer", "columns", "basis"):
                self._kept[name, dtype] = found
        return found

    def _rotated(self, rows: Tensor) -> Tensor:
        """rows V^T."""
        return times(self.basis, rows.mT).mT

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
        """[N^T V^T | B_z^T], width x (d + e)."""
        return torch.cat([self.folded_transposed, self.lower.mT], 1)

    @property
    def core(self) -> Tensor:
        """E = [I + V N^T V^T | V B_z^T], d x (d + e)."""
        d = self.shape.d
        core = times(self.basis, torch.cat([self.get("folded_transposed", self.dtype), self.lower.mT], 1))
        core[:, :d].diagonal().add_(1)
        return core

    def merged(self, base: Base, backend: str = "reference", keep: bool = True) -> Tensor:
        """W' (out x in) in the base's dtype, from W0: A' = A + [A V | F] M V^T, which is `contract` over A's rows."""
        found = self._kept.get(("merged", base.dtype))
        if found is None:
            weight = base.dense()
            tall = weight.mT if self.shape.transposed else weight
            if backend == "triton":
                from ..triton import launch

                F, V, Q = (self.get(name, weight.dtype) for name in ("columns", "basis", "folded"))
                found = launch.merge(tall, F, V, Q, self.shape.transposed)
            else:
                folded = self.get("folded", self.dtype) if weight.dtype == self.dtype else self.folded
                change = self._left(tall) @ folded
                change = change.mT if self.shape.transposed else change
                found = torch.add(weight, change).to(weight.dtype).contiguous()
            if keep:
                self._kept["merged", base.dtype] = found
        return found

    def _left(self, tall: Tensor) -> Tensor:
        """[A V | F]."""
        return torch.cat([times(tall, self.basis.to(self.dtype)), self.columns], 1)

    def merged_backward(
        self, weight: Tensor, d_weight: Tensor, need_mixer: bool = True, need_columns: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dM, dF) from dW': dM = ([A V | F]^T dA') V,  dF = dA' (B_z V^T)^T, dA' = dW' or its transpose."""
        tall, d_tall = (weight.mT, d_weight.mT) if self.shape.transposed else (weight, d_weight)
        d_tall, d_mixer, d_columns = d_tall.to(self.dtype), None, None
        if need_mixer:
            d_mixer = self._left(tall).mT @ d_tall @ self.basis.to(self.dtype)
        if need_columns:
            d_columns = d_tall @ self.get("folded", self.dtype)[self.shape.width :].mT
        return d_mixer, d_columns

    @property
    def built(self) -> frozenset[str]:
        """The forms whose matrices exist already."""
        names = {name for name, _ in self._kept}
        folded = {"folded"} if {"folded", "folded_transposed"} <= names or {"folded", "expansion"} <= names else set()
        return frozenset(folded | (names & {"core", "merged"}))
