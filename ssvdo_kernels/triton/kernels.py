"""Triton kernels of the token path. Launched by launch.py, described in docs/kernels.md.

    expand       [x' | z] = [x | 0] + (x V) R          one pass, h = x V stays on chip
    contract     y = u + [u V | z] Q + bias            one pass, u V stays on chip
    add_product  y = [a | 0] + g P + bias              a product with an addend, where V is too wide for one pass

All accumulate in float32 (float64 for float64 operands). No size needs to be a multiple of anything: loads and stores
are masked. Offsets of rows are 64-bit, so that tensors may hold more than 2^31 elements. The number of tokens is not
specialised on, as it changes from batch to batch. Arguments come in the order of launch.py: tensors, what changes with
the tokens, sizes and strides, then blocks, flags, ACC and PRECISION.
"""

# mypy: ignore-errors
# ruff: noqa: SIM102 (a constexpr condition and a run-time one may not share an `if`)

import triton
import triton.language as tl


@triton.jit
def _tile(base, rows, columns, stride_row, stride_column, row_count, column_count):
    """Loads base[rows, columns], zero outside; rows and columns are index vectors."""
    pointers = base + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(pointers, mask=(rows[:, None] < row_count) & (columns[None, :] < column_count), other=0.0)


@triton.jit
def _row(base, columns, column_count):
    """Loads a contiguous vector as one row, zero outside."""
    return tl.load(base + columns, mask=columns < column_count, other=0.0)[None, :]


@triton.jit
def _put(base, value, rows, columns, stride_row, stride_column, row_count, column_count):
    pointers = base + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    tl.store(pointers, value.to(base.dtype.element_ty),
             mask=(rows[:, None] < row_count) & (columns[None, :] < column_count))


@triton.jit
def _project(x, V, rows, T, d, w, x_row, x_col, V_row, V_col,
             BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
             PRECISION: tl.constexpr):
    """x[rows] V as BLOCK_T x WIDTH, accumulated in ACC."""
    inner = tl.arange(0, WIDTH)
    h = tl.zeros((BLOCK_T, WIDTH), dtype=ACC)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = tl.dot(_tile(x, rows, columns, x_row, x_col, T, d), _tile(V, columns, inner, V_row, V_col, d, w), h,
                   input_precision=PRECISION, out_dtype=ACC)
    return h


@triton.jit
def _put_beyond(base, value, rows, columns, first, stride_row, stride_column, row_count, column_count):
    """Stores the columns from `first` on, the first of them as column 0."""
    moved = (columns - first).to(tl.int64)
    pointers = base + rows.to(tl.int64)[:, None] * stride_row + moved[None, :] * stride_column
    tl.store(pointers, value.to(base.dtype.element_ty),
             mask=(rows[:, None] < row_count) & (columns[None, :] >= first) & (columns[None, :] < column_count))


