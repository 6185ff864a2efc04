"""`python -m benchmarks [--quick] [--device cuda] [--dtype bfloat16] [--out DIR]`: run, report, write dated results."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .record import facts, stem
from .report import markdown, plot, show


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
        found = json.loads(raw.read_text(encoding="utf-8"))["benchmarks"]
    results: dict[str, Any] = {
        **facts(options.device), "dtype": options.dtype, "quick": options.quick,
        "rows": [b["extra_info"] for b in found if "case" in b["extra_info"]],
    }  # fmt: skip
    path = stem(options.out, results, options.dtype, "quick" if options.quick else "full")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    plot(results, path.with_suffix(".png"))
    show(results)
    print(f"wrote {path}.json, .md and .png")
    return failed


if __name__ == "__main__":
    sys.exit(main())
