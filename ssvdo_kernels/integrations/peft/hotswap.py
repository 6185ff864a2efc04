"""Another adapter in the place of one that is loaded, without a new model or a new compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, load_peft_weights
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from .config import SSVDOConfig
from .tuner import TunerLayer


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | Path, adapter_name: str = "default", torch_device: str | None = None,
    **kwargs: Any,
) -> None:  # fmt: skip
    """Copies the numbers of a saved adapter into those of the adapter `adapter_name`, which keeps its name.

    What `peft.utils.hotswap.hotswap_adapter` does for LoRA. The tensors stay where they are, so that compiled models
    and optimisers go on; the next forward computes with the new adapter.

    Args:
        model: a PeftModel, or one that torch.compile has wrapped.
        model_name_or_path, kwargs: the saved adapter, as `PeftModel.load_adapter` takes it.
        adapter_name: which of the model's is exchanged.
        torch_device: where the file is read to; None: the CPU.

    Raises:
        ValueError: there is no such adapter, it is merged, or the saved one has other layers, sizes or formula;
            BaseMismatchError: it was trained on another base. Nothing is changed.
    """
    whole: Any = getattr(model, "_orig_mod", model)
    known: dict[str, PeftConfig] = getattr(whole, "peft_config", {})
    if not isinstance(known.get(adapter_name), SSVDOConfig):
        ours = sorted(name for name, config in known.items() if isinstance(config, SSVDOConfig))
        raise ValueError(f"adapter_name={adapter_name!r} is no SSVD-O adapter of the model; allowed: {ours}")
    if any(adapter_name in m.merged_adapters for m in whole.modules() if isinstance(m, TunerLayer)):
        raise ValueError(f"adapter_name={adapter_name!r} is merged; call unmerge_adapter() first")
    config = PeftConfig.from_pretrained(str(model_name_or_path), **kwargs)
    if not isinstance(config, SSVDOConfig):
        raise ValueError(f"model_name_or_path={str(model_name_or_path)!r} holds an adapter of {config.peft_type}; "
                         "allowed: SSVDO")  # fmt: skip
    state = load_peft_weights(str(model_name_or_path), device=torch_device or "cpu", **kwargs)
    own = get_peft_model_state_dict(whole, adapter_name=adapter_name)
    bases = (".basis", ".null_basis")  # a file need not have them
    sizes, wanted = ({key: tuple(t.shape) for key, t in found.items() if not key.endswith(bases)}
                     for found in (state, own))  # fmt: skip
    if sizes != wanted:
        other = sorted(key for key in {*sizes, *wanted} if sizes.get(key) != wanted.get(key))
        raise ValueError(f"model_name_or_path={str(model_name_or_path)!r} does not fit the adapter {adapter_name!r}: "
                         f"{len(other)} tensors are missing, unknown or of another shape, as {other[0]}; allowed: an "
                         "adapter of the same layers and sizes")  # fmt: skip
    for key, tensor in own.items():
        if key.endswith(".formula") and state[key].tolist() != tensor.tolist():
            raise ValueError(f"{key}: trained with another formula (rotation, outer, outer_scale, tau, ...) than the "
                             f"adapter {adapter_name!r} is configured with")  # fmt: skip
    set_peft_model_state_dict(whole, state, adapter_name=adapter_name)
