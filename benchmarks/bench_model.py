"""Whole models: a training step and decoding token by token, each method against the frozen model in the same run.

    python -m benchmarks.bench_model owsm-0.1b --device cpu --dtype float32 --batch 1
    python -m benchmarks.bench_model owsm-0.1b owsm-1b whisper-large --minutes 9
    python -m benchmarks.bench_model owsm-0.1b --device cpu --batch 1 --rounds 0 --methods LoRA "SSVD-O, p=0.5"

A training step is forward, backward, AdamW (fused on a GPU) and the setting of gradients to None; "frozen" is forward
and backward to the input alone. All methods adapt the feed-forward layers (LoRA's rank is l). Decoding: one utterance,
its keys and values kept; the time of one token. Memory: see memory.py; `--rounds 0` measures it alone, without times.
The results file is written after each model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, merge_ssvdo

from . import memory
from .peers import DenseSSVDO, EspnetStyleSSVD, with_lora
from .record import facts, stem
from .report import MEMORY, as_markdown, memory_cells
from .runner import interleave, launches, peak_extra_bytes
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


def train(stack: Stack, models: dict[str, nn.Module], batch: int, rounds: int, weight: Tensor) -> dict[str, Any]:
    """Median step, ratio to the frozen model, tokens a second, allocations and launches, by method."""
    frames, tokens = inputs(stack, batch, weight)
    steps = {name: training_step(model, frames, tokens) for name, model in models.items()}
    if not rounds:
        for step in steps.values():
            step()  # for what is held afterwards
        return {name: {} for name in steps}
    timings = interleave(steps, rounds, "frozen", weight.device)
    count = batch * (stack.frames + stack.labels)
    return {name: {
        **asdict(timings[name]), "tokens_per_second": 1e3 * count / timings[name].median_ms,
        "peak_extra_mb": peak_extra_bytes(steps[name], weight.device) / 1e6,
        "launches": launches(steps[name]) if weight.is_cuda else None,
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


@torch.no_grad()
def decode(stack: Stack, base: nn.Module, makers: dict[str, Make], rounds: int, length: int = 16) -> dict[str, Any]:
    """Milliseconds a token and the ratio to the plain model, for one utterance; unmerged, merged, and LoRA."""
    weight = next(base.parameters())
    wanted = {"LoRA": "LoRA", "unmerged, p=0.25": "SSVD-O, p=0.25", "unmerged, p=0.5": "SSVD-O, p=0.5",
              "merged, p=0.5": "SSVD-O, p=0.5"}  # fmt: skip
    models = {"plain": base, **{short: makers[name](copy.deepcopy(base)) for short, name in wanted.items()
                                if name in makers}}  # fmt: skip
    if "merged, p=0.5" in models:
        merge_ssvdo(models["merged, p=0.5"])
    memory = torch.randn(1, stack.frames, stack.width).to(weight)
    memories = [block.src_attn.keys_and_values(memory) for block in base.decoder]  # type: ignore[operator, union-attr]
    start = torch.zeros(1, 1, dtype=torch.long, device=weight.device)

    def speak(model: Any) -> Callable[[], object]:
        recogniser = model.eval().get_base_model() if hasattr(model, "get_base_model") else model.eval()
        return lambda: list(recogniser.decode(memories, start, length))

    timings = interleave({name: speak(model) for name, model in models.items()}, rounds, "plain", weight.device)
    return {name: {"ms_per_token": t.median_ms / length, "ratio": t.ratio} for name, t in timings.items()}


def measure(
    name: str, stack: Stack, batch: int, rank: int, device: str, dtype: torch.dtype, rounds: int, compiled: bool,
    chosen: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The row of one model; of the methods in `chosen` and "frozen" alone, where given."""
    base = pretrained(stack, device, dtype)
    weight = next(base.parameters())
    with tempfile.TemporaryDirectory() as folder:
        makers = methods(rank, Path(folder), compiled)
        makers = {n: make for n, make in makers.items() if chosen is None or n in ("frozen", *chosen)}
        models = {n: make(copy.deepcopy(base)).train() for n, make in makers.items()}
        trained = train(stack, models, batch, rounds, weight)
        adapted = sum(w.weight.nbytes for m in base.modules() if isinstance(m, FeedForward) for w in (m.w_1, m.w_2))
        kept = memory.beside(models, base, adapted)
        counts = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
        del models
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        peaks = memory.peaks(makers, partial(peak_of, stack, batch, rank, Path(folder), device, dtype))
        decoded = decode(stack, base, makers, rounds) if rounds else {}
    return {"model": name, "batch": batch, "tokens": batch * (stack.frames + stack.labels), "l": rank,
            "parameters": sum(p.numel() for p in base.parameters()),
            "training": {n: {**trained[n], **kept[n], "peak_mib": peaks[n], "trained": counts[n]} for n in makers},
            "decoding": decoded}  # fmt: skip


TIMES = ("training step", "ms", "ratio to frozen", "tokens/s", "a step's allocations, MB", "launches")


def _times(m: dict[str, Any]) -> list[str]:
    if "median_ms" not in m:
        return ["-"] * 5
    return [f"{m['median_ms']:.1f}", f"{m['ratio']:.2f}", f"{m['tokens_per_second']:.0f}", f"{m['peak_extra_mb']:.0f}",
            str(m["launches"] or "-")]  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The rows as Markdown tables."""
    lines = [f"{results['device']}, {results['threads']} threads, {results['dtype']}, torch {results['torch']}, commit "
             f"{results['commit']}, {results['date']}. Random weights; ratios within one run, medians."]  # fmt: skip
    for row in results["rows"]:
        lines += ["", f"**{row['model']}** ({row['parameters'] / 1e6:.0f} M parameters), {row['tokens']} tokens a "
                  f"step, l = r = {row['l']}", "",
                  *as_markdown([*TIMES, *MEMORY, "trained"], [[n, *_times(m), *memory_cells(m), f"{m['trained']:,}"]
                                                               for n, m in row["training"].items()])]  # fmt: skip
        if row["decoding"]:
            lines += ["", *as_markdown(["decoding", "ms a token", "ratio to plain"], [
                [n, f"{m['ms_per_token']:.2f}", f"{m['ratio']:.2f}"] for n, m in row["decoding"].items()])]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
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
    parser.add_argument("--minutes", type=float, help="start no model after so many minutes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no NVIDIA GPU")
    known = methods(options.rank, Path(), options.compile)
    if unknown := sorted(set(options.methods or ()) - set(known)):
        parser.error(f"--methods: {unknown[0]!r} is unknown; allowed: {', '.join(known)}")
    began = time.monotonic()
    results = {**facts(options.device), "dtype": options.dtype, "rows": [], "missing": list(options.models)}
    path = stem(options.out, results, options.dtype, "models")
    for model in options.models:
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            break
        stack = replace(STACKS[model], frames=options.frames or STACKS[model].frames)
        batch = options.batch or max(1, 16_000 // (stack.frames + stack.labels))
        results["rows"].append(measure(model, stack, batch, options.rank, options.device,
                                       getattr(torch, options.dtype), options.rounds, options.compile,
                                       options.methods))  # fmt: skip
        results["missing"].remove(model)
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results), *(f"not run: {m}" for m in results["missing"]), f"results: {path}.json and .md", sep="\n")


if __name__ == "__main__":
    main()
