"""The factorisation, its fixed signs, the projector onto the complement, hostile weights and the cache."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close, error, prepared, three
from torch import nn

import ssvdo_kernels.factorize as module
from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo, reference
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.factorize import DEPARTURE, Factors, departure, factorize, tall_of, thin_svd
from ssvdo_kernels.ops.complement import Projector, inverse_of, project


def shape_of(weight, p=0.5, rank=2):
    return LayerShape.of(*weight.shape, SSVDOConfig(inner_ratio=p, outer_rank=rank))


def draw(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(m, n, span, seed=0):
    """A weight whose singular values fall by `span` orders of magnitude."""
    u, _, vt = torch.linalg.svd(draw(m, n, seed), full_matrices=False)
    return u * torch.logspace(0, -span, min(m, n), dtype=torch.float64) @ vt


@pytest.mark.parametrize("m, n", [(24, 8), (9, 8), (12, 8), (17, 1), (8, 8)])
def test_thin_svd(m, n):
    weight = draw(m, n)
    u, s, v = thin_svd(weight)
    assert_close("A", u * s @ v.mT, weight, 1e-13)
    for name, basis in (("U", u), ("V", v)):
        assert_close(name, basis.mT @ basis, torch.eye(n), 1e-13)
    assert bool((s[1:] <= s[:-1]).all())
    none, again, same = thin_svd(weight, left=False)
    assert none is None
    assert_close("S", again, s, 1e-14)
    assert_close("V", same, v, 1e-13)


def projector(weight, shape):
    """(P of one layer as preparation has it, U of the float64 factorisation)."""
    factors, tall = factorize(weight, shape), tall_of(weight, shape)
    inverse = inverse_of(factors.singular_values, shape.width, factors.null)
    return Projector(tall, factors.basis, inverse, factors.null_basis), thin_svd(tall.double())[0]


def dense(made, like):
    """P as a matrix, from its columns."""
    large = made.tall.shape[0]
    return project([made], [torch.eye(large, dtype=like)], large, large)[0].double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [8, 5])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_the_projector_kills_what_it_should_and_is_one(m, n, rank, dtype):
    """P U = 0, P = P^T, P P = P; columns of U without an inverse are killed too, by N.

    What a pass leaves of U is its own error: an inverse multiplies the roundings of V (to the dtype in which it is kept)
    and of the sums (8 and 24 of them, in that of the work) by at most S_0 / S_i each; two passes of a half type square it.
    N is rounded to the weight's dtype and is applied once a pass.
    """
    weight = (draw(m, n) if rank == 8 else draw(m, rank) @ draw(rank, n, seed=1)).to(dtype)
    shape = shape_of(weight, p=1.0)
    made, u = projector(weight, shape)
    work = made.inverse.dtype
    assert (made.null is None) == (rank == 8)
    P, eye = dense(made, work), torch.eye(24, dtype=torch.float64)
    used = made.inverse[made.inverse > 0].double()
    condition = float(used.max() / used.min())
    left = 8 * condition * torch.finfo(made.basis.dtype).eps
    if made.passes == 2:
        left = left**2 + 8 * condition * torch.finfo(work).eps
    kept = 8 * torch.finfo(dtype).eps if made.null is not None else 0.0
    bound = left + (kept if made.passes == 1 else kept**2 + torch.finfo(work).eps)
    if rank == 8:  # N of a half type is orthonormal to eps alone, as is U where its columns are A v / S of a rounded A
        assert float((P @ u).abs().max()) <= bound
    assert float((P - P.mT).abs().max()) <= bound
    assert float((P @ P - P).abs().max()) <= bound
    assert float(P.trace()) == pytest.approx(16, abs=24 * bound)
    assert float((P - (eye - u @ u.mT)).abs().max()) <= bound


@pytest.mark.parametrize("weight", [draw(24, 8), torch.tensor([[1.0, 1], [1, -1], [1, 1], [1, -1]]).double() + 0.1])
def test_signs_do_not_depend_on_lapack(weight, monkeypatch):
    u, s, v = thin_svd(weight)
    original = torch.linalg.svd

    def flipped(*args, **kwargs):
        a, b, c = original(*args, **kwargs)
        signs = (-1.0) ** torch.arange(len(b)).to(b)
        return -a * signs, b, -c * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    for name, got, want in zip("usv", thin_svd(weight), (u, s, v), strict=True):
        assert_close(name, got, want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_dtypes(m, n, dtype):
    weight = draw(m, n, dtype=dtype)
    factors = factorize(weight, shape_of(weight))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, t in factors.tensors().items():
        assert t.dtype == (wide if name == "singular_values" else dtype) and t.is_contiguous(), name
    exact = factorize(weight.double(), shape_of(weight))
    assert_close("V", factors.inner_basis, exact.inner_basis, torch.finfo(dtype).eps)
    assert_close("S", factors.singular_values, exact.singular_values, torch.finfo(wide).eps)


HOSTILE = {
    "rank 3": lambda: draw(24, 3) @ draw(3, 8, seed=1), "zero": lambda: torch.zeros(24, 8, dtype=torch.float64),
    "zero rows": lambda: torch.cat([torch.zeros(9, 8, dtype=torch.float64), draw(15, 8)]),
    "zero columns": lambda: draw(24, 8) * torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1]).double(),
    "1e-30": lambda: draw(24, 8) * 1e-30, "1e30": lambda: draw(24, 8) * 1e30, "1e-40": lambda: draw(24, 8) * 1e-40,
    "repeated": lambda: torch.linalg.qr(draw(24, 8)).Q.contiguous(), "one huge": lambda: _one_huge(),
}  # fmt: skip


def _one_huge():
    weight = draw(24, 8)
    weight[3, 3] = 1e6
    return weight


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_give_the_reference_output(kind, dtype, transposed):
    weight = HOSTILE[kind]().to(dtype)
    linear = torch.nn.Linear(24 if transposed else 8, 8 if transposed else 24, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight.mT if transposed else weight)
    layer = SSVDOLinear.from_linear(linear, SSVDOConfig(inner_ratio=1.0, outer_rank=3))
    # dS of the order of S: far above it, x' loses digits (docs/method.md); of the order of max |W| in the null space
    change = layer.singular_values.detach().clone()
    if q := layer.null_basis.shape[1]:
        change[-q:] = float(weight.abs().max()) or 1.0
    with torch.no_grad():
        layer.inner_rotation.normal_(0, 0.1)
        layer.inner_scale.copy_(0.1 * change * torch.randn(8))
        layer.outer.normal_(0, 0.1)
    x = torch.randn(5, layer.in_features, dtype=dtype)
    factors = [t.double() for t in (layer.inner_basis, layer.singular_values)]
    u, s, v = thin_svd((layer.weight.mT if transposed else layer.weight).double())
    assert_close("V", factors[0], v, 1e-6)
    parameters = [p.detach().double() for p in layer.adapter_parameters]
    want = reference.adapted_weight(
        layer.weight.detach().double(), *parameters, config=layer.config, factors=(u, s, v, reference.complement(u)))
    got, info = layer(x).detach().double(), torch.finfo(dtype)
    # relative to |W'| |x|: a component far below the largest carries rounding of the size eps * largest; below the
    # smallest normal number the spacing is absolute
    bound = 64 * info.eps * (float(want.norm()) * float(x.norm()) + info.tiny * got.numel())
    assert float((got - x.double() @ want.mT).norm()) <= bound


@pytest.mark.parametrize("dtype, least", [
    (torch.float64, 2.0**-26), (torch.float32, 2.0**-11.5), (torch.float16, 1 / 32), (torch.bfloat16, 1 / 32)])
def test_small_singular_values_are_carried_by_null_columns(dtype, least):
    """S_i <= min(sqrt(eps), 1/32) S_0 is not divided by."""
    singular = torch.tensor([1.0, 0.5, 1.1 * least, 0.9 * least], dtype=torch.float64)
    weight = torch.cat([torch.diag(singular), torch.zeros(4, 4)]).to(dtype)
    assert factorize(weight, shape_of(weight, p=1.0)).null_basis.shape == (8, 1)
    assert factorize(weight, shape_of(weight, p=0.5)).null_basis.shape == (8, 0)


def test_rank_deficiency_is_carried_by_null_columns():
    weight = HOSTILE["rank 3"]()
    assert factorize(weight, shape_of(weight, p=1.0)).null_basis.shape == (24, 5)
    assert factorize(weight, shape_of(weight, p=0.25)).null_basis.shape == (24, 0)


@pytest.mark.parametrize("make, kind, words", [
    (lambda: draw(24, 8).fill_(float("nan")), ValueError, "fc1.weight has 192 non-finite"),
    (lambda: draw(24, 8).index_fill(0, torch.tensor([2]), float("inf")), ValueError, "8 non-finite"),
    (lambda: torch.empty(24, 8, device="meta"), ValueError, "fc1.weight is on the meta device"),
    (lambda: torch.ones(24, 8, dtype=torch.int8), TypeError, "fc1.weight has dtype torch.int8"),
    (lambda: draw(24, 8).to(torch.float8_e4m3fn), TypeError, "float8"),
])
def test_unfit_weights_are_named(make, kind, words):
    weight = make()
    with pytest.raises(kind, match=words):
        factorize(weight, shape_of(weight), name="fc1.weight")


def test_cache_is_keyed_by_content_and_sizes(tmp_path, monkeypatch):
    weight = draw(24, 8, dtype=torch.bfloat16)
    first = factorize(weight, shape_of(weight), cache_dir=tmp_path)

    def refuse(*_):
        raise AssertionError("factorised again")

    monkeypatch.setattr(module, "thin_svd", refuse)
    again = factorize(weight.clone(), shape_of(weight), cache_dir=tmp_path)
    for name, tensor in first.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    other = weight.clone()
    other[0, 0] += 1
    same = shape_of(weight)
    for changed, shape in ((other, same), (weight.float(), same), (weight, shape_of(weight, rank=3)),
                           (weight, shape_of(weight, p=1))):
        with pytest.raises(AssertionError, match="factorised again"):
            factorize(changed, shape, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_cache_file_is_an_error_that_names_it(tmp_path):
    weight = draw(24, 8)
    factorize(weight, shape_of(weight), cache_dir=tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{file.name}.*delete it"):
        factorize(weight, shape_of(weight), cache_dir=tmp_path)


def test_two_runs_agree():
    weight = draw(24, 8)
    a, b = factorize(weight, shape_of(weight)), factorize(weight, shape_of(weight))
    assert all(error(x, y) == 0 for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


def test_a_weight_of_another_kind_is_refused_with_the_remedy():
    class Quantised(torch.Tensor):
        """What torchao puts into an nn.Linear."""

    linear = nn.Linear(4, 12)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)
    model = nn.ModuleDict({"fc1": linear})
    with pytest.raises(TypeError, match=r"fc1\.weight is a .*Quantised; allowed: a plain torch\.Tensor .*dequantised"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=1))
    assert model["fc1"] is linear


def test_torchao_weights_are_refused():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.ModuleDict({"fc1": nn.Linear(32, 96)})
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match="allowed: a plain torch"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=1))


@pytest.mark.parametrize("m, n, l", [(12, 4, 0), (4, 12, 3), (8, 8, 0)])
def test_every_factor_may_be_viewed_as_bytes(m, n, l):  # noqa: E741
    """Empty ones too: DeepSpeed does so with every parameter."""
    shape = LayerShape.of(m, n, SSVDOConfig(outer_rank=l))
    for tensor in factorize(torch.randn(m, n), shape).tensors().values():
        assert tensor.stride(-1) == 1 and tensor.view(torch.uint8).shape[-1] == 4 * tensor.shape[-1]
