"""`python -m ssvdo_kernels.info`: versions, devices, and which backend serves which operation, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__
from .console import print_anything, show
from .ops.device import architectures, not_built
from .ops.dispatch import preparation, token_path
from .ops.host import description
from .traffic import machine, tf32

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> dict[str, str]:
    """What `python -m ssvdo_kernels.info` prints, as name -> text."""
    cuda, archs = torch.cuda.is_available(), ", ".join(architectures().split())
    lines = {
        "ssvdo_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "triton": _version("triton"), "cpu threads": str(torch.get_num_threads()),
        "cuda device": torch.cuda.get_device_name() if cuda else "none",
        "compiled core": description().removeprefix("compiled core, "),
        "cuda kernels": f"built for sm_{archs}" if archs else not_built(),
    }
    if cuda:
        peaks = machine(lines["cuda device"], torch.bfloat16)
        lines["planner takes"] = (f"{peaks.bandwidth / 1e12:.2f} TB/s and {peaks.rate / 1e12:.0f} Tflop/s in bfloat16 "
                                  f"(data sheet: {peaks.name})")
    lines["autotuning"] = "off (SSVDO_AUTOTUNE=0)" if os.environ.get("SSVDO_AUTOTUNE") == "0" else "on"
    lines["tf32"] = "on" if tf32() else "off (torch.backends.cuda.matmul.fp32_precision, allow_tf32 before torch 2.9)"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    lines["factorisation"] = "reference: PyTorch's SVD, once a layer"
    lines["preparation"] = ": ".join(preparation("auto", device))
    for dtype in DTYPES:
        backend, reason = token_path("auto", device, dtype)
        lines[f"tokens, {str(dtype).removeprefix('torch.')}"] = f"{backend}: {reason}"
    return lines


if __name__ == "__main__":
    print_anything()
    sys.exit(show("".join(f"{name:16} {text}\n" for name, text in info().items()), "ssvdo_kernels.info"))
