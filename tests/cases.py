"""Parameters and factors, drawn by hypothesis, for tests of preparation alone."""

import math

import torch
from hypothesis import strategies as st

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.factorize import Factors
from ssvdo_kernels.ops.base import DenseBase
from ssvdo_kernels.ops.complement import Projector
from ssvdo_kernels.ops.outer import Outer
from ssvdo_kernels.ops.preparation import Prepared, Source


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0].contiguous()


def shifted(tensor, offset):
    """The same numbers, contiguous, `offset` elements into another storage: of another alignment."""
    storage = tensor.new_empty(tensor.numel() + offset)
    storage[offset:] = tensor.flatten()
    return storage[offset:].view(tensor.shape)


def lying(matrix, by_rows, pad=0, offset=0):
    """The same numbers by rows or by columns, `offset` elements into a storage, with `pad` NaN between two."""
    lines = matrix if by_rows else matrix.mT
    storage = matrix.new_full((offset + lines.shape[0] * (lines.shape[1] + pad),), math.nan)
    view = storage[offset:].view(lines.shape[0], -1)[:, : lines.shape[1]]
    view.copy_(lines)
    return view if by_rows else view.mT


KINDS = ("normal", "zero", "ill-conditioned", "duplicated", "one huge entry")


def make_outer(kind, c, l):  # noqa: E741
    if kind == "zero":
        return torch.zeros(c, l, dtype=torch.float64)
    L = torch.randn(c, l, dtype=torch.float64) / math.sqrt(c)
    if kind == "ill-conditioned":
        L = L * torch.logspace(0, -8, l, dtype=torch.float64)
    elif kind == "duplicated":
        L[:, -1] = L[:, 0]
    elif kind == "one huge entry":
        L[0, 0] = 1e4
    return L


@st.composite
def outer_cases(draw):
    d = draw(st.integers(1, 30))
    c = draw(st.integers(1, 60))
    return (d, c, draw(st.integers(1, min(c, d))), draw(st.sampled_from(KINDS)),
            10 ** draw(st.floats(-8, 0)), draw(st.sampled_from(["rotation", "additive"])), draw(st.integers(0, 9)))


@st.composite
def inner_cases(draw):
    k = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 130, 200])))
    return (k, draw(st.integers(0, k + 5)), draw(st.integers(0, min(3, k))),
            draw(st.sampled_from(["cayley", "neumann", "first_order"])), draw(st.sampled_from([0.0, 0.01, 0.3])),
            draw(st.integers(0, 9)))


def outer_layers(case, count):
    """[Outer] of `count` layers of other alignments, a null space of one column where there is room."""
    d, c, l, kind, tau, outer, seed = case  # noqa: E741
    torch.manual_seed(seed)
    layers = []
    for i in range(count):
        U, V, null = orthonormal(c + d, d), orthonormal(d, d), min(1, d - l)
        S = torch.rand(d).double() + 0.5
        tall = shifted((U * S) @ V.mT, i)
        projector = Projector(DenseBase(tall), False, V, S, d, U[:, d - null :] if null else None, len(tall))
        turned = U[:, :l].contiguous() if outer == "rotation" else None
        layers.append(Outer(outer=make_outer(kind, c, l), scale=0.5, U=turned, projector=projector, tau=tau))
    return layers


def inner_layers(case, count):
    """(shape, config, (packed, shift, singular))."""
    k, l, _, rotation, spread, seed = case  # noqa: E741
    torch.manual_seed(seed)
    spread /= max(1, k // 40)
    config = SSVDOConfig(rotation=rotation, backend="reference")
    shape = LayerShape(10 * k + 20, 10 * k, False, k, l)
    draw = [torch.randn(n, dtype=torch.float64) for n in (k * (k - 1) // 2, k)]
    packed = [shifted(spread * draw[0], i) for i in range(count)]
    singular = [torch.rand(shape.width).double() + 0.5 for _ in range(count)]
    shift = [spread * draw[1] for _ in range(count)]
    return shape, config, (packed, shift, singular)


def unprepared(packed, shift, singular, null, shape, config):
    """A Prepared of an inner part alone, made by PyTorch; null: q."""
    space = packed.new_zeros(shape.large, null + shape.width - shape.k)
    factors = Factors(packed.new_zeros(shape.d, shape.width), singular, None, space)
    base = DenseBase(packed.new_zeros(0, 0))
    made = Prepared(Source((packed, shift, None), factors, base, shape, config, "layer", None))
    made.finish(made.inner_reference(), packed.new_zeros(shape.large, shape.l), packed.new_zeros(0, 0), None)
    return made
