"""Launches of the token path's kernels on plain tensors: sizes, configurations, one or two passes.

Everything takes tensors of any strides and any sizes, 0 rows included; results are new and contiguous. x, u, z, V, R
and Q share one dtype of float16, bfloat16, float32 or float64. Products accumulate in float32 (float64 for float64);
float32 operands follow ``torch.backends.cuda.matmul.allow_tf32``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import kernels, tuning
from .configs import FUSED_EXTRA, FUSED_WIDTH, Config

_PROCESSORS: dict[int, int] = {}


def precision_of(dtype: torch.dtype) -> str:
    """ "half", "tf32", "fp32" or "fp64": the column of `configs.CONFIGS`."""
    if dtype == torch.float64:
        return "fp64"
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    return "half"


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _processors(x: Tensor) -> int:
    if not x.is_cuda:
        return 8
    index = x.device.index
    if index not in _PROCESSORS:
        _PROCESSORS[index] = torch.cuda.get_device_properties(x.device).multi_processor_count
    return _PROCESSORS[index]


def _device_of(x: Tensor) -> torch.cuda.device:
    """The tensor's device made current; nothing for a CPU tensor."""
    return torch.cuda.device(x.device.index if x.is_cuda else -1)


def _empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=like.dtype if dtype is None else dtype)


def _options(config: Config, precision: str) -> dict[str, Any]:
    return {**config.meta, "ACC": tl.float64 if precision == "fp64" else tl.float32,
            "PRECISION": "tf32" if precision == "tf32" else "ieee", "num_warps": config.warps,
            "num_stages": config.stages, "enable_fp_fusion": True}  # fmt: skip


