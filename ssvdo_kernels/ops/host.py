"""The compiled core on CPU tensors: the inner part of batches of layers of one shape (csrc/cpu), with the algebra of
preparation.py.

Every argument that is a list has one tensor a layer, all float32 or all float64, contiguous, on the CPU.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from .complement import one_by_one

INTERFACE = 2
"""interface_version in csrc/bindings.h, where this file calls the core rightly."""


def left_out(part: str) -> str:
    """Why "core" or "cuda" was left out when this was built, as setup.py wrote it down; "" where it did not."""
    try:
        return str(json.loads((Path(__file__).parents[1] / "_build.json").read_text(encoding="utf-8"))[part])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _load() -> tuple[Any, str]:
    """(the compiled core, ""), or (None, why the package runs on PyTorch alone). Warns of a core that is of no use."""
    try:
        core = importlib.import_module("ssvdo_kernels._C")
    except ModuleNotFoundError:
        there = [f.name for f in Path(__file__).parents[1].glob("_C.*") if f.name[2:] not in EXTENSION_SUFFIXES]
        noted = left_out("core") or "no C++ compiler or pybind11 then, or SSVDO_BUILD=0"
        why = f"for this Python, only {there[0]}" if there else f"({noted})"
        return None, f"the compiled core was not built at installation {why}"
    except ImportError as error:
        why = f"does not load: {error}"
    else:
        theirs = getattr(core, "interface", 0)
        if theirs == INTERFACE:
            return core, ""
        why = f"is of another version (interface {theirs}, needed: {INTERFACE})"
    why = f"the compiled core is there but {why}; install the package again"
    warnings.warn(f"{why}. PyTorch serves in its place.", RuntimeWarning, stacklevel=2)
    return None, why


_C, absent = _load()

Tensors = Sequence[Tensor]


def available() -> bool:
    """Whether there is a compiled core that can be used; `absent` says why not."""
    return _C is not None


def instruction_set() -> str:
    """ "plain", "avx2" or "avx512": the build that serves this processor."""
    return str(_C.host_name())


def description() -> str:
    """What the core is, in words; `absent` where there is none."""
    threads = "OpenMP" if _C is not None and _C.openmp else "one thread: built without OpenMP"
    return absent or f"compiled core, {instruction_set()}, {threads}"


def fingerprint(tensors: Sequence[Tensor]) -> int | None:
    """A 64-bit hash of the bytes of contiguous tensors on the CPU; None where there is no core."""
    if _C is None or not all(t.is_contiguous() for t in tensors):
        return None
    return int(_C.hash([(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]))


def product(matrices: Tensors, columns: Tensors, build: str = "") -> list[Tensor]:
    """[A_i B_i], rows x cols, for layers of one shape: a large matrix by a few columns, by the core where both are
    float32, or float64, else by PyTorch. A transposed A gives a transposed result, as each is read where it lies."""
    a, b = matrices[0], columns[0]
    strides = {(x.stride(), y.stride(), x.dtype, y.dtype) for x, y in zip(matrices, columns, strict=True)}
    (rows, inner), width = a.shape, b.shape[1]
    if a.dtype != b.dtype or len(strides) > 1 or not rows * inner * width or a.dtype.itemsize < 4:
        return one_by_one(matrices, columns)
    lies = a.stride(1) != 1
    stacked = b.new_empty(len(columns), width, rows) if lies else b.new_empty(len(columns), rows, width)
    out: list[Tensor] = list((stacked.mT if lies else stacked).unbind())
    addresses = [[t.data_ptr() for t in row] for row in zip(matrices, columns, out, strict=True)]
    _C.product(str(a.dtype).removeprefix("torch."), addresses, rows=rows, inner=inner, columns=width, a=a.stride(),
               b=b.stride(), out=out[0].stride(), threads=torch.get_num_threads(), build=build)  # fmt: skip
    return out


def invertible(packed: Tensor) -> bool:
    """Whether I + K may be inverted without pivots: |K|_F <= 16. Beyond, LAPACK's pivots keep the digits."""
    return float(torch.linalg.vector_norm(packed)) * 2**0.5 <= 16


def _call(function: str, operands: Sequence[Tensors], build: str, **sizes: Any) -> Any:
    dtype = operands[0][0].dtype
    for tensor in (t for tensors in operands for t in tensors):
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"a tensor of {function} is {tensor.dtype} on {tensor.device} with strides "
                             f"{tensor.stride()}; allowed: contiguous {dtype} on the CPU")
    rows = [[t.data_ptr() for t in row] for row in zip(*operands, strict=True)]
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    return getattr(_C, function)(name, rows, threads=threads, build=build, **sizes)


def inner_sizes(shape: LayerShape, config: SSVDOConfig, null: int) -> dict[str, Any]:
    """What the inner part's functions take beside addresses, here and in device.py."""
    return {"k": shape.k, "l": shape.l, "q": null, "width": shape.width, "rotation": config.rotation}


def inner_forward(
    packed: Tensors,
    shift: Tensors,
    singular: Tensors,
    null: int,
    shape: LayerShape,
    config: SSVDOConfig,
    build: str = "",
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(G, saved, mixer) of each layer. shift: dS; singular: S (width); null: q."""
    k, rows = shape.k, shape.width + shape.l + null
    G, saved = ([p.new_empty(k, k) for p in packed] for _ in range(2))
    mixer = [p.new_empty(rows, shape.width) for p in packed]
    sizes = inner_sizes(shape, config, null) | {"terms": config.neumann_terms}
    _call("inner_forward", (packed, shift, singular, G, saved, mixer), build, **sizes)
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
    rows: tuple[Tensors, Tensors] | None = None,
    build: str = "",
) -> list[tuple[Tensor, Tensor]]:
    """(d packed, d dS) of each layer from d mixer, or with rows = (left, right) from d mixer = left^T right."""
    d_packed, d_shift = [torch.empty_like(p) for p in packed], [torch.empty_like(s) for s in shift]
    sizes = inner_sizes(shape, config, null) | {"terms": config.neumann_terms}
    if rows is not None:
        left, right = rows
        sizes |= {"tokens": left[0].shape[0], "left_ld": left[0].shape[1], "right_ld": right[0].shape[1]}
        d_mixer = left  # any address: it is not read
    else:
        left = right = d_mixer
    operands = (packed, shift, singular, G, saved, d_mixer, d_packed, d_shift, left, right)
    _call("inner_backward", operands, build, **sizes)
    return list(zip(d_packed, d_shift, strict=True))
