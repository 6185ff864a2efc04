"""The CUDA kernels, emulated with threads on the CPU, against PyTorch in float64."""

import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import STORED, inner_cases, inner_layers, lying, outer_cases, outer_layers, product_cases, unprepared
from helpers import assert_close, randomise
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import device, host, outer, preparation

if not host.available():
    pytest.skip("the compiled core was not built", allow_module_level=True)


def ints(*sizes):
    return torch.zeros(*sizes, dtype=torch.int32)


def assert_products(got, matrices, columns):
    """Each sum errs by at most inner u |A| |B|, u = eps / 2, and so does the one in float64 it is compared with."""
    assert len(got) == len(matrices)
    for out, A, B in zip(got, matrices, columns, strict=True):
        A, wide, eps = A.double(), B.double(), torch.finfo(B.dtype).eps
        assert out.dtype == B.dtype and out.shape == (A.shape[0], B.shape[1])
        assert bool(((out.double() - A @ wide).abs() <= A.shape[1] * eps * (A.abs() @ wide.abs())).all())


@given(case=product_cases())
@example((STORED[1], 2, (129, 65, 65), ((False, 3, 1), (True, 1, 3)), 0))
def test_products(case):
    (work, stored), count, (rows, inner, columns), (left, right), seed = case
    torch.manual_seed(seed)
    A = [lying(torch.randn(rows, inner, dtype=torch.float64).to(stored), *left) for _ in range(count)]
    B = [lying(torch.randn(inner, columns, dtype=work), *right) for _ in range(count)]
    assert_products(device.product(A, B), A, B)


def test_products_of_what_lies_in_other_ways(monkeypatch):
    original, launches = device._call, []

    def counting(function, operands, *rest, **sizes):
        launches.append(len(operands[0]))
        original(function, operands, *rest, **sizes)

    monkeypatch.setattr(device, "_call", counting)
    many = torch.randn(6, 14, 10)
    for expected, A in [
        ([3], [many[i, :5, :7] for i in range(3)]),  # parts of several, by rows
        ([3], [many[i, :7, :5].mT for i in range(3)]),  # and by columns
        ([3], [many[i, ::2, 3:10] for i in range(3)]),  # every second row
        ([3], [many[i, ::2, :5].mT for i in range(3)]),
        ([3], [torch.randn(2, 10, 14)[0, ::2, ::2] for _ in range(3)]),  # gaps both ways
        ([3], [torch.randn(1, 7).expand(5, 7) for _ in range(3)]),  # one row five times
        ([3], [torch.randn(1, 1).expand(5, 7) for _ in range(3)]),
        ([1, 1, 1], [torch.randn(5, 7), torch.randn(7, 5).mT, torch.randn(5, 9)[:, :7]]),  # in one list
        ([1, 2], [torch.randn(5, 14)[:, ::2], *many[:2, :5, :7].unbind()]),
    ]:
        B = [torch.randn(7, 4) for _ in A]
        launches.clear()
        assert_products(device.product(A, B), A, B)
        assert launches == expected
        swapped = [b.mT for b in B], [a.mT for a in A]
        assert_products(device.product(*swapped), *swapped)


