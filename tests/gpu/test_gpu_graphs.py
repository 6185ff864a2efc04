"""Captured graphs and streams on a GPU: what was prepared is never stale, unfinished or another's."""

import copy
import json

import pytest
import torch
from helpers import assert_close, count_preparations, require_triton
from torch import nn

require_triton()
from ssvdo_kernels import SSVDOConfig, apply_ssvdo, cache
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import device
from ssvdo_kernels.triton import launch, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
# bf16 operands are rounded about ten products deep; two runs of one code on the same numbers differ by less
TOLERANCE = 8 * 2**-7


@pytest.fixture(autouse=True)
def no_capture_before():
    cache.Capture.over()
    cache.Capture._parts = False


def require_cuda_part():
    if missing := device.not_built():
        pytest.skip(missing)


def require_tag():
    if not hasattr(torch._C.Tag, "cudagraph_unsafe"):
        pytest.skip("torch before 2.9 has no tag that keeps operations out of torch.compile's graphs")


def model(pairs=1, **options):
    """64 -> 256 -> 64, `pairs` times: layers of two shapes, each a group where there are several."""
    torch.manual_seed(0)
    layers = [m for _ in range(pairs) for m in (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))]
    net = nn.Sequential(*layers).cuda().bfloat16()
    return apply_ssvdo(net, SSVDOConfig(target_modules="all-linear", outer_rank=16, init_angle=0.1, **options))


def tokens(count=33):
    return torch.randn(count, 64, device="cuda", dtype=torch.bfloat16)


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def afresh(net, x):
    """What a copy that has prepared nothing yet makes of x."""
    with torch.no_grad():
        return copy.deepcopy(net)(x)


def captured(step, warm=3):
    """The graph of a step, after a few on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("pairs", [1, 3])
def test_a_whole_step_is_captured_and_eager_forwards_see_what_it_trained(pairs):
    """The optimiser writes inside the graph, where no version counter moves. eps: else a gradient near 0 counts as much
    as any, whatever its sign is rounded to."""
    net, x = model(pairs), tokens()
    twin = copy.deepcopy(net)
    optimisers = [torch.optim.AdamW(trained(m), lr=1e-2, eps=0.1, capturable=True) for m in (net, twin)]

    def step(m, optimiser):
        optimiser.zero_grad(set_to_none=True)
        m(x).float().square().sum().backward()
        optimiser.step()

    graph = captured(lambda: step(net, optimisers[0]))
    for _ in range(3):  # the warm-up's; a capture runs nothing
        step(twin, optimisers[1])
    for _ in range(3):
        before = net(x)
        graph.replay()
        step(twin, optimisers[1])
        with torch.no_grad():
            after = net(x)
        assert_close("after a replay", after, afresh(net, x), TOLERANCE)
        assert_close("as eager training", after, twin(x), TOLERANCE)
        assert not torch.equal(before, after)


def test_a_group_under_capture_follows_its_parameters():
    """Layers of one shape, which are prepared together outside of a graph, forward and backward."""
    net, x = model(3), tokens().requires_grad_()

    def step():
        net.zero_grad(set_to_none=True)
        x.grad = None
        step.y = net(x)
        step.y.float().square().sum().backward()

    graph = captured(step)
    grads = [x.grad, *(p.grad for p in trained(net))]
    for scale in (0.05, 0.1):
        with torch.no_grad():
            for p in trained(net):
                p.add_(scale * torch.randn_like(p))
        for g in grads:
            g.fill_(float("nan"))
        graph.replay()
        got = [step.y.clone(), *(g.clone() for g in grads)]
        other, again = copy.deepcopy(net), x.detach().clone().requires_grad_()
        y = other(again)
        y.float().square().sum().backward()
        want = [y, again.grad, *(p.grad for p in trained(other))]
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_close(f"replayed {i}", a, b, TOLERANCE)


def kernels(run):
    """How often each of csrc/cuda's kernels ran, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = "OuterKernel", "FactorKernel", "InvertKernel", "HalfwayKernel", "PackKernel"
    found = {event.key: event.count for event in profile.key_averages()}
    return {name: sum(count for key, count in found.items() if name in key) for name in names}


