"""A layer's preparation, kept until what it was made from changes; never stale.

On the CPU the parameters' bytes are looked at, so that no edit goes unseen; elsewhere version counter, storage and
optimiser step, because a look would stall the stream. Factors and base weights are compared by version and storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from operator import is_
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .ops.attach import StandIns, attach
from .ops.engines import prepare_one
from .ops.joined import Joined
from .ops.preparation import Formula, Parameters, Prepared, Rows, Source
from .origin import stamps

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Some optimisers write through `p.data`, which leaves no trace in the version counter; every step therefore counts.
register_optimizer_step_post_hook(_count_step)


def _on_cpu(parameters: Parameters) -> bool:
    return parameters[1].is_cpu


def capturing(parameters: Parameters) -> bool:
    """Whether a CUDA graph is being captured: a replay must prepare anew, as parameters change between replays."""
    return parameters[1].is_cuda and torch.cuda.is_current_stream_capturing()


def one_node() -> bool:
    """Whether the gradients of several layers may come from one node: not where DDP's reducer or FSDP's resharding look
    for a layer's gradients when that layer's own backward is over."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def gets(parameters: Parameters) -> list[bool]:
    """Which of them get gradients."""
    return [p is not None and p.requires_grad for p in parameters]


def _ran(batch: weakref.ref[Batch], *_: object) -> bool:
    if (own := batch()) is not None:
        own._attached = {}
    return False


class Batch:
    """Layers that were prepared together, and their stand-ins in the graph, until their node's backward has run: it may
    run twice under autograd itself, but not compiled, and it would hold what `swap_tensors` exchanges."""

    def __init__(self, prepared: Sequence[Prepared]) -> None:
        self.prepared = prepared
        for one in prepared:
            one.batch = weakref.ref(self)
        self._attached: dict[int, tuple[list[bool], StandIns]] = {}  # by layer, with which parameters get gradients

    def attached(self, prepared: Prepared) -> StandIns:
        """M and F of one of the batch, from the node that they share."""
        found = self._attached.get(id(prepared))
        if found is None or found[0] != gets(prepared.source.parameters):
            parameters = [p.source.parameters for p in self.prepared]
            pairs = attach(self.prepared, parameters, arrived=partial(_ran, weakref.ref(self)))
            made = zip(map(gets, parameters), pairs, strict=True)
            self._attached = dict(zip(map(id, self.prepared), made, strict=True))
            found = self._attached[id(prepared)]
        return found[1]


class Companions(Protocol):
    """Who prepares other layers along with one; see group.py."""

    def prepare(self, cache: Cache, source: Source) -> Prepared | None:
        """Prepares the layer of `cache` and others, each into its cache; None where that brings nothing."""


class Kept(NamedTuple):
    """A preparation and what it was made from. Exchanged whole, so that threads see the one or the other."""

    prepared: Prepared
    batch: Batch | None
    fixed: tuple[object, ...]  # sizes, formula, frozen tensors, and what the parameters are
    moving: tuple[object, ...]  # the parameters' contents
    storages: tuple[Tensor, ...]  # of the frozen tensors, alive so that no other comes to lie there


def _fixed(formula: Formula, watched: Sequence[Tensor | None], parameters: Parameters) -> tuple[object, ...]:
    return *formula, *stamps(watched), *[None if p is None else (p.dtype, p.device) for p in parameters]


def _moving(parameters: Parameters) -> tuple[object, ...]:
    return not _on_cpu(parameters) and _optimizer_steps, *stamps(parameters)


