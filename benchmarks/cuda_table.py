"""Compiles csrc/cuda for several GPUs, with no GPU, and writes its table into docs/kernels.md.

    python -m benchmarks.cuda_table [--write] [--arch 80 90a 100]

Registers and spills as `nvcc -Xptxas -v` reports them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from .kernel_table import PAGE, put

BEGIN, END = "<!-- cuda: begin -->", "<!-- cuda: end -->"
ARCHS = ["80", "90a", "100"]
TYPES = {"f": "fp32", "d": "fp64"}


@dataclass(frozen=True)
class Compiled:
    """What ptxas said of one kernel. types: of the work."""

    kernel: str
    types: str
    arch: str
    registers: int
    spill_bytes: int


def parse(log: str) -> list[Compiled]:
    """The kernels in ptxas's report, in its order."""
    blocks = re.split(r"Compiling entry function '", log)[1:]
    found = []
    for block in blocks:
        name, arch = re.match(r"(\S+)' for 'sm_(\w+)'", block).groups()  # type: ignore[union-attr]
        kernel = re.search(r"INS0_\d+(\w+?Kernel)I([fd])(?:NS0_\d+Outer(\w+?)E)?E", name)
        registers, spills = re.search(r"Used (\d+) registers", block), re.findall(r"(\d+) bytes spill", block)
        if kernel is None or registers is None or not spills:
            raise ValueError(f"cannot read ptxas's report of {name}")
        label = kernel[1] + (f", {kernel[3].lower()}" if kernel[3] else "")
        found.append(Compiled(label, TYPES[kernel[2]], arch, int(registers[1]), sum(map(int, spills))))
    return found


def compile_for(archs: list[str]) -> list[Compiled]:
    """Raises subprocess.CalledProcessError where nvcc fails or warns."""
    with tempfile.TemporaryDirectory() as folder:
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "--threads", "2", "-Xptxas", "-v", *codes,
                   "-DSSVDO_ARCHITECTURES=", "-c", "csrc/cuda/device.cu", "-o", f"{folder}/device.o"]  # fmt: skip
        done = subprocess.run(command, cwd=PAGE.parents[1], capture_output=True, text=True, check=True)
    return parse(done.stderr + done.stdout)


def markdown(results: list[Compiled]) -> str:
    """One row a kernel and its type; registers a thread, by architecture."""
    archs = sorted({r.arch for r in results}, key=lambda arch: int(arch.rstrip("af")))
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for r in results:
        rows.setdefault((r.kernel, r.types), {})[r.arch] = r.registers
    lines = ["| kernel | work | " + " | ".join(f"sm_{a}" for a in archs) + " |", "|---" * (2 + len(archs)) + "|"]
    for (kernel, types), by in sorted(rows.items()):
        lines.append(f"| {kernel} | {types} | " + " | ".join(str(by[a]) for a in archs) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compiles, prints the table, and with --write puts it into docs/kernels.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    options = parser.parse_args()
    results = compile_for(options.arch)
    spilled = [r for r in results if r.spill_bytes]
    print(markdown(results))
    print("\n".join(f"{r.kernel} {r.types} sm_{r.arch}: {r.spill_bytes} bytes spilled" for r in spilled)
          or f"{len(results)} kernels, no spills")  # fmt: skip
    if options.write and not spilled:
        put(markdown(results), BEGIN, END)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
