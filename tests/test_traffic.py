"""The traffic model: bytes and operations counted by hand, floors, data sheets."""

import pytest
import torch

from ssvdo_kernels import SSVDOConfig, traffic
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.planner import joins, launches, plan_kernels
from ssvdo_kernels.traffic import Machine, Traffic, machine

FAST = Machine("", bandwidth=1e12, rate=1e14, float_rate=1e13)
H100 = Machine("H100", 3.35e12, 790e12, 60e12, processors=132, cache=50e6)


def test_floor_is_the_larger_of_the_two():
    assert Traffic(1e12, 1e13).seconds(FAST) == 1.0
    assert Traffic(1e11, 1e14).seconds(FAST) == 1.0
    assert Traffic(1, 2) + Traffic(3, 4) == Traffic(4, 6)


def test_products():
    assert traffic.product(3, 5, 7, 2) == Traffic(2 * (15 + 35 + 21), 2 * 105)
    assert traffic.product(3, 5, 7, 2, addend=True) == Traffic(2 * (15 + 35 + 42), 2 * 105)
    assert traffic.over_tokens(100, 3, 5, 2) == Traffic(2 * 800 + 60, 3000)
    assert traffic.over_tokens(100, 3, 5, 2, cached=True) == Traffic(2 * 500 + 60, 3000)
    assert traffic.copy(7, 2) == Traffic(28, 0)


def test_one_pass_reads_and_writes_once():
    T, d, w, e = 1000, 64, 16, 4
    once, twice = (traffic.expand(T, d, w, e, 2, one_pass=o) for o in (True, False))
    assert once == Traffic(2 * (T * (d + d + e) + d * w + w * (d + e)), 2 * T * (d * w + w * (d + e)))
    assert twice.flops == once.flops and twice.bytes - once.bytes == 2 * T * (d + 2 * w)
    kept = traffic.expand(T, d, w, e, 2, one_pass=True, keep=True)
    assert kept.bytes - once.bytes == 2 * T * (w + e)
    kept = traffic.expand(T, d, w, e, 2, one_pass=False, keep=True)
    assert kept.bytes - twice.bytes == 2 * T * e  # h goes out there anyway
    back = traffic.contract(T, d, w, e, 2, one_pass=True)
    assert back == Traffic(2 * (T * (d + e + d) + d * w + (w + e) * d), 2 * T * (d * w + (w + e) * d))
    assert traffic.contract(T, d, w, e, 2, one_pass=True, keep=True).bytes - back.bytes == 2 * T * w


@pytest.mark.parametrize("p, tall, wide", [(0.25, 1.32, 1.41), (0.5, 1.39, 1.48)])
def test_what_a_large_batch_costs(p, tall, wide):
    """16384 tokens of 1024 <-> 4096, l = 64, on an H100 whose products reach 790 Tflop/s."""
    T, frozen = 16384, 4 * 16384 * 1024 * 4096 / 790e12
    for m, n, want in ((4096, 1024, tall), (1024, 4096, wide)):
        shape = LayerShape.of(m, n, SSVDOConfig(inner_ratio=p, outer_rank=64))
        found = launches("folded", shape, 64, T, True, 2, H100)
        assert 1 + sum(t.seconds(H100) for t in found) / frozen == pytest.approx(want, abs=0.006)


@pytest.mark.parametrize("m, n, want", [(4096, 1024, 1.25), (1024, 4096, 1.34)])
def test_what_a_large_batch_costs_in_one_pass_at_w_256(m, n, want):
    """Until it is timed, the planner counts two launches for `expand` and `contract`, the first two."""
    T, size = 16384, (16384, 1024, 256, 64, 2)
    found = launches("folded", LayerShape.of(m, n, SSVDOConfig(inner_ratio=0.25, outer_rank=64)), 64, T, True, 2, H100)
    two, one = ([of(*size, one_pass=once, keep=True) for of in (traffic.expand, traffic.contract)]
                for once in (False, True))  # fmt: skip
    assert found[:2] == two and two[0].bytes - one[0].bytes == 2 * T * (1024 + 256)
    floor = sum(t.seconds(H100) for t in (*one, *found[2:]))
    assert 1 + floor / (4 * T * m * n / H100.rate) == pytest.approx(want, abs=0.006)


def test_chunks_fit_the_cache_and_occupy_the_multiprocessors():
    h100 = machine("NVIDIA H100 80GB", torch.bfloat16)
    assert h100.chunk(16384, 8192, 1088) == 128 * 14  # nine columns of tiles, 126 of 132 multiprocessors
    assert h100.chunk(3000, 8192, 1088) == 0  # one chunk is none
    assert h100.chunk(1 << 20, 1 << 20, 1088) == 0
    assert machine("a card to come", torch.bfloat16).chunk(1 << 20, 8192, 1088) == 0


def test_data_sheets():
    h200 = machine("NVIDIA H200", torch.bfloat16)
    assert (h200.name, h200.bandwidth, h200.rate) == ("H200", 4.8e12, 989e12)
    assert machine("NVIDIA H200", torch.float32, tf32=True).rate == 989e12 / 2
    assert machine("NVIDIA H200", torch.float32).rate == 989e12 / 16
    assert machine("a card to come", torch.float16).bandwidth == 1e12


@pytest.mark.parametrize("m, n", [(4096, 1024), (1024, 4096)])
@pytest.mark.parametrize("grad", [True, False])
def test_few_tokens_fold_and_many_merge(m, n, grad):
    shape = LayerShape.of(m, n, SSVDOConfig(outer_rank=1))
    h200 = machine("NVIDIA H200", torch.bfloat16)

    def choice(tokens, built=frozenset(), seen=0):
        return plan_kernels(shape, 1, tokens, seen, grad, built, 2, h200)

    assert choice(16) == "folded"
    assert choice(16, built=frozenset({"folded", "merged"})) == ("folded" if grad else "merged")
    assert choice(16, seen=1 << 24) == ("folded" if grad else "merged")
    if not grad:  # in training, the way back through C costs about what the folded form does
        assert choice(1 << 24) == "merged"


def test_training_counts_more_than_inference():
    shape = LayerShape.of(64, 16, SSVDOConfig(outer_rank=2))
    for form in ("folded", "merged"):
        assert len(launches(form, shape, 2, 100, True, 2)) > len(launches(form, shape, 2, 100, False, 2))


def test_joining_saves_passes_over_the_large_side_when_there_are_rows_enough():
    shape = LayerShape.of(4096, 1024, SSVDOConfig())
    assert not joins(1000, 1024, 64) and joins(1088, 1024, 64) and not joins(1 << 20, 1024, 0)
    moved = [sum(t.bytes for t in launches("folded", shape, 64, T, True, 2)) / T for T in (1087, 16384)]
    assert moved[1] < moved[0] - 2 * 3 * 4096 + 2 * 64 * 4  # y written once more and read, dy read: 3 passes less
