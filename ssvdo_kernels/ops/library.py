"""The layer as `torch.library` operations: what torch.compile, torch.export and their like see of it.

    prepare   parameters, factors          ->  M, F and what its backward needs
    linear    x, M, F, W0, bias            ->  y (factored, folded or core form) and, if wide, g of linear.py
    merge     M, F, W0                     ->  W'; then y is an ordinary linear map

Each is functional: real and fake implementations, a backward that is an operation as well, nothing kept between calls.
A compiled layer therefore prepares in every forward, where an eager one prepares once per optimiser step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import LayerShape, SSVDOConfig
from ..factorize import Factors
from ..planner import build_cost, token_cost
from . import own_dtypes
from .dispatch import token_path
from .linear import linear_backward, linear_forward, small_side
from .matrices import Matrices
from .preparation import Prepared, State


def encode(shape: LayerShape, config: SSVDOConfig) -> str:
    """A layer's sizes and formula as the string that every operation takes as `spec`."""
    sizes = {name: getattr(shape, name) for name in ("out_features", "in_features", "transposed", "k", "l")}
    return json.dumps({"shape": sizes, "config": config.to_dict()})


@lru_cache(maxsize=256)
def decode(spec: str) -> tuple[LayerShape, SSVDOConfig]:
    """The inverse of `encode`."""
    read = json.loads(spec)
    return LayerShape(**read["shape"]), SSVDOConfig.from_dict(read["config"])


def _op(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a real implementation, run outside autocast, with its fake."""

    def register(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"ssvdo_kernels::{name}", own_dtypes()(function), mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    return register


_FACTORS = "Tensor inner_basis, Tensor singular_values, Tensor outer_basis, Tensor reflector, Tensor null_basis"
_PARAMETERS = "Tensor rotation, Tensor scale, Tensor outer"
_MATRICES = "Tensor mixer, Tensor columns"


# -- prepare ---------------------------------------------------------------------------------------------------------
def _prepare_fake(rotation, scale, outer, inner_basis, singular_values, outer_basis, reflector, null_basis, spec):  # type: ignore[no-untyped-def]
    shape, _ = decode(spec)
    k, l, e, like = shape.k, shape.l, shape.l + null_basis.shape[1], singular_values  # noqa: E741
    sizes = (shape.width + e, shape.width), (shape.large, e), (k, k), (k, k), (l, l)
    return tuple(like.new_empty(size) for size in sizes)


@_op("prepare", f"({_PARAMETERS}, {_FACTORS}, str spec) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _prepare_fake)
def prepare(rotation, scale, outer, inner_basis, singular_values, outer_basis, reflector, null_basis, spec):  # type: ignore[no-untyped-def]
    """(mixer, columns, G, saved, X); see preparation.py."""
    factors = Factors(inner_basis, singular_values, outer_basis, reflector, null_basis)
    made = Prepared((rotation, scale, outer), factors, *decode(spec))
    state = (made.state.G, made.state.saved, made.state.X)
    return made.mixer, made.columns, *(t.contiguous() for t in state)  # LAPACK's are column-major


def _prepare_backward_fake(d_mixer, d_columns, rotation, scale, outer, *_):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(p, memory_format=torch.contiguous_format) for p in (rotation, scale, outer))


@_op("prepare_backward", f"(Tensor d_mixer, Tensor d_columns, {_PARAMETERS}, {_FACTORS}, Tensor G, Tensor saved, "
     "Tensor X, str spec) -> (Tensor, Tensor, Tensor)", _prepare_backward_fake)  # fmt: skip
def prepare_backward(d_mixer, d_columns, rotation, scale, outer, *rest):  # type: ignore[no-untyped-def]
    """(d rotation, d scale, d outer), each in its parameter's dtype."""
    *factors, G, saved, X, spec = rest
    parameters = (rotation, scale, outer)
    made = Prepared.restored(parameters, Factors(*factors), *decode(spec), State(G, saved, X))
    gradients = made.backward(d_mixer, d_columns)
    return tuple(g.to(p.dtype).contiguous() for g, p in zip(gradients, parameters, strict=True))


def _prepare_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.spec = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.shapes = output[0].shape, output[1].shape


def _prepare_gradient(ctx, d_mixer, d_columns, *_):  # type: ignore[no-untyped-def]
    tensors, like = ctx.saved_tensors, ctx.saved_tensors[4]  # the singular values: of the matrices' dtype
    d_mixer, d_columns = (like.new_zeros(shape) if d is None else d
                          for d, shape in zip((d_mixer, d_columns), ctx.shapes, strict=True))
    return (*prepare_backward(d_mixer, d_columns, *tensors, ctx.spec), *[None] * 6)


prepare.register_autograd(_prepare_gradient, setup_context=_prepare_context)


# -- linear ----------------------------------------------------------------------------------------------------------
def _saved_columns(shape: LayerShape, config: SSVDOConfig, extra: int) -> int:
    return (shape.d if config.path == "core" else shape.width) + extra


def _engine(matrices: Matrices, config: SSVDOConfig, x: Tensor) -> Any:
    """The form's engine; factored or folded, whichever is cheaper for these rows alone, where `path` leaves it open."""
    backend, _ = token_path(config.backend, x.device, x.dtype)
    form = config.path
    if form in ("auto", "merged"):
        shape, extra = matrices.shape, matrices.columns.shape[1]
        forms = ("folded",) if backend == "triton" else ("factored", "folded")

        def cost(form: str) -> float:  # built twice: in forward and in backward
            return token_cost(form, shape, extra, True) * len(x) + 2 * build_cost(form, shape, extra)

        form = min(forms, key=cost)
    return small_side(matrices, form, x.dtype, backend)


def _linear_fake(x, mixer, columns, weight, bias, inner_basis, spec):  # type: ignore[no-untyped-def]
    shape, config = decode(spec)
    kept = (x.shape[0], _saved_columns(shape, config, columns.shape[1])) if shape.transposed else (0, 0)
    return x.new_empty(x.shape[0], shape.out_features), x.new_empty(kept)


@_op("linear", f"(Tensor x, {_MATRICES}, Tensor weight, Tensor? bias, Tensor inner_basis, str spec) "
     "-> (Tensor, Tensor)", _linear_fake)  # fmt: skip
def linear(x, mixer, columns, weight, bias, inner_basis, spec):  # type: ignore[no-untyped-def]
    """(y, g); g is empty for a tall layer."""
    shape, config = decode(spec)
    matrices = Matrices(shape, mixer, columns, inner_basis)
    side, F, wide = _engine(matrices, config, x), matrices.cast("columns", x.dtype), shape.transposed
    y, saved = linear_forward(x, weight, bias, F, side, wide, wide)
    return y, saved if wide else x.new_empty(0, 0)


def _linear_backward_fake(dy, x, mixer, columns, weight, inner_basis, g, needs, spec):  # type: ignore[no-untyped-def]
    like = (x, mixer, columns)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(like, needs, strict=True))


