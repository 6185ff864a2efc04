"""The CUDA kernels, emulated with threads on the CPU, against the PyTorch preparation."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import inner_cases, inner_layers, orthonormal, outer_cases, outer_layers, shifted, unprepared
from helpers import assert_close, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.model import adapted_layers
from ssvdo_kernels.ops import device, host, preparation
from ssvdo_kernels.ops.preparation import Prepared, State

if not host.available():
    pytest.skip("the compiled core was not built", allow_module_level=True)


def ints(*sizes):
    return torch.zeros(*sizes, dtype=torch.int32)


def run_outer(layers, columns, shape, config):
    """(outers, Y, U, R^-1, left) after a forward that filled `columns`."""
    outers, Y, U = [p[2] for p, _ in layers], [f.reflector for _, f in layers], [f.outer_basis for _, f in layers]
    info = ints(len(layers)) - 1
    inverse, left = device.outer_forward(outers, Y, U, columns, shape, config, info=info)
    assert info.tolist() == [0] * len(layers)
    return outers, Y, U, inverse.unbind(), left.unbind()


@settings(max_examples=40)
@given(case=outer_cases(), count=st.sampled_from([1, 3]))
def test_outer_part(case, count):
    shape, config, layers = outer_layers(case, count)
    want = [Prepared(p, f, shape, config) for p, f in layers]
    columns = [torch.full((shape.large, shape.l), float("nan"), dtype=torch.float64) for _ in layers]
    outers, Y, U, inverse, left = run_outer(layers, columns, shape, config)
    dF = [shifted(torch.randn(shape.large, shape.l, dtype=torch.float64), i) for i in range(count)]
    gradients = device.outer_backward(outers, Y, U, inverse, left, dF, shape, config)
    for i in range(count):
        # R^-1 and what is made of it err by the Gram matrix's condition
        condition = 1 + float(torch.linalg.matrix_norm(outers[i], 2)) ** 2 / config.tau
        tolerance = 64 * condition * 2**-52
        assert_close("X", inverse[i].mT, want[i].state.X, tolerance)
        assert_close("F", columns[i], want[i].columns, tolerance)
        dX_norm = float(torch.linalg.matrix_norm(inverse[i], 2)) * condition  # the gradient's intermediate terms
        reference = want[i].outer_reference_backward(dF[i])
        assert float((gradients[i] - reference).norm()) <= 64 * 2**-52 * condition * dX_norm * float(dF[i].norm())


@pytest.mark.parametrize("dtype, factors", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16),
                                            (torch.float32, torch.float16), (torch.float64, torch.float64)])
def test_several_tiles_and_every_storage_type(dtype, factors):
    """Sizes beyond one tile each way; l = 130 leaves the factor outside of shared memory in float64."""
    torch.manual_seed(0)
    d, c, l = 150, 200, 130  # noqa: E741
    config = SSVDOConfig(outer_rank=l, outer_scale=1.0)
    shape = LayerShape.of(c + d, d, config)
    basis = orthonormal(c + d, d).to(factors)
    L = (0.3 * torch.randn(c, l, dtype=torch.float64) / math.sqrt(c)).to(dtype)
    columns = torch.full((c + d, l + 2), 7.0, dtype=dtype)  # two null-space columns stand beside F
    U = basis[:, :l].contiguous()
    inverse, left = device.outer_forward([L], [basis], [U], [columns], shape, config, info=ints(1))
    assert bool((columns[:, l:] == 7).all())
    dF = torch.randn(c + d, l, dtype=dtype)
    (gradient,) = device.outer_backward([L], [basis], [U], inverse.unbind(), left.unbind(), [dF], shape, config)
    exact = torch.empty(c + d, l, dtype=torch.float64)
    wide = [L.double()], [basis.double()], [U.double()]
    (X,), _ = host.outer_forward(*wide, [exact], shape, config)
    (want,) = host.outer_backward(*wide, [X], [dF.double()], shape, config)
    tolerance = 200 * torch.finfo(dtype).eps  # condition 10, sums of 350
    assert_close("F", columns[:, :l], exact, tolerance)
    assert_close("d outer", gradient, want, 4 * tolerance)


@settings(max_examples=40)
@given(case=inner_cases().filter(lambda case: case[3] != "neumann"), count=st.sampled_from([1, 3]))
def test_inner_part(case, count):
    k, l, q, rotation = case[:4]  # noqa: E741
    shape, config, (packed, shift, singular) = inner_layers(case, count)
    info = ints(count)
    got = device.inner_forward(packed, shift, singular, q, shape, config, gate=ints(count), info=info)
    assert info.tolist() == [0] * count
    d_mixer = [torch.randn(shape.width + l + q, shape.width, dtype=torch.float64) for _ in range(count)]
    G, saved = ([g[i] for g in got] for i in range(2))
    gradients = device.inner_backward(packed, shift, singular, G, saved, d_mixer, q, shape, config)
    for i in range(count):
        made = unprepared(packed[i], shift[i], singular[i], q, shape, config)
        want = made.inner_reference()
        made.state = State(want[0], want[1], want[0])
        names = ("G", "saved", "mixer") if rotation == "cayley" else ("G", "", "mixer")
        for name, a, b in zip(names, got[i], want, strict=True):
            assert not name or (a - b).abs().max() <= 1e-13 * (k + l), name
        back = made.inner_reference_backward(d_mixer[i])
        for name, a, b in zip(("packed", "shift"), gradients[i], back, strict=True):
            assert_close(name, a, b, 1e-11)


@pytest.mark.parametrize("size", [0.1, 10.0, 300.0])
@pytest.mark.parametrize("k", [50, 150])
def test_newton_mends_what_the_pivots_would_have_saved(k, size):
    """|K| grows, the inverse keeps LAPACK's digits: a residual of a few eps times the condition, sqrt(1 + |K|^2)."""
    torch.manual_seed(0)
    config = SSVDOConfig(inner_ratio=1.0, outer_rank=0)
    shape = LayerShape(2 * k, k, False, k, 0)
    packed = torch.randn(k * (k - 1) // 2)
    K = torch.zeros(k, k)
    K[torch.triu_indices(k, k, 1).unbind()] = packed
    factor = size / float(torch.linalg.matrix_norm(K - K.mT, 2))
    info = ints(1)
    ((G, saved, _),) = device.inner_forward([packed * factor], [torch.zeros(k)], [torch.ones(k)], 0, shape, config,
                                            gate=ints(1), info=info)  # fmt: skip
    assert info.tolist() == [0]
    A = torch.eye(k, dtype=torch.float64) + factor * (K - K.mT).double()
    error = float(torch.linalg.matrix_norm(saved.double() - torch.linalg.inv(A), 2))
    eps = torch.finfo(torch.float32).eps
    assert error <= 16 * eps * (1 + size)
    assert float((G.double() @ G.double().mT - torch.eye(k)).abs().max()) <= 64 * eps * (1 + size)


def test_what_has_no_answer_is_reported():
    config, shape = SSVDOConfig(inner_ratio=1.0, outer_rank=2), LayerShape(6, 3, False, 3, 2)
    info = ints(2)
    packed = [torch.tensor([0.1, float("nan"), 0.1]), torch.full((3,), 0.1)]
    device.inner_forward(packed, [torch.zeros(3)] * 2, [torch.ones(3)] * 2, 0, shape, config, gate=ints(2), info=info)
    assert info.tolist() == [1, 0]
    outers = [torch.ones(3, 2), torch.tensor([[1.0, 0.0], [0.0, float("inf")], [0.0, 0.0]])]
    columns, Y = [torch.zeros(6, 2) for _ in range(2)], [torch.eye(6)[:, :3].contiguous()] * 2
    device.outer_forward(outers, Y, [torch.zeros(6, 2)] * 2, columns, shape, config, info=info)
    assert info.tolist() == [0, 2]
    assert bool(columns[0].isfinite().all()) and bool(columns[1].isnan().any())


def test_more_layers_than_one_launch_holds():
    torch.manual_seed(0)
    config, shape = SSVDOConfig(inner_ratio=1.0, outer_rank=1), LayerShape(4, 2, False, 2, 1)
    n = 50
    packed, outers = [torch.full((1,), 0.01 * i) for i in range(n)], [torch.full((2, 1), 0.1 * i) for i in range(n)]
    rest = [torch.zeros(2)] * n, [torch.ones(2)] * n
    info = ints(n)
    got = device.inner_forward(packed, *rest, 0, shape, config, gate=ints(n), info=info)
    for i in (0, 47, 48, 49):
        assert_close("G", got[i][0], device.inner_forward([packed[i]], rest[0][:1], rest[1][:1], 0, shape, config,
                                                          gate=ints(1), info=ints(1))[0][0], 1e-7)  # fmt: skip
    Y, U = [orthonormal(4, 2).float()] * n, [orthonormal(4, 1).float()] * n
    columns = [torch.empty(4, 1) for _ in range(n)]
    inverse, left = device.outer_forward(outers, Y, U, columns, shape, config, info=info)
    dF = [torch.randn(4, 1) for _ in range(n)]
    gradients = device.outer_backward(outers, Y, U, inverse.unbind(), left.unbind(), dF, shape, config)
    for i in (0, 47, 48, 49):
        (X,), _ = host.outer_forward([outers[i]], Y[:1], U[:1], [torch.empty(4, 1)], shape, config)
        assert_close("X", inverse[i].mT, X, 1e-6)
        (want,) = host.outer_backward([outers[i]], Y[:1], U[:1], [X], [dF[i]], shape, config)
        assert_close("d outer", gradients[i], want, 1e-5)


# -- whole layers and models, with the emulated kernels in the CUDA kernels' place ------------------------------------
@pytest.fixture
def emulated(monkeypatch):
    calls = []
    original = device._call

    def counting(function, operands, *rest, **sizes):
        calls.append((function, len(operands[0])))
        return original(function, operands, *rest, **sizes)

    monkeypatch.setattr(device, "_call", counting)
    monkeypatch.setattr(preparation, "preparation", lambda *_: ("cuda", "emulated"))
    return calls


@pytest.mark.parametrize("m, n, l", [(40, 12, 3), (12, 40, 12), (16, 16, 0)])
@pytest.mark.parametrize("rotation", ["cayley", "neumann", "first_order"])
def test_layers(emulated, m, n, l, rotation):  # noqa: E741
    torch.manual_seed(0)
    linear = nn.Linear(n, m).double()
    with torch.no_grad():
        linear.weight[:, -1] = 2 * linear.weight[:, 0]  # a null space
        linear.weight[-1] = 2 * linear.weight[0]
    config = SSVDOConfig(inner_ratio=1.0, outer_rank=l, rotation=rotation, init_angle=0.2)
    layer = SSVDOLinear.from_linear(linear, config)
    randomise(layer)
    x = torch.randn(30, n, dtype=torch.float64)
    layer(x).square().sum().backward()
    got = [p.grad for p in layer.adapter_parameters]
    assert bool(emulated) == (l > 0 or rotation != "neumann")
    plain = SSVDOLinear(linear.weight, linear.bias, layer.factors(), layer.shape,
                        SSVDOConfig(**{**layer.config.to_dict(), "backend": "reference"}))  # fmt: skip
    plain.load_state_dict(layer.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "preparation", lambda *_: ("reference", "asked for"))
        plain(x).square().sum().backward()
    for name, a, b in zip(("inner_rotation", "inner_scale", "outer"), got, plain.adapter_parameters, strict=True):
        assert_close(name, a, b.grad, 1e-10)


def test_a_group_takes_one_call_each_way(emulated, monkeypatch):
    monkeypatch.setattr("ssvdo_kernels.group.preparation", lambda *_: ("cuda", "emulated"))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 24) if i % 2 == 0 else nn.Linear(24, 8) for i in range(6)))
    apply_ssvdo(model, SSVDOConfig(target_modules="all-linear", outer_rank=3))
    model(torch.randn(5, 8)).sum().backward()
    assert sorted(emulated) == [(f"device_{part}_{way}", 3) for part in ("inner", "outer")
                                for way in ("backward", "forward") for _ in range(2)]
    assert all(p.grad is not None for _, layer in adapted_layers(model) for p in layer.adapter_parameters)


