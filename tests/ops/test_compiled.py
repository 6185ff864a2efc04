"""Compiled layers: registered right, equal to the eager layer, never stale, and prepared no more often than it."""

import copy
import gc
import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compiling import as_copied, clear, compiled, gradients, in_groups, in_place, model, same, tokens, value
from helpers import TORCH, assert_close, count_preparations, make_layer, prepared, randomise, require_triton
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo, gradient_accumulation, merge_ssvdo, unmerge_ssvdo
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.factorize import FACTOR_NAMES
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import compiled as operations
from ssvdo_kernels.ops.preparation import News

# m, n, options
SHAPES = [(12, 5, {"outer_rank": 3}), (5, 12, {"outer_rank": 3}), (12, 5, {"outer_rank": 4, "rank": 2}),
          (5, 12, {"outer_rank": 0}), (6, 6, {"outer_rank": 0}), (12, 5, {"outer_rank": 2, "inner_ratio": 0.1}),
          (5, 12, {"outer_rank": 5, "rank": 3, "inner_ratio": 0.3})]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def arguments(layer):
    """(weight twice, parameters, factors) as the operations take them."""
    factors = [getattr(layer.adapter, name) for name in FACTOR_NAMES]
    return [layer.weight, layer.weight, *layer.adapter.parts, *factors]


