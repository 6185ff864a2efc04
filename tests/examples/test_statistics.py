"""Intervals over seeds and utterances."""

import math

import pytest
from scipy import stats

torch = pytest.importorskip("torch")

from examples.asr.statistics import over_seeds, over_utterances, paired_difference


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0, 4.5, 9.0], [1.0, 1.0, 1.0, 2.0, 5.0]])
def test_seed_interval_is_student_s(values):
    got = over_seeds(values)
    mean = sum(values) / len(values)
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    assert (got.mean, got.low, got.high) == pytest.approx((mean, low, high), rel=1e-3)


def test_one_seed_has_no_interval_and_none_is_an_error():
    assert math.isnan(over_seeds([4.0]).low) and str(over_seeds([4.0])) == "4.0"
    with pytest.raises(ValueError, match="values is empty"):
        over_seeds([])


def test_utterance_interval_covers_the_true_rate():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for trial in range(100):
        wrong = (torch.rand(60, 8, generator=generator) < 0.1).sum(1).tolist()
        interval = over_utterances([wrong], [8] * 60, draws=400, seed=trial)
        assert interval.mean == pytest.approx(100 * sum(wrong) / 480)
        covered += interval.low <= 10 <= interval.high
    assert 85 <= covered <= 100  # 95 expected; binomial sd 2.2, and the percentile method runs a little narrow


def test_errors_are_averaged_over_seeds_and_weighted_by_words():
    got = over_utterances([[2, 0], [0, 0]], [2, 8])
    assert got.mean == pytest.approx(10.0) and (got.low, got.high) == (0.0, 50.0)


def test_speakers_are_drawn_with_all_that_they_said():
    """Utterances of a speaker that err alike tell less than as many of several speakers."""
    wrong, speakers = [0, 0, 0, 0, 4, 4, 4, 4] * 6, [f"{block}{part}" for block in range(6) for part in "aaaabbbb"]
    by_utterance, by_speaker = over_utterances([wrong], [8] * 48), over_utterances([wrong], [8] * 48, speakers=speakers)
    assert by_speaker.mean == by_utterance.mean == pytest.approx(25)
    ratio = (by_speaker.high - by_speaker.low) / (by_utterance.high - by_utterance.low)
    assert ratio == pytest.approx(2, rel=0.15)  # four utterances of a speaker count as one: sqrt(4)
    alone = [str(n) for n in range(48)]
    assert over_utterances([wrong], [8] * 48, speakers=alone) == by_utterance
    assert paired_difference([wrong], [[0] * 48], [8] * 48, speakers=speakers) == by_speaker


def test_paired_difference_takes_out_what_is_common():
    hard = [5, 0, 5, 0, 5, 0] * 5
    first = [h + 1 for h in hard]
    got = paired_difference([first], [hard], [10] * 30)
    assert (got.mean, got.low, got.high) == pytest.approx((10.0, 10.0, 10.0))
    assert paired_difference([hard], [first], [10] * 30).mean == pytest.approx(-10.0)
