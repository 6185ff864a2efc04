"""Products of frozen matrices of half types: as exact as in float32, a tile at a time, however the matrix lies."""

import pytest
import torch
from cases import lying
from helpers import Made, assert_close
from hypothesis import given
from hypothesis import strategies as st

from ssvdo_kernels.ops import products
from ssvdo_kernels.ops.products import times

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
          (torch.float64, torch.float64), (torch.bfloat16, torch.float64), (torch.float32, torch.float64)]  # fmt: skip


def check(matrix, columns, tiles):
    """|error| <= n u / (1 - n u) |A| |B|, entry by entry, for n = inner + tiles and u = eps / 2.

    A number of a half type is one of the work's dtype: what errs are the sums of `inner` products, in any order, and
    one more addition a tile.
    """
    got, n = times(matrix, columns), matrix.shape[1] + tiles
    assert got.dtype == columns.dtype and got.shape == (matrix.shape[0], columns.shape[1])
    u = torch.finfo(columns.dtype).eps / 2
    a, b = matrix.double(), columns.double()
    room = 1 + n * torch.finfo(torch.float64).eps  # for the truth's own rounding
    bound = n * u / (1 - n * u) * room * (a.abs() @ b.abs())
    if columns.dtype == torch.float64:
        bound *= 2  # the truth errs as much
    assert bool(((got.double() - a @ b).abs() <= bound).all())


@st.composite
def layouts(draw):
    size = st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 63, 64, 65]))
    return (draw(st.sampled_from(DTYPES)), draw(st.tuples(size, size, st.integers(1, 9))), draw(st.booleans()),
            draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 32, 63, 64, 65, 128])),
            draw(st.integers(0, 99)))  # fmt: skip


@given(layouts())
def test_any_layout_and_sizes_around_the_tile(case):
    (stored, work), (rows, inner, width), by_rows, pad, stride, tile, seed = case
    torch.manual_seed(seed)
    matrix = lying(torch.randn(rows * stride, inner).to(stored), by_rows, pad)[::stride]  # stride 2: neither way dense
    columns = torch.randn(width, inner, dtype=work).mT
    before, products.TILE = products.TILE, tile
    try:
        check(matrix, columns, max(rows, inner))
    finally:
        products.TILE = before


@pytest.mark.parametrize("stored, work", DTYPES)
@pytest.mark.parametrize("rows, inner, width", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
def test_nothing_of_nothing(rows, inner, width, stored, work):
    for matrix in (torch.ones(rows, inner, dtype=stored), torch.ones(inner, rows, dtype=stored).mT):
        assert torch.equal(times(matrix, torch.ones(inner, width, dtype=work)), torch.zeros(rows, width, dtype=work))


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_sizes_around_the_real_tile(by_rows, more):
    lines = products.TILE // 1024 + more
    matrix = torch.randn(lines, 1024).bfloat16()
    check(matrix if by_rows else matrix.mT, torch.randn(1024 if by_rows else lines, 3), 2)


def test_a_line_longer_than_the_tile(monkeypatch):
    monkeypatch.setattr(products, "TILE", 16)
    matrix = torch.randn(5, 40).half()
    check(matrix, torch.randn(40, 3), 1)
    check(matrix.mT, torch.randn(5, 3), 5)


@pytest.mark.parametrize("by_rows", [True, False])
def test_numbers_are_not_rounded_to_the_half_type(by_rows):
    """Columns beyond float16's range and digits, and sums that a half type would lose."""
    matrix = lying(torch.ones(4, 4096).half(), by_rows)
    columns = torch.full((4096, 2), 1.0 + 2**-20)
    columns[:, 1] = 1e30
    want = torch.stack([torch.full((4,), 4096 * (1 + 2**-20)), torch.full((4,), 4096e30)], 1)
    assert_close("sums", times(matrix, columns), want, 4096 * torch.finfo(torch.float32).eps / 2)
    assert_close("the first of them", times(matrix[:, :1], columns[:1]), columns[:1].expand(4, 2), 0.0)


@pytest.mark.parametrize("by_rows", [True, False])
def test_no_copy_of_the_whole_matrix_is_made(by_rows, monkeypatch):
    monkeypatch.setattr(products, "TILE", 256)
    matrix = lying(torch.randn(64, 64).bfloat16(), by_rows)
    columns = torch.randn(64, 2)
    with Made([matrix, columns]) as mode:
        times(matrix, columns)
    assert mode.numel == 256
