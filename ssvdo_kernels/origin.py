"""The weight that a layer's factors were made from, known again by a few numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import lasting
from .ops.base import Base
from .ops.products import times

SKETCH = 4  # probe vectors


def stamp(tensor: Tensor) -> tuple[object, ...]:
    """What changes where a tensor is written to or replaced; for a storage that is still alive."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def probes(rows: int, like: Tensor) -> Tensor:
    """rows x SKETCH fixed vectors in float64."""
    grid = torch.arange(rows * SKETCH, dtype=torch.float64, device="cpu").view(SKETCH, rows).mT
    return torch.cos(grid * grid % 6.2831853).to(like.device)


def weight_sketch(weight: Tensor) -> Tensor:
    """g_i^T W0 h_j, SKETCH x SKETCH, float64 on the CPU."""
    w = weight.detach()
    return (probes(w.shape[0], w).mT @ times(w, probes(w.shape[1], w))).cpu()


def alike(sketch: Tensor, weight: Tensor, eps: float) -> bool:
    """Whether the sketch is that of a weight which differs from `weight` by roundings of relative size eps.

    Roundings E are as good as independent: g^T E h has a deviation below eps |W0|_F / 6, and eps |W0|_F is not met.
    """
    scale = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    return float((sketch - weight_sketch(weight)).abs().max()) <= eps * scale


def coarser(*dtypes: torch.dtype) -> float:
    """The largest eps of the dtypes."""
    return max(torch.finfo(t).eps for t in dtypes)


class Origin:
    """Knows the weight of the factors at hand, and notices where another has taken its place.

    Version and storage are compared whenever something is prepared, the numbers where these differ, at first and where
    an adapter is saved: a write through ``.data`` leaves no other trace.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Takes the weight that comes next for the right one: factors and weight were loaded together."""
        self._known: tuple[list[list[float]], torch.dtype] | None = None
        self._seen: tuple[object, ...] | None = None

    @lasting
    @torch.no_grad()
    def record(self, weight: Tensor) -> None:
        """The factors are those of `weight`."""
        self.forget()
        if not weight.is_meta:
            self._known = weight_sketch(weight).tolist(), weight.dtype

    @torch.no_grad()
    def check(self, base: Base, name: str, by_value: bool = False) -> None:
        """Raises RuntimeError where W0 is not the one that was factorised. by_value: read its numbers."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        skip = 1 if together else 0  # FSDP gathers a weight into new memory for every forward
        now = tuple(stamp(t)[skip:] for t in base.tensors)
        if now == self._seen and not by_value:
            return
        if base.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        weight = base.dense()
        sketch, dtype = self._known or (None, None)
        eps = 1e-11 if dtype in (None, weight.dtype) else coarser(dtype, weight.dtype)  # 1e-11: of sums of float64
        known = None if sketch is None else torch.tensor(sketch, dtype=torch.float64, device="cpu")
        if known is not None and not alike(known, weight, eps):
            raise RuntimeError(
                f"{name}: weight is no longer the one that was factorised (load_state_dict, copy_, .data or an "
                "initialisation has changed it); load pretrained weights before apply_ssvdo, or call "
                "refactorize_ssvdo(model) to adapt the new ones")
        if dtype != weight.dtype:
            self.record(weight)
        self._seen = now
