"""Ahead-of-time compilation of every shipped configuration for every dtype and architecture, with no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import require_triton

require_triton()
from benchmarks import kernel_table
from benchmarks.kernel_table import Compiled, complaints

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """In a process of its own: here, the kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel_table", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("dtype", kernel_table.DTYPES)
def test_everything_shipped_compiles_without_spills(dtype):
    archs = [80, 90, 100]
    done = run("--dtype", dtype, "--arch", *map(str, archs))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{len(kernel_table.jobs(archs, [dtype]))} compiled, no spills" in done.stdout


def test_defaults_compile_where_blocks_have_less_shared_memory():
    done = run("--dtype", "bf16", "tf32", "--arch", "86", "89", "120", "--default-only")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "18 compiled, no spills" in done.stdout


def test_the_page_lists_what_is_shipped():
    text = kernel_table.PAGE.read_text().split(kernel_table.END)[0]
    rows = re.findall(r"^\| (\w+) \| (\w+) \| ([^|]+) \|", text, re.M)
    want = {(kernel, dtype, kernel_table.describe(config)) for kernel, dtype, _, config
            in kernel_table.jobs(list(kernel_table.ARCHS), list(kernel_table.DTYPES))}  # fmt: skip
    assert {row for row in rows if row[0] != "kernel"} == want


def test_complaints():
    good = Compiled("expand", "bf16", 90, "", 100, 0, 1000, "wgmma.mma_async")
    assert complaints([good]) == []
    assert "8 bytes spilled" in complaints([Compiled("expand", "bf16", 90, "", 100, 8, 1000, "wgmma.mma_async")])[0]
    assert "shared memory" in complaints([Compiled("expand", "bf16", 89, "", 100, 0, 120_000, "mma.sync")])[0]
    assert complaints([Compiled("expand", "bf16", 80, "", 100, 0, 120_000, "mma.sync")]) == []
    assert "no tensor-core" in complaints([Compiled("expand", "fp16", 80, "", 100, 0, 1000, "-")])[0]
    assert complaints(["it failed"]) == ["it failed"]
