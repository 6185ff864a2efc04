"""Interleaved timing and memory of one training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range in milliseconds, and the median over rounds of the ratio to the floor.

    On a GPU these are its own time; host_ms is what the host took to start a step, and `queued` says whether all was
    started before the GPU began, so that its time has no gaps in it.
    """

    median_ms: float
    iqr_ms: float
    ratio: float
    host_ms: float | None = None
    queued: bool | None = None


def synchronize(device: torch.device) -> None:
    """Waits for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Queue:
    """Times steps on a GPU that sleeps while they are started, and then finds them all waiting.

    So a short step is not measured by how fast Python starts it. Between steps a buffer larger than the L2 cache is
    written. Each step has events of its own; a stream takes about a thousand launches before the host must wait.
    """

    STEPS, LAUNCHES, FLUSH, CYCLES = 20, 900, 256 << 20, 2e9  # launches in the stream; bytes; the GPU's in a second

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.empty(self.FLUSH, dtype=torch.uint8, device=device)
        self._known: dict[int, tuple[Step, int, float]] = {}

    def _plan(self, step: Step) -> tuple[int, float]:
        """(how many steps are started at once, seconds that the host takes for one)"""
        if id(step) not in self._known:
            count = max(1, min(self.STEPS, self.LAUNCHES // (launches(step) + 3)))
            synchronize(self.device)
            begin = time.perf_counter()
            step()
            self._known[id(step)] = step, count, time.perf_counter() - begin
            synchronize(self.device)
        return self._known[id(step)][1:]

    def sample(self, step: Step) -> tuple[float, float, bool]:
        """(seconds on the GPU, seconds on the host, whether all was started before the GPU began)"""
        count, guess = self._plan(step)
        for longer in (2, 4, 8):
            synchronize(self.device)
            torch.cuda._sleep(int(self.CYCLES * (1e-3 + longer * count * guess)))
            events, host = [], 0.0
            for _ in range(count):
                self._buffer.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                begin = time.perf_counter()
                step()
                host += time.perf_counter() - begin
                end.record()
                events.append((start, end))
            queued = not events[0][0].query()
            synchronize(self.device)
            if queued:
                break
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3, host / count, queued


def interleave(
    steps: Mapping[str, Step], rounds: int, floor: str, device: torch.device | None = None, whole: bool = False
) -> dict[str, Timing]:
    """Times every step once a round, in an order that rotates, after one untimed round; ratios are taken per round.

    A machine's slow phases then meet all methods alike, and the median drops those that meet one alone.
    One thread on a CPU is timed by what the process had of it, which others on the machine disturb less.

    whole: steps on a GPU are timed by the clock, one by one, and not through a `Queue`: long ones, that fill it.
    """
    device = torch.device("cpu") if device is None else device
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    queue = Queue(device) if device.type == "cuda" and not whole else None
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    host: dict[str, list[tuple[float, bool]]] = {name: [] for name in names}
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if queue is not None:
                took, own, queued = queue.sample(steps[name])
                host[name] += [(own, queued)] if index else []
            else:
                synchronize(device)
                start = clock()
                steps[name]()
                synchronize(device)
                took = clock() - start
            if index:
                seconds[name].append(took)
    result = {}
    for name in names:
        low, _, high = statistics.quantiles(seconds[name], n=4) if rounds > 1 else (0.0, 0.0, 0.0)
        ratios = [a / b for a, b in zip(seconds[name], seconds[floor], strict=True)]
        started = (1e3 * statistics.median(h for h, _ in host[name]), all(q for _, q in host[name])) if queue else ()
        result[name] = Timing(
            1e3 * statistics.median(seconds[name]), 1e3 * (high - low), statistics.median(ratios), *started)
    return result


def launches(step: Step) -> int:
    """Kernels and copies that `step` starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())


def peak_extra_bytes(step: Step, device: torch.device | None = None) -> int:
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
