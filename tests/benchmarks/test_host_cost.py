"""The benchmark of Python's cost for a layer on a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import require_triton

require_triton()
from benchmarks.fake_gpu import fake_gpu
from ssvdo_kernels.triton import kernels

LAUNCHES = {"frozen": 2, "cached": 8, "merged": 4, "one token": 3, "one token, merged": 1,
            "prepared in a group of 24": 12}  # fmt: skip


def compiling(*arguments):
    """Python with these arguments, in a process of its own: here, the kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], cwd=Path(__file__).parents[2], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_launches_of_a_layer(tmp_path):
    compiling("-m", "benchmarks.bench_host", "--rounds", "1", "--out", str(tmp_path), "--cases", *LAUNCHES)
    rows = json.loads(next(tmp_path.glob("*-host.json")).read_text())["rows"]
    assert all(row["us"] > 0 for row in rows)
    for row in rows:
        assert row["launches"] <= LAUNCHES[row["case"]], row
    cached = next(row for row in rows if (row["case"], row["kind"]) == ("cached", "tall"))
    assert cached["by"]["expand"] == cached["by"]["contract"] == 1


def test_two_checkouts_are_measured_in_turns(tmp_path):
    here = str(Path(__file__).parents[2])
    compiling("-m", "benchmarks.host_turns", here, "--cases", "frozen", "--restarts", "1", "--seconds", "0", "--out",
              str(tmp_path))  # fmt: skip
    rows = json.loads(next(tmp_path.glob("*-host-turns.json")).read_text())["rows"]
    assert [row["kind"] for row in rows] == ["tall", "wide"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["now"]["least"] / row["before"]["least"]) and row["now"]["least"] > 0
    with pytest.raises(AssertionError, match="has no benchmarks/bench_host"):
        compiling("-m", "benchmarks.host_turns", str(tmp_path))


def test_a_step_reads_no_file_and_no_variable():
    code = """
import builtins, os
from unittest import mock
from benchmarks.bench_host import ready
from benchmarks.fake_gpu import fake_gpu
with fake_gpu():
    for case in ("cached", "merged", "one token"):
        with ready(case, "tall") as step, mock.patch.object(builtins, "open", None), mock.patch("os.environ", None), \\
                mock.patch("ssvdo_kernels.triton.tuning.choose", None), mock.patch("re.sub", None):
            step()
"""
    compiling("-c", code)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="a GPU is there")
def test_interpreted_kernels_are_no_gpu():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), fake_gpu():
        pass


def test_another_number_of_tokens_compiles_nothing_anew():
    """1 and multiples of 16 are what Triton specialises on."""
    code = """
import torch
from unittest import mock
from benchmarks.fake_gpu import fake_gpu
with fake_gpu():
    from ssvdo_kernels.triton import configs, kernels, launch, tuning
    sizes = (48, 32), (48, 16), (32, 16), (16, 48), (32, 32)
    x, z, V, R, Q = (torch.zeros(*size, dtype=torch.bfloat16) for size in sizes)
    first = lambda name, precision, *_, **__: configs.CONFIGS[name][precision][:1]
    with mock.patch.object(tuning, "choose", first):
        for T in (16, 1, 48, 7):
            launch.expand(x[:T], V, R)
            launch.contract(x[:T], z[:T], V, Q)
            launch.add_product(x[:T], z[:T], R)
    for kernel in (kernels.expand, kernels.contract, kernels.add_product):
        assert [len(found[0]) for found in kernel.device_caches.values()] == [1], kernel
"""
    compiling("-c", code)
