"""Layers of one shape in a compiled graph: one way back for all, eager gradients, and no graph more than without."""

import copy

import pytest
import torch
from compiling import as_copied, clear, compiled, gradients, in_groups, model, same, tokens
from helpers import TORCH, assert_close, count_preparations, make_layer, randomise_all
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, merge_ssvdo
from ssvdo_kernels.factorize import FACTOR_NAMES
from ssvdo_kernels.ops import compiled as compiled_operations
from ssvdo_kernels.ops import compiled_batch as operations
from ssvdo_kernels.ops import graph, host

needs_groups = pytest.mark.skipif(
    not host.available(), reason="a CPU prepares layer by layer without the compiled core"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    return count_preparations(monkeypatch)


def own(layer):
    return operations.Own(layer.weight, *layer.adapter.parts, *(getattr(layer.adapter, n) for n in FACTOR_NAMES))


@pytest.mark.parametrize("m, n, options", [
    (12, 5, {"outer_rank": 3}), (5, 12, {"outer_rank": 0}), (12, 5, {"outer_rank": 4, "rank": 2}),
    (5, 12, {"outer_rank": 3, "path": "merged"})])  # fmt: skip
def test_opcheck(m, n, options):
    layers = [make_layer(m, n, seed=seed, **options) for seed in range(2)]
    layers[1].adapter.inner_scale.requires_grad_(False)
    specs, (tensors, present) = "\n".join(layer.adapter.spec for layer in layers), operations.pack(map(own, layers))
    named = ("test_schema", "test_faketensor", "test_autograd_registration")  # nobody reads what it returns
    torch.library.opcheck(operations.stand_ins, (tensors, specs, present), test_utils=named)
    pairs = [t.detach() for t in operations.stand_ins(tensors, specs, present)]
    x, spec = torch.randn(7, n, dtype=torch.float64, requires_grad=True), layers[0].adapter.spec
    fixed = [None if t is None else t.detach() for t in (layers[0].weight, *own(layers[0]))]
    stands = [t.clone().requires_grad_() for t in pairs[:2]]
    torch.library.opcheck(operations.joined, (x, layers[0].bias, *stands, *fixed, spec, False))
    y, saved = operations.joined(x, None, *stands, *fixed, spec, False)
    for needs in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(operations.pull_back, (torch.randn_like(y), x.detach(), saved.detach(), *fixed, needs,
                                                     spec, False))  # fmt: skip
    gradients = [torch.randn(t.shape, dtype=t.dtype) for t in pairs]
    needs = [p.requires_grad for layer in layers for p in layer.adapter.trained]
    torch.library.opcheck(operations.adapted_adjoint, (gradients, [t.detach() for t in tensors], specs, present, needs))


@pytest.mark.parametrize("backend, merged", [("aot_eager", True), ("inductor", False)])
def test_training(backend, merged, calls):
    """Steps of an optimiser with lengths that change; evaluation in between takes what training prepared."""
    net = model(torch.float64, 3)
    if merged:
        merge_ssvdo(net)
    other = copy.deepcopy(net)
    function = compiled(net, backend=backend)
    optimisers = [torch.optim.Adam(n.parameters(), lr=1e-2, eps=1e-3) for n in (net, other)]
    for count in (4, 7, 9):
        x = tokens(count)
        clear(calls)
        got = gradients(function, net, x)
        with torch.no_grad():
            function(x)
        assert sorted(calls["forward"]) == sorted(in_groups(3))
        assert sorted(calls["backward"]) == sorted(in_groups(3))
        same(got, gradients(other, other, x), 1e-12)
        for optimiser in optimisers:
            optimiser.step()
    assert not compiled_operations._lent


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(self.gate(x).tanh() * self.up(x))


def gated(adapt=apply_ssvdo, **options):
    """Two blocks, each with two layers of one shape and one of another."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Gated() for _ in range(2))).double()
    return randomise_all(adapt(net, SSVDOConfig(outer_rank=3, target_modules=["gate", "up", "down"], **options)))


def together(calls):
    """Sizes of the ways back, in no order."""
    return sorted(calls["backward"])


@needs_groups
@pytest.mark.parametrize("whole", [True, False])
def test_as_many_graphs_as_without(whole, calls, monkeypatch):
    """Blocks that are compiled by themselves share one graph, in which gate and up go together."""
    built, other = [], gated()
    for joins in (True, False):
        torch._dynamo.reset()
        if not joins:
            monkeypatch.setattr(graph, "join", lambda module: None)
        net, counter = gated(), CompileCounterWithBackend("aot_eager")
        function = torch.compile(net, backend=counter, fullgraph=True) if whole else net
        for block in [] if whole else net:
            block.compile(backend=counter, fullgraph=True)
        for count in (4, 7, 9):
            x = tokens(count)
            clear(calls)
            got = gradients(function, net, x)
            assert together(calls) == ([1] * 6 if not joins else [2, 4] if whole else [1, 1, 2, 2])
            same(got, gradients(other, other, x), 1e-12)
        built.append(counter.frame_count)
    assert built == [2, 2]  # one for 4 rows, one for any number


@needs_groups
def test_two_graphs_and_two_backwards(calls):
    net = model(torch.float64, 2)
    one, other = compiled(net), compiled(lambda v: net(net(v)))
    for _ in range(2):
        clear(calls)
        x = tokens(5)
        got = gradients(one, net, x), gradients(other, net, x)
        assert together(calls) == sorted(2 * in_groups(2))  # a layer that is used twice goes back once
        same(got[0], as_copied(net, x), 1e-12)
        same(got[1], gradients(lambda v: net(net(v)), net, x), 1e-11)
        randomise_all(net)


def test_gradients_that_add_up():
    net, x = model(torch.float64, 2), tokens(5)
    function, other = compiled(net), copy.deepcopy(net)
    for run in (function, other):
        for rows in (x[:2], x[2:]):
            run(rows).square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            assert_close("grad", p.grad, q.grad, 1e-12)


@needs_groups
def test_a_break_in_the_graph(calls):
    net, x = model(torch.float64, 4), tokens(5)

    def broken(v):
        v = net[:6](v)
        torch._dynamo.graph_break()
        return net[6:](v)

    got = gradients(torch.compile(broken, backend="aot_eager"), net, x)
    assert together(calls) == [1, 2, 2, 2, 2]
    same(got, as_copied(net, x), 1e-12)


@needs_groups
def test_layers_without_a_gradient(calls):
    """Nothing uses their output in one branch: they get none, where others of their shape get some."""
    net, x = model(torch.float64, 3), tokens(5)

    def some(v, net, all_of_it):
        first = net[:3](v)
        middle = net[3:6](first)
        return net[6:](middle if all_of_it else first)

    function = compiled(some)
    for all_of_it in (False, True, False):
        clear(calls)
        net.zero_grad()
        function(x, net, all_of_it).square().sum().backward()
        assert together(calls) == ([1, 3, 3] if all_of_it else [1, 2, 2])
        assert all((p.grad is not None) == all_of_it for p in net[3].adapter.trained + net[5].adapter.trained)
        got = [p.grad for p in net.parameters() if p.grad is not None]
        fresh = copy.deepcopy(net)
        fresh.zero_grad()
        some(x, fresh, all_of_it).square().sum().backward()
        same(got, [p.grad for p in fresh.parameters() if p.grad is not None], 1e-12)


@needs_groups
def test_checkpoints_inside(calls):
    """Recomputing asks for no stand-ins of its own; layers of several checkpointed parts, and of none, go together."""
    net, x = model(torch.float64, 3), tokens(5)

    def parts(v):
        for part in (net[:3], net[3:6]):
            v = checkpoint(part, v, use_reentrant=False)
        return net[6:](v)

    function = compiled(parts)
    for _ in range(2):
        clear(calls)
        got = gradients(function, net, x)
        assert together(calls) == [1, 3, 3] and len(calls["forward"]) <= 3
        same(got, as_copied(net, x), 1e-11)
        randomise_all(net)


@needs_groups
def test_a_checkpoint_around_a_compiled_part(calls):
    net, x = model(torch.float64, 3), tokens(5)
    inner = compiled(net)
    got = gradients(lambda v: checkpoint(inner, v, use_reentrant=False), net, x)
    assert together(calls) == [1, 3, 3]
    same(got, as_copied(net, x), 1e-11)


@needs_groups
def test_checkpoints_of_any_number_of_rows_with_dropout(calls):
    """dynamic=True makes symbols of floats, which Dynamo cannot bring into a checkpointed part."""
    net = gated(dropout=0.5)
    parts = lambda v: checkpoint(net[1], checkpoint(net[0], v, use_reentrant=False), use_reentrant=False)  # noqa: E731
    function = compiled(parts, dynamic=True)
    for count in (4, 7):
        x, found = tokens(2, count), []
        for run in (function, parts):
            torch.manual_seed(count)
            clear(calls)
            found.append(gradients(run, net, x))
            assert together(calls) == [2, 4]
        same(*found, 1e-12)


@needs_groups
def test_frozen_layers_stay_out(calls):
    net, x = model(torch.float64, 3), tokens(5)
    net[3].requires_grad_(False)
    net[6].adapter.outer.requires_grad_(False)
    got = gradients(compiled(net), net, x)
    assert together(calls) == [1, 2, 3]
    same(got, as_copied(net, x), 1e-12)
    assert net[6].adapter.outer.grad is None


@needs_groups
@pytest.mark.parametrize("backend, write", [
    ("aot_eager", lambda a: a.outer.mul_(1.01)), ("aot_eager", lambda a: a.outer.data.view(-1).mul_(1.01)),
    ("aot_eager", lambda a: a.basis.mul_(1.01)),
    ("eager", lambda a: torch._foreach_mul_([a.outer, a.inner_scale], 1.01))],
    ids=["in place", "through data", "a factor", "foreach"])  # fmt: skip
def test_layers_that_the_graph_writes_to_stay_out(backend, write, calls):
    """Their stand-ins would be made from what they were at the start."""
    net, x = model(torch.float64, 2), tokens(5)
    other = copy.deepcopy(net)

    def function(v, net):
        v = net[:3](v)
        with torch.no_grad():
            write(net[3].adapter)
        return net[3:](v)

    run = compiled(function, backend=backend)
    got = gradients(lambda v: run(v, net), net, x)
    assert together(calls) == [1, 1, 1, 2]
    same(got, gradients(lambda v: function(v, other), other, x), 1e-12)


class Conv1D(nn.Module):
    """As Transformers' own, known by its name."""

    def __init__(self, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) / rows**0.5)
        self.bias = nn.Parameter(torch.zeros(columns))

    def forward(self, x):
        return x @ self.weight + self.bias


