"""A^T dF of a tall layer's way back from few tokens, as (dy A)^T z: whenever all of dF came with it, and only then."""

import pytest
import torch
from helpers import assert_close, error, make_layer, prepared, randomise_all, reference_linear, three
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, adapter, apply_ssvdo, gradient_accumulation
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import engines, outer
from ssvdo_kernels.ops.complement import project
from ssvdo_kernels.ops.products import exact

M, N = 24, 8
FEW, MANY = 5, 30  # fewer and more rows than A has


@pytest.fixture
def known(monkeypatch):
    """For each layer of each way back, whether A^T dF came from the tokens."""
    found, original = [], outer.backward

    def watching(many, X, F, dF, product, pulled):
        found.extend(t is not None for t in pulled)
        return original(many, X, F, dF, product, pulled)

    monkeypatch.setattr(outer, "backward", watching)
    return found


@pytest.fixture
def products(monkeypatch):
    """Shapes of the matrices among the products of preparation, without V's."""
    found, original = [], engines._product

    def product_of(engine):
        def counting(matrices, columns):
            found.extend(tuple(a.shape) for a in matrices if N in a.shape and a.shape[0] != a.shape[1])
            return original(engine)(matrices, columns)

        return counting

    monkeypatch.setattr(engines, "_product", product_of)
    return found


def inputs(*rows, n=N):
    return [torch.randn(t, n, dtype=torch.float64) for t in rows]


def loss(layer, *xs):
    return sum(layer(x).sin().sum() for x in xs)


def agrees(layer, *xs):
    """The gradients of `loss` are those of the equations."""
    wide = [p.detach().requires_grad_() for p in three(layer)]
    sum(reference_linear(layer, x, wide).sin().sum() for x in xs).backward()
    for name, p, q in zip(PARAMETER_NAMES, layer.adapter.trained, wide, strict=True):
        assert_close(name, p.grad, q.grad, 1e-11)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", ["auto", "factored", "folded", "core"])
def test_the_product_is_not_made(products, form, backend):
    layer = make_layer(M, N, outer_rank=3, path=form, backend=backend)
    loss(layer, *inputs(FEW)).backward()
    c = M - N
    assert products == [(N, c), (M, N), (c, N)]  # A^T L and A of the way there, A of the way back


@pytest.mark.parametrize("options", [
    {}, {"rank": 5}, {"outer": "additive"}, {"rank": 5, "outer": "additive"}, {"inner_ratio": 0.25, "outer_rank": 6},
    {"inner_ratio": 1.0, "outer_rank": 8}, {"outer_rank": 1}], ids=str)  # fmt: skip
@pytest.mark.parametrize("scale", [1, -0.5])
def test_gradients_by_way_of_the_tokens(known, options, scale):
    layer = make_layer(M, N, **{"outer_rank": 3} | options)
    own = make_layer(M, N, **{"outer_rank": 3} | options)
    layer.adapter.scale = scale
    xs = inputs(FEW)
    loss(layer, *xs).backward()
    with torch.no_grad():
        for p in own.adapter.trained:
            p *= scale
    loss(own, *xs).backward()
    agrees(own, *xs)
    for name, p, q in zip(PARAMETER_NAMES, layer.adapter.trained, own.adapter.trained, strict=True):
        assert_close(name, p.grad, q.grad * scale, 1e-11)
    assert known == [True, True]


@pytest.mark.parametrize("rows", [(FEW,), (FEW, 3, 4), (MANY,), (FEW, MANY), (MANY, FEW)])
def test_several_uses_of_a_layer(known, rows):
    layer, xs = make_layer(M, N, outer_rank=3, path="folded"), inputs(*rows)
    loss(layer, *xs).backward()
    agrees(layer, *xs)
    assert known == [t < M for t in reversed(rows)]  # each has a node of its own, outside of a group


