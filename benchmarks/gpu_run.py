"""Everything that a machine with a GPU is wanted for, in calls of a few minutes: `make gpu`, again and again.

    python -m benchmarks.gpu_run gpu|gpu-layers|gpu-models|gpu-soak [--minutes 8.5] [--out DIR] [--archive FILE] [--dry]

Every step is run, whatever failed before it, each in a process of its own with a time limit; what a step says goes to
DIR/log.txt, its outcome to DIR/steps.jsonl as soon as it is known, results to DIR. When the minutes are over the rest
is left; the same command, on this machine or on another with DIR, goes on with what was cut or has not begun, as long
as the code is the same. `--archive` keeps DIR in one file as well. `--dry`: tiny sizes on the CPU.

Exit code: 1 where a step failed, else 75 where something is left to do, else 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .record import ROOT, TIME_IS_UP, append, code, lines
from .report import as_markdown

PARTS = ("gpu", "gpu-layers", "gpu-models", "gpu-soak")
SETTLED = ("ok", "failed", "too long")  # not run again
ENOUGH = 15.0  # seconds without which no step begins
REFRESH = 15.0  # seconds after which the archive is made anew


@dataclass(frozen=True)
class Step:
    """A command and the most seconds that it gets.

    minutes: whether it takes ``--minutes``, stops by itself in time and goes on when it is started again. always: it
    is run in every call, as what it makes may not be there.
    """

    name: str
    command: Sequence[str]
    seconds: float
    minutes: bool = False
    always: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this interpreter."""
    return sys.executable, *arguments


def plan(part: str, out: Path, dry: bool = False) -> list[Step]:
    """The steps of a part: tests first, then what is measured, then what is slow."""
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "gpu").glob("test_*.py"))
    device = ("--device", "cpu" if dry else "cuda")
    where = ("--out", str(out))
    layers = ("benchmarks", *device, *where, "--dtype", "float32" if dry else "bfloat16")
    tiny = ("--d", "16", "--tokens", "8", "--rank", "2", "--p", "0.5", "--peers", "LoRA") if dry else ()

    def measure(name: str, *arguments: str) -> Step:
        return Step(name, python("-m", *arguments), 1800.0, minutes=True)

    def sanitize(tool: str) -> Step:
        tests = python("-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-k", "every")
        return Step(tool, ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
                           *tests), 120.0,
                    environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SSVDO_AUTOTUNE": "0"})  # fmt: skip

    build = Step("build", python("setup.py", "-q", "build_ext", "--inplace"), 300.0, always=True,
                 environment={"SSVDO_BUILD": "1", "SSVDO_CUDA_ARCHS": architecture()})  # fmt: skip
    begin = [*([] if dry else [build]), Step("info", python("-m", "ssvdo_kernels.info"), 60.0)]
    pytest = ("-m", "pytest", "-q", "-m", "gpu", *(("--collect-only",) if dry else ()))
    if part == "gpu":
        small = ("--d", "16", "--layers", "2", "--rank", "2", "--rounds", "1") if dry else ()
        return [*begin, *(Step(Path(file).stem, python(*pytest, file), 240.0) for file in files),
                measure("preparation", "benchmarks.bench_preparation", *device, *where, *small),
                measure("kernels", "benchmarks.bench_kernels", *where), measure("layers", *layers, "--quick", *tiny),
                sanitize("memcheck"), sanitize("racecheck")]  # fmt: skip
    if part == "gpu-layers":
        return [*begin, measure("all layers", *layers, *tiny)]
    names = ("owsm-0.1b",) if dry else ("owsm-0.1b", "owsm-1b", "whisper-large", "owsm-2b")
    if part == "gpu-models":
        small = ("--dtype", "float32", "--batch", "1", "--frames", "4", "--rounds", "0",
                 "--methods", "LoRA") if dry else ()  # fmt: skip
        return [*begin, measure("models", "benchmarks.bench_model", *names, *device, *where, *small)]
    small = ("--dtype", "float32", "--batch", "1") if dry else ()
    return [*begin, sanitize("initcheck"), sanitize("synccheck"),
            measure("soak", "benchmarks.soak", *device, *where, *small)]  # fmt: skip