def test_a_replay_prepares_each_group_once_each_way(monkeypatch):
    require_cuda_part()
    net, x = model(3), tokens()
    calls = count_preparations(monkeypatch)

    def step():
        net.zero_grad(set_to_none=True)
        for sizes in calls.values():
            sizes.clear()
        for part in (x, x[:20]):  # two micro-batches on one preparation
            net(part).float().square().sum().backward()

    graph = captured(step)
    assert calls == {"forward": [3, 3], "backward": [3] * 4}
    graph.replay()  # the profiler's own start is behind it then
    want = {"OuterKernel": 2 * 2 + 4, "FactorKernel": 2, "InvertKernel": 2, "HalfwayKernel": 4, "PackKernel": 4}
    assert kernels(graph.replay) == want


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_is_captured_as_an_eager_one(backend, monkeypatch):
    """Prepared together once each way, and it follows what the optimiser writes inside the graph."""
    require_cuda_part()
    require_tag()
    net, x = model(3), tokens()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    optimisers = [torch.optim.AdamW(trained(m), lr=1e-2, eps=0.1, capturable=True) for m in (net, twin)]
    calls = count_preparations(monkeypatch)

    def step(function, optimiser):
        optimiser.zero_grad(set_to_none=True)
        for sizes in calls.values():
            sizes.clear()
        function(x).float().square().sum().backward()
        optimiser.step()

    graph = captured(lambda: step(compiled, optimisers[0]))
    assert calls == {"forward": [3, 3], "backward": [3, 3]}
    for _ in range(3):  # the warm-up's
        step(twin, optimisers[1])
    for _ in range(3):
        graph.replay()
        step(twin, optimisers[1])
        with torch.no_grad():
            assert_close("compiled, after a replay", compiled(x), afresh(net, x), TOLERANCE)
            assert_close("as eager training", net(x), twin(x), TOLERANCE)


