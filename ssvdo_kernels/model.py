"""Whole models: choose layers by name and adapt them."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from .config import LayerShape, SSVDOConfig
from .distributed import factorize_together
from .factorize import Factors, check_weight, factorize
from .host import Host, check_plain, hosts, places, settle
from .linear import SSVDOLinear
from .ops import lasting
from .weight_readers import reader_of

# Feed-forward layers: ESPnet (macaron too), Whisper / BART, wav2vec2 / BERT, LLaMA.
FEED_FORWARD = (
    "feed_forward.w_1", "feed_forward.w_2", "feed_forward_macaron.w_1", "feed_forward_macaron.w_2",
    "fc1", "fc2",
    "intermediate_dense", "output_dense", "intermediate.dense", "output.dense",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


def matches(name: str, patterns: str | tuple[str, ...] | None) -> bool:
    """Whether a module's dotted name is meant: one of the suffixes (whole components) or the regular expression."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


def _attention_output_dense(name: str) -> bool:
    # BERT calls both "output.dense"; the one inside attention is no feed-forward layer.
    return name.endswith("attention.output.dense")


def wanted(name: str, config: SSVDOConfig) -> bool:
    """Whether `config` means the layer of this name."""
    if matches(name, config.exclude_modules):
        return False
    if config.target_modules is None:
        return matches(name, FEED_FORWARD) and not _attention_output_dense(name)
    if config.target_modules == "all-linear":
        return True
    return matches(name, config.target_modules)


def find_targets(model: nn.Module, config: SSVDOConfig) -> dict[str, nn.Linear]:
    """Name -> layer for every linear layer that `config` names, in the model's order.

    ``"all-linear"`` takes every nn.Linear but the output embedding (a layer whose weight is shared with an embedding or
    that `model.get_output_embeddings()` returns) and layers of quantised or otherwise derived types.

    Raises:
        ValueError: nothing matches (the message lists close names), or target_modules is no regular expression.
        TypeError: a named layer is adapted already, or no plain nn.Linear.
    """
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if isinstance(pattern, str) and pattern != "all-linear":
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{field}={pattern!r} is no regular expression: {error}") from None
    everything = config.target_modules == "all-linear"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[str, nn.Linear] = {}
    linear_names: list[str] = []
    foreign: list[str] = []
    for name, module, parent, child in places(model):
        if any(name.startswith(outside) for outside in foreign):
            continue
        if isinstance(module, (nn.Linear, Host)):
            linear_names.append(name)
        if not isinstance(module, Host) and hasattr(module, "adapter_layer_names"):  # PEFT's mark of a tuner's layer
            foreign.append(f"{name}.")
        if not name or not wanted(name, config) or (everything and not _is_linear(module)):
            continue
        if isinstance(module, Host):
            raise TypeError(f"{name} is adapted already; call remove_ssvdo(model) first")
        if f"{name}." in foreign:
            raise TypeError(f"{name} is a {_kind(module)}, another adapter; allowed: torch.nn.Linear itself "
                            "(merge_and_unload the other adapter first, or leave this layer out)")
        if type(module) is not nn.Linear:
            if not everything and (isinstance(module, nn.Linear) or _is_leaf_with_weight(module)):
                raise TypeError(f"{name} is a {_kind(module)}; allowed: torch.nn.Linear itself (no quantised layer, no "
                                "subclass)")
            continue
        if everything and (module is head or id(module.weight) in embeddings):
            continue
        if reader := reader_of(parent, child):
            said = f"{name}: {reader} multiplies by its weight and never calls it, so an adapter would do nothing"
            if everything or config.target_modules is None:
                warnings.warn(f"{said}; left out", stacklevel=4)
                continue
            raise TypeError(f"{said}; allowed: layers that are called")
        if child == "_orig_mod":
            raise TypeError(f"{name} is compiled by itself; allowed: a layer that is not (adapt, then torch.compile)")
        check_plain(module, name)
        found[name] = module
    if not found:
        raise ValueError(_nothing_found(config, linear_names))
    _check_ties(found)
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Host)) or hasattr(module, "adapter_layer_names")


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check_ties(found: Mapping[str, nn.Linear]) -> None:
    names: dict[int, str] = {}
    for name, linear in found.items():
        other = names.setdefault(id(linear.weight), name)
        if other != name:
            raise ValueError(f"{other} and {name} share one weight, and each would get an adapter of its own; allowed: "
                             "one of them (exclude_modules), one shared module, or weights that are not tied")


