"""What the page's tables are made of: runs that were kept, grouped by what varies between them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .experiment import HERE, Experiment, read_results
from .run import SETTINGS

NAMES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "ssvd": "SSVD (exact)",
         "ssvd_first_order": "SSVD (first order)", "ssvdo": "SSVD-O", "none": "before"}  # fmt: skip

Runs = list[dict[str, Any]]


def load(name: str, folder: Path = HERE / "results") -> tuple[Runs, int]:
    """The runs of an experiment, and how many the full grid still lacks."""
    path = folder / f"{name}.json"
    if not path.exists():
        return [], -1
    wanted = {json.dumps({**SETTINGS, **c}, sort_keys=True)
              for c in Experiment.read(HERE / "experiments" / f"{name}.yaml").cells("full")}  # fmt: skip
    runs = [r for r in read_results(path).values() if json.dumps(r["settings"], sort_keys=True) in wanted]
    return runs, len(wanted) - len(runs)


def group(runs: Runs) -> tuple[list[str], list[tuple[tuple[str, ...], Runs]]]:
    """(names of the settings that vary, rows): runs that differ by the seed alone form one row."""
    keys = sorted({k for r in runs for k in r["settings"]} - {"seed"})
    values = {k: {json.dumps(r["settings"].get(k)) for r in runs} for k in keys}
    varied = [k for k in keys if len(values[k]) > 1 and k not in ("steps", "evaluate_at", "evaluate")]
    if "method" in varied and "rate" in varied and not _rate_is_studied(runs):
        varied.remove("rate")
    rows: dict[tuple[str, ...], Runs] = defaultdict(list)
    for run in sorted(runs, key=lambda r: r["settings"]["seed"]):
        rows[tuple(json.dumps(run["settings"].get(k)) for k in varied)].append(run)
    return varied, sorted(rows.items(), key=lambda item: _row_order(item[1][0]))


def _rate_is_studied(runs: Runs) -> bool:
    rates = defaultdict(set)
    for r in runs:
        rates[r["settings"]["method"]].add(r["settings"]["rate"])
    return any(len(v) > 1 for k, v in rates.items() if k != "none")


def _row_order(run: dict[str, Any]) -> tuple[Any, ...]:
    s = run["settings"]
    names, p, rank = list(NAMES), s.get("inner_ratio", 0), s.get("outer_rank", 0)
    return (s["model"] != "tiny.en", str(s["voices"]), s["method"] != "none", names.index(s["method"]),
            s["strategy"], s["layers"], p, rank, s["rate"], str(sorted(s.items())))  # fmt: skip


def show(value: str) -> str:
    """A setting as a reader wants it."""
    plain = json.loads(value)
    if isinstance(plain, list):
        return ", ".join(map(str, plain))
    if isinstance(plain, dict):
        return ", ".join(f"{name} x {factor:g}" for name, factor in plain.items())
    return "default" if plain is None else NAMES.get(plain, str(plain)) if isinstance(plain, str) else f"{plain:g}"


def last(run: dict[str, Any], voice: str, split: str = "test", share: float = 1.0) -> dict[str, Any] | None:
    """A run's last evaluation on a voice, of that split where evaluations name theirs, with that share of W' - W0."""
    found = [e for e in run["evaluations"] if e["voice"] == voice and e.get("split", split) == split
             and e.get("share", 1.0) == share]  # fmt: skip
    return found[-1] if found else None


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
