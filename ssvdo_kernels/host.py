"""What every layer that hosts adapters offers to the functions over whole models."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial

from torch import nn

from .adapter import Adapter
from .group import Member, group_alike
from .ops.base import DenseBase
from .ops.preparation import Source


class Host(nn.Module):
    """A layer that computes through adapters of its base operator."""

    def base(self) -> DenseBase:
        """The operator that is adapted, as it is now."""
        raise NotImplementedError

    def adapters(self) -> list[Adapter]:
        """The adapters, those in use first."""
        raise NotImplementedError


def hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    """(name, layer) of every host of the model, each layer once."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Host))


def group_hosts(layers: Iterable[Host]) -> None:
    """Lets the adapters of layers of one shape and configuration be prepared together."""
    group_alike(_member(layer, adapter) for layer in layers for adapter in layer.adapters())


def _member(layer: Host, adapter: Adapter) -> Member:
    kind = adapter.shape, adapter.config
    return Member(adapter.cache, kind, partial(_source, weakref.ref(layer), weakref.ref(adapter)))


def _source(layer: weakref.ref[Host], adapter: weakref.ref[Adapter]) -> Source | None:
    host, own = layer(), adapter()
    return None if host is None or own is None else own.source(host.base())
