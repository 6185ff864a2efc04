"""Layers of one shape that are prepared together: the first forward after a step prepares every one that needs it.

Each layer still decides by itself, by its own parameters, whether what was prepared is up to date; a group only does
ahead of time, in one batch, what its members would do one by one. Nothing is shared but work, so a member that is
skipped, frozen, copied, moved, tied or compiled is right with or without its group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .cache import Batch, Cache
from .ops.engines import prepare
from .ops.preparation import Prepared, Source
from .watchers import ddp, hooked


class Member(NamedTuple):
    """A layer: its cache, its shape and configuration, and what it would be prepared from now (None: it is gone), given
    whether its frozen tensors are taken to be as they were."""

    cache: Cache
    kind: Hashable
    source: Callable[[bool], Source | None]


_OWN = (nn.Parameter, Tensor)
Units = Callable[[], Mapping[Cache, int]]
"""Numbers for the units of FSDP in which layers are, as it has them now."""


class Group:
    """Members by weak reference."""

    def __init__(self, members: Iterable[Member], units: Units) -> None:
        self._members = [(weakref.ref(m.cache), m.source) for m in members]
        self._look, self._units = units, units()

    def __len__(self) -> int:
        return len(self._members)

    def prepare(self, cache: Cache, source: Source) -> Prepared | None:
        """Prepares the layer of `cache` and all members that fit and are out of date; None where that brings nothing.

        A member whose pivot fails is left out: its own forward will say so.
        """
        if not source.base.held:
            return None  # all of a batch would be dense at once
        if source.engine == "reference" or not _alike(source, source):
            return None  # a replica, or sharded
        todo, as_before = [(cache, source)], cache.has(source)  # who has copied into one layer, has into all
        for reference, of in self._members:
            other = reference()
            if other is None or other is cache:
                continue
            theirs = of(as_before)
            if theirs is not None and _alike(theirs, source) and other.wants(theirs):
                todo.append((other, theirs))
        if len(todo) < 2:
            return None
        found = prepare([theirs for _, theirs in todo])
        good = [(c, made) for (c, _), made in zip(todo, found, strict=True) if made is not None]
        batch = Batch([made for _, made in good], self._units_of([c for c, _ in good]))
        for c, made in good:
            c.keep(made, batch)
        return found[0]

    def _units_of(self, caches: Sequence[Cache]) -> Sequence[int]:
        if not hooked() or ddp() is not None:
            return ()
        self._units = self._units or self._look()  # what is sharded stays so
        return [self._units.get(cache, 0) for cache in caches]


def group_alike(members: Iterable[Member], units: Units = dict) -> None:
    """Puts layers of one shape and configuration into one group; a layer alone has none."""
    alike: dict[Hashable, list[Member]] = {}
    for member in members:
        alike.setdefault(member.kind, []).append(member)
    for found in alike.values():
        group = Group(found, units) if len(found) > 1 else None
        for member in found:
            member.cache.group = group


def _alike(a: Source, b: Source) -> bool:
    """Whether they make one batch: with parameters as a layer makes them, not a replica's, nor FSDP's shards and empty
    storages; nothing that is there for one layer's forward alone."""
    if a.kind != b.kind or not a.kept:
        return False
    for p, q in zip(a.parameters, b.parameters, strict=True):
        if p is not None and q is not None and (type(p) not in _OWN or p.shape != q.shape):
            return False
    return not hooked() or all(p is None or p.untyped_storage().nbytes() > 0 for p in a.parameters)
