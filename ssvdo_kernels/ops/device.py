"""The CUDA kernels (csrc/cuda) on batches of layers of one shape: the outer part of outer.py, three launches forward
and one backward, and the inner part of preparation.py, one forward and two backward.

On CPU tensors the same kernels are emulated with threads, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from .complement import LEAST
from .host import _C, Tensors, absent, inner_sizes, left_out
from .outer import Outer
from .streams import current


def obstacle(device: torch.device) -> str:
    """Why the kernels cannot serve `device`; "" where they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are no kernels for {device.type} devices"
    if why := not_built():
        return why
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if serves(architectures(), capability):
        return ""
    own = "{}{}".format(*capability)
    built = ", sm_".join(architectures().split())
    return f"it was built for sm_{built}, which does not run on sm_{own}: install again with SSVDO_CUDA_ARCHS={own}"


def serves(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for architectures such as "80 90a 120" (setup.py; "80-real" without PTX: CMake) runs on a GPU.

    Machine code runs on its major version from its minor version on, that of "90a" on 9.0 alone; the last one without a
    letter is there as PTX, too, which runs on all that are newer.
    """
    portable = [name for name in built.split() if name.isdigit()]
    for name in built.split():
        major, minor = divmod(int("".join(filter(str.isdigit, name))), 10)
        own = name.removesuffix("-real")
        if capability[0] == major and (capability[1] >= minor if own.isdigit() else capability[1] == minor):
            return True
    return bool(portable) and capability >= divmod(int(portable[-1]), 10)


def not_built() -> str:
    """Why there are no CUDA kernels; "" where there are."""
    if architectures():
        return ""
    noted = left_out("cuda") or "no working nvcc at installation, or SSVDO_CUDA_ARCHS=none"
    return absent or f"the compiled core was built without CUDA ({noted})"


def architectures() -> str:
    """The GPUs that the CUDA part was built for; "" if it was not."""
    return "" if _C is None else str(_C.device_architectures())


def capture(like: Tensor) -> int:
    """The number of the CUDA graph's capture that is under way on the current stream, which no other has in this
    process; 0: there is none, or there is no CUDA part to ask for it."""
    return int(_C.device_capture(current(like))) if like.is_cuda and architectures() else 0


def _call(
    function: str,
    operands: Sequence[Sequence[Tensor | None]],
    stacked: Tensors,
    dtype: torch.dtype,
    check: bool = True,
    **sizes: Any,
) -> None:
    """operands: of each kind one tensor a layer, or None. check: that the first layer's are contiguous and on one
    device; the others' are made likewise."""
    tensors = [many[0] for many in (*operands, stacked) if many[0] is not None]
    like = tensors[0]
    for tensor in tensors if check else ():
        if tensor.device != like.device or not tensor.is_contiguous():
            raise ValueError(f"a tensor of {function} is on {tensor.device} with strides {tensor.stride()}; "
                             f"allowed: contiguous, on {like.device}")
    kinds = ([0] * len(many) if many[0] is None else [t.data_ptr() for t in many if t is not None] for many in operands)
    addresses = list(zip(*kinds, strict=True))
    where = {"device": -1, "stream": 0}
    if like.is_cuda:
        where = {"device": like.get_device(), "stream": torch.cuda.current_stream(like.device).cuda_stream}
    getattr(_C, function)(_name(dtype), addresses, [t.data_ptr() for t in stacked], **where, **sizes)


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _outer(
    forward: bool, many: Sequence[Outer], F: Tensors, X: Tensors, more: Sequence[Tensors], stacked: Tensors
) -> None:
    """Calls the kernel of either way. more: backward: dF and d outer; stacked: beside the scratch."""
    one, like, n = many[0], many[0].outer, len(many)
    tall = [p.projector.tall for p in many]
    if len({a.stride() for a in tall}) > 1 or _layout(tall[0]) is None:
        tall = [a.contiguous() for a in tall]
    (by_rows, tall_ld), l = _layout(tall[0]) or (True, one.d), like.shape[1]  # noqa: E741
    basis, null = ([t.contiguous() for t in many] for many in (
        [p.projector.basis for p in many], [p.projector.null for p in many if p.projector.null is not None]))
    turned = [p.U.contiguous() for p in many if p.U is not None]
    columns = null[0].shape[1] if null else 0
    room = max(4, min(32, 96 // n)) * one.d * l
    work = _scratch(like, n, (_C.device_outer_work(large=one.large, d=one.d, l=l, null=columns) + room,))
    nothing = [None] * n
    _call(f"device_outer_{'forward' if forward else 'backward'}",
          (tall, basis, turned or nothing, null or nothing, [p.projector.singular for p in many],
           [p.outer for p in many], F, X, *more), (*work, *stacked), like.dtype, check=False,
          large=one.large, c=one.c, d=one.d, l=l, width=one.projector.width, null=columns, passes=one.projector.passes,
          by_rows=by_rows, additive=not turned, tall_ld=tall_ld, basis_ld=one.d, F_ld=F[0].stride(0), room=room,
          dF_ld=more[0][0].stride(0) if more else l, scale=one.scale, tau=one.tau, least=LEAST,
          tall=_name(tall[0].dtype), basis=_name(basis[0].dtype),
          rest=_name((turned or null or basis)[0].dtype))  # fmt: skip


def outer_forward(many: Sequence[Outer], *, gate: Tensor, info: Tensor) -> tuple[Tensors, Tensors]:
    """(F, X) of `outer.forward`: large x l and l x l each. gate and info: int32, two and one a layer, 0; info becomes
    the bad pivot from 1, and X and F are NaN then.

    Sums are in the dtype of the work: products with float32 numbers go to the tensor cores in pieces (csrc/core/mma.h).
    The layers' weights lie alike, by rows or by columns; what lies otherwise is copied first.

    Raises:
        ValueError: a dtype of V, U_l or the weight that has no kernel beside that of the work.
    """
    one, n = many[0], len(many)
    l = one.outer.shape[1]  # noqa: E741
    F, X = one.outer.new_empty(n, one.large, l).unbind(), one.outer.new_empty(n, l, l).unbind()
    _outer(True, many, F, X, (), (gate, info))
    return F, X


def outer_backward(many: Sequence[Outer], X: Tensors, F: Tensors, dF: Tensors) -> list[Tensor]:
    """`outer.backward`: d outer of each layer."""
    d_outer = [torch.empty_like(p.outer) for p in many]
    if len({(d.stride(), d.stride(1) == 1) for d in dF}) > 1 or dF[0].stride(1) != 1:
        dF = [d.contiguous() for d in dF]
    gate = torch.zeros(2 * len(many), dtype=torch.int32, device=X[0].device)
    _outer(False, many, F, X, (dF, d_outer), (gate,))
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
) -> list[tuple[Tensor, Tensor]]:
    """(saved, mixer) of each layer.

    shift: dS; singular: S (width); null: q. saved: (I + K)^-1 for the Cayley form, else K. gate and info:
    int32, one a layer, 0; info becomes 1 where no inverse of I + K was found.
    """
    n, k, like = len(packed), shape.k, shift[0]
    saved = like.new_empty(n, k, k).unbind()
    mixer = like.new_empty(n, shape.width + shape.l + null, shape.width).unbind()
    cayley = config.rotation == "cayley"
    work = _scratch(like, n, (2 * k * k if cayley else 1,), (_C.max_blocks,))
    _call("device_inner_forward", (packed, shift, singular, mixer, saved), (*work, gate, info),
          like.dtype, **inner_sizes(shape, config, null))  # fmt: skip
    return list(zip(saved, mixer, strict=True))


def inner_backward(
    packed: Tensors,
    shift: Tensors,
    singular: Tensors,
    saved: Tensors,
    d_mixer: Tensors,
    null: int,
    shape: LayerShape,
    config: SSVDOConfig,
) -> list[tuple[Tensor, Tensor]]:
    """(d packed, d dS) of each layer from d mixer."""
    d_packed, d_shift = [torch.empty_like(p) for p in packed], [torch.empty_like(s) for s in shift]
    (work,) = _scratch(shift[0], len(packed), (shape.k if config.rotation == "cayley" else 1, shape.k))
    _call("device_inner_backward", (packed, shift, singular, d_mixer, saved, d_packed, d_shift), (work,),
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
        self._numbers: tuple[list[int], list[int]] | None = None

    def there(self) -> bool:
        """Whether `read` returns at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> tuple[list[int], list[int]]:
        """(inverses, pivots), one number a layer, 0 where all is well; waits for them if need be."""
        if self._numbers is None:  # each layer asks
            if self._event is not None:
                self._event.synchronize()
                self._event = None
            inverses, pivots = self._info.tolist()
            self._numbers = inverses, pivots
        return self._numbers
