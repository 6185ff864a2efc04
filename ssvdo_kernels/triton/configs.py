"""Launch configurations that are shipped, by kernel and precision; the first that a device has room for is its default.

Every entry compiles without spills for every architecture whose blocks may have as much shared memory: docs/kernels.md,
made by `python -m benchmarks.kernel_table`, tested in tests/triton_kernels/test_compile.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FUSED_WIDTH = {"half": 128, "tf32": 128, "fp32": 64, "fp64": 32}
"""The widest V (columns) that the one-pass kernels hold on chip; beyond it `add_product` takes a second launch."""
FUSED_EXTRA = 128
"""The most columns of z that one-pass `contract` holds on chip."""
WIDE, WIDE_EXTRA = 256, 64
"""As many in half precision where one pass is timed against two launches."""


SHARED = {"8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "9.0": 227, "10.0": 227, "10.3": 227, "12.0": 99, "12.1": 99}
"""KiB of shared memory that a block may have, by compute capability (CUDA programming guide, table 30)."""


@dataclass(frozen=True)
class Config:
    """Block sizes by the kernels' own names and in their order, warps, pipeline stages; the KiB of shared memory that a
    device's blocks must be allowed. persistent: of the kernels of persistent.py. capability: the only one it is for."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    shared: int = 99
    persistent: bool = False
    capability: str = ""

    @property
    def meta(self) -> dict[str, int]:
        """Block sizes as keyword arguments."""
        return dict(self.blocks)


TWO = Config((), 0, 0)
"""Two launches in place of one."""


def _config(warps: int, stages: int, shared: int, **blocks: int) -> Config:
    return Config(tuple(blocks.items()), warps, stages, shared)


def _one_pass(t: int, d: int, n: int, warps: int, stages: int, shared: int = 99) -> Config:
    return _config(warps, stages, shared, BLOCK_T=t, BLOCK_D=d, BLOCK_N=n)


def _persistent(rows: int, stages: int, capability: str = "") -> Config:
    return replace(_one_pass(rows, 64, 64, 8, stages, 227), persistent=True, capability=capability)


def _product(t: int, n: int, k: int, warps: int, stages: int) -> Config:
    return _config(warps, stages, 99, BLOCK_T=t, BLOCK_N=n, BLOCK_K=k, GROUP_T=8)


CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {
    "expand": {
        "half": (_one_pass(64, 64, 64, 4, 3), _one_pass(128, 64, 64, 8, 3, 163)),
        "tf32": (_one_pass(64, 32, 32, 4, 2),),
        "fp32": (_one_pass(32, 32, 32, 8, 2),),
        "fp64": (_one_pass(32, 16, 16, 4, 2),),
    },
    "contract": {
        "half": (_one_pass(64, 64, 64, 4, 3, 163), _one_pass(128, 64, 64, 8, 3, 163), _one_pass(64, 32, 32, 4, 2)),
        "tf32": (_one_pass(64, 32, 32, 4, 2, 163), _one_pass(32, 32, 32, 4, 2)),
        "fp32": (_one_pass(32, 32, 32, 4, 2),),
        "fp64": (_one_pass(32, 16, 16, 8, 2),),
    },
    "wide_expand": {"half": (TWO, _one_pass(64, 64, 64, 8, 3, 163), _persistent(128, 4))},
    "wide_contract": {"half": (TWO, _one_pass(64, 64, 64, 8, 3, 163), _persistent(128, 4, "9.0"), _persistent(64, 3))},
    "add_product": {
        "half": (_product(128, 128, 64, 8, 3), _product(64, 128, 64, 4, 3),
                 _product(64, 64, 32, 4, 3)),
        "tf32": (_product(64, 128, 32, 4, 3), _product(128, 128, 32, 8, 3), _product(64, 64, 32, 4, 3)),
        "fp32": (_product(64, 64, 16, 8, 2), _product(32, 64, 16, 4, 2)),
        "fp64": (_product(64, 32, 16, 4, 2),),
    },
}  # fmt: skip


def candidates(kernel: str, precision: str, capability: str) -> tuple[Config, ...]:
    """Those of a kernel for a device's compute capability; of an unknown one, for the least shared memory."""
    shared = SHARED.get(capability, min(SHARED.values()))
    return tuple(c for c in CONFIGS[kernel].get(precision, ())
                 if c.shared <= shared and c.capability in ("", capability))  # fmt: skip
