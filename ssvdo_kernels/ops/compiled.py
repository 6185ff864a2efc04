"""The layer as `torch.library` operations: what torch.compile and torch.export see of it.

    adapted        x, W0, bias, parameters, factors  ->  y
    adapted_train  the same                          ->  y and what its backward keeps

Each is a function of its arguments alone. What depends on parameters alone is prepared outside of the graph: an
operation looks the layer up whose parameters it is given, by their storage, and takes that layer's preparation. An
eager forward, another graph or an earlier token may have made it; where parameters have changed since, it is made anew,
together with the other layers of its shape. Parameters that belong to no living layer (an exported program in another
process) are prepared in every forward.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.weak import WeakIdKeyDictionary

from ..config import LayerShape, SSVDOConfig
from ..factorize import Factors
from ..origin import Origin
from ..planner import ALIKE, Work, choose, given, plan
from . import lasting, own_dtypes
from .base import DenseBase
from .dispatch import token_backend
from .engines import adjoint, prepare_one
from .linear import Call, pull_back, pulls, run
from .matrices import up
from .preparation import News, Prepared, Rows, Source

_UNSAFE = getattr(torch._C.Tag, "cudagraph_unsafe", None)  # torch before 2.9 has none


class Keeper(Protocol):
    """Who keeps a layer's preparation (cache.py)."""

    def current(self, source: Source, hold: bool, grad: bool) -> Prepared: ...


class Owner(Protocol):
    """A living layer's adapter."""

    name: str
    inner_scale: torch.nn.Parameter
    basis: Tensor | None
    origin: Origin | None

    @property
    def cache(self) -> Keeper: ...


_living: weakref.WeakSet[Any] = weakref.WeakSet()
_by_storage: dict[tuple[int, int], weakref.ref[Any]] = {}


def enlist(owner: Owner) -> None:
    """Makes an adapter known to the operations."""
    _living.add(owner)


def _place(scale: Tensor, basis: Tensor | None) -> tuple[int, int]:
    return scale.data_ptr(), 0 if basis is None else basis.data_ptr()


def _owner(scale: Tensor, basis: Tensor) -> Owner | None:
    """The living adapter whose `inner_scale` lies where `scale` does; of those that share it, the one of this basis."""
    at = _place(scale, basis)
    found = _by_storage[at]() if at in _by_storage else None
    if found is None or _place(found.inner_scale, found.basis) != at:
        alike = [one for one in list(_living) if one.inner_scale.data_ptr() == at[0]]
        found = next((one for one in alike if _place(one.inner_scale, one.basis) == at), alike[0] if alike else None)
        _by_storage.pop(at, None)
        if found is not None:
            _by_storage[at] = weakref.ref(found)
    return found


_news: dict[tuple[int, int], News] = {}  # of layers without an owner, by where they lie


def _prepared_anew(source: Source) -> Prepared:
    """A preparation that nobody keeps; ArithmeticError where the one before it has turned out bad since."""
    at = _place(source.parameters[1], source.factors.basis)
    if at in _news and _news[at].there():
        _news.pop(at).read()
    made = prepare_one(source)
    if made.news.verdict is not None:
        _news[at] = made.news
    return made


def prepared_of(source: Source, grad: bool) -> Prepared:
    """The preparation that the living layer of a source's parameters keeps; one that nobody keeps where there is none.
    grad: whether a backward will read it.
    """
    owner = _owner(source.parameters[1], source.factors.basis)
    if owner is None:
        return _prepared_anew(source)
    return owner.cache.current(replace(source, name=owner.name, origin=owner.origin), _UNSAFE is not None, grad)


_lent: Any = WeakIdKeyDictionary()  # by storage: a compiler makes other tensors of it


def lend(tensor: Tensor, prepared: Prepared) -> None:
    """Notes what an operation made a tensor with, for the one of the way back that gets this tensor: without a living
    layer, inside a CUDA graph, and where FSDP gathers parameters anew, it would be made a second time."""
    _lent[tensor.untyped_storage()] = prepared


def lent(tensor: Tensor, source: Source) -> Prepared | None:
    """What a tensor was made with, where that was prepared from the tensors of `source`: a compiler may give the
    storage another use. FSDP empties their storages, and fills them again elsewhere."""
    found: Prepared | None = _lent.get(tensor.untyped_storage())
    return found if found is not None and _lies(found.source) == _lies(source) else None


def _lies(source: Source) -> list[object]:
    tensors = (t for t in (*source.parameters, *source.watched) if t is not None)
    return [source.formula, *((t.untyped_storage()._cdata, t.storage_offset()) for t in tensors)]


class Spec(NamedTuple):
    """What a layer is beside its tensors; scale: what the parameters are multiplied by; layout: of W0 (base.py)."""

    shape: LayerShape
    config: SSVDOConfig
    scale: float
    layout: str


REVISION = 3
"""Grows when operations return or keep other things: graphs that inductor has on disk from before are made anew."""


