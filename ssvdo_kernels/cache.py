"""A layer's preparation, kept until what it was made from changes; never stale.

On the CPU the parameters' bytes are looked at, so that no edit goes unseen; elsewhere version counter, storage and
optimiser step, because a look would stall the stream. Factors and base weights are compared by version and storage.

A CUDA graph prepares in itself, as parameters change between its replays without a trace: see `Capture`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from operator import is_
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .ops.attach import StandIns, all_wanted, attach, below, by_layer, used
from .ops.device import capture
from .ops.engines import prepare_one
from .ops.joined import Joined
from .ops.preparation import Formula, Parameters, Prepared, Rows, Source
from .ops.streams import current
from .origin import stamps
from .watchers import all_used, layers_a_node, refuse_unused, shards, writes

_optimizer_steps = 0
_replayed = WeakTensorKeyDictionary()  # parameters that a captured step writes when it is replayed, without a trace


def _count_step(optimizer: Optimizer, *_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _replayed.update((p, True) for group in optimizer.param_groups for p in group["params"])


# Some optimisers write through `p.data`, which leaves no trace in the version counter; every step therefore counts.
register_optimizer_step_post_hook(_count_step)


def _on_cpu(parameters: Parameters) -> bool:
    return parameters[1].is_cpu


def capturing(parameters: Parameters) -> bool:
    """Whether a CUDA graph is being captured: a replay must prepare anew, as parameters change between replays."""
    return parameters[1].is_cuda and torch.cuda.is_current_stream_capturing()


def gets(parameters: Parameters) -> list[bool]:
    """Which of them get gradients."""
    return [p is not None and p.requires_grad for p in parameters]


def _ran(batch: weakref.ref[Batch], wrapper: Any, node: Any, gradients: Sequence[Tensor | None]) -> bool:
    if (own := batch()) is not None:
        for one in node.prepared:
            own._attached.pop(id(one), None)
    if wrapper is not None and (waits := wrapper()) is not None and all_wanted(below(node)):
        found = set(used(by_layer(gradients)))
        unused = [p for i, p in enumerate(node.prepared) if i not in found]
        refuse_unused(waits, ((p.name, p.source.parameters) for p in unused))
    return False


class Batch:
    """Layers that were prepared together, and their stand-ins in the graph, until their node's backward has run: it may
    run twice under autograd itself, but not compiled, and it would hold what `swap_tensors` exchanges."""

    def __init__(self, prepared: Sequence[Prepared], units: Sequence[int] = ()) -> None:
        """units: of FSDP, a number for each, 0 for none; empty where no FSDP is."""
        self.prepared, self._units = prepared, units
        for one in prepared:
            one.batch = self
        self._attached: dict[int, tuple[object, StandIns]] = {}  # by layer, with what it was attached for

    def _neighbours(self, prepared: Prepared) -> Sequence[Prepared]:
        """Those whose gradients may come from its node: all, some of them in DDP, those of its unit in FSDP."""
        most, i = layers_a_node(), next(i for i, one in enumerate(self.prepared) if one is prepared)
        if most > 1:
            return self.prepared[i // most * most :][:most]
        own = self._units[i] if self._units else 0
        return [p for p, unit in zip(self.prepared, self._units, strict=True) if unit == own] if own else [prepared]

    def attached(self, prepared: Prepared) -> StandIns | None:
        """M and F of one of the batch, from the node that it shares with others; None where it has one of its own."""
        found, wrapper = self._attached.get(id(prepared)), all_used()
        if found is None or found[0] != (wrapper, gets(prepared.source.parameters)):
            some = self._neighbours(prepared)
            if len(some) < 2:
                return None
            parameters = [p.source.parameters for p in some]
            pairs = attach(some, parameters, arrived=partial(_ran, weakref.ref(self), wrapper))
            for one, three, pair in zip(some, parameters, pairs, strict=True):
                self._attached[id(one)] = (wrapper, gets(three)), pair
            found = self._attached[id(prepared)]
        return found[1]


class Companions(Protocol):
    """Who prepares other layers along with one; see group.py."""

    def __len__(self) -> int: ...
    def prepare(self, cache: Cache, source: Source) -> Prepared | None:
        """Prepares the layer of `cache` and others, each into its cache; None where that brings nothing."""


class Kept(NamedTuple):
    """A preparation and what it was made from. Exchanged whole, so that threads see the one or the other."""

    prepared: Prepared
    batch: Batch | None
    fixed: tuple[object, ...]  # sizes, formula, frozen tensors, and what the parameters are
    moving: tuple[object, ...]  # the parameters' contents
    storages: tuple[Tensor, ...]  # of the frozen tensors, alive so that no other comes to lie there
    shards: Sequence[Any] = ()  # what FSDP gathers all of these from
    written: Sequence[int] = ()

    @property
    def anew(self) -> bool:
        """Whether FSDP may have gathered other numbers since, of which the tensors show no trace."""
        return bool(self.shards) and writes(self.shards) != self.written


def _fixed(formula: Formula, watched: Sequence[Tensor | None], parameters: Parameters) -> tuple[object, ...]:
    kinds = [None if p is None else p.dtype for p in parameters] if _on_cpu(parameters) else ()  # `_moving` has them
    return formula, parameters[1].device, kinds, stamps(watched)


def _moving(parameters: Parameters) -> tuple[object, ...]:
    return _clock(parameters), stamps(parameters)


def _clock(parameters: Parameters) -> int:
    return 0 if _on_cpu(parameters) else _optimizer_steps


class Capture:
    """What was prepared in the CUDA graph whose capture is under way, for this graph alone.

    It is let go of when another capture, or a layer outside of any, prepares: until then its tensors stay in the
    graph's memory. A capture that asks for fewer than half of the layers that it prepares is of a part of the model
    (make_graphed_callables): in the next one layers are prepared one by one.
    """

    _now: ClassVar[Capture | None] = None
    _parts: ClassVar[bool] = False

    def __init__(self, number: int) -> None:
        self._number, self.whole = number, not Capture._parts
        self._kept: dict[int, weakref.WeakKeyDictionary[Cache, Kept]] = {}  # by stream: no other waits for its work
        self._asked: weakref.WeakSet[Cache] = weakref.WeakSet()

    @staticmethod
    def under_way(parameters: Parameters) -> Capture | None:
        """That of the current stream; None where it has no number by which it could be known again."""
        number, now = capture(parameters[1]), Capture._now
        if not number:
            return None
        if now is None or now._number != number:
            Capture.over()
            Capture._now = now = Capture(number)
        return now

    @staticmethod
    def over() -> None:
        """Lets go of the one that was under way."""
        now, Capture._now = Capture._now, None
        groups = set() if now is None else {cache.group for cache in now._asked if cache.group is not None}
        if now is not None and groups:
            Capture._parts = 2 * len(now._asked) < sum(map(len, groups))

    @staticmethod
    def forget(cache: Cache) -> None:
        """Lets go of one layer's."""
        for kept in Capture._now._kept.values() if Capture._now is not None else ():
            kept.pop(cache, None)

    def ask(self, cache: Cache) -> None:
        """Notes a layer that runs in the graph."""
        self._asked.add(cache)

    def kept(self, parameters: Parameters) -> weakref.WeakKeyDictionary[Cache, Kept]:
        """What was prepared on the current stream."""
        return self._kept.setdefault(current(parameters[1]), weakref.WeakKeyDictionary())


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
        Capture.forget(self)

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
        if kept is None or kept.anew or _fixed(formula, watched, parameters) != kept.fixed:
            return None
        return kept

    def source(
        self, formula: Formula, watched: Sequence[Tensor | None], parameters: Parameters, as_before: bool = False
    ) -> Source | None:
        """The source of what is kept, where it would be made the same now; as_before: from the same tensors, whatever
        has been written to them."""
        kept = self._kept if as_before else self._made_from(formula, watched, parameters)
        if kept is None:
            return None
        own = kept.prepared.source
        now = [t for t in watched if t is not None]
        same = all(map(is_, parameters, own.parameters)) and all(map(is_, now, own.watched))
        return own if same and formula == own.formula else None

    def has(self, source: Source) -> bool:
        """Whether what is kept was made from `source`."""
        return self._kept is not None and self._kept.prepared.source is source

    def wants(self, source: Source) -> bool:
        """Whether it would be of use to prepare from `source`, just made, ahead of time: what is kept was made from
        other tensors or numbers, by their stamps, and what is made now will be believed later."""
        if capturing(source.parameters):
            graph = Capture.under_way(source.parameters)
            return graph is None or self._captured_from(source, graph) is None
        kept = self._kept
        if self._distrusts(source.parameters):
            return False
        own = source.parameters
        if kept is None or kept.anew or kept.moving[0] != _clock(own) or kept.moving != _moving(own):
            return True
        return source is not kept.prepared.source and self._made_from(*source.parts) is None

    def _distrusts(self, parameters: Parameters) -> bool:
        """Whether a replay may change parameters without a trace, so that each forward prepares for itself."""
        if self.trusted is not None and self._kept is not None and self.trusted is self._kept.prepared:
            return False
        return self._captured or bool(_replayed.data and any(p is not None and p in _replayed for p in parameters))

    def _captured_from(self, source: Source, graph: Capture) -> Prepared | None:
        """What the graph has prepared from these very tensors and numbers, by their stamps."""
        kept = graph.kept(source.parameters).get(self)
        if kept is None or kept.fixed != _fixed(*source.parts) or kept.moving != _moving(source.parameters):
            return None
        return kept.prepared

    def hit(self, formula: Formula, watched: Sequence[Tensor | None], parameters: Parameters) -> Prepared | None:
        """`current` where nothing has changed, from the parts of a source; None elsewhere, and in a capture."""
        if capturing(parameters) or self._distrusts(parameters):
            return None
        kept = self._made_from(formula, watched, parameters)
        if kept is None:
            return None
        found = kept.prepared
        if not (found.stands(parameters) if _on_cpu(parameters) else _moving(parameters) == kept.moving):
            return None
        found.verify(wait=False)
        if found.queued is not None:
            found.queued.wait(parameters[1])
        return found

    def current(self, source: Source, hold: bool = False, grad: bool | None = None) -> Prepared:
        """The preparation for `source` as it is now.

        hold: whether that of a capture may be held until it is over. Not in torch.compile's own graphs, which account
        for every tensor in their memory: there a layer prepares for itself each time.
        grad: whether a backward will read it; as autograd says, where it is not given.
        """
        graph = None
        if capturing(source.parameters):
            self._captured = True  # a replay may change parameters without a trace
            graph = Capture.under_way(source.parameters) if hold else None
            if graph is None:
                return prepare_one(source)
            graph.ask(self)
            found = self._captured_from(source, graph)
        else:
            found = self.hit(*source.parts)
            if found is None:
                Capture.over()
        if found is None:
            source.check_there()
            if not source.kept:
                self.forget()
                return prepare_one(source)
        if found is None and self.group is not None and (graph is None or graph.whole):
            found = self.group.prepare(self, source)
        if found is None:
            found = prepare_one(source)
            self.keep(found, None)
        if graph is not None:
            # else no later layer could use that memory in its turn
            found.joined.keeps = torch.is_grad_enabled() if grad is None else grad
        return found

    def keep(self, prepared: Prepared, batch: Batch | None) -> None:
        """Takes a preparation, made alone or in a batch."""
        source, kept = prepared.source, self._kept
        if capturing(source.parameters):
            if (graph := Capture.under_way(source.parameters)) is not None:
                fixed, moving = _fixed(*source.parts), _moving(source.parameters)
                graph.kept(source.parameters)[self] = Kept(prepared, batch, fixed, moving, source.watched)
            return
        prepared.expected = self._expected = self._served()
        prepared.joined = self._joined
        if kept is None or kept.prepared.source is not source:
            fixed, storages = _fixed(*source.parts), tuple(t.detach() for t in source.watched)
            gathered_from = shards((*source.parameters, *source.watched))
        else:
            fixed, storages, prepared.plans, gathered_from = kept.fixed, kept.storages, kept.prepared.plans, kept.shards
        moving, written = _moving(source.parameters), writes(gathered_from)
        self._kept = Kept(prepared, batch, fixed, moving, storages, gathered_from, written)

    def pair(self, prepared: Prepared, parameters: Parameters) -> tuple[StandIns, list[Rows] | None]:
        """M and F in the graph, and where their one consumer may leave `Rows`."""
        batch, own = prepared.batch, prepared.source.parameters
        # Others of the same numbers (functional_call, a state_dict assigned) are to get their own gradients.
        same = all(map(is_, parameters, own))
        if same and isinstance(batch, Batch) and (found := batch.attached(prepared)) is not None:
            return found, None
        sink: list[Rows] = []
        return attach([prepared], [parameters], sink)[0], sink
