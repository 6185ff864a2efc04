"""Derivatives beyond one backward, compiled transforms, and modes that run an operation again: right, or an error."""

import copy
from functools import partial

import pytest
import torch
from groups import agree
from helpers import TORCH, assert_close, make_layer, randomise_all
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, gradient_accumulation
from ssvdo_kernels.adapter import PARAMETER_NAMES

X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
T = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ATEN = torch.ops.aten


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def layer():
    return make_layer(24, 8, outer_rank=3)


def energy(layer):
    return lambda x: layer(x).square().sum()


SECOND = {
    "of x": lambda f: torch.autograd.grad(f(x := X.clone().requires_grad_()).sum(), x, create_graph=True),
    "jvp": lambda f: torch.autograd.functional.jvp(f, X, T),
    "hessian": lambda f: torch.autograd.functional.hessian(energy(f), X[0]),
    "hvp": lambda f: torch.autograd.functional.hvp(energy(f), X[0], T[0]),
    "of the weight": lambda f: torch.autograd.grad(f.adapter.dense(f.base()).sum(), f.adapter.trained,
                                                   create_graph=True),
}  # fmt: skip


@pytest.mark.parametrize("case", SECOND)
def test_a_gradient_of_a_gradient_is_an_error_and_torch_func_has_it(layer, case):
    with pytest.raises(RuntimeError, match=r"create_graph=True .* allowed: torch.func"):
        SECOND[case](layer)
    W = layer.adapted_weight().detach()
    assert_close("hessian", torch.func.hessian(energy(layer))(X[0]), 2 * W.mT @ W, 1e-12)
    assert_close("jvp", torch.func.jvp(layer, (X,), (T,))[1], T @ W.mT, 1e-12)
    layer(X).sum().backward()  # and the layer still trains


def vectorised(layer):
    return torch.autograd.functional.jacobian(layer, X[0], vectorize=True)


def batched(layer):
    return torch.autograd.grad(layer(X), layer.adapter.trained, torch.randn(3, 6, 24).double(), is_grads_batched=True)


def mapped(layer):
    y = layer(X)
    return torch.vmap(lambda v: torch.autograd.grad(y, layer.adapter.trained, v)[0])(torch.randn(3, 6, 24).double())


@pytest.mark.parametrize("call", [vectorised, batched, mapped])
def test_a_batch_of_gradients_is_an_error_and_torch_func_has_it(layer, call):
    with pytest.raises(RuntimeError, match=r"batch of gradients at once .* allowed: torch.func"):
        call(layer)
    assert_close("jacobian", torch.func.jacrev(layer)(X[0]), layer.adapted_weight(), 1e-12)


TRANSFORMS = {
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (T,))[1],
    "jacfwd": lambda f: lambda x: torch.func.jacfwd(f)(x[0]),
    "jacrev": lambda f: lambda x: torch.func.jacrev(f)(x[0]),
    "grad": lambda f: torch.func.grad(energy(f)),
    "hessian": lambda f: lambda x: torch.func.hessian(energy(f))(x[0]),
    "vmap": lambda f: torch.vmap(lambda x: f(x)),  # named: Dynamo of torch 2.6 has no repr of a module
    "per sample": lambda f: torch.vmap(torch.func.grad(energy(f))),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_compiled_transform_is_that_of_the_layer(layer, name, backend):
    plain = nn.functional.linear
    W, b = layer.adapted_weight().detach(), layer.bias.detach()
    want = TRANSFORMS[name](lambda x: plain(x, W, b))(X)
    got = torch.compile(TRANSFORMS[name](layer), backend=backend, fullgraph=True)(X)
    assert float(want.abs().max()) > 0.1
    assert_close(name, got, want, 1e-12)


@pytest.mark.parametrize("name", ["jvp", "grad", "dual"])
def test_a_transform_of_a_compiled_layer(layer, name):
    compiled = torch.compile(layer, backend="eager")
    compiled(X)
    W = layer.adapted_weight().detach()
    if name == "dual":
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(compiled(forward_ad.make_dual(X, T))).tangent
        assert_close("dual", got, T @ W.mT, 1e-12)
    elif name == "jvp":
        assert_close("jvp", torch.func.jvp(compiled, (X,), (T,))[1], T @ W.mT, 1e-12)
    else:
        assert_close("grad", torch.func.grad(energy(compiled))(X), 2 * layer(X) @ W, 1e-12)


def test_an_exported_layer_has_no_tangents_and_says_so(layer):
    program = torch.export.export(layer, (X,)).module()
    with pytest.raises(RuntimeError, match=r"forward-mode differentiation .* exported"):
        torch.func.jvp(program, (X,), (T,))
    assert_close("y", program(X), layer(X), 1e-12)


def test_what_was_exported_without_gradients_says_so_where_it_is_trained(layer):
    with torch.no_grad():
        program = torch.export.export(layer, (X,)).module()
    with pytest.raises(RuntimeError, match="exported without gradients"):
        program(X).sum().backward()


