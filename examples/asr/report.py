"""Makes docs/experiments.md, its tables and plots, from the committed results.

    python -m examples.asr.report [--check]       # --check: exit 1 when the page is not what the results give
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from . import speech_report as real
from .experiment import HERE, Experiment
from .statistics import over_seeds, over_utterances, paired_difference
from .tables import NAMES, Runs, group, last, load, markdown, show

REAL = ("speech-baseline", "speech-tuning", "speech-length", "speech-adult", "speech-parts", "speech-split",
        "speech-layers", "speech-shift", "speech-continual", "speech-larger")  # fmt: skip
SYNTHETIC = ("baseline", "costs", "budget", "forgetting", "continual", "attention", "shift", "sensitivity", "tuning")
ROOT = HERE.parents[1]
PAGE, PLOTS = ROOT / "docs" / "experiments.md", ROOT / "docs" / "experiments"
DIAGNOSTICS = ("orthonormality", "inner_orthonormality", "inner_angle", "outer_angle", "drift", "cholesky_condition")

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


def described(name: str, folder: Path) -> tuple[list[str], Runs]:
    """The heading, question, settings and finding of an experiment, and its runs."""
    experiment = Experiment.read(HERE / "experiments" / f"{name}.yaml")
    runs, missing = load(name, folder)
    parts = [f"## {name.removeprefix('speech-').capitalize()}", experiment.question]
    if not runs:
        return [*parts, f"`examples/asr/experiments/{name}.yaml`: no run has been made yet."], runs
    settings = ", ".join(f"{k} {v}" for k, v in experiment.settings.items())
    state = "the grid is complete" if not missing else f"{missing} of {len(runs) + missing} runs have not been made yet"
    parts.append(f"`examples/asr/experiments/{name}.yaml`: {settings}. {len(runs)} runs; {state}.")
    if experiment.finding:
        parts.append(experiment.finding.strip())
    return parts, runs


def real_section(name: str, folder: Path, plots: Path) -> str:
    """One experiment's part of the page, on real speech."""
    parts, runs = described(name, folder)
    if not runs:
        return "\n\n".join(parts)
    tables: dict[str, tuple[Callable[[Runs], str], ...]] = {
        "speech-baseline": (real.differences, real.table), "speech-tuning": (real.tuning,),
        "speech-length": (real.steps,), "speech-parts": (real.parts,), "speech-continual": (matrix,),
        "speech-adult": (real.differences, real.table), "speech-shift": (real.shifts, real.table),
    }  # fmt: skip
    parts += [make(runs) for make in tables.get(name, (real.table,))]
    if name == "speech-length":
        parts.append(real.plot(real.curve(runs), "steps", "children", plots / "length.png"))
    return "\n\n".join(parts)


def section(name: str, folder: Path, plots: Path) -> str:
    """One experiment's part of the page, on synthetic speech."""
    parts, runs = described(name, folder)
    if not runs:
        return "\n\n".join(parts)
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
    written = [HERE / "experiments" / f"{n}.md" for n in ("preface", "appendix")]
    head, appendix = (path.read_text(encoding="utf-8").strip() for path in written)
    points = real.frontier(load("speech-tuning", folder)[0])
    figure = real.plot(points, "learning rate", "children", plots / "frontier.png")
    first = [real_section(name, folder, plots) for name in REAL]
    then = [section(name, folder, plots).replace("## ", "## Synthetic: ", 1) for name in SYNTHETIC]
    return "\n\n".join([head.replace("FIGURE", figure), *first, appendix, *then]) + "\n"


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
