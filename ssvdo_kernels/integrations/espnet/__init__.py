"""SSVD-O in ESPnet: after `import ssvdo_kernels.integrations.espnet`, a recipe's

    use_adapter: true
    adapter: lora
    adapter_conf: {adapter_type: ssvdo, inner_ratio: 0.5, outer_rank: 64, target_modules: [feed_forward.w_1]}

adapts those layers. `python -m ssvdo_kernels.integrations.espnet.run -m espnet2.bin.asr_train ...` imports it first.

ESPnet builds the model, then the adapter and the optimiser, and loads the pretrained weights last; so a layer is
factorised at its first forward, and again where its weight has become another. W0 is never written to: what ESPnet
saves is W0 and the adapter (save_strategy all), or the adapter alone (adapter_only, required_grad_only), with the
fingerprint of the weight that it was trained on. Names contain "lora_", by which ESPnet chooses what to save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .create import FEED_FORWARD, PRESETS, create_ssvdo_adapter
from .layer import DeferredSSVDOLinear, espnet_module
from .ssvd import from_espnet_ssvd

__all__ = ["FEED_FORWARD", "PRESETS", "DeferredSSVDOLinear", "create_ssvdo_adapter", "from_espnet_ssvd",
           "plain_state_dict", "register", "registered"]  # fmt: skip


@torch.no_grad()
def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict with W' in place of W0 and no adapter: what a model without adapters loads.

    Raises:
        BaseMismatchError: an adapter was trained on another weight than the one that its layer holds.

    Examples:
        >>> from ssvdo_kernels.integrations.espnet import create_ssvdo_adapter
        >>> adapted = deepcopy(plain)
        >>> create_ssvdo_adapter(adapted, ["0", "2"], inner_ratio=0.25, outer_rank=16)
        >>> plain.load_state_dict(plain_state_dict(adapted))
        <All keys matched successfully>
    """
    layers = {f"{name}." if name else "": m for name, m in model.named_modules() if isinstance(m, DeferredSSVDOLinear)}
    found = {key: t for key, t in model.state_dict().items() if not any(f"{p}lora_" in key for p in layers)}
    return {**found, **{f"{prefix}weight": layer.adapted_weight() for prefix, layer in layers.items()}}


def register() -> list[str]:
    """Makes `adapter_type: ssvdo` known to the ESPnet that is installed. Returns what was registered; may run again."""
    done = []
    lora = espnet_module("espnet2.layers.lora")
    if lora is not None and hasattr(lora, "LINEAR_BACKENDS"):
        lora.LINEAR_BACKENDS["ssvdo"] = DeferredSSVDOLinear
        done.append("espnet2.layers.lora.LINEAR_BACKENDS")
    create = espnet_module("espnet2.layers.create_adapter")
    if create is not None:
        table = cast(dict[str, Callable[..., None]], create.create_adapter_fn_table)
        table["ssvdo"] = create_ssvdo_adapter
        if not getattr(table["lora"], "knows_ssvdo", False):
            table["lora"] = _choosing(table["lora"])
        done.append("espnet2.layers.create_adapter.create_adapter_fn_table")
    return done


def _choosing(original: Callable[..., None]) -> Callable[..., None]:
    def create(model: nn.Module, adapter_type: str = "lora", **conf: Any) -> None:
        if adapter_type.lower() == "ssvdo":
            return create_ssvdo_adapter(model, **{k: v for k, v in conf.items() if k not in ("rank", "alpha")})
        return original(model=model, **(conf if adapter_type == "lora" else {**conf, "adapter_type": adapter_type}))

    create.knows_ssvdo = True  # type: ignore[attr-defined]
    return create


registered = register()
