"""The base operator: what an adapter needs of the layer that it adapts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def matrix_of(weight: Tensor, layout: str) -> Tensor:
    """W0, out_features x in_features: a view of a weight of this layout."""
    if layout == "transposed":
        return weight.mT
    return weight.flatten(1) if layout == "flattened" else weight


class Base:
    """x W0^T and y W0, and W0's values, of a frozen weight in whatever form it is kept.

    dtype, device: of the values, and of the tokens that it multiplies. held: whether `dense` costs nothing, as the
    values lie in memory. passing: whether they lie there for this forward alone. layout: how `stored` holds W0, see
    `matrix_of`.
    """

    dtype: torch.dtype
    device: torch.device
    held = True
    passing = False
    layout = "plain"

    @property
    def stored(self) -> Tensor:
        """The tensor that W0 is a view of; elsewhere W0."""
        return self.dense()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the operator is made of: watched for changes."""
        raise NotImplementedError

    @property
    def saved(self) -> tuple[Tensor, ...]:
        """Those of them that a backward saves, so that autograd notices a change before it."""
        return tuple(t for t in self.tensors if not t.is_inference())

    @property
    def trains(self) -> bool:
        """Whether somebody has asked for gradients of W0."""
        return False

    def dense(self) -> Tensor:
        """W0, out_features x in_features: the weight itself or a view, or new where it is kept otherwise."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> Base:
        """The same for tokens of another dtype (autocast)."""
        raise NotImplementedError

    def forward(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x W0^T + bias. x: T x in_features."""
        raise NotImplementedError

    def transpose(self, y: Tensor, out: Tensor | None = None) -> Tensor:
        """y W0. y: T x out_features."""
        weight = self.dense()
        return torch.mm(y, weight) if out is None else torch.mm(y, weight, out=out)

    def tall(self, transposed: bool) -> Tensor:
        """A, large x d: W0, or W0^T where it is `transposed`; of any floating dtype."""
        weight = self.dense().detach()
        return weight.mT if transposed else weight


class DenseBase(Base):
    """A weight that is an ordinary tensor: a matrix, out_features x in_features, or one that holds it in a layout."""

    def __init__(self, weight: Tensor, layout: str = "plain", passing: bool = False) -> None:
        self._stored, self.layout, self.passing = weight, layout, passing
        self.weight = weight if layout == "plain" else matrix_of(weight, layout)
        self.dtype, self.device = weight.dtype, weight.device

    @property
    def stored(self) -> Tensor:
        return self._stored

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self._stored,)

    @property
    def trains(self) -> bool:  # FSDP1's views of a flat parameter require gradients, and mean nothing by it
        if not self.weight.requires_grad:
            return False
        flat = self.weight._base if self.weight._is_view() else None
        return not getattr(flat, "_is_flat_param", False)

    @property
    def saved(self) -> tuple[Tensor, ...]:
        return () if self.weight.is_inference() else (self.weight,)

    def dense(self) -> Tensor:
        return self.weight

    def to(self, dtype: torch.dtype) -> DenseBase:
        return self if self.dtype == dtype else DenseBase(self.weight.to(dtype), passing=self.passing)

    def forward(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if out is None:
            return torch.nn.functional.linear(x, self.weight, bias)
        return torch.mm(x, self.weight.mT, out=out)


class QuantizedBase(Base):
    """A quantised weight: tokens go through its own kernels, y W0 and W0's values through dequantised ones.

    Args:
        product: x -> x W0^T, for x of `own`. dequantize: W0 in `own`. own: the dtype of what is dequantised.
        tensors: what is kept. dtype: of the tokens, where that is another one.
    """

    held = False

    def __init__(
        self, product: Callable[[Tensor], Tensor], dequantize: Callable[[], Tensor], own: torch.dtype,
        tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self._product, self._dequantize, self._own, self._tensors = product, dequantize, own, tensors
        self.dtype, self.device = dtype or own, tensors[0].device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._tensors

    def dense(self) -> Tensor:
        return self._dequantize().detach().to(self.dtype)

    def to(self, dtype: torch.dtype) -> QuantizedBase:
        return QuantizedBase(self._product, self._dequantize, self._own, self._tensors, dtype)

    def forward(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y = self._product(x.detach().to(self._own)).detach().to(self.dtype)
        if bias is not None:
            y = y + bias
        return y if out is None else out.copy_(y)