def encode(shape: LayerShape, config: SSVDOConfig, scale: float) -> str:
    """A layer's `Spec` as the string that every operation takes; where W0 is not "plain", its layout comes before."""
    sizes = {name: getattr(shape, name) for name in ("out_features", "in_features", "transposed", "k", "l")}
    return json.dumps({"revision": REVISION, "shape": sizes, "config": config.to_dict(), "scale": scale})


@lru_cache(maxsize=256)
def decode(spec: str) -> Spec:
    """The inverse of `encode`, with the layout."""
    start = spec.index("{")
    read, layout = json.loads(spec[start:]), spec[:start] or "plain"
    return Spec(LayerShape(**read["shape"]), SSVDOConfig.from_dict(read["config"]), read["scale"], layout)


def operation(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a real implementation, run outside autocast and inference mode, with its fake.

    Inductor's own CUDA graphs (mode="reduce-overhead") leave it out: a preparation that a layer keeps may not lie in
    their memory, and one token after another would be prepared for in them.
    """

    def register(function: Callable[..., Any]) -> Any:
        @lasting
        @wraps(function)
        def run(*args: Any) -> Any:
            if forward_ad._current_level >= 0:  # tangents do not come as far as this
                raise RuntimeError("forward-mode differentiation (torch.func.jvp, jacfwd, dual numbers) of an exported "
                                   "adapted model; allowed: of the model itself, also inside torch.compile")
            with own_dtypes():
                return function(*args)

        tags: dict[str, Any] = {} if _UNSAFE is None else {"tags": (_UNSAFE,)}
        op = torch.library.custom_op(f"ssvdo_kernels::{name}", run, mutates_args=(), schema=schema, **tags)
        op.register_fake(fake)
        return op

    return register


# tokens: W0 in the dtype of x. weight: the tensor that holds W0; a view of it would have a version of its own inside a
# graph, and what is prepared would seem out of date
LAYER = ("Tensor tokens, Tensor weight, Tensor? rotation, Tensor scale, Tensor? outer, Tensor basis, "
          "Tensor singular_values, Tensor? outer_basis, Tensor? null_basis")  # fmt: skip


def source_of(layer: Sequence[Any], spec: str) -> tuple[DenseBase, Source]:
    """W0 for tokens, and what a preparation is made from, of the tensors in `LAYER`."""
    tokens, weight, rotation, scale, outer, *factors = layer
    shape, config, times, layout = decode(spec)
    parameters, base = (rotation, scale, outer), DenseBase(weight, layout)
    source = Source(parameters, Factors(*factors), base, shape, config, "a compiled layer", None, times)
    return DenseBase(tokens), source


def extra_of(layer: Sequence[Tensor | None], shape: LayerShape) -> int:
    """Columns of F; `layer` ends with the null basis."""
    null = layer[-1]
    return shape.l + (0 if null is None else max(0, null.shape[1] - (shape.width - shape.k)))


# -- without gradients -------------------------------------------------------------------------------------------------
def _refuse_onnx() -> None:
    if torch.onnx.is_in_onnx_export():
        raise TypeError("torch.onnx.export(dynamo=True) cannot translate an adapted layer; allowed: dynamo=False, or "
                        "remove_ssvdo(model, merge=True) first")


def _adapted_fake(x, bias, *rest):  # type: ignore[no-untyped-def]
    _refuse_onnx()
    return x.new_empty(x.shape[0], decode(rest[-2]).shape.out_features)


@operation("adapted", f"(Tensor x, Tensor? bias, {LAYER}, str spec, bool merged) -> Tensor", _adapted_fake)
def infer(x, bias, *rest):  # type: ignore[no-untyped-def]
    """y (T x out_features), by whichever form is cheapest."""
    *layer, spec, merged = rest
    tokens, source = source_of(layer, spec)
    prepared = prepared_of(source, False)
    backend = token_backend(source.config.backend, x.device, x.dtype)
    form = given(prepared.config, merged) or choose(prepared, Work(len(x), False, backend, x.dtype, x.device))
    prepared.serve(len(x), False)
    return run(x, tokens, bias, Call(prepared, form, backend), False)[0]


def _untrained(ctx, dy):  # type: ignore[no-untyped-def]
    raise RuntimeError("an adapted layer in a program that was exported without gradients was asked for them; allowed: "
                       "export it with gradients enabled and parameters that require them")  # fmt: skip


infer.register_autograd(_untrained)


# -- with gradients ----------------------------------------------------------------------------------------------------
def _training_form(x: Tensor, prepared: Prepared, backend: str, merged: bool) -> str:
    """A form that saves what the fake says: all of a layer's forwards save alike, and its backward computes as they."""
    path = "merged" if merged else prepared.config.path
    if path != "auto":
        return path
    if backend == "triton":
        return "folded"
    seen = max(prepared.tokens, prepared.expected - len(x))
    return plan(prepared.shape, prepared.extra, len(x), seen, True, prepared.built, ALIKE)


def _saved_shape(x: Tensor, layer: Sequence[Tensor | None], spec: str, merged: bool) -> tuple[Any, int]:
    shape, config, *_ = decode(spec)
    form = "merged" if merged else config.path
    backend = token_backend(config.backend, x.device, x.dtype)
    if form == "merged":
        return 0, 0
    extra = extra_of(layer, shape)
    if form == "core":
        return x.shape[0], extra + (shape.d if shape.transposed else 0)
    return x.shape[0], up(shape.width) + up(extra) if backend == "triton" else shape.width + extra


def trained(x: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """What `train` computes."""
    *layer, spec, merged = rest
    tokens, source = source_of(layer, spec)
    prepared = prepared_of(source, True)
    backend = token_backend(source.config.backend, x.device, x.dtype)
    form = _training_form(x, prepared, backend, merged)
    prepared.serve(len(x), True)
    y, saved = run(x, tokens, bias, Call(prepared, form, backend), True)
    saved = x.new_empty(0, 0) if saved is None else saved
    lend(saved, prepared)
    return y, saved


def trained_fake(x: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Of what sizes."""
    _refuse_onnx()
    *layer, spec, merged = rest
    return x.new_empty(x.shape[0], decode(spec).shape.out_features), x.new_empty(_saved_shape(x, layer, spec, merged))


@operation("adapted_train", f"(Tensor x, Tensor? bias, {LAYER}, str spec, bool merged) -> (Tensor, Tensor)",
           trained_fake)  # fmt: skip
def train(x, bias, *rest):  # type: ignore[no-untyped-def]
    """(y, saved): saved is empty in the merged form, whose backward needs x alone."""
    return trained(x, bias, *rest)


def pulled_back(
    dy: Tensor, x: Tensor, saved: Tensor, layer: Sequence[Any], needs: tuple[bool, bool], spec: str, merged: bool,
    alone: bool = False,
) -> tuple[Prepared, Tensor | None, Tensor | Rows | None, Tensor | None]:  # fmt: skip
    """(preparation, dx, dM, dF). needs: whether x, and whether parameters want gradients; alone: whether dF may come
    with A^T dF, of a size that only the preparation tells."""
    tokens, source = source_of(layer, spec)
    prepared = lent(saved, source) or prepared_of(source, True)
    backend = token_backend(source.config.backend, x.device, x.dtype)
    form = _training_form(x, prepared, backend, merged)
    pulled = alone and backend == "reference" and pulls(prepared, form, len(x), x.dtype)
    call = Call(prepared, form, backend, None, pulled)
    kept = None if call.form == "merged" else saved
    return prepared, *pull_back(dy.contiguous(), x, tokens, kept, call, (*needs, needs[1]))


def _backward_fake(dy, x, saved, *rest):  # type: ignore[no-untyped-def]
    *layer, needs, _, _ = rest
    like = (x, *layer[2:5])
    return tuple(x.new_empty(0) if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)
                 for t, need in zip(like, needs, strict=True))  # fmt: skip


@operation("adapted_backward", f"(Tensor dy, Tensor x, Tensor saved, {LAYER}, bool[] needs, str spec, bool merged) "
     "-> (Tensor, Tensor, Tensor, Tensor)", _backward_fake)  # fmt: skip
def backward(dy, x, saved, *rest):  # type: ignore[no-untyped-def]
    """(dx, d inner_rotation, d inner_scale, d outer); an empty tensor for those that `needs` leaves out."""
    *layer, needs, spec, merged = rest
    prepared, dx, d_mixer, d_columns = pulled_back(
        dy, x, saved, layer, (needs[0], any(needs[1:])), spec, merged, alone=True)
    found: list[Tensor | None] = [dx, None, None, None]
    if d_mixer is not None and d_columns is not None:
        found[1:] = adjoint([prepared], [d_mixer], [d_columns])[0]
    like = (x, *prepared.source.parameters)
    return tuple(x.new_empty(0) if g is None or t is None or not need else g.to(t.dtype).contiguous()
                 for g, t, need in zip(found, like, needs, strict=True))  # fmt: skip


def _context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, *layer, ctx.spec, ctx.merged = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *layer)


def _gradient(ctx, dy, _):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 13
    x, saved, *layer = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 4, 5, 6)]
    found = backward(dy, x, saved, *layer, needs, ctx.spec, ctx.merged)
    dx, *three = (g if need else None for g, need in zip(found, needs, strict=True))
    d_bias = dy.sum(0) if ctx.needs_input_grad[1] else None
    return dx, d_bias, None, None, *three, *[None] * 6


train.register_autograd(_gradient, setup_context=_context)


def traced() -> bool:
    """Whether a dispatch mode records what is computed, to run it again in part (selective activation checkpointing) or
    as a graph (make_fx): a layer is one operation then, as what is prepared is computed in one pass and not in another.
    """
    replays = checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode
    return any(isinstance(mode, replays) or mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())
