"""Layers of one shape in one compiled graph, as `torch.library` operations: the way back to the parameters is one
operation for all of them.

    stand_ins          the tensors of several layers                       ->  M and F of each, as one number each
    adapted_joined     what adapted_train takes, and the layer's M and F   ->  what adapted_train gives
    adapted_pull_back  dy, and what adapted_joined keeps                   ->  dx, dM, dF
    adapted_adjoint    dM and dF of several layers, their tensors          ->  gradients of their parameters

`stand_ins` reads no number, so that it may stand before all the layers of a graph: `graph.join` puts it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..factorize import compute_dtype
from .compiled import (
    LAYER,
    decode,
    extra_of,
    lend,
    lent,
    operation,
    prepared_of,
    pulled_back,
    source_of,
    trained,
    trained_fake,
)
from .engines import adjoint
from .preparation import Gradients, Prepared, Rows, by_batch


class Own(NamedTuple):
    """What a layer is made of: tensors, or what stands for them in a graph; None for those that it has not."""

    weight: Any  # as it is stored
    inner_rotation: Any
    inner_scale: Any
    outer: Any
    basis: Any
    singular_values: Any
    outer_basis: Any
    null_basis: Any

    @property
    def parameters(self) -> tuple[Any, ...]:
        """The three that are trained."""
        return self[1:4]


def pack(layers: Iterable[Own]) -> tuple[list[Any], list[bool]]:
    """(what there is of the layers' parts, which of all these are): operations take no lists with None in them."""
    flat = [part for layer in layers for part in layer]
    return [part for part in flat if part is not None], [part is not None for part in flat]


def _unpack(parts: Iterable[Any], present: Sequence[bool]) -> list[Own]:
    there, size = iter(parts), len(Own._fields)
    flat = [next(there) if one else None for one in present]
    return [Own(*flat[i : i + size]) for i in range(0, len(flat), size)]


# -- forward -----------------------------------------------------------------------------------------------------------
def _sizes(null_basis: Tensor | None, spec: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of M and F."""
    shape = decode(spec).shape
    extra = extra_of([null_basis], shape)
    return (shape.width + extra, shape.width), (shape.large, extra)


def _stand_ins(tensors: Sequence[Tensor], specs: str, present: Sequence[bool]) -> list[Tensor]:
    return [layer.inner_scale.new_empty_strided(size, (0, 0), dtype=compute_dtype(layer.inner_scale.dtype))
            for layer, spec in zip(_unpack(tensors, present), specs.split("\n"), strict=True)
            for size in _sizes(layer.null_basis, spec)]  # fmt: skip


@operation("stand_ins", "(Tensor[] tensors, str specs, bool[] present) -> Tensor[]", _stand_ins)
def stand_ins(tensors, specs, present):  # type: ignore[no-untyped-def]
    """M, F of the first layer, M, F of the second, ...: tensors of one number that nobody reads, to carry gradients.

    Args:
        tensors, present: from `pack`. specs: each layer's, a line each.
    """
    return _stand_ins(tensors, specs, present)


@operation("adapted_joined", f"(Tensor x, Tensor? bias, Tensor mixer, Tensor columns, {LAYER}, str spec, bool merged) "
           "-> (Tensor, Tensor)", lambda x, bias, mixer, columns, *rest: trained_fake(x, bias, *rest))  # fmt: skip
def joined(x, bias, mixer, columns, *rest):  # type: ignore[no-untyped-def]
    """`compiled.train`, but gradients go to the stand-ins in place of the parameters."""
    return trained(x, bias, *rest)


# -- backward ----------------------------------------------------------------------------------------------------------
def _prepared(layer: Own, spec: str, d_mixer: Tensor) -> Prepared:
    source = source_of((layer.weight, *layer), spec)[1]
    return lent(d_mixer, source) or prepared_of(source, True)


def _pull_back_fake(dy, x, saved, *rest):  # type: ignore[no-untyped-def]
    *layer, (need_x, learns), spec, _ = rest
    pair = [x.new_empty(size if learns else 0, dtype=compute_dtype(layer[3].dtype)) for size in _sizes(layer[-1], spec)]
    return x.new_empty(x.shape if need_x else 0), *pair


@operation("adapted_pull_back", f"(Tensor dy, Tensor x, Tensor saved, {LAYER}, bool[] needs, str spec, bool merged) "
           "-> (Tensor, Tensor, Tensor)", _pull_back_fake)  # fmt: skip
def pull_back(dy, x, saved, *rest):  # type: ignore[no-untyped-def]
    """(dx, dM, dF); an empty tensor for what `needs` (x, the parameters) leaves out."""
    *layer, needs, spec, merged = rest
    prepared, dx, d_mixer, d_columns = pulled_back(dy, x, saved, layer, needs, spec, merged)
    if isinstance(d_mixer, Rows):
        d_mixer = d_mixer.left.mT @ d_mixer.right
    dtypes = x.dtype, prepared.dtype, prepared.dtype
    found = [x.new_empty(0, dtype=dtype) if d is None else _alone(d.to(dtype))
             for d, dtype in zip((dx if needs[0] else None, d_mixer, d_columns), dtypes, strict=True)]  # fmt: skip
    if needs[1]:
        lend(found[1], prepared)
    return tuple(found)


def _there(layers: Iterable[Own]) -> list[Any]:
    """The parameters that there are."""
    return [p for layer in layers for p in layer.parameters if p is not None]


def _wanted(layers: Iterable[Own], needs: Sequence[bool]) -> list[Any]:
    """The parameters that `needs`, one for each that there is, says want gradients."""
    return [p for p, need in zip(_there(layers), needs, strict=True) if need]


def _adjoint_fake(gradients, tensors, specs, present, needs):  # type: ignore[no-untyped-def]
    wanted = _wanted(_unpack(tensors, present), needs)
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in wanted]


@operation("adapted_adjoint", "(Tensor[] gradients, Tensor[] tensors, str specs, bool[] present, bool[] needs) "
           "-> Tensor[]", _adjoint_fake)  # fmt: skip
def adapted_adjoint(gradients, tensors, specs, present, needs):  # type: ignore[no-untyped-def]
    """Gradients of the parameters that want them. gradients: dM, dF of the first layer, of the second, ..."""
    layers = _unpack(tensors, present)
    many = list(map(_prepared, layers, specs.split("\n"), gradients[::2]))
    found = [g for three in _by_batch(many, gradients[::2], gradients[1::2]) for g in three if g is not None]
    return [_alone(g.to(p.dtype)) for p, g, need in zip(_there(layers), found, needs, strict=True) if need]


def _by_batch(many: Sequence[Prepared], d_mixer: Sequence[Tensor], d_columns: Sequence[Tensor]) -> list[Gradients]:
    """`engines.adjoint`, for those together that were prepared together."""
    found: dict[int, Gradients] = {}
    for own in by_batch(many):
        made = adjoint([many[i] for i in own], [d_mixer[i] for i in own], [d_columns[i] for i in own])
        found |= zip(own, made, strict=True)
    return [found[i] for i in range(len(many))]


def _alone(gradient: Tensor) -> Tensor:
    """The gradient in a storage of its own, as an operation has to return it."""
    gradient = gradient.contiguous()
    return gradient if gradient.untyped_storage().nbytes() == gradient.nbytes else gradient.clone()


# -- autograd ----------------------------------------------------------------------------------------------------------
def _stand_ins_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, ctx.specs, ctx.present = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _stand_ins_gradient(ctx, gradients):  # type: ignore[no-untyped-def]
    """A layer that nothing used gets no gradient."""
    tensors, specs = ctx.saved_tensors, ctx.specs.split("\n")
    layers = _unpack(range(len(tensors)), ctx.present)
    used = [i for i in range(len(layers)) if gradients[2 * i] is not None]  # dM and dF come together
    own = [layers[i] for i in used]
    needs = [ctx.needs_input_grad[0][at] for at in _there(own)]
    result: list[Tensor | None] = [None] * len(tensors)
    if any(needs):
        there, present = pack(own)
        given = [d for i in used for d in gradients[2 * i : 2 * i + 2]]
        found = adapted_adjoint(given, [tensors[at] for at in there], "\n".join(specs[i] for i in used), present, needs)
        for at, gradient in zip(_wanted(own, needs), found, strict=True):
            result[at] = gradient
    return result, None, None


stand_ins.register_autograd(_stand_ins_gradient, setup_context=_stand_ins_context)


def _joined_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, _, _, *layer, ctx.spec, ctx.merged = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *layer)


def _joined_gradient(ctx, dy, _):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 15
    needs = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:4])]
    dx, *pair = pull_back(dy, *ctx.saved_tensors, needs, ctx.spec, ctx.merged)
    d_bias = dy.sum(0) if ctx.needs_input_grad[1] else None
    return dx if needs[0] else None, d_bias, *(pair if needs[1] else (None, None)), *[None] * 11


joined.register_autograd(_joined_gradient, setup_context=_joined_context)
