"""Tables and a plot from a results file: `python -m benchmarks.report results.json [--markdown F] [--plot F]`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = list[str]


def label(case: dict[str, Any]) -> str:
    """A case in words: "1024->4096 T=128 p=0.5 l=64"."""
    d = case["d"]
    sides = {"tall": (d, 4 * d), "wide": (4 * d, d), "square": (d, d)}[case["kind"]]
    return f"{sides[0]}->{sides[1]} T={case['tokens']} p={case['p']} l={case['l']}"


def table(results: dict[str, Any]) -> tuple[Row, list[Row]]:
    """(header, rows): ratios to frozen, the least ratio that the traffic model allows SSVD-O at this machine's measured
    peaks (and how near the frozen layer is to its own floor), extra memory, and the planner's choice."""
    names = list(dict.fromkeys(n for r in results["rows"] for n in r["methods"] if not n.startswith("form")))
    header = ["layer", "frozen, ms", *names[1:], *HOST, "floor (frozen at)", "MB: SSVD-O / ESPnet-style",
              "planner (slower than best)"]
    rows = []
    for r in results["rows"]:
        m, plan = r["methods"], r["planner"]
        compared = ("SSVD-O, prepared every step", "ESPnet-style SSVD")
        memory = [f"{m[n]['peak_extra_mb']:.0f}" for n in compared if n in m and m[n]['peak_extra_mb'] is not None]
        floor = r.get("floor")
        least = f"{floor['ratio']:.2f} ({floor['frozen_ms'] / m['frozen']['median_ms']:.0%})" if floor else "-"
        loss = "" if plan["loss"] is None else f" ({100 * plan['loss']:.0f}%)"
        rows.append([label(r["case"]), f"{m['frozen']['median_ms']:.1f}",
                     *(f"{m[n]['ratio']:.2f}" if n in m else "-" for n in names[1:]), *host_cells(m),
                     least, " / ".join(memory), plan["chosen"] + loss])
    return header, rows


HOST = ("host, ms: frozen / SSVD-O prepared / cached",)


def host_cells(methods: dict[str, Any]) -> Row:
    """What the host takes to start a step on a GPU; a star: the GPU waited for it while it was timed."""
    shown = [methods.get(n) or {} for n in ("frozen", "SSVD-O, prepared every step", "SSVD-O, cached")]
    if not any(m.get("host_ms") for m in shown):
        return ["-"]
    return [" / ".join(f"{m['host_ms']:.2f}{'' if m['queued'] else '*'}" if m.get("host_ms") else "-" for m in shown)]


MEMORY = ("frozen state / W0", "held / W0", "peak beyond frozen, MiB")


def memory_cells(method: dict[str, Any]) -> Row:
    """A method's cells under MEMORY; "-" for what was not measured."""
    shown = {"frozen_state": "{:.3f}", "held": "{:.3f}", "peak_mib": "{:.1f}"}
    return ["-" if method.get(n) is None else form.format(method[n]) for n, form in shown.items()]


