"""Makes docs/experiments.md, its tables and plots, from the committed results.

    python -m examples.asr.report [--check]       # --check: exit 1 when the page is not what the results give
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .experiment import HERE, Experiment, read_results
from .run import SETTINGS
from .statistics import over_seeds, over_utterances, paired_difference

ORDER = ("baseline", "costs", "budget", "forgetting", "continual", "attention", "shift", "sensitivity", "tuning")
ROOT = HERE.parents[1]
PAGE, PLOTS = ROOT / "docs" / "experiments.md", ROOT / "docs" / "experiments"
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "ssvd": "SSVD (exact)",
         "ssvd_first_order": "SSVD (first order)", "ssvdo": "SSVD-O", "none": "before"}  # fmt: skip

DIAGNOSTICS = ("orthonormality", "inner_orthonormality", "inner_angle", "outer_angle", "drift", "cholesky_condition")

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
    varied = [k for k in keys if len(values[k]) > 1 and k not in ("steps", "evaluate_at")]
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
    return "default" if plain is None else NAMES.get(plain, str(plain)) if isinstance(plain, str) else f"{plain:g}"


def last(run: dict[str, Any], voice: str) -> dict[str, Any] | None:
    """A run's last evaluation on a voice."""
    found = [e for e in run["evaluations"] if e["voice"] == voice]
    return found[-1] if found else None


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def error_cells(runs: Runs, voice: str) -> tuple[str, str, str]:
    """(WER with the utterances' interval, the seeds' interval, CER) on a voice."""
    found = [e for r in runs if (e := last(r, voice)) is not None]
    if not found:
        return "-", "-", "-"
    rate = over_utterances([e["words_wrong"] for e in found], found[0]["words"])
    seeds = over_seeds([e["wer"] for e in found])
    between = "-" if math.isnan(seeds.low) else f"{seeds.low:.1f} to {seeds.high:.1f}"
    return str(rate), between, f"{statistics.fmean(e['cer'] for e in found):.1f}"


def table(runs: Runs) -> str:
    """A row per setting: error rates on the last voice trained and on the source."""
    varied, rows = group(runs)
    lines = []
    for values, same in rows:
        s = same[0]["settings"]
        wer, between, cer = error_cells(same, s["voices"][-1])
        source = error_cells(same, s["source"])[0]
        lines.append([*map(show, values), str(len(same)), f"{same[0]['trained']:,}", wer, between, cer, source])
    header = ["seeds", "trained", "WER target", "over seeds", "CER target", "WER source"]
    return markdown([*varied, *header], lines)


def costs(runs: Runs) -> str:
    """A row per setting: time of a training step, and how much the memory in use grew over model and data."""
    varied, rows = group(runs)
    lines = [[*map(show, values), f"{run['trained']:,}", f"{run['step_ms']:.0f}", f"{run['peak_mib']:.0f}"]
             for values, (run, *_) in rows]  # fmt: skip
    threads = ", ".join(sorted({f"{r['threads']} threads, {r['device']}" for r in runs}))
    return f"On {threads}:\n\n" + markdown([*varied, "trained", "ms/step", "peak MiB"], lines)


def summary(runs: Runs) -> str:
    """Baseline: each method over all voices that it has, its difference to LoRA on the same utterances and seeds."""
    cells = {(r["settings"]["method"], r["settings"]["voices"][-1], r["settings"]["seed"]): r for r in runs}
    seeds = {m: {k[1:] for k in cells if k[0] == m} for m in {k[0] for k in cells}}
    lines = []
    for method in [m for m in NAMES if m in seeds and m != "none"]:
        shared = sorted(seeds[method] & seeds.get("lora", set()))
        if not shared:
            continue
        own, theirs, words = [], [], []
        for voice, seed in shared:
            a, b = last(cells[method, voice, seed], voice), last(cells["lora", voice, seed], voice)
            assert a is not None and b is not None
            own += a["words_wrong"]
            theirs += b["words_wrong"]
            words += a["words"]
        difference = "-" if method == "lora" else str(paired_difference([own], [theirs], words))
        lines.append([NAMES[method], str(len(shared)), str(over_utterances([own], words)), difference])
    return markdown(["method", "voices x seeds", "WER target", "less LoRA's (points)"], lines)


