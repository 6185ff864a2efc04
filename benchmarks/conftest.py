"""Options of the benchmark suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--quick, --device and --dtype."""
    group = parser.getgroup("ssvdo")
    group.addoption("--quick", action="store_true", help="1024 <-> 4096, l = 64 only; under 3 minutes on 2 cores")
    group.addoption("--minutes", type=float, help="skip what has not begun after so many minutes")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--dtype", default="float32", help="float32, bfloat16, float16 or float64")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draws the grid: quick; on a GPU 1024 <-> 4096, the most telling first; on a CPU d = 256, 512 and 1024."""
    if "case" not in metafunc.fixturenames:
        return
    gpu = metafunc.config.getoption("--device").startswith("cuda")
    counts = (2048, 16384) if gpu else (128, 1024, 4096)
    if metafunc.config.getoption("--quick"):
        cases = [(kind, 1024, tokens, p, 64) for kind in ("tall", "wide") for p in (0.5, 0.25)
                 for tokens in counts]
    elif gpu:
        cases = [(kind, 1024, tokens, p, rank) for rank in (64, 256, 0) for p in (0.25, 0.5, 1.0)
                 for kind in ("tall", "wide") for tokens in (16384, 2048, 65536, 256, 16)]
    else:
        cases = [(kind, d, tokens, p, rank) for kind in ("tall", "wide", "square") for d in (256, 512, 1024)
                 for p in (0.25, 0.5, 1.0) for rank in ((0,) if kind == "square" else (0, 64, 128))
                 for tokens in counts]
    metafunc.parametrize("case", cases, ids=["{}-{}-T{}-p{}-l{}".format(*c) for c in cases])
