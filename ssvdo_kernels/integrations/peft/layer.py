"""PEFT's host: a linear layer with any number of adapters."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...changes import Change, changed, changed_weight
from ...host import outside_of_graphs, patched
from ...linear_maps import LinearMap, linear_map
from ...ops.base import Base
from .combination import Combination
from .config import SSVDOConfig
from .tuner import TunerLayer, new_adapter

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CALLING = threading.RLock()  # a layer with hooks is called by one thread at a time


class Linear(TunerLayer):
    """A linear layer with any number of SSVD-O adapters. Several active ones add their changes of W0."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SSVDOConfig, key: str) -> None:
        super().__init__(base_layer, adapter_name)
        self._quantized: list[nn.Module] = []  # the layer, while adapters are merged into a quantised copy
        self.out_features, self.in_features = self.map.sizes
        self._dequantises = not self.base().held
        self.update_layer(adapter_name, config, key)

    @property
    def map(self) -> LinearMap:
        """How the base layer computes x W0^T + b."""
        found = linear_map(self._quantized[0] if self._quantized else self.get_base_layer())
        assert found is not None
        return found

    def base(self, adapter: Adapter | None = None) -> Base:
        return self.map.base(self.ssvdo_original)

    def of(self, name: str) -> list[Adapter]:
        found = self.ssvdo_adapters[name]
        return found.parts if isinstance(found, Combination) else [cast(Adapter, found)]

    def update_layer(self, adapter_name: str, config: SSVDOConfig, key: str) -> None:
        """Adds an adapter.

        Raises:
            ValueError: the sizes do not fit this layer, or its weight is not finite.
        """
        make = new_adapter if config.combination is None else Combination
        self.ssvdo_adapters[adapter_name] = make(self.base().dense(), config, key)
        self.added(adapter_name, config)

    def named_adapters(self) -> Iterator[tuple[str, Adapter]]:
        """(the name in a state_dict below the layer's, adapter) of each."""
        for name, found in self.ssvdo_adapters.items():
            if isinstance(found, Combination):
                yield from ((f"ssvdo_adapters.{name}.{i}", part) for i, part in enumerate(found.parts))
            else:
                yield f"ssvdo_adapters.{name}", cast(Adapter, found)

    def check_writable(self) -> None:
        if not self.base().held and not getattr(self.quantization_backend, "supports_merge", False):
            raise TypeError(f"{self.adapters()[0].name}: its weight is quantised in a way that PEFT cannot quantise "
                            "anew, so that nothing can be merged into it; allowed: bitsandbytes, HQQ, torchao applied "
                            "by Transformers")  # fmt: skip

    def adapted(self, names: list[str]) -> Tensor:
        return changed_weight(self._changes(names), self.base(), Adapter.adapted_weight)

    def _changes(self, names: list[str]) -> list[Change]:
        found = (self.ssvdo_adapters[name] for name in names)
        return [change for one in found for change in
                (one.changes() if isinstance(one, Combination) else [Change(cast(Adapter, one))])]  # fmt: skip

    def now(self) -> Tensor:
        here = linear_map(self.get_base_layer())
        assert here is not None
        return here.base().dense().detach()

    def put(self, weight: Tensor) -> None:
        """Makes `weight` the base layer's; a quantised layer is exchanged for one that is quantised anew."""
        layer: Any = self.get_base_layer()
        made, backend = self.map, self.quantization_backend
        if made.base().held:
            if self.ssvdo_original is None:
                self.ssvdo_original = layer.weight.data
            layer.weight.data = made.as_kept(weight)
            return
        if not self._quantized:
            self._quantized = [layer]
        self.base_layer = copy.copy(self._quantized[0])  # what is quantised anew goes into a copy
        self.base_layer._parameters = dict(self.base_layer._parameters)
        if hasattr(self.base_layer, "state"):
            self.base_layer.state = copy.copy(self.base_layer.state)
        backend.set_base_weight(self, weight)

    def put_back(self) -> None:
        if self._quantized:
            self.base_layer = self._quantized.pop()
            return
        layer: Any = self.get_base_layer()
        layer.weight.data, self.ssvdo_original = self.ssvdo_original, None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """W' - W0 has rank max(k, l): `convert_to_lora` and `save_as_lora` are exact at that rank."""
        return True

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W0, laid out as the layer's weight."""
        return self.map.as_kept(self.adapted([adapter]) - self.base().dense())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = x W'^T + b."""
        if (batch := kwargs.pop("adapter_names", None)) is not None and not self.disable_adapters:
            return self._mixed(x, batch, *args, **kwargs)
        if not (names := self.in_use()):
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        here = self.base_layer.__dict__
        if "_hf_hook" not in here and "forward" not in here and not any(map(here.get, _CALL_HOOKS)):
            run = outside_of_graphs(self._adapted) if self._dequantises else self._adapted
            return run(x, names)
        with _CALLING:  # the base layer's hooks see the adapted layer, which stands in for its forward meanwhile
            if patched(self.base_layer):
                raise TypeError(f"the base layer of {self.of(names[0])[0].name} has been given a forward of its "
                                "own, which the adapted layer does not call; allowed: its class's")
            place = "_old_forward" if "_hf_hook" in here else "forward"
            plain = here.get(place)
            here[place] = lambda x: self._adapted(x, names)
            try:
                return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                here.pop(place)
                if plain is not None:
                    here[place] = plain

    def _mixed(self, x: Tensor, batch: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each input of the batch by an adapter of its own; "__base__": by none."""
        if len(x) != len(batch):
            raise ValueError("Length of `adapter_names` should be the same as the number of inputs, but got "
                             f"{len(batch)} and {len(x)} respectively.")
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call "
                             "`unmerge_adapter` first.")
        self.arrive()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in set(batch) & set(self.ssvdo_adapters):
            rows = torch.tensor([own == name for own in batch], device=y.device)
            y[rows] = self._adapted(x[rows], [name]).to(y.dtype)
        return y

    def _adapted(self, x: Tensor, names: list[str]) -> Tensor:
        made, given = self.map, x.dtype
        base, bias = made.base(self.ssvdo_original), made.bias
        autocast = torch.is_autocast_enabled(base.device.type)
        if not autocast and base.held:
            x = self._cast_input_dtype(x, base.dtype)
        first = self.ssvdo_adapters[names[0]]
        if len(names) == 1 and not isinstance(first, Combination) and not first.drops:
            y = first(made.enter(x), base, bias)
        else:
            y = changed(x, self._changes(names), base, bias, made.enter)
        return made.leave(y if autocast else y.to(given))
