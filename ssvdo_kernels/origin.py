"""The weight that a layer's factors were made from, known again by a few numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .factorize import Factors
from .ops import lasting
from .ops.base import Base
from .ops.products import times
from .watchers import hooked, lasting_part, shards, writes

SKETCH = 4  # probe vectors


def stamp(tensor: Tensor) -> tuple[object, ...]:
    """What changes where a tensor is written to or replaced; for a storage that is still alive."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def stamps(tensors: Iterable[Tensor | None]) -> list[object]:
    """The stamps of all that are there, in one; the address tells the device."""
    found: list[object] = []
    for t in tensors:
        if t is not None:
            try:
                found += (t.data_ptr(), t._version, t.dtype)
            except RuntimeError:  # of inference mode, without a counter
                found += (t.data_ptr(), 0, t.dtype)
    return found


def gathered_stamp(tensor: Tensor) -> tuple[object, ...]:
    """The same where FSDP gathers a weight for every forward, into a storage that it empties in between."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), *stamp(tensor)[1:]


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
    an adapter is saved: a write through ``.data`` leaves no other trace. Factors that came from a state_dict are looked
    at beside the weight once.
    """

    def __init__(self) -> None:
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen": None, "_held": ()}  # a copy's weight lies elsewhere

    def forget(self) -> None:
        """Takes the weight that comes next for the right one."""
        self._known: tuple[list[list[float]], float] | None = None  # its sketch, and the eps of its dtype
        self._rounded = 0.0  # the largest eps of the dtypes that it has been in since
        self._seen: list[object] | None = None
        self._held: tuple[torch.UntypedStorage, ...] = ()  # of what was seen, so that nothing else comes to lie there
        self._loaded = False

    def loaded(self) -> None:
        """The factors came from a state_dict, with their weight or without it."""
        self.forget()
        self._loaded = True

    def let_go(self) -> None:
        """The weight may have moved: holds nothing of where it was, and looks at its numbers next time."""
        self._seen, self._held = None, ()

    def rounded(self, dtype: torch.dtype) -> None:
        """The weight has been cast to `dtype`, and perhaps back."""
        self._rounded = max(self._rounded, coarser(dtype))

    @lasting
    @torch.no_grad()
    def record(self, weight: Tensor) -> None:
        """The factors are those of `weight`."""
        self.forget()
        if not weight.is_meta:
            sketch = [[float(v) for v in row] for row in weight_sketch(weight)]  # no tolist in torch 2.6's torch.func
            self._known = sketch, coarser(weight.dtype)

    def check(self, base: Base, name: str, by_value: bool = False, factors: Factors | None = None) -> None:
        """Raises RuntimeError where W0 is not the one that was factorised. by_value: read its numbers."""
        now = self._stamps(base)
        if now != self._seen or by_value or base.passing:
            self._look(base, name, now, factors)

    @staticmethod
    def _stamps(base: Base) -> list[object]:
        if not hooked():
            return stamps(base.tensors)
        own = [part for t in base.tensors for part in (*gathered_stamp(lasting_part(t)), stamp(t)[1])]
        return own + writes(shards(base.tensors, frozen=True))

    @torch.no_grad()
    def _look(self, base: Base, name: str, now: list[object], factors: Factors | None) -> None:
        if base.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        weight = base.dense()
        if weight.is_meta:
            raise RuntimeError(f"{name}: weight is on the meta device (offloaded, or not loaded); load it first")
        if self._known is not None and not self._is_known(weight):
            raise RuntimeError(
                f"{name}: weight is no longer the one that was factorised (load_state_dict, copy_, .data or an "
                "initialisation has changed it); load pretrained weights before apply_ssvdo, or call "
                "refactorize_ssvdo(model) to adapt the new ones")
        if self._loaded and factors is not None and not _belong(factors, weight):
            raise RuntimeError(
                f"{name}: the factors that were loaded (basis, singular_values) are not those of its weight; load the "
                "weight with them, or call refactorize_ssvdo(model)")
        if self._known is None or self._rounded or self._known[1] != coarser(weight.dtype):
            self.record(weight)
        if base.passing:
            self.let_go()
        else:
            self._seen, self._held = now, tuple(lasting_part(t).untyped_storage() for t in base.tensors)

    def _is_known(self, weight: Tensor) -> bool:
        assert self._known is not None
        sketch, own = self._known
        through = max(own, self._rounded, coarser(weight.dtype))
        eps = 1e-11 if own == through == coarser(weight.dtype) else through  # 1e-11: of sums of float64
        return alike(torch.tensor(sketch, dtype=torch.float64, device="cpu"), weight, eps)


def _belong(factors: Factors, weight: Tensor) -> bool:
    """Whether |A v_i| is S_i for the V and S at hand, up to the roundings of a half-precision V and weight."""
    V, S = factors.basis, factors.singular_values
    if V.is_meta or weight.is_meta:
        return True
    tall = weight if weight.shape[1] == V.shape[0] and weight.shape[0] >= weight.shape[1] else weight.mT
    lengths = torch.linalg.vector_norm(times(tall, V.to(S.dtype)), dim=0)
    return bool(((lengths - S[: len(lengths)]).abs() <= 0.03 * S[0]).all())
