"""What every results file says of its run, and what it is called."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """The short hash of HEAD, or "unknown" outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def facts(device: str) -> dict[str, Any]:
    """Date, device, threads, torch and commit, as every results file begins."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"date": date, "device": device_name(device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "commit": commit()}  # fmt: skip


def stem(out: Path, results: dict[str, Any], *parts: str) -> Path:
    """out/DATE-DEVICE-PARTS, without a suffix; `out` is made. results: with the facts."""
    out.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    return out / "-".join((results["date"], device, *parts))