@pytest.mark.skipif(not hasattr(torch._C.Tag, "cudagraph_unsafe"), reason="torch before 2.9 has no such tag")
def test_inductor_keeps_the_operations_out_of_its_cuda_graphs():
    """What a layer keeps may not lie in their memory, and they would prepare for each token."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("ssvdo_kernels::")]
    assert len(names) == 7
    for name in names:
        op = getattr(torch.ops.ssvdo_kernels, name.partition("::")[2]).default
        assert torch._C.Tag.cudagraph_unsafe in op.tags, name


@pytest.mark.parametrize("m, n, options", [
    *SHAPES, (12, 5, {"outer_rank": 3, "path": "core"}), (5, 12, {"outer_rank": 3, "path": "core"}),
    (12, 5, {"outer_rank": 3, "path": "merged"})])  # fmt: skip
def test_opcheck(m, n, options):
    layer = make_layer(m, n, **options)
    x = torch.randn(7, n, dtype=torch.float64, requires_grad=True)
    rest = *arguments(layer), layer.adapter.spec, False
    with torch.no_grad():
        torch.library.opcheck(operations.infer, (x.detach(), layer.bias, *rest))
    torch.library.opcheck(operations.train, (x, layer.bias, *rest))
    y, saved = operations.train(x, None, *rest)
    fixed = [None if t is None else t.detach() for t in arguments(layer)]
    for needs in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(operations.backward, (
            torch.randn_like(y), x.detach(), saved.detach(), *fixed, needs, layer.adapter.spec, False))  # fmt: skip


def test_a_program_without_its_layer_hears_of_a_bad_pivot_later(monkeypatch):
    """What a GPU says of one forward, the next one raises."""
    layer = make_layer(12, 5, outer_rank=3)
    rest = *(None if t is None else t.detach().clone() for t in arguments(layer)), layer.adapter.spec, False
    verdict = SimpleNamespace(there=lambda: True, read=lambda: ([0], [2]))
    monkeypatch.setattr(operations.Prepared, "news", property(lambda p: News((verdict, 0), p.name, p.config, p.dtype)))
    x = torch.randn(7, 5, dtype=torch.float64)
    operations.infer(x, None, *rest)
    with pytest.raises(ArithmeticError, match=r"a compiled layer: Cholesky .* failed at pivot 2"):
        operations.infer(x, None, *rest)


@pytest.mark.parametrize("lives", [True, False])
def test_an_exported_program_raises_as_the_layer_does(lives):
    layer, x = make_layer(12, 5, outer_rank=3), torch.randn(7, 5, dtype=torch.float64)
    layer.adapter.name = "mine"
    with torch.no_grad():
        program = torch.export.export(layer, (x,)).module()
        if not lives:
            program = copy.deepcopy(program)
        dict(program.named_parameters())["adapter.outer"][0, 0] = float("nan")
        with pytest.raises(ArithmeticError, match=("mine" if lives else "a compiled layer") + ": Cholesky .* failed"):
            program(x)


@pytest.fixture
def calls(monkeypatch):
    return count_preparations(monkeypatch)


OPTIONS = [{}, {"path": "merged"}, {"path": "core"}, {"path": "folded"}, {"rotation": "neumann", "outer": "additive"},
           {"backend": "reference"}, {"inner_ratio": 0.05}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_equals_eager(options):
    """float64: sums in another order, 1e-12."""
    net = model(torch.float64, 2, **options)
    function, x = compiled(net), tokens(2, 5)
    for _ in range(2):
        same(gradients(function, net, x), as_copied(net, x), 1e-12)
        for mode in torch.no_grad, torch.inference_mode:
            with mode():
                y = function(x)
            assert_close(mode.__name__, y, value(net, x), 1e-12)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (3, 1, 2), ()], ids=str)
def test_any_number_of_tokens(shape):
    net, x = model(torch.float64, 2), tokens(*shape)
    same(gradients(compiled(net), net, x), as_copied(net, x), 1e-12)


def test_inputs_and_gradients_that_are_not_contiguous():
    net = model(torch.float64)
    function = compiled(lambda v: net(v.mT).mT)
    x = torch.randn(16, 5, dtype=torch.float64, requires_grad=True)
    same(gradients(function, net, x), gradients(lambda v: net(v.mT).mT, net, x), 1e-12)


def through_data(net):
    net[0].adapter.inner_scale.data = net[0].adapter.inner_scale.detach() + 0.3


def one_number_through_data(net):
    net[2].adapter.inner_rotation.data[0] += 0.5


def load(net):
    net.load_state_dict({n: t if n.endswith("basis") else 1.1 * t for n, t in net.state_dict().items()})


def load_assigned(net):
    state = {name: 1.1 * tensor if "adapter.outer" in name else tensor for name, tensor in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def exchange(net):
    net[0].adapter.outer = nn.Parameter(1.1 * net[0].adapter.outer.detach())


def step(net):
    net(tokens(4)).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=1e-3).step()


def edit_weight(net):
    with torch.no_grad():
        net[0].weight.mul_(2)
        net[0].adapter.singular_values.mul_(2)
    net[0].adapter.origin.forget()


EDITS = [in_place, through_data, one_number_through_data, load, load_assigned, exchange, step, edit_weight, merge_ssvdo]


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_never_stale(edit):
    """Each edit follows a training step, an evaluation and an eager forward, whose preparations are kept."""
    net = model(torch.float64, 2)
    function, x = compiled(net), tokens(5)
    for _ in range(2):
        before = gradients(function, net, x)
        with torch.no_grad():
            function(x), net(x)
        edit(net)
        with torch.no_grad():
            assert_close("evaluation", function(x), value(net, x), 1e-12)
        after = gradients(function, net, x)
        same(after, as_copied(net, x), 1e-12)
        same(gradients(net, net, x), as_copied(net, x), 1e-12)
        assert torch.allclose(before[0], after[0]) == (edit is merge_ssvdo)
    unmerge_ssvdo(net)
    same(gradients(function, net, x), as_copied(net, x), 1e-12)


def test_a_merged_layer_is_one_product():
    layer = make_layer(12, 5, outer_rank=3)
    function, x = compiled(layer), torch.randn(4, 5, dtype=torch.float64)
    layer.merge()
    with torch.no_grad():
        assert torch.equal(function(x), nn.functional.linear(x, layer.adapted_weight(), layer.bias))
    assert torch.equal(function(x), nn.functional.linear(x, layer.adapted_weight(), layer.bias))


def test_edits_of_numbers_compile_nothing_anew():
    net, counter = model(torch.float64, 2), CompileCounterWithBackend("aot_eager")
    function, x = torch.compile(net, fullgraph=True, backend=counter), tokens(5)
    for edit in (in_place, through_data, one_number_through_data, load, step, edit_weight):
        gradients(function, net, x)
        edit(net)
    assert counter.frame_count == 1


def test_two_graphs_of_one_model():
    net, x = model(torch.float64, 2), tokens(5)
    one, other = compiled(net), compiled(lambda v: net(net(v)))
    for edit in (lambda net: None, in_place, one_number_through_data):
        edit(net)
        same(gradients(one, net, x), as_copied(net, x), 1e-12)
        same(gradients(other, net, x), gradients(lambda v: net(net(v)), net, x), 1e-11)
        y, z = one(x), other(x)  # both at once
        net.zero_grad()
        (y.square().sum() + z.square().sum()).backward()
        got = [p.grad.clone() for p in net.parameters() if p.requires_grad]
        net.zero_grad()
        (net(x).square().sum() + net(net(x)).square().sum()).backward()
        same(got, [p.grad for p in net.parameters() if p.requires_grad], 1e-11)


@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor_with_changing_sizes(dynamic):
    """float32: some ten products deep, each off by sqrt(48) eps at most."""
    net = model(blocks=2)
    function = torch.compile(net, fullgraph=True, dynamic=dynamic)
    for count in (5, 9, 33, 2, 60):
        x = tokens(count, dtype=torch.float32)
        same(gradients(function, net, x), as_copied(net, x), 100 * torch.finfo(torch.float32).eps)
        with torch.no_grad():
            assert_close("y", function(x), net(x), 100 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("frozen", [("0",), ("0.adapter.outer", "3.adapter.inner_rotation"), ("0", "2", "3", "5", "6")])
def test_frozen_adapters(frozen):
    net = model(torch.float64, 2)
    for name in frozen:
        part = net.get_submodule(name) if name.isdigit() else net.get_parameter(name)
        part.requires_grad_(False)
    function, x = compiled(net), tokens(5)
    for _ in range(2):
        same(gradients(function, net, x), as_copied(net, x), 1e-12)
        in_place(net)
    for p in net.parameters():
        assert p.requires_grad or p.grad is None


def test_thawed_after_compiling():
    plain = nn.Linear(3, 3).requires_grad_(False)
    function, x = torch.compile(plain, backend="aot_eager"), torch.randn(2, 3, requires_grad=True)
    for frozen in (True, False):
        plain.requires_grad_(not frozen)
        function(x).sum().backward()
    if plain.weight.grad is None:
        assert TORCH < (2, 13)
        pytest.skip("this torch compiles nothing anew for parameters that are thawed, those of a plain layer neither")
    net = model(torch.float64, 2)
    net[0].requires_grad_(False)
    function, x = compiled(net), tokens(5)
    gradients(function, net, x)
    for p in net[0].adapter.trained:
        p.requires_grad_(True)
    got = gradients(function, net, x)
    assert net[0].adapter.outer.grad is not None
    same(got, as_copied(net, x), 1e-12)


def test_preparation_is_not_autocast():
    layer = make_layer(12, 5, outer_rank=3, dtype=torch.float32)
    want = prepared(layer)
    layer.refresh()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        operations.infer(torch.randn(3, 5), None, *arguments(layer), layer.adapter.spec, False)
    got = prepared(layer)
    assert got is not want and torch.equal(got.mixer, want.mixer) and torch.equal(got.columns, want.columns)


def test_half_precision_parameters_and_trainable_bias():
    """As in a model wholly cast to bfloat16; the two differ by a few roundings, 2^-8 each."""
    net = model().bfloat16()
    net[0].bias.requires_grad_()
    x = tokens(9, dtype=torch.bfloat16)
    got = gradients(compiled(net), net, x)
    assert net[0].bias.grad is not None
    same(got, gradients(net, net, x), 8 * 2**-8)


def test_autocast():
    """bfloat16 products on both sides: the results differ by rounding of the same size as their own, 2^-8 each."""
    net = model(blocks=2)
    function, x = compiled(net), tokens(9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            same(gradients(function, net, x), as_copied(net, x), 8 * 2**-8)
            with torch.no_grad():
                assert_close("y", function(x), net(x), 8 * 2**-8)
            in_place(net)
        assert function(x).dtype == torch.bfloat16


def test_bfloat16_weights():
    """The adapter's parameters stay float32; 2^-8 a rounding."""
    net = model(torch.bfloat16, 2)
    assert net[0].adapter.outer.dtype == torch.float32
    x = tokens(9, dtype=torch.bfloat16)
    same(gradients(compiled(net), net, x), as_copied(net, x), 8 * 2**-8)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p, count", [(0.5, 64), (0.75, 32), (1.0, 16)])
