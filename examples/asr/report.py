"""Makes docs/experiments.md, its tables and plots, from the committed results.

    python -m examples.asr.report [--check]       # --check: exit 1 when the page is not what the results give
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import causes
from . import speech_report as real
from .experiment import HERE, Experiment
from .statistics import over_seeds, over_utterances, paired_difference
from .tables import NAMES, Runs, group, last, load, markdown, show

REAL = ("speech-baseline", "speech-tuning", "speech-shares", "speech-length", "speech-adult", "speech-parts",
        "speech-split", "speech-layers", "speech-shift", "speech-continual", "speech-larger")  # fmt: skip
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

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    words: list[Word] = []
    if name == "budget":
        found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
        for r in runs:
            s, e = r["settings"], last(r, r["settings"]["voices"][-1])
            assert e is not None
            found[s["model"], f"{s['inner_ratio']:g}/{s['outer_rank']}", r["trained"]].append(e["wer"])
        for colour, model in enumerate(sorted({model for model, *_ in found})):
            points = [(x, statistics.fmean(rates), text) for (of, text, x), rates in found.items() if of == model]
            axes.scatter([x for x, *_ in points], [y for _, y, _ in points], 14, f"C{colour}", label=f"Whisper {model}")
            words += [(x, y, text, f"C{colour}") for x, y, text in points]
        axes.set(xscale="log", xlabel="trained parameters (labels: p/l; means over seeds)", ylabel="WER target, %")
        ticks = (100_000, 200_000, 500_000, 1_000_000, 2_000_000)
        axes.set_xticks(ticks, [f"{t // 1000:,}k" for t in ticks])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    else:
        _, rows = group(runs)
        for colour, (_, same) in enumerate(rows):
            s = same[0]["settings"]
            curve = defaultdict(lambda: ([], []))  # type: ignore[var-annotated]
            for r in same:
                for e in r["evaluations"]:
                    curve[e["step"]][e["voice"] == s["source"]].append(e["wer"])
            points = [(statistics.fmean(curve[k][0]), statistics.fmean(curve[k][1]), str(k)) for k in sorted(curve)]
            axes.plot([x for x, *_ in points], [y for _, y, _ in points], marker="o", ms=4, lw=1, color=f"C{colour}")
            points[-1] = (*points[-1][:2], f"{NAMES[s['method']]}, {points[-1][2]}")
            words += [(*point, f"C{colour}") for point in points]
        axes.set(xscale="log", yscale="log", xlabel="WER target, % (labels: optimiser steps)", ylabel="WER source, %")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([6, 8, 10, 15, 20, 30, 45], minor=False)
            axis.set_ticks([], minor=True)
            axis.set_major_formatter("{x:g}")
        axes.margins(0.12)
    write_beside(axes, words)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return f"![{name}](experiments/{name}.png)"


Word = tuple[float, float, str, str]  # x, y, text, colour


def write_beside(axes: Any, words: list[Word]) -> None:
    """Writes each word as near its point as it fits without covering another word or a point (else just beside it),
    with a line where it is not beside it."""
    axes.figure.canvas.draw()
    points = [axes.transData.transform((x, y)) for x, y, *_ in words]
    inside, taken = axes.get_window_extent(), []

    def write(word: Word, radius: int, angle: int) -> Any:
        x, y, text, colour = word
        dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
        return axes.annotate(
            text, (x, y), (dx, dy), textcoords="offset points", fontsize=7, color=colour, va="center",
            ha="left" if dx > 1 else "right" if dx < -1 else "center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4} if radius > 7 else None)

    for word, own in zip(words, points, strict=True):
        for radius, angle in itertools.product((7, 14, 22, 31, 41, 52, 64), range(0, 360, 30)):
            note = write(word, radius, angle)
            box = _box(note).expanded(1.06, 1.15)
            covered = (box.contains(*p) for p in points if p is not own)
            if inside.containsx(box.x0) and inside.containsx(box.x1) and not any(covered) and not any(
                    box.overlaps(other) for other in taken):  # fmt: skip
                taken.append(box)
                break
            note.remove()
        else:
            write(word, 7, 0)


def _box(note: Any) -> Any:
    """Where an annotation's text is, in pixels, without its line."""
    from matplotlib.text import Text

    note.update_positions(note.figure.canvas.get_renderer())
    return Text.get_window_extent(note)


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
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    parts.append(f"`examples/asr/experiments/{name}.yaml`: {settings}. {count}; {state}.")
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
        "speech-length": (real.differences, real.steps), "speech-parts": (real.parts,), "speech-continual": (matrix,),
        "speech-adult": (real.differences, real.table), "speech-shift": (real.shifts, real.table),
        "speech-shares": (real.shares,),
    }  # fmt: skip
    parts += [make(runs) for make in tables.get(name, (real.table,))]
    if name == "speech-parts":
        parts.append(causes.table(causes.read()))
    if name == "speech-shares":
        parts.append(real.plot(real.between_ends(runs), "share", "children", plots / "shares.png"))
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
