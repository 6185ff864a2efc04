"""[W0 | F]: for many rows one product with both saves passes over the large side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..origin import stamp
from ..watchers import hooked
from .base import Base


class Joined:
    """[A | F], large x (d + e), or its transpose for a wide layer; F is that of one preparation at a time.

    A layer's forwards hand it on from preparation to preparation. So W0 is copied once, and F once a step.
    """

    keeps = True  # False: whatever is as large as W0 is for one forward

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._weight: Tensor | None = None  # alive, so that no other comes to lie there
        self._stamp: tuple[object, ...] = ()
        self._columns: Tensor | None = None

    def of(self, F: Tensor, base: Base, wide: bool, keep: bool) -> Tensor:
        """The matrix for F as it is; keep: for later calls, too. Not to be kept across what gathers weights anew."""
        weight = base.dense()
        if not (keep and self.keeps) or hooked():
            return self._made(F, weight, wide)
        now = *stamp(weight), weight.stride(), F.shape, F.dtype
        if self._buffer is None or now != self._stamp:
            self._buffer, self._weight = self._made(F, weight, wide), weight.detach()
            self._stamp, self._columns = now, F
        elif self._columns is not F:
            d = weight.shape[0] if wide else weight.shape[1]
            (self._buffer[d:] if wide else self._buffer[:, d:]).copy_(F.mT if wide else F)
            self._columns = F
        return self._buffer

    @staticmethod
    def _made(F: Tensor, weight: Tensor, wide: bool) -> Tensor:
        return torch.cat([weight, F.mT], 0) if wide else torch.cat([weight, F], 1)
