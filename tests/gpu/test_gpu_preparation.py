"""The CUDA kernels of preparation on a GPU against the same code on the host; small enough for compute-sanitizer."""

import pytest
import torch
from cases import orthonormal
from helpers import assert_close, make_layer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.model import adapted_layers
from ssvdo_kernels.ops import device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
if torch.cuda.is_available() and device.obstacle(torch.device("cuda")):
    pytest.skip(device.obstacle(torch.device("cuda")), allow_module_level=True)
STORED = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
          (torch.float64, torch.float64)]  # fmt: skip


def everywhere(function, *arguments):
    """Results on the GPU, and of the emulated kernels on the CPU."""
    return function(*([t.cuda() for t in a] for a in arguments)), function(*arguments)


@pytest.mark.parametrize("dtype, factors", STORED)
@pytest.mark.parametrize("d, c, l", [(9, 20, 5), (150, 200, 130), (70, 300, 64)])
def test_every_outer_kernel(d, c, l, dtype, factors):  # noqa: E741
    torch.manual_seed(0)
    config = SSVDOConfig(outer_rank=l, outer_scale=1.0)
    shape = LayerShape.of(c + d, d, config)
    L = [(0.3 * torch.randn(c, l, dtype=torch.float64) / c**0.5).to(dtype) for _ in range(3)]
    Y = [orthonormal(c + d, d).to(factors) for _ in range(3)]
    U, dF = [y[:, :l].contiguous() for y in Y], [torch.randn(c + d, l, dtype=dtype) for _ in range(3)]

    def run(L, Y, U, dF):
        columns = [torch.full_like(d, float("nan")) for d in dF]
        info = L[0].new_zeros(3, dtype=torch.int32)
        inverse, left = device.outer_forward(L, Y, U, columns, shape, config, info=info)
        back = device.outer_backward(L, Y, U, inverse.unbind(), left.unbind(), dF, shape, config)
        assert info.tolist() == [0] * 3
        return columns, back

    got, want = everywhere(run, L, Y, U, dF)
    tolerance = 400 * torch.finfo(dtype).eps  # condition 10, sums of up to 370, twice
    for name, a, b in zip(("F", "d outer"), got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_close(name, x.cpu(), y, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rotation", ["cayley", "first_order"])
@pytest.mark.parametrize("k, l, q", [(1, 3, 0), (20, 25, 2), (130, 16, 1)])
def test_every_inner_kernel(k, l, q, rotation, dtype):  # noqa: E741
    torch.manual_seed(0)
    config, shape = SSVDOConfig(rotation=rotation), LayerShape(10 * k + 20, 10 * k, False, k, l)
    packed = [torch.randn(k * (k - 1) // 2, dtype=dtype) / k**0.5 for _ in range(3)]
    shift, singular = ([torch.rand(n, dtype=dtype) + 0.5 for _ in range(3)] for n in (k, shape.width))
    d_mixer = [torch.randn(shape.width + l + q, shape.width, dtype=dtype) for _ in range(3)]

    def run(packed, shift, singular, d_mixer):
        counts = packed[0].new_zeros(2, 3, dtype=torch.int32)
        made = device.inner_forward(packed, shift, singular, q, shape, config, gate=counts[0], info=counts[1])
        G, saved, mixer = ([m[i] for m in made] for i in range(3))
        back = device.inner_backward(packed, shift, singular, G, saved, d_mixer, q, shape, config)
        assert counts[1].tolist() == [0] * 3
        return G + mixer + [t for pair in back for t in pair]

    got, want = everywhere(run, packed, shift, singular, d_mixer)
    for a, b in zip(got, want, strict=True):
        assert_close("inner", a.cpu(), b, 400 * torch.finfo(dtype).eps)


def test_launches_of_a_group():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 256) if i % 2 == 0 else nn.Linear(256, 64) for i in range(8))).cuda()
    apply_ssvdo(model, SSVDOConfig(target_modules="all-linear", outer_rank=16))
    x = torch.randn(5, 64, device="cuda")
    model(x).sum().backward()  # loads the kernels
    for _, layer in adapted_layers(model):
        layer.refresh()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        model(x).sum().backward()
        torch.cuda.synchronize()
    ours = [e for e in found.events() if "run_kernel" in e.name]
    assert len(ours) == 2 * (5 + 6)


def test_a_bad_pivot_stops_the_backward():
    layer = make_layer(12, 4, outer_rank=3, dtype=torch.float32, device="cuda")
    with torch.no_grad():
        layer.outer[0, 1] = float("nan")
    layer.refresh()
    y = layer(torch.randn(3, 4, device="cuda"))
    with pytest.raises(ArithmeticError, match="pivot 2"):
        y.sum().backward()
    assert layer.outer.grad is None