@pytest.mark.parametrize("wide", [False, True])
def test_torch_func_is_as_exact_under_autocast_as_the_layer(wide):
    m, n = (48, 96) if wide else (96, 48)
    layer = make_layer(m, n, outer_rank=3, dtype=torch.float32)
    x, cotangent = torch.randn(64, n), torch.randn(64, m)
    trained = {f"adapter.{name}": getattr(layer.adapter, name).detach() for name in PARAMETER_NAMES}

    def loss(parameters, x):
        return (torch.func.functional_call(layer, parameters, (x,)).float() * cotangent).sum()

    exact = torch.func.grad(loss)(trained, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.vmap(layer)(x).dtype == torch.bfloat16
        found = torch.func.grad(loss)(trained, x)
    for name, want in exact.items():
        assert_close(name, found[name], want, 4 * 2**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_func_takes_parameters_of_half_precision(dtype):
    layer = make_layer(24, 8, outer_rank=3, dtype=dtype)
    with torch.no_grad():
        for p in layer.adapter.trained:
            p.data = p.data.to(dtype)
    y = torch.vmap(layer)(X.to(dtype))
    assert y.dtype == dtype
    assert_close("y", y.float(), layer(X.to(dtype)).float(), 8 * torch.finfo(dtype).eps)


def test_torch_func_sees_an_edited_base_weight(layer):
    layer(X)
    with torch.no_grad():
        layer.weight.mul_(2)
    for call in (torch.vmap(layer), lambda x: torch.func.jvp(layer, (x,), (x,)), torch.func.jacrev(layer)):
        with pytest.raises(RuntimeError, match="layer: weight is no longer the one that was factorised"):
            call(X)


def test_torch_func_names_the_layer_of_bad_numbers(layer):
    with torch.no_grad():
        layer.adapter.outer[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match=r"^layer: .*cholesky.*use a larger tau"):
        torch.vmap(layer)(X)


def test_an_ensemble():
    """Every tensor is of a stack, the base weights too."""
    layers = [make_layer(24, 8, outer_rank=3, seed=s).requires_grad_(False) for s in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    call = torch.vmap(lambda p, b, x: torch.func.functional_call(layers[0], (p, b), (x,)), (0, 0, None))
    for got, one in zip(call(parameters, buffers, X), layers, strict=True):
        assert_close("y", got, one(X), 1e-12)


# -- operations that are run again, or recorded ------------------------------------------------------------------------
def net(square=False):
    torch.manual_seed(0)
    h, rank = (8, 0) if square else (24, 3)
    layers = [layer for _ in range(2) for layer in (nn.Linear(8, h), nn.Tanh(), nn.Linear(h, 8))]
    model = nn.Sequential(*layers).double()
    apply_ssvdo(model, SSVDOConfig(target_modules="all-linear", outer_rank=rank))
    return randomise_all(model)


def saving(*operations):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in operations else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


@pytest.mark.parametrize("prepared", ["no", "without gradients", "yes"])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("operations", [(ATEN.mm.default,), (ATEN.addmm.default,), (ATEN.tanh.default,),
                                        (ATEN.mm.default, ATEN.addmm.default)], ids=str)  # fmt: skip
@pytest.mark.parametrize("accumulate", [False, True])
def test_selective_checkpointing(operations, square, prepared, accumulate):
    model, plain = net(square), net(square)
    if prepared != "no":
        with torch.set_grad_enabled(prepared == "yes"):
            model(X)
    plain(X).square().sum().backward()

    def train():
        checkpoint(model, X, use_reentrant=False, context_fn=saving(*operations)).square().sum().backward()

    if accumulate:
        with gradient_accumulation(model):
            train()
    else:
        train()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            assert_close(name, p.grad, q.grad, 1e-11)


def test_selective_checkpointing_of_the_weight(layer):
    other = make_layer(24, 8, outer_rank=3)
    weight = lambda x: nn.functional.linear(x, layer.adapter.dense(layer.base()))  # noqa: E731
    y = checkpoint(weight, X, use_reentrant=False, context_fn=saving(ATEN.mm.default))
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()
    (nn.functional.linear(X, other.adapter.dense(other.base())) * cotangent).sum().backward()
    agree(layer, other, 1e-11)


def test_a_graph_of_operations_holds_the_layer_as_one(layer):
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(lambda x: layer(x))(X)
    assert_close("y", traced(T), layer(T), 1e-12)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=pytest.mark.skipif(
    TORCH < (2, 7), reason="compiled autograd of torch 2.6 takes no gradient that is left out"))])  # fmt: skip
def test_compiled_autograd(grouped, inside):
    model, plain = net(), net()
    model = model if grouped else copy.deepcopy(model)

    def train():
        for x in (X, X[:3]):
            loss = model(x).square().sum()
            with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
                loss.backward()

    if inside:
        with gradient_accumulation(model):
            train()
    else:
        train()
    for x in (X, X[:3]):
        plain(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if p.requires_grad:
            assert_close(name, p.grad, q.grad, 1e-11)
