"""The CUDA kernels of preparation on a GPU against the same code on the host; small enough for compute-sanitizer."""

import pytest
import torch
from helpers import assert_close, make_layer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
if torch.cuda.is_available() and device.obstacle(torch.device("cuda")):
    pytest.skip(device.obstacle(torch.device("cuda")), allow_module_level=True)
STORED = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
          (torch.float64, torch.float64)]  # fmt: skip


def lie(matrix, by_rows):
    """The same numbers by rows or by columns, each line with two numbers more behind it."""
    lines = matrix if by_rows else matrix.mT
    wide = torch.nn.functional.pad(lines, (0, 2), value=float("nan"))[:, : lines.shape[1]]
    return wide if by_rows else wide.mT


def everywhere(function, *arguments):
    """Results on the GPU, and of the emulated kernels on the CPU."""
    return function(*([t.cuda() for t in a] for a in arguments)), function(*arguments)


@pytest.mark.parametrize("dtype, stored", STORED)
@pytest.mark.parametrize("rows, inner, columns", [(9, 20, 5), (150, 200, 130), (300, 70, 64)])
def test_every_product_kernel(rows, inner, columns, dtype, stored):
    """Every layout, with gaps; either side errs by at most inner u |A| |B|, u = eps / 2."""
    torch.manual_seed(0)
    for left, right in ((a, b) for a in (True, False) for b in (True, False)):
        A = [lie(torch.randn(rows, inner).to(stored), left) for _ in range(3)]
        B = [lie(torch.randn(inner, columns, dtype=dtype), right) for _ in range(3)]
        got = device.product([lie(a.cuda(), left) for a in A], [lie(b.cuda(), right) for b in B])
        for out, want, a, b in zip(got, device.product(A, B), A, B, strict=True):
            bound = inner * torch.finfo(dtype).eps * (a.to(dtype).abs() @ b.abs())
            assert bool(((out.cpu() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("l", [1, 64, 130, 300])
def test_the_factor_kernel(l, dtype):  # noqa: E741
    """l = 300 lies outside of shared memory; condition 40."""
    torch.manual_seed(0)
    L = torch.randn(4, l, l, dtype=dtype) / l**0.5
    gram = L.mT @ L + 0.1 * torch.eye(l, dtype=dtype)
    gram[2, l - 1, l - 1] = float("nan")
    (X, info), (want, _) = device.factor(gram.cuda()), device.factor(gram)
    assert info.tolist() == [0, 0, l, 0] and bool(X[2].isnan().all())
    good = info.cpu() == 0
    assert_close("X", X.cpu()[good], want[good], 400 * torch.finfo(dtype).eps)


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
    for _, layer in hosts(model):
        layer.refresh()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        model(x).sum().backward()
        torch.cuda.synchronize()
    ours = [e for e in found.events() if "run_kernel" in e.name]
    assert len(ours) == 2 * (9 + 12)  # tests/ops/test_device.py counts them one by one


def test_a_bad_pivot_stops_the_backward():
    layer = make_layer(12, 4, outer_rank=3, dtype=torch.float32, device="cuda")
    with torch.no_grad():
        layer.adapter.outer[0, 1] = float("nan")
    layer.refresh()
    y = layer(torch.randn(3, 4, device="cuda"))
    with pytest.raises(ArithmeticError, match="pivot 2"):
        y.sum().backward()
    assert layer.adapter.outer.grad is None
