"""SSVDOLinear with backend="triton" against the float64 reference: outputs and every gradient."""

import pytest
import torch
from helpers import (
    assert_close,
    make_layer,
    prepared,
    randomise,
    randomise_all,
    reference_linear,
    require_triton,
    three,
)
from hypothesis import given
from hypothesis import strategies as st

require_triton()
from test_linear import compare

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo, gradient_accumulation
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.ops import sides, together
from ssvdo_kernels.ops.joined import Joined
from ssvdo_kernels.planner import joins
from ssvdo_kernels.traffic import Machine
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


@pytest.fixture
def kept_joined(monkeypatch):
    """[W0 | F] is kept from a few rows on; how often W0 was copied."""
    copied = []
    original = Joined._made
    monkeypatch.setattr(sides, "keeps_joined", lambda *_: True)
    monkeypatch.setattr(Joined, "_made", staticmethod(lambda *a: copied.append(1) or original(*a)))
    return copied


@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_w0_and_f_stay_joined_between_steps(m, n, kept_joined):
    layer = make_layer(m, n, outer_rank=3, path="folded", **TRITON)
    x = torch.randn(40, n, dtype=torch.float64, requires_grad=True)
    for step in range(3):
        x.grad = None
        layer.zero_grad()
        randomise(layer, 0.1 * (step + 1))
        compare(layer, x, 1e-11)
    assert len(kept_joined) == 1  # forward, backward and three steps
    with torch.no_grad():
        layer.weight *= 1  # written to, with the same numbers
    x.grad = None
    layer.zero_grad()
    compare(layer, x, 1e-11)
    assert len(kept_joined) == 2


@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_an_old_graph_finds_its_own_f(m, n, kept_joined):
    layer = make_layer(m, n, outer_rank=3, path="folded", **TRITON)
    layer.adapter.requires_grad_(False)
    x = torch.randn(40, n, dtype=torch.float64, requires_grad=True)
    y, weight = layer(x), layer.adapted_weight()
    with torch.no_grad():
        layer.adapter.outer.mul_(-3)
    layer(x)
    y.sum().backward()
    assert_close("dx", x.grad, torch.ones_like(y) @ weight, 1e-11)


@pytest.mark.parametrize("rows", [256, 300, 384])
def test_gradients_of_rows_that_lie_in_the_cache(rows, monkeypatch):
    machine = Machine("", 1, 1, 1, processors=1, cache=1e9)
    monkeypatch.setattr(sides, "peaks", lambda *_: machine)
    assert machine.chunk(rows, 24 * 8, 8 + 16) == 128
    layer = make_layer(24, 8, outer_rank=3, path="folded", **TRITON)
    compare(layer, torch.randn(rows, 8, dtype=torch.float64, requires_grad=True), 1e-11)


def test_matrices_of_a_group_are_those_of_each_layer():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 24, dtype=torch.float64) for _ in range(3)))
    apply_ssvdo(net, SSVDOConfig(target_modules="all-linear", outer_rank=3, path="folded", **TRITON))
    randomise_all(net)
    many = [prepared(layer) for layer in net]
    assert many[0].batch is not None and many[0].batch.prepared is not None
    names = "contraction", "expansion", "aligned_columns"
    alone = [[one.get(name, torch.float64) for name in names] for one in many]
    for one in many:
        one.kept.clear()
    together.build(many, torch.float64)
    for one, wants in zip(many, alone, strict=True):
        for name, want in zip(names, wants, strict=True):
            assert_close(name, one.kept[name, torch.float64], want, 1e-14)


@pytest.mark.parametrize("outer_rank", [3, 16])
@pytest.mark.parametrize("count", [1, 3])
def test_no_matrix_is_kept_that_nothing_uses_nor_in_two_precisions(outer_rank, count):
    net = torch.nn.Sequential(*(torch.nn.Linear(32, 96).half() for _ in range(count)))
    apply_ssvdo(net, SSVDOConfig(target_modules="all-linear", outer_rank=outer_rank, path="folded", **TRITON))
    x = torch.randn(4, 32).half()
    sum(layer(x).float().square().mean() for layer in net).backward()
    for one in map(prepared, net):
        kept = {name: t for (name, dtype), t in one.kept.items() if dtype == torch.float16}
        assert len(kept) == len(one.kept)
        below = kept.pop("below", None)  # a view
        assert below is None or below.data_ptr() == kept["contraction"][-len(below) :].data_ptr()
        assert set(kept) == {"aligned_columns", "contraction", "expansion"}  # V is the factor itself
        assert one._mixer is None


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
    for name in ("expand", "contract"):
        kernel = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, f=kernel, n=name, **k: called.append(n) or f(*a, **k))
    layer = make_layer(m, n, outer_rank=3, path="folded", **TRITON)
    layer(torch.randn(9, n, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert sorted(called) == ["contract", "expand"]
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
