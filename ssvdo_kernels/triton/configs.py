"""Launch configurations that are shipped, by kernel and precision; the first of each is the default.

Every entry compiles for sm_80, sm_90 and sm_100 without spills and within their shared memory: docs/kernels.md, made by
`python -m benchmarks.kernel_table`, tested in tests/triton_kernels/test_compile.py.
"""

from __future__ import annotations

from dataclasses import dataclass

FUSED_WIDTH = {"half": 128, "tf32": 128, "fp32": 64, "fp64": 32}
"""The widest V (columns) that the one-pass kernels hold on chip; beyond it `add_product` takes a second launch."""
FUSED_EXTRA = 128
"""The most columns of z that one-pass `contract` holds on chip."""


@dataclass(frozen=True)
class Config:
    """Block sizes by the kernels' own names, warps and pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    @property
    def meta(self) -> dict[str, int]:
        """Block sizes as keyword arguments."""
        return dict(self.blocks)


def _config(warps: int, stages: int, **blocks: int) -> Config:
    return Config(tuple(blocks.items()), warps, stages)


def _one_pass(t: int, d: int, n: int, warps: int, stages: int) -> Config:
    return _config(warps, stages, BLOCK_T=t, BLOCK_D=d, BLOCK_N=n)


def _product(t: int, n: int, k: int, warps: int, stages: int) -> Config:
    return _config(warps, stages, BLOCK_T=t, BLOCK_N=n, BLOCK_K=k, GROUP_T=8)


def _reduce(p: int, q: int, t: int, warps: int, stages: int) -> Config:
    return _config(warps, stages, BLOCK_P=p, BLOCK_Q=q, BLOCK_T=t)


_ONE_PASS = {
    "half": (_one_pass(64, 64, 64, 4, 3), _one_pass(128, 64, 64, 8, 3)),
    "tf32": (_one_pass(64, 32, 32, 4, 2),),
    "fp32": (_one_pass(32, 32, 32, 4, 2),),
    "fp64": (_one_pass(32, 16, 16, 4, 2),),
}  # fmt: skip
CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {
    "expand": _ONE_PASS,
    "contract": _ONE_PASS,
    "add_product": {
        "half": (_product(128, 128, 64, 8, 3), _product(64, 128, 64, 4, 3),
                 _product(64, 64, 64, 4, 3)),
        "tf32": (_product(64, 128, 32, 4, 3), _product(128, 128, 32, 8, 3), _product(64, 64, 32, 4, 3)),
        "fp32": (_product(64, 64, 16, 8, 2), _product(32, 64, 16, 4, 2)),
        "fp64": (_product(64, 32, 16, 4, 2),),
    },
    "reduce_rows": {
        "half": (_reduce(128, 64, 64, 8, 3), _reduce(128, 128, 64, 8, 3), _reduce(64, 64, 64, 4, 3)),
        "tf32": (_reduce(64, 64, 32, 4, 3), _reduce(128, 64, 32, 4, 3)),
        "fp32": (_reduce(64, 64, 16, 8, 2),),
        "fp64": (_reduce(32, 32, 16, 4, 2),),
    },
}  # fmt: skip
