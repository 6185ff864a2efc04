"""The equations: derivatives of both orders, and the identities that the method promises."""

import pytest
import torch
from helpers import assert_close

from ssvdo_kernels import SSVDOConfig, reference
from ssvdo_kernels.config import LayerShape

CASES = [(7, 3, 0.7, 2), (3, 7, 0.7, 2), (4, 4, 1.0, 0), (7, 3, 0.4, 3), (5, 4, 1.0, 1), (6, 3, 0.7, 0)]


def make(m, n, config, spread=0.3):
    torch.manual_seed(0)
    shape = LayerShape.of(m, n, config)
    weight = torch.randn(m, n, dtype=torch.float64)
    sizes = [(shape.k * (shape.k - 1) // 2,), (shape.k,), (shape.c, shape.l)]
    return shape, weight, [(spread * torch.randn(*s, dtype=torch.float64)).requires_grad_() for s in sizes]


@pytest.mark.parametrize("outer", ["rotation", "additive"])
@pytest.mark.parametrize("rotation", ["cayley", "neumann", "first_order"])
@pytest.mark.parametrize("m, n, p, l", CASES)
def test_gradcheck_and_gradgradcheck(m, n, p, l, rotation, outer):  # noqa: E741
    config = SSVDOConfig(inner_ratio=p, outer_rank=l, rotation=rotation, outer=outer)
    shape, weight, parameters = make(m, n, config)
    factors = reference.dense_factors(weight, shape)

    def function(*values):
        return reference.adapted_weight(weight, *values, config=config, factors=factors)

    assert torch.autograd.gradcheck(function, parameters)
    assert torch.autograd.gradgradcheck(function, parameters)


@pytest.mark.parametrize("m, n, p, l", CASES)
def test_zero_parameters_give_the_pretrained_weight(m, n, p, l):  # noqa: E741
    config = SSVDOConfig(inner_ratio=p, outer_rank=l)
    _, weight, parameters = make(m, n, config, spread=0)
    assert_close("W'", reference.adapted_weight(weight, *parameters, config=config), weight, 1e-14)


@pytest.mark.parametrize("spread", [0.3, 30.0])
@pytest.mark.parametrize("m, n, p, l", CASES)
def test_singular_values_are_the_scaled_ones(m, n, p, l, spread):  # noqa: E741
    config = SSVDOConfig(inner_ratio=p, outer_rank=l)
    shape, weight, parameters = make(m, n, config, spread)
    S = torch.linalg.svdvals(weight)
    S[: shape.k] += parameters[1].detach()
    got = torch.linalg.svdvals(reference.adapted_weight(weight, *parameters, config=config).detach())
    assert_close("singular values", got, S.abs().sort(descending=True).values, 1e-10)


@pytest.mark.parametrize("m, n, p, l", [case for case in CASES if case[3]])
def test_the_outer_part_turns_into_the_complement(m, n, p, l):  # noqa: E741
    """Z is what no combination of U's columns can say of [0; L], and U' = [U_l C + Q, the rest of U] is orthonormal."""
    config = SSVDOConfig(inner_ratio=p, outer_rank=l)
    shape, weight, (_, _, L) = make(m, n, config)
    U, S, _ = reference.dense_factors(weight, shape)
    Z = reference.turned(U, S, L.detach(), shape.width)
    lifted = torch.cat([torch.zeros(shape.d, l, dtype=torch.float64), L.detach()])
    residual = lifted - U @ torch.linalg.lstsq(U, lifted).solution
    assert_close("Z", Z, residual, 1e-13)
    assert_close("U^T Z", U.mT @ Z, torch.zeros(shape.d, l), 1e-14)
    C, Q = reference.outer_blocks(Z, config.tau)
    turned = torch.cat([U[:, :l] @ C + Q, U[:, l:]], 1)
    assert_close("U'^T U'", turned.mT @ turned, torch.eye(shape.d), 1e-12)


def test_weak_components_beyond_the_adapted_ones_are_left_out_of_the_projector():
    U = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q
    L = torch.randn(5, 2, dtype=torch.float64)
    S = torch.tensor([1.0, 1e-6, 1.1e-3, 0.9e-3], dtype=torch.float64)
    lean = U.mT @ reference.turned(U, S, L, 2)
    want = U.mT @ torch.cat([torch.zeros(4, 2, dtype=torch.float64), L])
    assert_close("kept", lean[:3], torch.zeros(3, 2), 1e-14)  # the adapted ones however weak they are
    assert_close("left out", lean[3:], want[3:], 1e-13)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_outer_blocks_are_an_orthonormal_column(scale):
    Z = scale * torch.randn(9, 4, dtype=torch.float64)
    C, Q = reference.outer_blocks(Z, 1e-2)
    # Cholesky QR loses cond(Z^T Z + tau I) digits: at most 1e8 here
    assert_close("C^T C + Q^T Q", C.mT @ C + Q.mT @ Q, torch.eye(4, dtype=torch.float64), 1e-7 if scale > 1 else 1e-12)


def test_the_three_rotations_have_one_sign():
    K = reference.skew(1e-3 * torch.randn(10, dtype=torch.float64), 5)
    cayley = reference.rotation(K, "cayley")
    assert_close("orthogonal", cayley @ cayley.mT, torch.eye(5, dtype=torch.float64), 1e-14)
    assert_close("neumann", reference.rotation(K, "neumann", 8), cayley, 1e-14)
    first = reference.rotation(K, "first_order")
    assert float((first - cayley).norm()) <= 4 * float(K.norm()) ** 2  # = |2K^2| + O(K^3); the other sign is 4|K| away
    assert float((first.mT - cayley).norm()) > float(K.norm())


def test_unknown_rotation():
    with pytest.raises(ValueError, match="kind='givens'"):
        reference.rotation(torch.zeros(2, 2), "givens")


def test_float32_and_bias():
    config = SSVDOConfig(outer_rank=2)
    _, weight, parameters = make(7, 3, config)
    x, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    want = reference.linear(x, weight, bias, *parameters, config=config)
    got = reference.linear(x.float(), weight.float(), bias.float(), *(p.float() for p in parameters), config=config)
    assert got.dtype == torch.float32
    assert_close("float32", got, want, 1e-5)
