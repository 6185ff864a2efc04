"""The one place that decides which backend serves an operation, and says why."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache

import torch

from ..traffic import tf32
from . import host
from .device import architectures, obstacle

_HALF = (torch.float16, torch.bfloat16)


TRITON = (3, 5)
"""The oldest Triton on which every kernel has been checked; 3.4 has no float64 product."""


@lru_cache(maxsize=1)
def without_triton() -> str:
    """Why Triton is no use here; "" where it is."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        import triton
    except (ImportError, OSError, AttributeError) as error:
        return f"the package triton is there but does not load: {error}"
    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON
    return f"Triton {triton.__version__} is older than {'.'.join(map(str, TRITON))}" if old else ""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: as Triton reads it, when they are loaded."""
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "yes", "on", "y"):
        return False
    kernels = sys.modules.get("ssvdo_kernels.triton.kernels")
    return kernels is None or bool(kernels.INTERPRETED)


def token_path(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """("reference" or "triton", the reason) for the per-token work.

    Args:
        backend: auto, reference or triton (the config's).
        device, dtype: of the tokens.

    Raises:
        RuntimeError: backend is "triton" where its kernels cannot run; the message says why.
    """
    if backend == "reference":
        return "reference", "asked for by backend='reference'"
    obstacle = _obstacle(device, dtype)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(
                f"backend='triton' cannot serve {dtype} on {device}: {obstacle}; allowed here: 'reference', 'auto'")
        return "triton", "asked for by backend='triton'"
    if obstacle:
        return "reference", obstacle
    if device.type == "cpu":
        return "reference", "on the CPU, Triton only interprets; backend='triton' asks for that"
    if dtype in _HALF or (dtype == torch.float32 and tf32()):
        return "triton", "fused kernels, tensor cores"
    return "reference", f"{dtype} without tf32 has no tensor-core kernels; the vendor's products are the better engine"


def token_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The first of `token_path`, in a forward: what it depends on is looked at once."""
    if backend == "reference" or (backend == "auto" and device.type == "cpu"):
        return "reference"
    return _token_backend(backend, device, dtype, dtype == torch.float32 and tf32())


@lru_cache(maxsize=64)
def _token_backend(backend: str, device: torch.device, dtype: torch.dtype, tf32: bool) -> str:
    return token_path(backend, device, dtype)[0]


def preparation(backend: str, device: torch.device) -> tuple[str, str]:
    """("reference", "host" or "cuda", the reason) for what depends on parameters alone. backend: the config's."""
    if backend == "reference":
        return "reference", "asked for by backend='reference'"
    if device.type != "cpu":
        missing = obstacle(device)
        return ("reference", missing) if missing else ("cuda", f"kernels for sm_{', '.join(architectures().split())}")
    return "host" if host.available() else "reference", host.description()


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why Triton's kernels cannot run at all; "" where they can."""
    if device.type == "cpu" and not interpreting():
        return "the device is the CPU (TRITON_INTERPRET=1, set before the first import, would interpret)"
    if missing := without_triton():
        return missing
    if dtype not in (*_HALF, torch.float32, torch.float64):
        return f"there are no kernels for {dtype}"
    if device.type == "cpu":
        return "Triton's interpreter multiplies bfloat16 wrongly" if dtype == torch.bfloat16 else ""
    if device.type != "cuda":
        return f"there are no kernels for {device.type} devices"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs"
    capability = _capability(device.index)
    return "" if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


@lru_cache(maxsize=16)
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
