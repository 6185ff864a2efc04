"""Resampling, and what a recording goes through on its way: a telephone, another tempo, noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RATE = 16_000
MU = 255  # G.711's mu-law


def resample(audio: Tensor, rate: int, target: int, zeros: int = 24) -> Tensor:
    """Band-limited resampling: a sinc with `zeros` zero crossings a side, under a Hann window. audio: samples.

    Output n lies at n rate / target. The kernel depends on its fraction alone, of which there are target / gcd.
    """
    count = int(audio.numel() * target / rate)
    cutoff = min(1.0, target / rate)
    phases = target // math.gcd(rate, target)
    reach = int(zeros / cutoff) + 1
    offsets = torch.arange(-reach, reach + 1)
    fraction = torch.arange(min(phases, count), dtype=torch.float64) * rate / target % 1
    distance = offsets - fraction[:, None]
    window = torch.cos(torch.pi * distance / (2 * (reach + 1))).square()
    kernel = cutoff * torch.sinc(cutoff * distance) * window
    padded = torch.nn.functional.pad(audio.double(), (reach, reach + 1))
    made = torch.empty(count, dtype=torch.float64)
    for phase, weights in enumerate(kernel):
        first = torch.arange(phase, count, phases) * rate // target
        made[phase::phases] = padded.as_strided((padded.numel() - 2 * reach, 2 * reach + 1), (1, 1))[first] @ weights
    return made.float()


def telephone(audio: Tensor) -> Tensor:
    """8 kHz and the 256 levels of the continuous mu-law, sign(x) ln(1 + 255 |x|) / ln 256; back at 16 kHz."""
    narrow = resample(audio, RATE, RATE // 2).clamp(-1, 1)
    bound = torch.log1p(torch.tensor(float(MU)))
    level = ((narrow.sign() * torch.log1p(MU * narrow.abs()) / bound + 1) * 127.5).round() / 127.5 - 1
    return resample(level.sign() * torch.expm1(level.abs() * bound) / MU, RATE // 2, RATE)


def speed(audio: Tensor, factor: float) -> Tensor:
    """Played `factor` times as fast; the pitch moves with it."""
    return resample(audio, round(RATE * factor), RATE)


def noise(audio: Tensor, decibels: float) -> Tensor:
    """With white noise `decibels` below the recording's own power; the noise depends on the length alone."""
    white = torch.randn(audio.numel(), generator=torch.Generator().manual_seed(audio.numel()))
    return audio + white * audio.square().mean().sqrt() * 10 ** (-decibels / 20)


SHIFTS = {
    "": lambda audio: audio,
    "telephone": telephone,
    "slow": lambda audio: speed(audio, 0.85),
    "fast": lambda audio: speed(audio, 1.2),
    "noise": lambda audio: noise(audio, 10.0),
}


def shifted(audio: Tensor, name: str) -> Tensor:
    """Samples at 16 kHz after one of SHIFTS.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in SHIFTS:
        raise ValueError(f"shift={name!r} is unknown; allowed: {', '.join(map(repr, filter(None, SHIFTS)))}")
    return SHIFTS[name](audio)
