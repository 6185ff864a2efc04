"""Whole models: a training step and decoding token by token, each method against the frozen model in the same run.

    python -m benchmarks.bench_model owsm-0.1b --device cpu --dtype float32 --batch 1
    python -m benchmarks.bench_model owsm-0.1b owsm-1b whisper-large --minutes 9
    python -m benchmarks.bench_model owsm-0.1b --device cpu --batch 1 --rounds 0 --methods LoRA "SSVD-O, p=0.5"

A training step is forward, backward, AdamW (fused on a GPU) and the setting of gradients to None; "frozen" is forward
and backward to the input alone. All methods adapt the feed-forward layers (LoRA's rank is l). Decoding: one utterance,
its keys and values kept; the time of one token. Memory: see memory.py; `--rounds 0` measures it alone, without times.
On a GPU "host" is a step of a few tokens: what Python and launches take. Only the frozen model and one method are in
memory at once; each row is on disk once it is measured, and the same command goes on where it was cut.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, merge_ssvdo, remove_ssvdo

from . import memory
from .peers import DenseSSVDO, EspnetStyleSSVD, with_lora
from .record import Rows
from .report import MEMORY, as_markdown, memory_cells
from .runner import interleave, launches, peak_extra_bytes, synchronize
from .stacks import STACKS, FeedForward, Recogniser, Stack

Make = Callable[[nn.Module], nn.Module]


def replacing(peer: Callable[[nn.Linear], nn.Module]) -> Make:
    """`peer` in the place of each feed-forward layer; made once for each shape, as the weights are the same."""

    def make(model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        made: dict[tuple[int, int], nn.Module] = {}
        for layer in [m for m in model.modules() if isinstance(m, FeedForward)]:
            for name in ("w_1", "w_2"):
                linear = getattr(layer, name)
                key = (linear.out_features, linear.in_features)
                if key not in made:
                    made[key] = peer(linear)
                setattr(layer, name, copy.deepcopy(made[key]))
        return model

    return make


def adapting(p: float, rank: int, cache: Path) -> Make:
    """SSVD-O; each shape is factorised once."""
    config = SSVDOConfig(inner_ratio=p, outer_rank=rank)
    return lambda model: apply_ssvdo(model, config, cache_dir=cache)


def methods(rank: int, cache: Path, compiled: bool) -> dict[str, Make]:
    """Name -> what makes the method's model out of a pretrained one."""
    dense = SSVDOConfig(inner_ratio=0.5, outer_rank=rank)
    found: dict[str, Make] = {
        "frozen": lambda model: model.requires_grad_(False),
        "full": lambda model: model.requires_grad_(True),
        "LoRA": lambda model: with_lora(model, ("w_1", "w_2"), rank),
        "LoRA, float32": lambda model: with_lora(model, ("w_1", "w_2"), rank, single=True),
        "DoRA": lambda model: with_lora(model, ("w_1", "w_2"), rank, use_dora=True),
        "ESPnet-style SSVD, p=0.5": replacing(lambda linear: EspnetStyleSSVD(linear, 0.5)),
        "dense SSVD-O, p=0.5": replacing(lambda linear: DenseSSVDO(linear, dense)),
        "SSVD-O, p=0.25": adapting(0.25, rank, cache),
        "SSVD-O, p=0.5": adapting(0.5, rank, cache),
    }
    for name in ("frozen", "LoRA", "SSVD-O, p=0.25") if compiled else ():
        found[f"{name}, compiled"] = lambda model, make=found[name]: torch.compile(make(model))  # type: ignore[misc]
    return found


def training_step(model: nn.Module, frames: Tensor, tokens: Tensor) -> Callable[[], None]:
    """Forward, backward and, where something trains, an AdamW step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, 1e-5, weight_decay=0.0, fused=frames.is_cuda) if trained else None
    x = frames.clone().requires_grad_()

    def step() -> None:
        x.grad = None
        model(x, tokens).backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return step


def inputs(stack: Stack, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(frames, tokens) of a training step."""
    frames = torch.randn(batch, stack.frames, stack.width).to(like)
    return frames, torch.randint(stack.vocabulary, (batch, stack.labels + 1), device=like.device)


def pretrained(stack: Stack, device: str, dtype: torch.dtype) -> nn.Module:
    """The frozen model; the same numbers every time."""
    torch.manual_seed(0)
    return Recogniser(stack).to(device, dtype).requires_grad_(False)


def host_ms(stack: Stack, model: nn.Module, like: Tensor) -> float:
    """Milliseconds of a training step of so few tokens that the GPU waits for Python."""
    step = training_step(model, *inputs(replace(stack, frames=8, labels=4), 1, like))
    found = []
    for _ in range(6):
        synchronize(like.device)
        start = time.perf_counter()
        step()
        synchronize(like.device)
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[1:])


