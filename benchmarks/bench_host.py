"""What Python takes for a layer on a GPU, without one: microseconds of one core, and launches, forward + backward.

    python -m benchmarks.bench_host [--rounds 12] [--cases cached merged] [--profile cached] [--out DIR]

Layers are so small that the arithmetic takes nothing; the GPU is fake (fake_gpu.py). Times are the least of the rounds'
means, in time of this process, on one thread.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo, gradient_accumulation

from .fake_gpu import FakeGPU, fake_gpu
from .peers import lora
from .record import facts, stem
from .report import as_markdown

SIZES = {"tall": (32, 16), "wide": (16, 32)}
RANK = 16
LAYERS = 24
STEPS = 48  # in a round
GROUP = f"prepared in a group of {LAYERS}"
GOALS = {"cached": (150, 10), GROUP: (200, 12), "merged": (80, None), "one token": (40, None)}
"""Microseconds and launches a layer; of "one token" beside nn.Linear's own."""
Step = Callable[[], object]


def adapted(kind: str, **options: Any) -> SSVDOLinear:
    """A layer of p = 1, l = 16 in bfloat16: its rows are aligned, as those of real layers are."""
    config = SSVDOConfig(inner_ratio=1.0, outer_rank=RANK, backend="triton", **options)
    return SSVDOLinear.from_linear(linear(kind), config)


def linear(kind: str) -> nn.Linear:
    """The pretrained layer."""
    m, n = SIZES[kind]
    torch.manual_seed(0)
    return nn.Linear(n, m).bfloat16().requires_grad_(False)


def rows(kind: str, count: int) -> tuple[Tensor, Tensor]:
    """(x, dy)"""
    m, n = SIZES[kind]
    return torch.randn(count, n).bfloat16().requires_grad_(), torch.randn(count, m).bfloat16()


def training_step(module: nn.Module, kind: str) -> Step:
    """Forward and backward of one layer."""
    x, dy = rows(kind, 4)

    def step() -> None:
        x.grad = None
        module(x).backward(dy)

    return step


def group_step(kind: str) -> Step:
    """Forward and backward of a group's layers, each prepared anew, as a step of any optimiser makes it."""
    model = nn.ModuleList(linear(kind) for _ in range(LAYERS))
    config = SSVDOConfig(inner_ratio=1.0, outer_rank=RANK, backend="triton", target_modules="all-linear")
    layers = list(apply_ssvdo(model, config))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD([torch.zeros(1)])
    x, dy = rows(kind, 4)

    def step() -> None:
        x.grad = None
        for p in trained:
            p.grad = None
        optimiser.step()
        torch.autograd.backward([layer(x) for layer in layers], [dy] * LAYERS)

    return step


def token_step(module: nn.Module, kind: str) -> Step:
    """A forward of one row without gradients."""
    x, _ = rows(kind, 1)

    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


Make = Callable[[str, ExitStack], Step]


def cached(path: str) -> Make:
    """The parameters do not change between steps."""

    def make(kind: str, stack: ExitStack) -> Step:
        layer = adapted(kind, path=path)
        stack.enter_context(gradient_accumulation(layer))
        return training_step(layer, kind)

    return make


CASES: dict[str, Make] = {
    "frozen": lambda kind, _: training_step(linear(kind), kind),
    "LoRA": lambda kind, _: training_step(lora(linear(kind), RANK), kind),
    "cached": cached("folded"),
    GROUP: lambda kind, _: group_step(kind),
    "merged": cached("merged"),
    "one token, nn.Linear": lambda kind, _: token_step(linear(kind), kind),
    "one token": lambda kind, _: token_step(adapted(kind, path="folded"), kind),
    "one token, merged": lambda kind, _: token_step(adapted(kind, path="merged"), kind),
}


def microseconds(step: Step, layers: int, rounds: int) -> float:
    """Of this process's time for a layer."""
    count = max(1, STEPS // layers)
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(count):
            step()
        found.append(time.process_time() - start)
    return 1e6 * min(found) / count / layers


@contextmanager
def ready(case: str, kind: str) -> Iterator[Step]:
    """The step of a case, warm."""
    with ExitStack() as stack:
        step = CASES[case](kind, stack)
        for _ in range(3):
            step()
        yield step


def measure(gpu: FakeGPU, cases: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each case and kind of layer."""
    found = []
    for case, kind in itertools.product(cases, SIZES):
        layers = LAYERS if case == GROUP else 1
        with ready(case, kind) as step:
            with gpu.counting() as started:
                step()
            found.append({"case": case, "kind": kind, "us": microseconds(step, layers, rounds),
                          "launches": started.total() / layers, "by": dict(started.most_common())})  # fmt: skip
    return found


def profile(case: str) -> None:
    """Prints where the time of a case goes, tall."""
    seen = cProfile.Profile()
    with ready(case, "tall") as step:
        seen.enable()
        for _ in range(STEPS):
            step()
        seen.disable()
    pstats.Stats(seen).sort_stats("tottime").print_stats(30)


def markdown(results: dict[str, Any]) -> str:
    """The rows as a table, tall and wide beside one another."""
    by = {(r["case"], r["kind"]): r for r in results["rows"]}
    lines = []
    for name in dict.fromkeys(r["case"] for r in results["rows"]):
        pair = [by[name, kind] for kind in SIZES]
        goal = [f"{g}" if g else "-" for g in GOALS.get(name, (None, None))]
        lines.append([name, *(f"{r['us']:.0f}" for r in pair), goal[0], *(f"{r['launches']:.1f}" for r in pair),
                      goal[1]])  # fmt: skip
    header = ["forward + backward, a layer", "us, tall", "us, wide", "goal", "launches, tall", "launches, wide", "goal"]
    return "\n".join([
        f"{results['device']}, one thread, torch {results['torch']}, Triton {results['triton']}, commit "
        f"{results['commit']}, {results['date']}. A fake GPU: Python's part alone. \"One token\" is a forward without "
        "gradients; its goal is beyond nn.Linear's.", "", *as_markdown(header, lines)]) + "\n"  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--profile", choices=CASES, metavar="CASE", help="print where its time goes, and no table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    import triton

    torch.set_num_threads(1)
    with fake_gpu() as gpu:
        if options.profile:
            profile(options.profile)
            return
        results = {**facts("cpu"), "triton": triton.__version__, "rows": measure(gpu, options.cases, options.rounds)}
    path = stem(options.out, results, "host")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results), f"results: {path}.json and .md", sep="\n")


if __name__ == "__main__":
    main()
