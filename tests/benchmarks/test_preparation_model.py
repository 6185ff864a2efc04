"""The counted model of preparation against sizes worked out by hand, and what docs say of it."""

import re

import pytest

from benchmarks.kernel_table import PAGE
from benchmarks.preparation_model import BANDWIDTH, BRAIN, MEETING, shared, steps, table
from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.config import LayerShape

SHAPE = LayerShape.of(4096, 1024, SSVDOConfig(inner_ratio=0.5, outer_rank=64))


def counted(p=0.5, half=True):
    return list(steps(24, LayerShape.of(4096, 1024, SSVDOConfig(inner_ratio=p, outer_rank=64)), half))


def test_a_product_is_counted_as_its_operands_and_the_team_that_has_most():
    """Of 11 teams 8 have one of V^T's tiles, of 128 rows, two teams a processor."""
    first = next(s for s in counted() if s.name == "backward: V^T")
    moved = 24 * (2 * 1024 * 1024 + 4 * (1024 * 64 + 1024 * 64))
    assert (first.bytes, first.flops) == (moved, 24 * 2 * 1024 * 1024 * 64)
    most = 2 * (2 * 1024 * 128 * 64)
    assert first.most == pytest.approx(most)
    assert first.seconds == pytest.approx(max(moved / BANDWIDTH, most * 132 / BRAIN) + MEETING)


def test_what_is_put_aside_is_counted():
    """A^T z's 8 tiles among 11 teams: each has 8/11 of a tile, which makes 18 pieces, and a meeting."""
    first = next(s for s in counted() if s.name == "backward: A^T z")
    assert first.bytes == 24 * (2 * 4096 * 1024 + 4 * (4096 * 64 + 1024 * 64) + 18 * 2 * 4 * 128 * 64)
    assert first.alone == MEETING and first.most == pytest.approx(2 * 8 * 384 * 2 * 128 * 64)


@pytest.mark.parametrize("tiles, depth, teams, sums, found", [
    (8, 4096, 11, 4, (11, 11)), (8, 1024, 11, 4, (11, 1)), (32, 4096, 11, 4, (11, 1)), (1, 7168, 11, 64, (11, 11)),
    (1, 4096, 11, 4, (3, 3)), (8, 1024, 256, 32, (128, 32)), (2, 1700, 3, 5, (3, 3)), (8, 4096, 11, 1, (11, 1)),
])  # fmt: skip
def test_who_shares_a_tile(tiles, depth, teams, sums, found):
    assert shared(tiles, depth, teams, sums) == found


def test_one_layer_alone():
    """Every processor has work, and its residual is formed at once: probes would take longer."""
    names = [s.name for s in steps(1, SHAPE, True)]
    assert "forward: its residual, M" in names and "forward: its probes, M" not in names


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
