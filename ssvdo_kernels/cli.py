"""The `ssvdo` command: plan an adapter for a model file, look into one, merge one into a model file, make it a LoRA."""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console

from . import __version__, budget
from .checkpoint import adapter_file, read_adapter
from .config import SSVDOConfig
from .console import print_anything, say, show, tabulate
from .export import export_lora, merge_files
from .model_files import WANTED

TOKENS = [1, 128, 1024, 16384]
ADAPTER = "a folder that save_ssvdo wrote, or its ssvdo_model.safetensors"
PLAN = """\
Of a weight W0 (m x n; d = min(m, n), c = |m - n|), which has d singular values:
  p         --inner-ratio, the share of its singular vectors on the small side
            that are rotated, and of its singular values that are scaled
  k         how many that are, p d rounded down: k (k + 1) / 2 numbers
  l         --outer-rank, how many of the leading singular vectors on the large
            side turn out of W0's range: c l numbers, none in a square layer
  factors   what stays beside W0: its singular vectors on the small side
  prepared  what is made of the trained numbers whenever they have changed
  T         tokens (rows of x) in a forward, and the form that costs least in
            training with so many, on a CPU:
    factored  by the small matrices, one after the other
    folded    by products of them, made before: fewer operations a token
    core      by one d x d matrix, made before
    merged    by W' itself, made before, as large as W0
docs/method.md has the equations."""


def show_plan(model: Path, config: SSVDOConfig, rank: int | None, console: Console) -> None:
    """Prints what `config` would train in the model, from the file's header alone."""
    layers = budget.chosen(budget.matrices(model), config)
    rank = min(64, max(s.d for _, s in layers.values())) if rank is None else rank
    lora = budget.lora_budget(layers, rank)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, (m, _) in layers.items():
        groups.setdefault((m.out_features, m.in_features), []).append(name)
    headings = ["layers", "shape", "k", "l", "trained", "factors, MB", "prepared, MB", *(f"T = {t}" for t in TOKENS)]
    rows = []
    for sizes, names in groups.items():
        m, shape = layers[names[0]]
        n = len(names)
        rows.append([
            f"{n} x {names[0]}", f"{sizes[1]} -> {sizes[0]}", str(shape.k), str(shape.l), f"{n * shape.parameters:,}",
            f"{n * budget.factor_numbers(shape) * m.size / 1e6:.0f}",
            f"{n * budget.prepared_numbers(shape) * 4 / 1e6:.0f}", *budget.forms(shape, TOKENS)])
    tabulate(console, str(model), headings, rows)
    trained = sum(s.parameters for _, s in layers.values())
    weights = sum(m.out_features * m.in_features for m, _ in layers.values())
    seconds = sum(budget.factor_seconds(s) for _, s in layers.values())
    say(console, f"{trained:,} trained numbers ({100 * trained / weights:.2f}% of the adapted weights); factorising "
                 f"takes about {seconds:.0f} s on 2 CPU cores; T: the form that the CPU planner takes for T tokens")
    say(console, f"LoRA r = {rank} on the same layers: {lora:,}. Equal budgets:")
    for p, l, numbers in budget.equal_budgets(layers, lora):  # noqa: E741
        say(console, f"  inner_ratio={p}, outer_rank={l}: {numbers:,}")


def show_adapter(path: Path, console: Console) -> None:
    """Prints what an adapter holds."""
    entries = read_adapter(adapter_file(path))
    rows = [[e.name, f"{e.shape.in_features} -> {e.shape.out_features}", str(e.shape.k), str(e.shape.l),
             f"{e.shape.parameters:,}", e.origin.dtype.removeprefix("torch."), e.origin.sha256[:12]] for e in entries]
    tabulate(console, str(path), ["layer", "shape", "k", "l", "trained", "dtype of W0", "W0's SHA-256"], rows)
    basis = "with V_k" if entries and entries[0].bases is not None else "without V_k"
    total = sum(e.shape.parameters for e in entries)
    say(console, f"{len(entries)} layers, {total:,} trained numbers, {basis}")
    for text in sorted({repr(e.config) for e in entries}):
        say(console, text)


def _targets(given: list[str] | None) -> tuple[str, ...] | str | None:
    """One value that is no plain name is a regular expression, or all-linear."""
    if given and len(given) == 1 and (given[0] == "all-linear" or not re.fullmatch(r"[\w.]+", given[0])):
        return given[0]
    return tuple(given) if given else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssvdo", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ssvdo_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, more: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", epilog=more,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    plan = command("plan", "what an adapter of a model would train, need and cost", PLAN)
    plan.add_argument("model", type=Path, help=f"{WANTED}, or a config.json; of safetensors headers alone are read")
    plan.add_argument("--inner-ratio", type=float, default=0.5, metavar="P", help="p, above 0, at most 1; default: 0.5")
    plan.add_argument("--outer-rank", type=int, default=64, metavar="L", help="l, 0 or more; default: 64")
    plan.add_argument("--target-modules", nargs="+", metavar="NAME", help="name suffixes, one regular expression, or "
                      "all-linear; default: the names of feed-forward layers")  # fmt: skip
    plan.add_argument("--lora-rank", type=int, metavar="R",
                      help="of the LoRA whose budget is to be matched; default: 64, or what the layers allow")
    inspect = command("inspect", "what an adapter file holds")
    inspect.add_argument("adapter", type=Path, help=ADAPTER)
    merging = command("merge", "write the model's files with the adapter merged in")
    merging.add_argument("base", type=Path, help=WANTED)
    merging.add_argument("adapter", type=Path, help=ADAPTER)
    merging.add_argument("--out", type=Path, required=True, help="a new folder")
    merging.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    lora = command("export-lora", "write an adapter as a LoRA of PEFT's format")
    lora.add_argument("base", type=Path, help=WANTED)
    lora.add_argument("adapter", type=Path, help=ADAPTER)
    lora.add_argument("--out", type=Path, required=True, help="the LoRA's folder")
    lora.add_argument("--rank", type=int, metavar="R", help="of the best LoRA; without it the exact one, max(k, l)")
    return parser


def lora(base: Path, adapter: Path, out: Path, rank: int | None, console: Console) -> None:
    """Exports, and prints each layer's rank and error."""
    rows = [[name, str(one.rank), "exact" if one.error == 0 else f"{one.error:.2%} of the change"]
            for name, one in export_lora(base, adapter, out, rank).items()]
    tabulate(console, str(out), ["layer", "rank", "error"], rows)


def merge(base: Path, adapter: Path, out: Path, overwrite: bool, console: Console) -> None:
    """Merges, and prints which files were written and which of the base's were not."""
    done = merge_files(base, adapter, out, overwrite=overwrite)
    for path in done.written:
        say(console, f"wrote {path}")
    if done.left_out:
        say(console, f"left out: {', '.join(done.left_out)}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 1 with one line on stderr where it cannot."""
    print_anything()
    options = _parser().parse_args(arguments)
    terminal, encoding = sys.stdout is not None and sys.stdout.isatty(), getattr(sys.stdout, "encoding", None)
    said = io.TextIOWrapper(io.BytesIO(), encoding or "utf-8", "backslashreplace", newline="")
    console = Console(file=said, force_terminal=terminal or None, markup=False, emoji=False)  # fmt: skip
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
