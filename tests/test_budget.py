"""Sizes for a given number of trained parameters."""

import pytest
import torch
from torch import nn

from benchmarks.memory import held
from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo, suggest_budget, trainable_summary
from ssvdo_kernels.budget import (
    chosen,
    factor_numbers,
    fitted_ratio,
    layer_matrices,
    lora_budget,
    lora_rank,
    prepared_numbers,
    trained_numbers,
)


def block(d=48, h=160):
    return nn.ModuleDict({"fc1": nn.Linear(d, h), "fc2": nn.Linear(h, d), "other": nn.Linear(d, d)})


@pytest.mark.parametrize(("p", "l"), [(0.5, 8), (1.0, 0), (0.01, 3), (0.25, 48)])
def test_trained_numbers_are_those_of_the_applied_adapter(p, l):  # noqa: E741
    config = SSVDOConfig(inner_ratio=p, outer_rank=l)
    model = block()
    counted = trained_numbers(model, config)
    assert counted == trainable_summary(apply_ssvdo(model, config), quiet=True).trainable


@pytest.mark.parametrize(("m", "n", "p", "l"), [
    (160, 48, 0.5, 8), (48, 160, 0.5, 8), (48, 48, 0.5, 0), (160, 48, 0.25, 40), (160, 48, 0.25, 0), (3, 1, 1.0, 1)])
def test_factors_and_prepared_matrices_are_counted(m, n, p, l):  # noqa: E741
    torch.manual_seed(0)
    layer = SSVDOLinear.from_linear(nn.Linear(n, m), SSVDOConfig(inner_ratio=p, outer_rank=l, path="folded"))
    shape, factors = layer.adapter.shape, layer.adapter.factors
    assert factors.null == 0
    assert factor_numbers(shape) == sum(t.numel() for t in factors.tensors().values())
    layer(torch.randn(5, n)).sum().backward()
    assert prepared_numbers(shape) == pytest.approx(held(layer) / 4, rel=0.25, abs=16)  # M may be kept as well


def test_the_paper_s_layer():
    model = nn.ModuleDict({"fc1": nn.Linear(1024, 4096, device="meta")})
    config = SSVDOConfig(inner_ratio=0.5, outer_rank=64)
    assert trained_numbers(model, config) == 327_936
    assert lora_rank(layer_matrices(model, config), 327_936) == 64
    (shape,) = (s for _, s in chosen(layer_matrices(model, config), config).values())
    assert factor_numbers(shape) == 1024 * 1024 + 1024 + 4096 * 64  # V, S, U_l: 31% of W0
    halves = [s for s in suggest_budget(model, 327_936) if s.config.inner_ratio == 0.5]
    assert [(s.config.outer_rank, s.trained) for s in halves] == [(64, 327_936)]


@pytest.mark.parametrize("parameters", [1, 7, 100, 1_000, 2_352, 10**6])
def test_fitted_ratio_is_the_nearest(parameters):
    model, config = block(), SSVDOConfig(outer_rank=0)
    p = fitted_ratio(model, config, parameters)
    counts = [k * (k + 1) for k in range(1, 49)]  # two layers
    got = trained_numbers(model, SSVDOConfig(inner_ratio=p, outer_rank=0))
    assert abs(got - parameters) == min(abs(c - parameters) for c in counts)


@pytest.mark.parametrize("parameters", [600, 2_000, 4_000, 9_000])
def test_suggestions_are_near_and_exact(parameters):
    model = block()
    found = suggest_budget(model, parameters, SSVDOConfig(tau=0.1))
    assert found and found[-1].config.outer_rank == 0
    for s in found:
        assert s.config.tau == 0.1 and s.trained == trained_numbers(model, s.config)
    step = 2 * 112  # one more column of outer in both layers
    near = [s for s in found[:-1] if 0 < s.config.outer_rank < 48]
    assert all(abs(s.trained - parameters) <= max(step / 2, 0.05 * parameters + step) for s in near)


def test_nothing_is_changed_and_square_models_get_the_inner_part():
    model = nn.ModuleDict({"fc1": nn.Linear(16, 16)})
    (only,) = suggest_budget(model, 60)
    assert only.config.outer_rank == 0 and only.trained in (55, 66)
    assert type(model["fc1"]) is nn.Linear and model["fc1"].weight.requires_grad


@pytest.mark.parametrize("parameters", [0, -1, 2.5, True, "9"])
def test_bad_budgets_are_refused(parameters):
    with pytest.raises(ValueError, match=r"parameters=.*an integer >= 1"):
        suggest_budget(block(), parameters)


def test_names_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="matches no linear layer"):
        suggest_budget(block(), 100, SSVDOConfig(target_modules=("w_1",)))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_what_is_no_regular_expression_is_named(field):
    layers = layer_matrices(block(), SSVDOConfig(outer_rank=2))
    with pytest.raises(ValueError, match=rf"{field}='fc\(1' is no regular expression"):
        chosen(layers, SSVDOConfig(outer_rank=2, **{field: "fc(1"}))


@pytest.mark.parametrize("rank", [-5, 0, 49, 10**30])
def test_ranks_that_no_layer_has_are_refused(rank):
    config = SSVDOConfig(outer_rank=2)
    layers = chosen(layer_matrices(block(), config), config)
    assert lora_budget(layers, 48) == 2 * 48 * (48 + 160)
    with pytest.raises(ValueError, match=f"lora_rank={rank} is out of range; allowed: 1 <= lora_rank <= 48"):
        lora_budget(layers, rank)
