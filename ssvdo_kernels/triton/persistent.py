"""One-pass kernels for V of up to 256 columns: tiles are moved by the tensor memory accelerator (TMA).

`expand` and `contract` of kernels.py, with their arguments. As many programs as there are multiprocessors walk the row
blocks. Columns lie side by side, rows and first elements are aligned to 16 bytes, which launch.py sees to; tiles beyond
a matrix read as zeros and are not written. Descriptors are made on the device: made on the host, they would cost Python
some microseconds each launch. Stages are given at the loops that add x or u: a launch's own fetch ahead for the
products' operands alone, and an addend would be waited for in every turn.
"""

# mypy: ignore-errors
# ruff: noqa: SIM102 (a constexpr condition and a run-time one may not share an `if`)

import triton
import triton.language as tl


@triton.jit
def _project(x, V, row, d, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
             PRECISION: tl.constexpr):
    """The row block of x V, accumulated in ACC; x, V: descriptors."""
    h = tl.zeros((BLOCK_T, WIDTH), dtype=ACC)
    for start in range(0, d, BLOCK_D):
        h = tl.dot(x.load([row, start]), V.load([start, 0]), h, input_precision=PRECISION, out_dtype=ACC)
    return h


@triton.jit
def _halves(value):
    """The left and the right half of a block's columns."""
    return value.reshape(value.shape[0], 2, value.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _put(to, value, row, QUARTER: tl.constexpr):
    """Stores a block by quarters of its columns, each through the same shared memory."""
    left, right = _halves(value)
    first, second = _halves(left)
    to.store([row, 0], first)
    to.store([row, QUARTER], second)
    first, second = _halves(right)
    to.store([row, 2 * QUARTER], first)
    to.store([row, 3 * QUARTER], second)


@triton.jit
def _share(columns, BLOCK_N: tl.constexpr):
    """The first column and the end of this program's run of column blocks."""
    share = tl.cdiv(tl.cdiv(columns, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, columns)


@triton.jit(do_not_specialize=["T"])
def expand(x, V, R, out, kept, T, d, w, n, x_row, x_col, V_row, V_col, R_row, R_col, out_row, out_col, kept_row,
           kept_col, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
           KEEP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out (T x n) = [x' | z] = [x | 0] + (x V) R. KEEP: kept = [x V | z]. Program (i, j): as in kernels.py."""
    tl.static_assert(BLOCK_D == BLOCK_N, "x is read by tiles of one size")
    xs = tl.make_tensor_descriptor(x, [T, d], [x_row, x_col], [BLOCK_T, BLOCK_D])
    Vs = tl.make_tensor_descriptor(V, [d, w], [V_row, V_col], [BLOCK_D, WIDTH])
    Rs = tl.make_tensor_descriptor(R, [w, n], [R_row, R_col], [WIDTH, BLOCK_N])
    outs = tl.make_tensor_descriptor(out, [T, n], [out_row, out_col], [BLOCK_T, BLOCK_N])
    if KEEP:
        hs = tl.make_tensor_descriptor(kept, [T, w], [kept_row, kept_col], [BLOCK_T, WIDTH // 4])
        zs = tl.make_tensor_descriptor(kept + w, [T, tl.maximum(n - d, 1)], [kept_row, kept_col], [BLOCK_T, BLOCK_N])
    first, end = _share(n, BLOCK_N)
    for row in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        h = _project(xs, Vs, row, d, BLOCK_T, BLOCK_D, WIDTH, ACC, PRECISION).to(x.dtype.element_ty)
        if KEEP:
            if first == 0:
                _put(hs, h, row, WIDTH // 4)
        for start in tl.range(first, end, BLOCK_N, num_stages=3):
            y = tl.dot(h, Rs.load([0, start]), xs.load([row, start]).to(ACC), input_precision=PRECISION, out_dtype=ACC)
            y = y.to(x.dtype.element_ty)
            outs.store([row, start], y)
            if KEEP:
                if (n > d) & (start + BLOCK_N > d):
                    zs.store([row, start - d], y)  # columns before the first are not written


@triton.jit(do_not_specialize=["T"])
def contract(u, z, V, Q, Qz, bias, out, g_out, gz_out, T, d, w, e, u_row, u_col, z_row, z_col, V_row, V_col,
             Q_row, Q_col, out_row, out_col, g_row, g_col,
             BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
             EXTRA: tl.constexpr, STORE_G: tl.constexpr, STORE_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out (T x d) = u + [u V | z] [Q; Qz] + bias. With STORE_G, u V goes to g_out; z lies where it is kept."""
    tl.static_assert(BLOCK_D == BLOCK_N, "u is read by tiles of one size")
    tl.static_assert(not STORE_Z, "z is not copied")
    us = tl.make_tensor_descriptor(u, [T, d], [u_row, u_col], [BLOCK_T, BLOCK_D])
    Vs = tl.make_tensor_descriptor(V, [d, w], [V_row, V_col], [BLOCK_D, WIDTH])
    Qs = tl.make_tensor_descriptor(Q, [w, d], [Q_row, Q_col], [WIDTH, BLOCK_N])
    outs = tl.make_tensor_descriptor(out, [T, d], [out_row, out_col], [BLOCK_T, BLOCK_N])
    if STORE_G:
        gs = tl.make_tensor_descriptor(g_out, [T, w], [g_row, g_col], [BLOCK_T, WIDTH // 4])
    if EXTRA > 0:
        zs = tl.make_tensor_descriptor(z, [T, e], [z_row, z_col], [BLOCK_T, EXTRA])
        Qzs = tl.make_tensor_descriptor(Qz, [e, d], [Q_row, Q_col], [EXTRA, BLOCK_N])
    first, end = _share(d, BLOCK_N)
    for row in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        g = _project(us, Vs, row, d, BLOCK_T, BLOCK_D, WIDTH, ACC, PRECISION).to(u.dtype.element_ty)
        if STORE_G:
            if first == 0:
                _put(gs, g, row, WIDTH // 4)
        if EXTRA > 0:
            more = zs.load([row, 0])
        for start in tl.range(first, end, BLOCK_N, num_stages=3):
            y = us.load([row, start]).to(ACC)
            if HAS_BIAS:
                columns = start + tl.arange(0, BLOCK_N)
                y += tl.load(bias + columns, mask=columns < d, other=0.0)[None, :].to(ACC)
            y = tl.dot(g, Qs.load([0, start]), y, input_precision=PRECISION, out_dtype=ACC)
            if EXTRA > 0:
                y = tl.dot(more, Qzs.load([0, start]), y, input_precision=PRECISION, out_dtype=ACC)
            outs.store([row, start], y.to(u.dtype.element_ty))
