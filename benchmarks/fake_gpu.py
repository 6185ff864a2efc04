"""A GPU that is not there: everything that Python does for one runs, on CPU tensors, and every launch is counted.

Triton compiles for sm_90 and its launches do nothing; those of the CUDA kernels of preparation are left out likewise.
So are the looks at parameters' values that only a CPU affords. Results are meaningless numbers. What the driver itself
takes for a launch, and what torch does for a CUDA tensor more than for one of a CPU, is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssvdo_kernels import cache
from ssvdo_kernels.ops import device, dispatch, preparation, products, sides

NAME = "NVIDIA H100 80GB HBM3"
STARTS = {"device_outer_forward": 3, "device_outer_backward": 1, "device_inner_forward": 1, "device_inner_backward": 2}
"""Kernels that a call of the compiled core starts."""
VIEWS = frozenset((
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
))  # fmt: skip
"""Operations that start nothing."""


class _Operations(TorchDispatchMode):
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


class FakeGPU:
    """Counts what is started while `counting`."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()  # launches of our kernels since ever

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Launches inside, by name: our kernels', and torch's operations but views and allocations."""
        found: Counter[str] = Counter()
        before = self.own.copy()
        with _Operations(found):
            yield found
        found.update(self.own - before)

    def core(self, real: Any) -> Any:
        """The compiled core whose CUDA calls do nothing."""

        def call(name: str, times: int) -> Any:
            return lambda *_, **__: self.own.update({name: times})

        sizes = {name: getattr(real, name, 36) for name in ("max_layers", "max_blocks")}
        work = getattr(real, "device_outer_work", lambda **_: 1)
        calls = {name: call(name, times) for name, times in STARTS.items()}
        return SimpleNamespace(**sizes, **calls, device_outer_work=work)

    def triton_driver(self) -> Any:
        """Triton's driver for it."""
        from triton.backends.compiler import GPUTarget

        own = self.own

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name = source.fn.__name__

            def __call__(self, *_: Any) -> None:
                own[self.name] += 1

        utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 100, 0, 1024), unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132})
        return SimpleNamespace(
            launcher_cls=Launcher, utils=utils, get_current_device=lambda: 0, get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32), get_device_interface=lambda: torch.cuda,
            is_active=lambda: True)


@lru_cache
def _rows(*shape: int) -> Tensor:
    return torch.zeros(shape)


def float32_sums(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """a^T b (+ total) in float32, which a GPU's library makes in one launch."""
    rows = _rows(a.shape[1], 1), _rows(1, b.shape[1])
    return torch.mm(*rows) if total is None else total.addmm_(*rows)


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Adapted layers on CPU tensors with ``backend="triton"`` are served as on an H100, until it is left.

    Raises:
        RuntimeError: Triton's kernels are interpreted in this process, or there is no Triton.
    """
    if missing := dispatch.without_triton():
        raise RuntimeError(missing)
    from triton.runtime import driver

    from ssvdo_kernels.triton import kernels, tuning

    if kernels.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set; without it, kernels are compiled")
    gpu = FakeGPU()
    with ExitStack() as stack:

        def patch(module: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        stack.callback(torch.set_flush_denormal, False)
        torch.set_flush_denormal(True)  # results are whatever lay in memory, and products of denormal numbers are slow
        stack.callback(setattr, driver, "_active", driver._active)
        driver.set_active(gpu.triton_driver())
        patch(dispatch, "_obstacle", lambda *_: "")
        patch(preparation, "preparation", lambda *_: ("cuda", NAME))
        patch(preparation, "Numbers", lambda _: None)
        patch(cache, "_on_cpu", lambda _: False)
        patch(device, "_C", gpu.core(device._C))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))  # 20 us for a product that takes nothing
        patch(torch.cuda, "get_device_name", lambda *_: NAME)
        for module in (preparation, products, sides):
            patch(module, "over_tokens", float32_sums)
        patch(products, "sums_dtype", lambda _: torch.float32)
        patch(tuning, "enabled", lambda: True)
        patch(tuning, "_do_bench", lambda _: 1.0)
        patch(tuning, "_save", lambda _: None)
        patch(tuning, "_memory", {})
        yield gpu
