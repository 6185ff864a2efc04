"""The matrices by which a layer's tokens are multiplied: two small ones, and the larger ones built from them on demand.

    M  (mixer)     (width + e) x width     [N; B_z]
    F  (columns)   large x e               e = l + q
    V  (basis)     d x width

`preparation` makes M and F from the parameters; every form of `linear` is built from these three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LayerShape


class Matrices:
    """M, F and V of one layer in float32 or float64; the rest is built once, when it is first asked for.

    Attributes: mixer M ((width + e) x width); columns F (large x e); basis V (d x width), in mixer's dtype.
    """

    def __init__(self, shape: LayerShape, mixer: Tensor, columns: Tensor, basis: Tensor) -> None:
        self.shape, self.dtype = shape, mixer.dtype
        self.mixer, self.columns, self.basis = mixer, columns, basis.to(mixer.dtype)
        self._casts: dict[tuple[str, torch.dtype], Tensor] = {}
        self._folded: Tensor | None = None
        self._folded_transposed: Tensor | None = None
        self._core: Tensor | None = None
        self._merged: Tensor | None = None

    def wants_rows(self, tokens: int) -> bool:
        """Whether the mixer's gradient is cheaper to use as `Rows` of that many tokens; see preparation.py."""
        return False

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

    def merged_backward(
        self, weight: Tensor, d_weight: Tensor, need_mixer: bool = True, need_columns: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dM, dF) from dW': dM = ([A V | F]^T dA') V,  dF = dA' (B_z V^T)^T, dA' = dW' or its transpose."""
        tall, d_tall = (weight.mT, d_weight.mT) if self.shape.transposed else (weight, d_weight)
        d_tall, d_mixer, d_columns = d_tall.to(self.dtype), None, None
        if need_mixer:
            left = torch.cat([tall.to(self.dtype) @ self.basis, self.columns], 1)
            d_mixer = (left.mT @ d_tall) @ self.basis
        if need_columns:
            d_columns = d_tall @ self.folded[self.shape.width :].mT
        return d_mixer, d_columns

    @property
    def built(self) -> frozenset[str]:
        """The forms whose matrices exist already."""
        have = {"folded": self._folded is not None and self._folded_transposed is not None,
                "core": self._core is not None, "merged": self._merged is not None}
        return frozenset(name for name, there in have.items() if there)
