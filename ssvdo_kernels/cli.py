"""The `ssvdo` command: plan an adapter for a model file, look into an adapter, merge one into a model file."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from . import budget
from .checkpoint import Entry, adapter_file, fill, layer_for, read_adapter
from .config import SSVDOConfig
from .files import as_bytes

TOKENS = [1, 128, 1024, 16384]


def show_plan(model: Path, config: SSVDOConfig, rank: int, console: Console) -> None:
    """Prints what `config` would train in the model, from the file's header alone."""
    layers = budget.chosen(budget.matrices(model), config)
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
    lora = budget.lora_budget(layers, rank)
    console.print(f"LoRA r = {rank} on the same layers: {lora:,}. Equal budgets:")
    for p, l, numbers in budget.equal_budgets(layers, lora):  # noqa: E741
        console.print(f"  inner_ratio={p}, outer_rank={l}: {numbers:,}")


def show_adapter(path: Path, console: Console) -> None:
    """Prints what an adapter holds."""
    entries = read_adapter(adapter_file(path))
    table = Table("layer", "shape", "k", "l", "trained", "dtype of W0", "W0's SHA-256", title=str(path))
    for e in entries:
        table.add_row(e.name, f"{e.shape.in_features} -> {e.shape.out_features}", str(e.shape.k), str(e.shape.l),
                      f"{e.shape.parameters:,}", e.dtype.removeprefix("torch."), e.sha256[:12])
    console.print(table)
    basis = "with V_k" if entries and entries[0].basis is not None else "without V_k"
    total = sum(e.shape.parameters for e in entries)
    console.print(f"{len(entries)} layers, {total:,} trained numbers, {basis}")
    for text in sorted({repr(e.config) for e in entries}):
        console.print(text, highlight=False)


def merge(base: Path, adapter: Path, out: Path) -> list[Path]:
    """Writes the base model's safetensors files with the adapter merged in, one weight in memory at a time.

    Args:
        base: a safetensors file, or a folder of them. adapter: a folder made by save_ssvdo. out: a new folder.

    Raises:
        ValueError: the base lacks a weight of the adapter, or `out` is the base's own folder.
        CheckpointError: the adapter is damaged, or made for other weights. Nothing is written then but whole files.
    """
    files = budget.model_files(base)
    if out.resolve() == files[0].parent.resolve():
        raise ValueError(f"--out {out} is the base model's own folder; allowed: another one")
    file = adapter_file(adapter)
    entries = {f"{e.name}.weight": e for e in read_adapter(file)}
    where: dict[str, tuple[Path, int]] = {}  # tensor -> its file, and where its bytes begin
    for source in files:
        header, begin = budget.read_header(source)
        where |= {name: (source, begin + values["data_offsets"][0]) for name, values in header.items()}  # type: ignore[index]
    missing = sorted(set(entries) - set(where))
    if missing:
        raise ValueError(f"{base} has no tensor {missing[:4]}; the adapter's names must be the model file's")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with tqdm(total=len(entries), desc="merging", unit="layer", delay=2, leave=False) as bar:
        for source in files:
            handle, temporary = tempfile.mkstemp(dir=out, prefix=f".{source.name}.")
            os.close(handle)
            try:
                shutil.copyfile(source, temporary)
                for name in [n for n in entries if where[n][0] == source]:
                    _merge_one(source, Path(temporary), where[name][1], entries[name], file)
                    bar.update()
                with open(temporary, "rb+") as target:
                    os.fsync(target.fileno())
                os.replace(temporary, out / source.name)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            written.append(out / source.name)
    return written


@torch.no_grad()
def _merge_one(source: Path, target: Path, begin: int, entry: Entry, file: Path) -> None:
    """Overwrites one weight's bytes, from `begin` on, by W' in its own dtype: the header stays as it is."""
    from safetensors import safe_open

    name = f"{entry.name}.weight"
    with safe_open(source, "pt") as opened:
        weight = opened.get_tensor(name)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer, _ = layer_for(linear, entry, file)
    fill(layer, entry)
    with target.open("rb+") as opened_target:
        opened_target.seek(begin)
        opened_target.write(as_bytes(layer.adapted_weight()))


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
    plan.add_argument("--lora-rank", type=int, default=64, help="whose budget is to be matched")
    inspect = commands.add_parser("inspect", help="what an adapter file holds")
    inspect.add_argument("adapter", type=Path)
    merging = commands.add_parser("merge", help="write the model's files with the adapter merged in")
    merging.add_argument("base", type=Path, help="a safetensors file, or a folder of them")
    merging.add_argument("adapter", type=Path)
    merging.add_argument("--out", type=Path, required=True, help="a new folder")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 1 with one line on stderr where it cannot."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if options.command == "plan":
            config = SSVDOConfig(inner_ratio=options.inner_ratio, outer_rank=options.outer_rank,
                                 target_modules=_targets(options.target_modules))
            show_plan(options.model, config, options.lora_rank, console)
        elif options.command == "inspect":
            show_adapter(options.adapter, console)
        else:
            for path in merge(options.base, options.adapter, options.out):
                print(f"wrote {path}")
    except (ValueError, OSError) as error:
        print(f"ssvdo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
