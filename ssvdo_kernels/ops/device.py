"""The CUDA kernels (csrc/cuda) on batches of layers of one shape: four launches for the outer part, one for the inner;
backward four and two. Its algebra is that of preparation.py.

Every argument that is a list has one tensor a layer, contiguous. On CPU tensors the same kernels are emulated with
threads, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from .host import _C, Tensors, inner_sizes, outer_sizes


def obstacle(device: torch.device) -> str:
    """Why the kernels cannot serve `device`; "" where they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are no kernels for {device.type} devices"
    if _C is None:
        return "the compiled core was not built (no C++ compiler at installation, or SSVDO_BUILD=0)"
    if not _C.device_architectures():
        return "the compiled core was built without CUDA (no nvcc at installation, or SSVDO_CUDA_ARCHS=none)"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def architectures() -> str:
    """The GPUs that the CUDA part was built for; "" if it was not."""
    return "" if _C is None else str(_C.device_architectures())


def _call(
    function: str, operands: Sequence[Tensors], stacked: Sequence[Tensor], *types: torch.dtype, **sizes: Any
) -> None:
    like = operands[0][0]
    for tensor in (t for tensors in (*operands, stacked) for t in tensors):
        if tensor.device != like.device or not tensor.is_contiguous():
            raise ValueError(f"a tensor of {function} is on {tensor.device} with strides {tensor.stride()}; "
                             f"allowed: contiguous, on {like.device}")
    rows = [[t.data_ptr() for t in row] for row in zip(*operands, strict=True)]
    where = {"device": -1, "stream": 0}
    if like.is_cuda:
        where = {"device": like.get_device(), "stream": torch.cuda.current_stream(like.device).cuda_stream}
    names = [str(t).removeprefix("torch.") for t in types]
    getattr(_C, function)(*names, rows, [t.data_ptr() for t in stacked], **where, **sizes)


def _scratch(like: Tensor, layers: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Room for one launch's layers; the next launch on the stream may use it again."""
    return [like.new_empty(min(layers, _C.max_layers), *shape) for shape in shapes]


def outer_forward(
    outer: Tensors,
    reflector: Tensors,
    basis: Tensors,
    columns: Tensors,
    shape: LayerShape,
    config: SSVDOConfig,
    *,
    info: Tensor,
) -> tuple[Tensor, Tensor]:
    """(R^-1, Y_bot^T L) of all layers; writes F into the first l columns of `columns`, large x (l + q).

    info (int32, one a layer) becomes 0, or the bad pivot from 1.
    """
    n, l, like = len(outer), shape.l, outer[0]  # noqa: E741
    r = reflector[0].shape[1]
    inverse, left = like.new_empty(n, l, l), like.new_empty(n, r, l)
    _call("device_outer_forward", (outer, reflector, basis, columns, list(inverse), list(left)),
          (*_scratch(like, n, (l, l), (r, l)), info), like.dtype, reflector[0].dtype,
          **outer_sizes(shape, config, reflector[0], columns[0].shape[1]))  # fmt: skip
    return inverse, left


def outer_backward(
    outer: Tensors,
    reflector: Tensors,
    basis: Tensors,
    inverse: Tensors,
    left: Tensors,
    d_columns: Tensors,
    shape: LayerShape,
    config: SSVDOConfig,
) -> list[Tensor]:
    """d outer (c x l) from the gradient of `columns`, of which the first l columns count."""
    n, l, like = len(outer), shape.l, outer[0]  # noqa: E741
    d_outer, r = [torch.empty_like(p) for p in outer], reflector[0].shape[1]
    scratch = _scratch(like, n, (l, l), (r, l), (l, l), (shape.c, l))
    _call("device_outer_backward", (outer, reflector, basis, d_columns, inverse, left, d_outer), scratch, like.dtype,
          reflector[0].dtype, **outer_sizes(shape, config, reflector[0], d_columns[0].shape[1]))  # fmt: skip
    return d_outer


def inner_forward(
    packed: Tensors,
    shift: Tensors,
    singular: Tensors,
    null: int,
    shape: LayerShape,
    config: SSVDOConfig,
    *,
    gate: Tensor,
    info: Tensor,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(G, saved, mixer) of each layer.

    shift: dS; singular: S (width); null: q. saved: (I + K)^-1 for the Cayley form, else nothing of use. gate and info:
    int32, one a layer, 0; info becomes 1 where no inverse of I + K was found.
    """
    n, k, like = len(packed), shape.k, shift[0]
    G, saved = like.new_empty(n, k, k), like.new_empty(n, k, k)
    mixer = like.new_empty(n, shape.width + shape.l + null, shape.width)
    cayley = config.rotation == "cayley"
    work = _scratch(like, n, (2 * k * k if cayley else 1,), (_C.max_blocks,))
    outputs = [list(t) for t in (mixer, G, saved)]
    _call("device_inner_forward", (packed, shift, singular, *outputs), (*work, gate, info), like.dtype,
          **inner_sizes(shape, config, null))  # fmt: skip
    return list(zip(G, saved, mixer, strict=True))


def inner_backward(
    packed: Tensors,
    shift: Tensors,
    singular: Tensors,
    G: Tensors,
    saved: Tensors,
    d_mixer: Tensors,
    null: int,
    shape: LayerShape,
    config: SSVDOConfig,
) -> list[tuple[Tensor, Tensor]]:
    """(d packed, d dS) of each layer from d mixer."""
    d_packed, d_shift = [torch.empty_like(p) for p in packed], [torch.empty_like(s) for s in shift]
    (work,) = _scratch(shift[0], len(packed), (shape.k if config.rotation == "cayley" else 1, shape.k))
    _call("device_inner_backward", (packed, shift, singular, d_mixer, G, saved, d_packed, d_shift), (work,),
          shift[0].dtype, **inner_sizes(shape, config, null))  # fmt: skip
    return list(zip(d_packed, d_shift, strict=True))


class Verdict:
    """info (2 x layers: inverse, pivot) of a preparation on its way from the device: asking never stalls the stream.

    A layer's parameters are safe in the meantime: what failed is NaN, and `Prepared.backward` waits for the verdict.
    """

    def __init__(self, info: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if info.is_cuda:
            self._info = torch.empty(info.shape, dtype=info.dtype, pin_memory=True)
            self._info.copy_(info, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(info.device))
        else:
            self._info = info

    def there(self) -> bool:
        """Whether `read` returns at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> tuple[list[int], list[int]]:
        """(inverses, pivots), one number a layer, 0 where all is well; waits for them if need be."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        inverses, pivots = self._info.tolist()
        return inverses, pivots
