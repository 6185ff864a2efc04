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
from ssvdo_kernels.ops.base import DenseBase
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


def projector(weight, factors, shape):
    """P of one layer, as preparation has it."""
    return Projector(DenseBase(weight), shape.transposed, factors.basis, factors.singular_values, shape.width,
                     factors.null_basis, shape.large)  # fmt: skip


def as_matrix(made, large):
    """P, from its columns."""
    return project([made], [torch.eye(large, dtype=made.inverse.dtype)], large, large)[0].double()


def condition(inverse):
    """S_0 / S_i, S_i the smallest value that is divided by."""
    used = inverse[inverse > 0].double()
    return float(used.max() / used.min())


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_the_projector_is_symmetric_and_idempotent_and_kills_u(m, n, rank, dtype):
    """The columns of U that are divided by, and N as it is stored, are killed; the rest of the complement stays.

    V as stored is V + D, |D|_2 <= |D|_F <= eps sqrt(d) / 2, so that A V S^-1 = U + E with |E|_2 <= e = S_0 / S_i times
    that, and a pass leaves |U^T P U| = |E' + E'^T + E'^T E'| <= 2 e + e^2, E' = U^T E; N, rounded itself, leaves as
    much with 1 for S_0 / S_i. A second pass squares what the first leaves. Sums of 24 products err by 24 eps S_0 / S_i.
    """
    weight = (draw(m, n) if rank is None else draw(m, rank) @ draw(rank, n, seed=1)).to(dtype)
    shape = shape_of(weight, p=1.0)
    factors = factorize(weight, shape)
    made, (u, _, _) = projector(weight, factors, shape), thin_svd(tall_of(weight, shape).double())
    work, half = made.inverse.dtype, factors.basis.dtype in HALF
    assert factors.basis.dtype == dtype and made.passes == 1 + half and factors.null == (0 if rank is None else 3)
    P, killed = as_matrix(made, 24), u[:, made.inverse > 0]
    if made.null is not None:
        killed = torch.cat([killed, made.null.double()], 1)
    e = condition(made.inverse) * torch.finfo(factors.basis.dtype).eps * 8**0.5 / 2
    bound = (2 * e + e**2) ** made.passes + 24 * torch.finfo(work).eps * condition(made.inverse)
    assert float(torch.linalg.matrix_norm(P @ killed, 2)) <= bound
    assert float(torch.linalg.matrix_norm(P @ P - P, 2)) <= bound
    assert float(torch.linalg.matrix_norm(P - P.mT, 2)) <= 24 * torch.finfo(work).eps * condition(made.inverse)
    rest = torch.linalg.qr(killed, mode="complete").Q[:, killed.shape[1] :]
    assert_close("the complement", P @ rest, rest, bound)


