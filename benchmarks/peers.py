"""The methods that are compared: each makes a trainable module out of a pretrained nn.Linear."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, reference
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.factorize import compute_dtype, thin_svd


def frozen(linear: nn.Linear) -> nn.Module:
    """The floor: no parameter is trained, the input's gradient is computed."""
    return copy.deepcopy(linear).requires_grad_(False)


def full(linear: nn.Linear) -> nn.Module:
    """Full fine-tuning of weight and bias."""
    return copy.deepcopy(linear).requires_grad_(True)


class _Holder(nn.Module):
    """PEFT adapts children by name; this is the parent of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def _peft(model: nn.Module, config: Any, single: bool = False) -> nn.Module:
    """Adapters in the weights' dtype, or in float32 as is PEFT's default, which casts all tokens to and fro."""
    from peft import get_peft_model

    return get_peft_model(model, config, autocast_adapter_dtype=single)  # type: ignore[arg-type]


def with_lora(
    model: nn.Module, targets: tuple[str, ...], rank: int, *, single: bool = False, **options: Any
) -> nn.Module:
    """PEFT's LoRA on layers by name; `use_dora=True` gives DoRA, `init_lora_weights="pissa_niter_4"` PiSSA.
    single: float32 adapters beside half weights."""
    from peft import LoraConfig

    return _peft(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), **options), single)


def lora(linear: nn.Linear, rank: int = 64, **options: Any) -> nn.Module:
    """`with_lora` on one layer."""
    return with_lora(_Holder(copy.deepcopy(linear)), ("layer",), rank, **options)


def oft(linear: nn.Linear, block: int = 32) -> nn.Module:
    """PEFT's OFT with blocks of 32 (PEFT's default size)."""
    from peft import OFTConfig

    return _peft(_Holder(copy.deepcopy(linear)), OFTConfig(oft_block_size=block, target_modules=["layer"]))


class EspnetStyleSSVD(nn.Module):
    """SSVD as published code computes it (arXiv 2509.02830): a dense W' in every forward, first-order rotation.

    W' = U diag(S + dS) blockdiag(I - 2K, I) V^T, K unpacked through an index buffer of 2 x k(k-1)/2 integers. U, S, V
    are kept whole beside W0.
    """

    def __init__(self, linear: nn.Linear, inner_ratio: float) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.transposed = weight.shape[0] < weight.shape[1]
        exact = weight.to(compute_dtype(weight.dtype))
        u, s, v = (t.to(weight.dtype) for t in thin_svd(exact.mT if self.transposed else exact))
        self.k = max(1, int(inner_ratio * s.numel()))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        for name, tensor in {"u": u, "s": s, "v": v, "index": torch.triu_indices(self.k, self.k, 1)}.items():
            self.register_buffer(name, tensor)
        self.rotation = nn.Parameter(s.new_zeros(self.k * (self.k - 1) // 2))
        self.scale = nn.Parameter(s.new_zeros(self.k))

    def forward(self, x: Tensor) -> Tensor:
        upper = self.s.new_zeros(self.k, self.k).index_put((self.index[0], self.index[1]), self.rotation)
        rotation = torch.eye(self.k, dtype=x.dtype, device=x.device) - 2 * (upper - upper.mT)
        values = torch.cat([self.s[: self.k] + self.scale, self.s[self.k :]])
        rotated = torch.cat([rotation @ self.v[:, : self.k].mT, self.v[:, self.k :].mT])
        weight = self.u @ (values[:, None] * rotated)
        return nn.functional.linear(x, weight.mT if self.transposed else weight, self.bias)


class DenseSSVDO(nn.Module):
    """SSVD-O by its equations: `reference.adapted_weight` in every forward, U, S and V computed once and kept whole."""

    def __init__(self, linear: nn.Linear, config: SSVDOConfig) -> None:
        super().__init__()
        layer = SSVDOLinear.from_linear(linear, config)
        self.config, self.weight, self.bias = config, layer.weight, layer.bias
        for name, parameter in zip(PARAMETER_NAMES, layer.adapter.parts, strict=True):
            setattr(self, name, parameter)
        for name, tensor in zip("usv", reference.dense_factors(layer.weight, layer.adapter.shape), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.u, self.s, self.v)
        half = x.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(x.device.type, x.dtype if half else None, enabled=half):  # products in the tokens' dtype
            weight = reference.adapted_weight(
                self.weight, self.inner_rotation, self.inner_scale, self.outer, self.config, factors)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def peers(inner_ratio: float, outer_rank: int) -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """Name -> maker, for every method but our own; LoRA-like ranks are outer_rank, or 64 where that is 0."""
    rank = outer_rank or 64
    config = SSVDOConfig(inner_ratio=inner_ratio, outer_rank=outer_rank)
    return {
        "frozen": frozen,
        "full": full,
        "LoRA": lambda linear: lora(linear, rank),
        "DoRA": lambda linear: lora(linear, rank, use_dora=True),
        "PiSSA": lambda linear: lora(linear, rank, init_lora_weights="pissa_niter_4"),
        "OFT": oft,
        "ESPnet-style SSVD": lambda linear: EspnetStyleSSVD(linear, inner_ratio),
        "dense SSVD-O": lambda linear: DenseSSVDO(linear, config),
    }