def train(stack: Stack, models: dict[str, nn.Module], batch: int, rounds: int, weight: Tensor) -> dict[str, Any]:
    """Median step, ratio to the frozen model, tokens a second, allocations and launches, by method."""
    frames, tokens = inputs(stack, batch, weight)
    steps = {name: training_step(model, frames, tokens) for name, model in models.items()}
    if not rounds:
        for step in steps.values():
            step()  # for what is held afterwards
        return {name: {} for name in steps}
    timings = interleave(steps, rounds, "frozen", weight.device, whole=True)
    count = batch * (stack.frames + stack.labels)
    return {name: {
        **asdict(timings[name]), "tokens_per_second": 1e3 * count / timings[name].median_ms,
        "peak_extra_mb": peak_extra_bytes(steps[name], weight.device) / 1e6,
        "launches": launches(steps[name]) if weight.is_cuda else None,
        "host_ms": host_ms(stack, models[name], weight) if weight.is_cuda else None,
    } for name in steps}  # fmt: skip


def model_peak(
    stack: Stack, batch: int, rank: int, cache: Path, device: str, dtype: torch.dtype, name: str
) -> float | None:
    """MiB that training steps of one method take beyond the pretrained model and its input."""
    make = methods(rank, cache, False)[name]

    def peak(stack: Stack, batch: int) -> float | None:
        frames, tokens = inputs(stack, batch, torch.empty(0, device=device, dtype=dtype))
        return memory.training_peak(
            lambda: pretrained(stack, device, dtype), lambda model: make(model).train(),
            lambda model: training_step(model, frames, tokens), torch.device(device))

    # A small one first loads what the method needs of libraries, which is not the method's.
    peak(Stack(2 * rank, 1, 1, 2, stack.branchformer, frames=8, labels=4, vocabulary=16), 1)
    return peak(stack, batch)


@lru_cache(maxsize=2)  # "frozen" is asked for with each method
def peak_of(
    stack: Stack, batch: int, rank: int, cache: Path, device: str, dtype: torch.dtype, name: str
) -> float | None:
    """`model_peak` where it can be told: here on a GPU, else in a process of its own. None for compiled models."""
    if name.endswith("compiled"):
        return None
    arguments = (stack, batch, rank, cache, device, dtype, name)
    found: float | None = model_peak(*arguments) if device == "cuda" else memory.alone(
        model_peak, *arguments)
    return found


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Replays of the CUDA graph of a step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


@torch.no_grad()
def decode(
    stack: Stack, models: dict[str, nn.Module], rounds: int, length: int = 16, graphs: bool = False
) -> dict[str, Any]:
    """Milliseconds a token and the ratio to the model "plain", for one utterance; graphs: all tokens as a CUDA graph,
    the model "plain" too."""
    base: Any = models["plain"]
    weight = next(base.parameters())
    memory = torch.randn(1, stack.frames, stack.width).to(weight)
    memories = [block.src_attn.keys_and_values(memory) for block in base.decoder]
    start = torch.zeros(1, 1, dtype=torch.long, device=weight.device)

    def speak(model: Any) -> Callable[[], object]:
        recogniser = model.eval().get_base_model() if hasattr(model, "get_base_model") else model.eval()

        def step() -> object:
            return list(recogniser.decode(memories, start, length))

        return captured(step) if graphs else step

    timings = interleave({n: speak(model) for n, model in models.items()}, rounds, "plain", weight.device, whole=True)
    return {name: {"ms_per_token": t.median_ms / length, "ratio": t.ratio} for name, t in timings.items()}


def decoded(stack: Stack, base: nn.Module, method: str, model: nn.Module, rounds: int) -> dict[str, Any]:
    """`decode` of a method, on a GPU as a graph, too: SSVD-O unmerged, merged and with plain layers in its place, LoRA,
    "plain" for the frozen model; of others nothing."""
    if not method.startswith(("frozen", "LoRA", "SSVD-O")) or method.endswith("compiled"):
        return {}
    found: dict[str, Any] = {}

    def add(name: str) -> None:
        found[name] = decode(stack, {"plain": base, name: model}, rounds)[name]
        if next(base.parameters()).is_cuda:
            try:
                found[f"{name}, graph"] = decode(stack, {"plain": base, name: model}, rounds, graphs=True)[name]
            except RuntimeError as error:  # the row has more than this
                found[f"{name}, graph"] = {"error": str(error).partition("\n")[0]}

    add("plain" if method == "frozen" else method.replace("SSVD-O", "unmerged"))
    if method.startswith("SSVD-O"):
        merge_ssvdo(model)
        add(method.replace("SSVD-O", "merged"))
        remove_ssvdo(model, merge=True)
        add(method.replace("SSVD-O", "removed"))
    return found


