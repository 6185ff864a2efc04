"""What ties an adapter to the base weight that it was trained on, and to the singular basis that its numbers are in.

- SHA-256 of W0's bytes: another base is refused; with another dtype W0 is compared by a 4 x 4 sketch instead.
- A sketch of V_k and of N, the null columns of U: the inner numbers are coordinates in these. Where a factorisation
  comes out otherwise (near-equal singular values on another LAPACK, a rank-deficient weight, a base in another dtype),
  the bases that were kept with the adapter are taken; without them it is refused. The outer numbers need no more: what
  they are turned towards depends on W0 and N alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LayerShape
from .factorize import Factors, factorize, tall_of, without_inverse
from .files import as_bytes
from .ops.products import times
from .origin import SKETCH, alike, coarser, probes, weight_sketch

DTYPES = ("torch.float64", "torch.float32", "torch.bfloat16", "torch.float16")  # of adapted weights
BASIS_TOLERANCE = 1e-2  # relative change of one sketched vector; a flip gives about 2, rounding in float64 below 1e-6


class CheckpointError(ValueError):
    """An adapter file is damaged, foreign, or does not fit the model.

    Examples:
        >>> Path("adapter.safetensors").write_bytes(b"cut off")
        7
        >>> load_ssvdo(plain, "adapter.safetensors")
        Traceback (most recent call last):
        ssvdo_kernels.fingerprint.CheckpointError: adapter.safetensors: no whole safetensors file ...
    """


class BaseMismatchError(CheckpointError):
    """The adapter was trained on other base weights, or in another singular basis.

    Examples:
        >>> folder = save_ssvdo(model, "adapter")
        >>> other = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> load_ssvdo(other, folder)
        Traceback (most recent call last):
        ssvdo_kernels.fingerprint.BaseMismatchError: ...
    """


@dataclass(frozen=True)
class Bases:
    """The singular vectors that an adapter's inner numbers are coordinates in.

    V: d x width, V_k; N: large x q or None, the last q of the first `width` columns of U.
    """

    V: Tensor
    N: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, factors: Factors, shape: LayerShape, q: int | None = None) -> Bases:
        """Those of a layer. q: None: as many as any dtype needs (a half type cannot divide by what float32 can)."""
        width, S = shape.width, factors.singular_values
        q = without_inverse(S, width, shape.large, torch.bfloat16) if q is None else q
        N, more = factors.null_basis, slice(width - q, width - factors.null)
        if q > factors.null:
            U = times(tall_of(weight.detach(), shape), factors.basis[:, more].to(S.dtype)) / S[more]
            N = U if N is None else torch.cat([U, N.to(U.dtype)], 1)
        return cls(factors.basis[:, :width], None if N is None or not q else N[:, N.shape[1] - q :])

    def sketch(self) -> Tensor:
        """(width + q) x SKETCH, a row for each vector, float32."""
        both = [_sketched(self.V)] + ([] if self.N is None else [_sketched(self.N)])
        return torch.cat(both).to(torch.float32)


    def unfit(self, shape: LayerShape, sketch: Tensor) -> str:
        """Why these are not the bases that were sketched; "" where they are."""
        q = sketch.shape[0] - shape.width
        sizes = [(self.V, (shape.d, shape.width)), *([(self.N, (shape.large, q))] if self.N is not None or q else [])]
        for tensor, size in sizes:
            if tensor is None or tuple(tensor.shape) != size or not tensor.is_floating_point():
                return f"{None if tensor is None else (tuple(tensor.shape), tensor.dtype)} in place of {size}"
            if not torch.isfinite(tensor).all():
                return "it has non-finite numbers"
        if not (worst := departure(self.sketch(), sketch)) <= BASIS_TOLERANCE:  # "not": it may be NaN
            return f"its sketch differs by {worst:.2g}"
        V = self.V.double()
        lean = float((V.mT @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).abs().max())
        return f"V^T V departs from I by {lean:.2g}" if lean > 4 * coarser(self.V.dtype) else ""


def departure(sketch: Tensor, saved: Tensor) -> float:
    """The largest relative change of one sketched vector."""
    saved = saved.double()
    return float((sketch.double() - saved).norm(dim=1).max() / saved.norm(dim=1).square().mean().sqrt())


@dataclass(frozen=True)
class Fingerprint:
    """Of a weight and of the bases of its adapter. sha256: hex; weight: SKETCH x SKETCH float64; basis: `Bases.sketch`.
    """

    dtype: str
    sha256: str
    weight: Tensor
    basis: Tensor

    @classmethod
    def of(cls, weight: Tensor, bases: Bases) -> Fingerprint:
        """The fingerprint of what is there."""
        return cls(str(weight.dtype), _sha256(weight), weight_sketch(weight), bases.sketch())

    @staticmethod
    def places(shape: LayerShape) -> dict[str, Tensor]:
        """Tensors of fixed sizes, all 0, for a state_dict to carry a fingerprint in."""
        return {"base_digest": torch.zeros(33), "base_sketch": torch.zeros(SKETCH, SKETCH, dtype=torch.float64),
                "basis_sketch": torch.zeros(2 * shape.width, SKETCH)}  # fmt: skip

    def write(self, places: Mapping[str, Tensor]) -> None:
        """Into tensors of these sizes; bytes as floats, so that an average of checkpoints has them, too."""
        digest = [DTYPES.index(self.dtype), *bytes.fromhex(self.sha256)]
        places["base_digest"].copy_(torch.tensor(digest, dtype=torch.float32, device="cpu"))
        places["base_sketch"].copy_(self.weight)
        places["basis_sketch"].zero_()[: len(self.basis)].copy_(self.basis)

    @classmethod
    def read(cls, places: Mapping[str, Tensor], shape: LayerShape) -> Fingerprint | None:
        """What `write` wrote; None where nothing has been written."""
        dtype, *digest = (int(b) for b in places["base_digest"].round().clamp(0, 255).tolist())
        if not any(digest):
            return None
        basis = places["basis_sketch"].cpu().float()
        q = int((basis[shape.width :] != 0).any(1).sum())
        return cls(DTYPES[min(dtype, 3)], bytes(digest).hex(), places["base_sketch"].cpu(), basis[: shape.width + q])

    def check(self, weight: Tensor, where: str, exact: bool = True) -> None:
        """Raises BaseMismatchError where `weight` is not the one that was trained on. exact: in the same dtype to the
        bit; else up to roundings, as where checkpoints have been averaged."""
        same = str(weight.dtype) == self.dtype and _sha256(weight) == self.sha256
        if not same and not (exact and str(weight.dtype) == self.dtype):
            trained = getattr(torch, self.dtype.removeprefix("torch."))
            same = alike(self.weight, weight, coarser(trained, weight.dtype))
        if not same:
            raise BaseMismatchError(
                f"{where}: trained on other base weights than this model's; load the base that it was made for")

    def adopt(self, factors: Factors, weight: Tensor, shape: LayerShape, kept: Bases | None, where: str) -> Factors:
        """`factors` of `weight` where their bases are those trained in, else factors in the bases that were kept.

        Raises:
            BaseMismatchError: they are others, and none were kept.
        """
        own = Bases.of(weight, factors, shape, self.basis.shape[0] - shape.width)
        worst = departure(own.sketch(), self.basis)
        if worst <= BASIS_TOLERANCE:
            return factors
        if kept is None:
            raise BaseMismatchError(
                f"{where}: the singular vectors of W0 came out otherwise here (sketch differs by {worst:.2g}, allowed "
                f"{BASIS_TOLERANCE}), as near-equal or zero singular values do on another LAPACK or dtype; save the "
                "adapter with its basis where it was trained (include_basis=True of save_ssvdo and of PEFT), and load "
                "that file")
        if reason := kept.unfit(shape, self.basis):
            raise BaseMismatchError(f"{where}: the basis that was kept with the adapter is not the one that it was "
                                    f"trained in ({reason})")
        return factorize(weight, shape, name=where, basis=kept.V.to(weight.device),
                         null_basis=None if kept.N is None else kept.N.to(weight.device))  # fmt: skip


def _sketched(vectors: Tensor) -> Tensor:
    V = vectors.detach().to(torch.float64)
    return (V.mT @ probes(V.shape[0], V)).cpu()


def _sha256(weight: Tensor) -> str:
    return hashlib.sha256(as_bytes(weight)).hexdigest()