def test_layers_between_the_graphs_of_reduce_overhead_train_as_eager_ones(monkeypatch):
    require_cuda_part()
    require_tag()
    net, x = model(3), tokens()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    optimisers = [torch.optim.AdamW(trained(m), lr=1e-2, eps=0.1) for m in (net, twin)]
    calls = count_preparations(monkeypatch)
    for _ in range(5):  # run, recorded, replayed
        ys = []
        for function, optimiser in zip((compiled, twin), optimisers, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            for sizes in calls.values():
                sizes.clear()
            optimiser.zero_grad(set_to_none=True)
            y = function(x)
            y.float().square().sum().backward()
            assert calls == {"forward": [3, 3], "backward": [3, 3]}
            ys.append(y.detach().clone())
            optimiser.step()
        assert_close("y", *ys, TOLERANCE)
    for p, q in zip(trained(net), trained(twin), strict=True):
        assert_close("parameter", p, q, TOLERANCE)
    with torch.no_grad():
        assert_close("evaluation", compiled(x), afresh(net, x), TOLERANCE)


def test_a_step_inside_the_graph_is_followed_by_a_batch_of_its_own(monkeypatch):
    require_cuda_part()
    net, x = model(2), tokens()
    twin = copy.deepcopy(net)
    optimisers = [torch.optim.AdamW(trained(m), lr=1e-2, eps=0.1, capturable=True) for m in (net, twin)]
    calls = count_preparations(monkeypatch)

    def step(m, optimiser):
        for _ in range(2):
            optimiser.zero_grad(set_to_none=True)
            m(x).float().square().mean().backward()
            optimiser.step()
        step.y = m(x)

    graph = captured(lambda: step(net, optimisers[0]), warm=1)
    assert calls["forward"][-6:] == [2] * 6
    captured_y = step.y
    step(twin, optimisers[1])  # the warm-up's
    for _ in range(2):
        graph.replay()
        step(twin, optimisers[1])
        assert_close("as eager training", captured_y, step.y, TOLERANCE)


def test_two_graphs_of_one_model_and_what_is_freed_with_them():
    net, x = model(3), tokens()
    outputs = {}

    def forward(count):
        with torch.no_grad():
            outputs[count] = net(x[:count])

    graphs = {count: captured(lambda count=count: forward(count), warm=1) for count in (33, 20)}
    for _ in range(2):
        with torch.no_grad():
            for p in trained(net):
                p.add_(0.05 * torch.randn_like(p))
        for count, graph in graphs.items():
            outputs[count].fill_(float("nan"))
            graph.replay()
            assert_close(f"{count} rows", outputs[count], afresh(net, x[:count]), TOLERANCE)
    with torch.no_grad():
        net(x)  # outside of any: what the last capture held is let go of
    assert cache.Capture._now is None


def test_graphed_callables_train_as_eager_layers_do(monkeypatch):
    """Each block's forward and backward is a graph of its own; the optimiser is outside."""
    require_cuda_part()
    net, x = model(3), tokens()
    twin = copy.deepcopy(net)
    calls = count_preparations(monkeypatch)
    blocks = [nn.Sequential(*net[i : i + 3]) for i in range(0, 9, 3)]
    samples = [(torch.zeros_like(x).requires_grad_(i > 0),) for i in range(3)]
    graphed = nn.Sequential(*torch.cuda.make_graphed_callables(tuple(blocks), tuple(samples)))
    assert calls["forward"][-6:] == [3, 3, 1, 1, 1, 1]  # the first does not know that the others come apart
    optimisers = [torch.optim.AdamW(trained(m), lr=1e-2, eps=0.1) for m in (net, twin)]
    for _ in range(3):
        ys = []
        for m, optimiser in zip((graphed, twin), optimisers, strict=True):
            optimiser.zero_grad(set_to_none=True)
            ys.append(m(x))
            ys[-1].float().square().sum().backward()
            optimiser.step()
        assert_close("y", *ys, TOLERANCE)
    for p, q in zip(trained(net), trained(twin), strict=True):
        assert_close("parameter", p, q, TOLERANCE)


def test_an_optimiser_captured_alone_leaves_no_eager_layer_stale():
    net, x = model(2), tokens()
    optimiser = torch.optim.AdamW(trained(net), lr=1e-2, capturable=True)
    net(x).float().square().sum().backward()
    graph = captured(optimiser.step)
    for _ in range(2):
        with torch.no_grad():
            before = net(x)
            graph.replay()
            after = net(x)
        assert_close("after a replay", after, afresh(net, x), TOLERANCE)
        assert not torch.equal(before, after)


@pytest.mark.parametrize("path", ["auto", "merged"])
def test_what_one_stream_prepared_another_waits_for(path):
    net, x = model(path=path), tokens()
    want = afresh(net, x)
    for _, layer in hosts(net):
        layer.refresh()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # some tenth of a second
        net(x)
    with torch.no_grad():
        got = net(x)  # on the stream that has waited for nothing
    assert_close("y", got, want, TOLERANCE)


def test_side_streams_train_as_the_first_does():
    net, x = model(2), tokens()
    net(x).float().square().sum().backward()
    want = [p.grad.clone() for p in trained(net)]
    for _ in range(3):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        net.zero_grad()
        for _, layer in hosts(net):
            layer.refresh()
        with torch.cuda.stream(side):
            net(x).float().square().sum().backward()
        torch.cuda.current_stream().wait_stream(side)
        for p, g in zip(trained(net), want, strict=True):
            assert_close("gradient", p.grad, g, TOLERANCE)


def test_timings_from_disk_serve_a_capture(tmp_path, monkeypatch):
    """Made by another process: nothing is timed again, and the graph computes as eager calls do, bit by bit."""

    def forget():
        for place in (tuning._memory, tuning._loaded, getattr(launch, "_ready", {})):
            place.clear()

    monkeypatch.setenv("SSVDO_CACHE", str(tmp_path))
    net, x, asked = model(), tokens(100), []
    forget()
    monkeypatch.setattr(tuning, "_do_bench", lambda call: (call(), asked.append(call), -len(asked))[2])  # the last one
    with torch.no_grad():
        net(x)
    (file,) = tmp_path.glob("autotune-*.json")
    assert asked and max(json.loads(file.read_text()).values()) > 0
    forget()
    monkeypatch.setattr(tuning, "_do_bench", lambda call: pytest.fail("timed again"))

    def step():
        with torch.no_grad():
            step.y = net(x)

    graph = captured(step, warm=1)
    step.y.fill_(float("nan"))
    graph.replay()
    with torch.no_grad():
        assert torch.equal(step.y, net(x))
    forget()  # and once more where the capture itself is the first to look
    graph = captured(step, warm=1)
    graph.replay()
    with torch.no_grad():
        assert torch.equal(step.y, net(x))
