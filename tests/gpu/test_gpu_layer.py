"""The layer on a GPU against the float64 reference; skipped, with the reason, where there is none."""

import pytest
import torch
from helpers import assert_close, assert_right, count_preparations, make_layer
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, gradient_accumulation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
# float32 products may run in tf32 only where the user says so; bf16 operands are rounded about ten products deep
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 8 * 2**-10, torch.bfloat16: 8 * 2**-7}


@pytest.mark.parametrize("backend, path", [
    ("reference", "auto"), ("reference", "factored"), ("reference", "folded"), ("reference", "core"),
    ("reference", "merged"), ("triton", "folded"), ("triton", "merged"), ("auto", "auto")])  # fmt: skip
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m, n, p", [(256, 64, 0.5), (64, 256, 0.5), (250, 63, 0.5), (600, 300, 1.0)])
def test_output_and_gradients(m, n, p, dtype, backend, path):
    options = {"outer_rank": 16, "path": path, "backend": backend, "inner_ratio": p}
    layer = make_layer(m, n, dtype=dtype, device="cuda", spread=0.05, **options)
    assert_right(layer, 33, TOLERANCE[dtype])


def test_never_stale_and_moves_between_devices():
    layer = make_layer(64, 16, outer_rank=4)
    x = torch.randn(5, 16, dtype=torch.float64)
    before = layer(x)
    layer.cuda()
    assert_close("moved", layer(x.cuda()), before.cuda(), 1e-11)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x.cuda()).square().sum().backward()
    optimiser.step()
    moved = layer(x.cuda())
    assert_close("and back", layer.cpu()(x), moved.cpu(), 1e-11)
    assert not torch.allclose(moved.cpu(), before)


def test_gradient_accumulation():
    plain, once = (make_layer(64, 16, outer_rank=4, device="cuda") for _ in range(2))
    x = torch.randn(5, 16, dtype=torch.float64, device="cuda")
    plain(x).sum().backward()
    with gradient_accumulation(once):
        once(x).sum().backward()
    for a, b in zip(once.adapter.trained, plain.adapter.trained, strict=True):
        assert_close("grad", a.grad, b.grad, 1e-11)


def model(**options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).cuda().bfloat16()
    apply_ssvdo(net, SSVDOConfig(target_modules="all-linear", outer_rank=16, init_angle=0.1, **options))
    return net


def gradients(function, net, x):
    net.zero_grad()
    x.grad = None
    y = function(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)]


def tokens(count):
    return torch.randn(count, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("path", ["auto", "merged"])
def test_compile(path):
    net = model(path=path)
    compiled = torch.compile(net, fullgraph=True)
    for count in (33, 70):
        x = tokens(count)
        for a, b in zip(gradients(compiled, net, x), gradients(net, net, x), strict=True):
            assert_close("compiled", a, b, TOLERANCE[torch.bfloat16])


def test_compiled_training_prepares_once_a_step(monkeypatch):
    """And sees each step, which the optimiser writes in place."""
    net = model()
    compiled, calls = torch.compile(net, fullgraph=True), count_preparations(monkeypatch)
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        calls["forward"].clear()
        x = tokens(33)
        got = gradients(compiled, net, x)
        assert sum(calls["forward"]) == 2
        for a, b in zip(got, gradients(net, net, x), strict=True):
            assert_close("compiled", a, b, TOLERANCE[torch.bfloat16])
        assert sum(calls["forward"]) == 2  # the eager forward took what the compiled one had prepared
        optimiser.step()


def test_an_edit_before_the_backward_is_an_error():
    layer = make_layer(64, 16, outer_rank=4, device="cuda")
    y = layer(torch.randn(5, 16, dtype=torch.float64, device="cuda"))
    with torch.no_grad():
        layer.adapter.outer.add_(0.1)
    with pytest.raises(RuntimeError, match="`outer` was changed in place"):
        y.sum().backward()


def test_checkpointing():
    net, x = model(), tokens(200)
    want = gradients(net, net, x)
    got = gradients(lambda v: checkpoint(net, v, use_reentrant=False), net, x)
    for a, b in zip(got, want, strict=True):
        assert_close("checkpointed", a, b, TOLERANCE[torch.bfloat16])


def test_autocast_is_linears():
    net = model().float()
    x = torch.randn(9, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert net(x).dtype == torch.nn.functional.linear(x, net[0].weight).dtype == torch.bfloat16


@pytest.mark.parametrize("path", ["auto", "merged"])
def test_graph_capture_follows_the_parameters(path):
    """A replay must see parameters that changed after the capture."""
    net, x = model(path=path), tokens(33).detach().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(net, net, x)
    torch.cuda.current_stream().wait_stream(side)
    trained = [p for p in net.parameters() if p.requires_grad]
    net.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)
        y.float().square().sum().backward()
    grads = [p.grad for p in trained]
    with torch.no_grad():
        for p in trained:
            p.add_(0.05 * torch.randn_like(p))
    for g in (*grads, x.grad):
        g.zero_()
    graph.replay()
    replayed = [y.clone(), x.grad.clone(), *(g.clone() for g in grads)]
    for a, b in zip(replayed, gradients(net, net, x), strict=True):
        assert_close("replayed", a, b, TOLERANCE[torch.bfloat16])


def test_deterministic():
    net, x = model(), tokens(5000)
    first, second = gradients(net, net, x), gradients(net, net, x)
    assert all(map(torch.equal, first, second))


def test_no_waiting_for_the_device():
    net, x = model(), tokens(33)
    gradients(net, net, x)
    with torch.no_grad():
        net[0].adapter.outer.add_(0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(x).float().square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