class Cache:
    """The one preparation that a layer keeps, and the bookkeeping that outlives it."""

    def __init__(self) -> None:
        self.group: Companions | None = None
        self.forget()
        self._expected = 0
        self._captured = False
        self.trusted: Prepared | None = None  # what gradients are being summed on: once captured, nothing else is

    def forget(self) -> None:
        """Lets go of the preparation; the next forward prepares anew."""
        self._expected = self._served()
        self._kept: Kept | None = None
        self._joined = Joined()

    def reset(self) -> None:
        """Forgets what the planner has learnt, too."""
        self.forget()
        self._expected = 0

    def __getstate__(self) -> dict[str, object]:
        return {"copied": True}  # and nothing else: a copy starts afresh

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def _served(self) -> int:
        """Rows with gradients that the last preparation which had any has served: what the next one may expect."""
        kept: Kept | None = getattr(self, "_kept", None)
        return (0 if kept is None else kept.prepared.trained) or getattr(self, "_expected", 0)

    def _made_from(self, formula: Formula, watched: Sequence[Tensor | None], parameters: Parameters) -> Kept | None:
        """What is kept, where it was made from these tensors, the frozen ones as they are."""
        kept = self._kept
        return kept if kept is not None and _fixed(formula, watched, parameters) == kept.fixed else None

    def source(self, formula: Formula, watched: Sequence[Tensor | None], parameters: Parameters) -> Source | None:
        """The source of what is kept, where it would be made the same now."""
        kept = self._made_from(formula, watched, parameters)
        if kept is None:
            return None
        own = kept.prepared.source
        now = [t for t in watched if t is not None]
        return own if all(map(is_, parameters, own.parameters)) and all(map(is_, now, own.watched)) else None

    def out_of_date(self, source: Source) -> bool:
        """Whether what is kept was made from other tensors or numbers than `source`, just made, by their stamps."""
        kept = self._kept
        if kept is None or self._distrusts(kept.prepared) or _moving(source.parameters) != kept.moving:
            return True
        return source is not kept.prepared.source and self._made_from(*source.parts) is None

    def _distrusts(self, prepared: Prepared) -> bool:
        return self._captured and self.trusted is not prepared

    def hit(self, formula: Formula, watched: Sequence[Tensor | None], parameters: Parameters) -> Prepared | None:
        """`current` where nothing has changed, from the parts of a source; None elsewhere, and in a capture."""
        kept = None if capturing(parameters) else self._made_from(formula, watched, parameters)
        if kept is None or self._distrusts(kept.prepared):
            return None
        found = kept.prepared
        if not (found.stands(parameters) if _on_cpu(parameters) else _moving(parameters) == kept.moving):
            return None
        found.verify(wait=False)
        if found.queued is not None:
            found.queued.wait(parameters[1])
        return found

    def current(self, source: Source) -> Prepared:
        """The preparation for `source` as it is now."""
        if capturing(source.parameters):
            self._captured = True  # a replay may change parameters without a trace
            return prepare_one(source)
        found = self.hit(*source.parts)
        if found is None and self.group is not None:
            found = self.group.prepare(self, source)
        if found is None:
            found = prepare_one(source)
            self.keep(found, None)
        return found

    def keep(self, prepared: Prepared, batch: Batch | None) -> None:
        """Takes a preparation, made alone or in a batch."""
        prepared.expected = self._expected = self._served()
        prepared.joined = self._joined
        source, kept = prepared.source, self._kept
        if kept is None or kept.prepared.source is not source:
            fixed, storages = _fixed(*source.parts), tuple(t.detach() for t in source.watched)
        else:
            fixed, storages = kept.fixed, kept.storages
        self._kept = Kept(prepared, batch, fixed, _moving(source.parameters), storages)

    def pair(self, prepared: Prepared, parameters: Parameters) -> tuple[StandIns, list[Rows] | None]:
        """M and F in the graph, and where their one consumer may leave `Rows`."""
        kept, own = self._kept, prepared.source.parameters
        # Others of the same numbers (functional_call, a state_dict assigned) are to get their own gradients.
        same = all(p is q for p, q in zip(parameters, own, strict=True))
        if same and kept is not None and prepared is kept.prepared and kept.batch is not None and one_node():
            return kept.batch.attached(prepared), None
        sink: list[Rows] = []
        return attach([prepared], [parameters], sink)[0], sink
