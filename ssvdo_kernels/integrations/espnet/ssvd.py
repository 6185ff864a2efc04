"""Checkpoints that ESPnet's own SSVD trained, as layers of this package."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...config import LayerShape, SSVDOConfig
from ...factorize import Factors, compute_dtype, without_inverse
from ...linear import SSVDOLinear

ROTATION_MAPS = {"linear": "first_order", "cayley": "cayley"}  # ESPnet's `rotation_map` -> SSVDOConfig's `rotation`


def from_espnet_ssvd(state_dict: Mapping[str, Tensor], rotation_map: str = "linear") -> dict[str, SSVDOLinear]:
    """Layers of a trained ESPnet SSVD checkpoint, by name.

    W' = U diag(s_pre + s sigmoid(gate)) blockdiag(G, I) V^T, of W'^T where in_features > out_features, with the skew K
    from `K_vec`. The base weight is made from the checkpoint's own factors, as ESPnet saves the merged one under
    `weight`.

    Args:
        state_dict: with `u`, `v`, `s_pre`, `s`, `gate`, `K_vec`, and `bias` if there is one, below each layer's name.
        rotation_map: that of the recipe's adapter_conf, which no checkpoint holds: "linear", ESPnet's default,
            G = I - 2K, or "cayley", G = (I + K)^-1 (I - K).

    Raises:
        ValueError: no such layer, or one that lacks a tensor or was never factorised, or whose merged `weight` was made
            with the other rotation_map.

    Examples:
        >>> layers = from_espnet_ssvd(torch.load("espnet.pth"))
        >>> layers["encoder.w_1"](x).shape
        torch.Size([8, 256])
    """
    if rotation_map not in ROTATION_MAPS:
        raise ValueError(f"rotation_map={rotation_map!r} is unknown; allowed: {', '.join(map(repr, ROTATION_MAPS))}")
    names = [key.removesuffix("K_vec") for key in state_dict if key == "K_vec" or key.endswith(".K_vec")]
    if not names:
        raise ValueError("state_dict holds no ESPnet SSVD layer (no key ends in 'K_vec')")
    found = {name.removesuffix("."): _from_ssvd(name, state_dict, rotation_map) for name in names}
    other = next(name for name in ROTATION_MAPS if name != rotation_map)
    for name, layer in zip(names, found.values(), strict=True):
        saved = state_dict[name + "weight"]
        ours = _distance(layer.adapted_weight(), saved)
        merged = 16 * torch.finfo(saved.dtype).eps < ours < _distance(layer.weight, saved)  # and not as it should be
        if merged and 4 * _distance(_from_ssvd(name, state_dict, other).adapted_weight(), saved) < ours:
            raise ValueError(f"{name}weight was merged with rotation_map={other!r}, not {rotation_map!r}; give the one "
                             "of the recipe's adapter_conf")  # fmt: skip
    return found


def _distance(weight: Tensor, saved: Tensor) -> float:
    """|weight - saved| / |saved|, Frobenius."""
    return float((weight.detach().double() - saved.double()).norm() / saved.double().norm())


@torch.no_grad()
def _from_ssvd(prefix: str, state_dict: Mapping[str, Tensor], rotation_map: str) -> SSVDOLinear:
    missing = [n for n in ("u", "v", "s_pre", "s", "gate", "weight") if prefix + n not in state_dict]
    if missing:
        raise ValueError(f"{prefix}K_vec stands without {missing}")
    u, v, singular, s, gate, saved, packed = (
        state_dict[prefix + n] for n in ("u", "v", "s_pre", "s", "gate", "weight", "K_vec"))
    if not bool(state_dict.get(prefix + "svd_initialized", torch.tensor(True))):
        raise ValueError(f"{prefix}svd_initialized is False: the checkpoint was saved before the layer was factorised")
    (rows, columns), k, d = saved.shape, s.numel(), singular.numel()
    shape = LayerShape(rows, columns, rows < columns, k, 0)
    config = SSVDOConfig(inner_ratio=min(1.0, (k + 0.5) / d), outer_rank=0, rotation=ROTATION_MAPS[rotation_map])
    dtype = compute_dtype(saved.dtype)
    q = without_inverse(singular, k, shape.large, saved.dtype)
    tall = (u.double() * singular.double()) @ v.double()
    weight = (tall.mT if shape.transposed else tall).to(saved.dtype).contiguous()
    factors = Factors(v[:k].mT.to(saved.dtype).contiguous(), singular[:k].to(dtype, copy=True), None,
                      u[:, k - q : k].to(saved.dtype).contiguous() if q else None)  # fmt: skip
    bias = state_dict.get(prefix + "bias")
    layer = SSVDOLinear(weight, None if bias is None else nn.Parameter(bias.clone()), factors, shape, config)
    layer.adapter.name = prefix.removesuffix(".") or "layer"
    if layer.adapter.inner_rotation is not None:
        layer.adapter.inner_rotation.copy_(packed)
    layer.adapter.inner_scale.copy_(s * torch.sigmoid(gate))
    return layer
