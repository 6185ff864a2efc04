"""What a kernel must move and compute, from shapes alone: the planner's prior and the ceiling in benchmark tables."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Peak memory bandwidth (bytes/s), rates of products in the tokens' dtype and in float32 (flop/s)."""

    name: str
    bandwidth: float
    rate: float
    float_rate: float


# Vendor data sheets: (bandwidth, dense bf16 rate). The first name contained in the device's wins.
_SHEETS = {
    "B200": (8.0e12, 2250e12), "H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12),
    "A100": (2.0e12, 312e12), "L40S": (0.864e12, 362e12), "RTX 4090": (1.008e12, 165e12),
}  # fmt: skip
_UNKNOWN = (1.0e12, 150e12)
_SHARE = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float64: 1 / 16}


def machine(name: str, dtype: torch.dtype, tf32: bool = False) -> Machine:
    """Peaks by data sheet for a device's name; an unknown one is taken as a middling card."""
    key = next((k for k in _SHEETS if k in name), None)
    bandwidth, rate = _SHEETS[key] if key else _UNKNOWN
    single = rate * (0.5 if tf32 else 1 / 16)
    return Machine(key or name, bandwidth, single if dtype == torch.float32 else rate * _SHARE[dtype], single)


def product(rows: int, inner: int, columns: int, size: int, addend: bool = False) -> Traffic:
    """rows x inner times inner x columns, with or without an addend of the result's shape."""
    moved = rows * inner + inner * columns + rows * columns * (2 if addend else 1)
    return Traffic(size * moved, 2 * rows * inner * columns)


def expand(tokens: int, d: int, w: int, e: int, size: int, *, one_pass: bool, store_h: bool = False) -> Traffic:
    """[x | 0] + (x V) R."""
    flops = 2 * tokens * (d * w + w * (d + e))
    moved = tokens * (d + d + e) + d * w + w * (d + e) + (tokens * w if store_h else 0)
    if not one_pass:  # h goes out and comes back, x is read twice
        moved += tokens * (d + 2 * w) - (tokens * w if store_h else 0)
    return Traffic(size * moved, flops)


def contract(tokens: int, d: int, w: int, e: int, size: int, *, one_pass: bool, store_g: bool = False) -> Traffic:
    """u + [u V | z] Q."""
    flops = 2 * tokens * (d * w + (w + e) * d)
    moved = tokens * (d + e + d) + d * w + (w + e) * d + (tokens * (w + e) if store_g else 0)
    if not one_pass:
        moved += tokens * (d + 2 * (w + e)) - (tokens * (w + e) if store_g else 0)
    return Traffic(size * moved, flops)


def token_product(tokens: int, p: int, q: int, size: int, splits: int) -> Traffic:
    """a^T b over tokens, partial sums in 4 bytes written and read where there is more than one split."""
    partials = 4 * p * q * (1 if splits == 1 else 2 * splits + 1)
    return Traffic(size * tokens * (p + q) + partials, 2 * tokens * p * q)
