"""G from the packed skew matrix, and the gradient straight back to the packed vector.

K is skew, given by its strict upper triangle in row-major order (k(k-1)/2 numbers).

    cayley       G = (I + K)^-1 (I - K) = 2M - I,  M = (I + K)^-1      dK = -2 M^T dG M^T
    neumann      G = I + 2T_s,  T_j = -K (I + T_{j-1}),  T_0 = 0        Horner, backwards
    first_order  G = I - 2K                                             dK = -2 dG
    packed       dv = upper(dK - dK^T)

Where dG = g^T h comes from fewer rows (tokens) than k, the Cayley gradient is taken through g and h: three products of
T k^2 in place of one such and two of k^3.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _upper_index(k: int, device: torch.device) -> Tensor:
    rows, columns = torch.triu_indices(k, k, 1, device=device)
    index: Tensor = rows * k + columns
    return index


def unpack_skew(packed: Tensor, k: int) -> Tensor:
    """K (k x k) from k(k-1)/2 numbers."""
    upper: Tensor = packed.new_zeros(k * k)
    upper[_upper_index(k, packed.device)] = packed
    K = upper.view(k, k)
    return K - K.mT


def pack_skew_gradient(dK: Tensor) -> Tensor:
    """The gradient of the packed vector, k(k-1)/2, from a dense dK (k x k)."""
    return (dK - dK.mT).flatten().index_select(0, _upper_index(dK.shape[0], dK.device))


def rotation_forward(packed: Tensor, k: int, kind: str, terms: int) -> tuple[Tensor, Tensor]:
    """(G, saved): G is k x k; saved is what `rotation_backward` needs (M for cayley, else K)."""
    K = unpack_skew(packed, k)
    if kind == "cayley":
        inverse = _inverse_of_identity_plus(K)
        G = inverse * 2
        G.diagonal().sub_(1)
        return G, inverse
    if kind == "first_order":
        G = K * -2
        G.diagonal().add_(1)
        return G, K
    G = _horner(K, terms) * 2
    G.diagonal().add_(1)
    return G, K


def _inverse_of_identity_plus(K: Tensor) -> Tensor:
    """M = (I + K)^-1 for a skew K."""
    # LAPACK's inverse runs at a fifth of the speed of a matrix product; splitting into blocks halves its time. Every
    # Schur complement of I + K has a symmetric part >= I, so no pivots are needed while |K|_2 (<= |K|_F) is small.
    blocked = K.device.type == "cpu" and K.shape[0] > _LEAF and float(torch.linalg.vector_norm(K)) <= 16
    A = K.clone()
    A.diagonal().add_(1)
    if blocked:
        return _block_inverse(A)
    # On a GPU, inv would wait for the device to report a singular matrix, which I + K never is.
    inverse: Tensor = torch.linalg.inv_ex(A)[0] if A.is_cuda else torch.linalg.inv(A)
    return inverse


_LEAF = 96


def _block_inverse(A: Tensor) -> Tensor:
    """A^-1 by 2 x 2 blocks and the Schur complement of the first, down to blocks of _LEAF rows."""
    n = A.shape[0]
    if n <= _LEAF:
        return torch.linalg.inv(A)  # type: ignore[no-any-return]
    h = n // 2
    first = _block_inverse(A[:h, :h])
    left = A[h:, :h] @ first
    last = _block_inverse(torch.addmm(A[h:, h:], left, A[:h, h:], alpha=-1))
    right = (first @ A[:h, h:]) @ last
    inverse = torch.empty_like(A)
    torch.addmm(first, right, left, out=inverse[:h, :h])
    torch.neg(right, out=inverse[:h, h:])
    torch.mm(last, left, out=inverse[h:, :h]).neg_()
    inverse[h:, h:] = last
    return inverse


def _horner(K: Tensor, terms: int) -> Tensor:
    T = torch.zeros_like(K)
    for _ in range(terms):
        T = torch.addmm(K, K, T).neg_()
    return T


def cayley_backward_low_rank(g: Tensor, h: Tensor, saved: Tensor) -> tuple[Tensor, Tensor]:
    """(d packed, h G^T) for the Cayley form and dG = g^T h; g, h: T x k; saved: M of `rotation_forward`."""
    hMt = h @ saved.mT
    return pack_skew_gradient((g @ saved).mT @ hMt * -2), torch.add(-h, hMt, alpha=2)


def rotation_backward(dG: Tensor, saved: Tensor, kind: str, terms: int) -> Tensor:
    """d packed (k(k-1)/2) from dG (k x k)."""
    if kind == "cayley":
        return pack_skew_gradient((saved.mT @ dG) @ saved.mT * -2)
    if kind == "first_order":
        return pack_skew_gradient(dG * -2)
    K, dT, dK = saved, dG * 2, torch.zeros_like(saved)
    for j in range(terms, 0, -1):  # T_j = -K (I + T_{j-1})
        previous = _horner(K, j - 1)
        dK -= dT + dT @ previous.mT
        dT = K @ dT  # -K^T = K
    return pack_skew_gradient(dK)
