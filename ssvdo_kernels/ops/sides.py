"""The two maps on the small side of an adapted linear map, in each of their forms; see linear.py.

With many rows the Triton path multiplies by [A | F] at once (joined.py), and takes dF from rows of dy that are still in
the GPU's cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..planner import joins, keeps_joined, peaks
from . import together
from .base import Base
from .matrices import unaligned
from .preparation import Prepared, Rows
from .products import added, over_tokens


def _last(new: Tensor, count: int) -> Tensor:
    """The last columns of a matrix that has its storage for itself; a slice takes twice as long."""
    rows, columns = new.shape
    return new.as_strided((rows, count), (columns, 1), columns - count)


class SmallSide:
    """expand and contract of one layer's matrices, in the dtype of the tokens, through PyTorch's own products.

    Attributes: width, extra: columns of V and F, as they are used here; own_width, own_extra: as the layer has them.
    """

    # It lives in the preparation, so it must not hold it: a cycle would keep a step's matrices until a collection.

    V: Tensor
    F: Tensor
    Ft: Tensor
    M: Tensor  # factored
    Q: Tensor  # folded: M V^T
    R: Tensor  # folded: N^T V^T
    lower: Tensor  # B_z, but for core
    E: Tensor  # core

    def __init__(self, prepared: Prepared, form: str, dtype: torch.dtype, backend: str) -> None:
        self.form, self.d, self.wide = form, prepared.shape.d, prepared.shape.transposed
        self.take(prepared, dtype)
        self.width, self.extra, self.Ft = self.V.shape[1], self.F.shape[1], self.F.mT
        self.own_width, self.own_extra = prepared.shape.width, prepared.extra
        self.joined = prepared.joined if backend == "triton" else None
        self.own = prepared.source.base
        self.unit = prepared.outer.projector.unit if prepared.outer is not None and prepared.lends else None
        prepared.settle(dtype)

    def take(self, prepared: Prepared, dtype: torch.dtype) -> None:
        """Gets the matrices of the form."""
        self.V, self.F = prepared.get("basis", dtype), prepared.get("columns", dtype)
        if self.form == "core":
            self.E = prepared.get("core", dtype)
        elif self.form == "factored":
            self.M = prepared.get("mixer", dtype)
            self.lower = self.M[prepared.shape.width :]
        else:
            self.Q, self.R = prepared.get("folded", dtype), prepared.get("folded_transposed", dtype)
            self.lower = prepared.get("lower", dtype)

    # -- the small side ----------------------------------------------------------------------------------------------
    def expand(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x', z, kept if keep): kept = [h | z], or z in the core form."""
        if self.form == "core":
            xz = x @ self.E
            x, z = xz[:, : self.d], xz[:, self.d :]
            return x, z, z.contiguous() if keep else None
        kept = x.new_empty(x.shape[0], self.width + self.extra)
        h, z = torch.mm(x, self.V, out=kept[:, : self.width]), kept[:, self.width :]
        if self.extra:
            torch.mm(h, self.lower.mT, out=z)
        if self.form == "folded":
            return torch.addmm(x, h, self.R), z, kept if keep else None
        return torch.addmm(x, h @ self.M[: self.width].mT, self.V.mT), z, kept if keep else None

    def contract(self, u: Tensor, g: Tensor, z: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
        """u + g Q + bias of `shrink`'s u, g and z'; fills in u V where it is of g (always with keep)."""
        if self.form == "core":
            return g @ self.E.mT if bias is None else torch.addmm(bias, g, self.E.mT)
        torch.mm(u, self.V, out=g[:, : self.width])
        y = torch.addmm(u, g, self.Q) if self.form == "folded" else torch.addmm(u, g @ self.M, self.V.mT)
        return y if bias is None else y.add_(bias)

    def mixer_gradient(
        self, g: Tensor, x: Tensor | None, h: Tensor | None, total: Tensor | None = None
    ) -> Tensor | None:
        """dM ((width + e) x width) from contract's g and expand's x and h (None in the core form, and only there); None
        where `products.added` has added it to `total`."""
        if h is not None:
            return added(g, h, total)
        assert x is not None
        dE = over_tokens(g, x).to(x.dtype) @ self.V  # (d + e) x width
        return torch.cat([self.V.mT @ dE[: self.d], dE[self.d :]])

    def rows(self, g: Tensor, h: Tensor) -> Rows:
        """dM = g^T h as its factors."""
        return Rows(g, h)

    def columns_gradient(self, rows: Tensor, z: Tensor, total: Tensor | None = None) -> Tensor | None:
        """dF = rows^T z, without the columns that are there to be aligned; None where it was added to `total`."""
        dF = added(rows, z, total)
        return dF if dF is None or self.extra == self.own_extra else dF[:, : self.own_extra]

    def pulled_gradient(self, rows: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """[dF; A^T dF / S_0], as A^T rows^T z = u^T z; S_0, as both are of the weight's size."""
        assert self.unit is not None
        large, d = rows.shape[1], u.shape[1]
        both = z.new_empty(large + d, z.shape[1])
        torch.mm(rows.mT, z, out=both[:large])
        torch.mm(u.mT, z * self.unit, out=both[large:])
        return both

    # -- the large side ----------------------------------------------------------------------------------------------
    def shrink(
        self, rows: Tensor, base: Base, z: Tensor | None = None, total: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(u, g, z', dF) of [u | z'] = rows [A | F]: z' is the last columns of g, whose first are of `contract`; g is
        all of [u | z'] in the core form. dF = rows^T z for the z of expand, where that is given; None where it was
        added to `total`."""
        if self.joined is not None and base.held and joins(rows.shape[0], self.d, self.extra):
            return self._shrink_joined(rows, base, z, total)
        core = self.form == "core"
        g = rows.new_empty(rows.shape[0], (self.d if core else self.width) + self.extra)
        out, last = g[:, : self.d] if core else None, _last(g, self.extra)
        u = base.forward(rows, out=out) if self.wide else base.transpose(rows, out=out)
        if self.extra:
            torch.mm(rows, self.F, out=last)
        return u, g, last, None if z is None else self.columns_gradient(rows, z, total)

    def _shrink_joined(
        self, rows: Tensor, base: Base, z: Tensor | None, total: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        joined, dF, columns = self._joined(rows, base), None, self.d + self.extra
        step = 0
        if z is not None:
            step = peaks(rows.device, rows.dtype).chunk(rows.shape[0], rows.element_size() * rows.shape[1], columns)
        if z is None or not step:
            uz = rows @ joined
            dF = None if z is None else added(rows, z, total)
        else:
            uz = rows.new_empty(rows.shape[0], columns)
            for i in range(0, rows.shape[0], step):
                some = rows[i : i + step]
                torch.mm(some, joined, out=uz[i : i + step])
                dF = over_tokens(some, z[i : i + step], dF)
        u, last = uz.split_with_sizes((self.d, self.extra), 1)
        g = uz
        if self.form != "core":
            g = rows.new_empty(rows.shape[0], self.width + self.extra)
            last = _last(g, self.extra).copy_(last)
        return u, g, last, None if dF is None else dF[:, : self.own_extra]

    def grow(self, x: Tensor, z: Tensor, base: Base, bias: Tensor | None) -> Tensor:
        """x' A^T + z F^T + bias."""
        if self.joined is not None and base.held and joins(x.shape[0], self.d, self.extra):
            xz = x.as_strided((x.shape[0], self.d + self.extra), x.stride())  # they lie side by side
            joined = self._joined(x, base).mT
            return xz @ joined if bias is None else torch.addmm(bias, xz, joined)
        y = base.transpose(x) if self.wide else base.forward(x, bias)
        return y.addmm_(z, self.Ft) if self.extra else y

    def _joined(self, rows: Tensor, base: Base) -> Tensor:
        """[A | F]."""
        assert self.joined is not None
        keep = keeps_joined(rows.shape[0], self.F.shape[0], self.d, self.extra)
        itself = base is self.own or base.dense().data_ptr() == self.own.dense().data_ptr()  # no copy in another dtype
        joined = self.joined.of(self.F, base, self.wide, keep and itself)
        return joined.mT if self.wide else joined


@lru_cache(maxsize=1)
def _launch() -> Any:
    """The launches, which import Triton."""
    from ..triton import launch

    return launch


class TritonSide(SmallSide):
    """The folded form through the Triton kernels, with width and e rounded up to 16 so that rows are aligned."""

    def take(self, prepared: Prepared, dtype: torch.dtype) -> None:
        self.launch, V = _launch(), prepared.basis
        fits = V.dtype == dtype and V.shape[1] % 16 == 0
        self.V, self.F = V if fits else prepared.get("aligned_basis", dtype), prepared.get("aligned_columns", dtype)
        self.Q, self.R = prepared.get("contraction", dtype), prepared.get("expansion", dtype)
        lower = prepared.kept.get(("below", dtype))
        self.lower = self.Q[self.V.shape[1] :] if lower is None else lower

    def expand(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        xz, kept = self.launch.expand(x, self.V, self.R, keep)
        return *xz.split_with_sizes((self.d, self.extra), 1), kept

    def contract(self, u: Tensor, g: Tensor, z: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
        made: Tensor = self.launch.contract(u, z, self.V, self.Q, keep, bias, g=g, below=self.lower)[0]
        return made

    def mixer_gradient(
        self, g: Tensor, x: Tensor | None, h: Tensor | None, total: Tensor | None = None
    ) -> Tensor | None:
        assert h is not None
        dM = added(g, h, total)
        if dM is None or (self.width, self.extra) == (self.own_width, self.own_extra):
            return dM
        return unaligned(dM, self.own_width, self.own_extra, self.width)[:, : self.own_width]

    def rows(self, g: Tensor, h: Tensor) -> Rows:
        return Rows(unaligned(g.mT, self.own_width, self.own_extra, self.width).mT, h[:, : self.own_width])


def small_side(prepared: Prepared, form: str, dtype: torch.dtype, backend: str) -> SmallSide:
    """The engine of a form, made once a preparation, or for each use where V is there for it alone."""
    found: SmallSide | None = prepared.sides.get((form, dtype, backend))
    if found is None:
        kind: type[SmallSide] = SmallSide
        built = len(prepared.kept)
        if backend == "triton" and form == "folded":
            kind = TritonSide
            batch = prepared.batch
            if batch is not None and ("expansion", dtype) not in prepared.kept:
                together.build(batch.prepared, dtype)
                built = len(prepared.kept)
        found = kind(prepared, form, dtype, backend)
        if prepared.source.kept:  # it holds V
            prepared.sides[form, dtype, backend] = found
        if len(prepared.kept) != built:
            prepared.queue()
    return found
