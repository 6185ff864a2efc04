"""Means over seeds, over utterances and over speakers, with 95% intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Student's t, two-sided 95%, by degrees of freedom.
_T95 = (math.nan, 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval; low and high are NaN where one value gives none."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        spread = "" if math.isnan(self.low) else f" [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.mean:.1f}{spread}"


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of one value per seed and Student's interval, mean -+ t s / sqrt(n).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("values is empty; at least one is needed")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, math.nan, math.nan)
    half = (_T95[n - 1] if n <= len(_T95) else 1.96) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def over_utterances(
    wrong: Sequence[Sequence[int]], total: Sequence[int], draws: int = 2000, seed: int = 0,
    speakers: Sequence[str] | None = None,
) -> Interval:
    """Error rate in percent and its percentile interval when the utterances are drawn anew (bootstrap).

    wrong: for each seed, the errors per utterance; they are averaged over seeds first. total: words per utterance.
    speakers: whose each utterance is; then speakers are drawn, each with all that they said.
    """
    return _bootstrap(torch.tensor(wrong, dtype=torch.float64).mean(0), total, draws, seed, speakers)


def paired_difference(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], total: Sequence[int], draws: int = 2000,
    seed: int = 0, speakers: Sequence[str] | None = None,
) -> Interval:
    """Error rate of `first` less that of `second`, in points, on the same drawn utterances, or speakers."""
    means = [torch.tensor(w, dtype=torch.float64).mean(0) for w in (first, second)]
    return _bootstrap(means[0] - means[1], total, draws, seed, speakers)


def _bootstrap(
    wrong: torch.Tensor, total: Sequence[int], draws: int, seed: int, speakers: Sequence[str] | None
) -> Interval:
    words = torch.tensor(total, dtype=torch.float64)
    if speakers is not None:
        numbers = {name: n for n, name in enumerate(dict.fromkeys(speakers))}
        own = torch.tensor([numbers[s] for s in speakers])
        wrong, words = (torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, own, t) for t in (wrong, words))
    chosen = torch.randint(len(words), (draws, len(words)), generator=torch.Generator().manual_seed(seed))
    rates = 100 * wrong[chosen].sum(1) / words[chosen].sum(1)
    low, high = torch.quantile(rates, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(100 * wrong.sum() / words.sum()), low, high)
