"""Products of frozen matrices, stored in any floating dtype, with columns in the dtype of the work; sums over tokens.

A number of a half type is a float32 number, so a product of upcast tiles is as exact as one in float32 throughout: it
errs by the roundings of its sums alone. A tile at a time, no float32 copy of the whole matrix is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FLOAT32_SUMS = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8
_HALF = (torch.float16, torch.bfloat16)
_MATMUL: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9

TILE = 2**20  # numbers that are upcast at a time


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes half a microsecond to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def exact(dtype: torch.dtype) -> bool:
    """Whether the library's products of `dtype` on a CPU keep all its digits; those of float32 may run in bfloat16,
    as torch.set_float32_matmul_precision("medium") wants it."""
    if dtype != torch.float32:
        return True
    if _MATMUL is None:
        return torch.get_float32_matmul_precision() != "medium"
    return _MATMUL.fp32_precision in ("none", "ieee")


def times(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix @ columns in the dtype of columns; matrix: a x b of any floating dtype, a transposed view too."""
    if matrix.dtype == columns.dtype:
        return matrix @ columns
    rows, inner = matrix.shape
    by_rows = matrix.stride(1) == 1 or matrix.stride(0) != 1  # as the matrix lies in memory
    step = max(1, TILE // max(1, inner if by_rows else rows))
    if by_rows:
        out = columns.new_empty(rows, columns.shape[1])
        for i in range(0, rows, step):
            torch.mm(matrix[i : i + step].to(columns.dtype), columns, out=out[i : i + step])
        return out
    out = columns.new_zeros(rows, columns.shape[1])
    for i in range(0, inner, step):
        out.addmm_(matrix[:, i : i + step].to(columns.dtype), columns[i : i + step])
    return out


def sums_dtype(tokens: Tensor) -> torch.dtype:
    """That of `over_tokens`."""
    half = tokens.is_cuda and tokens.dtype in _HALF and _FLOAT32_SUMS
    return torch.float32 if half else tokens.dtype


def over_tokens(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """a^T b (+ total) over rows; on a GPU in float32 where a and b are of half precision, on a CPU in their dtype."""
    if a.dtype != sums_dtype(a):
        if total is None:
            return torch.mm(a.mT, b, out_dtype=torch.float32)
        return torch.addmm(total, a.mT, b, out_dtype=torch.float32, out=total)
    return torch.mm(a.mT, b) if total is None else total.addmm_(a.mT, b)


def added(a: Tensor, b: Tensor, total: Tensor | None) -> Tensor | None:
    """None where a^T b fitted `total`, to which it was added in the same launch; elsewhere a^T b."""
    if total is None or total.dtype != sums_dtype(a) or total.shape != (a.shape[1], b.shape[1]):
        return over_tokens(a, b)
    over_tokens(a, b, total)
    return None