def architecture() -> str:
    """What the CUDA code is built for: as asked, else the GPU that is there."""
    asked = os.environ.get("SSVDO_CUDA_ARCHS", "")
    if asked not in ("", "none"):
        return asked
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def execute(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str], beat: Any) -> int | None:
    """The exit code (127: there is no such command), or None where it took longer and was ended. beat: called while
    it runs."""
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment})
        except FileNotFoundError as error:
            file.write(f"{error}\n".encode())
            return 127
        try:
            return _wait(process, seconds, beat)
        finally:
            if process.poll() is None:
                _end(process)


def _wait(process: subprocess.Popen[bytes], seconds: float, beat: Any) -> int | None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            return process.wait(min(left, REFRESH))
        except subprocess.TimeoutExpired:
            beat()
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it has started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run(steps: Sequence[Step], out: Path, minutes: float, archive: Path | None = None) -> int:
    """Runs what is to be run, and says what was. Returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    deadline, same = time.monotonic() + 60 * minutes, code()
    done = {one["step"]: one for one in lines(out / "steps.jsonl") if one["code"] == same}
    log = out / "log.txt"

    def keep() -> None:
        pack(out, archive)

    try:
        for step in steps:
            if done.get(step.name, {}).get("result") in SETTLED and not step.always:
                continue
            left = deadline - time.monotonic()
            if left < ENOUGH:
                break
            seconds = min(step.seconds, left)
            command = list(step.command)
            if step.minutes:
                command += ["--minutes", f"{max(0.0, seconds - ENOUGH) / 60:.3f}"]
            with log.open("a") as file:
                file.write(f"\n===== {step.name}: {' '.join(command)}\n")
            start, at = time.monotonic(), log.stat().st_size
            status = execute(command, seconds, log, step.environment, keep)
            said = log.read_bytes()[at:].decode(errors="replace")
            done[step.name] = {
                "step": step.name, "result": outcome(status, seconds < step.seconds), "code": same, "exit": status,
                "seconds": round(time.monotonic() - start, 1), "said": said.splitlines()[-15:]}
            append(out / "steps.jsonl", done[step.name])
            print(f"{step.name}: {done[step.name]['result']}, {done[step.name]['seconds']} s", flush=True)
            keep()
    finally:
        text = summary(steps, done)
        (out / "summary.md").write_text(text, encoding="utf-8")
        print(text)
        keep()
    results = [done.get(step.name, {}).get("result") for step in steps]
    if any(r in ("failed", "too long") for r in results):
        return 1
    return 0 if all(r == "ok" for r in results) else TIME_IS_UP


def outcome(status: int | None, shortened: bool) -> str:
    """What became of a step. shortened: it had less than its own time."""
    if status is None:
        return "cut" if shortened else "too long"
    return {0: "ok", TIME_IS_UP: "cut"}.get(status, "failed")


def summary(steps: Sequence[Step], done: Mapping[str, Any]) -> str:
    """A table of every step, and the last lines of those that failed."""
    rows, ends = [], []
    for step in steps:
        one = done.get(step.name, {"result": "not run"})
        rows.append([step.name, one["result"], str(one.get("exit", "-")), str(one.get("seconds", "-"))])
        if one["result"] in ("failed", "too long"):
            ends += ["", f"{step.name} ended with:", "", *(f"    {line}" for line in one["said"])]
    return "\n".join([*as_markdown(["step", "result", "exit code", "seconds"], rows), *ends]) + "\n"


def pack(out: Path, archive: Path | None) -> None:
    """All of `out` in one file, exchanged whole."""
    if archive is not None:
        archive.parent.mkdir(parents=True, exist_ok=True)
        part = archive.parent / f".{archive.name}.part"
        with tarfile.open(part, "w:gz") as file:
            file.add(out, out.name)
        part.replace(archive)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-run"))
    parser.add_argument("--archive", type=Path, help="a .tar.gz, renewed as the run goes on")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TIME_IS_UP))  # so that what runs is ended and the summary written
    out = options.out.resolve()
    return run(plan(options.part, out, options.dry), out, options.minutes, options.archive)


if __name__ == "__main__":
    sys.exit(main())
