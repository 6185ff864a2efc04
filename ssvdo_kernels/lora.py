"""An adapter as LoRA: W' - W0 = B A, exactly, of rank max(k, l), or the best one of a smaller rank.

With A the tall one of W0 and W0^T (large x d), A' - A = [A V | F] M V^T (ops/matrices.py): V has max(k, l) columns, so
that this is a product of that rank. Its truncation to rank r is optimal in the Frobenius norm, by the singular values
of a max(k, l)-square matrix. What serves LoRA serves the result: PEFT, vLLM, CTranslate2's converters.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .files import as_file, write_atomically
from .host import OwnHost, onloaded
from .model import require_adapted
from .ops.base import Base
from .ops.products import times

CONFIG_FILE, MODEL_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """W0 + B A in place of W0. A: r x in_features, B: out_features x r, float32 or float64.

    error: |W' - W0 - B A|_F / |W' - W0|_F; 0.0 where nothing was cut off.

    Examples:
        >>> found = to_lora(model)["0"]
        >>> found.rank, tuple(found.A.shape), tuple(found.B.shape), found.error
        (32, (32, 64), (256, 32), 0.0)
    """

    A: Tensor
    B: Tensor
    error: float

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]


def check_rank(rank: int | None) -> None:
    """ValueError where rank is neither None nor an integer >= 1."""
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank!r} is out of range; allowed: None (exact) or an integer >= 1")


@torch.no_grad()
def lora_of(adapter: Adapter, base: Base, rank: int | None = None) -> Lora:
    """The adapter's change of W0 as B A.

    Args:
        base: the operator of W0. rank: r; None, or at least max(k, l): exact, of rank max(k, l).

    Raises:
        ValueError: rank < 1.
    """
    check_rank(rank)
    prepared, shape = adapter.prepared(base), adapter.shape
    V, tall = prepared.basis.to(prepared.dtype), base.tall(shape.transposed)
    left = torch.cat([times(tall, V), prepared.columns], 1) @ prepared.mixer  # large x width
    error = 0.0
    if rank is not None and rank < shape.width:
        Q, R = torch.linalg.qr(left)
        Qv, Rv = torch.linalg.qr(V)  # V is orthonormal up to its rounding
        P, sigma, Wt = torch.linalg.svd(R @ Rv.mT)
        left, V = (Q @ P[:, :rank]) * sigma[:rank], Qv @ Wt[:rank].mT
        whole = float(torch.linalg.vector_norm(sigma))
        error = float(torch.linalg.vector_norm(sigma[rank:])) / whole if whole else 0.0
    A, B = (left.mT, V) if shape.transposed else (V.mT, left)
    return Lora(A.contiguous(), B.contiguous(), error)


def to_lora(model: nn.Module, rank: int | None = None) -> dict[str, Lora]:
    """Layer name -> its change of W0 as LoRA, of every layer that `apply_ssvdo` adapted. Nothing is changed.

    Raises:
        ValueError: the model has no such layer, or rank < 1. TypeError: it has experts or convolutions adapted, whose
            LoRA is of another form.

    Examples:
        >>> change = to_lora(model)["0"]
        >>> torch.allclose(model[0].weight + change.B @ change.A, model[0].adapted_weight(), atol=1e-6)
        True
    """
    check_rank(rank)
    return {name: lora_of(*found, rank) for name, found in _linear(model).items()}


def _linear(model: nn.Module) -> dict[str, tuple[Adapter, Base]]:
    found: dict[str, tuple[Adapter, Base]] = {}
    for name, host in require_adapted(model).items():
        if not isinstance(host, OwnHost) or list(host.parts()) != [""] or host.layout == "flattened":
            raise TypeError(f"{name} is a {type(host).__qualname__}, whose LoRA is of another form; allowed: linear "
                            "layers of apply_ssvdo (through PEFT: save_as_lora)")  # fmt: skip
        with onloaded(host):
            adapter = host.parts()[""]
            found[name] = adapter, host.base(adapter)
    return found


def save_lora(
    model: nn.Module, path: str | os.PathLike[str], rank: int | None = None, *, base_model: str | None = None
) -> dict[str, Lora]:
    """Writes the adapters of `model` as a LoRA of PEFT's format, and returns them: `adapter_config.json` and
    `adapter_model.safetensors`. One rank for all layers (smaller ones are filled up with zeros), lora_alpha = r.

    Args:
        rank: None: exact; the error of each layer is in what is returned.
        base_model: the base's name or path, as PEFT records it.

    Raises:
        as `to_lora`. OSError: the folder cannot be written; an old file stays whole.

    Examples:
        >>> found = save_lora(model, "lora", rank=16)  # the best of rank 16
        >>> found["0"].rank
        16
    """
    found = to_lora(model, rank)
    layouts = {host.layout for host in require_adapted(model).values() if isinstance(host, OwnHost)}
    write_lora(found, Path(path), base_model, fan_in_fan_out=layouts == {"transposed"})
    return found


def write_lora(found: dict[str, Lora], folder: Path, base_model: str | None, fan_in_fan_out: bool = False) -> None:
    """The files of `save_lora`."""
    rank = max(lora.rank for lora in found.values())
    tensors: dict[str, Tensor] = {}
    for name, lora in found.items():
        key = f"base_model.model.{name}" if name else "base_model.model"
        A, B = lora.A.new_zeros(rank, lora.A.shape[1]), lora.B.new_zeros(lora.B.shape[0], rank)
        A[: lora.rank], B[:, : lora.rank] = lora.A, lora.B
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A, B
    config: dict[str, Any] = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "task_type": None,
        "target_modules": sorted(found), "fan_in_fan_out": fan_in_fan_out, "inference_mode": True,
        "base_model_name_or_path": base_model, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
    }  # fmt: skip
    write_atomically({folder / MODEL_FILE: as_file(tensors, {"format": "pt"}),
                      folder / CONFIG_FILE: f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode()})  # fmt: skip
