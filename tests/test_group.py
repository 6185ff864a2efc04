"""Layers prepared together give what they give alone, in every way of training that could tell the difference."""

import copy
import pickle

import pytest
import torch
from groups import Net, agree, clear, nets, train
from helpers import assert_close, count_preparations
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, gradient_accumulation, load_ssvdo, save_ssvdo
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.host import hosts
from ssvdo_kernels.model import group_layers
from ssvdo_kernels.ops import host

if not host.available():
    pytest.skip("the compiled core was not built", allow_module_level=True)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each preparation and each way back was for, and each call of the compiled core, by its name."""
    found = count_preparations(monkeypatch)
    original = host._call

    def counting(function, operands, build, **sizes):
        found.setdefault(function, []).append(len(operands[0]))
        return original(function, operands, build, **sizes)

    monkeypatch.setattr(host, "_call", counting)
    return found


def x_of(*shape):
    return torch.randn(*shape, 8, dtype=torch.float64)


ALL = {"forward": [4, 4], "inner_forward": [4, 4], "backward": [4, 4], "inner_backward": [4, 4]}


@pytest.mark.parametrize("options", [{}, {"rotation": "neumann"}, {"outer": "additive"}], ids=str)
def test_one_call_a_group_each_way(calls, options):
    net, alone = nets(**options)
    x = x_of(3, 5)
    train(net, x)
    assert calls == ALL
    train(alone, x)
    agree(net, alone)


def test_steps(calls):
    net, alone = nets()
    for model in net, alone:
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        clear(calls)
        torch.manual_seed(1)
        for _ in range(3):
            optimiser.zero_grad()
            train(model, x_of(6))
            optimiser.step()
        if model is net:
            assert {name: len(sizes) for name, sizes in calls.items()} == dict.fromkeys(ALL, 6)
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        assert_close("parameter", p, q, 1e-10)


def test_skipped_layers_get_no_gradient():
    net, alone = nets()
    for model in net, alone:
        torch.manual_seed(1)
        train(model, x_of(4), skip=(1, 2))
    agree(net, alone)
    assert net.blocks[1][0].adapter.outer.grad is None
    for model in net, alone:  # the skipped ones come in later, on the same preparation
        torch.manual_seed(2)
        train(model, x_of(4), skip=(0,))
    agree(net, alone)


def test_frozen_parameters():
    net, alone = nets()
    for model in net, alone:
        model.blocks[0][0].requires_grad_(False)
        model.blocks[1][0].adapter.inner_rotation.requires_grad_(False)
        torch.manual_seed(1)
        train(model, x_of(4))
    agree(net, alone)
    for model in net, alone:  # thawed on the same preparation
        model.blocks[0][0].adapter.outer.requires_grad_(True)
        torch.manual_seed(2)
        train(model, x_of(4))
    agree(net, alone)
    assert net.blocks[0][0].adapter.outer.grad is not None and net.blocks[0][0].adapter.inner_scale.grad is None


def test_layers_of_other_scales_are_prepared_apart(calls):
    """A batch has one scale, whichever engine prepares it."""
    net, alone = nets()
    for model in net, alone:
        model.blocks[1][0].adapter.scale = 0.5
        torch.manual_seed(1)
        train(model, x_of(4))
    assert calls["forward"][:3] == [3, 4, 1]
    agree(net, alone)


def test_tied_layers():
    net, alone = nets()
    for model in net, alone:
        model.blocks[2] = model.blocks[0]
        torch.manual_seed(1)
        train(model, x_of(4))
    agree(net, alone)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    net, alone = nets()

    def forward(model):
        def run(x):
            for block in model.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return x

        return run

    for model in net, alone:
        torch.manual_seed(1)
        train(model, x_of(40).requires_grad_(), forward(model))
        train(model, x_of(40).requires_grad_(), forward(model))
    agree(net, alone)


def test_micro_batches(calls):
    net, alone = nets()
    for model in net, alone:
        torch.manual_seed(1)
        for _ in range(3):
            train(model, x_of(4))
    agree(net, alone)
    net.zero_grad()
    clear(calls)
    torch.manual_seed(1)
    with gradient_accumulation(net):
        for _ in range(3):
            train(net, x_of(4))
    assert calls == {"forward": [], "inner_forward": [], "backward": [4, 4], "inner_backward": [4, 4]}
    agree(net, alone)


def test_evaluation_first_and_graphs_used_twice():
    net, alone = nets()
    x = x_of(4)
    with torch.no_grad():
        assert_close("y", net(x), alone(x), 1e-12)
    for model in net, alone:
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    agree(net, alone)
    one = net.blocks[3][0].adapter.outer
    (a,), (b,) = (torch.autograd.grad(m(x).sum(), m.blocks[3][0].adapter.outer) for m in (net, alone))
    assert one.shape == a.shape
    assert_close("grad", a, b, 1e-11)


def test_a_parameter_may_be_swapped_between_steps():
    """Nothing holds the node of a backward that has run."""
    net, alone = nets()
    x = x_of(4)
    for model in net, alone:
        train(model, x)
        model.zero_grad()
        outer = model.blocks[0][0].adapter.outer
        torch.utils.swap_tensors(outer, nn.Parameter(outer.detach() * 1.5))
        train(model, x)
    agree(net, alone)


def test_edits_of_one_layer_prepare_that_layer(calls):
    net, alone = nets()
    x = x_of(4)
    net(x)
    clear(calls)
    for model in net, alone:
        model.blocks[1][0].adapter.outer.data.mul_(1.5)  # behind the version counter's back
    y = net(x)
    assert calls["forward"] == [1]
    assert_close("y", y, alone(x), 1e-12)


def test_a_weight_that_is_exchanged_while_others_are_prepared_is_not_missed():
    """A layer is prepared along with one that has not changed, from views that are made once."""
    net, alone = nets()
    x = x_of(4)
    net(x)
    for model in net, alone:
        for block in model.blocks:
            block[0].adapter.outer.detach().mul_(1.5)
        layer = model.blocks[1][0]
        layer.weight.data = layer.weight.data * 2  # the very Parameter, elsewhere
        layer.adapter.singular_values.data *= 2
        layer.adapter.origin.forget()
    assert_close("y", net(x), alone(x), 1e-12)


def exchange(model, factor=1.0):
    """Other parameters, in the place of those that there are."""
    for _, layer in hosts(model):
        for name in PARAMETER_NAMES:
            setattr(layer.adapter, name, nn.Parameter(getattr(layer.adapter, name).detach() * factor))


@pytest.mark.parametrize("factor", [1.0, 1.1])
@pytest.mark.parametrize("accumulate", [False, True])
def test_exchanged_parameters_get_their_gradients(accumulate, factor):
    """On a CPU parameters of the same numbers are up to date; the node of those that were there is not theirs."""
    net, alone = nets()
    x = x_of(4)
    net(x)
    exchange(net, factor)
    exchange(alone, factor)
    if accumulate:
        with gradient_accumulation(net):
            train(net, x)
    else:
        train(net, x)
    train(alone, x)
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    agree(net, alone)


def test_functional_call_with_the_same_numbers():
    net, alone = nets()
    x = x_of(4)
    net(x)
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    grads = []
    for model in net, alone:
        other = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n in trained}
        y = torch.func.functional_call(model, other, (x,))
        grads.append(torch.autograd.grad(y.sum(), list(other.values())))
    for name, a, b in zip(trained, *grads, strict=True):
        assert_close(name, a, b, 1e-11)
    train(net, x)
    train(alone, x)
    agree(net, alone)


def test_functional_call_and_compile():
    net, alone = nets()
    x = x_of(4)
    other = {n: (p.detach() * (1.1 if p.requires_grad else 1)).requires_grad_(p.requires_grad)
             for n, p in net.named_parameters()}  # fmt: skip
    trained = [n for n in other if n.endswith(PARAMETER_NAMES)]
    grads = [torch.autograd.grad(torch.func.functional_call(m, other, (x,)).sum(), [other[n] for n in trained])
             for m in (net, alone)]  # fmt: skip
    for name, a, b in zip(trained, *grads, strict=True):
        assert_close(name, a, b, 1e-11)
    torch._dynamo.reset()
    assert_close("y", torch.compile(net, backend="aot_eager", fullgraph=True)(x), alone(x), 1e-12)


def test_copies_are_alone_until_grouped(calls):
    _, alone = nets()
    loaded = pickle.loads(pickle.dumps(alone))
    x = x_of(4)
    loaded(x)
    assert set(calls["inner_forward"]) == {1}
    group_layers(loaded)
    clear(calls)
    with torch.no_grad():
        for _, layer in hosts(loaded):
            layer.adapter.outer.mul_(1.1)
    loaded(x)
    assert calls["inner_forward"] == [4, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_pivot_elsewhere_waits_for_its_own_forward(value):
    net, _ = nets()
    with torch.no_grad():
        net.blocks[3][0].adapter.outer[0, 0] = value
    x = x_of(4)
    net(x, skip=(3,)).sum().backward()
    with pytest.raises(ArithmeticError, match="failed at pivot 1"):
        net(x)


def test_what_is_being_accumulated_is_not_lost():
    net, _ = nets()
    first, second = net.blocks[0][0], net.blocks[1][0]
    x = x_of(4)
    with pytest.raises(RuntimeError, match="changed inside gradient_accumulation"), gradient_accumulation(net):
        second(x).sum().backward()
        with torch.no_grad():
            first.adapter.outer.mul_(1.1)
            second.adapter.outer.mul_(1.1)
        first(x)
        second(x)


def test_rank_deficient_members():
    torch.manual_seed(0)
    net = Net().double()
    with torch.no_grad():
        net.blocks[2][0].weight[:, :4] = net.blocks[2][0].weight[:, 4:]
    apply_ssvdo(net, SSVDOConfig(target_modules="all-linear", inner_ratio=1.0, outer_rank=3, init_angle=0.2))
    assert net.blocks[2][0].adapter.null_basis.shape[1] == 4
    alone = copy.deepcopy(net)
    x = x_of(5)
    for model in net, alone:
        train(model, x)
    agree(net, alone)


def test_members_whose_bases_are_of_other_dtypes(calls):
    """Of one ill-conditioned bfloat16 weight V is kept in float32: it is prepared apart from the others."""
    torch.manual_seed(0)
    net = Net().double()
    with torch.no_grad():
        u, _, vt = torch.linalg.svd(net.blocks[2][0].weight, full_matrices=False)
        net.blocks[2][0].weight.copy_(u * torch.logspace(0, -2.5, 8, dtype=torch.float64) @ vt)
    apply_ssvdo(net.bfloat16(), SSVDOConfig(target_modules="all-linear", outer_rank=3, init_angle=0.2))
    dtypes = [block[0].adapter.basis.dtype for block in net.blocks]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    alone = copy.deepcopy(net)
    x = x_of(5).bfloat16()
    train(net, x)
    assert sorted(calls["forward"]) == [1, 3, 4]
    train(alone, x)
    for (name, p), (_, q) in zip(net.named_parameters(), alone.named_parameters(), strict=True):
        if q.grad is not None:
            assert torch.equal(p.grad, q.grad), name


def replicated(module):
    """As nn.DataParallel does: the same dictionaries, copies of the parameters."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicated(child))
    for name, p in module._parameters.items():
        if p is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, p.clone())
    return replica


def test_replicas_prepare_for_themselves(calls):
    net, alone = nets()
    x = x_of(4)
    train(net, x)
    train(alone, x)
    clear(calls)
    net.zero_grad()
    for _ in range(2):
        train(replicated(net), x)
    assert calls["forward"] == [1] * 16 and calls["backward"] == [1] * 16
    for p in alone.parameters():
        if p.grad is not None:
            p.grad *= 2
    agree(net, alone)
    clear(calls)
    net(x)
    assert calls["forward"] == []  # what the original kept is still its own


def test_loaded_adapters_are_grouped(calls, tmp_path):
    net, _ = nets()
    save_ssvdo(net, tmp_path)
    torch.manual_seed(0)
    fresh = load_ssvdo(Net().double(), tmp_path)
    clear(calls)
    fresh(x_of(4))
    assert calls["inner_forward"] == [4, 4]
