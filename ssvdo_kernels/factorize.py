"""The one factorisation of a pretrained weight: V and S, and the few columns of U that are kept.

The tall matrix A (large x d; W0, or W0^T for a wide layer) is A = U diag(S) V^T. U = A V S^-1 goes through the weight
itself, and so does the projector onto its complement (ops/complement.py); so V is all of any size that is kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from .config import LayerShape
from .files import as_bytes, as_file, opened, write_atomically
from .ops.base import DenseBase
from .ops.complement import Projector, inverse_of, project

DEPARTURE = 1e-5  # of U' from orthonormality that half-precision V may leave
DEPARTURE_ANGLE = 0.3  # radians by which the outer vectors are turned where that is measured


@dataclass(frozen=True)
class Factors:
    """What the adapter keeps of W0's factorisation. Tensors of no size are None.

    basis: V (d x d; d x k without an outer part), in the weight's dtype, or in float32 where a half type would make P
    depart from a projector by more than `DEPARTURE`. singular_values: S (as many as V has columns), descending, in the
    dtype of the work. outer_basis: U_l (large x l); null_basis: N (large x q), the columns of U among the first
    max(k, l) whose S_i has no usable inverse; both in the weight's dtype.
    """

    basis: Tensor
    singular_values: Tensor
    outer_basis: Tensor | None
    null_basis: Tensor | None

    @property
    def null(self) -> int:
        """q."""
        return 0 if self.null_basis is None else self.null_basis.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, in declaration order, of those that are there."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Factors:
        """The inverse of `tensors`; an unknown name or a missing one is a TypeError."""
        return cls(**{"outer_basis": None, "null_basis": None, **tensors})  # type: ignore[arg-type]


FACTOR_NAMES = tuple(f.name for f in fields(Factors))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_weight(weight: Tensor, name: str) -> None:
    """Raises what `factorize` would raise for this weight."""
    kind, weight = type(weight.data), weight.detach()
    if kind is not Tensor:
        raise TypeError(f"{name} is a {kind.__module__}.{kind.__qualname__}; allowed: a plain torch.Tensor (give a "
                        "quantised layer its dequantised weight first; adapt a model before fully_shard)")
    if weight.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; a matrix (out_features x in_features) is needed")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device; load the pretrained weight before it is factorised")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(f"{name} has dtype {weight.dtype}; allowed: float16, bfloat16, float32, float64")
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{name} has {bad} non-finite entries (NaN or infinity); it cannot be factorised")


def tall_of(weight: Tensor, shape: LayerShape) -> Tensor:
    """A: a view of W0, or of its transpose."""
    return weight.mT if shape.transposed else weight


def _signs(v: Tensor) -> Tensor:
    """+-1 for each column of V, so that <v_i, g> >= 0 with g_j = cos(j).

    A generic vector, so that structured weights (Hadamard, +-1) do not tie as where the largest entry decides.
    """
    g = torch.cos(torch.arange(v.shape[0], dtype=torch.float64, device="cpu")).to(v)
    return torch.where(g @ v < 0, -1.0, 1.0).to(v)


def thin_svd(matrix: Tensor, left: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    """A = U diag(S) V^T for A of size large x d, large >= d, with a fixed sign for each pair (u_i, v_i).

    By way of A = Q R, at half the cost of the SVD of A. Returns U (large x d; None without `left`, which saves a
    third), S (d, descending), V (d x d).
    """
    # Of numbers near the ends of the exponent range, which LAPACK loses, a multiple by a power of two is taken.
    exponent = torch.frexp(torch.linalg.vector_norm(matrix, torch.inf)).exponent
    scale = torch.exp2(torch.where(exponent.abs() < 200, 0, exponent - 1).to(matrix.dtype))
    q, r = torch.linalg.qr(matrix if scale == 1 else matrix / scale, mode="reduced" if left else "r")
    u, s, vt = torch.linalg.svd(r)
    v = vt.mT
    sign = _signs(v)
    return (q @ (u * sign) if left else None), s * scale, (v * sign).contiguous()


def factorize(
    weight: Tensor, shape: LayerShape, *, name: str = "weight", cache_dir: str | os.PathLike[str] | None = None,
    basis: Tensor | None = None, null_basis: Tensor | None = None,
) -> Factors:  # fmt: skip
    """Factorises a pretrained weight once.

    Args:
        weight: out_features x in_features, any floating dtype and device, finite.
        shape: its `LayerShape`.
        name: how errors call the weight.
        cache_dir: a folder in which factors are kept, keyed by the weight's content; None: no cache.
        basis: V_k (d x max(k, l)) to take as it is, of a weight that differs by rounding alone; None: the weight's own.
        null_basis: N (large x q) to take with it, the last q columns of U among the first max(k, l).

    Raises:
        ValueError: weight is not a matrix, on the meta device, or has NaN or infinite entries; a cache file is damaged.
        TypeError: weight is not of a floating dtype.
        MemoryError (torch.OutOfMemoryError on a GPU): there is too little memory; says about how much is needed.
    """
    weight = weight.detach()
    check_weight(weight, name)
    if cache_dir is None or basis is not None:
        return _within_memory(weight, shape, name, basis, null_basis)
    path = Path(cache_dir) / f"{content_key(weight, shape)}.safetensors"
    if path.exists():
        return _load(path, weight.device)
    factors = _within_memory(weight, shape, name, None, None)
    write_atomically({path: as_file(factors.tensors(), {})})
    return factors


def _within_memory(
    weight: Tensor, shape: LayerShape, name: str, basis: Tensor | None, null_basis: Tensor | None
) -> Factors:
    try:
        made = _factorize(weight, shape, basis, null_basis)
        if weight.device.type == "cpu" and sys.platform == "linux":
            _give_back()
        return made
    except (MemoryError, RuntimeError) as error:
        cuda = isinstance(error, torch.OutOfMemoryError)
        if not cuda and not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        need = 8 * (3 * shape.large * shape.d + 5 * shape.d**2) / 2**20
        size = f"{shape.out_features} x {shape.in_features}"
        said = f"{name}: factorising a {size} weight needs about {need:.0f} MiB on {weight.device}, which are not free"
        raise (torch.OutOfMemoryError if cuda else MemoryError)(said) from error


def _give_back() -> None:
    """Returns what has been freed to the system. The C library would keep blocks of up to 32 MiB, and over a stack of
    layers these grow to half the size of the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def without_inverse(singular: Tensor, width: int, large: int, dtype: torch.dtype) -> int:
    """q: how many of the first `width` singular values (descending) are too small for W0 v_i / S_i to stand for u_i.

    The backward pass has u_i^T dy from W0^T dy, rounded to `dtype` at the size of S_0: the quotient errs by
    eps S_0 / S_i. S_i > min(sqrt(eps), 1/32) S_0 keeps that at sqrt(eps) (a quarter in bfloat16).
    """
    info, small = torch.finfo(dtype), torch.finfo(compute_dtype(dtype))
    floor = float(singular[0]) * min(max(info.eps**0.5, info.eps * large), 1 / 32)
    return int((singular[:width] <= max(floor, small.tiny / small.eps)).sum())