def _is_leaf_with_weight(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and hasattr(module, "weight")


def _nothing_found(config: SSVDOConfig, names: list[str]) -> str:
    wanted = config.target_modules if config.target_modules is not None else FEED_FORWARD
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    tails = sorted({re.sub(r"^(.*\.)?\d+\.", "", name) for name in names})
    near = {t for a in asked for t in difflib.get_close_matches(a, tails, 5, 0.4)}
    shown = sorted(near) or tails[:12]
    hint = f"linear layers with close names: {shown}" if shown else "the model has no nn.Linear"
    return f"target_modules={config.target_modules!r} matches no linear layer of the model; {hint}"


@dataclass(frozen=True)
class Plan:
    """A layer to adapt."""

    name: str
    linear: nn.Linear
    config: SSVDOConfig

    @property
    def shape(self) -> LayerShape:
        """Its sizes."""
        return LayerShape.of(self.linear.out_features, self.linear.in_features, self.config)

    def factorize(self, cache_dir: str | os.PathLike[str] | None) -> Factors:
        """Its weight's factors."""
        return factorize(self.linear.weight, self.shape, name=f"{self.name}.weight", cache_dir=cache_dir)

    def adapt(self, factors: Factors) -> SSVDOLinear:
        """The layer that takes its place."""
        return SSVDOLinear.of(self.linear, factors, self.shape, self.config, self.name)


def _plan_layers(model: nn.Module, config: SSVDOConfig) -> list[Plan]:
    """Checks every layer before any is changed."""
    plans, square = [], []
    for name, linear in find_targets(model, config).items():
        own = config.fitting(linear.out_features, linear.in_features)
        if own.outer_rank < config.outer_rank:
            square.append(name)
        try:
            LayerShape.of(linear.out_features, linear.in_features, own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        check_weight(linear.weight, f"{name}.weight")
        plans.append(Plan(name, linear, own))
    if square:
        warnings.warn(
            f"{len(square)} square layers have no complement and get outer_rank=0 (inner part only): "
            f"{', '.join(square[:4])}{', ...' if len(square) > 4 else ''}", stacklevel=3)
    return plans


@lasting
def apply_ssvdo(
    model: nn.Module,
    config: SSVDOConfig | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> nn.Module:
    """Adapts the layers that `config` names, in place, and freezes all the rest of the model. Returns the model.

    The pretrained weights must be loaded. A layer that stands in several places stays one layer. All layers are
    checked, then factorised, then exchanged: on an error the model is as it was. A progress bar shows after 2 seconds.

    Args:
        config: None takes `SSVDOConfig()`. cache_dir: a folder in which factorisations are kept by weight content.
        process_group: processes that all hold the same weights and all call this (torch.distributed.group.WORLD):
            each factorises its share of the layers and sends it to the others. None: every process works alone.

    Raises:
        ValueError: nothing matches, a size does not fit, or a weight is on the meta device or not finite.
        TypeError: a named layer is adapted already, or no plain nn.Linear.
    """
    config = SSVDOConfig() if config is None else config
    plans = _plan_layers(model, config)
    if process_group is None:
        steps = tqdm(plans, desc="factorising", unit="layer", delay=2, leave=False)
        factors = [plan.factorize(cache_dir) for plan in steps]
    else:
        factors = factorize_together(plans, cache_dir, process_group)
    adapted = {id(plan.linear): plan.adapt(found) for plan, found in zip(plans, factors, strict=True)}
    exchange(model, adapted)
    freeze_rest(model)
    group_layers(model)
    return model


@torch.no_grad()
def refactorize_ssvdo(model: nn.Module, *, cache_dir: str | os.PathLike[str] | None = None) -> nn.Module:
    """Factorises the weights that adapted layers hold now: after another base was loaded into them. Returns the model.

    What was trained keeps its numbers; they are coordinates in the singular bases, so that they mean another change.
    All weights are factorised before any layer changes. Raises as `apply_ssvdo` does.
    """
    made = []
    for name, layer in require_adapted(model).items():
        weight = layer.base().weight
        made += [(adapter, factorize(weight, adapter.shape, name=f"{name}.weight", cache_dir=cache_dir), weight)
                 for adapter in layer.adapters()]  # fmt: skip
    for adapter, factors, weight in made:
        adapter.set_factors(factors, weight)
    return model


def group_layers(model: nn.Module) -> None:
    """Lets layers of one shape be prepared together. For models that were not made by `apply_ssvdo`, or were copied."""
    settle(model)


def freeze_rest(model: nn.Module) -> None:
    """Trains the adapters' parameters and nothing else."""
    ours = {id(p) for _, layer in hosts(model) for adapter in layer.adapters() for p in adapter.trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ours)


def exchange(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Puts replacements[id(child)] in every place where that child stands."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def require_adapted(model: nn.Module) -> dict[str, Host]:
    """The adapted layers by name; a ValueError where there are none."""
    layers = dict(hosts(model))
    if not layers:
        raise ValueError("model has no SSVDOLinear; call apply_ssvdo(model, config) first")
    return layers
