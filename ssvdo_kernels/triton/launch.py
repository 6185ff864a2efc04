"""Launches of the token path's kernels on plain tensors: sizes, configurations, one or two passes.

Everything takes tensors of any strides and any sizes, 0 rows included; results are new and contiguous. x, u, z, V, R
and Q share one dtype of float16, bfloat16, float32 or float64. Products accumulate in float32 (float64 for float64);
float32 operands follow ``torch.backends.cuda.matmul.fp32_precision``.

Where V is too wide to be held on chip without a thought (up to `configs.WIDE` columns in half precision), one pass is
timed against two launches, as configurations of one kernel are, and two launches are what is taken untimed.

A launch that is like an earlier one, up to the number of tokens, takes its configuration and its compiled kernel from a
table: Triton's own way there looks at every argument anew and costs three times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..traffic import tf32
from . import kernels, persistent, tuning
from .configs import FUSED_EXTRA, FUSED_WIDTH, TWO, WIDE, WIDE_EXTRA, Config

Grid = Callable[[Config], tuple[int, int, int]]
Launched = tuple[Any, tuple[Any, ...]]
_compiled: dict[tuple[Any, ...], tuple[Any, Config, tuple[Any, ...]]] = {}
_again: dict[tuple[Any, ...], Launched] = {}
_twice: set[tuple[Any, ...]] = set()  # sizes at which two launches are faster than one pass, or all there is
_NO_SIZE: tuple[Any, ...] = ()
_processors: dict[int, int] = {-1: 8}
_HERE = nullcontext()
_MOST = 4096  # numbers of tokens and the like that are remembered at a time


def precision_of(dtype: torch.dtype) -> str:
    """ "half", "tf32", "fp32" or "fp64": the column of `configs.CONFIGS`."""
    if dtype == torch.float64:
        return "fp64"
    if dtype == torch.float32:
        return "tf32" if tf32() else "fp32"
    return "half"


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def processors(x: Tensor) -> int:
    """Multiprocessors of the tensor's device."""
    index = x.get_device()
    if index not in _processors:
        _processors[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return _processors[index]


def capability(index: int) -> str:
    """The compute capability of a device; -1: what the interpreter is taken for."""
    return "9.0" if index < 0 else ".".join(map(str, torch.cuda.get_device_capability(index)))


def _on(index: int) -> AbstractContextManager[Any]:
    """The device made current, where it is not."""
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(*shape)


def _ready(call: tuple[Any, ...], operands: tuple[Tensor, ...]) -> Launched | None:
    """What `_run` has remembered of a call, where its operands are aligned."""
    bits = 0
    for t in operands:
        bits |= t.data_ptr()
    return None if bits & 15 else _again.get(call)


def _start(again: Launched, index: int, operands: tuple[Tensor, ...]) -> None:
    """Launches what `_run` has remembered."""
    if index < 0 or index == torch.cuda.current_device():
        again[0](*operands, *again[1])
    else:
        with torch.cuda.device(index):
            again[0](*operands, *again[1])


def _run(
    call: tuple[Any, ...],
    name: str,
    operands: tuple[Tensor, ...],
    T: int,
    rest: tuple[int, ...],
    flags: tuple[int, ...],
    sizes: tuple[int, ...],
    grid: Grid,
    twice: tuple[tuple[Any, ...], Callable[[], Tensor]] | None = None,
) -> None:
    """Launches a kernel by its name.

    Args:
        call: what the launch is remembered by; all that decides on it but whether operands are aligned.
        operands, T, rest, flags: its arguments in their order, but for the blocks and the precision. Nothing is
            specialised on T.
        sizes: what its timing is remembered by, beside T. grid: a configuration's programs.
        twice: where two launches are among the configurations, the size's key in `_twice` and what makes the two.
    """
    first, precision = operands[0], precision_of(operands[0].dtype)
    index, bits = first.get_device(), [t.data_ptr() & 15 for t in operands]
    key = name, index, precision, first.dtype, call[0], (T - 1).bit_length(), rest, flags, *bits

    with _on(index):
        found = _compiled.get(key)
        if found is None:

            def launch(config: Config) -> Any:
                if config is TWO:
                    assert twice is not None
                    return twice[1]() is not None
                options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
                constants = _constants(config, flags, precision)
                kernel = getattr(persistent if config.persistent else kernels, name)
                return _started(kernel, grid(config), config)(*operands, T, *rest, *constants, **options)

            listed = f"wide_{name}" if twice else name
            order = tuning.choose(listed, precision, T, sizes, launch, capability=capability(index))
            kernel, config = _first_with_room(launch, order)
            # None: interpreted. What a capture takes may not have been timed.
            if kernel is not None and not tuning.capturing():
                _compiled[key] = kernel, config, _constants(config, flags, precision)
            return
        kernel, config, constants = found
        if config is TWO and twice is not None:
            if not call[0]:  # deterministic algorithms time nothing
                _make_room(_twice)
                _twice.add(twice[0])
            twice[1]()
            return
        again = _started(kernel, grid(config), config), (T, *rest, *constants)
        again[0](*operands, *again[1])
    if not any(bits):
        _make_room(_again)
        _again[call] = again


def _make_room(table: dict[Any, Any] | set[Any]) -> None:
    if len(table) >= _MOST:
        table.clear()


def _started(kernel: Any, programs: tuple[int, int, int], config: Config) -> Callable[..., Any]:
    """The kernel on so many programs; a persistent one with memory for its descriptors."""
    start: Callable[..., Any] = kernel[programs]
    if not config.persistent:
        return start

    def allocating(*arguments: Any, **options: Any) -> Any:
        triton.set_allocator(_scratch)
        return start(*arguments, **options)

    # Allocators are of a context: that of autograd's thread has none, and the caller's keeps its own.
    return lambda *arguments, **options: copy_context().run(allocating, *arguments, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _constants(config: Config, flags: tuple[int, ...], precision: str) -> tuple[Any, ...]:
    accumulator = tl.float64 if precision == "fp64" else tl.float32
    return *config.meta.values(), *flags, accumulator, "tf32" if precision == "tf32" else "ieee"


def _first_with_room(launch: Callable[[Config], Any], order: tuple[Config, ...]) -> tuple[Any, Config]:
    """Launches the first configuration for which the device has room. Returns the compiled kernel with it."""
    for config in order[:-1]:
        try:
            return launch(config), config
        except OutOfResources:
            continue
    return launch(order[-1]), order[-1]


def _groups(row_blocks: int, column_blocks: int, processors: int) -> int:
    """Runs of column blocks: enough programs to occupy the multiprocessors, at most 4, each repeating x V."""
    return max(1, min(4, column_blocks, processors // max(1, row_blocks)))


def _by_rows(T: int, columns: int, processors: int) -> Grid:
    """Programs of the one-pass kernels; of persistent ones, no more than there are multiprocessors."""

    def grid(config: Config) -> tuple[int, int, int]:
        row_blocks, column_blocks = -(-T // config.meta["BLOCK_T"]), -(-columns // config.meta["BLOCK_N"])
        programs = min(row_blocks, processors) if config.persistent else row_blocks
        return programs, _groups(row_blocks, column_blocks, processors), 1

    return grid


def one_pass(dtype: torch.dtype, w: int, e: int = 0) -> bool:
    """Whether V's w columns (and contract's e columns of z) fit on chip."""
    return w <= FUSED_WIDTH[precision_of(dtype)] and e <= FUSED_EXTRA


def timed(dtype: torch.dtype, w: int, e: int = 0) -> bool:
    """Whether one pass is timed against two launches at such a width, where `_movable` holds."""
    return dtype.itemsize == 2 and w <= WIDE and e <= WIDE_EXTRA and not one_pass(dtype, w, e)


def _movable(*operands: Tensor) -> bool:
    """Whether TMA moves their tiles in half precision: columns side by side, rows apart, both begin on 16 bytes."""
    return all(t.stride(1) == 1 and t.stride(0) > 0 and not t.stride(0) & 7 and not t.data_ptr() & 15 for t in operands)


def _call(name: str, x: Tensor) -> tuple[Any, ...]:
    """What decides on a launch beside sizes, strides and flags: where it runs, dtype, switches."""
    dtype = x.dtype
    return (torch.are_deterministic_algorithms_enabled(), name, x.get_device(), dtype,
            dtype == torch.float32 and tf32())  # fmt: skip


def expand(x: Tensor, V: Tensor, R: Tensor, keep: bool = False) -> tuple[Tensor, Tensor | None]:
    """([x' | z] = [x | 0] + (x V) R, [x V | z] if keep). x: T x d; V: d x w; R: w x n, n >= d."""
    (T, d), (w, n) = x.shape, R.shape
    kept = _empty(x, T, w + n - d) if keep else None
    wide, size = not one_pass(x.dtype, w), _NO_SIZE
    if wide and (not timed(x.dtype, w) or (size := ("expand", x.shape, x.dtype, x.get_device(), w, n)) in _twice):
        return _expand_twice(x, V, R, kept), kept
    out = _empty(x, T, n)
    to = out if kept is None else kept
    call = *_call("expand", x), T, d, w, n, x.stride(), V.stride(), R.stride(), keep
    if (again := _ready(call, (x, V, R))) is not None:
        _start(again, call[2], (x, V, R, out, to))
    elif wide and (w & 7 or not _movable(x, V, R, out, to)):
        _expand_twice(x, V, R, kept, out)
    elif T:
        rest = (d, w, n, *x.stride(), *V.stride(), *R.stride(), *out.stride(), *to.stride())
        twice = (size, partial(_expand_twice, x, V, R, kept, out)) if wide else None
        _run(call, "expand", (x, V, R, out, to), T, rest, (_power(w), keep), (d, w, n),
             _by_rows(T, n, processors(x)), twice)  # fmt: skip
    return out, kept


def _expand_twice(x: Tensor, V: Tensor, R: Tensor, kept: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`expand` in two launches."""
    w = V.shape[1]
    h = x @ V if kept is None else torch.mm(x, V, out=kept[:, :w])
    return add_product(x, h, R, out=out, z_out=None if kept is None else kept[:, w:])


def merge(tall: Tensor, columns: Tensor, V: Tensor, Q: Tensor, transposed: bool) -> Tensor:
    """A + [A V | F] Q, or its transpose, contiguous; no temporary of A's size. tall: A, any strides. columns: F."""
    if not transposed:
        return contract(tall, columns, V, Q)[0]
    out = _empty(tall, tall.shape[1], tall.shape[0])
    contract(tall, columns, V, Q, out=out.mT)
    return out


def contract(
    u: Tensor,
    z: Tensor,
    V: Tensor,
    Q: Tensor,
    keep: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    g: Tensor | None = None,
    below: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(u + [u V | z] Q + bias, [u V | z] if keep). u: T x d; z: T x e; V: d x w; Q: (w + e) x d; bias: d, contiguous;
    out: T x d, any strides; g: T x (w + e), where z is its last e columns already: what is kept goes there; below:
    Q[w:], where it is at hand."""
    (T, d), w, e = u.shape, V.shape[1], z.shape[1]
    wide, given, size = not one_pass(u.dtype, w, e), out is not None, _NO_SIZE
    if wide and keep and g is None:
        g = _beside(z, w)
    if wide and (not timed(u.dtype, w, e) or (size := ("contract", u.shape, u.dtype, u.get_device(), w, e)) in _twice):
        return _contract_twice(u, z, V, Q, bias, out, g), g if keep else None
    store_z = keep and g is None and e > 0
    out = _empty(u, T, d) if out is None else out
    g = _empty(u, T, w + e) if g is None and keep else g
    if not T:
        return out, g if keep else None
    to = out if g is None else g
    second = (z, Q[w:] if below is None else below, to[:, w:] if store_z else to) if e else (u, Q, to)
    operands = (u, second[0], V, Q, second[1], u if bias is None else bias, out, to, second[2])
    call = (*_call("contract", u), T, d, w, e, u.stride(), z.stride(), V.stride(), Q.stride(), to.stride(), keep,
            store_z, bias is None, given and out.stride())  # fmt: skip
    if (again := _ready(call, operands)) is not None:
        _start(again, call[2], operands)
    elif wide and not _movable(u, second[0], V, Q, out, to):
        _contract_twice(u, z, V, Q, bias, out, g)
    else:
        rest = (d, w, e, *u.stride(), *second[0].stride(), *V.stride(), *Q.stride(), *out.stride(), *to.stride())
        flags = (_power(w), _power(e) if e else 0, keep, store_z, bias is not None)
        twice = (size, partial(_contract_twice, u, z, V, Q, bias, out, g)) if wide else None
        _run(call, "contract", operands, T, rest, flags, (d, w, e), _by_rows(T, d, processors(u)), twice)
    return out, g if keep else None


def _beside(z: Tensor, w: int) -> Tensor:
    """A place for w columns, and z."""
    g = _empty(z, z.shape[0], w + z.shape[1])
    g[:, w:] = z
    return g


def _contract_twice(
    u: Tensor, z: Tensor, V: Tensor, Q: Tensor, bias: Tensor | None, out: Tensor | None, g: Tensor | None
) -> Tensor:
    """`contract` in two launches."""
    g = _beside(z, V.shape[1]) if g is None else g
    torch.mm(u, V, out=g[:, : V.shape[1]])
    return add_product(u, g, Q, bias, out)


def add_product(
    a: Tensor,
    g: Tensor,
    P: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    z_out: Tensor | None = None,
) -> Tensor:
    """[a | 0] + g P + bias. a: T x d; g: T x K; P: K x n, n >= d; bias: n, contiguous; out: T x n, any strides; z_out:
    T x (n - d), a second place for the result's last columns."""
    (T, d), (K, n) = a.shape, P.shape
    given = out is not None
    out = _empty(a, T, n) if out is None else out
    if not T:
        return out
    z = out if z_out is None or n == d else z_out
    operands = (a, g, P, a if bias is None else bias, out, z)
    call = (*_call("add_product", a), T, d, K, n, a.stride(), g.stride(), P.stride(), z.stride(), z is out,
            bias is None, given and out.stride())  # fmt: skip
    if (again := _ready(call, operands)) is not None:
        _start(again, call[2], operands)
        return out

    def grid(config: Config) -> tuple[int, int, int]:
        return -(-T // config.meta["BLOCK_T"]) * -(-n // config.meta["BLOCK_N"]), 1, 1

    rest = (d, K, n, *a.stride(), *g.stride(), *P.stride(), *out.stride(), *z.stride())
    _run(call, "add_product", operands, T, rest, (z is not out, bias is not None), (d, K, n), grid)
    return out
