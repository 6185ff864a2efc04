"""The CUDA kernels (csrc/cuda) on batches of layers of one shape: the products and the factor from which outer.py makes
the outer part, a launch each; the inner part of preparation.py whole, one launch forward and two backward.

On CPU tensors the same kernels are emulated with threads, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from .host import _C, Tensors, absent, inner_sizes, left_out


def obstacle(device: torch.device) -> str:
    """Why the kernels cannot serve `device`; "" where they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are no kernels for {device.type} devices"
    if why := not_built():
        return why
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def not_built() -> str:
    """Why there are no CUDA kernels; "" where there are."""
    if architectures():
        return ""
    noted = left_out("cuda") or "no working nvcc at installation, or SSVDO_CUDA_ARCHS=none"
    return absent or f"the compiled core was built without CUDA ({noted})"


def architectures() -> str:
    """The GPUs that the CUDA part was built for; "" if it was not."""
    return "" if _C is None else str(_C.device_architectures())


def _call(
    function: str, operands: Sequence[Tensors], stacked: Tensors, *types: torch.dtype, check: bool = True, **sizes: Any
) -> None:
    """operands: of each kind one tensor a layer. check: that all are contiguous and on one device."""
    tensors = [t for many in (*operands, stacked) for t in many]
    like = tensors[0]
    for tensor in tensors if check else ():
        if tensor.device != like.device or not tensor.is_contiguous():
            raise ValueError(f"a tensor of {function} is on {tensor.device} with strides {tensor.stride()}; "
                             f"allowed: contiguous, on {like.device}")
    addresses: list[Any] = [[[t.data_ptr() for t in row] for row in zip(*operands, strict=True)]] if operands else []
    addresses += [[t.data_ptr() for t in stacked]] if stacked else []
    where = {"device": -1, "stream": 0}
    if like.is_cuda:
        where = {"device": like.get_device(), "stream": torch.cuda.current_stream(like.device).cuda_stream}
    getattr(_C, function)(*(str(t).removeprefix("torch.") for t in types), *addresses, **where, **sizes)


def _scratch(like: Tensor, layers: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Room for one launch's layers; the next launch on the stream may use it again."""
    return [like.new_empty(min(layers, _C.max_layers), *shape) for shape in shapes]


def _layout(matrix: Tensor) -> tuple[bool, int] | None:
    """(whether by rows, leading dimension) of a matrix that the kernels read as it lies; None: they cannot."""
    for by_rows, view in ((True, matrix), (False, matrix.mT)):
        (rows, width), ld = view.shape, view.stride(0)
        if (view.stride(1) == 1 or width == 1) and (ld >= width or rows == 1):
            return by_rows, ld if rows > 1 else width
    return None


def product(matrices: Tensors, columns: Tensors) -> list[Tensor]:
    """[A_i B_i], rows x cols in the dtype of the columns, for A_i: rows x inner and B_i: inner x cols.

    Sums are in the dtype of the columns: float32 for matrices in float32, bfloat16 or float16, float64 for float64.
    Layers that lie alike, by rows or by columns with one leading dimension, share a launch; what lies otherwise is
    copied first.

    Raises:
        ValueError: the dtypes have no kernel; shapes that do not fit; matrices, or columns, that differ in more than
            their strides.
    """
    for name, many in (("matrices", matrices), ("columns", columns)):
        kinds = {(t.shape, t.dtype, t.device) for t in many}
        if len(kinds) > 1 or any(len(shape) != 2 for shape, *_ in kinds):
            found = ", ".join(f"{dtype} {tuple(shape)} on {device}" for shape, dtype, device in kinds)
            raise ValueError(f"{name} of one product are {found}; allowed: two dimensions, one shape, dtype and device")
    if not matrices and not columns:
        return []
    if len(matrices) != len(columns) or matrices[0].shape[1] != columns[0].shape[0]:
        shapes = [tuple(t.shape) for many in (matrices, columns) for t in many[:1]]
        raise ValueError(f"{len(matrices)} matrices and {len(columns)} blocks of columns do not fit: {shapes}")
    if matrices[0].device != columns[0].device:
        raise ValueError(f"matrices on {matrices[0].device} and columns on {columns[0].device}; allowed: one device")
    (rows, inner), width = matrices[0].shape, columns[0].shape[1]
    out = columns[0].new_empty(len(columns), rows, width)
    results = list(out.unbind())
    if not out.numel() or not inner:
        out.zero_()
        return results
    alike: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for row in zip(matrices, columns, results, strict=True):
        alike.setdefault((row[0].stride(), row[1].stride()), []).append(row)
    for group in alike.values():
        left, right, to = (list(t) for t in zip(*group, strict=True))
        if not (left_layout := _layout(left[0])):
            left, left_layout = [t.contiguous() for t in left], (True, inner)
        if not (right_layout := _layout(right[0])):
            right, right_layout = [t.contiguous() for t in right], (True, width)
        _call("device_product", (left, right, to), (), right[0].dtype, left[0].dtype, check=False, rows=rows,
              inner=inner, columns=width, left=left_layout, right=right_layout, ld=width)  # fmt: skip
    return results


def factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(X, info) of R R^T = gram (n x l x l, float32 or float64; lower triangles are read): X = R^-T, n x l x l.

    info (int32, n): 0, or from 1 the pivot that is not positive and finite; X is NaN then. Another dtype: TypeError.
    """
    gram = gram.contiguous()
    work, inverse = torch.empty_like(gram), torch.empty_like(gram)
    info = torch.zeros(gram.shape[0], dtype=torch.int32, device=gram.device)
    if gram.numel():
        _call("device_factor", (), (gram, work, inverse, info), gram.dtype, l=gram.shape[-1], count=gram.shape[0])
    return inverse.mT, info


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

    shift: dS; singular: S (width); null: q. saved: (I + K)^-1 for the Cayley form, else K. gate and info:
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
