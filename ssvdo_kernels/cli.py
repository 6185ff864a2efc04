"""The `ssvdo` command: plan an adapter for a model file, look into one, merge one into a model file, make it a LoRA."""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import budget
from .checkpoint import adapter_file, read_adapter
from .config import SSVDOConfig
from .console import print_anything, show
from .export import export_lora, merge_files

TOKENS = [1, 128, 1024, 16384]


def show_plan(model: Path, config: SSVDOConfig, rank: int | None, console: Console) -> None:
    """Prints what `config` would train in the model, from the file's header alone."""
    layers = budget.chosen(budget.matrices(model), config)
    rank = min(64, max(s.d for _, s in layers.values())) if rank is None else rank
    lora = budget.lora_budget(layers, rank)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, (m, _) in layers.items():
        groups.setdefault((m.out_features, m.in_features), []).append(name)
    table = Table("layers", "shape", "k", "l", "trained", "factors, MB", "prepared, MB",
                  *(f"T = {t}" for t in TOKENS), title=str(model))  # fmt: skip
    for sizes, names in groups.items():
        m, shape = layers[names[0]]
        n = len(names)
        table.add_row(
            f"{n} x {names[0]}", f"{sizes[1]} -> {sizes[0]}", str(shape.k), str(shape.l), f"{n * shape.parameters:,}",
            f"{n * budget.factor_numbers(shape) * m.size / 1e6:.0f}",
            f"{n * budget.prepared_numbers(shape) * 4 / 1e6:.0f}", *budget.forms(shape, TOKENS))
    console.print(table)
    trained = sum(s.parameters for _, s in layers.values())
    weights = sum(m.out_features * m.in_features for m, _ in layers.values())
    seconds = sum(budget.factor_seconds(s) for _, s in layers.values())
    console.print(f"{trained:,} trained numbers ({100 * trained / weights:.2f}% of the adapted weights); factorising "
                  f"takes about {seconds:.0f} s on 2 CPU cores; T: the form that the CPU planner takes for T tokens")
    console.print(f"LoRA r = {rank} on the same layers: {lora:,}. Equal budgets:")
    for p, l, numbers in budget.equal_budgets(layers, lora):  # noqa: E741
        console.print(f"  inner_ratio={p}, outer_rank={l}: {numbers:,}")


def show_adapter(path: Path, console: Console) -> None:
    """Prints what an adapter holds."""
    entries = read_adapter(adapter_file(path))
    table = Table("layer", "shape", "k", "l", "trained", "dtype of W0", "W0's SHA-256", title=str(path))
    for e in entries:
        table.add_row(e.name, f"{e.shape.in_features} -> {e.shape.out_features}", str(e.shape.k), str(e.shape.l),
                      f"{e.shape.parameters:,}", e.origin.dtype.removeprefix("torch."), e.origin.sha256[:12])
    console.print(table)
    basis = "with V_k" if entries and entries[0].bases is not None else "without V_k"
    total = sum(e.shape.parameters for e in entries)
    console.print(f"{len(entries)} layers, {total:,} trained numbers, {basis}")
    for text in sorted({repr(e.config) for e in entries}):
        console.print(text, highlight=False)


def _targets(given: list[str] | None) -> tuple[str, ...] | str | None:
    """One value that is no plain name is a regular expression, or all-linear."""
    if given and len(given) == 1 and (given[0] == "all-linear" or not re.fullmatch(r"[\w.]+", given[0])):
        return given[0]
    return tuple(given) if given else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssvdo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="what an adapter of a model would train, need and cost")
    plan.add_argument("model", type=Path, help="a safetensors file, a folder of them, or a config.json")
    plan.add_argument("--inner-ratio", type=float, default=0.5)
    plan.add_argument("--outer-rank", type=int, default=64)
    plan.add_argument("--target-modules", nargs="+", help="name suffixes, one regular expression, or all-linear")
    plan.add_argument("--lora-rank", type=int, help="whose budget is to be matched (64, or what the layers allow)")
    inspect = commands.add_parser("inspect", help="what an adapter file holds")
    inspect.add_argument("adapter", type=Path)
    merging = commands.add_parser("merge", help="write the model's files with the adapter merged in")
    merging.add_argument("base", type=Path, help="a model's folder, index or .safetensors, .bin, .pt or .pth file")
    merging.add_argument("adapter", type=Path)
    merging.add_argument("--out", type=Path, required=True, help="a new folder")
    merging.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    lora = commands.add_parser("export-lora", help="write an adapter as a LoRA of PEFT's format")
    lora.add_argument("base", type=Path, help="a model's folder, index or .safetensors, .bin, .pt or .pth file")
    lora.add_argument("adapter", type=Path)
    lora.add_argument("--out", type=Path, required=True, help="the LoRA's folder")
    lora.add_argument("--rank", type=int, help="of the best LoRA; without it the exact one, max(k, l)")
    return parser


def lora(base: Path, adapter: Path, out: Path, rank: int | None, console: Console) -> None:
    """Exports, and prints each layer's rank and error."""
    table = Table("layer", "rank", "error", title=str(out))
    for name, one in export_lora(base, adapter, out, rank).items():
        table.add_row(name, str(one.rank), "exact" if one.error == 0 else f"{one.error:.2%} of the change")
    console.print(table)


def merge(base: Path, adapter: Path, out: Path, overwrite: bool, console: Console) -> None:
    """Merges, and prints which files were written and which of the base's were not."""
    done = merge_files(base, adapter, out, overwrite=overwrite)
    for path in done.written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    if done.left_out:
        console.print(f"left out: {', '.join(done.left_out)}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 1 with one line on stderr where it cannot."""
    print_anything()
    options = _parser().parse_args(arguments)
    terminal, encoding = sys.stdout is not None and sys.stdout.isatty(), getattr(sys.stdout, "encoding", None)
    said = io.TextIOWrapper(io.BytesIO(), encoding or "utf-8", "backslashreplace", newline="")
    console = Console(file=said, force_terminal=terminal or None, width=None if terminal else 160, markup=False,
                      emoji=False)  # fmt: skip
    try:
        if options.command == "plan":
            config = SSVDOConfig(inner_ratio=options.inner_ratio, outer_rank=options.outer_rank,
                                 target_modules=_targets(options.target_modules))
            show_plan(options.model, config, options.lora_rank, console)
        elif options.command == "inspect":
            show_adapter(options.adapter, console)
        elif options.command == "export-lora":
            lora(options.base, options.adapter, options.out, options.rank, console)
        else:
            merge(options.base, options.adapter, options.out, options.overwrite, console)
        written = f"; {options.out} is written all the same" if options.command in ("merge", "export-lora") else ""
        said.seek(0)
        return show(said.read(), "ssvdo", written)
    except (ValueError, TypeError, OSError, ArithmeticError, MemoryError) as error:
        print(f"ssvdo: {' '.join(str(error).splitlines()) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ssvdo: interrupted; nothing is written in part", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