@_op("linear_backward", f"(Tensor dy, Tensor x, {_MATRICES}, Tensor weight, Tensor inner_basis, Tensor g, "
     "bool[] needs, str spec) -> (Tensor, Tensor, Tensor)", _linear_backward_fake)  # fmt: skip
def linear_gradients(dy, x, mixer, columns, weight, inner_basis, g, needs, spec):  # type: ignore[no-untyped-def]
    """(dx, d mixer, d columns); an empty tensor for those that `needs` leaves out."""
    shape, config = decode(spec)
    matrices = Matrices(shape, mixer, columns, inner_basis)
    side, F = _engine(matrices, config, x), matrices.cast("columns", x.dtype)
    saved = g if shape.transposed else None
    dx, rows, d_columns = linear_backward(
        dy.contiguous(), x, weight, F, side, shape.transposed, saved, (needs[0], needs[1], needs[2]))
    d_mixer = None if rows is None else side.mixer_gradient(*rows)
    gradients = zip((dx, d_mixer, d_columns), (x, mixer, columns), needs, strict=True)
    return tuple(like.new_empty(0) if d is None or not need else d.to(like.dtype).contiguous()
                 for d, like, need in gradients)


def _linear_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, mixer, columns, weight, _, inner_basis, ctx.spec = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mixer, columns, weight, inner_basis, output[1])


def _linear_gradient(ctx, dy, _):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 7
    needs = list(ctx.needs_input_grad[:3])
    found = linear_gradients(dy, *ctx.saved_tensors, needs, ctx.spec)
    dx, d_mixer, d_columns = (d if need else None for d, need in zip(found, needs, strict=True))
    return dx, d_mixer, d_columns, None, dy.sum(0) if ctx.needs_input_grad[4] else None, None, None


linear.register_autograd(_linear_gradient, setup_context=_linear_context)


# -- merge -----------------------------------------------------------------------------------------------------------
def _merge_fake(mixer, columns, weight, inner_basis, spec):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape)


@_op("merge", f"({_MATRICES}, Tensor weight, Tensor inner_basis, str spec) -> Tensor", _merge_fake)
def merge(mixer, columns, weight, inner_basis, spec):  # type: ignore[no-untyped-def]
    """W' in weight's dtype."""
    shape, config = decode(spec)
    backend, _ = token_path(config.backend, weight.device, weight.dtype)
    return Matrices(shape, mixer, columns, inner_basis).merged(weight, backend).contiguous()


def _merge_backward_fake(d_weight, mixer, columns, *_):  # type: ignore[no-untyped-def]
    return mixer.new_empty(mixer.shape), columns.new_empty(columns.shape)


@_op("merge_backward", f"(Tensor d_weight, {_MATRICES}, Tensor weight, Tensor inner_basis, str spec) "
     "-> (Tensor, Tensor)", _merge_backward_fake)  # fmt: skip
def merge_backward(d_weight, mixer, columns, weight, inner_basis, spec):  # type: ignore[no-untyped-def]
    """(d mixer, d columns)."""
    gradients = Matrices(decode(spec)[0], mixer, columns, inner_basis).merged_backward(weight, d_weight)
    return tuple(d.contiguous() for d in gradients if d is not None)


def _merge_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _merge_gradient(ctx, d_weight):  # type: ignore[no-untyped-def]
    return (*merge_backward(d_weight, *ctx.saved_tensors, ctx.spec), None, None, None)


merge.register_autograd(_merge_gradient, setup_context=_merge_context)


def functional_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor],
    factors: tuple[Tensor, ...],
    spec: str,
    merged: bool,
) -> Tensor:
    """y = x W'^T + b through the operations of this file. x: T x in_features; factors: in the order of `Factors`."""
    mixer, columns, *_ = prepare(*parameters, *factors, spec)
    if merged:
        return torch.nn.functional.linear(x, merge(mixer, columns, weight, factors[0], spec).to(x.dtype), bias)
    return linear(x, mixer, columns, weight, bias, factors[0], spec)[0]  # type: ignore[no-any-return]
