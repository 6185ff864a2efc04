"""SSVDOLayer: an adapter around a layer that is linear but no nn.Linear, or whose weight is quantised."""

from __future__ import annotations

from torch import Tensor, nn

from .adapter import Adapter
from .changes import Change, changed
from .config import LayerShape, SSVDOConfig
from .factorize import Factors
from .host import WrappingHost, outside_of_graphs
from .linear_maps import LinearMap, linear_map, refusal
from .ops.base import Base


class SSVDOLayer(WrappingHost):
    """y = x W'^T + b in place of any layer of linear_maps.py, which stays whole below it, as ``base_layer``.

    What the layer has, this one has too (``weight``, ``bias``, ``nf``, ...). A quantised weight stays quantised: tokens
    go through its own kernels, and nothing dense is kept beside it.

    Shape: x (..., in_features), or (N, in_features, ...) for a convolution, of the dtypes that the layer takes.

    Args:
        base_layer: the layer, checked before (`linear_maps.refusal`). factors: those of W0 as it is dequantised.
    """

    def __init__(self, base_layer: nn.Module, factors: Factors, shape: LayerShape, config: SSVDOConfig) -> None:
        super().__init__(base_layer)
        if (weight := base_layer._parameters.get("weight")) is not None:
            weight.requires_grad_(False)
        base = self.base()
        self._dequantises = not base.held
        self.adapter = Adapter(shape, config, factors, base.dense())

    @classmethod
    def of(
        cls, base_layer: nn.Module, factors: Factors, shape: LayerShape, config: SSVDOConfig, name: str
    ) -> SSVDOLayer:
        """The layer that takes the place of `base_layer`. name: how errors call it."""
        layer = cls(base_layer, factors, shape, config).train(base_layer.training)
        layer.adapter.name = name
        return layer

    @property
    def map(self) -> LinearMap:
        """How the layer computes x W0^T + b."""
        found = linear_map(self.base_layer)
        if found is None:
            raise TypeError(f"{self.adapter.name}.base_layer is {refusal(self.base_layer)}")
        return found

    @property
    def layout(self) -> str:
        return self.map.layout

    def base(self, adapter: Adapter | None = None) -> Base:
        return self.map.base()

    def parts(self) -> dict[str, Adapter]:
        return {"": self.adapter}

    def forward(self, x: Tensor) -> Tensor:
        """y = x W'^T + b."""
        y: Tensor = (outside_of_graphs(self._adapted) if self._dequantises else self._adapted)(x)
        return y

    def _adapted(self, x: Tensor) -> Tensor:
        made = self.map
        if self.adapter.drops:
            return made.leave(changed(x, [Change(self.adapter)], made.base(), made.bias, made.enter))
        return made.leave(self.adapter(made.enter(x), made.base(), made.bias))

    def adapted_weight(self) -> Tensor:
        """W' (out_features x in_features) for the current parameters; a new tensor."""
        return self.adapter.adapted_weight(self.base())

    def plain(self, merge: bool = False) -> nn.Module:
        """The layer itself or, with merge, one with W'; in place of a quantised one, nn.Linear."""
        made = self.map.with_weight(self.adapted_weight()) if merge else self.base_layer
        return made.train(self.training)
