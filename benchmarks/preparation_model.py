"""Counts what the CUDA kernels of preparation launch, move and compute: what a GPU could at best take, without one.

    python -m benchmarks.preparation_model [--layers 24] [--large 4096] [--d 1024] [--p 0.5] [--l 64] [--dtype bfloat16]

A product takes the longer of its bytes at the memory's bandwidth (each operand once) and its operations at the rate of
`mma.sync`, the instruction of csrc/core/mma.h: on an H100 about 0.62 of the data sheet, which only `wgmma` reaches. A
half-precision weight takes three products of bfloat16 numbers, all else three of tf32. Launches, meetings of a layer's
teams and columns of Gauss-Jordan are taken at the times below, which are guesses from instruction counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.config import LayerShape

BANDWIDTH = 3.35e12
BRAIN, TENSOR32 = 0.62 * 989e12 / 3, 0.62 * 494e12 / 3  # of products in three pieces
LAUNCH, MEETING, COLUMN = 3e-6, 2e-6, 0.085e-6  # seconds; a column: 150 cycles


@dataclass(frozen=True)
class Step:
    """Of all layers together. launches: kernels that begin with it; alone: seconds that nothing can hide."""

    name: str
    bytes: float = 0.0
    flops: float = 0.0
    rate: float = TENSOR32
    launches: int = 0
    alone: float = 0.0

    @property
    def seconds(self) -> float:
        """The longer of what is moved and what is computed, and what comes on top."""
        return max(self.bytes / BANDWIDTH, self.flops / self.rate) + self.alone + LAUNCH * self.launches


def steps(layers: int, shape: LayerShape, half: bool) -> Iterator[Step]:
    """Forward, then backward, of `layers` layers of one shape in the order of csrc/cuda; rotation="cayley"."""
    large, d, c, k, l = shape.large, shape.d, shape.c, shape.k, shape.l  # noqa: E741
    square = layers * k * k

    def product(
        name: str, rows: int, inner: int, columns: int, frozen: bool = False, launches: int = 0, addend: int = 0
    ) -> Step:
        stored = 2 if frozen and half else 4
        moved = stored * rows * inner + 4 * (inner * columns + (rows + addend) * columns)
        rate = BRAIN if frozen and half else TENSOR32
        return Step(name, layers * moved, 2.0 * layers * rows * inner * columns, rate, launches, MEETING)

    def projection(way: str, first: int, rows: int) -> Iterator[Step]:
        passes = 2 if half else 1
        for turn in range(passes):
            count = rows if turn + 1 == passes else large
            yield product(f"{way}: A^T z", d, first, l, True, launches=int(turn == 0))
            yield product(f"{way}: V^T", d, d, l, True)
            yield product(f"{way}: V", d, d, l, True)
            yield product(f"{way}: z - A", count, d, l, True, addend=min(first, count))
            first = large

    mixer = 4 * layers * (shape.width + l) * shape.width
    yield Step("forward: zeros, stacked dS", launches=2)
    blocks = -(-k // 64)
    yield Step("forward: (I + K)^-1, in blocks", 8 * square * blocks, 2.0 * k * square, TENSOR32, 1,
               COLUMN * k + MEETING * blocks)  # fmt: skip
    yield Step("forward: its residual, M", 8 * square + mixer, 2.0 * k * square, TENSOR32, 0, MEETING)
    yield from projection("forward", c, large)
    yield product("forward: Z^T Z", l, large, l)
    yield Step("forward: the factor", 12 * layers * l * l, launches=1, alone=COLUMN * l)
    yield product("forward: Z X", large, l, l, launches=1)
    yield product("forward: U_l (sqrt(tau) X - I)", large, l, l, True, addend=large)
    yield Step("forward: verdict", launches=1)
    yield Step("backward: zeros", launches=1)
    yield from projection("backward", large, c)
    yield product("backward: L^T E", l, c, l)
    yield product("backward: U_l^T dF", l, large, l, True, addend=l)
    for name in ("dX^T X", "H X^T", "(sqrt(tau) X - I) H X^T"):
        yield product(f"backward: {name}", l, l, l)
    for name in ("E X^T", "F", "U_l"):
        yield product(f"backward: dL, {name}", c, l, l, name == "U_l", addend=0 if name == "E X^T" else c)
    yield Step("backward: dG M^T, d scale", mixer + 12 * square, 2.0 * k * square, TENSOR32, 1)
    yield Step("backward: M^T dG M^T, packed", 10 * square, 2.0 * k * square, TENSOR32, 1)


def table(found: list[Step]) -> str:
    """A row a step, and their sum, as Markdown."""
    rows = [(s.name, s.launches, s.bytes, s.flops, s.seconds) for s in found]
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, 5))))  # type: ignore[arg-type]
    lines = ["| step | launches | MB | Gflop | us |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {launches} | {moved / 1e6:.0f} | {flops / 1e9:.1f} | {1e6 * seconds:.0f} |"
              for name, launches, moved, flops, seconds in rows]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 24), ("large", 4096), ("d", 1024), ("l", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    shape = LayerShape.of(options.large, options.d, SSVDOConfig(inner_ratio=options.p, outer_rank=options.l))
    print(table(list(steps(options.layers, shape, options.dtype == "bfloat16"))))


if __name__ == "__main__":
    main()
