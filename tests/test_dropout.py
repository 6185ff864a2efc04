"""Dropout of the change's input, and several changes of one weight, against dense float64."""

import math

import pytest
import torch
from helpers import assert_close, make_layer, randomise_all, reference_linear, three
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, gradient_accumulation, merge_ssvdo
from ssvdo_kernels.adapter import Adapter
from ssvdo_kernels.changes import Change, changed, changed_weight
from ssvdo_kernels.config import LayerShape

TIGHT, P = 1e-11, 0.3
SHAPES = [(24, 8, {"outer_rank": 3}), (8, 24, {"outer_rank": 3}), (8, 8, {"outer_rank": 0})]


def tokens(*shape, seed=1):
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def as_drawn(x, seed, p=P):
    """What dropout makes of x at this seed."""
    torch.manual_seed(seed)
    return nn.functional.dropout(x, p)


def by_the_equations(layer, x, dropped, parameters):
    """x W0^T + b + d(x) (W' - W0)^T."""
    W0 = layer.weight.detach()
    zero = torch.zeros_like(dropped)
    change = reference_linear(layer, dropped, parameters) - reference_linear(layer, zero, parameters)
    return nn.functional.linear(x, W0, layer.bias) + change - nn.functional.linear(dropped, W0)


@pytest.mark.parametrize("form", ["factored", "core"])
@pytest.mark.parametrize("m, n, options", SHAPES)
def test_outputs_and_gradients(m, n, options, form):
    layer, x = make_layer(m, n, dropout=P, path=form, **options), tokens(5, 2, n)
    plain = make_layer(m, n, path=form, **options)
    torch.manual_seed(7)
    y = layer(x)
    found = torch.autograd.grad(y.square().sum(), (x, *layer.adapter.trained))
    own = [p.detach().clone().requires_grad_() for p in three(layer)]
    want = by_the_equations(layer, x, as_drawn(x, 7), own)
    true = torch.autograd.grad(want.square().sum(), (x, *own), allow_unused=True)
    assert_close("y", y, want, TIGHT)
    for i, (got, one) in enumerate(zip(found, (g for g in true if g is not None and g.numel()), strict=True)):
        assert_close(f"gradient {i}", got, one, 1e-9)
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train().merge()
    assert_close("merged", layer(x), plain(x), TIGHT)


def test_without_dropout_a_training_layer_computes_what_it_did(monkeypatch):
    layer, x = make_layer(24, 8, outer_rank=3), tokens(5, 8)
    monkeypatch.setattr(torch.nn.functional, "dropout", None)
    assert_close("y", layer.train()(x), reference_linear(layer, x), TIGHT)


@pytest.mark.parametrize("weight, autocast", [(torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)])
def test_half_precision(weight, autocast):
    layer = make_layer(24, 8, dtype=weight, outer_rank=3, dropout=P)
    x = tokens(64, 8).detach().to(torch.float32 if autocast else weight)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    wide = make_layer(24, 8, outer_rank=3)
    wide.weight.data = layer.weight.double()
    wide.bias.data = layer.bias.double()
    want = by_the_equations(wide, x.double(), as_drawn(x, 7).double(), [p.detach().double() for p in three(layer)])
    assert y.dtype == torch.bfloat16
    # x, W0 and three products, each rounded to 2^-9; what is dropped makes them 1 / (1 - p) as large
    assert_close("y", y, want, 5 / (1 - P) * 2**-9)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_layers_without_numbers(where):
    layer, x = make_layer(24, 8, outer_rank=3, dropout=P), torch.randn(5, 8, dtype=torch.float64)
    if where == "meta":
        assert layer.to("meta")(x.to("meta")).shape == (5, 24)
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (5, 24)


def test_dropout_keeps_the_mean():
    layer, x = make_layer(24, 8, outer_rank=3, dropout=0.5).train(), tokens(8).detach()
    with torch.no_grad():
        y = layer(x.expand(40_000, 8))
    want, spread = layer.eval()(x), y.std(0) / math.sqrt(len(y))
    assert bool(((y.mean(0) - want).abs() < 5 * spread).all()) and float(spread.min()) > 0


def net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU()).double()
    return randomise_all(apply_ssvdo(model, SSVDOConfig(target_modules=["0"], outer_rank=3, **options)), 0.1)