@pytest.mark.parametrize("sizes", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0), (1, 1, 1), (1, 5, 1), (5, 1, 5)])
@pytest.mark.parametrize("by_rows", [True, False])
def test_products_of_little(sizes, by_rows):
    rows, inner, columns = sizes
    A, B = [torch.randn(rows, inner)] * 2, [torch.randn(inner, columns)] * 2
    if not by_rows:
        A, B = ([t.mT.contiguous().mT for t in many] for many in (A, B))
    assert_products(device.product(A, B), A, B)
    assert device.product([], []) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number_is_exact(dtype):
    """All 2^16 of them, subnormal and not finite ones included."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    (got,) = device.product([numbers], [torch.ones(1, 1)])
    assert torch.equal(got.nan_to_num(7.0), numbers.float().nan_to_num(7.0))
    assert torch.equal(got.isnan(), numbers.isnan())


def test_products_that_are_refused():
    ones = torch.ones
    for A, B, message in [
        ([ones(2, 3)], [ones(2, 3)], "do not fit"),
        ([ones(2, 3)] * 2, [ones(3, 2)], "2 matrices and 1 blocks"),
        ([], [ones(3, 2)], "0 matrices"),
        ([ones(2, 3), ones(2, 4)], [ones(3, 2)] * 2, "matrices of one product are"),
        ([ones(2, 3)] * 2, [ones(3, 2), ones(3, 2).double()], "columns of one product are .*float64"),
        ([ones(1, 2, 3)], [ones(3, 2)], "allowed: two dimensions"),
        ([ones(2, 3)], [ones(3, 2, device="meta")], "matrices on cpu and columns on meta"),
        ([ones(2, 3)], [ones(3, 2).double()], "a product of float32 with float64 has no kernel"),
        ([ones(2, 3).bfloat16()], [ones(3, 2).bfloat16()], "allowed: float32, bfloat16 or float16 with float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            device.product(A, B)


FACTORED = st.sampled_from([1, 2, 7, 20, 64, 77, 78, 130])  # in float64, 78 and more lie outside of shared memory


@settings(max_examples=30)
@given(l=FACTORED, dtype=st.sampled_from([torch.float32, torch.float64]), power=st.floats(-6, 0))
def test_factor(l, dtype, power):  # noqa: E741
    """R^-1 errs by eps times the condition of the Gram matrix (here up to 1e6), a few of them as l grows."""
    L = torch.randn(3, 2 * l, l, dtype=torch.float64) * torch.logspace(0, power / 2, l, dtype=torch.float64)
    gram = (L.mT @ L / l + 10**power * torch.eye(l)).to(dtype)
    close = gram + torch.full_like(gram, math.nan).triu(1)  # which nobody is to read
    apart = lying(close.view(3 * l, l), True, 1).unflatten(0, (3, l))
    before = close.clone()
    X, info = device.factor(close)
    assert info.tolist() == [0] * 3 and info.dtype == torch.int32 and X.dtype == dtype
    assert torch.equal(device.factor(apart)[0], X)
    assert all(torch.equal(t.nan_to_num(7.0), before.nan_to_num(7.0)) for t in (close, apart))
    for one, exact in zip(X, gram.double(), strict=True):
        want = torch.linalg.inv(torch.linalg.cholesky(exact)).mT
        condition = float(torch.linalg.cond(exact))
        assert bool((one.tril(-1) == 0).all())
        assert_close("X", one, want, 8 * condition * torch.finfo(dtype).eps)


@pytest.mark.parametrize("l", [5, 130])
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_bad_pivots(l, value):  # noqa: E741
    gram = torch.eye(l, dtype=torch.float64).repeat(4, 1, 1)
    for layer, pivot in ((0, 1), (1, 3), (3, l)):
        gram[layer, pivot - 1, pivot - 1] = value
    X, info = device.factor(gram)
    assert info.tolist() == [1, 3, 0, l]
    assert torch.equal(X[2], torch.eye(l, dtype=torch.float64))
    assert bool(X[info != 0].isnan().all())
    if value <= 0:
        assert info.tolist() == outer.factor(gram)[1].tolist()


def test_factors_of_nothing():
    for sizes in ((0, 4, 4), (2, 0, 0)):
        X, info = device.factor(torch.zeros(sizes))
        assert X.shape == sizes and info.tolist() == [0] * sizes[0]
    with pytest.raises(TypeError, match="dtype=bfloat16; allowed: float32, float64"):
        device.factor(torch.eye(2, dtype=torch.bfloat16)[None])


@settings(max_examples=40)
@given(case=outer_cases(), count=st.sampled_from([1, 3]))
def test_outer_part(case, count):
    """What outer.py makes of the kernels against what it makes of PyTorch: each step errs by a few eps of its size, and
    R^-1 by the Gram matrix's condition times that."""
    layers = outer_layers(case, count)
    F, X, info = outer.forward(layers, device.product, device.factor)
    want_F, want_X, _ = outer.forward(layers)
    assert info.tolist() == [0] * count
    dF = [torch.randn_like(f) for f in F]
    got = outer.backward(layers, X, F, dF, device.product)
    want = outer.backward(layers, want_X, want_F, dF)
    for i, layer in enumerate(layers):
        condition = 1 + float(torch.linalg.matrix_norm(layer.L, 2)) ** 2 / layer.tau
        tolerance = 64 * condition * 2**-52
        assert_close("X", X[i], want_X[i], tolerance)
        assert_close("F", F[i], want_F[i], tolerance)
        dX_norm = float(torch.linalg.matrix_norm(X[i], 2)) * condition  # the gradient's intermediate terms
        assert float((got[i] - want[i]).norm()) <= 64 * 2**-52 * condition * dX_norm * float(dF[i].norm())


