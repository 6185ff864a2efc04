"""Forward and backward of one layer: SSVD-O, its forms and its peers, interleaved, as ratios to a frozen nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, gradient_accumulation
from ssvdo_kernels.planner import FORMS

from .peers import peers
from .runner import interleave, peak_extra_bytes

EVERY, CACHED, PLAIN = "SSVD-O, prepared every step", "SSVD-O, cached", "SSVD-O, accumulating without the context"
ROUNDS = {128: 15, 1024: 5, 4096: 3}
COSTLY = ("full", "DoRA", "PiSSA", "OFT", "dense SSVD-O")  # left out of --quick at 4096 tokens


def training_step(
    module: nn.Module, x: Tensor, dy: Tensor, before: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Forward and backward from a fixed dy, gradients to x and to what trains (summed, as when accumulating)."""

    def step() -> None:
        if before is not None:
            before()
        x.grad = None
        module(x).backward(dy)

    return step


def test_layer(
    case: tuple[str, int, int, float, int], benchmark: Any, request: pytest.FixtureRequest, tmp_path_factory: Any
) -> None:
    """One point of the grid; its rows land in the JSON's extra_info."""
    kind, d, tokens, p, rank = case
    quick = request.config.getoption("--quick")
    device = torch.device(request.config.getoption("--device"))
    dtype = getattr(torch, request.config.getoption("--dtype"))
    out_features, in_features = {"tall": (4 * d, d), "wide": (d, 4 * d), "square": (d, d)}[kind]
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, in_features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, out_features, device=device, dtype=dtype)
    cache = Path(tmp_path_factory.getbasetemp()) / "factors"

    def ours(path: str = "auto") -> SSVDOLinear:
        config = SSVDOConfig(inner_ratio=p, outer_rank=rank)
        return SSVDOLinear.from_linear(linear, replace(config, path=path), cache_dir=cache)

    skipped = COSTLY if quick and tokens == 4096 else ()
    modules = {name: make(linear) for name, make in peers(p, rank).items() if name not in skipped}
    steps = {name: training_step(module, x, dy) for name, module in modules.items()}
    fresh = ours()
    steps[EVERY] = training_step(fresh, x, dy, fresh.refresh)
    steps[PLAIN] = training_step(ours(), x, dy)
    cached = ours()
    forms = FORMS if not quick or p == 0.5 else ()
    with ExitStack() as stack:
        for name, layer in {CACHED: cached, **{f"form: {form}": ours(form) for form in forms}}.items():
            stack.enter_context(gradient_accumulation(layer))
            steps[name] = training_step(layer, x, dy)
        for _ in range(2):  # the planner sees a few batches before it is timed, as it would in accumulation
            steps[CACHED]()
        timings = interleave(steps, ROUNDS[tokens], "frozen", device)
        memory = {name: peak_extra_bytes(steps[name], device) for name in steps if not name.startswith("form")}
        benchmark.pedantic(steps[CACHED], rounds=1)
    chosen = cached.plan(tokens)
    by_form = {form: timings[f"form: {form}"].median_ms for form in forms}
    benchmark.extra_info.update(
        case={"kind": kind, "d": d, "tokens": tokens, "p": p, "l": rank},
        methods={name: {**asdict(t), "peak_extra_mb": memory.get(name, 0) / 1e6} for name, t in timings.items()},
        planner={"chosen": chosen, "fastest": min(by_form, key=by_form.__getitem__) if forms else None,
                 "loss": by_form[chosen] / min(by_form.values()) - 1 if forms else None},
    )  # fmt: skip
