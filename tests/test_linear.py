"""SSVDOLinear against the reference: outputs and every gradient, all forms and formulas, and bad input."""

import pytest
import torch
from helpers import assert_close, error, make_layer, randomise, three
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, reference
from ssvdo_kernels.adapter import PARAMETER_NAMES

FORMS = ["auto", "factored", "folded", "core", "merged"]
SHAPES = [(24, 8, 0.5, 3), (8, 24, 0.5, 3), (8, 8, 0.6, 0), (12, 8, 1.0, 4), (24, 8, 0.25, 6), (8, 24, 0.25, 6),
          (24, 8, 1.0, 8), (9, 8, 0.5, 1), (1, 1, 1.0, 0), (5, 1, 1.0, 1)]


def compare(layer, x, tolerance):
    """Output and gradients of x, the bias and the three parameters, against autograd through the reference."""
    wide = [p.detach().double().requires_grad_() for p in three(layer)]
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, want = layer(x), reference.linear(x64, layer.weight.detach().double(), bias, *wide, config=layer.adapter.config)
    assert_close("y", y, want, tolerance)
    with torch.no_grad():
        assert_close("y without gradients", layer(x), want, tolerance)
    dy = torch.randn(y.shape, dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    want.backward(dy)
    assert_close("dx", x.grad, x64.grad, tolerance)
    if bias is not None and layer.bias.requires_grad:
        assert_close("dbias", layer.bias.grad, bias.grad, tolerance)
    for name, p, q in zip(PARAMETER_NAMES, layer.adapter.parts, wide, strict=True):
        if p is not None:
            assert_close(f"d{name}", p.grad, torch.zeros_like(q) if q.grad is None else q.grad, tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outer", ["rotation", "additive"])
@pytest.mark.parametrize("rotation", ["cayley", "neumann", "first_order"])
@pytest.mark.parametrize("m, n, p, l", SHAPES)
@pytest.mark.parametrize("rank", [None, 5])
def test_float64_agrees_with_the_reference(m, n, p, l, rotation, outer, form, rank):  # noqa: E741
    layer = make_layer(m, n, rank=rank, inner_ratio=p, outer_rank=l, rotation=rotation, outer=outer, path=form)
    compare(layer, torch.randn(3, 2, n, dtype=torch.float64, requires_grad=True), 1e-11)


@st.composite
def cases(draw):
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return {
        "m": m, "n": n, "inner_ratio": draw(st.floats(0.05, 1)),
        "outer_rank": draw(st.integers(0, min(m, n, abs(m - n)))),
        "rotation": draw(st.sampled_from(["cayley", "neumann", "first_order"])),
        "outer": draw(st.sampled_from(["rotation", "additive"])), "path": draw(st.sampled_from(FORMS)),
        "bias": draw(st.booleans()), "spread": draw(st.sampled_from([0.0, 1e-3, 0.3])),
        "seed": draw(st.integers(0, 99)), "tau": draw(st.sampled_from([1e-4, 1e-2, 0.5])),
    }  # fmt: skip


@given(cases(), st.sampled_from([(), (1,), (7,), (0,), (2, 0), (2, 3), (2, 1, 4)]))
def test_any_shape_in_float64(case, batch):
    layer = make_layer(**case)
    compare(layer, torch.randn(*batch, case["n"], dtype=torch.float64, requires_grad=True), 1e-9)


@given(cases())
def test_float32_is_as_exact_as_the_dense_form_in_float32(case):
    """Error against float64 <= 8 x the float32 reference's own + 64 eps: the two differ in the order of products only.

    The dense reference forms W' and then x W'^T; the layer adds a product per factor, each with its own rounding of at
    most sqrt(24) eps relative to operands whose norms exceed the result's by at most the condition of S and R.
    """
    layer = make_layer(**{**case, "dtype": torch.float32})
    exact = make_layer(**{**case, "dtype": torch.float64})
    with torch.no_grad():
        exact.weight.copy_(layer.weight)
        for p, q in zip(exact.adapter.trained, layer.adapter.trained, strict=True):
            p.copy_(q)
    x = torch.randn(9, case["n"])
    weight, parameters, config = exact.weight.detach(), three(exact), exact.adapter.config
    factors = reference.dense_factors(weight, exact.adapter.shape)
    single = tuple(f.float() for f in factors)
    want = reference.adapted_weight(weight, *parameters, config=config, factors=factors)
    plain = reference.adapted_weight(weight.float(), *(p.float() for p in parameters), config=config, factors=single)
    dense = error(x @ plain.mT, x.double() @ want.mT)
    bias = 0 if layer.bias is None else layer.bias
    assert error(layer(x) - bias, x.double() @ want.mT) <= 8 * dense + 64 * torch.finfo(torch.float32).eps


def test_non_contiguous_input_and_gradient():
    layer = make_layer(24, 8, outer_rank=3)
    x = torch.randn(8, 5, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    compare(layer, x, 1e-11)
    again, plain = make_layer(24, 8, outer_rank=3), torch.randn(4, 8, dtype=torch.float64)
    again(plain).sum().backward()  # an expanded gradient
    want = [p.grad.clone() for p in again.adapter.trained]
    again.zero_grad()
    again(plain).backward(torch.ones(24, 4, dtype=torch.float64).mT)
    for p, g in zip(again.adapter.trained, want, strict=True):
        assert_close("transposed dy", p.grad, g, 1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
@pytest.mark.parametrize("frozen", [*PARAMETER_NAMES, "all"])
def test_frozen_parts_and_inputs_without_gradient(m, n, frozen, form):
    layer = make_layer(m, n, outer_rank=3, path=form)
    for name in PARAMETER_NAMES:
        getattr(layer.adapter, name).requires_grad_(frozen not in (name, "all"))
    x = torch.randn(5, n, dtype=torch.float64)
    full = make_layer(m, n, outer_rank=3)
    full(x).sum().backward()
    layer(x).sum().backward()
    for name, p in zip(PARAMETER_NAMES, layer.adapter.trained, strict=True):
        if p.requires_grad:
            assert_close(name, p.grad, getattr(full.adapter, name).grad, 1e-12)
        else:
            assert p.grad is None
    assert x.grad is None


def test_trainable_and_frozen_bias():
    for trainable in (True, False):
        linear = nn.Linear(8, 24)
        linear.bias.requires_grad_(trainable)
        layer = SSVDOLinear.from_linear(linear, SSVDOConfig(outer_rank=2))
        layer(torch.randn(3, 8)).sum().backward()
        assert (layer.bias.grad is not None) == trainable


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_every_element_is_written(m, n, form):
    layer = make_layer(m, n, outer_rank=3, path=form)
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN
        compare(layer, torch.randn(5, n, dtype=torch.float64, requires_grad=True), 1e-11)
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_half_precision_weights(m, n, dtype, form):
    layer = make_layer(m, n, dtype=dtype, outer_rank=3, path=form, spread=0.1)
    assert {p.dtype for p in layer.adapter.trained} == {torch.float32}
    assert layer.adapter.outer_basis.dtype == dtype and layer.adapter.singular_values.dtype == torch.float32
    # operands of the products are rounded to eps/2 each, about ten products deep
    compare(layer, torch.randn(16, n).to(dtype).requires_grad_(), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_autocast_to_bf16(m, n):
    layer, plain = make_layer(m, n, dtype=torch.float32, outer_rank=3), nn.Linear(n, m)
    x = torch.randn(16, n, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
        y.float().square().sum().backward()  # inside: autocast must not reach into our products
    got = [x.grad.clone(), *(p.grad.clone() for p in layer.adapter.trained)]
    x.grad = None
    layer.zero_grad()
    layer(x).square().sum().backward()
    for g, p in zip(got, [x, *layer.adapter.trained], strict=True):
        assert g.dtype == torch.float32
        assert_close("gradient", g, p.grad, 16 * torch.finfo(torch.bfloat16).eps)


def test_starts_at_the_pretrained_layer():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 256), torch.randn(32, 64)
    exact = SSVDOLinear.from_linear(linear, SSVDOConfig(outer_rank=16, init_angle=0))
    assert_close("init_angle=0", exact(x), linear(x), 1e-6)
    drawn = SSVDOLinear.from_linear(linear, SSVDOConfig(outer_rank=16))
    assert_close("default", drawn(x), linear(x), 1e-3)  # each of 16 vectors is turned by 1e-3 rad
    assert float(drawn.adapter.outer.detach().abs().max()) > 0


@pytest.mark.parametrize("make, error_type, words", [
    (lambda: make_layer(8, 4, outer_rank=1), TypeError, "linear .* is adapted already"),
    (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 8), TypeError, "NonDynamicallyQuantizableLinear"),
    (lambda: nn.Conv1d(4, 8, 1), TypeError, "Conv1d"),
    (lambda: nn.Linear(4, 8, device="meta"), ValueError, "meta device"),
])
def test_layers_that_cannot_be_adapted(make, error_type, words):
    with pytest.raises(error_type, match=words):
        SSVDOLinear.from_linear(make(), SSVDOConfig(outer_rank=1))


@pytest.mark.parametrize("x, error_type, words", [
    (torch.ones(2, 8, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
    (torch.ones(2, 7, dtype=torch.float64), ValueError, r"x has shape \(2, 7\).*in_features=8"),
    (torch.tensor(1.0, dtype=torch.float64), ValueError, r"x has shape \(\)"),
    (torch.ones(2, 8), TypeError, "x has dtype torch.float32; allowed: the weight's torch.float64"),
    (torch.ones(2, 8, dtype=torch.float64, device="meta"), ValueError, "x is on meta"),
])
def test_bad_inputs(x, error_type, words):
    with pytest.raises(error_type, match=words):
        make_layer(24, 8, outer_rank=3)(x)


def test_a_trainable_weight_is_refused_not_ignored():
    layer = make_layer(24, 8, outer_rank=3)
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="keeps W0 frozen"):
        layer(torch.randn(2, 8, dtype=torch.float64))


def test_non_finite_parameters_are_an_error_that_names_tau():
    layer = make_layer(24, 8, outer_rank=3)
    with torch.no_grad():
        layer.adapter.outer[0, 0] = float("nan")
    before = layer.adapter.outer.detach().clone()
    with pytest.raises(ArithmeticError, match=r"pivot .* tau=0.01"):
        layer(torch.randn(2, 8, dtype=torch.float64))
    assert torch.equal(layer.adapter.outer.nan_to_num(7), before.nan_to_num(7))
    randomise(layer)
    assert torch.isfinite(layer(torch.randn(2, 8, dtype=torch.float64))).all()


@pytest.mark.parametrize("m, n", [(64, 32), (32, 64)])
def test_gradients_through_few_rows_survive_a_kept_graph(m, n):
    """Fewer tokens than k: the mixer's gradient travels as two factors; partial backwards must not mix with it."""
    layer, x = make_layer(m, n, outer_rank=3), torch.randn(5, n, dtype=torch.float64, requires_grad=True)
    assert layer.adapter.prepared(layer.base()).wants_rows(5)
    y, dy = layer(x), torch.randn(5, m, dtype=torch.float64)
    want = torch.autograd.grad(y, layer.adapter.trained, dy, retain_graph=True)
    torch.autograd.grad(y, x, dy * 7, retain_graph=True)  # the preparation's backward does not run
    torch.autograd.grad(y, layer.adapter.outer, dy * 3, retain_graph=True)
    twice = torch.autograd.grad((layer(x), y), layer.adapter.trained, (dy, dy))
    for name, g, w in zip(PARAMETER_NAMES, twice, want, strict=True):
        assert_close(name, g, 2 * w, 1e-12)
