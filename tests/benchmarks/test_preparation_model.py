"""The counted model of preparation against sizes worked out by hand, and what docs say of it."""

import re

import pytest

from benchmarks.kernel_table import PAGE
from benchmarks.preparation_model import BANDWIDTH, BRAIN, MEETING, steps, table
from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.config import LayerShape


def counted(p=0.5, half=True):
    return list(steps(24, LayerShape.of(4096, 1024, SSVDOConfig(inner_ratio=p, outer_rank=64)), half))


def test_a_product_is_counted_as_its_operands_and_its_operations():
    first = next(s for s in counted() if s.name == "backward: A^T z")
    moved = 24 * (2 * 4096 * 1024 + 4 * (4096 * 64 + 1024 * 64))
    flops = 24 * 2 * 4096 * 1024 * 64
    assert (first.bytes, first.flops) == (moved, flops)
    assert first.seconds == pytest.approx(max(moved / BANDWIDTH, flops / BRAIN) + MEETING + 3e-6 * first.launches)


@pytest.mark.parametrize("half", [True, False])
def test_launches(half):
    """4 + 3 kernels of ours, as tests/gpu counts them; four of PyTorch's: tests/ops/test_device.py sees three."""
    assert sum(s.launches for s in counted(half=half)) == 4 + 3 + 4 <= 14


def test_docs_say_what_is_counted():
    page = PAGE.with_name("performance.md").read_text()
    for p, half, dtype in ((0.25, True, "bf16"), (0.5, True, "bf16"), (0.5, False, "fp32")):
        launches, moved, flops, us = re.search(r"\| all \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|",
                                               table(counted(p, half))).groups()  # fmt: skip
        assert f"| {p}, {dtype} | {launches} | {moved} | {flops} | {float(us) / 1e3:.2f} |" in page
