"""Trains one model for minutes and fails unless its memory stays flat: `python -m benchmarks.soak [--minutes 9]`.

A round is four training steps on batches of different lengths, a greedy decoding, and a merge and unmerge. After each
round what is allocated on the GPU and resident in the process is noted; the first fifth of the rounds warms caches up.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, merge_ssvdo, unmerge_ssvdo

from .record import append, facts, stem
from .stacks import STACKS, Recogniser, Stack

GROWTH = 0.02  # of the most that was in use after the warm-up: allocators round sizes and keep pages


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(
    stack: Stack, device: str, dtype: torch.dtype, seconds: float, batch: int, rank: int, log: Path
) -> list[dict[str, float]]:
    """(loss, bytes allocated on the GPU, bytes resident) after each round, in `log` at once."""
    torch.manual_seed(0)
    model = apply_ssvdo(Recogniser(stack).to(device, dtype), SSVDOConfig(outer_rank=rank))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, weight_decay=0.0)
    rounds: list[dict[str, float]] = []
    began = time.monotonic()
    while not rounds or time.monotonic() - began < seconds:
        loss = torch.zeros(())
        for part in (4, 3, 2, 1):
            frames = torch.randn(batch, stack.frames * part // 4, stack.width).to(device, dtype)
            tokens = torch.randint(stack.vocabulary, (batch, stack.labels + 1), device=device)
            loss = model(frames, tokens)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for change in (merge_ssvdo, unmerge_ssvdo):
                change(model)
                memory = model.encode(frames)  # type: ignore[operator]
                memories = [b.src_attn.keys_and_values(memory) for b in model.decoder]  # type: ignore[operator, union-attr]
                list(model.decode(memories, tokens[:, :1], 3))  # type: ignore[operator]
        if not torch.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss.item()} after {len(rounds)} rounds")
        value = loss.item()
        del frames, tokens, memory, memories, loss
        gc.collect()
        rounds.append({"loss": value, "resident": resident(),
                       "allocated": torch.cuda.memory_allocated() if device == "cuda" else 0})  # fmt: skip
        append(log, rounds[-1])
    return rounds


def growth(rounds: list[dict[str, float]], what: str) -> float:
    """By how much the last fifth's least exceeds the most of the second fifth, as a share of it."""
    fifth = max(1, len(rounds) // 5)
    values = [r[what] for r in rounds]
    before = max(values[fifth : 2 * fifth] or values)
    return min(values[-fifth:]) / before - 1 if before else 0.0


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(STACKS), default="owsm-0.1b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no NVIDIA GPU")
    dtype = getattr(torch, options.dtype)
    about = {**facts(options.device), "dtype": options.dtype, "model": options.model, "minutes": options.minutes}
    path = stem(options.out, about, options.dtype, "soak")
    log, path = path.with_suffix(".rounds.jsonl"), path.with_suffix(".json")
    log.unlink(missing_ok=True)
    seconds = 60 * options.minutes
    rounds = soak(STACKS[options.model], options.device, dtype, seconds, options.batch, options.rank, log)
    grown = {what: growth(rounds, what) for what in ("allocated", "resident")}
    path.write_text(json.dumps({**about, "growth": grown, "rounds": rounds}) + "\n", encoding="utf-8")
    log.unlink()
    print(f"{len(rounds)} rounds; memory grew by", *(f"{100 * g:.2f}% ({what})" for what, g in grown.items()))
    print(f"wrote {path}")
    return int(any(g > GROWTH for g in grown.values()))


if __name__ == "__main__":
    sys.exit(main())
