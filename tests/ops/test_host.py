"""The compiled core against the PyTorch preparation, in float64, with every instruction set that runs."""

import re
import subprocess
import sys
import zlib

import pytest
import torch
from cases import inner_cases, inner_layers, unprepared
from helpers import allocated, assert_close, make_layer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.info import info
from ssvdo_kernels.ops import engines, host
from ssvdo_kernels.ops.dispatch import preparation
from ssvdo_kernels.ops.preparation import Rows

if not host.available():
    pytest.skip("the compiled core was not built", allow_module_level=True)
from ssvdo_kernels import _C

ORDER = ("plain", "avx2", "avx512")
BUILDS = ORDER[: ORDER.index(host.instruction_set()) + 1]


def prepare(layer):
    return engines.prepare_one(layer.adapter.source(layer.base()))


@pytest.mark.parametrize("build", BUILDS)
@given(case=inner_cases(), count=st.sampled_from([1, 3]))
def test_inner_part(build, case, count):
    """Against the PyTorch path; sums of up to 200 terms a few deep, of numbers up to |1 / S| = 2."""
    k, l, q, rotation = case[:4]  # noqa: E741
    shape, config, (packed, shift, singular) = inner_layers(case, count)
    got = host.inner_forward(packed, shift, singular, q, shape, config, build)
    d_mixer = [torch.randn(shape.width + l + q, shape.width, dtype=torch.float64) for _ in range(count)]
    arguments = packed, shift, singular, [g[0] for g in got], [g[1] for g in got]
    gradients = host.inner_backward(*arguments, d_mixer, q, shape, config, build=build)
    left, right = torch.randn(7, shape.width + l + q).double(), torch.randn(7, shape.width).double()
    for i in range(count):
        made = unprepared(packed[i], shift[i], singular[i], q, shape, config)
        for name, a, b in zip(("G", "saved", "mixer"), got[i], made.inner_reference(), strict=True):
            assert (a - b).abs().max() <= 1e-13 * (k + l), name  # entries of size 1, and N = 0 at K = 0
        back = made.inner_reference_backward(d_mixer[i])
        for name, a, b in zip(("packed", "scale"), gradients[i], back, strict=True):
            assert_close(name, a, b, 1e-11)
        if rotation == "cayley":
            rows = [left] * count, [right] * count
            few = host.inner_backward(*arguments, d_mixer, q, shape, config, rows, build)
            back = made.inner_reference_backward(Rows(left, right))
            for name, a, b in zip(("packed", "scale"), few[i], back, strict=True):
                assert_close(name, a, b, 1e-11)


@pytest.mark.parametrize("m, n", [(96, 24), (24, 96)])
def test_layers_use_it_and_agree_with_pytorch(m, n):
    assert preparation("auto", torch.device("cpu"))[0] == "host"
    plain = make_layer(m, n, outer_rank=5, backend="reference")
    assert preparation("reference", torch.device("cpu"))[0] == "reference"
    fast = make_layer(m, n, outer_rank=5)
    x = torch.randn(40, n, dtype=torch.float64)
    assert_close("y", fast(x), plain(x), 1e-12)
    for layer in plain, fast:
        layer(x).square().sum().backward()
    for a, b in zip(fast.adapter.trained, plain.adapter.trained, strict=True):
        assert_close("gradient", a.grad, b.grad, 1e-11)


def test_gradcheck():
    layer = make_layer(9, 4, outer_rank=2)
    x = torch.randn(3, 4, dtype=torch.float64)

    def run(*parameters):
        names = ("adapter.inner_rotation", "adapter.inner_scale", "adapter.outer")
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, [p.detach().clone().requires_grad_() for p in layer.adapter.trained])


