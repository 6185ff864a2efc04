"""Interleaved timing and memory of one training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range in milliseconds, and the median over rounds of the ratio to the floor."""

    median_ms: float
    iqr_ms: float
    ratio: float


def synchronize(device: torch.device) -> None:
    """Waits for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, floor: str, device: torch.device | None = None
) -> dict[str, Timing]:
    """Times every step once a round, in an order that rotates, after one untimed round; ratios are taken per round.

    A machine's slow phases then meet all methods alike, and the median drops those that meet one alone.
    """
    device = torch.device("cpu") if device is None else device
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    result = {}
    for name in names:
        low, _, high = statistics.quantiles(seconds[name], n=4) if rounds > 1 else (0.0, 0.0, 0.0)
        ratios = [a / b for a, b in zip(seconds[name], seconds[floor], strict=True)]
        result[name] = Timing(1e3 * statistics.median(seconds[name]), 1e3 * (high - low), statistics.median(ratios))
    return result


def launches(step: Callable[[], object]) -> int:
    """Kernels and copies that `step` starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())


def peak_extra_bytes(step: Callable[[], object], device: torch.device | None = None) -> int:
    """The most memory that `step` holds beyond what was allocated before it, in bytes.

    CPU: from the allocator events of torch.profiler, which sees every tensor, those inside C++ functions included.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