def test_a_bad_pivot_stops_the_backward_and_names_the_layer(emulated):
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Linear(4, 12)}), SSVDOConfig(outer_rank=2))
    layer = model["fc1"]
    with torch.no_grad():
        layer.outer[0, 0] = float("nan")
    y = layer(torch.randn(3, 4))
    assert bool(y.isnan().any())
    with pytest.raises(ArithmeticError, match=r"fc1: Cholesky .* pivot 1 .*tau=0.01"):
        y.sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="fc1"):  # without a backward, a later forward asks
            layer.prepared().verify(wait=False)
    with torch.no_grad():
        layer.outer.zero_()
        layer.inner_rotation[0] = float("inf")
    with pytest.raises(ArithmeticError, match="fc1: found no inverse"):
        layer(torch.randn(3, 4)).sum().backward()


def test_bad_calls_are_refused():
    from ssvdo_kernels import _C

    with pytest.raises(TypeError, match="float64 with factors=bfloat16"):
        _C.device_outer_forward("float64", "bfloat16", [], [1, 1, 1], c=2, l=1, r=1, large=4, tau=0.1, scale=1.0,
                                rotation=True, ld=1, stream=0, device=-1)
    with pytest.raises(ValueError, match="neumann"):
        _C.device_inner_forward("float32", [], [1] * 4, k=2, l=0, q=0, width=2, rotation="neumann", stream=0, device=-1)
    with pytest.raises(ValueError, match="address 1 of layer 0=0"):
        _C.device_inner_forward("float32", [[1, 0, 1, 1, 1, 1]], [1] * 4, k=2, l=0, q=0, width=2, rotation="cayley",
                                stream=0, device=-1)
    with pytest.raises(ValueError, match="allowed: contiguous"):
        device.inner_forward([torch.zeros(3)], [torch.zeros(6)[::2]], [torch.ones(3)], 0, LayerShape(6, 3, False, 3, 0),
                             SSVDOConfig(outer_rank=0), gate=ints(1), info=ints(1))
    if not device.architectures():
        with pytest.raises(ValueError, match="no CUDA code"):
            _C.device_inner_forward("float32", [[1] * 6], [1] * 4, k=2, l=0, q=0, width=2, rotation="cayley", stream=0,
                                    device=0)


def test_why_a_device_is_not_served():
    assert "no kernels for cpu" in device.obstacle(torch.device("cpu"))


def test_the_thread_sanitizer_finds_no_missing_barrier(tmp_path):
    """The kernels with a thread a lane: what races here races on a GPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "race"
    command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "csrc/cuda/emulate.cpp",
               "tests/csrc/race.cpp", "-o", str(program)]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if "cannot find" in done.stderr:
        pytest.skip("the compiler has no runtime for ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[-3000:]
