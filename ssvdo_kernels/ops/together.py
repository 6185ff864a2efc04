"""The Triton path's matrices of layers that were prepared together: one launch for what each would start by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .matrices import up
from .preparation import Prepared
from .streams import Queued


def build(many: Sequence[Prepared], dtype: torch.dtype) -> None:
    """Makes `expansion`, `contraction` with a view of what is `below` N's rows, and `aligned_columns` of all, in the
    tokens' dtype."""
    one = many[0]
    d, width, extra = one.shape.d, one.shape.width, one.extra
    w, e, n = up(width), up(extra), len(many)
    M, V = _stacked([p.mixer for p in many]), torch.stack([p.basis for p in many]).to(one.dtype)
    both, left = M @ V.mT, M[:, :width].mT @ V.mT
    make = torch.empty if (w, e) == (width, extra) else torch.zeros
    contraction, expansion, columns = (
        make(n, *size, dtype=dtype, device=both.device) for size in ((w + e, d), (w, d + e), (one.shape.large, e)))
    contraction[:, :width], contraction[:, w : w + extra] = both[:, :width], both[:, width:]
    expansion[:, :width, :d] = left
    expansion[:, :width, d : d + extra] = M[:, width:].mT
    columns[:, :, :extra] = _stacked([p.columns for p in many])
    names = [(name, dtype) for name in ("contraction", "below", "expansion", "aligned_columns")]
    stacks, queued = (contraction, contraction[:, w:], expansion, columns), Queued(both)
    for p, *made in zip(many, *(stack.unbind() for stack in stacks), strict=True):
        p.put(zip(names, made, strict=True), queued)


def _stacked(many: Sequence[Tensor]) -> Tensor:
    """The layers' tensors as one: that of which they are views, where they are all of one."""
    base, strides = many[0]._base, many[0].stride()
    if base is not None and base.ndim == 3 and base.shape == (len(many), *many[0].shape):
        first, step = base.data_ptr(), base.stride(0) * base.element_size()
        if base.stride()[1:] == strides and all(
                t._base is base and t.data_ptr() == first + i * step and t.stride() == strides
                for i, t in enumerate(many)):  # fmt: skip
            return base
    return torch.stack(list(many))
