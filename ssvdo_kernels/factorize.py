"""The one factorisation of a pretrained weight, and the complement of its large side without ever storing it.

The tall matrix A (large x d; W0, or W0^T for a wide layer) is A = U diag(S) V^T. With U = [U_top (d x d);
U_bot (c x d)] and the SVD of the top block, U_top = P cos(t) R^T, let

    Y = [ P sqrt(1 + cos t) ;  U_bot R / sqrt(1 + cos t) ]     (large x r;  r = min(d, c), t = 0 elsewhere)

Then Y^T Y = 2I, H = I - Y Y^T is a symmetric orthogonal block reflector, its first d columns span U's columns, and the
other c are the complement, U2 = H[:, d:]. Unlike a Householder reconstruction by LU no matrix is inverted (1 + cos t
lies between 1 and 2), and U2 depends on the *span* of U alone: neither signs nor rotations of the singular vectors
change it. U2 X costs two thin products, and Y is no larger than U.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from .config import LayerShape


@dataclass(frozen=True)
class Factors:
    """What the adapter keeps of W0's factorisation (width = max(k, l); q directions have too small an S_i).

    Half-precision weights keep their bases in the weight's dtype and the singular values in float32.
    """

    inner_basis: Tensor  # V_k, d x width
    singular_values: Tensor  # S_k, width, descending
    outer_basis: Tensor  # U_l, large x l
    reflector: Tensor  # Y, large x r (r = 0 when l = 0)
    null_basis: Tensor  # U[:, k-q:k], large x q: directions whose S_i has no usable inverse in the weight's dtype

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, in declaration order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_weight(weight: Tensor, name: str) -> None:
    """Raises what `factorize` would raise for this weight."""
    kind = type(weight.data)
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


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A = U diag(S) V^T for A of size large x d, large >= d, with a fixed sign for each pair (u_i, v_i).

    The sign makes <v_i, g> >= 0 with g_j = cos(j): a generic vector, so that structured weights (Hadamard, +-1) do not
    tie as they do when the largest entry decides. Returns U (large x d), S (d, descending), V (d x d).
    """
    # Scaled to entries of at most 1: LAPACK loses those near the ends of the exponent range.
    peak = matrix.abs().amax()
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    u, s, vt = torch.linalg.svd(matrix / peak, full_matrices=False)
    g = torch.cos(torch.arange(vt.shape[1], dtype=torch.float64)).to(vt)
    sign = torch.where(vt @ g < 0, -1.0, 1.0).to(vt)
    return u * sign, s * peak, (vt * sign[:, None]).mT.contiguous()


def _reflector(u: Tensor) -> Tensor:
    large, d = u.shape
    r = min(d, large - d)
    p, cosine, rt = torch.linalg.svd(u[:d])
    root = (1 + cosine[d - r :].clamp(max=1)).sqrt()  # descending cosines: the first d - r are exactly 1
    return torch.cat([p[:, d - r :] * root, (u[d:] @ rt[d - r :].mT) / root])


def factorize(
    weight: Tensor, shape: LayerShape, *, name: str = "weight", cache_dir: str | os.PathLike[str] | None = None
) -> Factors:
    """Factorises a pretrained weight once.

    Args:
        weight: out_features x in_features, any floating dtype and device, finite.
        shape: its `LayerShape`.
        name: how errors call the weight.
        cache_dir: a folder in which factors are kept, keyed by the weight's content; None: no cache.

    Raises:
        ValueError: weight is not a matrix, on the meta device, or has NaN or infinite entries; a cache file is damaged.
        TypeError: weight is not of a floating dtype.
        MemoryError (torch.OutOfMemoryError on a GPU): there is too little memory; says about how much is needed.
    """
    weight = weight.detach()
    check_weight(weight, name)
    if cache_dir is None:
        return _within_memory(weight, shape, name)
    path = Path(cache_dir) / f"{content_key(weight, shape)}.safetensors"
    if path.exists():
        return _load(path, weight.device)
    factors = _within_memory(weight, shape, name)
    _save(path, factors)
    return factors


