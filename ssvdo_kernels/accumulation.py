"""Gradient accumulation: one preparation, forward and backward, for all micro-batches of a step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from .cache import Cache
from .ops.attach import NO_SUMS, StandIns, all_wanted, attach, below, without_product
from .ops.preparation import Parameters, Prepared, by_batch
from .ops.streams import current
from .watchers import hooked, refuse_counting, trained_by_deepspeed, units

_INSIDE = "inside gradient_accumulation"
_missing = partial(is_, None)
_gets, _grad = attrgetter("requires_grad"), attrgetter("grad")


def _hooked(p: Tensor) -> bool:
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


class _Ahead(Tensor):
    """Stands in .grad while gradients are summed elsewhere: whoever uses it is told; what comes another way is kept."""

    layer: str
    before: Tensor | None  # what stood there
    other: Tensor | None

    @staticmethod
    def __new__(cls, p: Tensor, layer: str) -> _Ahead:
        made: Any = Tensor._make_wrapper_subclass(cls, p.shape, dtype=p.dtype, device=p.device)
        made.layer, made.before, made.other = layer, p.grad, None
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<gradients of {self.layer} that have not arrived, {_INSIDE}>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor) and isinstance(args[0], cls):
            args[0].other = args[1].clone() if args[0].other is None else args[0].other.add_(args[1])
            return args[0]
        layer = next(a.layer for a in tree_leaves((args, kwargs)) if isinstance(a, cls))
        raise RuntimeError(f"{layer}: {func} reads or writes .grad {_INSIDE}, when its gradients have not arrived; "
                           "clip_grad_norm_, GradScaler.unscale_ and the like belong after the context")  # fmt: skip


class Sums:
    """What one layer sums: the gradients of M and F, with their stand-ins, and what these were made from.

    The parameters stand below the stand-ins in the graph, so that a graph which outlives the context brings gradients
    by itself, and `.grad` is watched; not where hooks on them would run for each micro-batch (DDP, FSDP): then a number
    of ours stands there.
    """

    def __init__(self, prepared: Prepared, parameters: Parameters) -> None:
        self.prepared, self.parameters, self.open = prepared, parameters, True
        self._there = [p for p in parameters if p is not None]
        self._gets = list(map(_gets, self._there))
        self._trained = [p for p in self._there if p.requires_grad]
        self._reached = not hooked() and all(p.is_leaf and not _hooked(p) for p in self._trained)
        self._totals: list[Tensor | None] = list(NO_SUMS)
        self._pair: StandIns | None = None
        self._node: Any = None  # that of the stand-ins,
        self._below: list[Any] = []  # and those that it leads to
        self._stream: int | None = None  # on which what was summed was written
        self._watched: list[_Ahead] = []  # what stands in .grad of those that are trained

    def pair(self) -> StandIns:
        """The stand-ins."""
        if self._pair is None:
            ends = self.parameters
            if not self._reached:
                ends = None, self.prepared.columns.new_zeros(()).requires_grad_(), None
            self._pair = attach([self.prepared], [ends], arrived=self._arrived, sums=True)[0]
            self._node = self._pair.mixer.grad_fn
            self._below = below(self._node)
        return self._pair

    def _arrived(self, node: Any, gradients: Sequence[Tensor | None]) -> bool:
        if self.open and all(map(_missing, gradients)):
            return True  # they were added to `totals`
        compiled = _compiled()
        if compiled:
            self._pair = None  # it runs a node once, and puts .grad back as it was
        if not self.open:
            if self._reached:
                return False
            raise RuntimeError(f"{self.prepared.name}: a graph that was made {_INSIDE} outlived it; allowed, where "
                               "hooks watch the parameters (DDP, FSDP, register_hook): its backward inside")
        if not compiled:
            self._watch_backward()
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                total = self._totals[i]
                self._totals[i] = gradient if total is None else total.add_(gradient)
                self._stream = current(gradient)
        return True

    def totals(self, like: Tensor) -> Sequence[Tensor | None]:
        """What a backward may add to where it makes a gradient: what has arrived before, if it was written on the
        current stream, and if this backward goes on to the stand-ins. Raises as `_watch_backward`."""
        if (not self.open or current(like) != self._stream or _compiled()
                or not torch._C._will_engine_execute_node(self._node)):  # fmt: skip
            return NO_SUMS
        self._watch_backward()
        return self._totals

    def _watch_backward(self) -> None:
        """Raises RuntimeError where the backward that runs is to leave gradients elsewhere."""
        if self._reached and not all_wanted(self._below):
            raise RuntimeError(f"{self.prepared.name}: autograd.grad or backward(inputs=some) {_INSIDE}, which "
                               "brings gradients to all parameters when it is left; allowed: backward()")
        self._watch()

    def _watch(self) -> None:
        """Lets go of what was summed before a zero_grad. Raises RuntimeError where `.grad` was replaced otherwise."""
        if not self._reached:
            return
        if self._watched:
            same = list(map(is_, map(_grad, self._trained), self._watched))
            if all(same):
                return
            if any(same) or not all(p.grad is None or isinstance(p.grad, _Ahead) for p in self._trained):
                raise RuntimeError(f"{self.prepared.name}: .grad of some parameters was replaced {_INSIDE}; allowed: "
                                   "zero_grad of all of a layer")  # fmt: skip
            self._totals, self._watched = list(NO_SUMS), []
        for p in self._trained:
            if not isinstance(p.grad, _Ahead):  # it may be shared with another layer
                p.grad = _Ahead(p, self.prepared.name)
            assert isinstance(p.grad, _Ahead)
            self._watched.append(p.grad)

    def check(self, prepared: Prepared, parameters: Parameters) -> None:
        """Raises RuntimeError where the layer is no longer what it was when the first gradient was summed."""
        if prepared is not self.prepared or not all(map(is_, parameters, self.parameters)):
            raise RuntimeError(
                f"{prepared.name}: the parameters changed {_INSIDE} (or were prepared anew: refresh, unmerge, "
                "load_state_dict); step the optimiser after the context")
        if list(map(_gets, self._there)) != self._gets:
            raise RuntimeError(f"{prepared.name}: requires_grad changed {_INSIDE}; freeze and thaw outside of it")

    def finish(self) -> bool:
        """Whether there is anything to bring to the parameters. Raises as their backward would."""
        if self._watched:
            self._watch()
        if not any(t is not None for t in self._totals):
            return False
        self.check(self.prepared, self.parameters)
        self.prepared.check_unedited()
        self.prepared.verify()
        self._totals = without_product(self.prepared, self._totals)
        return True

    def clear(self) -> None:
        """Puts back into `.grad` what stood there, with what another graph has brought since."""
        for p, ahead in zip(self._trained, self._watched, strict=False):  # none is watched where none has come
            if p.grad is ahead:
                p.grad = ahead.before
                if ahead.other is not None:
                    p.grad = ahead.other if p.grad is None else p.grad.add_(ahead.other)

    def brought(self, attached: StandIns) -> list[tuple[Tensor, Tensor]]:
        """The stand-ins of a graph that have a gradient, with what was summed."""
        found = zip(attached, self._totals, strict=True)
        return [(t, d) for t, d in found if t is not None and d is not None]


def _brought(some: Sequence[Sums]) -> list[tuple[Tensor, Tensor]]:
    """What those that were prepared together sum. Each has gradients, so that one node serves them whoever watches."""
    attached = attach([sums.prepared for sums in some], [sums.parameters for sums in some])
    return [pair for sums, own in zip(some, attached, strict=True) for pair in sums.brought(own)]


def _compiled() -> bool:
    """Whether compiled autograd is running this backward."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "in_compiled_autograd_region", False))


