"""Adapters combined into one: exactly, as the sum of their weighted changes of W0, or by their parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...changes import Change
from ...config import checked_scale
from ...host import hosts
from .config import PART_OPTIONS, SSVDOConfig, check_saved
from .tuner import TunerLayer, new_adapter

KINDS = ("linear", "parameters")


class Combination(nn.ModuleList):
    """What a layer has of an adapter that is a sum of weighted changes: an adapter for each."""

    def __init__(self, weight: Tensor, config: SSVDOConfig, key: str) -> None:
        super().__init__()
        self.weights: list[float] = []
        for times, own in config.parts(key):
            self.append(new_adapter(weight, own, key, known=self.parts))
            self.weights.append(times)

    @property
    def parts(self) -> list[Adapter]:
        """The adapters."""
        return [cast(Adapter, part) for part in self]

    def changes(self) -> list[Change]:
        """The adapters with their weights."""
        return list(map(Change, self.parts, self.weights))


def combine(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], name: str, kind: str, others: Mapping[str, Any]
) -> None:
    """Adds the adapter `name` to the model of `tuner`; see `SSVDOModel.add_weighted_adapter`."""
    check_saved("add_weighted_adapter")
    configs = _checked(tuner.peft_config, adapters, weights, name, kind)
    if others:
        raise TypeError(f"arguments {sorted(others)} are LoRA's; allowed: adapters, weights, adapter_name and "
                        "combination_type")  # fmt: skip
    layers = [layer for _, layer in hosts(tuner.model) if isinstance(layer, TunerLayer)
              and any(one in layer.ssvdo_adapters for one in adapters)]  # fmt: skip
    for layer in layers:
        layer.arrive()
    if kind == "parameters":
        _check_alike(configs, adapters, layers)
        entries = None
    else:
        entries = [entry for one, config, weight in zip(adapters, configs, weights, strict=True)
                   for entry in _entries(config, weight, _keys(layers, [one]))]  # fmt: skip
    tuner.peft_config[name] = replace(
        configs[0], target_modules="|".join(map(re.escape, _keys(layers, adapters))), combination=entries,
        exclude_modules=None, layers_to_transform=None, layers_pattern=None, init_weights=True)  # fmt: skip
    try:
        tuner.inject_adapter(tuner.model, name)
    except BaseException:
        del tuner.peft_config[name]
        raise
    for layer in layers:
        here = [(one, w) for one, w in zip(adapters, weights, strict=True) if one in layer.ssvdo_adapters]
        made = layer.of(name)
        if kind == "parameters":
            _fill(layer, made[0], [(layer.of(one)[0], w) for one, w in here])
            continue
        for part, source in zip(made, (part for one, _ in here for part in layer.of(one)), strict=True):
            _fill(layer, part, [(source, 1.0)])


def _checked(
    known: dict[str, SSVDOConfig], adapters: Sequence[str], weights: Sequence[float], name: str, kind: str
) -> list[SSVDOConfig]:
    """The adapters' configurations. Raises where they cannot be combined."""
    if kind not in KINDS:
        raise ValueError(
            f"combination_type={kind!r} is one of LoRA's factors; allowed: 'linear' (exact, of the changes W' - W0, as "
            "LoRA's 'cat') and 'parameters'. For others, write each adapter as an exact LoRA (save_as_lora) and "
            "combine those")
    if name in known:
        raise ValueError(f"adapter_name={name!r} exists already; allowed: a new name")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"adapters has {len(adapters)} names, and weights {len(weights)} numbers; allowed: as many, "
                         "and one at least")  # fmt: skip
    for weight in weights:
        checked_scale(weight, "weights")
    for one in adapters:
        if one not in known:
            raise ValueError(f"Adapter {one} does not exist; allowed: {sorted(known)}")
        for option in ("target_parameters", "modules_to_save", "trainable_token_indices"):
            if getattr(known[one], option):
                raise ValueError(f"adapter {one!r} has {option}={getattr(known[one], option)!r}, which cannot be "
                                 "combined; allowed: adapters of layers alone")  # fmt: skip
        if known[one].bias != "none":
            raise ValueError(f"adapter {one!r} has bias={known[one].bias!r}: its biases are the model's, and cannot be "
                             "combined; allowed: 'none'")  # fmt: skip
    return [known[one] for one in adapters]


def _keys(layers: Iterable[TunerLayer], adapters: Iterable[str]) -> list[str]:
    """The names of the layers that have one of the adapters."""
    names = tuple(adapters)
    return [layer.adapters()[0].name for layer in layers if any(one in layer.ssvdo_adapters for one in names)]


def _entries(config: SSVDOConfig, weight: float, layers: list[str]) -> list[dict[str, Any]]:
    """What `SSVDOConfig.combination` says of one adapter; a combination is taken apart."""
    if config.combination is not None:
        return [{**entry, "weight": weight * entry["weight"]} for entry in config.combination]
    own = {option: getattr(config, option) for option in PART_OPTIONS}
    return [{"weight": float(weight), "layers": layers, "config": own}]


def _check_alike(configs: Sequence[SSVDOConfig], adapters: Sequence[str], layers: Iterable[TunerLayer]) -> None:
    """ValueError where the parameters of adapters mean different things."""
    for one, config in zip(adapters, configs, strict=True):
        if config.combination is not None:
            raise ValueError(f"adapter {one!r} is a combination itself; allowed with 'parameters': plain adapters")
        for option in PART_OPTIONS:
            theirs, first = getattr(config, option), getattr(configs[0], option)
            if theirs != first and option != "dropout":
                raise ValueError(f"{option} is {first!r} in {adapters[0]!r} and {theirs!r} in {one!r}, so that their "
                                 "parameters cannot be added; allowed: combination_type='linear'")  # fmt: skip
    for layer in layers:
        first, *more = [layer.of(one)[0] for one in adapters if one in layer.ssvdo_adapters]
        tensors = first.factors.tensors()
        for other in more:
            theirs = other.factors.tensors()
            if theirs.keys() != tensors.keys() or not all(torch.equal(t, tensors[n]) for n, t in theirs.items()):
                raise ValueError(f"{first.name}: its adapters were trained in different singular bases, so that their "
                                 "parameters cannot be added; allowed: combination_type='linear'")  # fmt: skip


@torch.no_grad()
def _fill(layer: TunerLayer, made: Adapter, sources: Sequence[tuple[Adapter, float]]) -> None:
    """Gives an adapter the weighted sum of the sources' parameters, as these are scaled, and their factors."""
    made.set_factors(sources[0][0].factors, layer.base(made).dense())
    for parameter in made.trained:
        parameter.zero_()
    for source, weight in sources:
        for parameter, own in zip(made.trained, source.trained, strict=True):
            parameter.add_(own.to(parameter.dtype), alpha=weight * source.scale)