def matrix(runs: Runs) -> str:
    """Continual learning: error rates after each stage, and average forgetting."""
    _, rows = group(runs)
    parts = []
    for _, same in rows:
        s = same[0]["settings"]
        if s["method"] == "none":
            continue
        columns = [*s["voices"], s["source"]]
        wer: dict[tuple[int, str], list[float]] = defaultdict(list)
        forgotten = []
        for r in same:
            at = {(e["stage"], e["voice"]): e["wer"] for e in r["evaluations"]}
            for key, value in at.items():
                wer[key].append(value)
            count = len(s["voices"]) - 1
            forgotten.append(statistics.fmean(at[count, v] - at[i, v] for i, v in enumerate(s["voices"][:-1])))
        name = f"{NAMES[s['method']]}, {'one adapter' if s['strategy'] == 'continue' else 'fresh adapters, merged'}"
        body = [[f"after {v}", *(f"{statistics.fmean(wer[i, c]):.1f}" for c in columns)]
                for i, v in enumerate(s["voices"])]  # fmt: skip
        parts.append(f"{name} ({len(same)} seeds; average forgetting {over_seeds(forgotten)} points):\n\n"
                     + markdown(["WER", *columns], body))  # fmt: skip
    return "\n\n".join(parts)


def plot(name: str, runs: Runs, folder: Path) -> str:
    """The experiment's plot, if it has one: Markdown that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    if name == "budget":
        for model in sorted({r["settings"]["model"] for r in runs}):
            points = [(r["trained"], last(r, r["settings"]["voices"][-1]), r) for r in runs
                      if r["settings"]["model"] == model]  # fmt: skip
            axes.scatter([p[0] for p in points], [p[1]["wer"] for p in points], label=f"Whisper {model}")  # type: ignore[index]
            for x, e, r in points:
                text = f"{r['settings']['inner_ratio']:g}/{r['settings']['outer_rank']}"
                axes.annotate(text, (x, e["wer"]), fontsize=6, xytext=(3, 3), textcoords="offset points")  # type: ignore[index]
        axes.set(xscale="log", xlabel="trained parameters (labels: p/l)", ylabel="WER target, %")
    else:
        _, rows = group(runs)
        for _, same in rows:
            s = same[0]["settings"]
            curve = defaultdict(lambda: ([], []))  # type: ignore[var-annotated]
            for r in same:
                for e in r["evaluations"]:
                    curve[e["step"]][e["voice"] == s["source"]].append(e["wer"])
            steps = sorted(curve)
            target = [statistics.fmean(curve[k][0]) for k in steps]
            source = [statistics.fmean(curve[k][1]) for k in steps]
            marker = "*" if s["method"] == "none" else "o"
            axes.plot(target, source, marker=marker, markersize=4, label=NAMES[s["method"]])
            for k, x, y in zip(steps, target, source, strict=True):
                axes.annotate(str(k), (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set(xlabel="WER target, % (labels: optimiser steps)", ylabel="WER source, %")
    axes.legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return f"![{name}](experiments/{name}.png)"


def diagnostics(runs: Runs) -> str:
    """Sensitivity: what the adapters look like at the end, the worst layer."""
    varied, rows = group(runs)
    lines = []
    for values, same in rows:
        ends = [r["diagnostics"][-1] for r in same if r["diagnostics"]]
        worst = {k: max(e[k] for e in ends) for k in ends[0]} if ends else {}
        if worst:
            lines.append([*map(show, values), *(f"{worst[k]:.1e}" for k in DIAGNOSTICS)])
    return markdown([*varied, "[C; Q]", "G", "inner angle", "outer angle", "drift", "condition"], lines)


def section(name: str, folder: Path, plots: Path) -> str:
    """One experiment's part of the page."""
    experiment = Experiment.read(HERE / "experiments" / f"{name}.yaml")
    runs, missing = load(name, folder)
    parts = [f"## {name.capitalize()}", experiment.question]
    if not runs:
        return "\n\n".join([*parts, "No run has been made yet."])
    settings = ", ".join(f"{k} {v}" for k, v in experiment.settings.items())
    state = "the grid is complete" if not missing else f"{missing} of {len(runs) + missing} runs are still missing"
    parts.append(f"`examples/asr/experiments/{name}.yaml`: {settings}. {len(runs)} runs; {state}.")
    if experiment.finding:
        parts.append(experiment.finding.strip())
    if name == "baseline":
        parts.append(summary(runs))
    parts.append({"continual": matrix, "costs": costs}.get(name, table)(runs))
    if name == "sensitivity":
        parts.append(diagnostics(runs))
    if name in ("budget", "forgetting"):
        parts.append(plot(name, runs, plots))
    return "\n\n".join(parts)


def page(folder: Path = HERE / "results", plots: Path = PLOTS) -> str:
    """The whole of docs/experiments.md."""
    head = (HERE / "experiments" / "preface.md").read_text(encoding="utf-8").strip()
    return "\n\n".join([head, *(section(name, folder, plots) for name in ORDER)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page would change")
    options = parser.parse_args(arguments)
    if options.check:
        import tempfile

        with tempfile.TemporaryDirectory() as temporary:
            same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page(plots=Path(temporary))
        print(f"{PAGE}: {'up to date' if same else 'not what the results give; run python -m examples.asr.report'}")
        return 0 if same else 1
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