def _within_memory(weight: Tensor, shape: LayerShape, name: str) -> Factors:
    try:
        return _factorize(weight, shape)
    except (MemoryError, RuntimeError) as error:
        cuda = isinstance(error, torch.OutOfMemoryError)
        if not cuda and not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        need = 8 * (6 * shape.large * shape.d + 3 * shape.d**2) / 2**20
        size = f"{shape.out_features} x {shape.in_features}"
        said = f"{name}: factorising a {size} weight needs about {need:.0f} MiB on {weight.device}, which are not free"
        raise (torch.OutOfMemoryError if cuda else MemoryError)(said) from error


def without_inverse(singular: Tensor, shape: LayerShape, dtype: torch.dtype) -> int:
    """q: how many of the first k singular values (descending) are too small for W0 v_i / S_i to stand for u_i.

    The backward pass has u_i^T dy from W0^T dy, rounded to `dtype` at the size of S_0: the quotient errs by
    eps S_0 / S_i. S_i > min(sqrt(eps), 1/32) S_0 keeps that at sqrt(eps) (a quarter in bfloat16).
    """
    info, least = torch.finfo(dtype), torch.finfo(compute_dtype(dtype))
    floor = float(singular[0]) * min(max(info.eps**0.5, info.eps * shape.large), 1 / 32)
    return int((singular[: shape.k] <= max(floor, least.tiny / least.eps)).sum())


def _factorize(weight: Tensor, shape: LayerShape) -> Factors:
    # float64 for every dtype: for 1.6 x the time, near-equal singular values give the same vectors on every machine.
    u, s, v = thin_svd((weight.mT if shape.transposed else weight).to(torch.float64))
    dtype = compute_dtype(weight.dtype)
    q = without_inverse(s, shape, weight.dtype)

    def stored(tensor: Tensor) -> Tensor:
        if not tensor.numel():  # contiguous() would keep its odd strides, which DeepSpeed cannot view as bytes
            return torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device)
        return tensor.to(weight.dtype, copy=True).contiguous()

    return Factors(
        inner_basis=stored(v[:, : shape.width]),
        singular_values=s[: shape.width].to(dtype, copy=True),
        outer_basis=stored(u[:, : shape.l]),
        reflector=stored(_reflector(u) if shape.l else u[:, :0]),
        null_basis=stored(u[:, shape.k - q : shape.k]),
    )


def apply_complement(reflector: Tensor, x: Tensor) -> Tensor:
    """U2 x = [0; x] - Y (Y_bot^T x). reflector: Y, large x r; x: c x cols; returns large x cols."""
    d = reflector.shape[0] - x.shape[0]
    y = reflector @ (reflector[d:].mT @ x)
    y.neg_()[d:] += x
    return y


def apply_complement_transposed(reflector: Tensor, y: Tensor, d: int) -> Tensor:
    """U2^T y = y_bot - Y_bot (Y^T y). y: large x cols; returns c x cols, c = large - d."""
    return torch.addmm(y[d:], reflector[d:], reflector.mT @ y, alpha=-1)


def content_key(weight: Tensor, shape: LayerShape) -> str:
    """SHA-256 (hex) of the weight's bytes, shape and dtype and of the sizes kept."""
    digest = hashlib.sha256(repr(("ssvdo-factors-2", shape, str(weight.dtype))).encode())
    digest.update(as_bytes(weight))
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it lies on the CPU so already."""
    data: memoryview = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data
    return data


def _load(path: Path, device: torch.device) -> Factors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Factors(**load_file(path, device=str(device)))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} in the factor cache is damaged ({error}); delete it") from None


def _save(path: Path, factors: Factors) -> None:
    write_atomically({path: as_file(factors.tensors(), {})})


def as_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file's content."""
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata or None)


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Writes files so that each path holds either the old content or the whole new one, whatever happens.

    All are written beside their places and flushed to the disk before the first takes its place; on an error before
    that, nothing has changed. A killed process may leave a file named .NAME.* behind.
    """
    written: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            with temporary.open("xb") as file:  # with the user's own permissions, which tempfile's would not have
                written[path] = temporary
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(written[path], path)
            del written[path]
    except BaseException:
        for left in written.values():
            left.unlink(missing_ok=True)
        raise
