"""Sizes at which the kernels take other ways: odd widths, many layers, large blocks; and how float32 multiplies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close, assert_right, make_layer
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import device
from ssvdo_kernels.ops.engines import adjoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
DEVICE = "cuda"
# bf16 operands are rounded about ten products deep; float32 sums have up to 1100 terms
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8 * 2**-7}
needs_core = pytest.mark.skipif(bool(device.obstacle(torch.device(DEVICE))), reason="the CUDA kernels were not built")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("l", [1, 9, 60, 100])
@pytest.mark.parametrize("wide", [False, True])
def test_odd_widths(l, wide, dtype):  # noqa: E741
    """Rows of w + l numbers, which vector loads and the tensor cores' alignment do not fit; d = 1024."""
    m, n = (1024, 1131) if wide else (1131, 1024)
    layer = make_layer(m, n, dtype=dtype, device=DEVICE, spread=0.02, outer_rank=l, inner_ratio=0.125,
                       backend="auto")  # fmt: skip
    assert_right(layer, 200, TOLERANCE[dtype])


@needs_core
def test_more_layers_than_one_launch_holds():
    """50 layers of l = 250: two launches of everything, and factors outside of shared memory. Against the reference."""
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(256, 600, bias=False) for _ in range(50)).to(DEVICE)
    apply_ssvdo(net, SSVDOConfig(target_modules="all-linear", inner_ratio=0.25, outer_rank=250, init_angle=0.2))
    layers = [layer for _, layer in hosts(net)]
    with torch.no_grad():
        for layer in layers:
            layer.adapter.inner_rotation.normal_(0, 0.02)
            layer.adapter.inner_scale.normal_(0, 0.02)
    made = [layer.adapter.prepared(layer.base()) for layer in layers]
    d = [(torch.randn_like(one.mixer), torch.randn_like(one.columns)) for one in made]
    gradients = adjoint(made, [a for a, _ in d], [b for _, b in d])
    for i in (0, 1, 47, 48, 49):
        layer = layers[i]
        plain = SSVDOConfig(**{**vars(layer.adapter.config), "backend": "reference"})
        layer.adapter.config = plain
        layer.refresh()
        want = layer.adapter.prepared(layer.base())
        assert want.engine == "reference" != made[i].engine
        assert_close("M", made[i].mixer, want.mixer, 1e-4)
        assert_close("F", made[i].columns, want.columns, 1e-4)
        back = adjoint([want], [d[i][0]], [d[i][1]])[0]
        for name, a, b in zip(PARAMETER_NAMES, gradients[i], back, strict=True):
            assert_close(name, a, b, 1e-3)


@needs_core
@pytest.mark.parametrize("k", [512, 700])
@pytest.mark.parametrize("size", [0.1, 10.0, 300.0])
def test_large_rotations_that_newton_mends(k, size):
    """|K| grows, and the inverse keeps LAPACK's digits: a few eps times the condition, sqrt(1 + |K|^2), growing as the
    square root of k. At 10 and 300 elimination without pivots alone does not reach that."""
    torch.manual_seed(0)
    config = SSVDOConfig(inner_ratio=1.0, outer_rank=0)
    shape = LayerShape(2 * k, k, False, k, 0)
    packed = torch.randn(k * (k - 1) // 2, device=DEVICE)
    K = torch.zeros(k, k, device=DEVICE)
    K[torch.triu_indices(k, k, 1, device=DEVICE).unbind()] = packed
    factor = size / float(torch.linalg.matrix_norm(K - K.mT, 2))
    gate, info = (torch.zeros(2, dtype=torch.int32, device=DEVICE) for _ in range(2))
    zeros, ones = torch.zeros(k, device=DEVICE), torch.ones(k, device=DEVICE)
    made = device.inner_forward([packed * factor, packed * 1e-3], [zeros] * 2, [ones] * 2, 0, shape, config, gate=gate,
                                info=info)  # fmt: skip
    assert info.tolist() == [0, 0]
    G, saved, _ = made[0]
    eye = torch.eye(k, dtype=torch.float64, device=DEVICE)
    error = float(torch.linalg.matrix_norm(saved.double() - torch.linalg.inv(eye + factor * (K - K.mT).double()), 2))
    eps = torch.finfo(torch.float32).eps
    assert error <= 16 * eps * (1 + size) * (k / 150) ** 0.5
    assert float((G.double() @ G.double().mT - eye).abs().max()) <= 64 * eps * (1 + size) * (k / 150) ** 0.5


PRECISION = """
import sys, torch
sys.path.insert(0, "tests")
from helpers import assert_close, make_layer, reference_linear
device, setting = sys.argv[1:]
torch.backends.cuda.matmul.fp32_precision = setting
for backend in ("auto", "triton"):
    layer = make_layer(256, 64, dtype=torch.float32, device=device, spread=0.05, outer_rank=16, backend=backend)
    x = torch.randn(33, 64, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    tolerance = 16 * 2**-10 if setting == "tf32" else 1e-5  # tf32 keeps ten bits
    assert_close("y", y, reference_linear(layer, x.double(), [p.double() for p in layer.adapter.trained]), tolerance)
from ssvdo_kernels.info import info
info()
"""


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_float32_as_fp32_precision_says(setting):
    """In a process of its own, as the older switch cannot be read any more once this one is set."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch has the older switch alone")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PRECISION, DEVICE, setting], cwd=root, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(root)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
