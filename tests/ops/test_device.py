"""The CUDA kernels, emulated with threads on the CPU, against PyTorch in float64."""

import math
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import inner_cases, inner_layers, lying, outer_cases, outer_layers, unprepared
from helpers import assert_close, make_layer, randomise
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import device, engines, host, outer, preparation
from ssvdo_kernels.ops.base import DenseBase
from ssvdo_kernels.ops.complement import Projector
from ssvdo_kernels.ops.outer import Outer

if not host.available():
    pytest.skip("the compiled core was not built", allow_module_level=True)


def ints(*sizes):
    return torch.zeros(*sizes, dtype=torch.int32)


def factored(many):
    """`device.outer_forward` of a group whose factors all exist."""
    info = ints(len(many))
    F, X = device.outer_forward(many, gate=ints(2, len(many)), info=info)
    assert info.tolist() == [0] * len(many)
    return F, X


@settings(max_examples=40)
@given(case=outer_cases(), count=st.sampled_from([1, 3]))
@example((70, 60, 65, "normal", 0.1, "rotation", 0), 2)  # several blocks of the factor
@example((130, 1570, 3, "normal", 0.1, "rotation", 0), 1)  # three teams share two tiles, and one
@example((900, 20, 3, "normal", 0.1, "rotation", 0), 1)  # and of which one term is done by the first
@example((26, 1, 1, "normal", 1.0, "rotation", 0), 1)  # U_l' is almost U_l
def test_outer_part(case, count):
    """What the kernels make against PyTorch: each step errs by a few eps of its size, and R^-1 by the Gram matrix's
    condition times that."""
    layers = outer_layers(case, count)
    F, X = factored(layers)
    want_F, want_X, _ = outer.forward(layers)
    dF = [torch.randn_like(f) for f in F]
    got = device.outer_backward(layers, X, F, dF)
    want = outer.backward(layers, want_X, want_F, dF)
    for i, layer in enumerate(layers):
        condition = 1 + float(torch.linalg.matrix_norm(layer.L, 2)) ** 2 / layer.tau
        tolerance = 64 * condition * 2**-52
        assert bool((X[i].tril(-1) == 0).all())
        assert_close("X", X[i], want_X[i], tolerance)
        terms = want_F[i] if layer.U is None else torch.cat([want_F[i], layer.U])  # F has what U_l' and U_l differ by
        assert_close("F", F[i], want_F[i], tolerance, terms)
        dX_norm = float(torch.linalg.matrix_norm(X[i], 2)) * condition  # the gradient's intermediate terms
        assert float((got[i] - want[i]).norm()) <= 64 * 2**-52 * condition * dX_norm * float(dF[i].norm())


def stored_as(layer, work, weight, basis, by_rows=True, pad=0):
    """The same layer in other dtypes, its weight lying otherwise."""
    p, half = layer.projector, weight if weight.itemsize == 2 else work
    base = DenseBase(lying(p.base.weight.to(weight), by_rows, pad))
    null = None if p.null is None else p.null.to(half).contiguous()
    projector = Projector(base, False, p.basis.to(basis), p.singular.to(work), p.width, null, p.large)
    U = None if layer.U is None else layer.U.to(half)
    return Outer(layer.outer.to(work), layer.scale, U, projector, layer.tau)


