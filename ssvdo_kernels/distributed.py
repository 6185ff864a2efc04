"""Processes that hold the same model: factorisation shared out among them, files written by one, and
who watches gradients."""

from __future__ import annotations

import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .factorize import Factors
from .ops.base import Base


class Task(Protocol):
    """What can be factorised."""

    @property
    def name(self) -> str: ...
    @property
    def base(self) -> Base: ...
    def factorize(self, cache_dir: str | os.PathLike[str] | None) -> Factors: ...


def factorize_together(
    plans: Sequence[Task], cache_dir: str | os.PathLike[str] | None, group: dist.ProcessGroup
) -> list[Factors]:
    """The factors of every plan: process r of n makes those of plans r, r + n, ... and sends them to the others.

    Raises:
        RuntimeError: the processes do not hold the same layers, or one of them failed; in every process.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    names: list[list[str] | None] = [None] * size
    dist.all_gather_object(names, [f"{p.name} {tuple(p.base.tensors[0].shape)}" for p in plans], group=group)
    if any(other != names[0] for other in names):
        raise RuntimeError("the processes of process_group do not hold the same layers, so they cannot share the work")
    own: dict[int, Factors] = {}
    failure = ""
    try:
        mine = range(rank, len(plans), size)
        for i in tqdm(mine, desc="factorising", unit="layer", delay=2, leave=False, disable=rank > 0):
            own[i] = plans[i].factorize(cache_dir)
    except Exception as error:
        failure = f"process {rank}: {type(error).__name__}: {error}"
    failures: list[str | None] = [None] * size
    dist.all_gather_object(failures, failure, group=group)
    if any(failures):
        raise RuntimeError("; ".join(f for f in failures if f))
    return [_sent(own.get(i), i % size, plan.base.device, group) for i, plan in enumerate(plans)]


def _sent(factors: Factors | None, source: int, device: torch.device, group: dist.ProcessGroup) -> Factors:
    source = dist.get_global_rank(group, source)
    sizes = [None if factors is None else {n: (t.shape, t.dtype) for n, t in factors.tensors().items()}]
    dist.broadcast_object_list(sizes, src=source, group=group)
    assert sizes[0] is not None
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in sizes[0].items():
        tensor = torch.empty(shape, dtype=dtype, device=device) if factors is None else getattr(factors, name)
        if tensor.numel():
            dist.broadcast(tensor, src=source, group=group)
        tensors[name] = tensor
    return Factors.of(tensors)


_SAVES: Counter[str] = Counter()  # by path: how often this process has come to `first_writes`


def group_of_replicas(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes of the DistributedDataParallel that is the model or stands in it; None: there is none."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    wrappers = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    return next((wrapper.process_group for wrapper in wrappers), None)


def first_writes(write: Callable[[], None], path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Calls `write` on the first rank of the group; the others wait for it. No barrier: the first waits for nobody.

    Raises:
        RuntimeError: on ranks that wait: the first has failed, or has not come within the store's timeout.
    """
    first = dist.get_global_rank(dist.group.WORLD if group is None else group, 0)  # type: ignore[arg-type]
    _SAVES[str(path)] += 1
    key, store = f"ssvdo_kernels/{first}/{path}/{_SAVES[str(path)]}", dist.distributed_c10d._get_default_store()
    if dist.get_rank() != first:
        if failure := store.get(key).decode():
            raise RuntimeError(f"rank {first} has not written {path}: {failure}")
        return
    try:
        write()
    except BaseException as error:
        store.set(key, f"{type(error).__name__}: {error}")
        raise
    store.set(key, "")


# -- who watches gradients ---------------------------------------------------------------------------------------------
LAYERS = 8
"""Of a node in DDP: 8 of 1024 x 4096 have 11 MB of gradients, less than what DDP sends at once (25 MiB)."""


def hooked() -> bool:
    """Whether hooks of work among processes (DDP, FSDP, ZeRO) may watch the parameters."""
    return dist.is_available() and dist.is_initialized()


def ddp() -> Any:
    """The DDP whose forward this is; None elsewhere."""
    return DistributedDataParallel._get_active_ddp_module() if hooked() else None  # type: ignore[no-untyped-call]


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