@pytest.mark.parametrize("first, rows", [(24, 24), (16, 24), (24, 16), (16, 16), (3, 20), (20, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_the_projector_is_its_equation(m, n, rank, dtype, first, rows):
    """P z = z - A V S^-2 V^T A^T z - N N^T z, twice where V is of a half type, of the tensors as they are stored.

    Each of four products sums 24 numbers, at most, that are multiplied by no more than S_0 / S_i on the way.
    """
    weight = (draw(m, n) if rank is None else draw(m, rank) @ draw(rank, n, seed=1)).to(dtype)
    shape = shape_of(weight, p=1.0)
    made = projector(weight, factorize(weight, shape), shape)
    B = made.tall.double() @ made.basis.double() * made.inverse.double()
    P = torch.eye(24, dtype=torch.float64) - B @ B.mT
    if made.null is not None:
        P -= made.null.double() @ made.null.double().mT
    P = P @ P if made.basis.dtype in HALF else P
    work, z = made.inverse.dtype, draw(first, 3, seed=2)
    got = project([made], [z.to(work)], first, rows)[0]
    assert got.dtype == work
    want = P[24 - rows :, 24 - first :] @ z.to(work).double()
    assert_close("P z", got, want, 4 * 24 * torch.finfo(work).eps * condition(made.inverse), z)


def test_weak_components_beyond_the_adapted_ones_are_left_alone():
    weight = spread(24, 8, 6)
    shape = shape_of(weight, p=0.25)  # width 2
    made, (u, s, _) = projector(weight, factorize(weight, shape), shape), thin_svd(weight)
    P, strong = as_matrix(made, 24), s > s[0] * 1e-3
    assert 2 < int(strong.sum()) < 8 and torch.equal(strong, made.inverse > 0)
    assert_close("killed", P @ u[:, strong], torch.zeros(24, int(strong.sum())), 1e-12)
    assert_close("left", P @ u[:, ~strong], u[:, ~strong], 1e-12)


SPANS = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24), (96, 32), (64, 80)])
def test_half_precision_v_is_kept_only_where_u_stays_orthonormal(m, n, dtype):
    """By no more than `DEPARTURE`; float32 V leaves 2 eps S_0 / S_i of its own, which the sums over A cost."""
    kept = set()
    for span in SPANS:
        weight = spread(m, n, span).to(dtype)
        shape = shape_of(weight, rank=3)
        factors = factorize(weight, shape)
        found = departure(weight, factors, shape)
        halved = departure(weight, replace(factors, basis=factors.basis.to(dtype)), shape)
        assert factors.basis.dtype == (dtype if halved <= DEPARTURE else torch.float32), span
        made = projector(weight, factors, shape)
        own = 2 * torch.finfo(torch.float32).eps * condition(made.inverse)
        assert found <= DEPARTURE if factors.basis.dtype == dtype else found <= max(DEPARTURE, own)
        assert made.passes == (2 if factors.basis.dtype == dtype else 1)
        kept.add(factors.basis.dtype)
    assert kept == {dtype, torch.float32}  # the milder half and the ill-conditioned


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("m, n, l", [(96, 32, 8), (32, 96, 8), (256, 64, 16)])
def test_u_stays_orthonormal_in_a_layer_of_half_precision(m, n, l, dtype):  # noqa: E741
    """Turned by 0.3 rad and more, [C; Q] is orthonormal to the sums of float32, and Q leans on no column of U by more
    than `DEPARTURE`, which is of 8 vectors; the largest of more numbers of one size is less than 4 times as large."""
    torch.manual_seed(0)
    linear = nn.Linear(n, m, bias=False).to(dtype)
    layer = SSVDOLinear.from_linear(linear, SSVDOConfig(outer_rank=l, init_angle=0.3))
    assert layer.adapter.basis.dtype == dtype
    made, (u, _, _) = prepared(layer), thin_svd(tall_of(linear.weight.detach(), layer.adapter.shape).double())
    Q, C = made.Q.double(), made.X.double() * layer.adapter.config.tau**0.5
    assert float(torch.linalg.matrix_norm(Q, 2)) > 0.295  # sin 0.3
    assert float((u.mT @ Q).abs().max()) <= 4 * DEPARTURE
    turned = torch.cat([u[:, :l] @ C + Q, u[:, l:]], 1)
    gram = turned.mT @ turned - torch.eye(n if m > n else m)
    assert float(gram.abs().max()) <= 4 * DEPARTURE + max(m, n) * torch.finfo(torch.float32).eps


