"""An adapter that turns part of the way: K, dS and L taken s times."""

import copy
import math

import pytest
import torch
from helpers import assert_close, count_preparations, make_layer, randomise_all, reference_linear, three
from torch import nn
from torch.func import functional_call, grad

from ssvdo_kernels import (
    SSVDOConfig,
    apply_ssvdo,
    gradient_accumulation,
    load_ssvdo,
    merge_ssvdo,
    orthogonality,
    remove_ssvdo,
    save_ssvdo,
    set_scale,
    to_lora,
)
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops.dispatch import preparation

TIGHT = 1e-11
ENGINES = ["reference"] + (["auto"] if preparation("auto", torch.device("cpu"))[0] == "host" else [])
CASES = [(12, 5, {"outer_rank": 3}), (5, 12, {"outer_rank": 3, "path": "core"}), (6, 6, {"outer_rank": 0}),
         (12, 5, {"outer_rank": 4, "rank": 2}), (5, 12, {"outer_rank": 2, "rotation": "neumann", "outer": "additive"}),
         (12, 5, {"outer_rank": 3, "rotation": "first_order", "path": "folded"}),
         (12, 5, {"outer_rank": 2, "inner_ratio": 0.1, "path": "merged"})]  # fmt: skip


def tokens(n, seed=1):
    torch.manual_seed(seed)
    return torch.randn(7, n, dtype=torch.float64, requires_grad=True)


def by_the_equations(layer, x, scale):
    """y, and its gradients to x and to what is trained, through multiples of the parameters."""
    own = [p.detach().clone().requires_grad_() for p in three(layer)]
    y = reference_linear(layer, x, [scale * p for p in own])
    found = torch.autograd.grad(y.square().sum(), (x, *own), allow_unused=True)
    return y, found[0], [g for g, p in zip(found[1:], own, strict=True) if p.numel()]


@pytest.mark.parametrize("scale", [0.4, -1.5, 0])
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("m, n, options", CASES)
def test_outputs_and_gradients_are_those_of_the_multiples(m, n, options, backend, scale):
    layer, x = make_layer(m, n, backend=backend, **options), tokens(n)
    layer(x)
    layer.adapter.scale = scale
    y = layer(x)
    dx, *grads = torch.autograd.grad(y.square().sum(), (x, *layer.adapter.trained))
    want, want_dx, want_grads = by_the_equations(layer, x, scale)
    assert_close("y", y, want, TIGHT)
    assert_close("dx", dx, want_dx, TIGHT)
    for (name, _), got, true in zip(layer.adapter.named_parameters(), grads, want_grads, strict=False):
        assert_close(name, got, true, 1e-9)


def test_the_trained_adapter_keeps_its_bits_at_1_and_is_the_base_at_0():
    layer, plain = make_layer(48, 16, outer_rank=5, path="factored"), make_layer(48, 16, outer_rank=5).to_linear()
    x = tokens(16)
    want = layer(x)
    layer.adapter.scale = 0
    assert_close("y", layer(x), plain(x), 64 * torch.finfo(torch.float64).eps)
    layer.adapter.scale = 1
    assert torch.equal(layer(x), want)


def test_columns_stay_orthonormal_on_the_way_and_angles_are_those_of_the_half_tangent():
    model = nn.Sequential(make_layer(48, 16, outer_rank=5, spread=0.1))
    whole = orthogonality(model)[0]
    for scale in (0.25, 0.5, -2):
        part = orthogonality(set_scale(model, scale))[0]
        assert part.orthonormality < 1e-12 and part.inner_orthonormality < 1e-12
        want = 2 * math.atan(abs(scale) * math.tan(whole.inner_angle / 2))
        assert part.inner_angle == pytest.approx(want, rel=1e-3)
        assert math.tan(part.outer_angle) == pytest.approx(abs(scale) * math.tan(whole.outer_angle))
        assert part.scale_change == pytest.approx(abs(scale) * whole.scale_change)


def test_one_row_of_gradients_and_accumulated_ones():
    layer, x = make_layer(48, 24, outer_rank=3), tokens(24)[:1]
    layer.adapter.scale = 0.3
    _, _, want = by_the_equations(layer, x, 0.3)
    for _ in range(2):
        with gradient_accumulation(layer):
            layer(x).square().sum().backward()
    layer(x).square().sum().backward()  # one row: the mixer's gradient in factored form
    for (name, p), true in zip(layer.adapter.named_parameters(), want, strict=False):
        assert_close(name, p.grad, 3 * true, 1e-9)


