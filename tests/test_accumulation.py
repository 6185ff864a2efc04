"""gradient_accumulation gives the gradients of the same code without it, whatever happens inside, or says why not."""

import contextlib
import copy
import itertools

import pytest
import torch
from helpers import assert_close, randomise_all
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, accumulation, apply_ssvdo, gradient_accumulation
from ssvdo_kernels.ops import products

X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
INSIDE = "inside gradient_accumulation"


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8), nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)]
    model = nn.Sequential(*layers).double()
    apply_ssvdo(model, SSVDOConfig(target_modules="all-linear", outer_rank=3))
    return randomise_all(model)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def back(model, x=X, **options):
    model(x).square().sum().backward(**options)


def agree(model, plain):
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert_close(name, p.grad, q.grad, 1e-11)


def both(run):
    """Runs run(model, context), within the context and without."""
    model = net()
    plain = copy.deepcopy(model)
    run(model, gradient_accumulation)
    run(plain, lambda _: contextlib.nullcontext())
    agree(model, plain)


def backward_later(model, context):
    with context(model):
        loss = model(X).square().sum()
    loss.backward()


def backward_in_the_next(model, context):
    with context(model):
        back(model)
        loss = model(X[:3]).square().sum()
    with context(model):
        back(model, X[:2])
        loss.backward()


def twice(model, context):
    with context(model):
        loss = model(X).square().sum()
        loss.backward(retain_graph=True)
    loss.backward()


def checkpointed(model, context):
    with context(model):
        loss = checkpoint(model, X, use_reentrant=False).square().sum()
    loss.backward()


def checkpointed_reentrant(model, context):
    with context(model):
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=True).square().sum().backward()


def inputs(model, context):
    with context(model):
        back(model, inputs=trained(model))


def inputs_of_a_layer(model, context):
    with context(model):
        back(model, inputs=trained(model[3]))


def of_x_alone(model, context):
    with context(model):
        x = X.clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        back(model)


def zeroed(model, context):
    back(model)
    with context(model):
        back(model)
        model.zero_grad()
        back(model, X[:3])


def zeroed_at_the_end(model, context):
    with context(model):
        back(model)
        model.zero_grad()


def penalised(model, context):
    """Gradients that come to the parameters by another way."""
    for _ in range(2):
        with context(model):
            for x in (X, X[:3]):
                (model(x).square().sum() + sum(p.square().sum() for p in trained(model))).backward()


def shared_and_zeroed(model, context):
    """Two layers of one trained parameter."""
    model[3].adapter.outer = model[0].adapter.outer
    back(model)
    with context(model):
        back(model)
    with context(model):
        back(model)
        model.zero_grad()
        for x in (X, X[:3]):
            back(model, x)


def thawed_for_a_while(model, context):
    for p in trained(model[0].adapter):
        p.requires_grad_(False)
    with context(model):
        back(model)
        for p in model[0].adapter.trained:
            p.requires_grad_()
        back(model, X[:3])


def without_gradients_around(model, context):
    with torch.no_grad(), context(model), torch.enable_grad():
        back(model)


def inference_around(model, context):
    with torch.inference_mode(), context(model), torch.inference_mode(False), torch.enable_grad():
        back(model, X.clone())


def left_by_a_generator(model, context):
    def losses():
        with context(model):
            for x in (X, X[:3]):
                yield model(x).square().sum()

    found = losses()
    next(found).backward()
    found.close()


def hooked(model, context):
    """A hook that cannot do without a gradient."""
    seen = []
    model[0].adapter.outer.register_hook(lambda g: seen.append(g.norm()))
    model[2].adapter.outer.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
    with context(model):
        back(model)
    assert len(seen) == 2


@pytest.mark.parametrize("run", [
    backward_later, backward_in_the_next, twice, checkpointed, checkpointed_reentrant, inputs, inputs_of_a_layer,
    of_x_alone, zeroed, zeroed_at_the_end, penalised, shared_and_zeroed, thawed_for_a_while, without_gradients_around,
    inference_around, left_by_a_generator, hooked], ids=lambda f: f.__name__)  # fmt: skip
def test_the_gradients_are_those_without_the_context(run):
    both(run)