def test_a_departure_is_of_what_is_there():
    weight = draw(24, 8, dtype=torch.bfloat16)
    shape = shape_of(weight)
    factors = factorize(weight, shape)
    crude = replace(factors, basis=(factors.basis.float() * (1 + 0.1 * draw(8, 8).float())))
    assert departure(weight, crude, shape) > 1e-2 > departure(weight, factors, shape)
    assert departure(weight, factors, shape_of(weight, rank=0)) == 0.0


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
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_dtypes_and_sizes(m, n, rank, dtype):
    weight = draw(m, n, dtype=dtype)
    factors = factorize(weight, shape_of(weight, rank=rank))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = {"basis": (8, 8 if rank else 4), "singular_values": (8 if rank else 4,), "outer_basis": (24, 2)}
    assert {name: tuple(t.shape) for name, t in factors.tensors().items()} == {
        name: size for name, size in sizes.items() if rank or name != "outer_basis"}
    for name, t in factors.tensors().items():
        assert t.dtype == (wide if name == "singular_values" else dtype) and t.is_contiguous(), name
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size(), name  # nothing larger is kept alive
    exact = factorize(weight.double(), shape_of(weight, rank=rank))
    assert_close("V", factors.basis, exact.basis, torch.finfo(dtype).eps)
    assert_close("S", factors.singular_values, exact.singular_values, torch.finfo(wide).eps)
    if rank:
        assert_close("U_l", factors.outer_basis, exact.outer_basis, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("span", [0, 2, 5, 9, 14])
def test_outer_vectors_are_exact_whatever_the_singular_values(span, dtype):
    """A v_i / S_i would err by 1e-16 S_0 / S_i."""
    weight = spread(24, 8, span).to(dtype)
    u = thin_svd(weight.double())[0]
    factors = factorize(weight, shape_of(weight, rank=8))
    assert_close("U_l", factors.outer_basis, u, torch.finfo(dtype).eps)


def test_tensors_of_no_size_are_none():
    factors = factorize(draw(8, 8), shape_of(draw(8, 8), rank=0))
    assert factors.outer_basis is None and factors.null_basis is None and factors.null == 0
    again = Factors.of(factors.tensors())
    assert again == factors
    for wrong in ({}, {**factors.tensors(), "reflector": draw(2, 2)}):
        with pytest.raises(TypeError, match=r"basis|reflector"):
            Factors.of(wrong)


# -- in a given basis --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_a_given_basis_of_the_same_weight_is_taken(m, n, dtype):
    """The weight's own V_k with its signs turned, and a rotation of equal singular values: A = U S V^T with both."""
    rank = 0 if m == n else 3
    u, _, vt = torch.linalg.svd(draw(m, n), full_matrices=False)
    weight = (u * torch.tensor([4.0, 4, 3, 3, 2, 2, 1, 1]).double()) @ vt
    shape = shape_of(weight, rank=rank)
    own = factorize(weight, shape)
    turn = torch.block_diag(*(torch.linalg.qr(draw(2, 2, seed=i)).Q for i in range(2)))
    given = -(own.basis[:, :4] @ turn)
    weight = weight.to(dtype)
    factors = factorize(weight, shape, basis=given.to(dtype))
    eps = torch.finfo(dtype).eps  # of the weight, the given basis and V, and float64's sums
    assert_close("first of V", factors.basis[:, :4], given, eps + 8 * torch.finfo(torch.float64).eps)
    if rank:  # V is whole
        assert_whole(weight, factors, shape, 8 * eps)
        assert_close("rest of V", factors.basis[:, 4:].double() @ factors.basis[:, 4:].double().mT,
                     own.basis[:, 4:] @ own.basis[:, 4:].mT, 8 * eps)  # fmt: skip
    assert_close("S", factors.singular_values, own.singular_values, 8 * eps)


def assert_whole(weight, factors, shape, tolerance):
    """U = A V S^-1 is orthonormal, so that A = U S V^T; U_l is its first columns."""
    V, S = factors.basis.double(), factors.singular_values.double()
    U = tall_of(weight, shape).double() @ V / S
    assert_close("V^T V", V.mT @ V, torch.eye(len(S)), tolerance)
    assert_close("U^T U", U.mT @ U, torch.eye(len(S)), tolerance)
    assert_close("U_l", factors.outer_basis, U[:, : shape.l], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("saved", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_a_basis_of_the_weight_in_another_dtype(m, n, saved, dtype):
    """The weights differ by |E|_2 <= eps |A|_F / 2, eps that of the coarser, and the given V_k is rounded as much; both
    turn vectors by that over the gap of the singular values, which is 1. V is orthonormal to its own rounding."""
    u, _, vt = torch.linalg.svd(draw(m, n), full_matrices=False)
    exact = u * torch.arange(8, 0, -1).double() @ vt
    shape, weight = shape_of(exact, rank=3), exact.to(dtype)
    given = factorize(exact.to(saved), shape).basis[:, :4].to(saved)
    factors = factorize(weight, shape, basis=given)
    bound = 2 * max(torch.finfo(t).eps for t in (dtype, saved)) * float(exact.norm())
    assert_close("first of V", factors.basis[:, :4], given, bound)
    V = factors.basis.double()
    assert_close("V^T V", V.mT @ V, torch.eye(8), 8 * torch.finfo(factors.basis.dtype).eps)
    assert_whole(weight, factors, shape, 8 * bound)
    assert_close("S", factors.singular_values, torch.arange(8, 0, -1).double(), bound)


def test_a_given_basis_keeps_the_null_space():
    weight = draw(24, 5) @ draw(5, 8, seed=1)
    shape = shape_of(weight, p=1.0)
    own = factorize(weight, shape)
    factors = factorize(weight, shape, basis=-own.basis)
    assert factors.null == own.null == 3
    assert_close("V", factors.basis, -own.basis, 1e-13)
    assert_close("A^T N", weight.mT @ factors.null_basis, torch.zeros(8, 3), 1e-12)
    assert_close("N^T N", factors.null_basis.mT @ factors.null_basis, torch.eye(3), 1e-13)


def test_a_given_basis_passes_the_cache_by(tmp_path):
    weight = draw(24, 8)
    own = factorize(weight, shape_of(weight), cache_dir=tmp_path)
    factors = factorize(weight, shape_of(weight), cache_dir=tmp_path, basis=-own.basis[:, :4])
    assert_close("V_k", factors.basis[:, :4], -own.basis[:, :4], 1e-13)
    assert_close("cached", factorize(weight, shape_of(weight), cache_dir=tmp_path).basis, own.basis, 0.0)


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
    adapter = layer.adapter
    change = adapter.singular_values.detach().clone()
    if q := adapter.factors.null:
        change[-q:] = float(weight.abs().max()) or 1.0
    with torch.no_grad():
        adapter.inner_rotation.normal_(0, 0.1)
        adapter.inner_scale.copy_(0.1 * change * torch.randn(8))
        adapter.outer.normal_(0, 0.1)
    x = torch.randn(5, layer.in_features, dtype=dtype)
    factors = thin_svd((layer.weight.mT if transposed else layer.weight).detach().double())
    assert_close("V", adapter.basis, factors[2], 1e-6)
    parameters = [p.detach().double() for p in three(layer)]
    want = reference.adapted_weight(layer.weight.detach().double(), *parameters, config=adapter.config, factors=factors)
    got, info = layer(x).detach().double(), torch.finfo(dtype)
    # relative to |W'| |x|: a component far below the largest carries rounding of the size eps * largest; P, which
    # divides by S_i, leaves eps S_0 / S_i of u_i; below the smallest normal number the spacing is absolute
    used = inverse_of(adapter.singular_values, adapter.shape.width, adapter.factors.null)
    lost = condition(used) if bool(used.any()) else 0.0
    bound = (64 + lost) * info.eps * (float(want.norm()) * float(x.norm()) + info.tiny * got.numel())
    assert float((got - x.double() @ want.mT).norm()) <= bound


@pytest.mark.parametrize("dtype, least", [
    (torch.float64, 2.0**-26), (torch.float32, 2.0**-11.5), (torch.float16, 1 / 32), (torch.bfloat16, 1 / 32)])
def test_small_singular_values_are_carried_by_null_columns(dtype, least):
    """S_i <= min(sqrt(eps), 1/32) S_0 is not divided by."""
    singular = torch.tensor([1.0, 0.5, 1.1 * least, 0.9 * least], dtype=torch.float64)
    weight = torch.cat([torch.diag(singular), torch.zeros(4, 4)]).to(dtype)
    assert factorize(weight, shape_of(weight, p=1.0)).null_basis.shape == (8, 1)
    assert factorize(weight, shape_of(weight, p=0.5)).null_basis is None


def test_rank_deficiency_is_carried_by_null_columns():
    weight = HOSTILE["rank 3"]()
    assert factorize(weight, shape_of(weight, p=1.0)).null_basis.shape == (24, 5)
    assert factorize(weight, shape_of(weight, p=0.25)).null_basis is None
    assert factorize(weight, shape_of(weight, p=0.25, rank=6)).null_basis.shape == (24, 3)  # of the outer vectors


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
    with pytest.raises(TypeError, match=r"fc1 is a .*Linear: its weight is a .*Quantised.*; allowed: linear"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=1))
    assert model["fc1"] is linear


@pytest.mark.parametrize("m, n, l", [(12, 4, 0), (4, 12, 3), (8, 8, 0)])
def test_every_factor_may_be_viewed_as_bytes(m, n, l):  # noqa: E741
    """DeepSpeed does so with every parameter."""
    shape = LayerShape.of(m, n, SSVDOConfig(outer_rank=l))
    for tensor in factorize(torch.randn(m, n), shape).tensors().values():
        assert tensor.numel() and tensor.stride(-1) == 1
        assert tensor.view(torch.uint8).shape[-1] == 4 * tensor.shape[-1]
