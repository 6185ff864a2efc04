"""PEFT's host: a linear layer with any number of adapters."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...adapter import Adapter
from ...config import LayerShape
from ...factorize import Factors, factorize
from ...fingerprint import Bases, CheckpointError, Fingerprint
from ...host import Host, outside_of_graphs, patched
from ...linear_maps import LinearMap, linear_map
from ...ops.base import Base
from ...origin import alike, coarser, weight_sketch
from .config import SSVDOConfig

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BASES = ("basis", "null_basis")
_CALLING = threading.RLock()  # a layer with hooks is called by one thread at a time


class Linear(Host, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with any number of SSVD-O adapters. Several active ones add their changes of W0."""

    adapter_layer_names = ("ssvdo_adapters",)
    other_param_names = ()

    ssvdo_adapters: nn.ModuleDict
    ssvdo_original: Tensor | None
    base_layer: nn.Module
    if TYPE_CHECKING:  # what BaseTunerLayer has
        merged: bool
        disable_adapters: bool
        active_adapters: list[str]
        get_base_layer: Callable[[], nn.Module]
        quantization_backend: Any
        set_adapter: Callable[..., None]
        _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SSVDOConfig, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ssvdo_adapters = nn.ModuleDict()
        self._with_basis: set[str] = set()
        self._merged_as: Tensor | None = None  # a sketch of the merged weight
        self.register_buffer("ssvdo_original", None, persistent=False)  # the weight, while adapters are merged
        self._quantized: list[nn.Module] = []  # the layer, while adapters are merged into a quantised copy
        self.out_features, self.in_features = self.map.sizes
        self._dequantises = not self.base().held
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, key)

    @property
    def map(self) -> LinearMap:
        """How the base layer computes x W0^T + b."""
        found = linear_map(self._quantized[0] if self._quantized else self.get_base_layer())
        assert found is not None
        return found

    def base(self, adapter: Adapter | None = None) -> Base:
        return self.map.base(self.ssvdo_original)

    def adapters(self) -> list[Adapter]:
        active = self.active_adapters
        names = sorted(self.ssvdo_adapters, key=lambda name: name not in active)
        return [self._adapter(name) for name in names]

    def _adapter(self, name: str) -> Adapter:
        return cast(Adapter, self.ssvdo_adapters[name])

    def update_layer(self, adapter_name: str, config: SSVDOConfig, key: str) -> None:
        """Adds an adapter.

        Raises:
            ValueError: the sizes do not fit this layer, or its weight is on the meta device or not finite.
        """
        weight = self.base().dense()
        own = config.core(key).fitting(self.out_features, self.in_features)
        shape = LayerShape.of(self.out_features, self.in_features, own)
        factors = factorize(weight, shape, name=f"{key}.weight", cache_dir=config.factor_cache)
        adapter = Adapter(shape, own, factors, weight, buffers=True)
        adapter.name = key
        self.ssvdo_adapters[adapter_name] = adapter
        (self._with_basis.add if config.include_basis else self._with_basis.discard)(adapter_name)
        if not config.init_weights and not adapter.inner_scale.is_meta:  # PEFT fills in what it loads
            _randomise(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.base().dense()
        for name in (n for n in self.ssvdo_adapters if n in self._with_basis):  # in one order in every process
            adapter = self._adapter(name)
            if adapter.basis is not None and not weight.is_meta:
                bases = Bases.of(weight, adapter.factors, adapter.shape)
                for part, vectors in zip(_BASES, (bases.V, bases.N), strict=True):
                    if vectors is not None:
                        destination[f"{prefix}ssvdo_adapters.{name}.{part}"] = vectors.detach().to(weight.dtype)

    def factors_for(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Factors]:
        """By adapter: the factors in which what `state_dict` holds of it is meant, where those at hand are others.

        Raises:
            BaseMismatchError: it was trained on another weight, or in another basis that it does not bring.
        """
        found = {}
        for name in self.ssvdo_adapters:
            adapter, own = self._adapter(name), f"{prefix}ssvdo_adapters.{name}."
            places = {n: state_dict.get(own + n) for n in Fingerprint.places(adapter.shape)}
            if any(t is None for t in places.values()) or adapter.basis is None:
                continue
            trained = Fingerprint.read(cast("dict[str, Tensor]", places), adapter.shape)
            if trained is None:
                continue
            formula = state_dict.get(own + "formula")
            if formula is not None and not torch.equal(formula.cpu(), adapter.formula.cpu()):
                raise CheckpointError(f"{adapter.name}: adapter {name!r} was trained with another formula (rotation, "
                                      "outer, outer_scale, tau, ...) than it is configured with here")  # fmt: skip
            weight, V = self.base().dense(), state_dict.get(own + "basis")
            trained.check(weight, adapter.name)
            bases = None if V is None else Bases(V, state_dict.get(own + "null_basis"))
            at_hand = adapter.factors
            used = trained.adopt(at_hand, weight, adapter.shape, bases, adapter.name)
            if used is not at_hand:
                found[name] = used
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, factors in self.factors_for(state_dict, prefix).items():
            self._adapter(name).set_factors(factors, self.base().dense())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapted weight into the base layer; W0 is kept beside it.

        Raises:
            ValueError: safe_merge, and the adapted weight is not finite; nothing is changed.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.ssvdo_adapters]
        if not names:
            return
        self.check_mergeable(False, names)
        self._put(self._merged_with(names, safe_merge))
        self.merged_adapters.extend(names)

    def check_mergeable(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Raises what `merge` would raise, and changes nothing."""
        given = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in given if n in self.ssvdo_adapters and n not in self.merged_adapters]
        if names and not self.base().held and not getattr(self.quantization_backend, "supports_merge", False):
            raise TypeError(f"{self._adapter(names[0]).name}: its weight is quantised in a way that PEFT cannot "
                            "quantise anew, so that nothing can be merged into it; allowed: bitsandbytes, HQQ, torchao "
                            "applied by Transformers")  # fmt: skip
        if safe_merge:
            self._merged_with(names, safe_merge)
        for name in names:
            self._adapter(name).prepared(self.base())

    def _merged_with(self, names: list[str], safe_merge: bool) -> Tensor:
        """The weight with these adapters' changes added."""
        base, original, made = self.base(), self.base().dense(), self._now()
        for name in names:
            adapted = self._adapter(name).adapted_weight(base)
            made = made + (adapted - original) if self.merged_adapters or name != names[0] else adapted
            if safe_merge and not torch.isfinite(made).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return made

    def _now(self) -> Tensor:
        """The weight that forwards go through, merged or not."""
        here = linear_map(self.get_base_layer())
        assert here is not None
        return here.base().dense().detach()

    def _put(self, weight: Tensor) -> None:
        """Makes `weight` the base layer's; a quantised layer is exchanged for one that is quantised anew."""
        layer: Any = self.get_base_layer()
        made, backend = self.map, self.quantization_backend
        if made.base().held:
            if self.ssvdo_original is None:
                self.ssvdo_original = layer.weight.data
            layer.weight.data = made.as_kept(weight)
            self._merged_as = weight_sketch(weight)
            return
        if not self._quantized:
            self._quantized = [layer]
        self.base_layer = copy.copy(self._quantized[0])  # what is quantised anew goes into a copy
        self.base_layer._parameters = dict(self.base_layer._parameters)
        if hasattr(self.base_layer, "state"):
            self.base_layer.state = copy.copy(self.base_layer.state)
        backend.set_base_weight(self, weight)

    def unmerge(self) -> None:
        """Gives the base layer the bits of W0 back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._quantized:
            self.base_layer = self._quantized.pop()
        else:
            layer: Any = self.get_base_layer()
            now = self._now()
            if self._merged_as is not None and not alike(self._merged_as, now, coarser(now.dtype)):
                raise RuntimeError(f"{self.adapters()[0].name}: the merged weight is no longer what was merged "
                                   "(a base was loaded, or it was trained), and unmerging would lose that; load the "
                                   "base after unmerge_adapter()")  # fmt: skip
            layer.weight.data, self.ssvdo_original, self._merged_as = self.ssvdo_original, None, None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = x W'^T + b."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [n for n in self.active_adapters if n in self.ssvdo_adapters]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        here = vars(self.base_layer)
        if "_hf_hook" not in here and "forward" not in here and not any(map(here.get, _CALL_HOOKS)):
            run = outside_of_graphs(self._adapted) if self._dequantises else self._adapted
            return run(x, names)  # type: ignore[no-any-return]
        with _CALLING:  # the base layer's hooks see the adapted layer, which stands in for its forward meanwhile
            if patched(self.base_layer):
                raise TypeError(f"the base layer of {self._adapter(names[0]).name} has been given a forward of its "
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

    def _adapted(self, x: Tensor, names: list[str]) -> Tensor:
        made, given = self.map, x.dtype
        base, bias = made.base(self.ssvdo_original), made.bias
        autocast = torch.is_autocast_enabled(base.device.type)
        if not autocast and base.held:
            x = self._cast_input_dtype(x, base.dtype)
        x = made.enter(x)
        y: Tensor = self.ssvdo_adapters[names[0]](x, base, bias)
        for name in names[1:]:
            y = y + (self.ssvdo_adapters[name](x, base, bias)
                     - nn.functional.linear(x, base.to(x.dtype).dense(), bias))  # fmt: skip
        return made.leave(y if autocast else y.to(given))

    def __repr__(self) -> str:
        return "ssvdo." + super().__repr__()


@torch.no_grad()
def _randomise(adapter: Adapter) -> None:
    """Draws an adapter that departs from the base model, for tests."""
    assert adapter.singular_values is not None
    if adapter.inner_rotation is not None:
        adapter.inner_rotation.normal_(0, 0.3 / adapter.shape.k**0.5)
    adapter.inner_scale.normal_(0, 0.05 * float(adapter.singular_values[0]))
    if adapter.outer is not None:
        adapter.outer.normal_(0, adapter.shape.outer_deviation(replace(adapter.config, init_angle=0.3)))
