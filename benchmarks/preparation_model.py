"""Counts what the CUDA kernels of preparation launch, move and compute: what a GPU could at best take, without one.

    python -m benchmarks.preparation_model [--layers 24] [--large 4096] [--d 1024] [--p 0.5] [--l 64] [--dtype bfloat16]

A product takes the longer of its bytes at the memory's bandwidth and its operations at the rate of `mma.sync`, the
instruction of csrc/core/mma.h: on an H100 about 0.62 of the data sheet, which only `wgmma` reaches. A half-precision
weight takes three products of bfloat16 numbers, two where the product is `coarse` (csrc/cuda/plans.h), all else three
of tf32. Bytes are those of each operand once, of the result, and of sums that teams put aside and read again; nothing
is taken to stay in a cache. Operations are those of the team that has most of them, in whole tiles, as csrc/cuda
shares them out. Launches, meetings of a layer's teams and columns of Gauss-Jordan are taken at the times below, which
are guesses from instruction counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.config import LayerShape

BANDWIDTH = 3.35e12
BRAIN, TENSOR32 = 0.62 * 989e12 / 3, 0.62 * 494e12 / 3  # of products in three pieces
LAUNCH, MEETING, COLUMN = 3e-6, 2e-6, 0.085e-6  # seconds; a column: 150 cycles
PROCESSORS, TEAMS = 132, 2 * 132  # two teams share a processor and its rate
M, N, WARP, B = 128, 64, 32, 64  # rows and columns of a tile, rows of a warp; a block of the inverse


@dataclass(frozen=True)
class Step:
    """Of all layers together. flops: what there is to compute; most: what the processor with most of it computes;
    launches: kernels that begin with it; alone: seconds that nothing can hide."""

    name: str
    bytes: float = 0.0
    flops: float = 0.0
    most: float = 0.0
    rate: float = TENSOR32
    launches: int = 0
    alone: float = 0.0

    @property
    def seconds(self) -> float:
        """The longer of what is moved and what is computed, and what comes on top."""
        return max(self.bytes / BANDWIDTH, self.most * PROCESSORS / self.rate) + self.alone + LAUNCH * self.launches


@dataclass(frozen=True)
class Term:
    """A (rows x depth) B (depth x columns). half: A is of half precision; twice: B is A, read once; coarse: B in two
    pieces where A is of half precision."""

    depth: int
    half: bool = False
    twice: bool = False
    coarse: bool = False

    @property
    def rate(self) -> float:
        return (1.5 if self.coarse else 1.0) * BRAIN if self.half else TENSOR32


def shared(tiles: int, depth: int, teams: int, sums: float, coarse: bool = False) -> tuple[int, int]:
    """(teams, parts of a tile's depth) as by `Task::share` of csrc/cuda/outer.h. sums: of each tile that have room."""
    many = int(min(tiles * min(sums - 1, depth // 64), teams))
    if 8 * tiles >= (5 if coarse else 8) * many or depth - depth * tiles // many <= 512:
        return teams, 1
    return many, min(many, depth // 32)


def steps(layers: int, shape: LayerShape, half: bool) -> Iterator[Step]:
    """Forward, then backward, of `layers` layers of one shape in the order of csrc/cuda; rotation="cayley"."""
    large, d, c, k, l = shape.large, shape.d, shape.c, shape.k, shape.l  # noqa: E741
    square, teams = layers * k * k, max(1, min(TEAMS // layers, 256))
    room = max(4, min(32, 96 // layers)) * d * l

    def product(
        name: str, rows: int, terms: list[Term], columns: int = l, launches: int = 0, addend: int = 0, met: int = 1
    ) -> Step:  # met: meetings before it
        tiles, depth = -(-rows // M) * -(-columns // N), sum(t.depth for t in terms)
        many, parts = shared(tiles, depth, teams, room // (rows * columns), all(t.coarse for t in terms))
        pieces = many + tiles - gcd(many, tiles) if parts > 1 else 0  # that teams put aside
        moved = 4 * columns * (rows + addend) + 8 * pieces * min(rows, M) * min(columns, N)
        seconds = 0.0
        for t in terms:
            moved += (2 if t.half else 4) * rows * t.depth + (0 if t.twice else 4 * t.depth * columns)
            deep = -(-t.depth // (32 * parts)) * 32
            seconds += -(-tiles * parts // many) * min(deep, t.depth) / t.rate
        rate = min(t.rate for t in terms)
        pair = 1 if layers == 1 and min(many, tiles * parts) <= PROCESSORS else 2  # two layers' n-th teams lie together
        high = min(M, -(-rows // WARP) * WARP)  # warps below the last row have nothing to multiply
        most = pair * 2.0 * high * N * seconds * rate
        return Step(name, layers * moved, 2.0 * layers * rows * depth * columns, most, rate, launches,
                    MEETING * (met + (parts > 1)))  # fmt: skip

    def projection(way: str, first: int, rows: int) -> Iterator[Step]:
        passes = 2 if half else 1
        for turn in range(passes):
            exact = turn + 1 == passes
            count = rows if exact else large
            yield product(f"{way}: A^T z", d, [Term(first, half, coarse=not exact)], launches=int(turn == 0), met=turn)
            yield product(f"{way}: V^T", d, [Term(d, half, coarse=half)])
            yield product(f"{way}: V", d, [Term(d, half, coarse=half)])
            yield product(f"{way}: z - A", count, [Term(d, half, coarse=half)], addend=min(first, count))
            first = large

    mixer = 4 * layers * (shape.width + l) * shape.width
    yield Step("forward: zeros, stacked dS", launches=2)
    side = -(-k // B)
    sharing = min(teams, side * side)
    block = 2.0 * B**3 * (2 if layers * sharing > PROCESSORS else 1)  # a product of two, by all teams of a processor
    most = -(-side * side // sharing)
    ahead = -(-(side * side + 2) // sharing) if side > 1 else most  # a pivot is as much work as two tiles
    step = max(8 * square / BANDWIDTH, (ahead + 2) * block * PROCESSORS / TENSOR32)
    first = COLUMN * B + step * max(1, ahead - 2) / ahead  # of the team that inverts the next pivot
    # Each team inverts the first pivot; the first step reads packed K, the last writes M as well.
    yield Step("forward: (I + K)^-1, in blocks, and M", (8 * side - 2) * square + mixer, 2.0 * k * square,
               side * (ahead + 2) * block, TENSOR32, 1,
               COLUMN * B + MEETING * side + (side - 1) * max(0.0, first - step))  # fmt: skip
    thin = -(-side // sharing)
    if most > 2 * thin + 1:
        yield Step("forward: its probes", 6 * square + 16 * layers * k * B, 4.0 * B * square, 2 * thin * side * block,
                   alone=2 * MEETING)  # fmt: skip
    else:
        yield Step("forward: its residual", 10 * square, 2.0 * k * square, most * side * block, alone=MEETING)
    yield from projection("forward", c, large)
    yield product("forward: Z^T Z", l, [Term(large, twice=True)])
    yield Step("forward: the factor", 12 * layers * l * l, launches=1, alone=COLUMN * l)
    yield product("forward: F = Z X + U_l (sqrt(tau) X - I)", large, [Term(l), Term(l, half)], launches=1, met=0)
    yield Step("forward: verdict", launches=1)
    yield Step("backward: zeros", launches=1)
    yield from projection("backward", large, c)
    yield product("backward: dX = L^T E + sqrt(tau) U_l^T dF", l, [Term(c), Term(large, half)])
    yield product("backward: dX^T X", l, [Term(l)])
    one = l <= N  # a team makes these, and meets nobody in between
    yield Step("backward: H", 16 * layers * l * l, alone=0 if one else 2 * MEETING)
    for name, met in (("H X^T", 0), ("(sqrt(tau) X - I) H X^T", 1)):
        yield product(f"backward: {name}", l, [Term(l)], met=0 if one else met)
    yield product("backward: dL", c, [Term(l), Term(l), Term(l, half)])

    def waves(jobs: int, flops: float) -> float:  # of a launch whose teams wait for nobody
        return -(-layers * jobs // PROCESSORS) * flops

    yield Step("backward: dG M^T, d scale", mixer + 12 * square, 2.0 * k * square,
               waves(-(-k // M) * side, 2.0 * M * N * k), TENSOR32, 1)  # fmt: skip
    tile = 2.0 * B * B * k  # a team has two of them, or one of the diagonal
    yield Step("backward: M^T dG M^T, packed", 10 * square, 2.0 * k * square, max(waves(side * side, tile), 2 * tile),
               TENSOR32, 1)  # fmt: skip


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