def grouped():
    """Three tall layers of one group, and what they are."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(N, M) for _ in range(3)).double()
    apply_ssvdo(model, SSVDOConfig(target_modules="all-linear", outer_rank=3))
    return randomise_all(model), [layer for _, layer in hosts(model)]


@pytest.mark.parametrize("rows, found", [
    ([(FEW,), (FEW,), (FEW,)], [True] * 3), ([(FEW,), (MANY,), (FEW,)], [True, False, True]),
    ([(FEW, 4), (FEW, MANY), ()], [True, False]), ([(MANY,), (20, 20), (FEW,)], [False, False, True])])  # fmt: skip
def test_layers_of_a_group(known, rows, found):
    _, layers = grouped()
    xs = [inputs(*t) for t in rows]
    sum(loss(layer, *x) for layer, x in zip(layers, xs, strict=True) if x).backward()
    for layer, x in zip(layers, xs, strict=True):
        if x:
            agrees(layer, *x)
        else:
            assert all(p.grad is None for p in layer.adapter.trained)
    assert known == found


def test_a_backward_that_does_not_come_to_the_parameters_leaves_nothing():
    _, layers = grouped()
    first, second = inputs(FEW, 4)
    first.requires_grad_()
    one, two = loss(layers[0], first), loss(layers[0], second)
    torch.autograd.grad(one, first, retain_graph=True)
    two.backward(retain_graph=True)
    agrees(layers[0], second)
    one.backward()
    agrees(layers[0], first, second)


@pytest.mark.parametrize("rows, found", [((3, 4, FEW), True), ((FEW, MANY, 3), False), ((10, 10, 10), False)])
def test_micro_batches(known, rows, found):
    _, layers = grouped()
    xs = inputs(*rows)
    with gradient_accumulation(layers[0]):
        for x in xs:
            loss(layers[0], x).backward()
    agrees(layers[0], *xs)
    assert known == [found]


def test_a_forward_that_runs_twice(known):
    layer, (x,) = make_layer(M, N, outer_rank=3), inputs(FEW)
    checkpoint(loss, layer, x, use_reentrant=False).backward()
    agrees(layer, x)
    assert known == [True]


def test_a_compiled_layer(known):
    layer, (x,) = make_layer(M, N, outer_rank=3), inputs(FEW)
    loss(torch.compile(layer, backend="aot_eager"), x).backward()
    agrees(layer, x)
    assert known == [True]


def single(**options):
    return make_layer(M, N, dtype=torch.float32, outer_rank=3, **options)


def few(layer, dtype=torch.float32):
    layer(torch.randn(FEW, layer.in_features, dtype=dtype)).sum().backward()


def test_tokens_of_half_precision_give_none(known):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        few(single())
    few(make_layer(M, N, dtype=torch.bfloat16, outer_rank=3), torch.bfloat16)
    assert known == [False, False]


def test_the_second_pass_of_a_basis_in_half_precision_makes_its_own():
    """As for float32 tokens of a quantised weight."""
    projector = prepared(make_layer(96, 32, dtype=torch.bfloat16, outer_rank=3)).outer.projector
    assert projector.passes == 2
    z = torch.randn(96, 3)
    pulled = projector.tall.float().mT @ z
    (want,), (got,) = (project([projector], [z], 96, 64, pulled=known) for known in ((), [pulled]))
    assert_close("P z", got, want, 1e-6)
    assert error(project([projector], [z], 96, 64, pulled=[2 * pulled])[0], want) > 1e-4  # it is read


def test_wide_and_merged_layers_give_none(known):
    few(make_layer(N, M, dtype=torch.float32, outer_rank=3))
    few(single(path="merged"))
    assert known == [False, False]


def test_weak_components_take_the_product(known):
    """Down to S_0 / 128, rounding errors stay below those of a sum of tokens that are 128 times their sum."""
    for least, even in ((1 / 100, True), (1 / 200, False)):
        layer = nn.Linear(N, M, bias=False)
        U, V = torch.linalg.qr(torch.randn(M, N))[0], torch.linalg.qr(torch.randn(N, N))[0]
        layer.weight.data = (U * torch.linspace(1, least, N)) @ V
        apply_ssvdo(model := nn.Sequential(layer), SSVDOConfig(target_modules="all-linear", outer_rank=3))
        few(randomise_all(model)[0])
        assert known.pop() == even


@pytest.fixture
def products_in_bfloat16():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_float32_whose_products_are_rounded(known, products_in_bfloat16):
    assert not exact(torch.float32) and exact(torch.float64)
    few(single())
    assert known == [False]


def test_as_exact_as_the_product(monkeypatch):
    """In float32, against float64: at most twice what the product by A errs, as both round and then divide by S."""
    errors = {True: 0.0, False: 0.0}
    for seed in range(5):
        layer = single(seed=seed)
        x = torch.randn(FEW, N)
        wide = [p.detach().double().requires_grad_() for p in three(layer)]
        reference_linear(layer, x.double(), wide).sin().sum().backward()
        for by_tokens in errors:
            monkeypatch.setattr(adapter, "pulls", lambda *_, by_tokens=by_tokens: by_tokens)
            layer.zero_grad()
            loss(layer, x).backward()
            errors[by_tokens] += error(layer.adapter.outer.grad, wide[2].grad)
    assert errors[True] <= 2 * errors[False] + 1e-7
    assert errors[True] != errors[False]  # two ways
