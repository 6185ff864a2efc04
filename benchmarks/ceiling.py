"""The ceilings of this machine, measured, and what the traffic model makes of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import torch

from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.planner import launches
from ssvdo_kernels.traffic import Machine, Traffic, product

from .runner import Queue

_queue = lru_cache(maxsize=1)(Queue)


def sample(call: Callable[[], object], device: torch.device, repeats: int = 7) -> tuple[float, float]:
    """(median seconds of a call after one that is not timed, those of the host): on a GPU its own time (`Queue`)."""
    call()
    if device.type == "cuda":
        seconds, host, _ = _queue(device).sample(call)
        return seconds, host
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found), statistics.median(found)


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Bandwidth by copying a buffer that no cache holds (read and written bytes), rate by a large product of random
    numbers, both by PyTorch."""
    gpu = device.type == "cuda"
    source = torch.rand((1 << 30 if gpu else 1 << 28) // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * dtype.itemsize / sample(lambda: target.copy_(source), device)[0]

    def rate(of: torch.dtype) -> float:
        n = 8192 if gpu and of != torch.float64 else 2048
        a, b = (torch.randn(n, n, device=device).to(of) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * n**3 / sample(lambda: torch.mm(a, b, out=out), device)[0]

    return Machine("measured", bandwidth, rate(dtype), rate(torch.float32))


def floors(shape: LayerShape, extra: int, tokens: int, size: int, machine: Machine) -> tuple[float, float]:
    """(seconds of the frozen layer's two products, seconds with the adapter's launches), nothing below these.

    The adapter's is the cheaper of the folded and the merged form, prepared matrices given.
    """
    m, n = shape.out_features, shape.in_features
    frozen = [product(tokens, n, m, size), product(tokens, m, n, size)]

    def total(all_of_it: list[Traffic]) -> float:
        return sum(t.seconds(machine) for t in all_of_it)

    forms = (launches(form, shape, extra, tokens, True, size) for form in ("folded", "merged"))
    return total(frozen), total(frozen) + min(map(total, forms))