def test_activation_checkpointing(reentrant, p, count):
    """Left alone, the planner would take the first of these forwards by one form and the second by another."""
    net = model(torch.float64, inner_ratio=p)
    x = tokens(count)
    want = gradients(net, net, x)
    for _ in range(3):
        unmerge_ssvdo(net)  # forgets what it has seen
        same(gradients(lambda v: checkpoint(net, v, use_reentrant=reentrant), net, x), want, 1e-11)


@pytest.mark.parametrize("p, count", [(0.5, 64), (1.0, 16)])
def test_all_forwards_save_alike(p, count):
    """However often: in eager mode the planner takes a form in the end that saves other tensors, of other sizes."""
    net = model(torch.float64, inner_ratio=p)
    function, x = compiled(net), tokens(count)
    want = as_copied(net, x)
    for _ in range(8):
        same(gradients(function, net, x), want, 1e-12)
    for name in "0", "2":
        layer = net[int(name)]
        rest = *arguments(layer), layer.adapter.spec, False
        rows = torch.randn(count, layer.in_features, dtype=torch.float64)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            expected = operations.train(mode.from_tensor(rows), None, *rest)[1].shape
        assert operations.train(rows, None, *rest)[1].shape == expected


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_checkpointing(outside):
    net = model(torch.float64, 2)
    if outside:
        inner = compiled(net)
        function = lambda v: checkpoint(inner, v, use_reentrant=False)  # noqa: E731
    else:
        function = compiled(lambda v: checkpoint(net, v, use_reentrant=False))
    for count in (5, 40):
        x = tokens(count)
        for _ in range(2):
            same(gradients(function, net, x), as_copied(net, x), 1e-11)
            in_place(net)


