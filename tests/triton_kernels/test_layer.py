"""SSVDOLinear with backend="triton" against the float64 reference: outputs and every gradient."""

import pytest
import torch
from helpers import assert_close, make_layer, reference_linear, require_triton, three
from hypothesis import given
from hypothesis import strategies as st

require_triton()
from test_linear import compare

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, gradient_accumulation
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.planner import joins
from ssvdo_kernels.triton import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets; tests/gpu has the compiled kernels")
SHAPES = [(24, 8, 0.5, 3), (8, 24, 0.5, 3), (8, 8, 0.6, 0), (24, 8, 0.25, 6), (8, 24, 0.25, 6), (1, 1, 1.0, 0),
          (5, 1, 1.0, 1)]
TRITON = {"backend": "triton"}


@pytest.mark.parametrize("path", ["auto", "folded", "merged"])
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("rotation, outer", [("cayley", "rotation"), ("first_order", "additive")])
@pytest.mark.parametrize("m, n, p, l", SHAPES)
def test_float64_agrees_with_the_reference(m, n, p, l, rotation, outer, rank, path):  # noqa: E741
    options = {"inner_ratio": p, "outer_rank": l, "rotation": rotation, "outer": outer, "path": path, **TRITON}
    layer = make_layer(m, n, rank=rank, **options)
    compare(layer, torch.randn(3, 2, n, dtype=torch.float64, requires_grad=True), 1e-11)


@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_take_one_product(m, n, bias):
    assert joins(40, 8, 3) and not joins(10, 8, 3)
    layer = make_layer(m, n, outer_rank=3, bias=bias, path="folded", **TRITON)
    compare(layer, torch.randn(40, n, dtype=torch.float64, requires_grad=True), 1e-11)


@st.composite
def cases(draw):
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return {
        "m": m, "n": n, "inner_ratio": draw(st.floats(0.05, 1)),
        "outer_rank": draw(st.integers(0, min(m, n, abs(m - n)))), "path": draw(st.sampled_from(["auto", "merged"])),
        "bias": draw(st.booleans()), "spread": draw(st.sampled_from([0.0, 1e-3, 0.1])),
        "seed": draw(st.integers(0, 99)),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32])), **TRITON,
    }  # fmt: skip


@given(cases(), st.sampled_from([(), (1,), (17,), (0,), (2, 3)]))
def test_any_shape(case, batch):
    """float32: about ten products deep, each within sqrt(40) eps of operands that exceed the result at most tenfold."""
    layer = make_layer(**case)
    x = torch.randn(*batch, case["n"], dtype=case["dtype"], requires_grad=True)
    compare(layer, x, 1e-9 if case["dtype"] == torch.float64 else 1000 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("m, n", [(64, 16), (16, 64)])
@pytest.mark.parametrize("path", ["folded", "merged"])
def test_float16(m, n, path):
    layer = make_layer(m, n, outer_rank=4, spread=0.05, dtype=torch.float16, path=path, **TRITON)
    x = torch.randn(33, n).half().requires_grad_()
    y = layer(x)
    dy = torch.randn(33, m).half()
    y.backward(dy)
    wide = [p.detach().double().requires_grad_() for p in three(layer)]
    x64 = x.detach().double().requires_grad_()
    want = reference_linear(layer, x64, wide)
    want.backward(dy.double())
    tolerance = 8 * 2**-10  # operands, folded matrices and intermediates are each rounded to 11 bits
    assert_close("y", y, want, tolerance)
    assert_close("dx", x.grad, x64.grad, tolerance)
    for name, p, q in zip(PARAMETER_NAMES, layer.adapter.trained, wide, strict=True):
        assert_close(name, p.grad, q.grad, tolerance)


@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_kernels_are_what_runs(m, n, monkeypatch):
    called = []
    for name in ("expand", "contract", "token_product"):
        kernel = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, f=kernel, n=name, **k: called.append(n) or f(*a, **k))
    layer = make_layer(m, n, outer_rank=3, path="folded", **TRITON)
    layer(torch.randn(9, n, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert sorted(called) == ["contract", "expand", "token_product", "token_product"]
    called.clear()
    plain = make_layer(m, n, outer_rank=3, path="folded")
    plain(torch.randn(9, n, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert called == []  # backend="auto" takes the reference on a CPU


@pytest.mark.parametrize("m, n", [(12, 6), (6, 12)])
def test_gradcheck(m, n):
    layer = make_layer(m, n, outer_rank=2, path="folded", **TRITON)
    names = [f"adapter.{name}" for name in PARAMETER_NAMES]

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in layer.adapter.trained]
    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_accumulation_uses_the_kernels_too():
    once, plain = (make_layer(24, 8, outer_rank=3, path="folded", **o) for o in (TRITON, {}))
    x = torch.randn(5, 8, dtype=torch.float64)
    with gradient_accumulation(once):
        for part in x.split(2):
            once(part).sum().backward()
    plain(x).sum().backward()
    for a, b in zip(once.adapter.trained, plain.adapter.trained, strict=True):
        assert_close("grad", a.grad, b.grad, 1e-11)


def test_errors_name_the_backend():
    layer = make_layer(24, 8, outer_rank=3, dtype=torch.bfloat16, **TRITON)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve torch.bfloat16 on cpu: Triton's"):
        layer(torch.randn(3, 8).bfloat16())
    with pytest.raises(ValueError, match=r"path='core' has no Triton kernels; allowed with backend='triton'"):
        SSVDOConfig(path="core", backend="triton")
    assert isinstance(layer, SSVDOLinear)