@needs_groups
@pytest.mark.parametrize("kind, shape", [(Conv1D, (3, 8)), (lambda i, o: nn.Conv1d(i, o, 1), (2, 8, 5))],
                         ids=["transposed", "flattened"])  # fmt: skip
def test_weights_that_lie_otherwise(kind, shape, calls):
    net = nn.Sequential(kind(8, 16), kind(16, 8), kind(8, 16), kind(16, 8)).double()
    net = randomise_all(apply_ssvdo(net, SSVDOConfig(outer_rank=3, target_modules=["0", "1", "2", "3"])))
    other, x = copy.deepcopy(net), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    # of a wide layer's last turn a sum of squares would feel nothing
    got = gradients(compiled(lambda v: net(v).sin()), net, x)
    assert calls == {"forward": [2, 2], "backward": [2, 2]}
    same(got, gradients(lambda v: other(v).sin(), other, x), 1e-12)


@needs_groups
def test_layouts_do_not_mix(calls):
    """Square weights of one shape, the one stored as it is and the other transposed: a batch reads all alike."""
    net = nn.Sequential(nn.Linear(8, 8), Conv1D(8, 8)).double()
    net, x = randomise_all(apply_ssvdo(net, SSVDOConfig(outer_rank=0, target_modules=["0", "1"]))), torch.randn(3, 8)
    x, other = x.double().requires_grad_(), copy.deepcopy(net)
    for run in (compiled(lambda v: net(v).sin()), lambda v: net(v).sin()):
        clear(calls)
        got = gradients(run, net, x)
        assert calls["backward"] == [1, 1] and calls["forward"] in ([], [1, 1])
        same(got, gradients(lambda v: other(v).sin(), other, x), 1e-12)