def test_threads_do_not_change_a_bit():
    """Of what the compiled core makes; PyTorch's products promise nothing of the kind."""
    layer = make_layer(1200, 300, outer_rank=40, dtype=torch.float32, spread=0.01)
    assert host.invertible(layer.adapter.inner_rotation.detach())
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = prepare(layer)
            torch.manual_seed(0)
            ((rotation, scale, _),) = engines.adjoint([made], [torch.randn_like(made.mixer)], [made.columns])
            found.append([made.mixer, rotation, scale])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert all(torch.isfinite(t).all() for t in found[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_bad_pivot_is_an_error_that_names_it(value):
    layer = make_layer(12, 4, outer_rank=3, dtype=torch.float32)
    with torch.no_grad():
        layer.adapter.outer[0, 1] = value
    before = layer.adapter.outer.detach().clone()
    with pytest.raises(ArithmeticError, match=r"layer: Cholesky .* failed at pivot [23] with tau=0\.01"):
        layer(torch.randn(2, 4))
    assert torch.equal(layer.adapter.outer.nan_to_num(7), before.nan_to_num(7))


def test_large_rotations_go_to_lapack():
    layer = make_layer(400, 100, outer_rank=2, inner_ratio=1.0, spread=3.0)
    assert not host.invertible(layer.adapter.inner_rotation.detach())
    made = prepare(layer)
    K = torch.zeros(100, 100, dtype=torch.float64)
    K[tuple(torch.triu_indices(100, 100, 1))] = layer.adapter.inner_rotation.detach()
    eye = torch.eye(100, dtype=torch.float64)
    assert_close("G", made.G, torch.linalg.solve(eye + K - K.mT, eye - K + K.mT), 1e-11)
    assert_close("orthogonal", made.G.mT @ made.G, eye, 1e-12)


INNER = {"k": 4, "l": 2, "q": 0, "width": 4, "rotation": "cayley", "terms": 4, "threads": 1}


@pytest.mark.parametrize("change, message", [
    ({"k": 0}, "k=0"), ({"l": -1}, "l=-1"), ({"q": 5}, "q=5"), ({"width": 3}, "width=3"), ({"terms": 0}, "terms=0"),
    ({"rotation": "euler"}, "rotation='euler'"), ({"threads": 0}, "threads=0"), ({"build": "sse9"}, "build='sse9'"),
    ({"tokens": 3, "left_ld": 1, "right_ld": 4}, "left_ld=1"),
    ({"tokens": 3, "rotation": "neumann"}, "only rotation='cayley'")])  # fmt: skip
def test_inner_arguments_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        _C.inner_backward("float32", [[8] * 10], **(INNER | change))


def test_addresses_and_dtypes_are_checked():
    with pytest.raises(ValueError, match="address 3 of layer 1=0 is out of range; allowed: not null"):
        _C.inner_forward("float32", [[8] * 6, [8, 8, 8, 0, 8, 8]], **INNER)
    with pytest.raises(ValueError, match="addresses of layer 0=4"):
        _C.inner_forward("float32", [[8] * 4], **INNER)
    with pytest.raises(TypeError, match="dtype=float16; allowed: float32, float64"):
        _C.inner_forward("float16", [[8] * 6], **INNER)
    config, shape = SSVDOConfig(inner_ratio=1.0, outer_rank=0), LayerShape(6, 3, False, 3, 0)
    with pytest.raises(ValueError, match=r"allowed: contiguous torch\.float32 on the CPU"):
        host.inner_forward([torch.zeros(3)], [torch.zeros(6)[::2]], [torch.ones(3)], 0, shape, config)
    with pytest.raises(ValueError, match=r"a tensor of inner_forward is torch\.float64"):
        host.inner_forward([torch.zeros(3)], [torch.zeros(3)], [torch.ones(3).double()], 0, shape, config)


def test_without_the_core_the_package_runs():
    """As after an installation with no compiler."""
    code = ("import sys; sys.modules['ssvdo_kernels._C'] = None\n"
            "import torch; from torch import nn; from ssvdo_kernels import SSVDOConfig, SSVDOLinear\n"
            "from ssvdo_kernels.info import info\n"
            "layer = SSVDOLinear.from_linear(nn.Linear(4, 12), SSVDOConfig(outer_rank=2))\n"
            "layer(torch.randn(3, 4)).sum().backward(); print(info()['preparation'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("reference: the compiled core was not built") and not done.stderr


def test_the_interface_s_number_follows_the_functions():
    """Where this fails, raise interface_version in csrc/bindings.h and INTERFACE in host.py, and note the sum here."""
    functions = sorted(name for name in dir(_C) if callable(getattr(_C, name)))
    arguments = [(name, re.findall(r"(\w+): ", getattr(_C, name).__doc__.splitlines()[0])) for name in functions]
    assert (host.INTERFACE, _C.interface, zlib.crc32(repr(arguments).encode())) == (2, 2, 179189682)


def test_a_core_without_openmp_says_so(monkeypatch):
    assert ("OpenMP" if _C.openmp else "built without OpenMP") in preparation("auto", torch.device("cpu"))[1]
    monkeypatch.setattr(_C, "openmp", not _C.openmp)
    assert ("built without OpenMP" in info()["compiled core"]) != _C.openmp


def test_memory_is_given_back():
    layer = SSVDOLinear.from_linear(nn.Linear(128, 512), SSVDOConfig(outer_rank=32))

    def work():
        for _ in range(20):
            made = prepare(layer)
            engines.adjoint([made], [torch.zeros_like(made.mixer)], [torch.zeros_like(made.columns)])

    work()
    grown = []
    for _ in range(3):
        before = allocated()
        work()
        grown.append(allocated() - before)
    assert min(grown) < 16 * 20  # the least that malloc gives out is 32 bytes with its header


def test_a_fingerprint_sees_every_edit_and_nothing_else():
    """Every single byte of sizes around a block, words exchanged, numbers moved from one tensor into the next."""
    for size in (1, 7, 15, 16, 17, 31, 33, 100):
        values = torch.randn(size)
        before = host.fingerprint([values])
        assert host.fingerprint([values.clone()]) == before
        for i in range(size):
            other = values.clone()
            other[i] = torch.nextafter(values[i], torch.tensor(9.0))
            assert host.fingerprint([other]) != before
    pair = torch.arange(64.0)
    swapped = pair.clone()
    swapped[[0, 17]] = pair[[17, 0]]
    assert host.fingerprint([swapped]) != host.fingerprint([pair])
    assert host.fingerprint([pair[:10], pair[10:]]) != host.fingerprint([pair[:11], pair[11:]])
    assert host.fingerprint([pair, pair]) != host.fingerprint([pair])


def test_a_null_address_has_no_fingerprint():
    with pytest.raises(ValueError, match="address=0 is out of range; allowed: not null"):
        host._C.hash([(0, 8)])
    assert host._C.hash([]) == 0 and isinstance(host._C.hash([(0, 0)]), int)


BUILDS = ["plain", "avx2", "avx512"][: ["plain", "avx2", "avx512"].index(host.instruction_set()) + 1]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("right", [True, False])
@given(st.tuples(*[st.integers(1, 90)] * 3), st.integers(1, 3), st.sampled_from([torch.float32, torch.float64]))
def test_products_of_matrices_by_rows_or_by_columns(build, left, right, sizes, count, dtype):
    """Each of `inner` terms is rounded in the product and in the sum: |error| <= (inner + 2) eps |A| |B|."""
    rows, inner, columns = sizes
    draw = torch.randn(count, rows, inner + 2, dtype=dtype)[:, :, 1:-1]  # rows further apart than they are long
    A = [a if left else a.mT.contiguous().mT for a in draw]
    B = [b if right else b.mT.contiguous().mT for b in torch.randn(count, inner, columns, dtype=dtype)]
    for a, b, got in zip(A, B, host.product(A, B, build), strict=True):
        bound = (inner + 2) * torch.finfo(dtype).eps * (a.abs().double() @ b.abs().double())
        want = a.double() @ b.double()
        assert got.dtype == dtype and bool(((got.double() - want).abs() <= bound).all())


def test_products_that_the_core_does_not_make_come_from_pytorch():
    half, none = torch.randn(5, 4).bfloat16(), torch.zeros(0, 4)
    columns = torch.randn(4, 3)
    assert torch.equal(host.product([half], [columns])[0], half.float() @ columns)
    assert host.product([none], [columns])[0].shape == (0, 3)