def _groups(row_blocks: int, column_blocks: int, processors: int) -> int:
    """Runs of column blocks: enough programs to occupy the multiprocessors, at most 4, each repeating x V."""
    return max(1, min(4, column_blocks, processors // max(1, row_blocks)))


def one_pass(dtype: torch.dtype, w: int, e: int = 0) -> bool:
    """Whether V's w columns (and contract's e columns of z) fit on chip."""
    return w <= FUSED_WIDTH[precision_of(dtype)] and e <= FUSED_EXTRA


def expand(x: Tensor, V: Tensor, R: Tensor, keep_h: bool = False) -> tuple[Tensor, Tensor | None]:
    """([x | 0] + (x V) R, x V if keep_h). x: T x d; V: d x w; R: w x n, n >= d."""
    (T, d), w, n = x.shape, V.shape[1], R.shape[1]
    precision = precision_of(x.dtype)
    if not one_pass(x.dtype, w):
        h = x @ V
        return add_product(x, h, R), h if keep_h else None
    out = _empty(T, n, like=x)
    h = _empty(T, w, like=x) if keep_h else out
    if T:

        def launch(config: Config) -> None:
            meta = config.meta
            row_blocks, column_blocks = triton.cdiv(T, meta["BLOCK_T"]), triton.cdiv(n, meta["BLOCK_N"])
            grid = (row_blocks, _groups(row_blocks, column_blocks, _processors(x)))
            kernels.expand[grid](
                x, V, R, out, h, T, d, w, n, *x.stride(), *V.stride(), *R.stride(), *out.stride(), *h.stride(),
                WIDTH=_power(w), STORE_H=keep_h, **_options(config, precision))

        with _device_of(x):
            launch(tuning.choose("expand", precision, T, (d, w, n), launch))
    return out, h if keep_h else None


def merge(tall: Tensor, columns: Tensor, V: Tensor, Q: Tensor, transposed: bool) -> Tensor:
    """A + [A V | F] Q, or its transpose, contiguous; no temporary of A's size. tall: A, any strides. columns: F."""
    if not transposed:
        return contract(tall, columns, V, Q)[0]
    out = _empty(tall.shape[1], tall.shape[0], like=tall)
    contract(tall, columns, V, Q, out=out.mT)
    return out


def contract(
    u: Tensor,
    z: Tensor,
    V: Tensor,
    Q: Tensor,
    keep_g: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(u + [u V | z] Q + bias, [u V | z] if keep_g). u: T x d; z: T x e; V: d x w; Q: (w + e) x d; bias: d, contiguous;
    out: T x d, any strides."""
    (T, d), w, e = u.shape, V.shape[1], z.shape[1]
    precision = precision_of(u.dtype)
    if not one_pass(u.dtype, w, e):
        g = _empty(T, w + e, like=u)
        torch.mm(u, V, out=g[:, :w])
        g[:, w:] = z
        return add_product(u, g, Q, bias, out), g if keep_g else None
    out = _empty(T, d, like=u) if out is None else out
    g = _empty(T, w + e, like=u) if keep_g else out
    if T:
        second = (z, Q[w:], g[:, w:]) if e else (u, Q, g)

        def launch(config: Config) -> None:
            meta = config.meta
            row_blocks, column_blocks = triton.cdiv(T, meta["BLOCK_T"]), triton.cdiv(d, meta["BLOCK_N"])
            grid = (row_blocks, _groups(row_blocks, column_blocks, _processors(u)))
            kernels.contract[grid](
                u, second[0], V, Q, second[1], u if bias is None else bias, out, g, second[2], T, d, w, e,
                *u.stride(), *second[0].stride(), *V.stride(), *Q.stride(), *out.stride(), *g.stride(),
                WIDTH=_power(w), EXTRA=_power(e) if e else 0, STORE_G=keep_g,
                HAS_BIAS=bias is not None, **_options(config, precision))

        with _device_of(u):
            launch(tuning.choose("contract", precision, T, (d, w, e), launch))
    return out, g if keep_g else None


def add_product(
    a: Tensor, g: Tensor, P: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """[a | 0] + g P + bias. a: T x d; g: T x K; P: K x n, n >= d; bias: n, contiguous; out: T x n, any strides."""
    (T, d), K, n = a.shape, g.shape[1], P.shape[1]
    precision = precision_of(a.dtype)
    out = _empty(T, n, like=a) if out is None else out
    if T:

        def launch(config: Config) -> None:
            grid = (triton.cdiv(T, config.meta["BLOCK_T"]) * triton.cdiv(n, config.meta["BLOCK_N"]),)
            kernels.add_product[grid](
                a, g, P, a if bias is None else bias, out, T, d, K, n, *a.stride(), *g.stride(), *P.stride(),
                *out.stride(), HAS_BIAS=bias is not None, **_options(config, precision))

        with _device_of(a):
            launch(tuning.choose("add_product", precision, T, (d, K, n), launch))
    return out


def splits_of(T: int, tiles: int, processors: int) -> int:
    """Parts into which T rows are cut: enough programs for two waves, at least 256 rows each."""
    return int(max(1, min(triton.cdiv(2 * processors, tiles), triton.cdiv(T, 256))))


def token_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float32 (float64 for float64), the same bits every time. a: T x p; b: T x q."""
    (T, p), q = a.shape, b.shape[1]
    precision = precision_of(a.dtype)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    out = _empty(p, q, like=a, dtype=dtype)
    if not p * q:
        return out

    def launch(config: Config) -> None:
        meta = config.meta
        tiles = triton.cdiv(p, meta["BLOCK_P"]) * triton.cdiv(q, meta["BLOCK_Q"])
        splits = splits_of(T, tiles, _processors(a))
        partials = out if splits == 1 else _empty(splits, p, q, like=a, dtype=dtype)
        chunk = triton.cdiv(triton.cdiv(T, splits), meta["BLOCK_T"]) * meta["BLOCK_T"]
        kernels.reduce_rows[(tiles, splits)](
            a, b, partials, T, p, q, chunk, *a.stride(), *b.stride(), p * q, q, 1, **_options(config, precision))
        if splits > 1:
            kernels.sum_partials[(triton.cdiv(p * q, 1024),)](partials, out, splits, p * q, BLOCK=1024)

    with _device_of(a):
        launch(tuning.choose("reduce_rows", precision, T, (p, q), launch))
    return out
