"""The layer on a GPU against the float64 reference; skipped, with the reason, where there is none."""

import pytest
import torch
from helpers import assert_close, make_layer

from ssvdo_kernels import gradient_accumulation, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
# float32 products may run in tf32 only where the user says so; bf16 operands are rounded about ten products deep
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 8 * 2**-7}


@pytest.mark.parametrize("path", ["auto", "factored", "folded", "core", "merged"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m, n", [(256, 64), (64, 256), (250, 63)])
def test_output_and_gradients(m, n, dtype, path):
    layer = make_layer(m, n, dtype=dtype, device="cuda", outer_rank=16, path=path, spread=0.05)
    x = torch.randn(33, n, device="cuda").to(dtype).requires_grad_()
    dy = torch.randn(33, m, device="cuda").to(dtype)
    y = layer(x)
    y.backward(dy)
    wide = [p.detach().double().requires_grad_() for p in layer.adapter_parameters]
    x64, bias = x.detach().double().requires_grad_(), layer.bias.detach().double()
    want = reference.linear(x64, layer.weight.detach().double(), bias, *wide, config=layer.config)
    want.backward(dy.double())
    assert_close("y", y, want, TOLERANCE[dtype])
    assert_close("dx", x.grad, x64.grad, TOLERANCE[dtype])
    for name, p, q in zip(("inner_rotation", "inner_scale", "outer"), layer.adapter_parameters, wide, strict=True):
        assert_close(name, p.grad, q.grad, TOLERANCE[dtype])


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
    for a, b in zip(once.adapter_parameters, plain.adapter_parameters, strict=True):
        assert_close("grad", a.grad, b.grad, 1e-11)
