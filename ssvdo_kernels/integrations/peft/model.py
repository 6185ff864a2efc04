"""The adapted model of PEFT: which layers get an adapter, and what PEFT asks of the whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...adapter import Adapter
from ...host import exchange, hosts, settle, warn_of_lowered
from ...targets import default_names, default_parameters, reason_against, shared_weights
from ...weight_readers import reader_of
from .combination import combine
from .config import SSVDOConfig, check_saved
from .layer import Linear
from .parameters import ParamWrapper, parameter_of
from .tuner import TunerLayer


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
        if isinstance(layer, TunerLayer):
            layer.factors_for(state_dict, f"{prefix}{name}.")


def _in_layers(names: Iterable[str], config: SSVDOConfig) -> list[str]:
    """The names in the layers that layers_to_transform asks for; PEFT does not look at names that are given whole."""
    if config.layers_to_transform is None:
        return list(names)
    found, own = [], copy.copy(config)
    for name in names:
        own.target_modules = [re.sub(r"^.*\.\d+\.", "", name)]
        if check_target_module_exists(own, name):
            found.append(name)
    return found


def _with_names(names: list[str], layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


class SSVDOModel(BaseTuner):  # type: ignore[misc]
    """The adapted model, as `get_peft_model` makes it."""

    prefix = "ssvdo_"
    tuner_layer_cls = TunerLayer

    def _create_and_replace(
        self,
        peft_config: SSVDOConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        if parameter_name is not None:
            return self._wrap_parameter(peft_config, adapter_name, target, target_name, parent, current_key,
                                        parameter_name)  # fmt: skip
        if isinstance(target, Linear):
            return target.update_layer(adapter_name, peft_config, current_key)
        if reason := reason_against(target, parent, target_name):
            raise ValueError(f"Target module {current_key} {reason}")
        weight = target._parameters.get("weight")
        for name, layer in hosts(self.model) if weight is not None else ():
            if isinstance(layer, Linear) and layer.get_base_layer()._parameters.get("weight") is weight:
                raise ValueError(f"Target modules {name} and {current_key} share one weight, and each would get an "
                                 "adapter of its own; allowed: one of them (exclude_modules)")
        made = Linear(target, adapter_name, peft_config, current_key)
        made.quantization_backend = _backend(target, self.model)
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        places = [(p, n) for p in self.model.modules() for n, child in p._modules.items() if child is target]
        for place, name in places:
            self._replace_module(place, name, made, target)

    def _wrap_parameter(
        self, config: SSVDOConfig, adapter: str, target: nn.Module, name: str, parent: nn.Module, key: str, own: str
    ) -> None:
        if isinstance(target, ParamWrapper) and target.parameter_name == own:
            return target.update_layer(adapter, config, key)
        inner: Any = target
        while isinstance(inner, ParamWrapper):
            inner = inner.base_layer
        if parameter_of(inner, own) is None:
            given = getattr(inner, own)
            raise ValueError(f"target_parameters: {key} has shape {tuple(given.shape)} and dtype {given.dtype}; "
                             "allowed: a floating matrix, or one for each expert (3 dimensions)")  # fmt: skip
        if reader := reader_of(parent, name):
            raise ValueError(f"target_parameters: {key} is multiplied by in {reader}, which never calls its module, "
                             "so that an adapter would do nothing")  # fmt: skip
        if id(getattr(inner, own)) in shared_weights(self.model):
            raise ValueError(f"target_parameters: {key} is shared with another module, where W' would not be; allowed: "
                             "parameters that are not tied")  # fmt: skip
        if config.dropout:
            raise ValueError(f"dropout={config.dropout} does not fit {key}: its module takes W' whole; allowed with "
                             "target_parameters: 0")  # fmt: skip
        check_saved(f"target_parameters with {key}")
        made = ParamWrapper(target, own, adapter, config, key)
        if adapter not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, name, made, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # which is made on the weight's device

    def _prepare_adapter_config(self, peft_config: SSVDOConfig, model_config: dict[str, Any]) -> SSVDOConfig:
        return peft_config  # `_prepare_model` knows the model, whatever its type

    def _prepare_model(self, peft_config: SSVDOConfig, model: nn.Module) -> None:
        """Names the layers that target_modules=None and "all-linear" mean.

        Raises:
            ValueError: the model has no feed-forward layers of a known name.
        """
        if peft_config.target_modules is None:
            names, parameters = default_names(model), default_parameters(model)
            if not names and not parameters and not peft_config.target_parameters:
                raise ValueError("Please specify `target_modules` in `peft_config`: no layer of the model has the name "
                                 "of a feed-forward layer")
            peft_config.target_modules = sorted(_in_layers(names, peft_config))
            peft_config.target_parameters = peft_config.target_parameters or parameters or None
        elif peft_config.target_modules == "all-linear":
            _maybe_include_all_linear_layers(peft_config, model)
            names, shared = cast("list[str]", peft_config.target_modules), shared_weights(model)
            found = [n for n in names if self._fits(model, n, shared)]
            peft_config.target_modules = sorted(_in_layers(found, peft_config))

    @staticmethod
    def _fits(model: nn.Module, name: str, shared: set[int]) -> bool:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(name)
        if isinstance(module, Linear):
            return True
        alone = id(module._parameters.get("weight")) not in shared
        return alone and not reason_against(module, model.get_submodule(parent), child)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter to the layers that its configuration names; on an error the model is as it was."""
        before = {id(layer): set(layer.ssvdo_adapters) for _, layer in hosts(model) if isinstance(layer, TunerLayer)}
        trained = [(p, p.requires_grad) for p in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            made = {id(m): m for m in model.modules() if isinstance(m, TunerLayer)}
            for key, layer in made.items():
                if key in before and adapter_name not in before[key] and adapter_name in layer.ssvdo_adapters:
                    del layer.ssvdo_adapters[adapter_name]
            exchange(model, {key: layer.base_layer for key, layer in made.items() if key not in before}, hooks=False)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            raise
        settle(model)
        if not before:
            model.register_load_state_dict_pre_hook(_check_bases)  # type: ignore[no-untyped-call]
        config = cast(SSVDOConfig, self.peft_config[adapter_name])
        if config.combination is not None:  # which lowers nothing anew
            return
        own = [adapter for _, layer in hosts(model) if isinstance(layer, TunerLayer)
               if adapter_name in layer.ssvdo_adapters for adapter in layer.of(adapter_name)]  # fmt: skip
        lowered = [(a.name, a.shape.l) for a in own if a.shape.l < config.core(a.name).outer_rank]
        warn_of_lowered(config.outer_rank, lowered, stacklevel=3)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear",
        **others: Any,
    ) -> None:  # fmt: skip
        """Adds an adapter that combines others as they are now, scales included. `set_adapter` makes it active.

        Args:
            adapters, weights: names, and a finite number for each.
            combination_type: "linear": W0 + sum_i w_i (W_i' - W0), exactly; in general no rotation. It keeps a copy of
                each adapter, and a forward costs as much as those of all. "parameters": one adapter that has sum_i w_i
                of K, dS and L: a rotation again, as cheap as one; for adapters of one formula and one singular basis.

        Raises:
            ValueError: an adapter does not exist or cannot be combined, the name is taken, a weight is no finite
                number, or the combination is one of LoRA's; nothing is changed. TypeError: another argument of LoRA's.
        """
        combine(self, adapters, weights, adapter_name, combination_type, others)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Gives each layer `adapter_names`, an adapter for each input of the batch, as LoRA's model does."""
        names, beams = kwargs.pop("adapter_names", None), kwargs.get("num_beams") or 1
        if names is None:
            yield kwargs
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [layer for layer in self.modules() if isinstance(layer, TunerLayer)]
        others = [m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)]  # modules_to_save, rows
        known = {name for layer in layers for name in layer.ssvdo_adapters} | {"__base__"}
        if unknown := sorted(set(names) - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        encoder = set(self.model.get_encoder().modules()) if beams > 1 and hasattr(self.model, "get_encoder") else set()
        repeated = [name for name in names for _ in range(beams)]  # beam search repeats its inputs, but an encoder's
        handles = [layer.register_forward_pre_hook(partial(_with_names, names if layer in encoder else repeated),
                                                   with_kwargs=True) for layer in (*layers, *others)]  # fmt: skip
        try:
            yield kwargs
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's own finds the name at the end alone, and a number may follow ours (experts, combinations)."""
        before, found, after = key.rpartition(f".ssvdo_adapters.{adapter_name}.")
        if found:
            return f"{before}.ssvdo_adapters.{after}"
        return super()._remove_adapter_name_from_key(key, adapter_name)  # type: ignore[no-any-return]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers() if not autocast_adapter_dtype else ():
            for adapter in layer.of(adapter_name) if adapter_name in layer.ssvdo_adapters else ():
                for p in adapter.trained:
                    p.data = p.data.to(layer.base(adapter).dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's; on an error every layer is as it was."""
        before = [(layer, list(layer.merged_adapters)) for layer in self._layers()]
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except BaseException:
            for layer, names in before:
                if layer.merged_adapters != names:
                    layer.unmerge()
                    layer.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # fmt: skip
        """PEFT's; every layer is checked before the first changes. No two W' are held at once, so that a safe merge
        makes each twice."""
        layers = self._layers()
        for layer in layers if merge else ():
            layer.check_mergeable(safe_merge, adapter_names)
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)
        for layer in layers:
            layer.handed_over()
        return unloaded

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SSVDOConfig, adapter_name: str, state_dict: dict[str, Tensor], **rest: Any
    ) -> dict[str, Tensor]:
        """PEFT's, which finds nothing below modules that FSDP1 has wrapped: their names in a state_dict are others."""
        found: dict[str, Tensor] = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **rest)
        names = [name for name, module in model.named_modules() if isinstance(module, TunerLayer)]
        below = tuple(f"{name}.ssvdo_adapters.".replace("_fsdp_wrapped_module.", "") for name in names)
        return {**found, **{key: t for key, t in state_dict.items() if key.startswith(below)}}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP leaves alone, by its names in a PeftModel and in this one: what adapters hold besides parameters,
        which never changes and would be sent in every forward otherwise."""
        own = [f"{name}.{buffer}" for name, module in self.named_modules() if isinstance(module, Adapter)
               for buffer in module._buffers]  # fmt: skip
        return [*own, *(f"base_model.{name}" for name in own)]

    def _layers(self) -> list[TunerLayer]:
        return [layer for _, layer in hosts(self.model) if isinstance(layer, TunerLayer)]
