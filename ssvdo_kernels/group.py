"""Layers of one shape that are prepared together: the first forward after a step prepares every one that needs it.

Each layer still decides by itself, by its own parameters, whether what was prepared is up to date; a group only does
ahead of time, in one batch, what its members would do one by one. Nothing is shared but work, so a member that is
skipped, frozen, copied, moved, tied or compiled is right with or without its group.

The gradients of a batch come from one node that runs when its last layer has delivered. Where other code relies on a
layer's gradients being there when the layer's own backward is over (torch.distributed: DDP's reducer, FSDP's
resharding), each layer has a node of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .ops.batch import attach_many, prepare_batch
from .ops.dispatch import preparation

if TYPE_CHECKING:
    from .linear import SSVDOLinear
    from .ops.preparation import Gradients, Prepared


class Batch:
    """What one call prepared: its preparations, the parameters they came from, and their outputs in the graph."""

    def __init__(self, prepared: list[Prepared], parameters: list[Gradients]) -> None:
        self._prepared, self._parameters = prepared, parameters
        self._trained: tuple[bool, ...] = ()
        self._attached: dict[int, tuple[Tensor, Tensor]] = {}

    def attached(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """mixer and columns of one of the batch, from the node that they share."""
        trained = tuple(p.requires_grad for three in self._parameters for p in three)
        if trained != self._trained:
            found = attach_many(self._prepared, self._parameters)
            self._attached = {id(p): pair for p, pair in zip(self._prepared, found, strict=True)}
            self._trained = trained
        return self._attached[id(prepared)]


class Group:
    """Members by weak reference."""

    def __init__(self, layers: Iterable[SSVDOLinear]) -> None:
        self._members = [weakref.ref(layer) for layer in layers]

    def prepare(self, first: SSVDOLinear) -> list[tuple[SSVDOLinear, Prepared, Batch]]:
        """Prepares `first` and all members that fit and are out of date; [] where a batch would bring nothing.

        A member whose pivot fails is left out: its own forward will say so.
        """
        members = [layer for layer in (ref() for ref in self._members) if layer is not None]
        if not any(layer is first for layer in members) or not _plain(first):  # a replica, or sharded
            return []
        if preparation(first.config.backend, first.weight.device)[0] == "reference":
            return []
        todo = [first, *(x for x in members if x is not first and _alike(x, first) and x.out_of_date())]
        if len(todo) < 2:
            return []
        parameters = [layer.adapter_parameters for layer in todo]
        found = prepare_batch(parameters, [layer.factors() for layer in todo],
                              [layer.name for layer in todo], first.shape, first.config)
        good = [(layer, made, p) for layer, made, p in zip(todo, found, parameters, strict=True) if made is not None]
        batch = Batch([made for _, made, _ in good], [p for _, _, p in good])
        return [(layer, made, batch) for layer, made, _ in good]


def group_alike(layers: Iterable[SSVDOLinear]) -> None:
    """Puts layers of one shape and configuration into one group; a layer alone has none."""
    alike: dict[tuple[object, ...], list[SSVDOLinear]] = {}
    for layer in layers:
        alike.setdefault((layer.shape, layer.config), []).append(layer)
    for members in alike.values():
        group = Group(members) if len(members) > 1 else None
        for layer in members:
            layer._group = group


def one_node() -> bool:
    """Whether a batch's gradients may come from one node."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _plain(layer: SSVDOLinear) -> bool:
    return all(type(p) in (nn.Parameter, Tensor) for p in layer.adapter_parameters)


def _alike(a: SSVDOLinear, b: SSVDOLinear) -> bool:
    return (_plain(a) and a.shape == b.shape and a.config == b.config and a.weight.device == b.weight.device
            and a.null_basis.shape == b.null_basis.shape and a.weight.dtype == b.weight.dtype
            and a.outer.dtype == b.outer.dtype)  # fmt: skip
