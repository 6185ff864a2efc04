"""SSVDOLinear: the drop-in for a pretrained nn.Linear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .config import LayerShape, SSVDOConfig
from .factorize import Factors, compute_dtype, factorize
from .group import Batch, Group, one_node
from .ops import lasting, own_dtypes
from .ops.dispatch import token_path
from .ops.library import encode, functional_linear
from .ops.linear import adapted_linear
from .ops.preparation import Gradients, Prepared, Rows, attach
from .planner import plan, plan_kernels
from .traffic import machine

FACTOR_NAMES = ("inner_basis", "singular_values", "outer_basis", "reflector", "null_basis")
PARAMETER_NAMES = ("inner_rotation", "inner_scale", "outer")

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Some optimisers write through `p.data`, which leaves no trace in the version counter; every step therefore counts.
register_optimizer_step_post_hook(_count_step)


def _stamp(tensor: Tensor) -> tuple[object, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


class _Cache:
    """A preparation, what it was made from, and the batch that it was made in."""

    def __init__(
        self, prepared: Prepared, stamp: tuple[object, ...], copies: tuple[Tensor, ...], batch: Batch | None = None
    ) -> None:
        self.prepared, self.stamp, self.copies, self.batch = prepared, stamp, copies, batch
        self.leaves: tuple[Tensor, Tensor] | None = None


class SSVDOLinear(nn.Module):
    """y = x W'^T + b, W' = U' diag(S + dS) blockdiag(G, I) V^T (transposed for out_features < in_features).

    Made from a pretrained layer with `from_linear`; the weight must be the trained one, as it is factorised at once.
    The trained numbers are three parameters: ``inner_rotation`` (k(k-1)/2, the strict upper triangle of the skew K),
    ``inner_scale`` (k, dS) and ``outer`` (c x l, L / s). They are float32 where the weight is of half precision.
    ``weight`` (out_features x in_features) is W0: frozen, never written to, merged or not. What W0 is factorised into
    are frozen parameters: a state_dict holds all that the layer is, FSDP shards them, and DDP sends them once.

    The matrices that depend on parameters alone are prepared once and kept until a parameter changes. On the CPU the
    parameters are compared by value, so that no edit goes unseen; on a GPU by version, storage and optimiser step:
    there, call `refresh` after writing through ``p.data`` by hand.

    Shape: x (..., in_features), in the weight's dtype or, under autocast, any floating one; y (..., out_features).

    Raises (forward):
        TypeError: x is not floating, or not of the weight's dtype outside autocast.
        ValueError: x has another last dimension or is on another device.
        RuntimeError: ``weight.requires_grad`` was switched on.
        ArithmeticError: L^T L + tau I is not positive definite (non-finite or huge parameters). On a GPU, a
            later forward or the backward says so, before there are gradients.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    inner_basis: Tensor
    singular_values: Tensor
    outer_basis: Tensor
    reflector: Tensor
    null_basis: Tensor

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, factors: Factors, shape: LayerShape, config: SSVDOConfig
    ) -> None:
        super().__init__()
        self._start(shape, config)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        k, zeros = shape.k, torch.zeros((), dtype=compute_dtype(weight.dtype), device=weight.device)
        self.inner_rotation = nn.Parameter(zeros.new_zeros(k * (k - 1) // 2))
        self.inner_scale = nn.Parameter(zeros.new_zeros(k))
        self.outer = nn.Parameter(zeros.new_zeros(shape.c, shape.l))
        for name, tensor in factors.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.reset_parameters()

    def _start(self, shape: LayerShape, config: SSVDOConfig) -> None:
        """All state but tensors."""
        self.config, self.shape, self._spec = config, shape, encode(shape, config)
        self.name = "layer"  # how errors call it
        self._merged = False
        self._cache: _Cache | None = None
        self._group: Group | None = None
        self._accumulating = False
        self._expected = 0

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: SSVDOConfig | None = None,
        *,
        name: str = "weight",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> SSVDOLinear:
        """Adapts a pretrained layer; its weight and bias tensors are taken over, not copied.

        Args:
            linear: nn.Linear with its trained weight loaded. The weight is frozen; the bias stays as it is.
            config: sizes and formula; None takes `SSVDOConfig()`.
            name: how errors call the weight. cache_dir: see `factorize`.

        Raises:
            TypeError: linear is no plain nn.Linear (quantised, adapted, a subclass), or its weight is not floating.
            ValueError: the weight is on the meta device, not finite, or config does not fit its shape.
        """
        config = SSVDOConfig() if config is None else config
        if isinstance(linear, SSVDOLinear):
            raise TypeError(f"linear ({name}) is adapted already; remove_ssvdo restores the original layer")
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear ({name}) is a {type(linear).__module__}.{type(linear).__qualname__}; allowed: "
                            "torch.nn.Linear itself (quantised layers and subclasses compute something else)")
        shape = LayerShape.of(linear.out_features, linear.in_features, config)
        factors = factorize(linear.weight, shape, name=name, cache_dir=cache_dir)
        layer = cls(linear.weight, linear.bias, factors, shape, config).train(linear.training)
        layer.name = "layer" if name == "weight" else name.removesuffix(".weight")
        return layer

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """K = 0, dS = 0 and L ~ N(0, init_angle^2 tau / c): each outer vector is turned by about init_angle radians."""
        self.inner_rotation.zero_()
        self.inner_scale.zero_()
        self.outer.zero_()
        if self.shape.l and self.config.init_angle:
            std = self.config.init_angle * (self.config.tau / self.shape.c) ** 0.5
            self.outer.normal_(0, std / self.shape.outer_scale(self.config))

    # -- preparation -------------------------------------------------------------------------------------------------
    @property
    def adapter_parameters(self) -> Gradients:
        """(inner_rotation, inner_scale, outer)."""
        return self.inner_rotation, self.inner_scale, self.outer

    def factors(self) -> Factors:
        """The frozen factors as one `Factors`."""
        return Factors(*(getattr(self, name) for name in FACTOR_NAMES))

    @lasting
    def prepared(self) -> Prepared:
        """The prepared matrices for the current parameters (kept until a parameter changes)."""
        return self._current().prepared

    def refresh(self) -> None:
        """Forgets what was prepared; the next forward prepares anew."""
        self._expected = self._served()
        self._cache = None

    def _served(self) -> int:
        """Rows with gradients that the last preparation which had any has served: what the next one may expect."""
        trained = 0 if self._cache is None else self._cache.prepared.trained
        return trained or self._expected

    def _capturing(self) -> bool:
        """Whether a CUDA graph is being captured: a replay must prepare anew, as parameters change between replays."""
        return self.weight.is_cuda and torch.cuda.is_current_stream_capturing()

    def _stamp(self) -> tuple[object, ...]:
        watched = (*self.adapter_parameters, self.weight, *(getattr(self, name) for name in FACTOR_NAMES))
        return (_optimizer_steps, *map(_stamp, watched))

    def out_of_date(self) -> bool:
        """Whether versions and storages say that the parameters are others than those last prepared."""
        on_cpu = self.weight.device.type == "cpu"  # there, the forward also compares values, not optimiser steps
        if self._cache is None or self._cache.leaves is not None:  # what is being accumulated is not to be lost
            return self._cache is None
        return self._cache.stamp[on_cpu:] != self._stamp()[on_cpu:]

    @own_dtypes()
    def _current(self) -> _Cache:
        parameters, stamp = self.adapter_parameters, self._stamp()
        cache = self._cache
        on_cpu = self.weight.device.type == "cpu"
        if self._capturing():
            return _Cache(Prepared(parameters, self.factors(), self.shape, self.config, self.name), stamp, ())
        if cache is not None:
            same = all(map(torch.equal, cache.copies, parameters)) if on_cpu else cache.stamp[0] == stamp[0]
            if same and cache.stamp[1 + 3 * on_cpu :] == stamp[1 + 3 * on_cpu :]:
                cache.prepared.verify(wait=False)
                return cache
            if self._accumulating and cache.leaves is not None:
                raise RuntimeError("the parameters of an SSVDOLinear changed inside gradient_accumulation; "
                                   "step the optimiser after the context")
        for layer, prepared, batch in self._group.prepare(self) if self._group else ():
            layer._keep(prepared, batch)
        if self._cache is cache or self._cache is None:
            self._keep(Prepared(parameters, self.factors(), self.shape, self.config, self.name))
        assert self._cache is not None
        return self._cache

    def _keep(self, prepared: Prepared, batch: Batch | None = None) -> None:
        prepared.expected = self._expected = self._served()
        on_cpu = self.weight.device.type == "cpu"
        copies = tuple(p.detach().clone() for p in self.adapter_parameters) if on_cpu else ()
        self._cache = _Cache(prepared, self._stamp(), copies, batch)

    def _mixer_and_columns(self, cache: _Cache) -> tuple[Tensor, Tensor, list[Rows] | None]:
        prepared = cache.prepared
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.adapter_parameters)
        if not trains:
            return prepared.mixer, prepared.columns, None
        if cache.batch is not None and not self._accumulating and one_node():
            return *cache.batch.attached(prepared), None
        if not self._accumulating or self._capturing():
            sink: list[Rows] = []
            return *attach(prepared, sink, self.adapter_parameters), sink
        if cache.leaves is None:
            cache.leaves = (prepared.mixer.detach().requires_grad_(), prepared.columns.detach().requires_grad_())
        return *cache.leaves, None

    def _begin_accumulation(self) -> None:
        if self._accumulating:
            raise RuntimeError("gradient_accumulation is already open for this SSVDOLinear")
        self._accumulating = True

    def _end_accumulation(self) -> list[tuple[Tensor, Tensor]]:
        """The prepared matrices in the graph, each with the gradient that was summed on it."""
        self._accumulating = False
        cache = self._cache
        if cache is None or cache.leaves is None:
            return []
        leaves, cache.leaves = cache.leaves, None
        if all(leaf.grad is None for leaf in leaves):
            return []
        if cache.batch is not None and one_node():
            attached = cache.batch.attached(cache.prepared)
        else:
            attached = attach(cache.prepared, [], self.adapter_parameters)
        return [(t, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
                for t, leaf in zip(attached, leaves, strict=True)]

    # -- forward -----------------------------------------------------------------------------------------------------
    def _check_input(self, x: Tensor, autocast: torch.dtype | None) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}; allowed: a floating dtype")
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features={self.in_features}")
        if x.device != self.weight.device:
            raise ValueError(f"x is on {x.device}; the layer is on {self.weight.device}")
        if autocast is None and x.dtype != self.weight.dtype:
            raise TypeError(f"x has dtype {x.dtype}; allowed: the weight's {self.weight.dtype} (autocast would cast x)")
        if self.weight.requires_grad:
            raise RuntimeError("weight.requires_grad is True, but SSVD-O keeps W0 frozen; switch it off, or call "
                               "remove_ssvdo to fine-tune the weight itself")

    def plan(self, tokens: int, grad: bool = True) -> str:
        """The form ("factored", "folded", "core" or "merged") that a forward of `tokens` rows takes now."""
        backend, _ = token_path(self.config.backend, self.weight.device, self.weight.dtype)
        return self._form(self.prepared(), tokens, grad, backend, self.weight.dtype)

    def _form(self, prepared: Prepared, tokens: int, grad: bool, backend: str, dtype: torch.dtype) -> str:
        if self._merged:
            return "merged"
        if self.config.path != "auto":
            return self.config.path
        extra, seen = prepared.columns.shape[1], max(prepared.tokens, prepared.expected - tokens)
        if backend == "triton":
            device = torch.cuda.get_device_name(self.weight.device) if self.weight.is_cuda else ""
            peaks = machine(device, dtype, torch.backends.cuda.matmul.allow_tf32)
            form = plan_kernels(self.shape, extra, tokens, seen, grad, prepared.built, dtype.itemsize, peaks)
        else:
            form = plan(self.shape, extra, tokens, seen, grad, prepared.built)
        if not grad:
            return form
        # Activation checkpointing runs a forward twice and needs the same tensors saved: within a preparation, forwards
        # of as many rows keep to forms that save alike. factored and folded do.
        first = prepared.choices.setdefault(tokens, form)
        alike = ("factored", "folded")
        return form if form == first or (form in alike and first in alike) else first

    @lasting
    def forward(self, x: Tensor) -> Tensor:
        """y = x W'^T + b. x: (..., in_features); returns (..., out_features)."""
        kind = self.weight.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._check_input(x, autocast)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if autocast is not None and x.dtype != torch.float64:
            x, weight = x.to(autocast), weight.to(autocast)
            bias = None if bias is None else bias.to(autocast)
        rows = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            factors = tuple(getattr(self, name) for name in FACTOR_NAMES)
            y = functional_linear(rows, weight, bias, self.adapter_parameters, factors, self._spec, self._merged)
            return y.view(*x.shape[:-1], self.out_features)
        cache = self._current()
        mixer, columns, sink = self._mixer_and_columns(cache)
        backend, _ = token_path(self.config.backend, x.device, x.dtype)
        form = self._form(cache.prepared, rows.shape[0], mixer.requires_grad, backend, x.dtype)
        cache.prepared.tokens += rows.shape[0]
        cache.prepared.trained += rows.shape[0] if mixer.requires_grad else 0
        with own_dtypes():
            y = adapted_linear(rows, mixer, columns, weight, bias, cache.prepared, form, backend, sink)
        return y.view(*x.shape[:-1], self.out_features)

    # -- the dense weight --------------------------------------------------------------------------------------------
    @lasting
    @torch.no_grad()
    @own_dtypes()
    def adapted_weight(self) -> Tensor:
        """W' (out_features x in_features) for the current parameters, in the weight's dtype; a new tensor."""
        return self.prepared().merged(self.weight).clone()

    @property
    def merged(self) -> bool:
        """Whether forwards go through the dense W'."""
        return self._merged

    def merge(self) -> None:
        """Computes with the dense W' from now on: one product a forward, as fast as nn.Linear.

        ``weight`` stays W0, bit for bit, and so does the state_dict: a merged layer can be saved, loaded, trained and
        unmerged at any time, and its W' follows the parameters. `remove_ssvdo(model, merge=True)` gives an nn.Linear
        whose weight is W'.
        """
        self._merged = True

    def unmerge(self) -> None:
        """Undoes `merge`."""
        self._merged = False
        self.refresh()
        self._expected = 0

    def to_linear(self, merge: bool = False) -> nn.Linear:
        """nn.Linear with W0 (the very same tensor) or, with merge, W'. The weight is left frozen."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.adapted_weight() if merge else self.weight.detach()
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    # -- state -------------------------------------------------------------------------------------------------------
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The number of rank-deficient directions belongs to the weight, so a checkpoint may bring another one.
        incoming = state_dict.get(prefix + "null_basis")
        size = tuple(getattr(incoming, "shape", ()))
        differs = size != tuple(self.null_basis.shape)
        if differs and len(size) == 2 and size[0] == self.shape.large and size[1] <= self.shape.k:
            self.null_basis = nn.Parameter(self.null_basis.new_empty(size), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_accumulating": False, "_group": None}

    def extra_repr(self) -> str:
        s, c = self.shape, self.config
        return (f"in_features={s.in_features}, out_features={s.out_features}, bias={self.bias is not None}, "
                f"inner={s.k}, outer_rank={s.l}, rotation={c.rotation!r}, merged={self._merged}")


@contextmanager
def gradient_accumulation(module: nn.Module) -> Iterator[None]:
    """Prepares every SSVDOLinear of `module` once, forward and backward, for all micro-batches inside.

    Inside, gradients are summed on the prepared matrices; on leaving, one backward per layer brings them to the
    parameters' ``.grad``, where they add to what is there. Without this context each backward of a micro-batch repeats
    the preparation's backward: the same gradients, more work. An exception inside leaves ``.grad`` as it was.

    Raises:
        RuntimeError: the context is open already, or a parameter changes inside.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SSVDOLinear)]
    opened: list[SSVDOLinear] = []
    completed = False
    try:
        for layer in layers:
            layer._begin_accumulation()
            opened.append(layer)
        yield
        completed = True
    finally:
        summed = [pair for layer in opened for pair in layer._end_accumulation()]
        if completed and summed:
            torch.autograd.backward([t for t, _ in summed], [g for _, g in summed])
