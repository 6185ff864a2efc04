"""The base operator: what an adapter needs of the layer that it adapts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LayerShape


class DenseBase:
    """x W0^T and y W0 for a weight that is an ordinary matrix, out_features x in_features.

    Another kind of base (quantised, stored transposed) has the same five members.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the operator is made of: saved for a backward, and watched for changes."""
        return (self.weight,)

    def to(self, dtype: torch.dtype) -> DenseBase:
        """The same for tokens of another dtype (autocast)."""
        return self if self.weight.dtype == dtype else DenseBase(self.weight.to(dtype))

    def forward(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x W0^T + bias. x: T x in_features."""
        if bias is not None:
            return torch.addmm(bias, x, self.weight.mT)
        return torch.mm(x, self.weight.mT) if out is None else torch.mm(x, self.weight.mT, out=out)

    def transpose(self, y: Tensor, out: Tensor | None = None) -> Tensor:
        """y W0. y: T x out_features."""
        return torch.mm(y, self.weight) if out is None else torch.mm(y, self.weight, out=out)

    def tall(self, shape: LayerShape) -> Tensor:
        """A, large x d: W0, or W0^T for a wide layer, as a view; of any floating dtype."""
        weight = self.weight.detach()
        return weight.mT if shape.transposed else weight
