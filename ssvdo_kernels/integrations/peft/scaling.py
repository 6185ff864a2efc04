"""How far a layer's adapters turn, as PEFT's users know it from LoRA's layers: by what their effect is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING

from torch import nn

from ...adapter import Adapter
from ...config import checked_scale


class Scaled:
    """What LoRA's layers have for this. A layer's merged weight follows."""

    if TYPE_CHECKING:  # what the layer has
        ssvdo_adapters: nn.ModuleDict
        merged_adapters: list[str]
        active_adapters: list[str]
        of: Callable[[str], list[Adapter]]
        merge: Callable[..., None]
        unmerge: Callable[[], None]

    @property
    def scaling(self) -> Scaling:
        """Adapter name -> `Adapter.scale`; what is written to it takes effect."""
        return Scaling(self)

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        self.set_scales(values)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Lets `adapter` turn by `scale` of its way (`Adapter.scale`); does nothing where the layer has none of it."""
        self.set_scales({adapter: scale})

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scales of the active adapters by `scale`."""
        self.set_scales({name: self.scaling[name] * scale for name in self._active()})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scales of the active adapters by `scale`; None: sets them to 1."""
        self.set_scales({name: 1.0 if scale is None else self.scaling[name] / scale for name in self._active()})

    def rescale(self, scale: float) -> None:
        self.set_scales(dict.fromkeys(self.ssvdo_adapters, scale))

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.ssvdo_adapters]

    def set_scales(self, values: Mapping[str, float]) -> None:
        """Sets the scales of the adapters that the layer has.

        Raises:
            ValueError: one is no finite number; nothing is changed. RuntimeError: as `unmerge`.
        """
        own = {name: checked_scale(scale) for name, scale in values.items() if name in self.ssvdo_adapters}
        changed = {name: scale for name, scale in own.items() if scale != self.scaling[name]}
        merged = list(self.merged_adapters) if changed.keys() & set(self.merged_adapters) else []
        if merged:
            self.unmerge()
        for name, scale in changed.items():
            for adapter in self.of(name):
                adapter.scale = scale
        if merged:
            self.merge(adapter_names=merged)


class Scaling(MutableMapping[str, float]):
    """The scales of a layer's adapters, read from them and written to them."""

    def __init__(self, layer: Scaled) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> float:
        if name not in self._layer.ssvdo_adapters:
            raise KeyError(name)
        return self._layer.of(name)[0].scale

    def __setitem__(self, name: str, scale: float) -> None:
        if name not in self._layer.ssvdo_adapters:
            raise KeyError(name)
        self._layer.set_scale(name, scale)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"the scale of {name!r} cannot be deleted; allowed: 1 (as it was trained)")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.ssvdo_adapters)

    def __len__(self) -> int:
        return len(self._layer.ssvdo_adapters)

    def copy(self) -> dict[str, float]:
        """The scales as they are now."""
        return dict(self)