def measure(
    model: str, method: str, stack: Stack, batch: int, rank: int, device: str, dtype: torch.dtype, rounds: int,
    compiled: bool, cache: Path,
) -> dict[str, Any]:  # fmt: skip
    """The row of one method on one model, beside the frozen model."""
    base = pretrained(stack, device, dtype)
    weight = next(base.parameters())
    adapted = sum(w.weight.nbytes for m in base.modules() if isinstance(m, FeedForward) for w in (m.w_1, m.w_2))
    make = methods(rank, cache, compiled)[method]
    models = {"frozen": base} if method == "frozen" else {"frozen": base, method: make(copy.deepcopy(base))}
    trained = train(stack, {n: m.train() for n, m in models.items()}, batch, rounds, weight)[method]
    kept = memory.beside(models, base, adapted)[method]
    count = sum(p.numel() for p in models[method].parameters() if p.requires_grad)
    said = decoded(stack, base, method, models[method], rounds) if rounds else {}
    parameters = sum(p.numel() for p in base.parameters())
    del models, base, weight
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    peaks = memory.peaks((method,), lambda name: peak_of(stack, batch, rank, cache, device, dtype, name))
    return {"model": model, "method": method, "batch": batch, "tokens": batch * (stack.frames + stack.labels),
            "l": rank, "parameters": parameters, "decoding": said,
            "training": {**trained, **kept, "peak_mib": peaks[method], "trained": count}}  # fmt: skip


TIMES = ("training step", "ms", "ratio to frozen", "tokens/s", "a step's allocations, MB", "launches", "host, ms")


def _times(m: dict[str, Any]) -> list[str]:
    if "median_ms" not in m:
        return ["-"] * 6
    return [f"{m['median_ms']:.1f}", f"{m['ratio']:.2f}", f"{m['tokens_per_second']:.0f}", f"{m['peak_extra_mb']:.0f}",
            str(m["launches"] or "-"), "-" if m["host_ms"] is None else f"{m['host_ms']:.1f}"]  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The rows as Markdown tables."""
    lines = [f"{results['device']}, {results['threads']} threads, {results['dtype']}, torch {results['torch']}, commit "
             f"{results['commit']}, {results['date']}. Random weights; ratios within one run, medians."]  # fmt: skip
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        by_model.setdefault(row["model"], []).append(row)
    for name, rows in by_model.items():
        one = rows[0]
        lines += ["", f"**{name}** ({one['parameters'] / 1e6:.0f} M parameters), {one['tokens']} tokens a "
                  f"step, l = r = {one['l']}", "",
                  *as_markdown([*TIMES, *MEMORY, "trained"],
                               [[r["method"], *_times(m), *memory_cells(m), f"{m['trained']:,}"]
                                for r in rows for m in [r["training"]]])]  # fmt: skip
        said = {n: m for r in rows for n, m in r["decoding"].items()}
        if said:
            lines += ["", *as_markdown(["decoding", "ms a token", "ratio to plain"], [
                [n, m["error"], "-"] if "error" in m else [n, f"{m['ms_per_token']:.2f}", f"{m['ratio']:.2f}"]
                for n, m in said.items()])]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(STACKS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--batch", type=int, help="utterances a step (default: as many as make 16,000 tokens)")
    parser.add_argument("--frames", type=int, help="of an utterance (default: the model's)")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9, help="0: memory alone, no times and no decoding")
    parser.add_argument("--methods", nargs="+", help="of those in the tables; frozen is always there")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile: minutes more a model")
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no NVIDIA GPU")
    known = methods(options.rank, Path(), options.compile)
    if unknown := sorted(set(options.methods or ()) - set(known)):
        parser.error(f"--methods: {unknown[0]!r} is unknown; allowed: {', '.join(known)}")
    left_out = "LoRA, float32" if options.dtype == "float32" else ""  # LoRA itself is that
    chosen = [n for n in known if n != left_out and (options.methods is None or n in ("frozen", *options.methods))]
    keys = {f"{model}, {method}": (model, method) for model in options.models for method in chosen}
    sizes = {"frames": options.frames, "batch": options.batch, "l": options.rank, "rounds": options.rounds}
    rows = Rows(options.out, options.device, options.dtype, "models", dtype=options.dtype, sizes=sizes)
    with tempfile.TemporaryDirectory() as folder:

        def one(key: str) -> dict[str, Any]:
            model, method = keys[key]
            stack = replace(STACKS[model], frames=options.frames or STACKS[model].frames)
            batch = options.batch or max(1, 16_000 // (stack.frames + stack.labels))
            return measure(model, method, stack, batch, options.rank, options.device, getattr(torch, options.dtype),
                           options.rounds, options.compile, Path(folder))

        missing = rows.fill(keys, one, options.minutes)
    return rows.finish(markdown, missing)


if __name__ == "__main__":
    sys.exit(main())
