"""Gradient accumulation: one preparation, forward and backward, for all micro-batches of a step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .cache import Cache
from .ops.attach import Pair, stand_ins
from .ops.preparation import Parameters, Prepared


class Sums(NamedTuple):
    """Leaves that collect the gradients of M and F, and what these were made from."""

    prepared: Prepared
    parameters: Parameters
    leaves: Pair


_pending: weakref.WeakSet[Accumulator] = weakref.WeakSet()


def _refuse_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    own = {id(p) for group in optimizer.param_groups for p in group["params"]} if _pending else set()
    for accumulator in _pending:
        accumulator.check_step(own)


register_optimizer_step_pre_hook(_refuse_step)


class Accumulator:
    """Sums one layer's gradients on its prepared matrices while it is open."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._open = cache, False
        self._sums: Sums | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_cache": self._cache, "_open": False, "_sums": None}

    def pair(self, prepared: Prepared, parameters: Parameters) -> Pair | None:
        """Leaves that collect the gradients of M and F; None where the context is not open.

        Raises:
            RuntimeError: the parameters have changed since the context was opened.
        """
        if not self._open:
            return None
        if self._sums is None:
            mixer, columns = stand_ins(prepared)
            self._sums = Sums(prepared, parameters, (mixer.requires_grad_(), columns.requires_grad_()))
            _pending.add(self)
        same = all(p is q for p, q in zip(parameters, self._sums.parameters, strict=True))
        if prepared is not self._sums.prepared or not same:
            raise RuntimeError(f"{prepared.name}: the parameters changed inside gradient_accumulation; step the "
                               "optimiser after the context")
        return self._sums.leaves

    def start(self) -> None:
        """Opens it."""
        if self._open:
            raise RuntimeError("gradient_accumulation is already open for this layer")
        self._open = True

    def check_step(self, own: set[int]) -> None:
        """Raises RuntimeError where an optimiser of the parameters with these ids would miss what is summed here."""
        if self._sums is not None and any(id(p) in own for p in self._sums.parameters if p is not None):
            raise RuntimeError(
                f"{self._sums.prepared.name}: optimiser step inside gradient_accumulation, where .grad does not hold "
                "the gradients yet (clip_grad_norm_ and GradScaler.unscale_ miss them, too); leave the context first")

    def finish(self) -> list[tuple[Tensor, Tensor]]:
        """Closes it. M and F in the graph, each with the gradient that was summed on it."""
        sums, self._open, self._sums = self._sums, False, None
        _pending.discard(self)
        if sums is None or all(leaf.grad is None for leaf in sums.leaves):
            return []
        attached, _ = self._cache.pair(sums.prepared, sums.parameters)
        return [(t, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
                for t, leaf in zip(attached, sums.leaves, strict=True)]  # fmt: skip


@contextmanager
def gradient_accumulation(module: nn.Module) -> Iterator[None]:
    """Prepares every adapted layer of `module` once, forward and backward, for all micro-batches inside.

    Inside, gradients are summed on the prepared matrices; on leaving, one backward per layer brings them to the
    parameters' ``.grad``, where they add to what is there. Without this context each backward of a micro-batch repeats
    the preparation's backward: the same gradients, more work. An exception inside leaves ``.grad`` as it was.

    Raises:
        RuntimeError: the context is open already, or an optimiser steps or a parameter changes inside.
    """
    found = [getattr(m, "accumulator", None) for m in module.modules()]
    opened: list[Accumulator] = []
    completed = False
    try:
        for accumulator in found:
            if isinstance(accumulator, Accumulator):
                accumulator.start()
                opened.append(accumulator)
        yield
        completed = True
    finally:
        summed = [pair for accumulator in opened for pair in accumulator.finish()]
        if completed and summed:
            torch.autograd.backward([t for t, _ in summed], [g for _, g in summed])