@pytest.mark.parametrize("weight, basis", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
])  # fmt: skip
def test_products_of_pieces_are_as_exact_as_float32(weight, basis):
    """The kernels' error against float64 is no more than a small multiple of PyTorch's own in float32."""
    work, wide = torch.float32, torch.float64
    kept = [stored_as(one, wide, weight, basis) for one in outer_layers((70, 800, 33, "normal", 0.1, "rotation", 1), 2)]
    own = [stored_as(one, work, weight, basis) for one in kept]
    truth = [stored_as(one, wide, weight, basis if basis != work else wide) for one in own]  # alike but for sums
    F, X, _ = outer.forward(truth)
    dF = [torch.randn_like(f).float() for f in F]
    want = [*F, *X, *outer.backward(truth, X, F, [d.double() for d in dF])]
    made_F, made_X, _ = outer.forward(own)
    plain = [*made_F, *made_X, *outer.backward(own, made_X, made_F, dF)]
    for by_rows, pad in ((True, 0), (True, 3), (False, 0)):  # whole vectors, single numbers, transposed
        lies = [stored_as(one, work, weight, basis, by_rows, pad) for one in own]
        got_F, got_X = factored(lies)
        got = [*got_F, *got_X, *device.outer_backward(lies, got_X, got_F, dF)]
        for a, b, exact in zip(got, plain, want, strict=True):
            assert a.dtype == work
            error, theirs = ((t - exact).norm() / exact.norm() for t in (a, b))
            assert float(error) <= 2 * float(theirs) + 4 * torch.finfo(work).eps


@pytest.mark.parametrize("weakest", [1.0, 0.3, 2e-3])
def test_coarse_products(weakest):
    """A pass in two pieces of bfloat16, 2^-16 of a number, adds below a 64th of what V in half precision, 2^-8, leaves
    of U, however weak components are."""
    (layer,) = outer_layers((64, 200, 8, "normal", 0.1, "rotation", 1), 1)
    p = layer.projector
    S = torch.logspace(0, math.log10(weakest), 64, dtype=torch.float64)
    weight = (p.base.weight @ (p.basis / p.singular * S) @ p.basis.mT).bfloat16()
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    layer = replace(layer, U=U[:, :8].bfloat16().double(), projector=replace(
        p, base=DenseBase(weight.double()), basis=Vh.mT.contiguous(), singular=S, null=None))
    half = stored_as(layer, torch.float64, torch.bfloat16, torch.bfloat16)
    own = stored_as(layer, torch.float32, torch.bfloat16, torch.bfloat16)
    exact, F, got = (made([one])[0] for made, one in ((outer.forward, layer), (outer.forward, half), (factored, own)))
    dF = [torch.randn_like(got[0])]
    X = factored([own])[1]
    gradient = device.outer_backward([own], X, got, dF)
    back = [outer.backward([one], X, F, [dF[0].double()]) for one in (layer, half)]
    for truth, kept, made in ((exact, F, got), (*back, gradient)):
        left, added = (kept[0] - truth[0]).norm(), (made[0] - kept[0]).norm()
        assert float(added) <= float(left) / 64 + 4 * torch.finfo(torch.float32).eps * float(truth[0].norm())


