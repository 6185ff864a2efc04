"""The planner's counts equal the operations executed; its choices follow from them."""

import pytest
import torch
from helpers import make_layer, prepared
from torch.utils.flop_counter import FlopCounterMode

from ssvdo_kernels import SSVDOConfig, gradient_accumulation
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.planner import FORMS, build_cost, call_cost, plan, token_cost


def in_place(self_shape, a_shape, b_shape, *args, **kwargs):
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]  # addmm_, which torch does not count


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m, n", [(96, 24), (24, 96)])
def test_token_costs_are_the_operations_executed(m, n, form):
    layer = make_layer(m, n, outer_rank=6, path=form, bias=False)
    tokens = 100  # so many that the way back does not take A^T dF from them

    def operations(count):
        x = torch.randn(count, n, dtype=torch.float64, requires_grad=True)
        with gradient_accumulation(layer):
            layer(x).sum().backward()  # builds what the form needs
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
                layer(x).sum().backward()
        return counter.get_total_flops() / 2  # multiply-adds

    few, many = operations(tokens), operations(2 * tokens)
    per_token = (many - few) / tokens
    per_call = few - tokens * per_token
    shape = layer.adapter.shape
    if form == "merged":  # inside gradient_accumulation dC is summed, and brought to dM and dF once
        assert per_call == pytest.approx(0, abs=1e-6)
        made = prepared(layer)
        with FlopCounterMode(display=False) as counter:
            made.of_product(torch.randn(shape.large, shape.width, dtype=torch.float64))
        per_call = counter.get_total_flops() / 2
    assert per_call == pytest.approx(call_cost(form, shape, 6, grad=True), abs=1e-6)
    expected = 2 * m * n + token_cost(form, shape, 6, grad=True)
    assert per_token == pytest.approx(expected, rel=1e-9)


SHAPE = LayerShape.of(4096, 1024, SSVDOConfig(inner_ratio=0.5, outer_rank=64))


def cost(form, tokens, grad):
    fixed = build_cost(form, SHAPE, 64) + call_cost(form, SHAPE, 64, grad)
    return tokens * token_cost(form, SHAPE, 64, grad) + fixed


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 128, 1024, 4096, 65536])
def test_the_choice_is_the_cheapest(tokens, grad):
    chosen = plan(SHAPE, 64, tokens, 0, grad, frozenset())
    assert cost(chosen, tokens, grad) == min(cost(f, tokens, grad) for f in FORMS)


def test_known_choices():
    assert plan(SHAPE, 64, 1, 0, True, frozenset()) == "factored"
    assert plan(SHAPE, 64, 1 << 20, 0, False, frozenset()) == "merged"
    assert plan(SHAPE, 64, 1, 0, False, frozenset({"merged"})) == "merged"
    assert plan(SHAPE, 64, 16, 1000, True, frozenset({"merged", "folded"})) == "folded"  # dC costs each backward anew


def test_small_batches_build_a_larger_form_in_the_end_and_pay_at_most_twice():
    spent, seen, built = 0.0, 0, frozenset()
    while "merged" not in built and seen < 1 << 20:
        form = plan(SHAPE, 64, 16, seen, False, built)
        spent += 16 * token_cost(form, SHAPE, 64, False) + (0 if form in built else build_cost(form, SHAPE, 64))
        built |= {form}
        seen += 16
        assert spent <= 2 * min(cost(f, seen, False) for f in FORMS) + 2 * build_cost("folded", SHAPE, 64)
    assert "merged" in built


@pytest.mark.parametrize("form", FORMS)
def test_a_forced_path_is_taken(form):
    layer = make_layer(24, 8, outer_rank=3, path=form)
    assert layer.adapter.plan(5, layer.base()) == form


def test_unknown_form():
    with pytest.raises(ValueError, match="form='fast'"):
        token_cost("fast", SHAPE, 64, True)