@triton.jit(do_not_specialize=["T"])
def expand(x, V, R, out, kept, T, d, w, n, x_row, x_col, V_row, V_col, R_row, R_col, out_row, out_col, kept_row,
           kept_col, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
           KEEP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out (T x n) = [x' | z] = [x | 0] + (x V) R. x: T x d; V: d x w; R: w x n, n >= d. KEEP: kept = [x V | z].

    Program (i, j) computes row block i of the j-th run of column blocks; each of the runs computes x V anew.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.program_id(1)
    inner = tl.arange(0, WIDTH)
    h = _project(x, V, rows, T, d, w, x_row, x_col, V_row, V_col, BLOCK_T, BLOCK_D, WIDTH, ACC, PRECISION)
    h = h.to(x.dtype.element_ty)
    if KEEP:
        if group == 0:
            _put(kept, h, rows, inner, kept_row, kept_col, T, w)
    blocks = tl.cdiv(n, BLOCK_N)
    share = tl.cdiv(blocks, tl.num_programs(1))
    for block in range(group * share, tl.minimum(group * share + share, blocks)):
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        y = tl.dot(h, _tile(R, inner, columns, R_row, R_col, w, n), input_precision=PRECISION, out_dtype=ACC)
        y += _tile(x, rows, columns, x_row, x_col, T, d).to(ACC)
        _put(out, y, rows, columns, out_row, out_col, T, n)
        if KEEP:
            _put_beyond(kept + w * kept_col, y, rows, columns, d, kept_row, kept_col, T, n)


@triton.jit(do_not_specialize=["T"])
def contract(u, z, V, Q, Qz, bias, out, g_out, gz_out, T, d, w, e, u_row, u_col, z_row, z_col, V_row, V_col,
             Q_row, Q_col, out_row, out_col, g_row, g_col,
             BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
             EXTRA: tl.constexpr, STORE_G: tl.constexpr, STORE_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out (T x d) = u + [u V | z] [Q; Qz] + bias. u: T x d; z: T x e; V: d x w; Q: w x d; Qz: e x d, strides as Q's.

    With STORE_G, u V goes to g_out (T x w); with STORE_Z, z to gz_out (T x e), strides as g_out's.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.program_id(1)
    inner = tl.arange(0, WIDTH)
    g = _project(u, V, rows, T, d, w, u_row, u_col, V_row, V_col, BLOCK_T, BLOCK_D, WIDTH, ACC, PRECISION)
    g = g.to(u.dtype.element_ty)
    if STORE_G:
        if group == 0:
            _put(g_out, g, rows, inner, g_row, g_col, T, w)
    if EXTRA > 0:
        more = tl.arange(0, EXTRA)
        zs = _tile(z, rows, more, z_row, z_col, T, e)
        if STORE_Z:
            if group == 0:
                _put(gz_out, zs, rows, more, g_row, g_col, T, e)
    blocks = tl.cdiv(d, BLOCK_N)
    share = tl.cdiv(blocks, tl.num_programs(1))
    for block in range(group * share, tl.minimum(group * share + share, blocks)):
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        y = tl.zeros((BLOCK_T, BLOCK_N), dtype=ACC)
        if HAS_BIAS:
            y += _row(bias, columns, d).to(ACC)
        y = tl.dot(g, _tile(Q, inner, columns, Q_row, Q_col, w, d), y, input_precision=PRECISION, out_dtype=ACC)
        if EXTRA > 0:
            y = tl.dot(zs, _tile(Qz, more, columns, Q_row, Q_col, e, d), y,
                       input_precision=PRECISION, out_dtype=ACC)
        y += _tile(u, rows, columns, u_row, u_col, T, d).to(ACC)
        _put(out, y, rows, columns, out_row, out_col, T, d)


@triton.jit(do_not_specialize=["T"])
def add_product(a, g, P, bias, out, z_out, T, d, K, n, a_row, a_col, g_row, g_col, P_row, P_col, out_row, out_col,
                z_row, z_col, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                GROUP_T: tl.constexpr, STORE_Z: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
                PRECISION: tl.constexpr):
    """out (T x n) = [a | 0] + g P + bias. a: T x d, d <= n; g: T x K; P: K x n; bias: n. STORE_Z: z_out = out[:, d:].

    Programs walk GROUP_T row blocks down before they move a column block to the right, so that P stays in L2.
    """
    row_blocks, column_blocks = tl.cdiv(T, BLOCK_T), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (GROUP_T * column_blocks)
    height = tl.minimum(row_blocks - band * GROUP_T, GROUP_T)
    within = pid % (GROUP_T * column_blocks)
    rows = (band * GROUP_T + within % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_T, BLOCK_N), dtype=ACC)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        y = tl.dot(_tile(g, rows, inner, g_row, g_col, T, K), _tile(P, inner, columns, P_row, P_col, K, n), y,
                   input_precision=PRECISION, out_dtype=ACC)
    y += _tile(a, rows, columns, a_row, a_col, T, d).to(ACC)
    if HAS_BIAS:
        y += _row(bias, columns, n).to(ACC)
    _put(out, y, rows, columns, out_row, out_col, T, n)
    if STORE_Z:
        _put_beyond(z_out, y, rows, columns, d, z_row, z_col, T, n)


INTERPRETED = not isinstance(_row, triton.JITFunction)  # what TRITON_INTERPRET said when this was loaded
