"""The preparation is kept while parameters stand, and never stale."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from groups import agree
from helpers import assert_close, count_preparations, make_layer, prepared, randomise, reference_linear, three
from torch import nn

from ssvdo_kernels import SSVDOLinear, cache, gradient_accumulation
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.ops import streams

X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_prepared_once_for_accumulation_evaluation_and_generation(monkeypatch):
    counted = count_preparations(monkeypatch)
    layer = make_layer(24, 8, outer_rank=3)
    for _ in range(3):
        layer(X).sum().backward()
    with torch.no_grad():
        layer.eval()(X)
        layer.train()(X[:1])
    assert counted == {"forward": [1], "backward": [1, 1, 1]}


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
        layer.adapter.outer[0, 0] += 0.5


def load(layer):
    layer.load_state_dict(make_layer(24, 8, outer_rank=3, seed=5).state_dict())


def load_assign(layer):
    layer.load_state_dict(make_layer(24, 8, outer_rank=3, seed=5).state_dict(), assign=True)


def replace_data(layer):
    layer.adapter.inner_scale.data = torch.ones_like(layer.adapter.inner_scale)


def one_number_through_data(layer):
    layer.adapter.inner_rotation.data[0] += 0.5


def edit_weight(layer):
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.adapter.singular_values.mul_(2)
    layer.adapter.origin.forget()  # the factors are the new weight's


def scale_weight_through_data(layer):
    """Twice, so that the second may come to lie where the first did."""
    layer.adapter.singular_values.data = layer.adapter.singular_values.data * 4
    for _ in range(2):
        layer.weight.data = layer.weight.data * 2
    layer.adapter.origin.forget()


def exchange_parameters(layer):
    for name in PARAMETER_NAMES:
        setattr(layer.adapter, name, nn.Parameter(getattr(layer.adapter, name).detach() + 0.5))


CHANGES = [optimiser_step, lambda layer: OldStyle(layer.adapter.trained).step(), in_place, load, load_assign,
           replace_data, one_number_through_data, edit_weight, scale_weight_through_data, exchange_parameters]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("<>"))
def test_never_stale(change, merged):
    layer = make_layer(24, 8, outer_rank=3)
    if merged:
        layer.merge()
    before = layer(X)
    change(layer)
    after = layer(X)
    assert_close("after", after, reference_linear(layer, X), 1e-11)
    assert not torch.allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", ["weight", "basis", "singular_values", "outer_basis", "null_basis", "set_factors"])
def test_an_edit_of_any_frozen_tensor_is_seen(name, rank, merged):
    """Of one alone, which no reference describes: a copy that starts afresh is the truth."""
    layer = make_layer(24, 8, outer_rank=rank, inner_ratio=1.0, rank=5, path="merged" if merged else "factored")
    before = layer(X)
    with torch.no_grad():
        if name == "set_factors":
            flipped = replace(layer.adapter.factors, basis=layer.adapter.basis.flip(1).contiguous())
            layer.adapter.set_factors(flipped, layer.weight)
        elif (tensor := getattr(layer if name == "weight" else layer.adapter, name)) is not None:
            tensor.mul_(1.5)
    if name == "weight":
        with pytest.raises(RuntimeError, match="layer: weight is no longer the one that was factorised"):
            layer(X)
        layer.adapter.origin.forget()
    after = layer(X)
    assert torch.equal(after, copy.deepcopy(layer)(X))
    assert torch.equal(after, before) == (name == "outer_basis" and rank == 0)


def rescale(layer):
    layer.adapter.scale = 0.5


def replace_basis(layer):
    layer.adapter.basis = nn.Parameter(layer.adapter.basis.detach().clone(), requires_grad=False)


@pytest.mark.parametrize("change", [optimiser_step, in_place, load, load_assign, edit_weight, scale_weight_through_data,
                                    exchange_parameters, replace_basis, rescale, SSVDOLinear.refresh,
                                    SSVDOLinear.float], ids=lambda f: f.__name__)  # fmt: skip
def test_what_follows_from_frozen_tensors_is_made_once(change):
    """A source is that of the last preparation where nothing but numbers of the parameters has changed since."""
    layer = make_layer(24, 8, outer_rank=3)
    before = prepared(layer)
    change(layer)
    after = prepared(layer)
    assert after is not before
    assert (after.source is before.source) == (change in (optimiser_step, in_place))


@pytest.mark.parametrize("name", ["basis", "singular_values", "outer_basis", "null_basis"])
def test_what_is_made_once_holds_no_numbers(name):
    """An edit of a frozen tensor that leaves no trace is in the next preparation."""
    layer = make_layer(24, 8, outer_rank=3, inner_ratio=1.0, rank=5)
    layer(X)
    getattr(layer.adapter, name).data.mul_(1.5)
    in_place(layer)
    assert torch.equal(layer(X), copy.deepcopy(layer)(X))


def test_a_weight_where_another_lay_is_another():
    """An address and a version tell tensors apart only while the first is alive."""
    layer = make_layer(24, 8, outer_rank=0)
    layer.merge()
    for factor in (2, 3, 5, 7, 11, 13):
        layer(X)
        for _ in range(2):  # the second may take the place of what was there at the forward
            layer.weight.data = layer.weight.data * factor
        layer.adapter.singular_values.data *= factor**2
        layer.adapter.origin.forget()
        assert_close(f"times {factor}", layer(X), reference_linear(layer, X), 1e-11)


@pytest.mark.parametrize("accumulate", [False, True])
def test_exchanged_parameters_of_the_same_numbers_get_their_gradients(accumulate):
    layer, plain = make_layer(24, 8, outer_rank=3), make_layer(24, 8, outer_rank=3)
    layer(X)
    old = layer.adapter.trained
    for name in PARAMETER_NAMES:
        setattr(layer.adapter, name, nn.Parameter(getattr(layer.adapter, name).detach().clone()))
    plain(X).square().sum().backward()
    if accumulate:
        with gradient_accumulation(layer):
            layer(X).square().sum().backward()
    else:
        layer(X).square().sum().backward()
    assert all(p.grad is None for p in old)
    agree(layer, plain, 1e-12)


def test_parameters_exchanged_inside_gradient_accumulation_are_an_error():
    layer = make_layer(24, 8, outer_rank=3)
    with pytest.raises(RuntimeError, match="changed inside gradient_accumulation"), gradient_accumulation(layer):
        layer(X).sum().backward()
        layer.adapter.outer = nn.Parameter(layer.adapter.outer.detach().clone())
        layer(X)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("rotation", ["cayley", "neumann", "first_order"])
@pytest.mark.parametrize("dtype, tokens", [(torch.float64, 3), (torch.float64, 50), (torch.bfloat16, 50)])
def test_a_backward_is_of_the_inner_parameters_of_its_forward(dtype, tokens, rotation, backend):
    layer, plain = (make_layer(24, 8, dtype=dtype, outer_rank=3, rotation=rotation, backend=backend) for _ in range(2))
    x = torch.randn(tokens, 8).to(dtype)
    plain(x).square().sum().backward()
    loss = layer(x).square().sum()
    with torch.no_grad():
        layer.adapter.inner_rotation.add_(0.5)
        layer.adapter.inner_scale.add_(0.5)
    loss.backward()
    for p, q in zip(layer.adapter.trained, plain.adapter.trained, strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("through_data", [False, True])
def test_an_edit_of_the_outer_part_before_the_backward_is_an_error(through_data, backend):
    """As PyTorch says of its own operations; on a CPU, where it leaves no trace, too."""
    layer = make_layer(24, 8, outer_rank=3, backend=backend)
    y = layer(X)
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        (layer.adapter.outer.data if through_data else layer.adapter.outer).add_(0.5)
    with pytest.raises(RuntimeError, match="`outer` was changed in place between a forward and its backward"):
        y.sum().backward()


def write_the_same(layer):
    with torch.no_grad():
        for p in layer.adapter.trained:
            p.mul_(1)


def step_by_nothing(layer):
    """As a schedule that warms up from 0 does."""
    layer(X).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.0).step()


def there_and_back(layer):
    for outer in (torch.zeros_like(layer.adapter.outer), layer.adapter.outer.detach().clone()):
        with torch.no_grad():
            layer.adapter.outer.copy_(outer)


def exchange_for_the_same(layer):
    """And the old ones go on elsewhere."""
    old = layer.adapter.trained
    for name in PARAMETER_NAMES:
        setattr(layer.adapter, name, nn.Parameter(getattr(layer.adapter, name).detach().clone()))
    with torch.no_grad():
        for p in old:
            p.add_(0.5)


@pytest.mark.parametrize("write", [write_the_same, step_by_nothing, there_and_back, exchange_for_the_same,
                                   lambda layer: layer.load_state_dict(layer.state_dict())])  # fmt: skip
def test_writing_the_same_numbers_is_no_edit(write):
    layer, plain = make_layer(24, 8, outer_rank=3), make_layer(24, 8, outer_rank=3)
    plain(X).square().sum().backward()
    layer(X)
    for _ in range(2):
        write(layer)
        layer.zero_grad()
        layer(X).square().sum().backward()
        agree(layer, plain, 1e-12)


def test_dtype_moves_and_copies_are_not_stale():
    layer = make_layer(24, 8, outer_rank=3, path="factored")
    layer(X)
    twin = copy.deepcopy(layer)
    randomise(twin)
    assert_close("copy", twin(X), reference_linear(twin, X), 1e-11)
    assert_close("original", layer(X), reference_linear(layer, X), 1e-11)
    thawed = pickle.loads(pickle.dumps(layer))
    assert torch.equal(thawed(X), layer(X))
    y = layer(X)
    layer.float()
    assert_close("float32", layer(X.float()), y, 1e-5)
    layer.double()
    assert_close("and back", layer(X), y, 1e-5)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("rank", [None, 3])
def test_modules_may_swap_their_tensors(swapping, rank):
    layer = make_layer(24, 8, outer_rank=3, rank=rank)
    y = layer(X).detach()
    layer.load_state_dict({key: t.clone() for key, t in layer.state_dict().items()})
    assert torch.equal(layer(X), y)
    layer.float()
    assert_close("float32", layer(X.float()), y, 1e-5)
    layer.double()(X).sum().backward()


def test_what_was_captured_is_never_trusted_again(monkeypatch):
    """A replay of a CUDA graph changes parameters without a trace: each eager forward looks for itself."""
    layer, x = make_layer(24, 8, outer_rank=3), torch.randn(5, 8, dtype=torch.float64)
    layer(x)
    monkeypatch.setattr(cache, "_on_cpu", lambda _: False)  # parameters are known by their stamps, as on a GPU
    monkeypatch.setattr(cache, "capturing", lambda _: True)
    monkeypatch.setattr("ssvdo_kernels.adapter.capturing", lambda _: True)
    layer(x).sum().backward()
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_on_cpu", lambda _: False)
    for _ in range(2):
        for p in layer.adapter.trained:
            p.data.add_(0.1)  # no stamp changes
        assert_close("y", layer(x), reference_linear(layer, x), 1e-11)
    with gradient_accumulation(layer):  # which takes the preparation that it sums on
        layer.zero_grad()
        for part in x.split(2):
            layer(part).sum().backward()
    wide = [p.detach().clone().requires_grad_() for p in three(layer)]
    reference_linear(layer, x, wide).sum().backward()
    for p, q in zip(three(layer), wide, strict=True):
        assert_close("grad", p.grad, q.grad, 1e-11)


def test_another_stream_waits_for_what_was_made_on_the_first(monkeypatch):
    waited, stream = [], [1]
    monkeypatch.setattr(streams, "current", lambda _: stream[0])
    monkeypatch.setattr(streams, "event", lambda _: SimpleNamespace(wait=lambda made=stream[0]: waited.append(made)))
    layer, x = make_layer(24, 8, outer_rank=3), torch.randn(5, 8, dtype=torch.float64)
    layer(x)
    layer(x)
    assert waited == []
    stream[0] = 2
    layer(x)
    assert waited == [1]
    layer.merge()
    layer(x)  # W' is built on the second stream
    waited.clear()
    stream[0] = 1
    layer(x)
    assert waited == [2]
