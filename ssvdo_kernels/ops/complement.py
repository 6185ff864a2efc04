"""The projector onto the complement of U's span, through W0 and V alone.

For the tall matrix A (large x d; W0, or W0^T for a wide layer), A = U diag(S) V^T, so that U = A V S^-1 and

    P z = z - A V S^-2 V^T A^T z - N N^T z

N (large x q, `null_basis`): the columns of U whose S_i is too small for A v_i / S_i to stand for u_i; their inverses,
and those of weak components (`LEAST`), are taken as 0. P is symmetric, so that backward is the same passes over A. A V
in half precision is orthonormal to about 2^-9 alone; applying P twice squares what that leaves of U in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .base import Base
from .products import times

Product = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""([A_1, ...], [B_1, ...]) -> [A_1 B_1, ...] in B's dtype: of layers of one shape."""


def one_by_one(matrices: Sequence[Tensor], columns: Sequence[Tensor]) -> list[Tensor]:
    """The `Product` of PyTorch alone."""
    return [times(a, b) for a, b in zip(matrices, columns, strict=True)]


@dataclass(eq=False)
class Projector:
    """P of one layer. base, transposed: what A (large x d) is a view of; singular: S (d) in the dtype of the work;
    width: max(k, l), of which the last are columns of N; null: N or None."""

    base: Base
    transposed: bool
    basis: Tensor  # V, d x d
    singular: Tensor
    width: int
    null: Tensor | None
    large: int
    view: Tensor | None = None  # A, where somebody has it already

    @cached_property
    def inverse(self) -> Tensor:
        """S^-1 (d), 0 where it is of no use: the last columns of N among the first `width`, and weak components."""
        return inverse_of(self.singular, self.width, 0 if self.null is None else self.null.shape[1])

    @property
    def tall(self) -> Tensor:
        """A, of any floating dtype; made anew where the base does not hold it."""
        return self.base.tall(self.transposed) if self.view is None else self.view

    @cached_property
    def unit(self) -> Tensor:
        """1 / S_0 (1 where W0 = 0): what is of W0's size, times this, times W0 stays in the range of float32."""
        return torch.where(self.inverse[0] > 0, self.inverse[0], 1)

    @cached_property
    def even(self) -> bool:
        """Whether all that P divides by is at least S_0 / 128."""
        return bool(self.inverse.max() * self.singular[0] <= 128)

    @property
    def passes(self) -> int:
        """How often P is applied: twice where V is of half precision."""
        return 1 if self.basis.dtype == self.singular.dtype else 2


LEAST = 1e-3
"""S_i / S_0 up to which a component beyond the adapted ones is left out of P: U_l' leaning on it changes W' by S_i
times the lean, and the inverse would lose eps S_0 / S_i. The same in every dtype, as an adapter is to mean the same."""


def inverse_of(singular: Tensor, width: int, null: int) -> Tensor:
    """S^-1 (d) for `Projector`; the last `null` of the first `width` are columns of N."""
    useful = singular > (singular[0] * LEAST).clamp_min(torch.finfo(singular.dtype).tiny)
    useful[:width] = True
    useful[width - null : width] = False
    return torch.where(useful, 1 / singular, torch.zeros_like(singular))


def project(
    many: Sequence[Projector],
    columns: Sequence[Tensor],
    first: int,
    rows: int,
    product: Product = one_by_one,
    pulled: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """(P z)[-rows:] of each layer for z, large x cols in the dtype of the work, whose entries above its last `first`
    rows are 0; only these are given, and read.

    pulled: A^T z, d x cols, of layers where it is known; nothing: of none.
    """
    one, large = many[0], many[0].large
    for turn in range(one.passes):
        last = turn + 1 == one.passes
        columns = _once(many, columns, first, rows if last else large, product, pulled)
        first, pulled = large, ()
    return list(columns)


def _pull(tall: Sequence[Tensor], columns: Sequence[Tensor], product: Product, pulled: Sequence[Tensor | None]
          ) -> Sequence[Tensor]:  # fmt: skip
    """A^T z of each layer: by a product where `pulled` does not have it. tall: the rows of A at which z is given."""
    if not pulled:
        return product([a.mT for a in tall], columns)
    missing = [i for i, t in enumerate(pulled) if t is None]
    made = iter(product([tall[i].mT for i in missing], [columns[i] for i in missing]) if missing else ())
    return [next(made) if t is None else t for t in pulled]


def _once(many: Sequence[Projector], columns: Sequence[Tensor], first: int, rows: int, product: Product,
          pulled: Sequence[Tensor | None]) -> list[Tensor]:  # fmt: skip
    large, tall = many[0].large, [p.tall for p in many]
    pulled = _pull([a[large - first :] for a in tall], columns, product, pulled)
    inner = product([p.basis.mT for p in many], pulled)
    inner = [t.mul_(p.inverse[:, None]) for t, p in zip(inner, many, strict=True)]
    inner = product([p.basis for p in many], [t.mul_(p.inverse[:, None]) for t, p in zip(inner, many, strict=True)])
    found = product([a[large - rows :] for a in tall], inner)
    both = min(first, rows)
    for out, z, p in zip(found, columns, many, strict=True):
        out[: rows - both].neg_()
        torch.sub(z[first - both :], out[rows - both :], out=out[rows - both :])
        if p.null is not None:
            null = p.null.to(out.dtype)
            out.addmm_(null[large - rows :], null[large - first :].mT @ z, alpha=-1)
    return list(found)