def gradients(model, run, seed=3):
    torch.manual_seed(seed)
    x = torch.randn(6, 16, dtype=torch.float64)
    run(x).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def test_checkpoints_accumulation_and_compiled_layers_see_the_same_masks():
    model = net(dropout=P)
    want = gradients(model, model)
    for a, b in zip(gradients(model, lambda x: checkpoint(model, x, use_reentrant=False)), want, strict=True):
        assert_close("checkpoint", a, b, TIGHT)

    def accumulated(x):
        with gradient_accumulation(model):
            model(x).square().sum().backward()
        return torch.zeros((), requires_grad=True)

    for a, b in zip(gradients(model, accumulated), want, strict=True):
        assert_close("accumulation", a, b, TIGHT)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(model, compiled), want, strict=True):
        assert_close("compiled", a, b, TIGHT)
    assert not torch.equal(gradients(model, model, seed=4)[0], want[0])
    merge_ssvdo(model)  # drops nothing
    x = tokens(6, 16)
    assert torch.equal(model(x), model(x))


def test_a_convolution_drops_what_it_is_given_not_its_patches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 24, 3, padding=1)).double()
    plain = nn.functional.conv1d
    apply_ssvdo(model, SSVDOConfig(target_modules=["0"], outer_rank=3, dropout=P))
    randomise_all(model, 0.1)
    layer, x = model[0], tokens(2, 4, 9)
    W0, change = layer.weight.detach(), (layer.adapted_weight() - layer.weight.detach().flatten(1)).view(24, 4, 3)
    torch.manual_seed(7)
    y = model(x)
    want = plain(x, W0, layer.bias, padding=1) + plain(as_drawn(x, 7), change, padding=1)
    assert_close("y", y, want, TIGHT)


@pytest.mark.parametrize("p", [-0.1, 1, "0.1", None, math.nan])
def test_shares_that_cannot_be_are_refused(p):
    with pytest.raises(ValueError, match=r"dropout=.* is out of range; allowed: 0 <= dropout < 1"):
        SSVDOConfig(dropout=p)


WEIGHTS = [(1.0, 1.0), (0.7, 0.3), (2.0, -0.5), (0.25,)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dropped", [(), (0,), (0, 1)])
def test_weighted_changes(weights, dropped):
    """Two adapters of one weight; `dropped`: those that have dropout."""
    layers = [make_layer(24, 8, outer_rank=rank, dropout=P if i in dropped else 0.0)
              for i, rank in enumerate((3, 5)[: len(weights)])]  # fmt: skip
    base, bias, x = layers[0].base(), layers[0].bias, tokens(5, 8)
    changes = [Change(layer.adapter, w) for layer, w in zip(layers, weights, strict=True)]
    torch.manual_seed(7)
    y = changed(x, changes, base, bias)
    torch.manual_seed(7)
    inputs = [nn.functional.dropout(x, P) if i in dropped else x for i in range(len(weights))]
    W0 = base.dense().detach()
    want = nn.functional.linear(x, W0, bias)
    dense = W0.clone()
    for layer, given, w in zip(layers, inputs, weights, strict=True):
        change = layer.adapted_weight() - W0
        want, dense = want + w * given @ change.mT, dense + w * change
    assert_close("y", y, want, TIGHT)
    assert_close("W'", changed_weight(changes, base, Adapter.dense), dense, TIGHT)
    trained = [p for layer in layers for p in layer.adapter.trained]
    found = torch.autograd.grad(y.square().sum(), (x, *trained))
    found_dense = torch.autograd.grad(
        changed_weight(changes, base, Adapter.dense).square().sum(), trained)
    torch.manual_seed(7)
    own = [[p.detach().clone().requires_grad_() for p in three(layer)] for layer in layers]
    inputs = [nn.functional.dropout(x, P) if i in dropped else x for i in range(len(weights))]
    y, made = nn.functional.linear(x, W0, bias), W0
    for layer, three_, given, w in zip(layers, own, inputs, weights, strict=True):
        change = reference_linear(layer, torch.eye(8, dtype=torch.float64), three_).mT - layer.bias[:, None] - W0
        y, made = y + w * given @ change.mT, made + w * change
    flat = [p for three_ in own for p in three_]
    for i, (a, b) in enumerate(zip(found, torch.autograd.grad(y.square().sum(), (x, *flat), retain_graph=True),
                                   strict=True)):  # fmt: skip
        assert_close(f"gradient {i}", a, b, 1e-9)
    for a, b in zip(found_dense, torch.autograd.grad(made.square().sum(), flat), strict=True):
        assert_close("gradient of W'", a, b, 1e-9)


def test_the_formula_knows_no_dropout():
    shape = LayerShape.of(24, 8, SSVDOConfig(outer_rank=3))
    assert torch.equal(SSVDOConfig(dropout=0.5).digest(), SSVDOConfig().digest()) and shape.k == 4
