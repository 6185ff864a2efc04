"""Processes that hold the same model: factorisation shared out among them, files written by one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .factorize import Factors
from .ops.base import Base
from .watchers import hooked


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
    if not hooked():
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