@settings(max_examples=40)
@given(case=inner_cases().filter(lambda case: case[3] != "neumann"), count=st.sampled_from([1, 3]))
def test_inner_part(case, count):
    k, l, q = case[:3]  # noqa: E741
    shape, config, (packed, shift, singular) = inner_layers(case, count)
    info = ints(count)
    got = device.inner_forward(packed, shift, singular, q, shape, config, gate=ints(count), info=info)
    assert info.tolist() == [0] * count
    d_mixer = [torch.randn(shape.width + l + q, shape.width, dtype=torch.float64) for _ in range(count)]
    G, saved = ([g[i] for g in got] for i in range(2))
    gradients = device.inner_backward(packed, shift, singular, G, saved, d_mixer, q, shape, config)
    for i in range(count):
        made = unprepared(packed[i], shift[i], singular[i], q, shape, config)
        for name, a, b in zip(("G", "saved", "mixer"), got[i], made.inner_reference(), strict=True):
            assert (a - b).abs().max() <= 1e-13 * (k + l), name
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
    config, shape = SSVDOConfig(inner_ratio=1.0, outer_rank=0), LayerShape(6, 3, False, 3, 0)
    info = ints(2)
    packed = [torch.tensor([0.1, float("nan"), 0.1]), torch.full((3,), 0.1)]
    device.inner_forward(packed, [torch.zeros(3)] * 2, [torch.ones(3)] * 2, 0, shape, config, gate=ints(2), info=info)
    assert info.tolist() == [1, 0]


def test_more_layers_than_one_launch_holds():
    config, shape = SSVDOConfig(inner_ratio=1.0, outer_rank=1), LayerShape(4, 2, False, 2, 1)
    n = 50
    packed, rest = [torch.full((1,), 0.01 * i) for i in range(n)], ([torch.zeros(2)] * n, [torch.ones(2)] * n)
    got = device.inner_forward(packed, *rest, 0, shape, config, gate=ints(n), info=ints(n))
    for i in (0, 47, 48, 49):
        assert_close("G", got[i][0], device.inner_forward([packed[i]], rest[0][:1], rest[1][:1], 0, shape, config,
                                                          gate=ints(1), info=ints(1))[0][0], 1e-7)  # fmt: skip
    A, B = list(torch.randn(n, 3, 4)), list(torch.randn(n, 4, 2))
    assert_products(device.product(A, B), A, B)
    squares = torch.arange(1.0, n + 1).view(n, 1, 1)
    assert_close("X", device.factor(squares**2 * torch.eye(2))[0], torch.eye(2) / squares, 1e-6)


# -- whole layers and models, with the emulated kernels in the CUDA kernels' place ------------------------------------
@pytest.fixture
def emulated(monkeypatch):
    calls = []
    original = device._call

    def counting(function, operands, stacked, *rest, **sizes):
        calls.append((function, len(operands[0] if operands else stacked[0])))
        return original(function, operands, stacked, *rest, **sizes)

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
    got = [p.grad for p in layer.adapter.trained]
    assert bool(emulated) == (l > 0 or rotation != "neumann")
    adapter = layer.adapter
    plain = SSVDOLinear(linear.weight, linear.bias, adapter.factors, adapter.shape,
                        SSVDOConfig(**{**adapter.config.to_dict(), "backend": "reference"}))  # fmt: skip
    plain.load_state_dict(layer.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "preparation", lambda *_: ("reference", "asked for"))
        plain(x).square().sum().backward()
    for name, a, b in zip(("inner_rotation", "inner_scale", "outer"), got, plain.adapter.trained, strict=False):
        assert_close(name, a, b.grad, 1e-10)


def test_a_group_takes_one_call_each_way(emulated, monkeypatch):
    monkeypatch.setattr("ssvdo_kernels.group.preparation", lambda *_: ("cuda", "emulated"))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 24) if i % 2 == 0 else nn.Linear(24, 8) for i in range(6)))
    apply_ssvdo(model, SSVDOConfig(target_modules="all-linear", outer_rank=3))
    model(torch.randn(5, 8)).sum().backward()
    assert Counter(emulated) == {("device_inner_forward", 3): 2, ("device_inner_backward", 3): 2,
                                 ("device_factor", 3): 2, ("device_product", 3): 2 * (7 + 10)}  # fmt: skip
    assert all(p.grad is not None for _, layer in hosts(model) for p in layer.adapters()[0].trained)


