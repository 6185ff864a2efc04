"""What DeepSpeed leaves on modules and parameters is known, here without it; integrations/test_deepspeed.py has it."""

import sys
from types import ModuleType

import pytest
import torch
from helpers import allocated, assert_close, count_preparations, make_layer, randomise_all
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, gradient_accumulation, group, remove_ssvdo, save_ssvdo


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomise_all(apply_ssvdo(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)),
                                     SSVDOConfig(outer_rank=2, target_modules="all-linear")))  # fmt: skip


@pytest.mark.parametrize("place", ["model", "layer", "parameter"])
def test_accumulation_is_refused_where_deepspeed_takes_gradients(monkeypatch, model, place):
    def hook(*_):
        return None

    hook.__module__ = "deepspeed.runtime.engine"
    if place == "parameter":
        model[1].adapter.outer.register_post_accumulate_grad_hook(hook)
    else:
        (model if place == "model" else model[0]).register_forward_pre_hook(hook)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with gradient_accumulation(model):
        pass
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    with pytest.raises(RuntimeError, match="DeepSpeed trains"), gradient_accumulation(model):
        pass
    hook.__module__ = "elsewhere"
    with gradient_accumulation(model):
        pass


@pytest.mark.parametrize("shard, whose", [(None, "FSDP1"), (torch.ones(1), "DeepSpeed")])
def test_a_weight_that_is_not_there_is_an_error_that_says_where_it_is(tmp_path, model, shard, whose):
    weight, x = model[1].weight, torch.randn(3, 8)
    want, whole = model(x), weight.data
    weight.data = torch.empty(0)
    if shard is not None:
        weight.ds_tensor = shard
    said = rf"1.weight has shape \(0,\) here: {whose} has sharded it; allowed: inside of "
    model[1].refresh()
    for call in (model[1].adapted_weight, lambda: remove_ssvdo(model, merge=True)):
        with pytest.raises(RuntimeError, match=said):
            call()
    with pytest.raises(ValueError, match=said):
        save_ssvdo(model, tmp_path)
    weight.data = whole
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 1), conv1d])
def test_a_shard_is_not_adapted(make):
    model = nn.Sequential(make())
    model[0].weight.data, model[0].weight.ds_tensor = torch.empty(0), torch.ones(4)
    said = r"weight has shape \(0,\) here: DeepSpeed has sharded it; allowed: inside of deepspeed.zero.Gathered"
    with pytest.raises(ValueError, match=f"0: {said}"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules=("0",)))


def test_what_zero_3_gathers_for_a_layer_is_prepared_with_no_other(monkeypatch):
    model = apply_ssvdo(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))),
                        SSVDOConfig(outer_rank=0, target_modules="all-linear"))  # fmt: skip
    monkeypatch.setattr(group, "hooked", lambda: True)
    counts, x = count_preparations(monkeypatch), torch.randn(3, 8)
    for layer, persists in zip(model, (False, True, True), strict=True):
        layer.weight.ds_tensor, layer.weight.ds_persist = torch.ones(1), persists
    model(x)
    assert sorted(counts["forward"]) == [1, 2]


def test_what_zero_3_gathers_is_let_go_after_each_use():
    """As DeepSpeed does it: `.data` of the frozen parameters is there in the forward, and again in the backward."""
    layer = make_layer(1024, 256, dtype=torch.float32, inner_ratio=0.1, outer_rank=4)
    x, dy = torch.randn(4, 256, requires_grad=True), torch.randn(4, 1024)

    def gradients():
        made = [x.grad, *(p.grad for p in layer.adapter.trained)]
        x.grad = None
        layer.zero_grad()
        return made

    layer(x).backward(dy)
    want = gradients()
    layer.refresh()
    frozen = [p for p in layer.parameters() if not p.requires_grad]
    whole = [p.data for p in frozen]

    def gather(there):
        for p, data in zip(frozen, whole, strict=True):
            p.data = data.clone() if there else torch.empty(0)

    for p in frozen:
        p.ds_tensor = torch.ones(1)
    gather(False)
    for _ in range(2):
        before = allocated()
        gather(True)
        y = layer(x)
        gather(False)
        assert allocated() - before < 200_000  # bytes: W0 has 1,048,576, V 262,144
        gather(True)
        y.backward(dy)
        gather(False)
        for got, right in zip(gradients(), want, strict=True):
            assert_close("gradient", got, right, 1e-6)
        del y
        assert allocated() - before < 100_000
