"""`create_ssvdo_adapter`: what ESPnet calls for `adapter_type: ssvdo`, and the layers that recipes name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from torch import nn

from ...config import SSVDOConfig
from ...factorize import compute_dtype
from ...host import Host, Place, exchange, places, settle, warn_of_lowered
from ...linear_maps import kind_of
from ...targets import reason_against
from .layer import DeferredSSVDOLinear

FEED_FORWARD = ("feed_forward.w_1", "feed_forward.w_2", "feed_forward_macaron.w_1", "feed_forward_macaron.w_2")
PRESETS = {
    "myst": ("attn.linear_q", "attn.linear_k", "attn.linear_v", "attn.linear_out", "embed.out", "embed.out.0",
             "cgmlp.channel_proj1.0", "cgmlp.channel_proj2", *FEED_FORWARD, "merge_proj", "output_layer"),
}  # fmt: skip
"""`target_modules` by name. myst: the layers that ESPnet's SSVD recipe for OWSM on MyST trains. Of that recipe's list
`decoder.embed.0`, an embedding, is left out: with its rank of 0 ESPnet trains nothing there. `embed.out.0` is what
`embed.out` was called up to ESPnet 202511."""


def create_ssvdo_adapter(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    bias_type: str | None = "none",
    cache_dir: str | None = None,
    dropout_rate: float = 0.0,
    **options: Any,
) -> None:
    """Adapts the layers named in `target_modules`, in place, freezes the rest and ends in eval(), as ESPnet does.

    Args:
        model: any module; its pretrained weights may be loaded before or afterwards.
        target_modules: a list of what the names of linear layers end in, by ESPnet's rule ("attn.linear_q" means
            "self_attn.linear_q", too), or a name of `PRESETS`. None: FEED_FORWARD, as far as they are there.
            Whisper in ESPnet: query, key, value, attn.out, mlp.0, mlp.2.
        bias_type: "none" trains no bias, "all" every bias of the model, "lora_only" those of adapted layers.
        cache_dir: a folder in which factorisations are kept by weight content.
        dropout_rate: in [0, 1), of the input of the change W' - W0.
        options: fields of SSVDOConfig: inner_ratio, outer_rank, tau, rotation, ...

    Raises:
        ValueError: nothing matches, a value is out of range, or a layer is adapted already; nothing is changed.
        TypeError: a named layer is of a kind that no adapter fits.

    Examples:
        >>> create_ssvdo_adapter(plain, ["0", "2"], inner_ratio=0.25, outer_rank=16)
        >>> type(plain[0]).__name__
        'DeferredSSVDOLinear'
    """
    if bias_type not in ("none", "all", "lora_only", None):
        raise ValueError(f"bias_type={bias_type!r} is unknown; allowed: 'none', 'all', 'lora_only'")
    known = {f.name for f in fields(SSVDOConfig)} - {"target_modules", "exclude_modules", "orientation", "dropout"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown options {unknown}; allowed: {sorted(known)}")
    made: dict[int, nn.Module] = {}
    weights: dict[int, str] = {}
    for name, linear, parent, child in _targets(model, target_modules):
        if isinstance(linear, Host):
            raise ValueError(f"{name} is adapted already; one adapter is enough")
        if isinstance(linear, nn.Embedding):
            raise TypeError(f"{name} is an embedding, which SSVD-O does not adapt; leave it out of target_modules")
        if type(linear) is not nn.Linear:
            raise TypeError(f"{name} is a {kind_of(linear)}; allowed: torch.nn.Linear")
        if reason := reason_against(linear, parent, child):
            raise TypeError(f"{name} {reason}")
        if (other := weights.setdefault(id(linear.weight), name)) != name:
            raise ValueError(f"{other} and {name} share one weight; allowed: one of them")
        made[id(linear)] = _deferred(name, linear, cache_dir=cache_dir, lora_dropout=dropout_rate, **options)
    exchange(model, made)
    layers = [m for m in model.modules() if isinstance(m, DeferredSSVDOLinear)]
    trained = {id(p) for layer in layers for p in layer.adapter_parameters}
    if bias_type == "all":
        trained |= {id(p) for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"}
    if bias_type == "lora_only":
        trained |= {id(layer.bias) for layer in layers}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    settle(model)
    lowered = [(m.lora_adapter.name, m.lora_adapter.shape.l) for m in layers if m.lora_adapter.shape.l < m.asked]
    warn_of_lowered(layers[0].asked, lowered, stacklevel=2)
    model.eval()


def _targets(model: nn.Module, target_modules: Sequence[str] | str | None) -> list[Place]:
    """The modules that are named. A preset, or None, means linear layers alone; a list means all that it names."""
    listed = isinstance(target_modules, (list, tuple, set)) and all(isinstance(t, str) for t in target_modules)
    if listed:
        names = tuple(cast(Sequence[str], target_modules))
    elif target_modules is None:
        names = FEED_FORWARD
    elif isinstance(target_modules, str) and target_modules in PRESETS:
        names = PRESETS[target_modules]
    else:
        raise ValueError(f"target_modules={target_modules!r} is of the wrong type; allowed: a list of what names end "
                         f"in, or a preset: {', '.join(map(repr, PRESETS))}")
    found = [p for p in places(model) if p.name.endswith(names) and (listed or isinstance(p.module, (nn.Linear, Host)))]
    if not found:
        raise ValueError(f"Target modules {list(names)} not found in the base model.")
    if listed and (idle := [name for name in names if not any(p.name.endswith(name) for p in found)]):
        warnings.warn(f"target_modules: {idle} match no layer of the model", stacklevel=3)
    return found


def _deferred(name: str, linear: nn.Linear, **options: Any) -> DeferredSSVDOLinear:
    try:
        rows, columns = linear.weight.shape
        layer = DeferredSSVDOLinear(columns, rows, linear.bias is not None, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    layer.lora_adapter.name = name
    weight = linear.weight
    layer.to(device=weight.device, dtype=compute_dtype(weight.dtype))
    layer.weight = cast(nn.Parameter, linear.weight)
    layer.bias = cast("nn.Parameter | None", linear.bias)
    return layer
