"""The differentiable operations of an SSVD-O layer: preparation, the small-side transforms, the adapted linear map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

_raw: Any = torch._C

autocasting: Callable[[], bool] = _raw._is_any_autocast_enabled
"""Whether autocast is on on some device: elsewhere `own_dtypes` would cost as much as a small product."""


@contextmanager
def own_dtypes() -> Iterator[None]:
    """Autocast off on every device: inside, each product runs in the dtype that we chose for it.

    Also needed in backward, which runs under autocast where a user calls it there.
    """
    if not autocasting():
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


_with_grad = torch.is_grad_enabled
transforming: Callable[[], bool] = _raw._are_functorch_transforms_active
_is_batched: Callable[[Any], bool] = _raw._functorch.is_legacy_batchedtensor
_Function = TypeVar("_Function", bound=Callable[..., Any])
_SECOND = ("create_graph=True (as in autograd.functional's hessian, hvp and jvp) wants the gradient of an adapted "
           "layer's gradient, and there is none; allowed: torch.func (grad, jvp, hessian)")  # fmt: skip
_BATCHED = ("an adapted layer got a batch of gradients at once (is_grads_batched, jacobian(vectorize=True)); allowed: "
            "torch.func (jacrev, vmap)")  # fmt: skip


def by_hand(backward: _Function) -> _Function:
    """A backward of ours, outside autocast: once differentiable, of one gradient at a time; an error otherwise."""

    @wraps(backward)
    def call(*args: Any) -> Any:
        if _with_grad():  # PyTorch's own once_differentiable says nothing where no gradient asks for it
            raise RuntimeError(_SECOND)
        if transforming() or (args[1] is not None and _is_batched(args[1])):
            raise RuntimeError(_BATCHED)
        if not autocasting():
            return backward(*args)
        with own_dtypes():
            return backward(*args)

    return call  # type: ignore[return-value]


def straight(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its `apply` without a look for transforms of torch.func in its arguments: a layer under one never comes here."""
    applied: Any = super(torch.autograd.Function, function)
    return applied.apply  # type: ignore[no-any-return]


def lasting(function: _Function) -> _Function:
    """Runs `function` outside of inference mode, where called inside: training may use what it keeps."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
