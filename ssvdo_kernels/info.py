"""`python -m ssvdo_kernels.info`: versions, devices, and which backend serves which operation, and why."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__

OPS = ("factorisation", "preparation", "token path")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> dict[str, str]:
    """What `python -m ssvdo_kernels.info` prints, as name -> text."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = {
        "ssvdo_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "triton": _version("triton"), "cpu threads": str(torch.get_num_threads()), "cuda device": device,
    }
    reason = "the only backend of this version; its matrix products are the vendor's (BLAS, cuBLAS)"
    return lines | {op: f"reference (plain PyTorch): {reason}" for op in OPS}


if __name__ == "__main__":
    for name, text in info().items():
        print(f"{name:14} {text}")