def memory_table(results: dict[str, Any]) -> tuple[Row, list[Row]]:
    """(header, rows): what each method keeps beside W0 and a training step takes, layer by layer: see memory.py.

    What is kept does not depend on the tokens; of a layer's rows, that with a peak is shown, else the last.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for r in results["rows"]:
        key = label({**r["case"], "tokens": "any"})
        if key not in chosen or not any(m.get("peak_mib") is not None for m in chosen[key]["methods"].values()):
            chosen[key] = r
    rows = [[label(r["case"]), name, *memory_cells(m)] for r in chosen.values() for name, m in r["methods"].items()
            if m.get("frozen_state") is not None]  # fmt: skip
    return ["layer", "method", *MEMORY], rows


def as_markdown(header: Row, rows: list[Row]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows]]


def markdown(results: dict[str, Any]) -> str:
    """The tables as Markdown under a line that says where and when."""
    lines = [describe(results), "", *as_markdown(*table(results))]
    if any(m.get("queued") is False for r in results["rows"] for m in r["methods"].values()):
        lines += ["", "A star: the GPU waited for the host while it was timed."]
    losses = [r["planner"]["loss"] for r in results["rows"] if r["planner"]["loss"] is not None]
    if losses:
        near = sum(loss <= 0.05 for loss in losses)
        lines += ["", f"The planner's form is within 5% of the fastest at {near} of {len(losses)} points."]
    lines += [f"\nnot measured: {label(r['case'])}, {name}: {error}" for r in results["rows"]
              for name, error in r.get("failed", {}).items()]  # fmt: skip
    header, rows = memory_table(results)
    if rows:
        lines += ["", "Memory: what is not trained beside W0, what is kept between steps, and the most that "
                  "training steps take, less what the frozen layer's do.", "", *as_markdown(header, rows)]
    return "\n".join(lines) + "\n"


def describe(results: dict[str, Any]) -> str:
    """One line: device, threads, dtype, versions, commit and date."""
    return (f"{results['device']}, {results['threads']} threads, {results['dtype']}, torch {results['torch']}, commit "
            f"{results['commit']}, {results['date']}. Forward + backward, ratio to a frozen nn.Linear in the same run.")


TICKS = (1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30)
COLOURS = {"full": "C7", "LoRA": "C0", "DoRA": "C9", "PiSSA": "C4", "OFT": "C5", "ESPnet-style SSVD": "C2",
           "dense SSVD-O": "C8", "SSVD-O, prepared every step": "C3", "SSVD-O, cached": "C1"}  # fmt: skip
GAP = 0.055  # of the axis between two names


def plot(results: dict[str, Any], path: Path) -> None:
    """Ratio to frozen against tokens: a panel a layer, a line a method (of those at several token counts, if there are
    any) with its name at its end, one scale for all panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in sorted(results["rows"], key=lambda r: r["case"]["tokens"]):
        panel = panels.setdefault(label({**row["case"], "tokens": "any"}).replace(" T=any", ""), {})
        for method in COLOURS.keys() & row["methods"].keys():
            panel.setdefault(method, []).append((row["case"]["tokens"], row["methods"][method]["ratio"]))
    ratios = [r for panel in panels.values() for points in panel.values() for _, r in points]
    bottom, top = min(1.0, *ratios) / 1.02, max(1.3, *ratios) * 1.1
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 4 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        counts = sorted({tokens for points in panel.values() for tokens, _ in points})
        several = [m for m, points in panel.items() if len(points) > 1]
        shown = sorted(several or panel, key=list(COLOURS).index)
        for method in shown:
            axis.plot(*zip(*panel[method], strict=True), color=COLOURS[method], marker="o", ms=4,
                      lw=2.4 if method.startswith("SSVD-O") else 1.3)  # fmt: skip
        axis.set(xscale="log", yscale="log", title=name, xlabel="tokens", ylabel="time / frozen nn.Linear",
                 ylim=(bottom, top), xlim=(counts[0] / 1.2, counts[-1] * (counts[-1] / counts[0]) ** 0.8 * 1.2))
        axis.set_xticks(counts, [f"{t:,}" for t in counts])
        axis.set_yticks([t for t in TICKS if bottom <= t <= top], [f"{t:g}" for t in TICKS if bottom <= t <= top])
        axis.minorticks_off()
        axis.grid(axis="y", lw=0.4, alpha=0.5)
        ends = {method: panel[method][-1] for method in shown}
        heights = {m: math.log(y) for m, (_, y) in ends.items()}
        for method, at in _apart(heights, math.log(bottom), math.log(top)).items():
            x, colour = ends[method][0], COLOURS[method]
            axis.annotate(method, ends[method], (1.25 * x, math.exp(at)), color=colour, fontsize=8, va="center",
                          arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5})  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _apart(heights: dict[str, float], low: float, high: float) -> dict[str, float]:
    """The heights moved, as little as that takes, so that no two are nearer than GAP of the axis."""
    gap = GAP * (high - low)
    order = sorted(heights, key=heights.__getitem__)
    placed: list[list[str]] = []

    def span(group: list[str]) -> tuple[float, float]:
        middle = sum(heights[m] for m in group) / len(group)
        half = gap * (len(group) - 1) / 2
        start = min(max(middle - half, low + gap / 2), high - gap / 2 - 2 * half)
        return start, start + 2 * half

    for method in order:
        placed.append([method])
        while len(placed) > 1 and span(placed[-2])[1] + gap > span(placed[-1])[0]:
            placed[-2:] = [placed[-2] + placed[-1]]
    return {m: span(group)[0] + gap * i for group in placed for i, m in enumerate(group)}


def show(results: dict[str, Any]) -> None:
    """Prints the tables to the terminal."""
    for title, (header, rows) in ((describe(results), table(results)), ("Memory", memory_table(results))):
        shown = Table(title=title)
        for column in header:
            shown.add_column(column, justify="left" if column in ("layer", "method") else "right")
        for row in rows:
            shown.add_row(*row)
        if rows:
            Console(width=max(Console().width, 200)).print(shown)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    show(results)
    if options.markdown:
        options.markdown.write_text(markdown(results), encoding="utf-8")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
