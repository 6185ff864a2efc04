"""SSVD-O as plain equations: dense, differentiable any number of times, any float dtype and device. The truth.

Nothing here is fast. Everything fast in this package is tested against these functions in float64.
For A = W0 (tall or square) or W0^T (wide), A = U diag(S) V^T with U (large x d), V (d x d):

    K = skew(inner_rotation),  G = rotation(K) (k x k),  L = outer_scale * outer (c x l)
    Z = P [0; L],  P = I - U U^T  (large x l; U there without weak components beyond k and l)
    R = chol(Z^T Z + tau I),   Q = Z R^-T,   C = sqrt(tau) R^-T
    U_l' = U_l C + Q   ("rotation")   or   U_l + Q   ("additive")
    A' = U' diag(S + dS) blockdiag(G, I) V^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LayerShape, SSVDOConfig
from .factorize import Factors, compute_dtype, thin_svd
from .ops.complement import LEAST


def skew(packed: Tensor, k: int) -> Tensor:
    """K (k x k), K = -K^T, from its strict upper triangle in row-major order (k(k-1)/2 numbers)."""
    rows, columns = torch.triu_indices(k, k, 1, device=packed.device)
    upper: Tensor = packed.new_zeros(k, k).index_put((rows, columns), packed)
    K: Tensor = upper - upper.mT
    return K


def rotation(K: Tensor, kind: str = "cayley", terms: int = 4) -> Tensor:
    """G: (I + K)^-1 (I - K) | I + 2 sum_{i=1..terms} (-K)^i | I - 2K for "cayley" | "neumann" | "first_order"."""
    identity = torch.eye(K.shape[0], dtype=K.dtype, device=K.device)
    if kind == "cayley":
        G: Tensor = torch.linalg.solve(identity + K, identity - K)
        return G
    if kind == "neumann":
        power, total = identity, torch.zeros_like(K)
        for _ in range(terms):
            power = power @ -K
            total = total + power
        return identity + 2 * total
    if kind == "first_order":
        return identity - 2 * K
    raise ValueError(f"kind={kind!r} is unknown; allowed: 'cayley', 'neumann', 'first_order'")


def outer_blocks(Z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(C, Q) = (sqrt(tau) R^-T, Z R^-T) with R = chol(Z^T Z + tau I): C^T C + Q^T Q = I. Z: large x l."""
    identity = torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device)
    R = torch.linalg.cholesky(Z.mT @ Z + tau * identity)
    inverse = torch.linalg.solve_triangular(R, identity, upper=False)
    return tau**0.5 * inverse.mT, Z @ inverse.mT


def turned(U: Tensor, S: Tensor, L: Tensor, width: int) -> Tensor:
    """Z = P [0; L] (large x l): L on the last c rows, taken to the complement of U's columns.

    Left out of U are components beyond the first `width` (adapted ones) with S_i <= LEAST S_0.
    """
    kept = (S[0] * LEAST < S) | (torch.arange(S.shape[0], device=S.device) < width)
    span, lifted = U * kept, torch.cat([L.new_zeros(U.shape[1], L.shape[1]), L])
    return lifted - span @ (span.mT @ lifted)


def adapted_weight(
    weight: Tensor,
    inner_rotation: Tensor,
    inner_scale: Tensor,
    outer: Tensor,
    config: SSVDOConfig,
    factors: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """W' (out_features x in_features), with gradients to the three parameters.

    Args:
        weight: W0, out_features x in_features.
        inner_rotation: k(k-1)/2, strict upper triangle of K. inner_scale: dS, k. outer: L / s, c x l.
        config: the adapter's configuration.
        factors: (U, S, V) if the caller has them; otherwise they are computed from weight.
    """
    shape = LayerShape.of(weight.shape[0], weight.shape[1], config)
    U, S, V = factors if factors is not None else dense_factors(weight, shape)
    k, l = shape.k, shape.l  # noqa: E741
    G = rotation(skew(inner_rotation, k), config.rotation, config.neumann_terms)
    scale = torch.cat([S[:k] + inner_scale, S[k:]])
    if l:
        C, Q = outer_blocks(turned(U, S, shape.outer_scale(config) * outer, shape.width), config.tau)
        U_l = U[:, :l] @ C + Q if config.outer == "rotation" else U[:, :l] + Q
        U = torch.cat([U_l, U[:, l:]], 1)
    rotated = torch.cat([G @ V[:, :k].mT, V[:, k:].mT])  # blockdiag(G, I) V^T
    adapted = U @ (scale[:, None] * rotated)
    return adapted.mT if shape.transposed else adapted


def weight_in_factors(
    weight: Tensor,
    parameters: tuple[Tensor | None, Tensor, Tensor | None],
    factors: Factors,
    shape: LayerShape,
    config: SSVDOConfig,
    scale: float = 1.0,
) -> Tensor:
    """W' in the dtype of `weight`, with gradients to (inner_rotation, inner_scale, outer), from the factors at hand;
    scale: what these are multiplied by.

    U = W0 V S^-1 and the null columns; what V leaves out is W0 less what it holds.
    """
    dtype = compute_dtype(parameters[1].dtype)
    packed, shift, outer = (parameters[1].new_zeros(0) if p is None else p.to(dtype) * scale for p in parameters)
    S, width = factors.singular_values.to(dtype), shape.width
    A = (weight.mT if shape.transposed else weight).to(dtype)
    V = factors.basis.to(dtype)
    U = A @ V / torch.where(S > 0, S, 1)
    if factors.null_basis is not None:
        U = torch.cat([U[:, : width - factors.null], factors.null_basis.to(dtype), U[:, width:]], 1)
    held = (U * S) @ V.mT
    adapted = adapted_weight(weight, packed, shift, outer, config, (U, S, V))
    rest = A - held
    return (adapted + (rest.mT if shape.transposed else rest)).to(weight.dtype)


def dense_factors(weight: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of weight, dense: large x d, d, d x d; computed in float64, as `factorize` does."""
    exact = weight.detach().double()
    U, S, V = thin_svd(exact.mT if shape.transposed else exact)
    assert U is not None
    return U.to(weight.dtype), S.to(weight.dtype), V.to(weight.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inner_rotation: Tensor,
    inner_scale: Tensor,
    outer: Tensor,
    config: SSVDOConfig,
) -> Tensor:
    """y = x W'^T + b, W' rebuilt densely. x: ... x in_features; the rest as in `adapted_weight`."""
    return torch.nn.functional.linear(x, adapted_weight(weight, inner_rotation, inner_scale, outer, config), bias)