def test_a_bad_pivot_stops_the_backward_and_names_the_layer(emulated):
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Linear(4, 12)}), SSVDOConfig(outer_rank=2))
    layer = model["fc1"]
    with torch.no_grad():
        layer.adapter.outer[0, 0] = float("nan")
    y = layer(torch.randn(3, 4))
    assert bool(y.isnan().any())
    with pytest.raises(ArithmeticError, match=r"fc1: Cholesky .* pivot 1 .*tau=0.01"):
        y.sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="fc1"):  # without a backward, a later forward asks
            layer.adapter.prepared(layer.base()).verify(wait=False)
    with torch.no_grad():
        layer.adapter.outer.zero_()
        layer.adapter.inner_rotation[0] = float("inf")
    with pytest.raises(ArithmeticError, match="fc1: found no inverse"):
        layer(torch.randn(3, 4)).sum().backward()


def test_bad_calls_are_refused():
    from ssvdo_kernels import _C

    where = {"stream": 0, "device": -1}
    product = {"rows": 2, "inner": 3, "columns": 4, "left": (True, 3), "right": (True, 4), "ld": 4, **where}
    for change, message in [({"rows": 0}, "rows=0"), ({"left": (True, 2)}, "leading dimension of left=2 .* >= 3"),
                            ({"left": (False, 1)}, "left=1"), ({"right": (True, 3)}, "right=3"),
                            ({"right": (False, 2)}, "right=2"), ({"ld": 3}, "ld=3")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _C.device_product("float32", "float32", [], **(product | change))
    with pytest.raises(ValueError, match="address 2 of layer 0=0"):
        _C.device_product("float32", "float32", [[8, 8, 0]], **product)
    for change, message in [({"l": 0}, "l=0"), ({"l": 50000}, "l=50000"), ({"count": 70000}, "count=70000")]:
        with pytest.raises(ValueError, match=message):
            _C.device_factor("float32", [8] * 4, **({"l": 1, "count": 1, **where} | change))
    with pytest.raises(ValueError, match="neumann"):
        _C.device_inner_forward("float32", [], [1] * 4, k=2, l=0, q=0, width=2, rotation="neumann", stream=0, device=-1)
    with pytest.raises(ValueError, match="address 1 of layer 0=0"):
        _C.device_inner_forward("float32", [[1, 0, 1, 1, 1, 1]], [1] * 4, k=2, l=0, q=0, width=2, rotation="cayley",
                                stream=0, device=-1)
    with pytest.raises(ValueError, match="allowed: contiguous"):
        device.inner_forward([torch.zeros(3)], [torch.zeros(6)[::2]], [torch.ones(3)], 0, LayerShape(6, 3, False, 3, 0),
                             SSVDOConfig(outer_rank=0), gate=ints(1), info=ints(1))
    A, B, out = torch.ones(2, 3), torch.ones(3, 4), torch.full((2, 6), 7.0)
    _C.device_product("float32", "float32", [[t.data_ptr() for t in (A, B, out)]], **(product | {"ld": 6}))
    assert torch.equal(out, torch.tensor([[3.0] * 4 + [7.0] * 2] * 2))  # nothing is written between rows
    if not device.architectures():
        with pytest.raises(ValueError, match="no CUDA code"):
            _C.device_inner_forward("float32", [[1] * 6], [1] * 4, k=2, l=0, q=0, width=2, rotation="cayley", stream=0,
                                    device=0)


def test_why_a_device_is_not_served():
    assert "no kernels for cpu" in device.obstacle(torch.device("cpu"))


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_the_sanitizers_find_nothing(sanitizer, tmp_path):
    """The kernels with a thread a lane: a race or a missing barrier here is one on a GPU, and so is a bad address."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "race"
    command = ["g++", "-std=c++17", "-O0", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread",
               "csrc/cuda/emulate.cpp", "tests/csrc/race.cpp", "-o", str(program)]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if "cannot find" in done.stderr:
        pytest.skip(f"the compiler has no runtime for {sanitizer}")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[-3000:]
