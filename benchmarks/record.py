"""What every results file says of its run, what it is called, and rows that are on disk once they are measured."""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TIME_IS_UP = 75
"""The exit code of a benchmark that has left rows out for want of time: the same command goes on."""


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit(folder: Path | None = None) -> str:
    """The short hash of HEAD, or "unknown" outside a checkout. folder: of the checkout; None: the current one."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def code() -> str:
    """A digest of what is measured and of what measures it, committed or not."""
    seen = hashlib.sha256()
    for folder in ("ssvdo_kernels", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cu", ".cpp"):
                seen.update(path.read_bytes())
    return seen.hexdigest()[:12]


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


def append(path: Path, value: dict[str, Any]) -> None:
    """One line of JSON, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> list[dict[str, Any]]:
    """What `append` wrote; a line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class Rows:
    """The rows of one benchmark, kept in a file of lines as they come; the facts are its first line.

    A run of the same code on the same device goes on where an earlier one in `out` was cut; rows of other code, and a
    line that was cut off, are not taken over. `finish` makes the JSON and the table of what there is.
    """

    def __init__(self, out: Path, device: str, *parts: str, **about: Any) -> None:
        self.facts: dict[str, Any] = {**facts(device), **about, "code": code()}
        self.rows: list[dict[str, Any]] = []
        self.path = stem(out, self.facts, *parts)
        same = self._same(self.facts)
        for path in sorted(out.glob(f"*{self.path.name.removeprefix(self.facts['date'])}.jsonl"), reverse=True):
            first, *rest = lines(path) or [{}]
            if self._same(first) == same:
                self.path, self.facts, self.rows = path.with_suffix(""), first, rest
                break
        self._lines = self.path.parent / (self.path.name + ".jsonl")
        self._lines.unlink(missing_ok=True)
        for one in (self.facts, *self.rows):
            append(self._lines, one)

    @staticmethod
    def _same(about: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in about.items() if k not in ("date", "commit")}

    def fill(
        self, keys: Iterable[str], measure: Callable[[str], dict[str, Any]], minutes: float | None = None
    ) -> list[str]:
        """Measures what is missing, and returns what has not begun after so many minutes. An error is a row, too."""
        began = time.monotonic()
        wanted = [key for key in keys if all(row["key"] != key for row in self.rows)]
        while wanted and (minutes is None or time.monotonic() - began < 60 * minutes):
            key = wanted.pop(0)
            start = time.monotonic()
            row = {"key": key, **attempt(lambda key=key: measure(key))}  # type: ignore[misc]
            self.rows.append(row)
            append(self._lines, row)
            took = f"{time.monotonic() - start:.1f} s"
            print(f"{key}: {row.get('error', 'measured')}, {took}", file=sys.stderr, flush=True)
        return wanted

    @property
    def good(self) -> list[dict[str, Any]]:
        """The rows without an error."""
        return [row for row in self.rows if "error" not in row]

    def finish(self, markdown: Callable[[dict[str, Any]], str], missing: list[str]) -> int:
        """Writes and prints the table, and removes the lines if all rows are there. Returns the exit code: 1 where a
        row is an error, TIME_IS_UP where one is missing."""
        results = {**self.facts, "rows": self.good}
        failed = {row["key"]: row["error"] for row in self.rows if "error" in row}
        results |= {"missing": missing} if missing else {}
        results |= {"errors": failed} if failed else {}
        text = markdown(results) + "".join(f"\nnot measured: {key}: {error}\n" for key, error in failed.items())
        text += f"\nnot run for want of time: {', '.join(missing)}\n" if missing else ""
        for suffix, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", text)):
            (self.path.parent / (self.path.name + suffix)).write_text(content, encoding="utf-8")
        if not missing:
            self._lines.unlink()
        print(text, f"results: {self.path}.json and .md", sep="\n")
        return TIME_IS_UP if missing else int(bool(failed))


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or the error that it raises, whose memory is free again."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        said = str(error).strip().splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {said[0][:300]}"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found
