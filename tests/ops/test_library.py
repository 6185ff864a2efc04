"""The torch.library operations: registered right, and equal to the eager layer under torch.compile."""

import pytest
import torch
from helpers import assert_close, make_layer, randomise, require_triton
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.linear import FACTOR_NAMES
from ssvdo_kernels.ops import library

SHAPES = [(12, 5, 3, None), (5, 12, 3, None), (12, 5, 4, 2), (5, 12, 0, None), (6, 6, 0, None)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def pieces(layer, tokens):
    parameters = [p.detach().clone().requires_grad_() for p in layer.adapter_parameters]
    factors = [getattr(layer, name) for name in FACTOR_NAMES]
    x = torch.randn(tokens, layer.in_features, dtype=layer.weight.dtype, requires_grad=True)
    return x, parameters, factors, layer.weight.detach(), library.encode(layer.shape, layer.config)


@pytest.mark.parametrize("m, n, l, rank", SHAPES)
@pytest.mark.parametrize("path", ["auto", "core"])
def test_opcheck(m, n, l, rank, path):  # noqa: E741
    layer = make_layer(m, n, inner_ratio=0.8, outer_rank=l, rank=rank, path=path)
    x, parameters, factors, weight, spec = pieces(layer, 7)
    torch.library.opcheck(library.prepare, (*parameters, *factors, spec))
    mixer, columns, G, saved, X = (t.detach() for t in library.prepare(*parameters, *factors, spec))
    torch.library.opcheck(library.prepare_backward, (
        torch.randn_like(mixer), torch.randn_like(columns), *(p.detach() for p in parameters), *factors, G, saved, X,
        spec))  # fmt: skip
    mixer.requires_grad_()
    columns.requires_grad_()
    for bias in (None, layer.bias):
        torch.library.opcheck(library.linear, (x, mixer, columns, weight, bias, factors[0], spec))
    y, g = library.linear(x, mixer, columns, weight, None, factors[0], spec)
    for needs in ([True, True, True], [False, True, False]):
        arguments = (x, mixer, columns, weight, factors[0], g)
        torch.library.opcheck(library.linear_gradients, (
            torch.randn_like(y), *(t.detach() for t in arguments), needs, spec))  # fmt: skip
    torch.library.opcheck(library.merge, (mixer, columns, weight, factors[0], spec))
    torch.library.opcheck(library.merge_backward, (
        torch.randn_like(weight), mixer.detach(), columns.detach(), weight, factors[0], spec))  # fmt: skip


def model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.Linear(16, 16, bias=False)).to(dtype)
    apply_ssvdo(net, SSVDOConfig(target_modules=["0", "2"], outer_rank=3, init_angle=0.3, **options))
    apply_ssvdo(net, SSVDOConfig(target_modules=["3"], outer_rank=0, **options))
    for i in (0, 2, 3):
        randomise(net[i])
    return net


def gradients(function, net, x):
    net.zero_grad()
    x.grad = None
    y = function(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)]


def same(got, want, tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype
        assert_close(str(i), a, b, tolerance)


@pytest.mark.parametrize("options", [
    {}, {"path": "merged"}, {"path": "core"}, {"rotation": "neumann", "outer": "additive"}], ids=str)  # fmt: skip
def test_compiled_equals_eager(options):
    """float64: sums in another order, 1e-12."""
    net = model(torch.float64, **options)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    same(gradients(torch.compile(net, fullgraph=True, backend="aot_eager"), net, x), gradients(net, net, x), 1e-12)


def test_inductor_with_changing_sizes():
    net = model()
    compiled = torch.compile(net, fullgraph=True)
    for tokens in (5, 9, 33):
        x = torch.randn(tokens, 16, requires_grad=True)
        same(gradients(compiled, net, x), gradients(net, net, x), 100 * torch.finfo(torch.float32).eps)


def test_merged_layers_and_parameters_that_change():
    net = model(torch.float64)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    before = gradients(compiled, net, x)
    with torch.no_grad():
        net[0].outer.mul_(1.5)
    after = gradients(compiled, net, x)
    assert not torch.allclose(before[0], after[0])
    same(after, gradients(net, net, x), 1e-12)
    net[0].merge()
    same(gradients(compiled, net, x), gradients(net, net, x), 1e-12)


def test_frozen_adapter_and_no_grad():
    net = model(torch.float64)
    net[0].requires_grad_(False)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    same(gradients(compiled, net, x), gradients(net, net, x), 1e-12)
    with torch.no_grad():
        assert_close("no_grad", compiled(x), net(x), 1e-12)


def test_preparation_is_not_autocast():
    layer = make_layer(12, 5, outer_rank=3, dtype=torch.float32)
    _, parameters, factors, _, spec = pieces(layer, 1)
    want = library.prepare(*parameters, *factors, spec)
    with torch.autocast("cpu", torch.bfloat16):
        got = library.prepare(*parameters, *factors, spec)
    assert all(map(torch.equal, got, want))


def test_half_precision_parameters_and_trainable_bias():
    """As in a model wholly cast to bfloat16; the two differ by a few roundings, 2^-8 each."""
    net = model().bfloat16()
    net[0].bias.requires_grad_()
    x = torch.randn(9, 16, dtype=torch.bfloat16, requires_grad=True)
    got = gradients(torch.compile(net, fullgraph=True, backend="aot_eager"), net, x)
    assert net[0].bias.grad is not None
    same(got, gradients(net, net, x), 8 * 2**-8)


def test_autocast():
    """bfloat16 products on both sides: the results differ by rounding of the same size as their own, 2^-8 each."""
    net = model()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        same(gradients(compiled, net, x), gradients(net, net, x), 8 * 2**-8)
        assert compiled(x).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p, tokens", [(0.5, 64), (0.75, 32), (1.0, 16)])
def test_activation_checkpointing(reentrant, p, tokens):
    """Left alone, the planner would take the first of these forwards by one form and the second by another."""
    net = model(torch.float64, inner_ratio=p)
    x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    want = gradients(net, net, x)
    for _ in range(3):
        for layer in net[0], net[2], net[3]:
            layer.unmerge()  # forgets what it has seen
        same(gradients(lambda v: checkpoint(net, v, use_reentrant=reentrant), net, x), want, 1e-11)


def test_compiled_checkpointing():
    net = model(torch.float64)
    compiled = torch.compile(lambda v: checkpoint(net, v, use_reentrant=False), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    same(gradients(compiled, net, x), gradients(net, net, x), 1e-12)


def test_export():
    net = model(torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    assert_close("exported", torch.export.export(net, (x,)).module()(x), net(x), 1e-12)


def test_interpreted_kernels_serve_compiled_layers():
    require_triton()
    if torch.cuda.is_available():
        pytest.skip("interprets; tests/gpu has the compiled kernels")
    net = model(torch.float64, backend="triton")
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    same(gradients(torch.compile(net, fullgraph=True, backend="aot_eager"), net, x), gradients(net, net, x), 1e-12)
