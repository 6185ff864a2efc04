"""In the capture of a CUDA graph layers of one shape are prepared together once, and nothing of it is used outside.

There is no GPU here: a capture is what `capturing` and `capture` say it is, and parameters are known by their stamps,
as on a GPU. The real thing: gpu/test_gpu_graphs.py.
"""

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from groups import agree, clear, nets, train
from helpers import assert_close, count_preparations
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import adapter, cache
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import compiled, host

if not host.available():
    pytest.skip("the compiled core was not built", allow_module_level=True)


def x_of(count=5):
    return torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def capture(monkeypatch):
    """capture(number): a context in which the graph of that number is being captured."""
    now = [0]
    for module in (cache, adapter):
        monkeypatch.setattr(module, "capturing", lambda _: now[0] > 0)
    monkeypatch.setattr(cache, "capture", lambda _: now[0])
    monkeypatch.setattr(cache, "_on_cpu", lambda _: False)

    @contextmanager
    def capturing(number):
        now[0] = number
        try:
            yield
        finally:
            now[0] = 0

    yield capturing
    cache.Capture.over()
    cache.Capture._parts = False


@pytest.fixture
def calls(monkeypatch):
    """How many layers each preparation, and each way back, was for."""
    return count_preparations(monkeypatch)


def test_one_batch_each_way_a_capture(capture, calls):
    net, alone = nets()
    train(net, x_of())  # the warm-up
    net.zero_grad()
    clear(calls)
    with capture(1):
        train(net, x_of())
        train(net, x_of(3))  # a second micro-batch
    assert calls == {"forward": [4, 4], "backward": [4, 4, 4, 4]}
    for count in (5, 3):
        train(alone, x_of(count))
    agree(net, alone)


def test_without_gradients(capture, calls):
    net, alone = nets()
    with capture(1), torch.no_grad():
        y = net(x_of())
        again = net(x_of())
    assert calls["forward"] == [4, 4]
    assert_close("y", y, alone(x_of()), 1e-12)
    assert torch.equal(y, again)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_takes_what_the_first_has_prepared(capture, calls, reentrant):
    net, alone = nets()
    x = x_of().requires_grad_()
    with capture(1):
        y = x
        for block in net.blocks:
            y = y + checkpoint(block, y, use_reentrant=reentrant)
        y.square().sum().backward()
    assert calls["forward"] == [4, 4]
    assert calls["backward"] == ([1] * 8 if reentrant else [4, 4])  # each block's is a backward of its own
    train(alone, x_of())
    agree(net, alone)


@pytest.mark.parametrize("write", ["step", "edit"])
def test_what_is_written_in_the_capture_is_prepared_anew(capture, calls, write):
    net, alone = nets()
    results = []
    for model in net, alone:
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with capture(1) if model is net else capture(0):
            train(model, x_of())
            if write == "step":
                optimiser.step()
            else:
                with torch.no_grad():
                    model.blocks[1][0].adapter.outer.add_(0.1)
            optimiser.zero_grad()
            train(model, x_of(3))
            results.append(model(x_of(3)))
        if model is net:
            assert calls["forward"] == [4, 4, 4, 4] if write == "step" else [4, 4, 1]
    agree(net, alone)
    assert_close("y", *results, 1e-11)


def test_each_graph_prepares_for_itself_and_eager_layers_afresh(capture, calls):
    net, _ = nets()
    train(net, x_of())
    kept = [layer.adapter.cache._kept.prepared for _, layer in hosts(net)]
    for number in (1, 2):
        clear(calls)
        with capture(number):
            net(x_of())
        assert calls["forward"] == [4, 4]
    assert [layer.adapter.cache._kept.prepared for _, layer in hosts(net)] == kept  # eager code sees its own
    clear(calls)
    with torch.no_grad():
        for _, layer in hosts(net):
            for p in layer.adapter.trained:
                p.data.add_(0.1)  # as a replay does: no stamp changes
    fresh = copy.deepcopy(net)
    assert_close("y", net(x_of()), fresh(x_of()), 1e-12)
    assert calls["forward"] == [1] * 16  # none believes what it was given ahead of time


def test_nothing_of_a_capture_is_held_after_it(capture):
    net, _ = nets()
    with capture(1):
        net(x_of()).sum().backward()
        made = [weakref.ref(kept.prepared) for each in cache.Capture._now._kept.values() for kept in each.values()]
    assert len(made) == 8 and all(one() is not None for one in made)
    gc.disable()  # no cycle keeps them either
    try:
        net(x_of())
        assert [one for one in made if one() is not None] == []
        with capture(2):
            net(x_of())
        made = [weakref.ref(kept.prepared) for each in cache.Capture._now._kept.values() for kept in each.values()]
        with capture(3):
            net.blocks[0](x_of())
        assert [one for one in made if one() is not None] == []
    finally:
        gc.enable()


def test_skipped_and_frozen_layers(capture, calls):
    net, alone = nets()
    for model in net, alone:
        model.blocks[0][0].requires_grad_(False)
        model.blocks[2][0].adapter.inner_rotation.requires_grad_(False)
        with capture(1) if model is net else capture(0):
            train(model, x_of(), skip=(1,))
        if model is net:
            assert calls == {"forward": [4, 4], "backward": [2, 3]}
    agree(net, alone)
    assert net.blocks[1][0].adapter.outer.grad is None