@pytest.mark.parametrize("inside", ["compiled", "eager"])
def test_gradient_accumulation_beside_compiled_graphs(inside):
    """A compiled forward brings its gradients by itself; what it prepared serves an eager one, gradients and all."""
    net, x = model(torch.float64, 2), tokens(5)
    function = compiled(net)
    want = as_copied(net, x)
    gradients(function, net, x)
    net.zero_grad()
    x.grad = None
    with gradient_accumulation(net):
        y = (function if inside == "compiled" else net)(x)
        y.square().sum().backward()
    same([y.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)], want, 1e-12)


def test_an_eager_step_on_what_a_compiled_one_prepared():
    net, x = model(torch.float64, 2), tokens(5)
    function = compiled(net)
    with torch.inference_mode():
        for _ in range(20):  # builds larger matrices, too
            function(x)
    for run in (net, function, net):
        same(gradients(run, net, x), as_copied(net, x), 1e-12)


# -- export ------------------------------------------------------------------------------------------------------------
def test_a_functional_call_has_parameters_that_no_layer_owns():
    net, x = model(torch.float64), tokens(5)
    other = {n: (1.1 * p.detach()).requires_grad_() for n, p in net.named_parameters() if p.requires_grad}

    def call(v, parameters):
        return torch.func.functional_call(net, parameters, (v,))

    function = compiled(call)
    want = torch.autograd.grad(call(x, other).square().sum(), list(other.values()))
    for _ in range(2):
        same(torch.autograd.grad(function(x, other).square().sum(), list(other.values())), want, 1e-12)
    same(gradients(compiled(net), net, x), as_copied(net, x), 1e-12)


def test_layers_that_share_their_tensors_but_not_the_formula():
    layer = make_layer(12, 5, outer_rank=3)
    other = SSVDOLinear(layer.weight, layer.bias, layer.adapter.factors, layer.adapter.shape,
                        replace(layer.adapter.config, rotation="neumann"))  # fmt: skip
    for name in PARAMETER_NAMES + FACTOR_NAMES:
        setattr(other.adapter, name, getattr(layer.adapter, name))
    x = torch.randn(4, 5, dtype=torch.float64)
    function = compiled(lambda v: (layer(v), other(v)))
    with torch.no_grad():
        for _ in range(2):
            for got, one in zip(function(x), (layer, other), strict=True):
                assert_close("y", got, value(one, x), 1e-12)