def some_inputs(model):
    back(model, inputs=[model[0].adapter.outer])


def taken_away(model):
    torch.autograd.grad(model(X).square().sum(), trained(model), allow_unused=True)


def clipped(model):
    back(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def unscaled(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimiser = torch.optim.SGD(trained(model), 0.1)
    back(model)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimiser)


def zeroed_in_place(model):
    back(model)
    model.zero_grad(set_to_none=False)


def zeroed_in_part(model):
    back(model)
    torch.optim.SGD([layer.adapter.outer for layer in (model[0], model[2])], 0.1).zero_grad()


def frozen(model):
    back(model)
    model[2].adapter.outer.requires_grad_(False)


def frozen_between(model):
    back(model)
    model[2].adapter.requires_grad_(False)
    model[2].adapter.outer.requires_grad_(True)
    back(model)


def forgotten(model):
    back(model)
    model[2].unmerge()
    back(model)


def edited(model):
    back(model)
    with torch.no_grad():
        model[0].adapter.outer.add_(0.1)


def twice_differentiated(model):
    back(model, create_graph=True)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("run, says", [
    (some_inputs, INSIDE), (taken_away, INSIDE), (clipped, "reads or writes .grad"), (unscaled, "0: .*unscale_"),
    (zeroed_in_place, "reads or writes .grad"), (zeroed_in_part, ".grad of some parameters was replaced"),
    (frozen, "requires_grad changed"), (frozen_between, "requires_grad changed"),
    (forgotten, "prepared anew: refresh, unmerge"), (edited, "`outer` was changed in place"),
    (twice_differentiated, "create_graph=True")])  # fmt: skip
def test_what_would_be_wrong_is_an_error_that_changes_nothing(run, says, before):
    model = net()
    if before:
        back(model)
    kept = [(p.grad, None if p.grad is None else p.grad.clone()) for p in trained(model)]
    own = trained(model)
    with pytest.raises(RuntimeError, match=says), gradient_accumulation(model):
        run(model)
    for p, (grad, value) in zip(own, kept, strict=True):
        if p.grad is not None or run is not zeroed_in_part:
            assert p.grad is grad and (grad is None or torch.equal(grad, value))
    with gradient_accumulation(model):
        pass


@pytest.mark.parametrize("path", ["folded", "merged"])
def test_a_gradient_is_added_to_its_sum_by_the_product_that_makes_it(monkeypatch, path):
    """Without a launch of its own; on another stream than the sum's it comes through the graph."""
    config = SSVDOConfig(inner_ratio=0.25, outer_rank=3, path=path, backend="reference")
    layer = SSVDOLinear.from_linear(nn.Linear(24, 8).double(), config)
    other, into, real = copy.deepcopy(layer), [], products.over_tokens

    def run(model):
        into.clear()
        with gradient_accumulation(model):
            for x in X.repeat(1, 3).split(2):
                back(model, x)
        return [total is not None for total in into]

    monkeypatch.setattr(products, "over_tokens", lambda a, b, total=None: into.append(total) or real(a, b, total))
    kinds = 1 if path == "merged" else 2
    assert run(layer) == [False] * kinds + [True] * 2 * kinds
    streams = itertools.count()
    monkeypatch.setattr(accumulation, "current", lambda _: next(streams))
    assert run(other) == [False] * 3 * kinds
    agree(layer, other)


def test_what_outlives_the_context_under_hooks_is_an_error():
    model = net()
    for p in trained(model):
        p.register_hook(lambda g: g * 2)
    with gradient_accumulation(model):
        loss = model(X).sum()
    with pytest.raises(RuntimeError, match="outlived it"):
        loss.backward()


def test_a_wrapped_adapter_is_opened_once():
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = net()
    plain = copy.deepcopy(model)
    model[0].adapter = wrapper.checkpoint_wrapper(model[0].adapter)
    with gradient_accumulation(model):
        back(model)
    back(plain)
    for p, q in zip(trained(model), trained(plain), strict=True):
        assert_close("grad", p.grad, q.grad, 1e-11)


def test_a_module_is_what_it_takes():
    with pytest.raises(TypeError, match="module is a NoneType; allowed"), gradient_accumulation(None):
        pass
