"""Which configuration a launch takes: fixed, remembered, or timed once.

``SSVDO_AUTOTUNE=0`` (false, off, no, or empty) always takes the first of `configs.CONFIGS`. Otherwise a kernel that has
several is timed at its first use at a new size (tokens rounded up to a power of two): a few milliseconds a
configuration, after compilation.
Results are kept in ``$SSVDO_CACHE`` (default ``~/.cache/ssvdo_kernels``; without a home, in the folder for temporary
files), one JSON file a device and Triton version.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..files import write_atomically
from .configs import CONFIGS, Config

_memory: dict[str, int] = {}
_loaded: set[Path] = set()


def enabled() -> bool:
    """Whether launches may be timed: on a GPU, outside graph capture, unless SSVDO_AUTOTUNE=0."""
    off = os.environ.get("SSVDO_AUTOTUNE", "1").lower() in ("0", "false", "off", "no", "")
    if off or not torch.cuda.is_available():
        return False
    return not torch.cuda.is_current_stream_capturing()


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
    device: str = "",
    time: Callable[[Callable[[], None]], float] | None = None,
) -> Config:
    """The configuration for a launch, from memory, from disk or by timing `launch` with each.

    Args:
        launch: runs the kernel with a configuration; results of timed launches are overwritten by the caller's own.
        device: the device's name; "" asks torch.
        time: milliseconds of a call; None takes triton.testing.do_bench.
    """
    candidates = CONFIGS[kernel][precision]
    if len(candidates) == 1 or (time is None and not enabled()):
        return candidates[0]
    path = cache_file(device or torch.cuda.get_device_name())
    key = key_of(kernel, precision, tokens, sizes)
    _load(path)
    found = _memory.get(f"{path}:{key}", -1)
    if not 0 <= found < len(candidates):
        timer = _do_bench if time is None else time
        measured = [timer(lambda config=config: launch(config)) for config in candidates]  # type: ignore[misc]
        found = min(range(len(candidates)), key=measured.__getitem__)
        _memory[f"{path}:{key}"] = found
        _save(path)
    return candidates[found]


def _do_bench(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=2, rep=8, return_mode="median"))


def _load(path: Path) -> None:
    if path in _loaded:
        return
    _loaded.add(path)
    if not path.exists():
        return
    try:
        read = json.loads(path.read_text())
        entries = {f"{path}:{k}": int(v) for k, v in read.items()}
    except (ValueError, AttributeError, TypeError, OSError) as error:
        warnings.warn(f"{path} cannot be read ({error}); its kernels are timed again", stacklevel=2)
        return
    for name, index in entries.items():
        _memory.setdefault(name, index)


def _save(path: Path) -> None:
    prefix = f"{path}:"
    entries = {k.removeprefix(prefix): v for k, v in sorted(_memory.items()) if k.startswith(prefix)}
    try:
        write_atomically({path: json.dumps(entries, indent=1).encode()})
    except OSError as error:
        warnings.warn(f"autotuning results cannot be kept in {path} ({error})", stacklevel=2)