def _factorize(weight: Tensor, shape: LayerShape, basis: Tensor | None, null_basis: Tensor | None) -> Factors:
    # float64 for every dtype: near-equal singular values then give the same vectors on every machine.
    exact, width, l = tall_of(weight, shape).to(torch.float64), shape.width, shape.l  # noqa: E741
    u, s, v = thin_svd(exact, weight.dtype == torch.float64) if basis is None else _svd_beside(exact, basis.double())
    q = without_inverse(s, width, shape.large, weight.dtype)
    if u is None and (q or (l and float(s[l - 1]) <= 1e-4 * float(s[0]))):
        u, s, v = thin_svd(exact)  # A v_i / S_i would err by eps S_0 / S_i
    if u is not None and null_basis is not None:
        q = max(q, null_basis.shape[1])
        u[:, width - null_basis.shape[1] : width] = null_basis
    outer = u[:, :l] if u is not None else (exact @ v[:, :l]) / s[:l]
    null = u[:, width - q : width] if u is not None and q else None
    dtype = compute_dtype(weight.dtype)

    def stored(tensor: Tensor, dtype: torch.dtype = weight.dtype) -> Tensor:
        return tensor.to(dtype, copy=True).contiguous()

    made = Factors(stored(v[:, : shape.kept]), stored(s[: shape.kept], dtype), stored(outer) if l else None,
                   None if null is None else stored(null))  # fmt: skip
    if l and weight.dtype != dtype and departure(weight, made, shape, (exact, v, s)) > DEPARTURE:
        made = replace(made, basis=stored(v, dtype))
    return made


def _svd_beside(exact: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of A with the first columns of V given: those as near to them as orthonormal ones can be, the rest the
    singular vectors of A on their complement."""
    p, _, qt = torch.linalg.svd(basis, full_matrices=False)
    near = p @ qt
    rest = torch.linalg.qr(near, mode="complete").Q[:, near.shape[1] :]
    v = torch.cat([near, rest @ thin_svd(exact @ rest)[2] if rest.shape[1] else rest], 1)
    u, r = torch.linalg.qr(exact @ v)  # r is near to diagonal: what is not is the departure of the two weights
    s = r.diagonal()
    return u * torch.where(s < 0, -1.0, 1.0), s.abs(), v


def departure(
    weight: Tensor, factors: Factors, shape: LayerShape, exact: tuple[Tensor, Tensor, Tensor] | None = None
) -> float:
    """max |U^T Z R^-T|: by how much U' would depart from orthonormality with 8 random vectors of the complement mixed
    in at `DEPARTURE_ANGLE`, Z as preparation computes it and U that of the float64 factorisation.

    exact: (A, V, S) in float64 where the caller has them.
    """
    if not shape.l:
        return 0.0
    tall = tall_of(weight.detach(), shape)
    if exact is None:
        exact = (tall.double(), *thin_svd(tall.double(), False)[:0:-1])
    a, v, s = exact
    work = factors.singular_values.dtype
    inverse = inverse_of(factors.singular_values, shape.width, factors.null)
    if not bool((inverse > 0).any()):
        return 0.0  # W0 = 0
    probe = torch.randn(shape.c, 8, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    probe = (probe / probe.norm(dim=0)).to(tall.device, work)
    made = Projector(DenseBase(weight.detach()), shape.transposed, factors.basis, factors.singular_values, shape.width,
                     factors.null_basis, shape.large)  # fmt: skip
    z = project([made], [probe], shape.c, shape.large)[0].double()
    lean = (v.mT @ (a.mT @ z))[inverse > 0] / s[inverse > 0, None]
    return DEPARTURE_ANGLE * float((lean / z.norm(dim=0)).abs().max())


def content_key(weight: Tensor, shape: LayerShape) -> str:
    """SHA-256 (hex) of the weight's bytes, shape and dtype and of the sizes kept."""
    digest = hashlib.sha256(repr(("ssvdo-factors-3", shape, str(weight.dtype))).encode())
    digest.update(as_bytes(weight))
    return digest.hexdigest()


def _load(path: Path, device: torch.device) -> Factors:
    from safetensors import SafetensorError

    try:
        with opened(path) as source:
            return Factors.of({name: source.get_tensor(name).to(device) for name in source.keys()})  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} in the factor cache is damaged ({error}); delete it") from None
