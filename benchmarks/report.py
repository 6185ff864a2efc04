"""Tables and a plot from a results file: `python -m benchmarks.report results.json [--markdown F] [--plot F]`."""

from __future__ import annotations

import argparse
import json
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
    header = ["layer", "frozen, ms", *names[1:], "floor (frozen at)", "MB: SSVD-O / ESPnet-style",
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
                     *(f"{m[n]['ratio']:.2f}" if n in m else "-" for n in names[1:]),
                     least, " / ".join(memory), plan["chosen"] + loss])
    return header, rows


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
    losses = [r["planner"]["loss"] for r in results["rows"] if r["planner"]["loss"] is not None]
    if losses:
        near = sum(loss <= 0.05 for loss in losses)
        lines += ["", f"The planner's form is within 5% of the fastest at {near} of {len(losses)} points."]
    header, rows = memory_table(results)
    if rows:
        lines += ["", "Memory: what is not trained beside W0, what is kept between steps, and the most that "
                  "training steps take, less what the frozen layer's do.", "", *as_markdown(header, rows)]
    return "\n".join(lines) + "\n"


def describe(results: dict[str, Any]) -> str:
    """One line: device, threads, dtype, versions, commit and date."""
    return (f"{results['device']}, {results['threads']} threads, {results['dtype']}, torch {results['torch']}, commit "
            f"{results['commit']}, {results['date']}. Forward + backward, ratio to a frozen nn.Linear in the same run.")


def plot(results: dict[str, Any], path: Path) -> None:
    """Ratio to frozen against tokens, a line a method, a panel a layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(label({**row["case"], "tokens": "any"}), []).append(row)
    methods = dict.fromkeys(m for r in results["rows"] for m in r["methods"] if not m.startswith("form"))
    colours = {method: f"C{i}" if i < 10 else "black" for i, method in enumerate(methods)}
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.5 * columns, 3.6 * lines), squeeze=False, sharey=True)
    for axis, (name, rows) in zip(axes.flat, groups.items(), strict=False):
        for method in [m for m in colours if m in rows[0]["methods"]]:
            known = [r for r in rows if method in r["methods"]]
            points = sorted((r["case"]["tokens"], r["methods"][method]["ratio"]) for r in known)
            axis.plot(*zip(*points, strict=True), marker="o", label=method, color=colours[method])
        axis.set(xscale="log", yscale="log", title=name.replace(" T=any", ""), xlabel="tokens")
        ticks = sorted({r["case"]["tokens"] for r in rows})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
    axes[0][0].set_ylabel("time / frozen nn.Linear")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


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
