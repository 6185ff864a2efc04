"""What a layer may be given as x, and under what it may be called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .ops import autocasting, transforming
from .ops.base import Base

_raw: Any = torch._C
_inferring = torch.is_inference_mode_enabled
_stack, _tracing = _raw._len_torch_dispatch_stack, _raw._get_tracing_state
_NO_FX = ("torch.fx.symbolic_trace cannot see into an adapted layer; allowed: torch.export, a Tracer that takes it for "
          "a leaf (is_leaf_module), or remove_ssvdo(model, merge=True) first")  # fmt: skip


def ordinary(x: Tensor, in_features: int, base: Base) -> bool:
    """Whether x is a tensor that `check` lets pass as it is, and nothing is at work that a forward has to mind: no
    compilation, tracing, transform, autocast, inference mode or dispatch mode."""
    return not (
        torch.compiler.is_compiling() or type(x) is not Tensor or x.is_nested or x.is_meta
        or x.dtype is not base.dtype or not x.ndim or x.shape[-1] != in_features or x.device != base.device
        or x.layout is not torch.strided or base.trains or autocasting() or _inferring()
        or transformed() or _stack() or _tracing() is not None)  # fmt: skip


def check_tensor(x: object) -> None:
    """TypeError where x is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(_NO_FX if isinstance(x, torch.fx.Proxy) else f"x is a {type(x).__name__}; allowed: Tensor")


def check(x: Tensor, in_features: int, base: Base, autocast: torch.dtype | None) -> None:
    """Raises as `SSVDOLinear` says. autocast: the dtype that it brings x to; None: none."""
    if x.layout != torch.strided:
        raise TypeError(f"x has layout {x.layout}; allowed: torch.strided (x.to_dense())")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; allowed: a floating dtype")
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features={in_features}")
    if x.device != base.device:
        raise ValueError(f"x is on {x.device}; the layer is on {base.device}")
    if autocast is None and x.dtype != base.dtype and base.held:
        raise TypeError(f"x has dtype {x.dtype}; allowed: the weight's {base.dtype} (autocast casts others)")
    if base.trains:
        raise RuntimeError("weight.requires_grad is True, but SSVD-O keeps W0 frozen; switch it off, or call "
                           "remove_ssvdo to fine-tune the weight itself")  # fmt: skip


def by_components(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """layer(x) for a nested tensor: its components in one call."""
    if x.layout == torch.jagged:
        ragged: Any = x
        if ragged._ragged_idx != 1 or ragged.lengths() is not None:
            raise ValueError("x is a jagged tensor that is transposed or has holes; allowed: a contiguous one, "
                             "ragged in its second dimension")  # fmt: skip
        return torch.nested.nested_tensor_from_jagged(layer(x.values()), ragged.offsets())
    parts = x.unbind()
    if not parts:
        raise ValueError("x is a nested tensor without components; allowed: one or more")
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    y = torch.split(layer(torch.cat(rows)), [len(r) for r in rows])
    return torch.nested.as_nested_tensor(
        [t.view(*part.shape[:-1], t.shape[-1]) for t, part in zip(y, parts, strict=True)])


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which our hand-written gradients do not know."""
    return transforming() or forward_ad._current_level >= 0


@contextmanager
def untraced() -> Iterator[None]:
    """Outside of torch.jit.trace."""
    jit: Any = torch._C
    state = jit._get_tracing_state()
    jit._set_tracing_state(None)
    try:
        yield
    finally:
        jit._set_tracing_state(state)