def test_weights_that_lie_in_other_ways(monkeypatch):
    """Layers that differ, and what has no dense lines, are copied first; rows of F and its gradient may lie apart."""
    layers = outer_layers((5, 9, 3, "normal", 0.1, "rotation", 0), 3)
    want, X = factored(layers)
    gappy = layers[1].projector.base.weight.repeat_interleave(2, 1)[:, ::2]
    for i, weight in ((0, layers[0].projector.base.weight.mT.contiguous().mT), (1, gappy)):
        object.__setattr__(layers[i].projector, "base", DenseBase(weight))
    for a, b in zip(factored(layers)[0], want, strict=True):
        assert torch.equal(a, b)
    dF = [torch.randn_like(f) for f in want]
    gradients = device.outer_backward(layers, X, want, dF)
    apart = [[torch.cat([t, t], 1)[:, :3] for t in many] for many in (want, dF)]
    for a, b in zip(device.outer_backward(layers, X, *apart), gradients, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(device.outer_backward(layers, X, want, [d.mT.contiguous().mT for d in dF]), gradients,
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("l", [5, 70])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_pivots(l, value):  # noqa: E741
    layers = outer_layers((l, l, l, "normal", 0.1, "additive", 0), 3)
    layers[1].outer[0, l - 1] = value
    info = ints(3)
    F, X = device.outer_forward(layers, gate=ints(2, 3), info=info)
    # W0 makes all of Z's rows of what one row has, so that the Gram matrix loses one row and column
    assert info.tolist() == [0, l, 0]
    assert bool(X[1].isnan().all()) and bool(F[1].isnan().all()) and all(bool(X[i].isfinite().all()) for i in (0, 2))


def test_a_gram_matrix_that_is_not_positive():
    """tau I alone, so that the pivots are known: R^-T = I / sqrt(tau)."""
    layer = outer_layers((70, 70, 66, "zero", 0.25, "additive", 0), 1)[0]
    assert_close("X", factored([layer])[1][0], 2 * torch.eye(66), 1e-15)
    info = ints(1)
    device.outer_forward([replace(layer, tau=-0.25)], gate=ints(2, 1), info=info)
    assert info.tolist() == [1]


def test_dtypes_that_have_no_kernel():
    (layer,) = outer_layers((5, 9, 3, "normal", 0.1, "rotation", 0), 1)
    half = replace(layer.projector, base=DenseBase(layer.projector.base.weight.bfloat16()))
    with pytest.raises(ValueError, match="a matrix of bfloat16 beside float64 has no kernel; allowed: float32, bfl"):
        factored([replace(layer, projector=half)])


def test_tiles(tmp_path):
    """Products of every kind of piece, layout and alignment within the error that tests/csrc/tiles.cpp derives."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "tiles"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "tests/csrc/tiles.cpp", "-o", str(program)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr


@settings(max_examples=40)
@given(case=inner_cases().filter(lambda case: case[3] != "neumann"), count=st.sampled_from([1, 3]))
def test_inner_part(case, count):
    k, l, q = case[:3]  # noqa: E741
    shape, config, (packed, shift, singular) = inner_layers(case, count)
    info = ints(count)
    got = device.inner_forward(packed, shift, singular, q, shape, config, gate=ints(count), info=info)
    assert info.tolist() == [0] * count
    d_mixer = [torch.randn(shape.width + l + q, shape.width, dtype=torch.float64) for _ in range(count)]
    saved = [g[0] for g in got]
    gradients = device.inner_backward(packed, shift, singular, saved, d_mixer, q, shape, config)
    for i in range(count):
        made = unprepared(packed[i], shift[i], singular[i], q, shape, config)
        for name, a, b in zip(("saved", "mixer"), got[i], made.inner_reference()[1:], strict=True):
            assert (a - b).abs().max() <= 1e-13 * (k + l), name
        back = made.inner_reference_backward(d_mixer[i])
        for name, a, b in zip(("packed", "shift"), gradients[i], back, strict=True):
            assert_close(name, a, b, 1e-11)


@pytest.mark.parametrize("size", [0.1, 10.0, 300.0])
@pytest.mark.parametrize("k", [50, 150, 200])  # from 200 on (emulated) probes are asked first
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
    ((saved, mixer),) = device.inner_forward([packed * factor], [torch.zeros(k)], [torch.ones(k)], 0, shape, config,
                                            gate=ints(1), info=info)  # fmt: skip
    assert info.tolist() == [0]
    A = torch.eye(k, dtype=torch.float64) + factor * (K - K.mT).double()
    error = float(torch.linalg.matrix_norm(saved.double() - torch.linalg.inv(A), 2))
    eps = torch.finfo(torch.float32).eps
    assert error <= (16 if size < 100 else 4) * eps * (1 + size)  # unmended at 300, k = 200: 13
    G = 2 * saved - torch.eye(k)
    assert torch.equal(mixer, G - torch.eye(k))
    assert float((G.double() @ G.double().mT - torch.eye(k)).abs().max()) <= 64 * eps * (1 + size)


@pytest.mark.parametrize("k", [3, 200])
def test_what_has_no_answer_is_reported(k):
    config, shape = SSVDOConfig(inner_ratio=1.0, outer_rank=0), LayerShape(2 * k, k, False, k, 0)
    info = ints(2)
    packed = [torch.full((k * (k - 1) // 2,), 0.1 / k) for _ in range(2)]
    packed[0][1] = float("nan")
    device.inner_forward(packed, [torch.zeros(k)] * 2, [torch.ones(k)] * 2, 0, shape, config, gate=ints(2), info=info)
    assert info.tolist() == [1, 0]


def test_more_layers_than_one_launch_holds():
    config, shape = SSVDOConfig(inner_ratio=1.0, outer_rank=1), LayerShape(4, 2, False, 2, 1)
    n = device._C.max_layers + 2
    packed, rest = [torch.full((1,), 0.01 * i) for i in range(n)], ([torch.zeros(2)] * n, [torch.ones(2)] * n)
    got = device.inner_forward(packed, *rest, 0, shape, config, gate=ints(n), info=ints(n))
    layers = outer_layers((3, 4, 2, "normal", 0.1, "rotation", 0), n)
    F, X = factored(layers)
    back = device.outer_backward(layers, X, F, F)
    for i in (0, n - 3, n - 2, n - 1):
        assert_close("saved", got[i][0], device.inner_forward([packed[i]], rest[0][:1], rest[1][:1], 0, shape, config,
                                                              gate=ints(1), info=ints(1))[0][0], 1e-7)  # fmt: skip
        (one,), alone = factored(layers[i : i + 1])
        assert torch.equal(F[i], one) and torch.equal(X[i], alone[0])
        assert torch.equal(back[i], device.outer_backward(layers[i : i + 1], alone, [one], [one])[0])


# -- whole layers and models, with the emulated kernels in the CUDA kernels' place ------------------------------------
@pytest.fixture
def emulated(monkeypatch):
    calls = []
    original = device._call

    def counting(function, operands, stacked, *rest, **sizes):
        calls.append((function, len(operands[0])))
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


def test_a_group_takes_one_call_each_way(emulated):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 24) if i % 2 == 0 else nn.Linear(24, 8) for i in range(6)))
    apply_ssvdo(model, SSVDOConfig(target_modules="all-linear", outer_rank=3))
    model(torch.randn(5, 8)).sum().backward()
    assert Counter(emulated) == {(f"device_{part}_{way}", 3): 2 for part in ("inner", "outer")
                                 for way in ("forward", "backward")}  # fmt: skip
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
    sizes = {"large": 8, "c": 5, "d": 3, "l": 2, "width": 3, "null": 0, "passes": 1, "by_rows": True, "additive": False,
             "tall_ld": 3, "basis_ld": 3, "F_ld": 2, "dF_ld": 2, "room": 0, "scale": 1.0, "tau": 0.1, "least": 0.0,
             "tall": "float32", "basis": "float32", "rest": "float32", **where}  # fmt: skip
    for change, message in [({"l": 0}, "l=0"), ({"l": 4}, "d=3 .* >= 4"), ({"c": 9}, "large=8"),
                            ({"passes": 0}, "passes=0"), ({"tall_ld": 2}, "tall_ld=2"),
                            ({"by_rows": False}, "tall_ld=3 .* >= 8"),
                            ({"basis_ld": 2}, "basis_ld=2"), ({"F_ld": 1}, "F_ld=1"), ({"room": -1}, "room=-1"),
                            ({"tall_ld": 2**31, "large": 8}, "elements of tall")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _C.device_outer_forward("float32", [], [8] * 3, **(sizes | change))
    with pytest.raises(ValueError, match="address 2 of layer 0=0"):
        _C.device_outer_forward("float32", [[8, 8, 0, 0, 8, 8, 8, 8]], [8] * 3, **sizes)
    with pytest.raises(ValueError, match="address 9 of layer 0=0"):
        _C.device_outer_backward("float32", [[8] * 9 + [0]], [8] * 2, **sizes)
    with pytest.raises(TypeError, match="dtype=int8; allowed: float32, float64"):
        _C.device_outer_forward("int8", [], [8] * 3, **sizes)
    with pytest.raises(ValueError, match="neumann"):
        _C.device_inner_forward("float32", [], [1] * 4, k=2, l=0, q=0, width=2, rotation="neumann", stream=0, device=-1)
    with pytest.raises(ValueError, match="address 1 of layer 0=0"):
        _C.device_inner_forward("float32", [[1, 0, 1, 1, 1]], [1] * 4, k=2, l=0, q=0, width=2, rotation="cayley",
                                stream=0, device=-1)
    with pytest.raises(ValueError, match="allowed: contiguous"):
        device.inner_forward([torch.zeros(3)], [torch.zeros(6)[::2]], [torch.ones(3)], 0, LayerShape(6, 3, False, 3, 0),
                             SSVDOConfig(outer_rank=0), gate=ints(1), info=ints(1))
    if not device.architectures():
        with pytest.raises(ValueError, match="no CUDA code"):
            _C.device_inner_forward("float32", [[1] * 5], [1] * 4, k=2, l=0, q=0, width=2, rotation="cayley", stream=0,
                                    device=0)


def test_why_a_device_is_not_served():
    assert "no kernels for cpu" in device.obstacle(torch.device("cpu"))


@pytest.mark.parametrize("built, capability, served", [
    ("80 86 89 90a 100 120", (8, 0), True), ("80 86 89 90a 100 120", (8, 7), True), ("90a", (9, 0), True),
    ("90a", (10, 0), False), ("90a", (8, 0), False), ("80", (9, 0), True), ("80-real", (9, 0), False),
    ("86", (8, 0), False),
    ("100-real", (10, 3), True), ("80-real 120", (12, 1), True), ("120", (9, 0), False), ("80 90a", (10, 0), True),
])  # fmt: skip
def test_which_gpus_a_build_serves(built, capability, served):
    """Machine code serves its major version from its minor on, "a" its own alone; the last one without a letter is
    there as PTX, too, for all that are newer."""
    assert device.serves(built, capability) is served


def test_a_build_for_other_gpus_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(device, "architectures", lambda: "90a")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(device._C, "device_architectures", lambda: "90a", raising=False)
    said = device.obstacle(torch.device("cuda"))
    assert "built for sm_90a, which does not run on sm_80: install again with SSVDO_CUDA_ARCHS=80" in said


class Work(TorchDispatchMode):
    """The operations that would be launches on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ("empty", "empty_like", "new_empty", "detach"):
            self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("count", [2, 5])
def test_pytorch_does_nothing_layer_by_layer(emulated, count):
    """What is launched beside the kernels, whatever the number of layers."""
    layers = [make_layer(24, 8, outer_rank=3, dtype=torch.float32) for _ in range(count)]
    sources = [replace(layer.adapter.source(layer.base()), origin=None) for layer in layers]  # checked once
    with Work() as forward:
        prepared = [p for p in engines.prepare(sources) if p is not None]
    d_mixer, dF = ([torch.randn_like(t) for t in many] for many in zip(*((p.mixer, p.columns) for p in prepared),
                                                                      strict=True))  # fmt: skip
    with Work() as backward:
        engines.adjoint(prepared, d_mixer, dF)
    assert sorted(forward.names) == ["stack", "zeros"] and backward.names == ["zeros"]


def test_a_bad_pivot_stops_the_backward_of_a_compiled_layer(emulated):
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Linear(4, 12)}), SSVDOConfig(outer_rank=2))
    with torch.no_grad():
        model["fc1"].adapter.outer[0, 0] = float("nan")
    y = torch.compile(model["fc1"], backend="aot_eager", fullgraph=True)(torch.randn(3, 4))
    with pytest.raises(ArithmeticError, match=r"fc1: Cholesky .* pivot 1"):
        y.sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_the_sanitizers_find_nothing(sanitizer, tmp_path):
    """The kernels with a thread a lane: a race or a missing barrier here is one on a GPU, and so is a bad address."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "race"
    command = ["g++", "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread",
               "csrc/cuda/emulate.cpp", "tests/csrc/race.cpp", "-o", str(program)]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if "cannot find" in done.stderr:
        pytest.skip(f"the compiler has no runtime for {sanitizer}")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[-3000:]
