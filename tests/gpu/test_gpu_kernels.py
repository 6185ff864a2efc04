"""The compiled Triton kernels against float64 products; small enough for compute-sanitizer."""

import pytest
import torch
from helpers import assert_close, assert_right, make_layer, require_triton

require_triton()
from benchmarks.bench_kernels import forms, taking
from benchmarks.kernel_table import describe
from ssvdo_kernels.ops.products import over_tokens
from ssvdo_kernels.triton import launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
# Rounded once on chip (x V) and once at the end, and x + x V R may be a few times smaller than its terms: 4 eps.
TOLERANCE = {torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11, torch.float32: 32 * 2**-23, torch.float64: 1e-13}
SIZES = [(1, 16, 16, 0), (33, 70, 40, 5), (200, 130, 128, 64), (77, 150, 140, 9), (65, 64, 5, 130)]


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    def poisoned(*shape, like, dtype=None):
        return torch.full(shape, float("nan"), device=like.device, dtype=like.dtype if dtype is None else dtype)

    monkeypatch.setattr(launch, "_empty", poisoned)


def draw(*shape, dtype):
    return (torch.randn(shape, device="cuda", dtype=torch.float64) / max(1, shape[0]) ** 0.5).to(dtype)


def check(T, d, w, e, dtype):
    """`expand` and `contract`; returns x and [x V | z] of the latter."""
    tolerance = TOLERANCE[dtype]
    uz, V, R, Q = (draw(*s, dtype=dtype) for s in ((T, d + e), (d, w), (w, d + e), (w + e, d)))
    x, z = uz[:, :d], uz[:, d:]
    h = x.double() @ V.double()
    out, kept = launch.expand(x, V, R, True)
    assert_close("expand", out, torch.cat([x.double(), x.new_zeros(T, e).double()], 1) + h @ R.double(), tolerance)
    assert_close("h", kept[:, :w], h, tolerance)
    assert torch.equal(kept[:, w:], out[:, d:])
    g = torch.cat([h, z.double()], 1)
    bias = draw(1, d, dtype=dtype)[0]
    out, kept = launch.contract(x, z, V, Q, True, bias)
    assert_close("contract", out, x.double() + g @ Q.double() + bias.double(), tolerance)
    assert_close("g", kept, g, tolerance)
    return x, kept


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, d, w, e", SIZES)
def test_every_kernel(T, d, w, e, dtype):
    x, kept = check(T, d, w, e, dtype)
    product = over_tokens(kept, x)
    assert product.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close("over tokens", product, kept.double().mT @ x.double(), 1e-5 if dtype != torch.float64 else 1e-13)
    assert torch.equal(product, over_tokens(kept, x))
    twice = over_tokens(kept, x, over_tokens(kept, x))
    assert_close("added to", twice, 2 * kept.double().mT @ x.double(), 1e-5 if dtype != torch.float64 else 1e-13)


FORMS = forms(256, 64, torch.bfloat16, torch.device("cuda")) if torch.cuda.is_available() else []
each_form = pytest.mark.parametrize("kernel, config", FORMS, ids=[f"{k}, {describe(c)}" for k, c in FORMS])


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row_blocks, d, w, e", [(0, 224, 144, 48), (2, 264, 256, 64), (0, 256, 256, 0)])
def test_every_form_of_wide_sizes(row_blocks, d, w, e, dtype, kernel, config):
    """row_blocks: so many of 128 for each multiprocessor, and some rows more."""
    T = 77 + row_blocks * 128 * torch.cuda.get_device_properties(0).multi_processor_count
    with taking(kernel, config):
        check(T, d, w, e, dtype)


@each_form
@pytest.mark.parametrize("wide", [False, True])
def test_every_form_in_a_layer(wide, kernel, config):
    """The way back comes from a thread of autograd's, which has no allocator of Triton's."""
    m, n = (1024, 1200) if wide else (1200, 1024)
    layer = make_layer(m, n, dtype=torch.bfloat16, device="cuda", spread=0.02, outer_rank=16, inner_ratio=0.25,
                       path="folded", backend="triton")  # fmt: skip
    with taking(kernel, config):
        assert_right(layer, 200, 8 * 2**-7)


@each_form
def test_every_form_in_a_graph(kernel, config):
    x, V, R = (draw(*s, dtype=torch.bfloat16) for s in ((77, 256), (256, 256), (256, 320)))
    z, Q = draw(77, 64, dtype=torch.bfloat16), draw(320, 256, dtype=torch.bfloat16)

    def both():
        return launch.expand(x, V, R)[0], launch.contract(x, z, V, Q)[0]

    with taking(kernel, config):
        want = [both() for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = both()
        for t in got:
            t.zero_()
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("wide", [False, True])
def test_merge(wide):
    A, F, V, Q = (draw(*s, dtype=torch.bfloat16) for s in ((300, 70), (300, 8), (70, 40), (48, 70)))
    weight = A.mT.contiguous() if wide else A
    want = A.double() + torch.cat([A.double() @ V.double(), F.double()], 1) @ Q.double()
    got = launch.merge(weight.mT if wide else weight, F, V, Q, wide)
    assert_close("merge", got, want.mT if wide else want, TOLERANCE[torch.bfloat16])


def test_more_than_two_to_the_31_elements():
    T, d = (1 << 31) // 1024 + 8, 1024
    x = torch.zeros(T, d, device="cuda", dtype=torch.bfloat16)
    x[-8:] = draw(8, d, dtype=torch.bfloat16)
    V, R = draw(d, 16, dtype=torch.bfloat16), draw(16, d, dtype=torch.bfloat16)
    want = x[-8:].double() + x[-8:].double() @ V.double() @ R.double()
    assert_close("expand", launch.expand(x, V, R)[0][-8:], want, TOLERANCE[torch.bfloat16])
    assert_close("contract", launch.contract(x, x[:, :0], V, R)[0][-8:], want, TOLERANCE[torch.bfloat16])