_pending: weakref.WeakSet[Accumulator] = weakref.WeakSet()


def _refuse_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    own = {id(p) for group in optimizer.param_groups for p in group["params"]} if _pending else set()
    for accumulator in _pending:
        accumulator.check_step(own)


register_optimizer_step_pre_hook(_refuse_step)


class Accumulator:
    """Sums one layer's gradients on its prepared matrices while it is open."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.open = cache, False
        self._sums: Sums | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"cache": self.cache, "open": False, "_sums": None}

    def sums(self, prepared: Prepared, parameters: Parameters) -> Sums:
        """Where gradients are summed. Raises as `Sums.check`."""
        refuse_counting(prepared.name)
        if self._sums is None:
            self._sums = Sums(prepared, parameters)
            self.cache.trusted = prepared
            _pending.add(self)
        self._sums.check(prepared, parameters)
        return self._sums

    def start(self) -> None:
        """Opens it."""
        if self.open:
            raise RuntimeError("gradient_accumulation is already open for this layer")
        self.open = True

    def check_step(self, own: set[int]) -> None:
        """Raises RuntimeError where an optimiser of the parameters with these ids would miss what is summed here."""
        if self._sums is not None and any(id(p) in own for p in self._sums.parameters if p is not None):
            raise RuntimeError(
                f"{self._sums.prepared.name}: optimiser step inside gradient_accumulation, where .grad does not hold "
                "the gradients yet (clip_grad_norm_ and GradScaler.unscale_ miss them, too); leave the context first")

    def close(self) -> Sums | None:
        """Closes it, and gives what was summed."""
        sums, self.open, self._sums = self._sums, False, None
        self.cache.trusted = None
        _pending.discard(self)
        if sums is not None:
            sums.open, sums._pair, sums._node, sums._below = False, None, None, []
        return sums


@contextmanager
def gradient_accumulation(module: nn.Module) -> Iterator[None]:
    """Prepares every adapted layer of `module` once, forward and backward, for all micro-batches inside.

    Inside, gradients are summed on the prepared matrices; on leaving, one backward per layer brings them to the
    parameters' ``.grad``, where they add to what is there. Without this context each backward of a micro-batch repeats
    the preparation's backward: the same gradients, more work. An exception inside leaves ``.grad`` as it was.

    ``zero_grad`` inside discards what was summed. ``clip_grad_norm_`` and ``GradScaler.unscale_`` belong after the
    context; that they are not inside is checked, but not where hooks watch the parameters (DDP).

    Raises:
        TypeError: module is no nn.Module.
        RuntimeError: the context is open already, or an optimiser steps or a parameter, its ``requires_grad`` or its
            ``.grad`` changes inside, or autograd.grad or backward(inputs=) asks for some of a layer's gradients, or
            FSDP shards the module, or DeepSpeed trains it, or a DDP around it has find_unused_parameters or
            static_graph.

    Examples:
        >>> with gradient_accumulation(model):
        ...     for rows in x.chunk(4):
        ...         model(rows).square().mean().backward()
        >>> optimiser.step()
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; allowed: torch.nn.Module")
    if next(units(module), None) is not None:
        raise RuntimeError("gradient_accumulation of a module that FSDP shards, whose parameters are not there when it "
                           "is left; allowed: micro-batches without it")  # fmt: skip
    if trained_by_deepspeed(module):
        raise RuntimeError("gradient_accumulation of a module that DeepSpeed trains, whose backward takes gradients "
                           "that are not there yet; allowed: micro-batches without it")  # fmt: skip
    found = [getattr(m, "accumulator", None) for m in module.modules()]  # a wrapper gives that of what it wraps
    opened: list[Accumulator] = []
    completed = False
    try:
        for accumulator in {id(a): a for a in found if isinstance(a, Accumulator)}.values():
            accumulator.start()
            opened.append(accumulator)
        try:
            yield
        except GeneratorExit:  # a generator that is left in the middle has done what it has done
            completed = True
            raise
        completed = True
    finally:
        _leave(opened, completed)


def _leave(opened: Sequence[Accumulator], completed: bool) -> None:
    """Brings what was summed to the parameters, in one backward; all is checked before."""
    closed = [accumulator.close() for accumulator in opened]
    found = [sums for sums in closed if sums is not None]
    with torch.inference_mode(False), torch.no_grad():
        try:
            ready = [sums for sums in found if completed and sums.finish()]
        finally:
            for sums in found:
                sums.clear()
    with torch.inference_mode(False), torch.enable_grad():
        batches = by_batch([sums.prepared for sums in ready])
        pairs = [pair for own in batches for pair in _brought([ready[i] for i in own])]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [d for _, d in pairs])