def test_a_scale_that_changes_between_forward_and_backward_is_that_of_the_forward():
    layer, x = make_layer(12, 5, outer_rank=3), tokens(5)
    layer.adapter.scale = 0.3
    y = layer(x)
    layer.adapter.scale = 2
    grads = torch.autograd.grad(y.square().sum(), layer.adapter.trained)
    for (name, _), got, true in zip(
        layer.adapter.named_parameters(), grads, by_the_equations(layer, x, 0.3)[2], strict=False
    ):
        assert_close(name, got, true, 1e-9)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.Linear(16, 48)).to(dtype)
    return apply_ssvdo(model, SSVDOConfig(target_modules=["0", "2", "3"], outer_rank=3))


def test_a_whole_model_follows_merged_or_not_and_prepares_once(monkeypatch):
    model, x = randomise_all(net()), tokens(16)
    want = {s: set_scale(model, s)(x).detach() for s in (1, 0.5)}
    assert not torch.allclose(want[1], want[0.5], atol=1e-3)
    merge_ssvdo(model)
    for s in (1, 0.5, 1):
        assert_close("merged", set_scale(model, s)(x), want[s], TIGHT)
    set_scale(model, 0.5)
    assert_close("removed", remove_ssvdo(copy.deepcopy(model), merge=True)(x), want[0.5], TIGHT)
    for (name, layer), lora in zip(hosts(model), to_lora(model).values(), strict=True):
        assert_close(name, layer.weight + lora.B @ lora.A, layer.adapted_weight(), TIGHT)
    counts = count_preparations(monkeypatch)
    set_scale(model, 1)
    model(x)
    set_scale(model, 1)
    model(x)
    assert sum(counts["forward"]) == 3


def test_torch_func_and_other_forms_of_a_forward_follow():
    layer, x = make_layer(12, 5, outer_rank=3), tokens(5)
    layer.adapter.scale = 0.4
    want, _, grads = by_the_equations(layer, x, 0.4)
    state = {name: p for name, p in layer.named_parameters() if p.requires_grad and "adapter" in name}
    found = grad(lambda own: functional_call(layer, own, (x,)).square().sum())(state)
    for (name, got), true in zip(found.items(), grads, strict=True):
        assert_close(name, got, true, 1e-9)
    assert_close("trace", torch.jit.trace(layer, x.detach(), check_trace=False)(x), want, TIGHT)
    program = torch.export.export(layer, (x.detach(),)).module()
    layer.adapter.scale = 1
    assert_close("export", program(x), want, TIGHT)


def test_a_compiled_model_follows_with_gradients():
    torch._dynamo.reset()
    model = randomise_all(apply_ssvdo(nn.Sequential(nn.Linear(16, 48)), SSVDOConfig(target_modules="0", outer_rank=3)))
    x = tokens(16).float().detach()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for scale in (1, 0.5):
        set_scale(model, scale)
        want, got = (torch.autograd.grad(m(x).square().sum(), parameters) for m in (model, compiled))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_files_copies_and_shown_layers(tmp_path):
    model, x = randomise_all(net()), tokens(16)
    want, half = model(x), set_scale(model, 0.5)(x)
    assert torch.equal(copy.deepcopy(model)(x), half) and "scale=0.5" in repr(model)
    save_ssvdo(model, tmp_path)
    plain = remove_ssvdo(set_scale(model, 1))
    assert "scale=" not in repr(model)
    assert_close("loaded", load_ssvdo(plain, tmp_path)(x), want, TIGHT)


@pytest.mark.parametrize("scale", [math.nan, math.inf, None, "1", True, torch.ones(())])
def test_scales_that_are_no_numbers_change_nothing(scale):
    model = set_scale(net(), 0.5)
    with pytest.raises(ValueError, match=r"scale=.* is out of range; allowed: a finite number"):
        set_scale(model, scale)
    assert {layer.adapter.scale for _, layer in hosts(model)} == {0.5}
    with pytest.raises(ValueError, match="no SSVDOLinear"):
        set_scale(nn.Linear(2, 2), 1)
