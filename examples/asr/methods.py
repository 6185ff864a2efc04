"""The methods under comparison, each chosen by one word, and their sizes of equal budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn
from transformers import WhisperForConditionalGeneration

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, remove_ssvdo
from ssvdo_kernels.budget import fitted_ratio, layer_matrices, lora_rank, trained_numbers

FEED_FORWARD = ("fc1", "fc2")
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LAYERS = {"feed_forward": FEED_FORWARD, "attention": ATTENTION, "all": FEED_FORWARD + ATTENTION}
METHODS = ("full", "lora", "dora", "pissa", "ssvd_first_order", "ssvd", "ssvdo")
_CONFIG = {f.name for f in fields(SSVDOConfig)}


def config_of(settings: Mapping[str, Any]) -> SSVDOConfig:
    """The SSVD-O configuration in a run's settings (inner_ratio, outer_rank, tau, ... and `layers`)."""
    own = {k: v for k, v in settings.items() if k in _CONFIG}
    return SSVDOConfig(**{**own, "target_modules": LAYERS[settings.get("layers", "feed_forward")]})


def budget(model: nn.Module, settings: Mapping[str, Any]) -> int:
    """Trained numbers of SSVD-O as configured: the budget that the other methods are given, or `budget` itself."""
    return int(settings["budget"]) if "budget" in settings else trained_numbers(model, config_of(settings))


@dataclass(frozen=True)
class Adapted:
    """A model ready to train, and how to turn it into a plain one with what was learnt in its weights."""

    model: nn.Module
    bake: Callable[[], nn.Module]


def adapt(model: WhisperForConditionalGeneration, settings: Mapping[str, Any]) -> Adapted:
    """The model made ready to train by settings["method"], with a budget as near as it can be to SSVD-O's.

    full: every parameter. lora, dora, pissa: PEFT, the rank nearest to the budget, lora_alpha = rank.
    ssvd: SSVD-O with l = 0 and the p nearest to the budget; ssvd_first_order: the same with G = I - 2K, as published.
    ssvdo: as configured; with `budget`, l is what remains of it beside inner_ratio.

    Raises:
        ValueError: the method is unknown.
    """
    method = settings["method"]
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed: {', '.join(map(repr, METHODS))}")
    if method == "full":
        return Adapted(model.requires_grad_(True), lambda: model)
    config, numbers = config_of(settings), budget(model, settings)
    if method in ("lora", "dora", "pissa"):
        return _peft(model, config, method, numbers)
    if method in ("ssvd", "ssvd_first_order"):
        config = replace(config, outer_rank=0)
        config = replace(config, inner_ratio=fitted_ratio(model, config, numbers),
                         rotation="first_order" if method == "ssvd_first_order" else config.rotation)  # fmt: skip
    elif "budget" in settings:
        bare = replace(config, outer_rank=0)
        per_rank = trained_numbers(model, replace(config, outer_rank=1)) - trained_numbers(model, bare)
        config = replace(config, outer_rank=max(0, round((numbers - trained_numbers(model, bare)) / per_rank)))
    apply_ssvdo(model, config)
    return Adapted(model, lambda: remove_ssvdo(model, merge=True))


def _peft(model: nn.Module, config: SSVDOConfig, method: str, numbers: int) -> Adapted:
    from peft import LoraConfig, get_peft_model

    layers = layer_matrices(model, config)
    magnitudes = sum(m.out_features for m in layers.values()) if method == "dora" else 0
    rank = lora_rank(layers, numbers - magnitudes)
    options = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}.get(method, {})
    own = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(config.target_modules or ()), **options)  # type: ignore[arg-type]
    wrapped = get_peft_model(model, own)  # type: ignore[arg-type]
    return Adapted(wrapped.base_model.model, wrapped.merge_and_unload)  # type: ignore[arg-type]

