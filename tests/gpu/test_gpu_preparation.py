"""The CUDA kernels of preparation on a GPU against the same code on the host; small enough for compute-sanitizer."""

import pytest
import torch
from cases import outer_layers
from helpers import assert_close, make_layer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import device, outer
from ssvdo_kernels.ops.base import DenseBase
from ssvdo_kernels.ops.complement import Projector
from ssvdo_kernels.ops.outer import Outer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
if torch.cuda.is_available() and device.obstacle(torch.device("cuda")):
    pytest.skip(device.obstacle(torch.device("cuda")), allow_module_level=True)
def everywhere(function, *arguments):
    """Results on the GPU, and of the emulated kernels on the CPU."""
    return function(*([t.cuda() for t in a] for a in arguments)), function(*arguments)


def moved(layer, device, work, weight, basis, by_rows):
    """The same layer elsewhere, in other dtypes; the weight by rows, or by columns with a gap between."""
    p, half = layer.projector, weight if weight.itemsize == 2 else work
    tall = p.base.weight.to(device, weight)
    base = DenseBase(tall if by_rows else torch.nn.functional.pad(tall.mT, (0, 3))[:, : p.large].mT)
    null = None if p.null is None else p.null.to(device, half).contiguous()
    projector = Projector(base, False, p.basis.to(device, basis), p.singular.to(device, work), p.width, null, p.large)
    U = None if layer.U is None else layer.U.to(device, half)
    return Outer(layer.outer.to(device, work), layer.scale, U, projector, layer.tau)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("weight, basis", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                           (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
                                           (torch.float64, torch.float64)])  # fmt: skip
@pytest.mark.parametrize("d, c, l", [(9, 20, 5), (70, 600, 33), (140, 300, 130)])
def test_every_outer_kernel(d, c, l, weight, basis, by_rows):  # noqa: E741
    """The kernels' error against float64 is no more than a small multiple of PyTorch's own in the dtype of the work."""
    work = torch.float64 if weight == torch.float64 else torch.float32
    layers = outer_layers((d, c, l, "normal", 0.1, "rotation", 0), 3)
    own = [moved(one, "cpu", work, weight, basis, True) for one in layers]
    exact = basis if basis.itemsize == 2 else torch.float64
    truth = [moved(one, "cpu", torch.float64, one.projector.base.dtype, exact, True) for one in own]
    F, X, _ = outer.forward(truth)
    dF = [torch.randn_like(f).to(work) for f in F]
    want = [*F, *X, *outer.backward(truth, X, F, [d.double() for d in dF])]
    plain_F, plain_X, _ = outer.forward(own)
    plain = [*plain_F, *plain_X, *outer.backward(own, plain_X, plain_F, dF)]
    there = [moved(one, "cuda", work, weight, basis, by_rows) for one in own]
    info = torch.zeros(3, dtype=torch.int32, device="cuda")
    got_F, got_X = device.outer_forward(there, gate=info.new_zeros(2, 3), info=info)
    back = device.outer_backward(there, got_X, got_F, [d.cuda() for d in dF])
    assert info.tolist() == [0] * 3
    for a, b, t in zip([*got_F, *got_X, *back], plain, want, strict=True):
        error, theirs = (float((x.cpu() - t).norm() / t.norm()) for x in (a, b))
        assert error <= 4 * theirs + 16 * torch.finfo(work).eps


@pytest.mark.parametrize("l", [1, 64, 130])
def test_a_pivot_that_is_not_finite(l):  # noqa: E741
    layers = [moved(one, "cuda", torch.float32, torch.float32, torch.float32, True)
              for one in outer_layers((l, l, l, "normal", 0.1, "additive", 0), 3)]  # fmt: skip
    layers[1].outer[0, l - 1] = float("nan")
    info = torch.zeros(3, dtype=torch.int32, device="cuda")
    F, X = device.outer_forward(layers, gate=info.new_zeros(2, 3), info=info)
    assert info.tolist() == [0, l, 0] and all(bool(X[i].isfinite().all()) for i in (0, 2))
    assert bool(X[1].isnan().all()) and bool(F[1].isnan().all())


def test_more_layers_than_fit_together():
    """A team a layer then, which waits for nobody."""
    layers = [moved(one, "cuda", torch.float64, torch.float64, torch.float64, True)
              for one in outer_layers((5, 9, 3, "normal", 0.1, "rotation", 0), 200)]  # fmt: skip
    info = torch.zeros(200, dtype=torch.int32, device="cuda")
    F, _ = device.outer_forward(layers, gate=info.new_zeros(2, 200), info=info)
    for i in (0, 199):
        (one,), _ = device.outer_forward(layers[i : i + 1], gate=info.new_zeros(2), info=info[:1])
        assert_close("F", F[i], one, 1e-13)


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
        saved, mixer = ([m[i] for m in made] for i in range(2))
        back = device.inner_backward(packed, shift, singular, saved, d_mixer, q, shape, config)
        assert counts[1].tolist() == [0] * 3
        return saved + mixer + [t for pair in back for t in pair]

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
    assert len(ours) == 2 * (4 + 3)


def test_a_bad_pivot_stops_the_backward():
    layer = make_layer(12, 4, outer_rank=3, dtype=torch.float32, device="cuda")
    with torch.no_grad():
        layer.adapter.outer[0, 1] = float("nan")
    layer.refresh()
    y = layer(torch.randn(3, 4, device="cuda"))
    with pytest.raises(ArithmeticError, match="pivot 2"):
        y.sum().backward()
    assert layer.adapter.outer.grad is None
