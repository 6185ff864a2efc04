"""`python -m benchmarks [--quick] [--device cuda] [--dtype bfloat16] [--out DIR]`: run, report, write dated results."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .report import markdown, plot, show


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as files have it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The short hash of HEAD, or "unknown" outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    """Runs the suite through pytest, so that pytest-benchmark's own options work too (after `--`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", "benchmarks/bench_layer.py", "-v", "--no-header", "--durations=0",
                   f"--benchmark-json={raw}", "--benchmark-columns=median", f"--device={options.device}",
                   f"--dtype={options.dtype}", f"--basetemp={folder}/pytest", *(["--quick"] if options.quick else []),
                   *(a for a in rest if a != "--")]
        failed = subprocess.run(command, check=False).returncode
        if not raw.exists() or not raw.stat().st_size:
            return failed or 1
        found = json.loads(raw.read_text())["benchmarks"]
    name = device_name(options.device)
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    results: dict[str, Any] = {
        "date": date, "device": name, "threads": torch.get_num_threads(), "dtype": options.dtype,
        "torch": torch.__version__, "commit": commit(), "quick": options.quick,
        "rows": [b["extra_info"] for b in found if "case" in b["extra_info"]],
    }  # fmt: skip
    stem = options.out / f"{date}-{slug(name)}-{options.dtype}-{'quick' if options.quick else 'full'}"
    options.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(results))
    plot(results, stem.with_suffix(".png"))
    show(results)
    print(f"wrote {stem}.json, .md and .png")
    return failed


if __name__ == "__main__":
    sys.exit(main())
