"""The outer part of several layers of one shape: L -> F = U_l' - U_l, and back. P: complement.py.

    forward    Z = P [0; L],  R R^T = Z^T Z + tau I,  X = R^-T,  F = Z X + U_l (sqrt(tau) X - I)   (additive: F = Z X)
    backward   E = (P dF)[last c],  dX = L^T E + sqrt(tau) U_l^T dF,  H = -sym(tril(dX^T X))
               dL = (E + Q[last c] H) X^T,  Q = Z X

dGram = X Phi X^T, Phi the lower triangle of -dX^T X with its diagonal halved, is the standard adjoint of the Cholesky
factor (Murray, "Differentiation of the Cholesky decomposition", 2016); Z (dGram + dGram^T) = Q (Phi + Phi^T) X^T. Z^T
dF is L^T E because P is symmetric, and P Z = Z because it is a projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .complement import Product, Projector, one_by_one, project


@dataclass(eq=False)  # a frozen one takes three times as long to make
class Outer:
    """One layer's part in the work, in the dtype of the work but for the projector's and U_l's.

    outer: L / scale, c x l; U: U_l, large x l, None where outer="additive".
    """

    outer: Tensor
    scale: float
    U: Tensor | None
    projector: Projector
    tau: float

    @property
    def L(self) -> Tensor:
        """c x l; made anew, so that it takes no memory between steps."""
        return self.outer * self.scale

    @property
    def c(self) -> int:
        """Rows of L."""
        return self.outer.shape[0]

    @property
    def d(self) -> int:
        """Columns of A."""
        return self.projector.basis.shape[0]

    @property
    def large(self) -> int:
        """Rows of Z and F."""
        return self.projector.large


def _turned(many: Sequence[Outer], X: Sequence[Tensor], rows: int, product: Product) -> Sequence[Tensor]:
    """The last `rows` of U_l (sqrt(tau) X - I)."""
    changes = [x * one.tau**0.5 for one, x in zip(many, X, strict=True)]
    for change in changes:
        change.diagonal().sub_(1)
    return product([one.U[one.U.shape[0] - rows :] for one in many if one.U is not None], changes)


def turned_part(
    many: Sequence[Outer], X: Sequence[Tensor], F: Sequence[Tensor], rows: int, product: Product = one_by_one
) -> list[Tensor]:
    """The last `rows` of Q = Z X, from F."""
    Q = [f[f.shape[0] - rows :] for f in F]
    if many[0].U is None:
        return Q
    return [q - turned for q, turned in zip(Q, _turned(many, X, rows, product), strict=True)]


def factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(X = R^-T upper triangular, info: 0 or the bad pivot from 1) of n x l x l matrices, by PyTorch."""
    R, info = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(R, identity.expand_as(gram), upper=False).mT, info


def forward(many: Sequence[Outer], product: Product = one_by_one) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """(F, X, info) of the layers: large x l each, n x l x l, n."""
    one = many[0]
    Z = project([p.projector for p in many], [p.L for p in many], one.c, one.large, product)
    gram = torch.stack(list(product([z.mT for z in Z], Z)))
    gram.diagonal(dim1=-2, dim2=-1).add_(one.tau)
    X, info = factor(gram)
    F = product(Z, X.unbind())
    if one.U is not None:
        for f, turned in zip(F, _turned(many, X.unbind(), one.large, product), strict=True):
            f += turned
    return F, X, info


def backward(
    many: Sequence[Outer],
    X: Sequence[Tensor],
    F: Sequence[Tensor],
    dF: Sequence[Tensor],
    product: Product = one_by_one,
    pulled: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """d outer of each layer; F: as `forward` made it, dF: its gradient, in the dtype of the work; pulled: A^T dF / S_0
    of layers where it is known; nothing: of none."""
    one, c = many[0], many[0].c
    units = [p.projector.unit for p in many]  # dF is of the size of S
    dF = [d * unit for d, unit in zip(dF, units, strict=True)]
    E = project([p.projector for p in many], dF, one.large, c, product, pulled)
    dX = [d.mul_(p.scale) for d, p in zip(product([p.outer.mT for p in many], E), many, strict=True)]  # L^T E
    Q = turned_part(many, X, F, c, product)
    if one.U is not None:
        pulled = product([p.U.mT for p in many if p.U is not None], dF)
        dX = [d.add_(more, alpha=one.tau**0.5) for d, more in zip(dX, pulled, strict=True)]
    lower = product([d.mT for d in dX], X)
    H = [-(t.tril() + t.tril(-1).mT) for t in lower]
    inner = [e.add_(more) for e, more in zip(E, product(Q, H), strict=True)]
    found = product(inner, [x.mT for x in X])
    return [d.mul_(one.scale / unit) for d, unit in zip(found, units, strict=True)]
