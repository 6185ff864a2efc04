"""Whole models: adapt the layers that a configuration means."""

from __future__ import annotations

import os

import torch
from torch import nn
from tqdm.auto import tqdm

from .config import LayerShape, SSVDOConfig, checked_config, checked_scale
from .distributed import factorize_together
from .factorize import check_weight, factorize
from .host import Host, exchange, hosts, onloaded, settle, warn_of_lowered
from .ops import lasting
from .sites import Plan, adapted
from .targets import find_targets


def _plan(model: nn.Module, config: SSVDOConfig) -> list[Plan]:
    """Checks every weight before any layer is changed."""
    plans: list[Plan] = []
    small: list[tuple[str, int]] = []
    for name, site in find_targets(model, config).items():
        if config.dropout and site.part:
            raise ValueError(f"dropout={config.dropout} does not fit {name}: the module of its experts takes W' whole; "
                             "allowed: 0, or exclude_modules without it")  # fmt: skip
        try:
            own = config.fitting(*site.sizes)
            plan = Plan(site, LayerShape.of(*site.sizes, own), own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if own.outer_rank < config.outer_rank:
            small.append((name, own.outer_rank))
        with onloaded(site.module):
            check_weight(plan.base.dense(), f"{name}.weight")
        plans.append(plan)
    warn_of_lowered(config.outer_rank, small, stacklevel=5)
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
        TypeError: a named layer is adapted already, or of a kind that no adapter fits.

    Examples:
        >>> model = apply_ssvdo(plain, SSVDOConfig(outer_rank=16, target_modules="all-linear"))
        >>> print(trainable_summary(model, quiet=True))
        7,200 trainable of 33,088 parameters (21.76%): 2 layers, inner 1,056, outer 6,144
    """
    config = checked_config(config)
    plans = _plan(model, config)
    if process_group is None:
        steps = tqdm(plans, desc="factorising", unit="layer", delay=2, leave=False)
        factors = [plan.factorize(cache_dir) for plan in steps]
    else:
        factors = factorize_together(plans, cache_dir, process_group)
    exchange(model, adapted(zip(plans, factors, strict=True)))
    freeze_rest(model)
    group_layers(model)
    return model


@lasting
@torch.no_grad()
def refactorize_ssvdo(model: nn.Module, *, cache_dir: str | os.PathLike[str] | None = None) -> nn.Module:
    """Factorises the weights that adapted layers hold now: after another base was loaded into them. Returns the model.

    What was trained keeps its numbers; they are coordinates in the singular bases, so that they mean another change.
    All weights are factorised before any layer changes. Raises as `apply_ssvdo` does.

    Examples:
        >>> model[0].weight.data = torch.randn(256, 64)  # another checkpoint
        >>> y = refactorize_ssvdo(model)(x)
    """
    made = []
    for name, layer in require_adapted(model).items():
        for adapter in layer.adapters():
            weight = layer.base(adapter).dense()
            factors = factorize(weight, adapter.shape, name=f"{name}.weight", cache_dir=cache_dir)
            made.append((adapter, factors, weight))
    for adapter, factors, weight in made:
        adapter.set_factors(factors, weight)
    return model


def set_scale(model: nn.Module, scale: float) -> nn.Module:
    """Lets all adapters turn part of the way: K, dS and L are taken `scale` times (`Adapter.scale`). Returns the model.

    0 is the base model, 1 the trained one; merged layers follow. Saved files hold what was trained, and no scale.

    Raises:
        ValueError: scale is no finite number, or the model has no adapted layer.

    Examples:
        >>> y = set_scale(model, 0.5)(x)
        >>> torch.allclose(set_scale(model, 0)(x), plain(x), atol=1e-5)
        True
    """
    checked_scale(scale)
    for layer in require_adapted(model).values():
        layer.rescale(scale)
    return model


def group_layers(model: nn.Module) -> None:
    """Lets layers of one shape be prepared together. For models that were not made by `apply_ssvdo`, or were copied.

    Examples:
        >>> copy = deepcopy(model)
        >>> group_layers(copy)
    """
    settle(model)


def freeze_rest(model: nn.Module) -> None:
    """Trains the adapters' parameters and nothing else."""
    ours = {id(p) for _, layer in hosts(model) for adapter in layer.adapters() for p in adapter.trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ours)


def require_adapted(model: nn.Module) -> dict[str, Host]:
    """The adapted layers by name; a ValueError where there are none."""
    layers = dict(hosts(model))
    if not layers:
        raise ValueError("model has no SSVDOLinear; call apply_ssvdo(model, config) first")
    return layers
