"""The preparation is kept while parameters stand and never stale; merging, modes, copies and state_dicts."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close, make_layer, randomise
from torch import nn

import ssvdo_kernels.linear as linear_module
from ssvdo_kernels import SSVDOConfig, SSVDOLinear, gradient_accumulation, reference


def want(layer, x):
    return reference.linear(x, layer.weight, layer.bias, *layer.adapter_parameters, config=layer.config)


@pytest.fixture
def counted(monkeypatch):
    counts = {"forward": 0, "backward": 0}

    class Counting(linear_module.Prepared):
        def __init__(self, *args):
            counts["forward"] += 1
            super().__init__(*args)

        def backward(self, *args):
            counts["backward"] += 1
            return super().backward(*args)

    monkeypatch.setattr(linear_module, "Prepared", Counting)
    return counts


X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("forwards", [1, 40])
def test_inference_mode_leaves_nothing_that_training_cannot_use(forwards):
    layer = make_layer(24, 8, outer_rank=3)
    x = torch.randn(50, 8, dtype=torch.float64)
    want = layer(x).detach()
    layer.refresh()
    with torch.inference_mode():
        for _ in range(forwards):  # later ones build the folded matrices
            assert_close("y", layer(x), want, 1e-12)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.adapter_parameters)


def test_prepared_once_for_accumulation_evaluation_and_generation(counted):
    layer = make_layer(24, 8, outer_rank=3)
    for _ in range(3):
        layer(X).sum().backward()
    with torch.no_grad():
        layer.eval()(X)
        layer.train()(X[:1])
    assert counted == {"forward": 1, "backward": 3}


def optimiser_step(layer):
    layer(X).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()


class OldStyle(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(0.01)


def in_place(layer):
    with torch.no_grad():
        layer.outer[0, 0] += 0.5


def load(layer):
    layer.load_state_dict(make_layer(24, 8, outer_rank=3, seed=5).state_dict())


def load_assign(layer):
    layer.load_state_dict(make_layer(24, 8, outer_rank=3, seed=5).state_dict(), assign=True)


def replace_data(layer):
    layer.inner_scale.data = torch.ones_like(layer.inner_scale)


def one_number_through_data(layer):
    layer.inner_rotation.data[0] += 0.5


def edit_weight(layer):
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.singular_values.mul_(2)


CHANGES = [optimiser_step, lambda layer: OldStyle(layer.adapter_parameters).step(), in_place, load, load_assign,
           replace_data, one_number_through_data, edit_weight]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change, merged):
    layer = make_layer(24, 8, outer_rank=3)
    if merged:
        layer.merge()
    before = layer(X)
    change(layer)
    after = layer(X)
    assert_close("after", after, want(layer, X), 1e-11)
    assert not torch.allclose(after, before, atol=1e-6)


def test_dtype_moves_and_copies_are_not_stale():
    layer = make_layer(24, 8, outer_rank=3, path="factored")
    layer(X)
    twin = copy.deepcopy(layer)
    randomise(twin)
    assert_close("copy", twin(X), want(twin, X), 1e-11)
    assert_close("original", layer(X), want(layer, X), 1e-11)
    thawed = pickle.loads(pickle.dumps(layer))
    assert torch.equal(thawed(X), layer(X))
    y = layer(X)
    layer.float()
    assert_close("float32", layer(X.float()), y, 1e-5)
    layer.double()
    assert_close("and back", layer(X), y, 1e-5)


def grads(layer):
    return [p.grad.clone() for p in layer.adapter_parameters]


@pytest.mark.parametrize("form", ["auto", "merged", "core"])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_gradient_accumulation_gives_the_same_gradients_with_one_preparation(counted, m, n, form):
    plain, once = (make_layer(m, n, outer_rank=3, path=form) for _ in range(2))
    batches = [torch.randn(4, n, dtype=torch.float64) for _ in range(3)]
    for layer in (plain, once):  # gradients that are there already
        layer(batches[0]).square().sum().backward()
    for x in batches:
        plain(x).square().sum().backward()
    counted.update(forward=0, backward=0)
    with gradient_accumulation(nn.Sequential(once)):
        for x in batches:
            once(x).square().sum().backward()
    assert counted == {"forward": 0, "backward": 1}
    for a, b in zip(grads(once), grads(plain), strict=True):
        assert_close("grad", a, b, 1e-12)


def test_gradient_accumulation_refuses_steps_inside_nesting_and_keeps_grad_on_errors():
    layer = make_layer(24, 8, outer_rank=3)
    with pytest.raises(RuntimeError, match="changed inside gradient_accumulation"), gradient_accumulation(layer):
        layer(X).sum().backward()
        randomise(layer)
        layer(X)
    assert layer.outer.grad is None
    with gradient_accumulation(layer):
        with pytest.raises(RuntimeError, match="already open"), gradient_accumulation(layer):
            pass
        layer(X).sum().backward()
    assert layer.outer.grad is not None


def test_merge_keeps_the_weight_bit_for_bit_and_is_undone_exactly():
    layer = make_layer(24, 8, dtype=torch.float32, outer_rank=3)
    x = X.float()
    weight, state, y = layer.weight.clone(), copy.deepcopy(layer.state_dict()), layer(x)
    layer.merge()
    assert layer.merged
    assert_close("merged", layer(x), y, 1e-6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.adapted_weight(), layer.bias))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key
    layer.unmerge()
    assert torch.equal(layer(x), y) and torch.equal(layer.weight, weight)
    assert torch.equal(layer.to_linear().weight, weight)
    assert_close("to_linear", layer.to_linear(merge=True)(x), y, 1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_train_and_eval_change_nothing_by_themselves(merged):
    layer = make_layer(24, 8, outer_rank=3, path="factored")
    if merged:
        layer.merge()
    y, state = layer(X), copy.deepcopy(layer.state_dict())
    for switch in (layer.eval, layer.train, layer.eval):
        switch()
        assert torch.equal(layer(X), y) and layer.merged == merged
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def test_a_merged_layer_still_trains():
    layer, plain = make_layer(24, 8, outer_rank=3), make_layer(24, 8, outer_rank=3)
    layer.merge()
    for each in (layer, plain):
        each(X).square().sum().backward()
    for a, b in zip(grads(layer), grads(plain), strict=True):
        assert_close("grad", a, b, 1e-11)


@pytest.mark.parametrize("rank", [None, 3])
def test_state_dict_holds_everything(rank):
    """A layer over other (random) weights becomes the saved one: its factors, null space and all."""
    saved = make_layer(24, 8, outer_rank=3, inner_ratio=1.0, rank=rank)
    other = make_layer(24, 8, outer_rank=3, inner_ratio=1.0, seed=9)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(X), saved(X))
    assert all(v.is_floating_point() for v in saved.state_dict().values())  # checkpoint averaging sums integers wrongly


def test_no_tensor_of_the_size_of_the_complement():
    """U2 is m x (m - n); nothing as large is made by factorising, preparing, or a forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    m, n = 256, 32
    with Largest() as mode:
        layer = SSVDOLinear.from_linear(nn.Linear(n, m), SSVDOConfig(outer_rank=8))
        layer(torch.randn(4, n)).sum().backward()
    assert mode.numel <= m * n < m * (m - n) / 4
