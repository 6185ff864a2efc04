"""Which configuration a launch takes: fixed, remembered, or timed once.

``SSVDO_AUTOTUNE=0`` (false, off, no, or empty) always takes the first of `configs.CONFIGS`. Otherwise a kernel that has
several is timed at its first use at a new size (tokens rounded up to a power of two): a few milliseconds a
configuration, after compilation. A launch asks once a size (launch.py), so nothing here is in the way of a step.
Results are kept in ``$SSVDO_CACHE`` (default ``~/.cache/ssvdo_kernels``; without a home, in the folder for temporary
files), one JSON file a device and Triton version.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from ..files import write_atomically
from .configs import Config, candidates

_memory: dict[str, int] = {}
_loaded: set[Path] = set()


def enabled() -> bool:
    """Whether timings decide: on a GPU, unless SSVDO_AUTOTUNE=0, or deterministic algorithms were asked for."""
    off = os.environ.get("SSVDO_AUTOTUNE", "1").lower() in ("0", "false", "off", "no", "")
    return not off and not torch.are_deterministic_algorithms_enabled() and torch.cuda.is_available()


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def cache_file(device: str) -> Path:
    """Where timings of a device are kept."""
    import triton

    given = os.environ.get("SSVDO_CACHE") or "~/.cache/ssvdo_kernels"
    try:
        folder = Path(given).expanduser()
    except RuntimeError:  # nobody knows a home
        folder = Path(tempfile.gettempdir()) / "ssvdo_kernels"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"autotune-{slug}-triton-{triton.__version__}.json"


def key_of(kernel: str, precision: str, tokens: int, sizes: Sequence[int]) -> str:
    """Tokens by power of two, the other sizes as they are."""
    return f"{kernel}/{precision}/{1 << max(0, tokens - 1).bit_length()}/{'x'.join(map(str, sizes))}"


def choose(
    kernel: str,
    precision: str,
    tokens: int,
    sizes: Sequence[int],
    launch: Callable[[Config], None],
    *,
    capability: str = "9.0",
    device: str = "",
    time: Callable[[Callable[[], None]], float] | None = None,
) -> tuple[Config, ...]:
    """The configurations for a launch, the best first: from memory, from disk or by timing `launch` with each.

    While a graph is captured nothing is timed, but what is remembered is taken, so that a capture runs what was
    compiled before it. Under ``torch.use_deterministic_algorithms`` the order is always that of `configs.CONFIGS`.

    Args:
        launch: runs the kernel with a configuration; results of timed launches are overwritten by the caller's own.
        capability: the device's. device: its name; "" asks torch.
        time: milliseconds of a call; None takes triton.testing.do_bench.
    """
    found = candidates(kernel, precision, capability)
    if len(found) == 1 or (time is None and not enabled()):
        return found
    path = cache_file(device or torch.cuda.get_device_name())
    key = key_of(kernel, precision, tokens, sizes)
    _load(path)
    best = _memory.get(f"{path}:{key}", -1)
    if not 0 <= best < len(found):
        if time is None and capturing():
            return found
        measured = _measure(found, launch, _do_bench if time is None else time)
        if not measured:
            return found
        best = min(range(len(found)), key=measured.__getitem__)
        _memory[f"{path}:{key}"] = best
        _save(path)
    return found[best], *found[:best], *found[best + 1 :]


def _measure(
    found: Sequence[Config], launch: Callable[[Config], None], time: Callable[[Callable[[], None]], float]
) -> list[float]:
    """Milliseconds of each, infinite where the device has no room for it; [] where there is no memory to time in."""
    measured = []
    for config in found:
        try:
            measured.append(time(lambda config=config: launch(config)))  # type: ignore[misc]
        except OutOfResources:
            measured.append(math.inf)
        except torch.OutOfMemoryError:
            return []
    return measured


def _do_bench(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=2, rep=8, return_mode="median"))


def _load(path: Path) -> None:
    if path not in _loaded:
        _loaded.add(path)
        for key, index in _read(path).items():
            _memory.setdefault(f"{path}:{key}", index)


def _read(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    try:
        return {str(key): int(index) for key, index in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError, OSError) as error:
        warnings.warn(f"{path} cannot be read ({error}); its kernels are timed again", stacklevel=2)
        return {}


def _save(path: Path) -> None:
    """Writes what is remembered, and what other processes have written since."""
    prefix = f"{path}:"
    own = {k.removeprefix(prefix): v for k, v in _memory.items() if k.startswith(prefix)}
    try:
        write_atomically({path: json.dumps(dict(sorted((_read(path) | own).items())), indent=1).encode()})
    except OSError as error:
        warnings.warn(f"autotuning results cannot be kept in {path} ({error})", stacklevel=2)
