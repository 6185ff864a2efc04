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
    assert first.seconds == pytest.approx(max(moved / BANDWIDTH, most * 132 / (1.5 * BRAIN)) + MEETING)


def test_what_is_put_aside_is_counted():
    """A^T z's 8 tiles among 11 teams: in the second pass each has 8/11 of a tile, which makes 18 pieces, and a meeting;
    in the first, which is coarse, 8 teams have one each."""
    first, second = (s for s in counted() if s.name == "backward: A^T z")
    moved = 24 * (2 * 4096 * 1024 + 4 * (4096 * 64 + 1024 * 64))
    assert (first.bytes, second.bytes) == (moved, moved + 24 * 18 * 2 * 4 * 128 * 64)
    assert first.alone == 0 and first.most == pytest.approx(2 * 4096 * 2 * 128 * 64)
    assert second.alone == 2 * MEETING and second.most == pytest.approx(2 * 8 * 384 * 2 * 128 * 64)


@pytest.mark.parametrize("tiles, depth, teams, sums, coarse, found", [
    (8, 4096, 11, 4, False, (11, 11)), (8, 1024, 11, 4, False, (11, 1)), (32, 4096, 11, 4, False, (11, 1)),
    (1, 7168, 11, 64, False, (11, 11)), (1, 4096, 11, 4, False, (3, 3)), (8, 1024, 256, 32, False, (128, 32)),
    (2, 1700, 3, 5, False, (3, 3)), (8, 4096, 11, 1, False, (11, 1)),
    (8, 4096, 11, 4, True, (11, 1)), (8, 4096, 13, 4, True, (13, 13)), (8, 1024, 256, 32, True, (128, 32)),
])  # fmt: skip
def test_who_shares_a_tile(tiles, depth, teams, sums, coarse, found):
    assert shared(tiles, depth, teams, sums, coarse) == found


def test_one_layer_alone():
    """Every processor has work, and its residual is formed at once: probes would take longer."""
    names = [s.name for s in steps(1, SHAPE, True)]
    assert "forward: its residual" in names and "forward: its probes" not in names


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