def test_captures_of_parts_prepare_layer_by_layer(capture, calls):
    """As make_graphed_callables does: each block's forward is a graph, then each one's backward, in reverse order."""
    net, alone = nets()
    inputs, outputs, sizes = [], [x_of()], []
    for number, block in enumerate(net.blocks, 1):
        clear(calls)
        with capture(number):
            inputs.append(outputs[-1].detach().requires_grad_())
            outputs.append(block(inputs[-1]))
        sizes.append(list(calls["forward"]))
    assert sizes == [[4, 4], [1, 1], [1, 1], [1, 1]]  # the first one's is the price of not knowing
    clear(calls)
    dy = 2 * outputs[-1].detach()
    for number in range(4, 0, -1):
        own = [p for p in net.blocks[number - 1].parameters() if p.requires_grad]
        with capture(9 - number):
            dy, *gradients = torch.autograd.grad(outputs[number], (inputs[number - 1], *own), dy)
        for p, g in zip(own, gradients, strict=True):
            p.grad = g
    assert calls == {"forward": [], "backward": [1] * 8}
    x = x_of()
    for block in alone.blocks:
        x = block(x)
    x.square().sum().backward()
    agree(net, alone)
    for number, want in ((9, [1] * 8), (10, [4, 4])):  # of the whole model: the first one finds out
        clear(calls)
        with capture(number):
            net(x_of())
        assert calls["forward"] == want


def test_a_quantised_base_prepares_alone(capture, calls, monkeypatch):
    net, alone = nets()
    base = type(net.blocks[0][0].base())
    monkeypatch.setattr(base, "held", False)  # as one that is dense in pieces alone
    with capture(1):
        train(net, x_of())
    assert calls["forward"] == [1] * 8
    monkeypatch.undo()
    train(alone, x_of())
    agree(net, alone)


def test_another_stream_of_the_capture_prepares_for_itself(capture, calls, monkeypatch):
    """No event orders two streams of a capture for us."""
    net, _ = nets()
    with capture(1):
        for stream in (1, 2, 1, 2):
            monkeypatch.setattr(cache, "current", lambda _, at=stream: at)
            net.blocks[0](x_of())
    assert calls["forward"] == [4, 4, 4, 4]


@pytest.mark.parametrize("tagged", [True, False])
def test_compiled_layers(capture, calls, monkeypatch, tagged):
    """As eager ones, where torch.compile keeps its own graphs away from the operations. Else it accounts for all that
    lies in its graphs' memory, and nothing is held for the capture; the way back reads what the forward prepared."""
    monkeypatch.setattr(compiled, "_UNSAFE", compiled._UNSAFE if tagged else None)
    if tagged and compiled._UNSAFE is None:
        pytest.skip("torch before 2.9 has no tag for it")
    torch._dynamo.reset()
    net, alone = nets()
    function = torch.compile(net, backend="aot_eager", fullgraph=True)
    train(function, x_of())  # the warm-up
    for number in (1, 2):
        for model in net, alone:
            model.zero_grad()
            with torch.no_grad():
                for _, layer in hosts(model):
                    layer.adapter.inner_scale.add_(0.1)
        clear(calls)
        with capture(number):
            train(function, x_of())
            train(function, x_of(5))  # a second micro-batch
        assert calls["forward"] == ([4, 4] if tagged else [1] * 16)
        assert calls["backward"] == ([4] * 4 if tagged else [1] * 16)
        assert (cache.Capture._now is not None) == tagged
        for _ in range(2):
            train(alone, x_of())
        agree(net, alone)


@pytest.mark.parametrize("grad", [False, True])
def test_matrices_of_the_size_of_w0_are_for_one_forward_where_no_gradient_needs_them(capture, grad):
    net, alone = nets()
    for _, layer in hosts(net):
        layer.merge()
    with capture(1), torch.set_grad_enabled(grad):
        y = net(x_of())
        kept = [each for made in cache.Capture._now._kept.values() for each in made.values()]
    assert [("merged", torch.float64) in each.prepared.kept for each in kept] == [grad] * 8
    assert_close("y", y, alone(x_of()), 1e-12)


def test_refresh_reaches_a_capture(capture, calls):
    net, _ = nets()
    with capture(1):
        net(x_of())
        net.blocks[2][0].refresh()
        net(x_of())
    assert calls["forward"] == [4, 4, 1]


def test_a_captured_step_alone_leaves_no_layer_stale(capture, monkeypatch):
    """Forward and backward outside of the graph: a replay of the optimiser's changes parameters without a trace."""
    net, _ = nets()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained[:6], lr=1e-2)  # of the first block alone
    train(net, x_of())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimiser.step()
    net(x_of())
    with torch.no_grad():
        for p in trained[:6]:
            p.data.add_(0.1)
    assert_close("y", net(x_of()), copy.deepcopy(net)(x_of()), 1e-12)
    others = [layer.adapter.cache._kept.prepared for _, layer in list(hosts(net))[2:]]
    net(x_of())
    assert [layer.adapter.cache._kept.prepared for _, layer in list(hosts(net))[2:]] == others
