"""Quantised weights as base operators: how each format multiplies tokens, and gives its values back.

The packages are imported by whoever made the layer, never by us: a layer is known by the names of its types. Nothing
of W0 is kept dense; y W0, the factorisation and each preparation dequantise it, one layer at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops.base import QuantizedBase


class Format(NamedTuple):
    """A way to keep a weight. Each function takes the layer.

    base: its base operator. sizes: (out_features, in_features). unready: why it cannot be used; "" where it can.
    """

    base: Callable[[Any], QuantizedBase]
    sizes: Callable[[Any], tuple[int, int]]
    unready: Callable[[Any], str]


def _by_features(layer: Any) -> tuple[int, int]:
    return int(layer.out_features), int(layer.in_features)


def _nf4_unready(layer: Any) -> str:
    ready = getattr(layer.weight, "quant_state", None) is not None
    return "" if ready else "it is not quantised yet, as it has been moved to no device"


def _int8_unready(layer: Any) -> str:
    if layer.state.has_fp16_weights:
        return "it trains its weight (has_fp16_weights=True)"
    ready = layer.state.SCB is not None or getattr(layer.weight, "SCB", None) is not None
    return "" if ready else "it is not quantised yet, as it has been moved to no device"


def _nf4(layer: Any) -> QuantizedBase:
    bnb = sys.modules["bitsandbytes"]
    weight, state = layer.weight, layer.weight.quant_state

    def product(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = bnb.matmul_4bit(x if layer.compute_dtype is None else x.to(layer.compute_dtype), weight, state)
        return y

    def dequantize() -> Tensor:
        data, own = weight.data, state
        if getattr(own, "packing_format_for_cpu", False):  # what an inference on a CPU has repacked
            data, own = bnb.functional._convert_weight_packed_for_cpu_inverse(data, own)
        found: Tensor = bnb.functional.dequantize_4bit(data, own)
        return found

    return QuantizedBase(product, dequantize, state.dtype, (weight.data, state.absmax))


def _int8(layer: Any) -> QuantizedBase:
    bnb = sys.modules["bitsandbytes"]
    scale = layer.state.SCB if getattr(layer.weight, "SCB", None) is None else layer.weight.SCB

    def product(x: Tensor) -> Tensor:
        with torch.no_grad():
            if layer.weight.CB is not None:
                layer.init_8bit_state()
            y: Tensor = bnb.matmul(x, layer.weight, state=layer.state)
        return y

    def dequantize() -> Tensor:
        return layer.weight.data.float() * (scale[:, None] / 127)  # type: ignore[no-any-return]

    return QuantizedBase(product, dequantize, torch.float16, (layer.weight.data, scale))


def _torchao(layer: Any) -> QuantizedBase:
    weight = layer.weight  # not a detached one, whose tensors would count their versions apart
    inner = tuple(t for n in weight.__tensor_flatten__()[0] if isinstance(t := getattr(weight, n), Tensor))

    def product(x: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.linear(x.to(weight.dtype), weight)

    return QuantizedBase(product, weight.dequantize, weight.dtype, inner)


def _hqq(layer: Any) -> QuantizedBase:
    meta = (layer.meta[name] for name in ("scale", "zero"))
    inner = (layer.W_q.data, *(t for t in meta if isinstance(t, Tensor)))

    def product(x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer.matmul(x.to(layer.compute_dtype))  # type: ignore[no-any-return]

    return QuantizedBase(product, layer.dequantize, layer.compute_dtype, inner)


_FORMATS = {
    "bitsandbytes.nn.modules.Linear4bit": Format(_nf4, _by_features, _nf4_unready),
    "bitsandbytes.nn.modules.Linear8bitLt": Format(_int8, _by_features, _int8_unready),
    "hqq.core.quantize.HQQLinear": Format(_hqq, _by_features, lambda layer: ""),
}
_TORCHAO = Format(_torchao, lambda layer: (layer.weight.shape[0], layer.weight.shape[1]), lambda layer: "")


def format_of(layer: nn.Module) -> Format | None:
    """The quantised format of a layer's weight; None: it has none that is known here."""
    for kind in type(layer).__mro__:
        if (found := _FORMATS.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return found
    if type(layer) is nn.Linear and isinstance(weight := layer._parameters.get("weight"), Tensor):
        kind = type(weight.data)
        if kind.__module__.startswith("torchao.") and hasattr(kind, "dequantize"):
            return _TORCHAO
    return None
