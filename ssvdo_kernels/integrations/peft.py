"""SSVD-O as a method of Hugging Face PEFT: after `import ssvdo_kernels.integrations.peft`,

    model = peft.get_peft_model(model, peft.SSVDOConfig(target_modules=["fc1", "fc2"]))

and `save_pretrained`, `PeftModel.from_pretrained`, `set_adapter`, `merge_and_unload` and their like work as for any
other method. docs/peft.md lists what was tried. The factors of W0 are not saved: they are computed again from the base
weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import peft
import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import PeftType, register_peft_method
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..adapter import Adapter
from ..config import LayerShape
from ..config import SSVDOConfig as CoreConfig
from ..factorize import Factors, factorize
from ..fingerprint import Bases, Fingerprint
from ..host import Host, called, hosts, settle, warn_of_lowered
from ..linear_maps import LinearMap, linear_map
from ..ops.base import Base
from ..targets import default_names, reason_against

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BASES = ("basis", "null_basis")


def _register_type() -> None:
    """Adds SSVDO to PeftType, an enum that PEFT means to be closed."""
    if "SSVDO" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "SSVDO")
    member._name_, member._value_ = "SSVDO", "SSVDO"
    type.__setattr__(PeftType, "SSVDO", member)
    PeftType._member_names_.append("SSVDO")
    PeftType._member_map_["SSVDO"] = PeftType._value2member_map_["SSVDO"] = member


_register_type()


@dataclass
class SSVDOConfig(PeftConfig):  # type: ignore[misc]
    """SSVD-O's hyper-parameters for PEFT; those of `ssvdo_kernels.SSVDOConfig`, and PEFT's ways of choosing layers.

    Args:
        inner_ratio, outer_rank, tau, rotation, outer, outer_scale, neumann_terms, backend: see
            `ssvdo_kernels.SSVDOConfig`. A square layer has no complement and gets outer_rank 0.
        init_angle: radians; the default, 0, starts at the base model exactly, as PEFT's methods do.
        target_modules: list of suffixes, one regular expression or "all-linear"; None: the feed-forward layers.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in LoraConfig.
        inner_ratio_pattern, outer_rank_pattern: other values for single layers, by suffix or regular expression.
        init_weights: False draws random adapters (for tests).
        factor_cache: a folder in which factorisations are kept by weight content; None: none.
        include_basis: also saves V_k (d x max(k, l) a layer, in the weight's dtype), with which an adapter loads onto
            the same base in another dtype; without it such a base may be refused.

    Raises:
        ValueError: a value is out of range; the message names the argument, the value and what is allowed.
    """

    inner_ratio: float = field(default=0.5, metadata={"help": "share of the singular vectors that G rotates"})
    outer_rank: int = field(default=64, metadata={"help": "how many vectors of the large side turn"})
    tau: float = field(default=1e-2, metadata={"help": "regulariser of the Cholesky factor"})
    rotation: str = field(default="cayley", metadata={"help": "cayley, neumann or first_order"})
    outer: str = field(default="rotation", metadata={"help": "rotation or additive"})
    outer_scale: str | float = field(default="balanced", metadata={"help": "balanced, or a number"})
    init_angle: float = field(default=0.0, metadata={"help": "radians that outer vectors are turned by at first"})
    neumann_terms: int = field(default=4, metadata={"help": "terms of rotation='neumann'"})
    backend: str = field(default="auto", metadata={"help": "auto, reference or triton"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave alone"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained whole"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    inner_ratio_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "by layer"})
    outer_rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "by layer"})
    init_weights: bool = field(default=True, metadata={"help": "start at the base model"})
    factor_cache: str | None = field(default=None, metadata={"help": "folder for factorisations"})
    include_basis: bool = field(default=True, metadata={"help": "save V_k, for a base in another dtype"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SSVDO
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform cannot be used when target_modules is a str; "
                             "put the layers into the regular expression")  # fmt: skip
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform")
        self.core("")

    def core(self, key: str) -> CoreConfig:
        """The configuration of the layer called `key`."""
        ratios, ranks = self.inner_ratio_pattern or {}, self.outer_rank_pattern or {}
        return CoreConfig(
            inner_ratio=ratios.get(get_pattern_key(ratios.keys(), key), self.inner_ratio),
            outer_rank=ranks.get(get_pattern_key(ranks.keys(), key), self.outer_rank), tau=self.tau,
            rotation=self.rotation, outer=self.outer, outer_scale=self.outer_scale, init_angle=self.init_angle,
            neumann_terms=self.neumann_terms, backend=self.backend)  # fmt: skip


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
        self.register_buffer("ssvdo_original", None, persistent=False)  # the weight, while adapters are merged
        self._quantized: list[nn.Module] = []  # the layer, while adapters are merged into a quantised copy
        self.out_features, self.in_features = self.map.sizes
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
        base, original, made = self.base(), self.base().dense(), self._now()
        for name in names:
            adapted = self._adapter(name).adapted_weight(base)
            made = made + (adapted - original) if self.merged_adapters or name != names[0] else adapted
            if safe_merge and not torch.isfinite(made).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self._put(made)
        self.merged_adapters.extend(names)

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
            return
        if backend is None or not backend.supports_merge:
            raise TypeError("the layer is quantised in a way that PEFT cannot quantise anew, so that nothing can be "
                            "merged into it; allowed: bitsandbytes, HQQ, torchao applied by Transformers")
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
            layer.weight.data, self.ssvdo_original = self.ssvdo_original, None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = x W'^T + b."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [n for n in self.active_adapters if n in self.ssvdo_adapters]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        here = vars(self.base_layer)
        if "_hf_hook" not in here and not any(map(here.get, _CALL_HOOKS)):
            return self._adapted(x, names)
        place = "_old_forward" if "_hf_hook" in here else "forward"  # the base layer's hooks see the adapted layer
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
        y: Tensor = called(self._adapter(names[0]), base)(x, base, bias)
        for name in names[1:]:
            other = called(self._adapter(name), base)(x, base, bias)
            y = y + (other - nn.functional.linear(x, base.to(x.dtype).dense(), bias))
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


def _backend(layer: nn.Module, model: nn.Module) -> Any:
    """What quantises the layer's weight anew, as PEFT's own methods have it; None: nothing does."""
    try:
        from peft.utils import get_quantization_kwargs, resolve_quantization_backend

        return resolve_quantization_backend(layer, **get_quantization_kwargs(model))
    except (ImportError, ValueError):  # an older PEFT; torchao's configuration is not known
        return None


def _check_bases(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Raises for a wrong base before the first layer changes."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            layer.factors_for(state_dict, f"{prefix}{name}.")


class SSVDOModel(BaseTuner):  # type: ignore[misc]
    """The adapted model, as `get_peft_model` makes it."""

    prefix = "ssvdo_"
    tuner_layer_cls = Linear

    def _create_and_replace(
        self,
        peft_config: SSVDOConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, Linear):
            return target.update_layer(adapter_name, peft_config, current_key)
        if reason := reason_against(target, parent, target_name):
            raise ValueError(f"Target module {current_key} {reason}")
        made = Linear(target, adapter_name, peft_config, current_key)
        made.quantization_backend = _backend(target, self.model)
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_bases)

    def _prepare_adapter_config(self, peft_config: SSVDOConfig, model_config: dict[str, Any]) -> SSVDOConfig:
        return peft_config  # `_prepare_model` knows the model, whatever its type

    def _prepare_model(self, peft_config: SSVDOConfig, model: nn.Module) -> None:
        """Names the layers that target_modules=None and "all-linear" mean.

        Raises:
            ValueError: the model has no feed-forward layers of a known name.
        """
        if peft_config.target_modules is None:
            names = default_names(model)
            if not names:
                raise ValueError("Please specify `target_modules` in `peft_config`: no layer of the model has the name "
                                 "of a feed-forward layer")
            peft_config.target_modules = list(names)
        elif peft_config.target_modules == "all-linear":
            _maybe_include_all_linear_layers(peft_config, model)
            names = cast("list[str]", peft_config.target_modules)
            peft_config.target_modules = [n for n in names if self._fits(model, n)]

    @staticmethod
    def _fits(model: nn.Module, name: str) -> bool:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(name)
        return isinstance(module, Linear) or not reason_against(module, model.get_submodule(parent), child)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        settle(model)
        config = cast(SSVDOConfig, self.peft_config[adapter_name])
        own = [(name, layer.ssvdo_adapters[adapter_name], config.core(name).outer_rank) for name, layer in hosts(model)
               if isinstance(layer, Linear) and adapter_name in layer.ssvdo_adapters]  # fmt: skip
        lowered = [(name, cast(Adapter, a).shape.l) for name, a, asked in own if cast(Adapter, a).shape.l < asked]
        warn_of_lowered(config.outer_rank, lowered, stacklevel=3)


if "SSVDO" not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="ssvdo", config_cls=SSVDOConfig, model_cls=SSVDOModel, prefix="ssvdo_")
    peft.SSVDOConfig, peft.SSVDOModel = SSVDOConfig, SSVDOModel