@needs_groups
def test_hosts_of_peft_and_espnet(calls):
    from ssvdo_kernels.integrations.espnet import create_ssvdo_adapter

    def espnet(net, config):
        create_ssvdo_adapter(net, list(config.target_modules), outer_rank=config.outer_rank)
        net(torch.randn(2, 16, dtype=torch.float64))  # factorises
        return net

    makers = [espnet]
    try:
        import peft

        from ssvdo_kernels.integrations.peft import SSVDOConfig as PeftConfig
    except ImportError:
        pass
    else:
        makers.append(lambda net, config: peft.get_peft_model(net, PeftConfig(
            outer_rank=config.outer_rank, target_modules=list(config.target_modules))))  # fmt: skip
    for adapt in makers:
        net, other, x = gated(adapt), gated(adapt), tokens(5)
        clear(calls)
        inner = adapt is not espnet and TORCH < (2, 7)  # whose Dynamo follows no context manager of PEFT's
        got = gradients(compiled(net.get_base_model() if inner else net), net, x)
        assert together(calls) == [2, 4]
        same(got, gradients(other, other, x), 1e-12)


def test_parameters_that_no_layer_owns_are_prepared_no_more_often(calls):
    """Once for the forward and the backward."""
    net, x = model(torch.float64, 2), tokens(5)
    own = {n: (1.1 * p.detach()).requires_grad_() for n, p in net.named_parameters() if p.requires_grad}
    call = compiled(lambda v, parameters: torch.func.functional_call(net, parameters, (v,)))
    got = torch.autograd.grad(call(x, own).square().sum(), list(own.values()))
    assert calls["forward"] == [1] * 5 and calls["backward"] == [1] * 5
    y = torch.func.functional_call(net, own, (x,))
    same(got, torch.autograd.grad(y.square().sum(), list(own.values())), 1e-12)
    assert not compiled_operations._lent


