"""The Triton kernels against float64 products: odd sizes, strides, dtypes, every element written.

Interpreted on the CPU; compiled where there is a GPU.
"""

from functools import reduce

import pytest
import torch
from helpers import assert_close, require_triton
from hypothesis import given
from hypothesis import strategies as st

require_triton()
from ssvdo_kernels.triton import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the sums' terms taken without sign (terms may cancel). Sums of up to 150 terms err by about sqrt(150) / 2 eps,
# two in a row: 32 eps. In float16 the on-chip x V and the result are rounded once each: 4 of its half eps.
TOLERANCE = {torch.float64: 32 * 2**-52, torch.float32: 32 * 2**-23, torch.float16: 4 * 2**-11}
sizes = st.tuples(st.sampled_from([0, 1, 2, 15, 33, 70]), st.integers(1, 70), st.integers(1, 40), st.integers(0, 20))
dtypes = st.sampled_from(list(TOLERANCE))


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """Results start as NaN, so that an element that no program writes is seen."""

    def poisoned(*shape, like, dtype=None):
        return torch.full(shape, float("nan"), device=like.device, dtype=like.dtype if dtype is None else dtype)

    monkeypatch.setattr(launch, "_empty", poisoned)


def draw(*shape, dtype, transposed=False):
    """Random, scaled so that sums over the first dimension keep their size; transposed: strides the other way."""
    made = torch.randn(shape, dtype=torch.float64) / max(1, shape[0]) ** 0.5
    made = made.to(dtype).to(DEVICE)
    return made.mT.contiguous().mT if transposed else made


def summed(*terms):
    """The sum of products in float64 (of one matrix: itself), and the same sum of the terms' magnitudes."""
    exact = [[f.double() for f in (term if isinstance(term, tuple) else (term,))] for term in terms]
    magnitudes = [[f.abs() for f in term] for term in exact]
    return tuple(sum(reduce(torch.matmul, term) for term in form) for form in (exact, magnitudes))


def expanded(x, V, R):
    return summed(torch.nn.functional.pad(x, (0, R.shape[1] - x.shape[1])), (x, V, R))


def contracted(u, z, V, Q, bias=None):
    w = V.shape[1]
    return summed(u, (u, V, Q[:w]), (z, Q[w:]), *([] if bias is None else [bias.expand_as(u)]))


def check(name, got, sums, tolerance):
    assert_close(name, got, sums[0], tolerance, size=sums[1])


@given(sizes, dtypes, st.booleans())
def test_expand(size, dtype, transposed):
    T, d, w, e = size
    x = draw(T, d, dtype=dtype, transposed=transposed)
    V, R = draw(d, w, dtype=dtype), draw(w, d + e, dtype=dtype, transposed=transposed)
    for keep in (False, True):
        out, kept = launch.expand(x, V, R, keep)
        check("out", out, expanded(x, V, R), TOLERANCE[dtype])
        assert (kept is None) == (not keep)
    check("h", kept[:, :w], summed((x, V)), TOLERANCE[dtype])
    assert torch.equal(kept[:, w:], out[:, d:])


@given(sizes, dtypes, st.booleans())
def test_contract(size, dtype, transposed):
    T, d, w, e = size
    uz = draw(T, d + e, dtype=dtype, transposed=transposed)
    u, z = uz[:, :d], uz[:, d:]  # strided, as the layer passes them
    V, Q = draw(d, w, dtype=dtype, transposed=transposed), draw(w + e, d, dtype=dtype)
    bias = draw(1, d, dtype=dtype)[0]
    for given_bias in (None, bias):
        out, g = launch.contract(u, z, V, Q, given_bias is not None, given_bias)
        check("out", out, contracted(u, z, V, Q, given_bias), TOLERANCE[dtype])
        assert (g is None) == (given_bias is None)
    check("u V", g[:, :w], summed((u, V)), TOLERANCE[dtype])
    assert torch.equal(g[:, w:], z)
    place = torch.full_like(g, float("nan"))
    place[:, w:] = z
    out, g = launch.contract(u, place[:, w:], V, Q, True, bias, g=place)
    check("out", out, contracted(u, z, V, Q, bias), TOLERANCE[dtype])
    check("u V in its place", place[:, :w], summed((u, V)), TOLERANCE[dtype])
    assert g is place and torch.equal(g[:, w:], z)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, d, w, e", [(37, 150, 140, 9), (20, 140, 5, 130), (0, 140, 140, 3), (9, 140, 140, 0)])
def test_wide_sizes_take_two_passes(T, d, w, e, dtype):
    assert not launch.one_pass(dtype, w, e)
    x, V, R = draw(T, d, dtype=dtype), draw(d, w, dtype=dtype), draw(w, d + e, dtype=dtype)
    out, kept = launch.expand(x, V, R, True)
    check("out", out, expanded(x, V, R), TOLERANCE[dtype])
    check("h", kept[:, :w], summed((x, V)), TOLERANCE[dtype])
    assert torch.equal(kept[:, w:], out[:, d:])
    z, Q = draw(T, e, dtype=dtype), draw(w + e, d, dtype=dtype)
    bias = draw(1, d, dtype=dtype)[0]
    out, g = launch.contract(x, z, V, Q, True, bias)
    check("x V", g[:, :w], summed((x, V)), TOLERANCE[dtype])
    assert torch.equal(g[:, w:], z)
    check("out", out, contracted(x, z, V, Q, bias), TOLERANCE[dtype])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("w", [5, 140])
def test_merge(w, wide):
    A, F = draw(90, 24, dtype=torch.float64), draw(90, 3, dtype=torch.float64)
    V, Q = draw(24, w, dtype=torch.float64), draw(w + 3, 24, dtype=torch.float64)
    weight = A.mT.contiguous() if wide else A
    got = launch.merge(weight.mT if wide else weight, F, V, Q, wide)
    want = A + torch.cat([A @ V, F], 1) @ Q
    assert got.is_contiguous()
    assert_close("W'", got, want.mT if wide else want, 1e-13)


def test_rows_beyond_two_to_the_31_elements():
    """Row 3 lies 3 * 2^30 elements after row 0: 32-bit offsets would wrap. What is never touched takes no memory."""
    stride = 1 << 30
    storage = torch.empty(3 * stride + 8, dtype=torch.float16, device=DEVICE)
    x = torch.as_strided(storage, (4, 8), (stride, 1))
    x.copy_(torch.randn(4, 8))
    V, R = draw(8, 3, dtype=torch.float16), draw(3, 10, dtype=torch.float16)
    check("out", launch.expand(x, V, R)[0], expanded(x, V, R), TOLERANCE[torch.float16])
    z, Q = draw(4, 2, dtype=torch.float16), draw(5, 8, dtype=torch.float16)
    check("out", launch.contract(x, z, V, Q)[0], contracted(x, z, V, Q), TOLERANCE[torch.float16])
    out = torch.as_strided(storage, (4, 8), (stride, 1))
    product = launch.add_product(z[:, :0], z, Q[:2], out=out)
    check("into", product, summed((z, Q[:2])), TOLERANCE[torch.float16])
