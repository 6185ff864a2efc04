"""The adapter: three trained parameters, frozen V and S, and y = x W'^T + b on any base operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from . import inputs, reference
from .accumulation import Accumulator
from .cache import Cache, capturing
from .config import LayerShape, SSVDOConfig, checked_scale
from .factorize import FACTOR_NAMES, Factors, compute_dtype
from .fingerprint import Bases, Fingerprint
from .ops import autocasting, lasting, own_dtypes
from .ops.attach import StandIns
from .ops.base import Base
from .ops.compiled import encode, enlist, traced
from .ops.dispatch import token_backend
from .ops.graph import adapted
from .ops.linear import Call, Sums, adapted_linear, adapted_matrix, pulls
from .ops.preparation import Parameters, PassingSource, Prepared, Rows, Source
from .origin import Origin
from .planner import Work, choose, given
from .watchers import comes_and_goes, offloads

_AS_IT_IS = nullcontext()
_GLOBAL_HOOKS = tuple(getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in (
    "forward_pre", "forward", "backward_pre", "backward"))  # fmt: skip
PARAMETER_NAMES = ("inner_rotation", "inner_scale", "outer")
_PARTS, _FROZEN = itemgetter(*PARAMETER_NAMES), itemgetter(*FACTOR_NAMES)
_NO_SCRIPT = ("torch.jit.script cannot compile an adapted layer; allowed: torch.jit.trace, torch.export, or "
              "remove_ssvdo(model, merge=True) first")  # fmt: skip


def _no_fast_path(module: nn.Module, args: tuple[object, ...]) -> None:
    """nn.TransformerEncoderLayer's inference fast path reads linear1.weight; it is not taken where there is a hook."""