@needs_groups
@pytest.mark.parametrize("checkpointed", [False, True])
def test_in_data_parallel_a_few_layers_that_follow_one_another_go_back_together(checkpointed, calls, monkeypatch):
    monkeypatch.setattr(graph, "ddp", lambda: True)
    monkeypatch.setattr(graph, "LAYERS", 2)
    net, x, seen = model(torch.float64, 3), tokens(5), []
    join = graph.join
    monkeypatch.setattr(graph, "join", lambda module: (join(module), seen.append(module.graph)))
    function = (lambda v: net[6:](checkpoint(net[:6], v, use_reentrant=False))) if checkpointed else net
    got = gradients(compiled(function), net, x)
    assert together(calls) == [1, 1, 1, 2, 2]
    same(got, as_copied(net, x), 1e-12)
    own = [name.split(".")[1] for name in (str(node.target) for node in seen[0].nodes) if "ssvdo_kernels" in name]
    assert own[:3] == ["stand_ins", "stand_ins" if checkpointed else "adapted_joined",
                       "adapted_train" if checkpointed else "stand_ins"]  # fmt: skip


def test_a_dynamo_without_finalizers_leaves_layers_alone(calls, monkeypatch):
    monkeypatch.delattr(torch._dynamo.output_graph.OutputGraph, "add_graph_finalizer")
    net, x = model(torch.float64, 2), tokens(5)
    got = gradients(compiled(net), net, x)
    assert calls["backward"] == [1] * 5
    same(got, as_copied(net, x), 1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_programs_hold_layers_one_by_one(strict):
    net, x = model(torch.float64, 2), tokens(5).detach()
    program = torch.export.export(net, (x,), strict=strict)
    found = {str(node.target) for node in program.graph.nodes if "ssvdo" in str(node.target)}
    assert found == {"ssvdo_kernels.adapted_train.default"}


def test_compiled_autograd(calls):
    net, x = model(torch.float64, 2), tokens(5)
    y = compiled(net)(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.backward()
    assert sorted(calls["backward"]) == sorted(in_groups(2))
    got = [p.grad.clone() for p in net.parameters() if p.requires_grad]
    same(got, as_copied(net, x)[2:], 1e-12)