def test_layers_that_share_a_trained_parameter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).double()
    apply_ssvdo(net, SSVDOConfig(outer_rank=0, target_modules=("0", "1")))
    for layer in net:
        randomise(layer)
    net[1].adapter.inner_scale = net[0].adapter.inner_scale
    x = tokens(4)
    for _ in range(2):
        same(gradients(compiled(net), net, x), gradients(net, net, x), 1e-12)


def test_export():
    net, x = model(torch.float64, 2), tokens(5).detach()
    exported = torch.export.export(net, (x,)).module()
    assert_close("exported", exported(x), net(x), 1e-12)
    in_place(net)  # the program holds the model's own tensors
    assert_close("edited", exported(x), net(x), 1e-12)


@pytest.mark.parametrize("merged", [False, True])
def test_a_saved_program_runs_where_no_layer_lives(merged, calls):
    net, x = model(torch.float64, 2), tokens(5).detach()
    if merged:
        merge_ssvdo(net)
    with torch.no_grad():
        want, count = net(x), len(list(hosts(net)))
        file = io.BytesIO()
        torch.export.save(torch.export.export(net, (x,)), file)
    del net
    gc.collect()
    file.seek(0)
    loaded = torch.export.load(file).module()
    clear(calls)
    for _ in range(2):
        assert_close("loaded", loaded(x), want, 1e-12)
    assert calls["forward"] == [1] * 2 * count  # nobody keeps them
    with torch.no_grad():
        for name, p in loaded.named_parameters():
            if name.endswith("inner_scale"):
                p.add_(0.5)
    assert not torch.allclose(loaded(x), want)


# -- how often ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_decoding_prepares_once(calls, mode):
    net = model(blocks=3)
    function = compiled(net)
    with mode():
        for _ in range(5):
            function(tokens(1, 1, dtype=torch.float32))
        assert sorted(calls["forward"]) == sorted(in_groups(3)) and calls["backward"] == []
        in_place(net)
        for _ in range(5):
            function(tokens(1, 1, dtype=torch.float32))
    assert sorted(calls["forward"]) == sorted([*in_groups(3), 1])  # the layer that changed


def test_graphs_and_eager_forwards_share_one_preparation(calls):
    net, x = model(torch.float64, 3), tokens(4)
    for function in (compiled(net), compiled(lambda v: net(net(v))), net):
        gradients(function, net, x)
    assert sorted(calls["forward"]) == sorted(in_groups(3))


def test_models_do_not_disturb_one_another(calls):
    """Copies and models of the same shapes have parameters of their own."""
    nets = [model(torch.float64, 2)]
    nets += [copy.deepcopy(nets[0]), model(torch.float64, 2)]
    functions, x = [compiled(net) for net in nets], tokens(4)
    for _ in range(2):
        for net, function in zip(nets, functions, strict=True):
            same(gradients(function, net, x), gradients(net, net, x), 1e-12)
    assert sum(calls["forward"]) == 3 * 5
    in_place(nets[1])
    for net, function in zip(nets, functions, strict=True):
        same(gradients(function, net, x), as_copied(net, x), 1e-12)


# -- errors and other engines ------------------------------------------------------------------------------------------
def test_errors_name_the_layer():
    net, x = model(torch.float64, 2), tokens(4)
    function = compiled(net)
    function(x)
    one, other = net[2].adapter, net[5].adapter
    one.inner_scale, other.inner_scale = other.inner_scale, one.inner_scale  # by which an operation knows its layer
    function(x)
    with torch.no_grad():
        one.outer[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match=r"^2: .* failed at pivot 1 with tau=0.01"):
        function(x)


def test_interpreted_kernels_serve_compiled_layers():
    require_triton()
    if torch.cuda.is_available():
        pytest.skip("interprets; tests/gpu has the compiled kernels")
    net, x = model(torch.float64, backend="triton"), tokens(5)
    same(gradients(compiled(net), net, x), gradients(net, net, x), 1e-12)
