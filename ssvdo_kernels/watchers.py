"""Who watches parameters and their gradients in work among processes, and how many layers may share a node for that."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LAYERS = 8
"""Of a node in DDP: 8 of 1024 x 4096 have 11 MB of gradients, less than what DDP sends at once (25 MiB)."""


_AVAILABLE = dist.is_available()


def hooked() -> bool:
    """Whether hooks of work among processes (DDP, FSDP, ZeRO) may watch the parameters, or gather weights anew."""
    return _AVAILABLE and dist.is_initialized()


def ddp() -> Any:
    """The DDP whose forward this is; None elsewhere."""
    return DistributedDataParallel._active_ddp_module


def units(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """(module, its unit's number) of every module that FSDP gathers and shards with others: those below the same
    nearest module that is sharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(getattr(fsdp, n) for n in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, n))
    todo = [(model, 0)] if kinds else []
    while todo:
        module, unit = todo.pop()
        unit = id(module) if isinstance(module, kinds) else unit
        if unit:
            yield module, unit
        todo += [(child, unit) for child in module.children()]


def layers_a_node() -> int:
    """How many layers' gradients may come from one node: all in a single process, some in a forward of DDP, else 1 (or
    those of one unit of FSDP).

    A node of several brings nothing to layers that nothing used, though it reaches their parameters; DDP takes that as
    it is meant. With static_graph it counts on them each time, and they may be in one batch and not in the next. FSDP
    and ZeRO want a unit's gradients when the unit's own backward is over; so does DDP where a reentrant checkpoint's is
    a backward of its own.
    """
    if not hooked():
        return sys.maxsize
    wrapper = ddp()
    return 1 if wrapper is None or wrapper.static_graph else LAYERS


def all_used() -> weakref.ref[DistributedDataParallel] | None:
    """The DDP whose forward this is, where it waits for a gradient of every parameter."""
    wrapper = ddp()
    if wrapper is None or wrapper.find_unused_parameters or not wrapper.require_backward_grad_sync:
        return None
    return weakref.ref(wrapper)


def refuse_unused(wrapper: Any, unused: Iterable[tuple[str, Sequence[Tensor | None]]]) -> None:
    """RuntimeError where a layer (name, parameters) without gradients is one of which `wrapper` waits for some: from a
    node that others share it would take zeros."""
    own: set[int] = set()
    for name, parameters in unused:
        own = own or {id(p) for n, p in wrapper.module.named_parameters() if n not in wrapper.parameters_to_ignore}
        if any(p is not None and p.requires_grad and id(p) in own for p in parameters):
            raise RuntimeError(f"{name}: no gradient came to this layer, and DistributedDataParallel waits for one; "
                               "allowed: DistributedDataParallel(find_unused_parameters=True)")  # fmt: skip


def refuse_counting(name: str) -> None:
    """RuntimeError in a forward of a DDP that counts which parameters a graph reaches: with gradients that are summed
    elsewhere at first it reaches none."""
    wrapper = ddp()
    if wrapper is None or not wrapper.require_backward_grad_sync:
        return
    for option in ("find_unused_parameters", "static_graph"):
        if getattr(wrapper, option):
            raise RuntimeError(f"{name}: gradient_accumulation in DistributedDataParallel({option}=True), which asks a "
                               f"forward's graph for the parameters that it reaches; allowed: {option}=False, or "
                               "no_sync() without gradient_accumulation")  # fmt: skip