class Adapter(nn.Module):
    """W' = U' diag(S + dS) blockdiag(G, I) V^T in place of W0 = U diag(S) V^T (transposed for a wide layer).

    Trained: ``inner_rotation`` (k(k-1)/2, the strict upper triangle of the skew K; absent where k = 1), ``inner_scale``
    (k, dS) and ``outer`` (c x l, L / s; absent where l = 0), float32 where the weight is of half precision. Frozen: the
    tensors of `Factors`, those that there are. No tensor is empty.

    The matrices that depend on parameters alone are prepared once and kept until a parameter changes (cache.py). On a
    GPU call `refresh` after writing through ``p.data`` by hand.

    Args:
        shape: sizes.
        config: formula.
        factors: those of the weight; None: `set_factors` brings them before the first forward.
        weight: W0, for its dtype, its device and to be known again; the adapter does not keep it.
        buffers: whether the factors are buffers that no state_dict holds, instead of frozen parameters; it holds the
            weight's fingerprint then.

    Examples:
        >>> adapter = SSVDOLinear.from_linear(nn.Linear(64, 256), SSVDOConfig(outer_rank=16)).adapter
        >>> {name: tuple(p.shape) for name, p in adapter.named_parameters() if p.requires_grad}
        {'inner_rotation': (496,), 'inner_scale': (32,), 'outer': (192, 16)}
    """

    inner_rotation: nn.Parameter | None
    inner_scale: nn.Parameter
    outer: nn.Parameter | None
    basis: Tensor | None
    singular_values: Tensor | None
    outer_basis: Tensor | None
    null_basis: Tensor | None
    base_digest: Tensor
    formula: Tensor  # a digest of the configuration's formula, as base_digest where there are buffers

    def __init__(
        self,
        shape: LayerShape,
        config: SSVDOConfig,
        factors: Factors | None,
        weight: Tensor,
        *,
        buffers: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.config, self.scale = shape, config, 1.0
        self.name = "layer"  # how errors call it
        self.merged = False
        # whose probability torch.compile(dynamic=True) takes for a constant; in no module tree, as it has no mode
        self._dropout: tuple[nn.Dropout, ...] = (nn.Dropout(config.dropout),) if config.dropout else ()
        self._buffered = buffers
        for name, place in Fingerprint.places(shape).items() if buffers else ():
            self.register_buffer(name, place.to(weight.device))
        if buffers:
            self.register_buffer("formula", config.digest().to(weight.device))
        self.origin: Origin | None = Origin()
        self.cache = Cache()
        self.accumulator = Accumulator(self.cache)
        sizes = ((shape.rotated,), (shape.k,), (shape.c, shape.l))
        for name, size in zip(PARAMETER_NAMES, sizes, strict=True):
            made = torch.zeros(size, dtype=compute_dtype(weight.dtype), device=weight.device)
            self.register_parameter(name, nn.Parameter(made) if made.numel() else None)
        for name in FACTOR_NAMES:
            self._hold(name, None)
        if factors is not None:
            self.set_factors(factors, weight)
        self.reset_parameters()
        self.register_forward_pre_hook(_no_fast_path)
        enlist(self)

    @lasting
    def _hold(self, name: str, tensor: Tensor | None) -> None:
        tensor = tensor.clone() if tensor is not None and tensor.is_inference() else tensor
        if self._buffered:
            self.register_buffer(name, tensor, persistent=False)
        else:
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def set_factors(self, factors: Factors, weight: Tensor) -> None:
        """Takes the factors of the weight that is to be adapted."""
        if self.origin is not None:
            self.origin.record(weight)
        if self._buffered and not weight.is_meta and not self.base_digest.is_meta:
            Fingerprint.of(weight, Bases.of(weight, factors, self.shape)).write(dict(self.named_buffers()))
        for name in FACTOR_NAMES:
            self._hold(name, getattr(factors, name))
        self.cache.forget()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """K = 0, dS = 0 and L random: each outer vector is turned by about init_angle radians."""
        for parameter in self.parts:
            if parameter is not None:
                parameter.zero_()
        if self.outer is not None:
            self.outer.normal_(0, self.shape.outer_deviation(self.config))

    @property
    def parts(self) -> Parameters:
        """(inner_rotation, inner_scale, outer), None for what is not there."""
        return self.inner_rotation, self.inner_scale, self.outer

    @property
    def scale(self) -> float:
        """s: K, dS and L are taken s times, so that W' is W0 at 0, and in between the adapter turns part of the way.

        The Cayley form turns by 2 atan(s tan(a / 2)) in place of an angle a; orthonormal columns stay so at every s,
        unlike those of W0 + s (W' - W0). The next forward has it, in training too; no state_dict and no file does. A
        compiled model is compiled again, a captured CUDA graph keeps the scale of its capture.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = checked_scale(scale)
        self.spec = encode(self.shape, self.config, self._scale)

    @property
    def drops(self) -> bool:
        """Whether a forward drops numbers of the change's input now; a host then goes by way of `changes.changed`."""
        return len(self._dropout) > 0 and self.training and not self.merged

    def dropped(self, x: Tensor) -> Tensor:
        """x with numbers dropped by `dropout`."""
        return self._dropout[0](x)  # type: ignore[no-any-return]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that there are."""
        return [p for p in (self.inner_rotation, self.inner_scale, self.outer) if p is not None]

    @property
    def factors(self) -> Factors:
        """The frozen factors."""
        found = (getattr(self, name) for name in FACTOR_NAMES)  # those of FSDP1 are views of what requires gradients
        return Factors(*(t.detach() if t is not None and t.requires_grad else t for t in found))

    def trained_on(self) -> Fingerprint | None:
        """The fingerprint of the weight that was trained on, where the adapter has buffers and there is one."""
        return Fingerprint.read(dict(self.named_buffers()), self.shape)

    def source(self, base: Base, as_before: bool = False) -> Source:
        """What a preparation is made from; the last one's, where nothing but the parameters' numbers has changed.
        as_before: the frozen tensors' numbers are not looked at; `Cache.hit` will."""
        parameters, frozen = self._tensors()
        formula = self.shape, self.config, self._scale
        found = self.cache.source(formula, (*base.tensors, *frozen), parameters, as_before) if base.held else None
        if found is not None:
            return found
        passing = base.passing or offloads(self) or comes_and_goes((*base.tensors, *frozen))
        kind = PassingSource if passing else Source
        return kind(parameters, self.factors, base, *formula[:2], self.name, self.origin, self._scale)

    @lasting
    @own_dtypes()
    def prepared(self, base: Base) -> Prepared:
        """The prepared matrices for the current parameters (kept until a parameter changes)."""
        return self.cache.current(self.source(base), hold=True)

    def refresh(self) -> None:
        """Forgets what was prepared; the next forward prepares anew."""
        self.cache.forget()

    def unmerge(self) -> None:
        """Computes through the small matrices again, and lets W' go."""
        self.merged = False
        self.cache.reset()

    def plan(self, tokens: int, base: Base, grad: bool = True) -> str:
        """The form ("factored", "folded", "core" or "merged") that a forward of `tokens` rows takes now."""
        backend = token_backend(self.config.backend, base.device, base.dtype)
        prepared, work = self.prepared(base), Work(tokens, grad, backend, base.dtype, base.device, base.held)
        return given(self.config, self.merged) or choose(prepared, work)

    def __call__(self, x: Any, base: Base, bias: Tensor | None = None) -> Any:
        """`forward`; by way of nn.Module's own, which takes as long as two products, where there is a hook but ours."""
        if torch.compiler.is_compiling():
            return super().__call__(x, base, bias)
        own = self.__dict__
        if (len(own["_forward_pre_hooks"]) > 1 or own["_forward_hooks"] or own["_backward_hooks"]
                or own["_backward_pre_hooks"] or own.get("_compiled_call_impl") or any(_GLOBAL_HOOKS)
                or torch._C._get_tracing_state() is not None):  # fmt: skip
            return super().__call__(x, base, bias)
        return self.forward(x, base, bias)

    def forward(self, x: Tensor, base: Base, bias: Tensor | None = None) -> Tensor:
        """y = x W'^T + b. x: (..., in_features); returns (..., out_features). Raises as `SSVDOLinear` says."""
        if not inputs.ordinary(x, self.shape.in_features, base):
            return self._general(x, base, bias)
        if x.ndim == 2:
            return self._forward(x, base, base, bias)
        y = self._forward(x.reshape(-1, self.shape.in_features), base, base, bias)
        return y.view(*x.shape[:-1], self.shape.out_features)

    @lasting
    def _general(self, x: Tensor, base: Base, bias: Tensor | None) -> Tensor:
        """`forward` of anything, under anything."""
        inputs.check_tensor(x)
        if x.is_nested:
            return inputs.by_components(x, lambda rows: self(rows, base, bias))
        kind = base.device.type
        symbolic = kind == "meta" or isinstance(x, FakeTensor)
        autocast = None  # which leaves float64 alone
        if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            autocast = torch.get_autocast_dtype(kind)
        inputs.check(x, self.shape.in_features, base, autocast)
        tokens = base
        if autocast is None and x.dtype != base.dtype:  # a quantised base takes tokens of any dtype
            tokens, bias = base.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if autocast is not None:
            x, tokens = x.to(autocast), base.to(autocast)
            bias = None if bias is None else bias.to(autocast)
        if inputs.transformed():
            weight, bias = self._by_equations(base), bias if bias is None else bias.to(x.dtype)
            wide = torch.promote_types(x.dtype, weight.dtype)  # a gradient of W' in half precision keeps too few digits
            with own_dtypes() if autocasting() else _AS_IT_IS:
                y = nn.functional.linear(x.to(wide), weight.to(wide), bias if bias is None else bias.to(wide))
            return y.to(x.dtype)
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace: W' is a constant of the trace
            with inputs.untraced():
                weight = self.adapted_weight(base).to(x.dtype)
            return nn.functional.linear(x, weight, bias)
        rows = x if x.ndim == 2 else x.reshape(-1, self.shape.in_features)
        if torch.compiler.is_compiling() or symbolic or (torch._C._len_torch_dispatch_stack() and traced()):
            factors = tuple(getattr(self, name) for name in FACTOR_NAMES)
            y = adapted(rows, tokens.dense(), base, bias, self.parts, factors, self.spec, self.merged)
        else:
            with own_dtypes() if autocasting() else _AS_IT_IS:
                y = self._forward(rows, tokens, base, bias)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.shape.out_features)

    def _by_equations(self, base: Base) -> Tensor:
        """W' in the weight's dtype by the reference equations, which can be transformed."""
        virtual = base.device.type == "meta" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if self.origin is not None and not virtual and not any(map(wrapped, base.tensors)):
            self.origin.check(base, self.name, factors=self.factors)
        with own_dtypes() if autocasting() else _AS_IT_IS:
            try:
                return reference.weight_in_factors(
                    base.dense(), self.parts, self.factors, self.shape, self.config, self._scale)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise ArithmeticError(f"{self.name}: {error}; a parameter is not finite or too large: use a larger tau "
                                      "or a smaller learning rate") from None  # fmt: skip

    def _pair(
        self, parameters: Parameters, prepared: Prepared
    ) -> tuple[StandIns | None, list[Rows] | None, Sums | None]:
        """M and F in the graph, where a gradient may be left as `Rows`, and where gradients are summed; None where
        parameters get no gradient."""
        if not torch.is_grad_enabled():
            return None, None, None
        rotation, scale, outer = parameters
        if not (scale.requires_grad or (rotation is not None and rotation.requires_grad)
                or (outer is not None and outer.requires_grad)):  # fmt: skip
            return None, None, None
        if self.accumulator.open and not capturing(parameters):
            sums = self.accumulator.sums(prepared, parameters)
            return sums.pair(), None, sums
        return *self.cache.pair(prepared, parameters), None

    def _tensors(self) -> tuple[Parameters, Sequence[Tensor | None]]:
        """`parts`, and the frozen factors."""
        own: Any = self._parameters
        try:
            return _PARTS(own), _FROZEN(self._buffers if self._buffered else own)
        except KeyError:  # FSDP1 puts views in their places
            return self.parts, [getattr(self, name) for name in FACTOR_NAMES]

    def _forward(self, rows: Tensor, tokens: Base, base: Base, bias: Tensor | None) -> Tensor:
        parameters, frozen = self._tensors()
        prepared = self.cache.hit((self.shape, self.config, self._scale), (*base.tensors, *frozen), parameters)
        if prepared is None:
            prepared = self.cache.current(self.source(base), hold=True)
        pair, sink, sums = self._pair(parameters, prepared)
        count, dtype, pulled = rows.shape[0], tokens.dtype, False
        backend = token_backend(self.config.backend, tokens.device, dtype)
        form = given(self.config, self.merged) or choose(
            prepared, Work(count, pair is not None, backend, dtype, tokens.device, base.held))
        if pair is not None and backend == "reference":
            behind = count if sink is not None else max(prepared.expected, prepared.trained + count)
            pulled = pulls(prepared, form, behind, dtype)
        prepared.serve(count, pair is not None)
        return adapted_linear(rows, pair, tokens, bias, Call(prepared, form, backend, sink, pulled, sums))

    @lasting
    def dense(self, base: Base) -> Tensor:
        """W' (out_features x in_features) in the weight's dtype, with gradients to the parameters; a new tensor."""
        if inputs.transformed() or base.device.type == "meta" or (torch._C._len_torch_dispatch_stack() and traced()):
            return self._by_equations(base)
        with own_dtypes():
            source = self.source(base)
            prepared = self.cache.current(source, hold=True)
            return adapted_matrix(self._pair(source.parameters, prepared)[0], base, prepared)

    @lasting
    @torch.no_grad()
    @own_dtypes()
    def adapted_weight(self, base: Base) -> Tensor:
        """W' (out_features x in_features) for the current parameters, in the weight's dtype; a new tensor."""
        return self.cache.current(self.source(base), hold=True).merged(base, keep=False).clone()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            warnings.warn("this state_dict holds W0 with the adapter beside it, not W': merge_ssvdo computes with W' "
                          "and keeps W0. Plain layers with W', as save_pretrained and other programs want them: "
                          "remove_ssvdo(model, merge=True)", stacklevel=2)  # fmt: skip
        if hasattr(destination, "_metadata"):  # beside the module's version; where there are buffers they have it
            destination._metadata[prefix[:-1]]["formula"] = self.config.digest()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        formula = state_dict.get(prefix + "formula") if self._buffered else args[0].get("formula")
        if formula is not None and formula.tolist() != self.config.digest().tolist():
            errors: list[str] = args[-1]
            errors.append(f"{prefix[:-1]}: saved with another formula (rotation, outer, outer_scale, tau, ...) than "
                          "this model is adapted with")  # fmt: skip
            return
        # Which factors there are, of what size and dtype, belongs to the weight: a checkpoint may bring others.
        if self._buffered:  # the host has looked at the bases that a file may bring
            state_dict = {key: t for key, t in state_dict.items() if key.removeprefix(prefix) not in FACTOR_NAMES}
        elif self.origin is not None and any(prefix + name in state_dict for name in FACTOR_NAMES):
            self.origin.loaded()
        for name in FACTOR_NAMES if not self._buffered else ():
            incoming, own = state_dict.get(prefix + name), getattr(self, name)
            if incoming is None and name == "null_basis" and prefix + "basis" in state_dict:
                self._hold(name, None)
            elif isinstance(incoming, Tensor) and self._fits(name, incoming, own):
                like = self.inner_scale if own is None else own
                self._hold(name, torch.empty(incoming.shape, dtype=incoming.dtype, device=like.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fits(self, name: str, incoming: Tensor, own: Tensor | None) -> bool:
        """Whether a place for `incoming` is to be made that is not there as it is."""
        if name == "null_basis":
            size, (rows, most) = tuple(incoming.shape), (self.shape.large, self.shape.width)
            return (own is None or size != tuple(own.shape)) and len(size) == 2 and size[0] == rows and size[1] <= most
        return name == "basis" and own is not None and incoming.shape == own.shape and incoming.dtype != own.dtype

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        """Thaws or freezes what is trained; the factors have no gradients."""
        for parameter in self.trained:
            parameter.requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        if torch.__future__.get_swap_module_params_on_conversion():
            self.cache.forget()  # nothing else may hold what is swapped
        # The factors move with the module, but keep the dtypes that the factorisation chose: rounded S or V would be
        # those of another weight, and how often P is applied goes by how V is rounded.
        frozen = {id(t) for t in (*self.factors.tensors().values(), *self.buffers())}
        anew = []

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            anew.append(made is not tensor)
            return made if id(tensor) not in frozen or made.dtype == tensor.dtype else tensor.to(made.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        if any(anew):
            self.cache.forget()  # it holds the weight as it was
            if self.origin is not None:
                self.origin.let_go()
        if self.origin is not None:
            self.origin.rounded(self.inner_scale.dtype)
        return self

    def _replicate_for_data_parallel(self) -> Adapter:
        replica: Adapter = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.origin = None
        replica.cache = Cache()  # on another device, in another thread, for one forward
        replica.accumulator = Accumulator(replica.cache)
        return replica

    def __prepare_scriptable__(self) -> Adapter:
        raise TypeError(_NO_SCRIPT)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        enlist(self)

    def extra_repr(self) -> str:
        s, c = self.shape, self.config
        held = "" if self.basis is None else f", basis={str(self.basis.dtype).removeprefix('torch.')}"
        scaled = "" if self.scale == 1 else f", scale={self.scale:g}"
        return f"inner={s.k}, outer_rank={s.l}, rotation={c.rotation!r}{held}{scaled}, merged={self.merged}"
