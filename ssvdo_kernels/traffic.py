"""What a kernel must move and compute, from shapes alone: the planner's prior and the ceiling in benchmark tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Traffic:
    """Bytes to and from global memory (each operand once) and floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, machine: Machine, single: bool = False) -> float:
        """The larger of the two floors; single: products in float32, whatever the tokens' dtype."""
        return max(self.bytes / machine.bandwidth, self.flops / (machine.float_rate if single else machine.rate))


@dataclass(frozen=True)
class Machine:
    """Peak memory bandwidth (bytes/s), rates of products in the tokens' dtype and in float32 (flop/s), multiprocessors
    and bytes of the cache that they share, 0 where unknown."""

    name: str
    bandwidth: float
    rate: float
    float_rate: float
    processors: int = 0
    cache: float = 0

    def chunk(self, tokens: int, row_bytes: int, columns: int) -> int:
        """Rows of `row_bytes` that a product with `columns` columns leaves in the cache for the next one to read: as
        many as occupy the multiprocessors once, with tiles of 128 x 128; 0 where half of the cache does not hold them,
        or there are too few."""
        rows = 128 * (self.processors // -(-columns // 128))
        return rows if tokens >= 2 * rows and rows * row_bytes <= self.cache / 2 else 0


# Data sheets: (bandwidth, dense bf16 rate, multiprocessors, cache). The first name contained in the device's wins.
_SHEETS: dict[str, tuple[float, float, int, float]] = {
    "B200": (8.0e12, 2250e12, 148, 126e6), "H200": (4.8e12, 989e12, 132, 50e6), "H100": (3.35e12, 989e12, 132, 50e6),
    "A100": (2.0e12, 312e12, 108, 40e6), "L40S": (0.864e12, 362e12, 142, 96e6),
    "RTX 4090": (1.008e12, 165e12, 128, 72e6),
}  # fmt: skip
_UNKNOWN = (1.0e12, 150e12, 0, 0.0)
_SHARE = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float64: 1 / 16}


@lru_cache(maxsize=64)
def machine(name: str, dtype: torch.dtype, tf32: bool = False) -> Machine:
    """Peaks by data sheet for a device's name; an unknown one is taken as a middling card."""
    key = next((k for k in _SHEETS if k in name), None)
    bandwidth, rate, processors, cache = _SHEETS[key] if key else _UNKNOWN
    single = rate * (0.5 if tf32 else 1 / 16)
    own = single if dtype == torch.float32 else rate * _SHARE[dtype]
    return Machine(key or name, bandwidth, own, single, processors, cache)


def tf32() -> bool:
    """Whether products of float32 run in tf32 on an NVIDIA GPU, whichever of torch's switches was used.

    Since torch 2.9 reading ``allow_tf32`` raises where ``fp32_precision`` was set.
    """
    switches: Any = torch.backends.cuda.matmul
    precision: str | None = getattr(switches, "fp32_precision", None)
    return bool(switches.allow_tf32) if precision is None else precision == "tf32"


def product(rows: int, inner: int, columns: int, size: int, addend: bool = False) -> Traffic:
    """rows x inner times inner x columns, with or without an addend of the result's shape."""
    moved = rows * inner + inner * columns + rows * columns * (2 if addend else 1)
    return Traffic(size * moved, 2 * rows * inner * columns)


def expand(tokens: int, d: int, w: int, e: int, size: int, *, one_pass: bool, keep: bool = False) -> Traffic:
    """[x | 0] + (x V) R; keep: x V and z go out, too."""
    flops = 2 * tokens * (d * w + w * (d + e))
    moved = tokens * (d + d + e) + d * w + w * (d + e) + (tokens * (w + e) if keep else 0)
    if not one_pass:  # h goes out and comes back, x is read twice
        moved += tokens * (d + 2 * w) - (tokens * w if keep else 0)
    return Traffic(size * moved, flops)


def contract(tokens: int, d: int, w: int, e: int, size: int, *, one_pass: bool, keep: bool = False) -> Traffic:
    """u + [u V | z] Q; z lies beside the place of u V, where that goes with keep."""
    flops = 2 * tokens * (d * w + (w + e) * d)
    moved = tokens * (d + e + d) + d * w + (w + e) * d + (tokens * w if keep else 0)
    if not one_pass:
        moved += tokens * (d + 2 * w) - (tokens * w if keep else 0)
    return Traffic(size * moved, flops)


def over_tokens(tokens: int, p: int, q: int, size: int, cached: bool = False) -> Traffic:
    """a^T b over tokens in 4 bytes. cached: a lies in the cache."""
    return Traffic(size * tokens * ((0 if cached else p) + q) + 4 * p * q, 2 * tokens * p * q)


def copy(count: int, size: int) -> Traffic:
    """`count` numbers read and written."""
    return Traffic(2 * size * count, 0)
