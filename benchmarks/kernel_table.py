"""Compiles every Triton kernel at every shipped configuration, with no GPU, and writes docs/kernels.md's table.

    python -m benchmarks.kernel_table [--write] [--arch 80 90] [--default-only]

Registers and spills come from ptxas -v, shared memory from Triton's metadata, tensor-core instructions from the PTX.
"""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssvdo_kernels.triton.configs import (
    CONFIGS,
    FUSED_EXTRA,
    FUSED_WIDTH,
    SHARED,
    TWO,
    WIDE,
    WIDE_EXTRA,
    Config,
    candidates,
)

DTYPES = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "fp32", "fp64": "fp64"}
POINTERS = {"*bf16": "bf16", "*fp16": "fp16", "*fp32": "fp32", "*fp64": "fp64"}
ARCHS = (80, 86, 89, 90, 100, 120)
LIMIT = {arch: SHARED[f"{arch // 10}.{arch % 10}"] for arch in ARCHS}  # KiB a block
TENSOR_CORE = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of one kernel at one configuration."""

    kernel: str
    dtype: str
    arch: int
    blocks: str
    registers: int
    spill_bytes: int
    shared: int
    tensor_core: str


def _constants(kernel: str, precision: str, config: Config) -> dict[str, Any]:
    import triton.language as tl

    constants: dict[str, Any] = {**config.meta, "ACC": tl.float64 if precision == "fp64" else tl.float32,
                                 "PRECISION": "tf32" if precision == "tf32" else "ieee"}
    wide, one = kernel.startswith("wide_"), kernel.removeprefix("wide_")
    if one in ("expand", "contract"):
        constants["WIDTH"] = WIDE if wide else FUSED_WIDTH[precision]
        extra = WIDE_EXTRA if wide else FUSED_EXTRA
        more = {"KEEP": True} if one == "expand" else {"STORE_G": True, "EXTRA": extra}
        constants.update(more)
    if one in ("contract", "add_product"):
        constants.update(HAS_BIAS=True, STORE_Z=not wide)
    return constants


def compile_one(kernel: str, dtype: str, arch: int, config: Config, aligned: bool = True) -> Compiled:
    """Triton to PTX, then ptxas. `aligned`: pointers and row strides are multiples of 16, columns are adjacent."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from ssvdo_kernels.triton import kernels, persistent

    function = getattr(persistent if config.persistent else kernels, kernel.removeprefix("wide_"))
    constants = _constants(kernel, DTYPES[dtype], config)
    pointer = "*fp32" if dtype == "tf32" else f"*{dtype}"
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("x", "V", "R", "Q", "Qz", "P", "u", "z", "a", "g", "bias", "out", "kept", "g_out", "gz_out",
                      "z_out"):
            signature[name] = pointer
        elif name.endswith("_col") and aligned:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if signature[name] != "constexpr" and aligned and name != "T":
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(function, signature, values, attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": config.warps, "num_stages": config.stages})
    ptx = made.asm["ptx"]
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx", encoding="utf-8") as file:
        file.write(ptx)
        file.flush()
        tool = get_ptxas(arch) if inspect.signature(get_ptxas).parameters else get_ptxas()  # Triton 3.5 has one for all
        ptxas = getattr(tool, "path", tool)
        said = subprocess.run([ptxas, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=False)
    registers, spills = re.search(r"Used (\d+) registers", said.stderr), re.search(r"(\d+) bytes spill st", said.stderr)
    if registers is None or spills is None:
        raise RuntimeError(f"{kernel} {dtype} {name}: ptxas failed: {said.stderr[:500]}")
    found = next((word for word in TENSOR_CORE if word in ptx), "-")
    used = int(registers[1]), int(spills[1]), made.metadata.shared
    return Compiled(kernel, dtype, arch, describe(config), *used, found)


def describe(config: Config) -> str:
    """A configuration in one word a number."""
    if config is TWO:
        return "two launches"
    blocks = " ".join(f"{k.removeprefix('BLOCK_').lower()}{v}" for k, v in config.blocks)
    return f"{blocks} w{config.warps} s{config.stages}" + " persistent" * config.persistent


def _attempt(job: tuple[str, str, int, Config]) -> Compiled | str:
    try:
        return compile_one(*job)
    except Exception as error:  # reported as a row that fails
        return f"{job[0]} {job[1]} sm_{job[2]} {job[3].meta}: {type(error).__name__}: {str(error)[:200]}"


def jobs(archs: list[int], dtypes: list[str], default_only: bool = False) -> list[tuple[str, str, int, Config]]:
    """Kernel, dtype, architecture and configuration of everything that is shipped for it."""
    return [(kernel, dtype, arch, config) for kernel in CONFIGS for dtype in dtypes for arch in archs
            for config in candidates(kernel, DTYPES[dtype], f"{arch // 10}.{arch % 10}")[: 1 if default_only else None]
            if config is not TWO]


def complaints(results: list[Compiled | str]) -> list[str]:
    """What is wrong: a failure, a spill, too much shared memory, no tensor core where the precision has one."""
    wrong = [r for r in results if isinstance(r, str)]
    for r in (r for r in results if isinstance(r, Compiled)):
        where = f"{r.kernel} {r.dtype} sm_{r.arch} [{r.blocks}]"
        if r.spill_bytes:
            wrong.append(f"{where}: {r.spill_bytes} bytes spilled")
        if r.shared > 1024 * LIMIT[r.arch]:
            wrong.append(f"{where}: {r.shared} bytes of shared memory, limit {LIMIT[r.arch]} KiB")
        if r.dtype in ("bf16", "fp16", "tf32") and r.tensor_core == "-":
            wrong.append(f"{where}: no tensor-core instruction")
    return wrong


def markdown(results: list[Compiled]) -> str:
    """One row a kernel, dtype and configuration; registers / shared KiB / tensor-core instruction an architecture."""
    archs = sorted({r.arch for r in results})
    rows: dict[tuple[str, str, str], dict[int, Compiled]] = {}
    for r in results:
        rows.setdefault((r.kernel, r.dtype, r.blocks), {})[r.arch] = r
    lines = ["| kernel | dtype | blocks, warps, stages | " + " | ".join(f"sm_{a}" for a in archs) + " |",
             "|" + "---|" * (3 + len(archs))]
    for (kernel, dtype, blocks), found in rows.items():
        cells = [f"{f.registers} / {f.shared / 1024:.0f} / {f.tensor_core.split('.')[0]}" if (f := found.get(a)) else ""
                 for a in archs]
        lines.append(f"| {kernel} | {dtype} | {blocks} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def put(table: str, begin: str, end: str, page: Path = PAGE) -> None:
    """Writes the table between its two marks on the page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(f"{text[: text.index(begin) + len(begin)]}\n{table}{text[text.index(end) :]}", encoding="utf-8")


def main() -> int:
    """Compiles, prints the table, and with --write puts it into docs/kernels.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--default-only", action="store_true")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES))
    options = parser.parse_args()
    todo = jobs(options.arch, options.dtype, options.default_only)
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(_attempt, todo))
    wrong = complaints(results)
    good = [r for r in results if isinstance(r, Compiled)]
    print(markdown(good))
    print("\n".join(wrong) or f"{len(good)} compiled, no spills")
    if options.write and not wrong:
        put(markdown(good), BEGIN, END)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
