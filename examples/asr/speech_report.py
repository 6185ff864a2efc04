"""Tables and plots of the experiments on real speech: intervals by speaker and over seeds, learning and forgetting."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .statistics import Interval, over_seeds, over_utterances, paired_difference
from .tables import NAMES, Runs, group, last, markdown, show

Evaluation = dict[str, Any]


def wrong(evaluation: Evaluation, capped: bool = False) -> list[int]:
    """Wrong words of each utterance; capped: at most as many as it has words."""
    counts = evaluation["words_wrong"]
    return list(map(min, counts, evaluation["words"])) if capped else counts


def ends(runs: Runs, voice: str, split: str = "test", share: float = 1.0) -> list[Evaluation]:
    """Each run's last evaluation on a voice, where it has one."""
    return [e for r in runs if (e := last(r, voice, split, share)) is not None]


def rate(found: list[Evaluation]) -> str:
    """Word error rate with its interval by speaker, seeds averaged first."""
    if not found:
        return "-"
    return str(over_utterances(list(map(wrong, found)), found[0]["words"], speakers=found[0]["speakers"]))


def mean(found: list[Evaluation], name: str) -> str:
    """The mean over seeds of one of an evaluation's numbers."""
    return f"{statistics.fmean(e[name] for e in found):.1f}" if found else "-"


def between(interval: Interval) -> str:
    """Student's interval over seeds, without the mean."""
    return "-" if math.isnan(interval.low) else f"{interval.low:.1f} to {interval.high:.1f}"


def table(runs: Runs) -> str:
    """A row per setting: errors on the last voice trained and on the source."""
    varied, rows = group(runs)
    lines = []
    for values, same in rows:
        s = same[0]["settings"]
        target, source = ends(same, s["voices"][-1]), ends(same, s["source"])
        spread = between(over_seeds([e["wer"] for e in target])) if target else "-"
        lines.append([*map(show, values), str(len(same)), f"{same[0]['trained']:,}", rate(target), spread,
                      *(mean(target, k) for k in ("capped", "cer", "deletions")), rate(source),
                      *(mean(source, k) for k in ("capped", "deletions"))])  # fmt: skip
    header = ["WER target", "over seeds", "capped", "CER", "deleted", "WER source", "capped", "deleted"]
    return markdown([*varied, "seeds", "trained", *header], lines)


def differences(runs: Runs, than: str = "lora") -> str:
    """Each method less LoRA, in points, over the seeds that both have: negative is fewer errors."""
    cells = {(r["settings"]["method"], r["settings"]["seed"]): r for r in runs}
    own = {m: {seed for method, seed in cells if method == m} for m in NAMES}
    lines = []
    for method in [m for m in NAMES if m not in ("none", than) and own[m] & own[than]]:
        seeds = sorted(own[method] & own[than])
        pairs = [(cells[method, seed], cells[than, seed]) for seed in seeds]
        settings = pairs[0][0]["settings"]
        line = [NAMES[method], str(len(seeds))]
        for voice in (settings["voices"][-1], settings["source"]):
            a, b = (ends([pair[i] for pair in pairs], voice) for i in (0, 1))
            line += [_less(a, b), between(over_seeds([x["wer"] - y["wer"] for x, y in zip(a, b, strict=True)]))]
        lines.append(line)
    if not lines:
        return "No other method has been run beside LoRA yet."
    return markdown(["less LoRA's WER, points", "seeds", "target", "over seeds", "source", "over seeds"], lines)


def _less(a: list[Evaluation], b: list[Evaluation]) -> str:
    return str(paired_difference(list(map(wrong, a)), list(map(wrong, b)), a[0]["words"], speakers=a[0]["speakers"]))


def tuning(runs: Runs) -> str:
    """A row per method and rate: the development speakers, by whom a rate is chosen, the test speakers, the source."""
    lines = []
    for (method, value), same in _by(runs, lambda s: (s["method"], s["rate"])):
        s = same[0]["settings"]
        test, source = ends(same, s["voices"][-1]), ends(same, s["source"])
        dev = mean(ends([r for r in same if r["settings"]["seed"] == 0], s["voices"][-1], "dev"), "wer")
        lines.append([NAMES[method], "-" if method == "none" else f"{value:g}", str(len(same)), dev, rate(test),
                      mean(test, "capped"), rate(source)])  # fmt: skip
    return markdown(["method", "rate", "seeds", "WER dev, seed 0", "WER test", "capped", "WER source"], lines)


def _by(runs: Runs, key: Callable[[dict[str, Any]], tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], Runs]]:
    found: dict[tuple[Any, ...], Runs] = defaultdict(list)
    for r in runs:
        found[key(r["settings"])].append(r)
    names = list(NAMES)
    return sorted(found.items(), key=lambda item: (item[0][0] != "none", names.index(item[0][0]), item[0][1:]))


def parts(runs: Runs) -> str:
    """A row per setting: the loss of the last ten training steps, errors, how far the adapters moved (worst layer)."""
    varied, rows = group(runs)
    lines = []
    for values, same in rows:
        s = same[0]["settings"]
        final = [r["diagnostics"][-1] for r in same]
        loss = statistics.fmean(statistics.fmean(r["losses"][-10:]) for r in same)
        moved = [f"{max(d[k] for d in final):.1e}" for k in ("inner_angle", "outer_angle", "scale_change")]
        dev = mean(ends(same, s["voices"][-1], "dev"), "wer")
        lines.append([*map(show, values), str(len(same)), f"{loss:.3f}", dev, rate(ends(same, s["source"])), *moved])
    header = ["training loss", "WER dev", "WER source", "inner angle", "outer angle", "scales"]
    return markdown([*varied, "seeds", *header], lines)


def steps(runs: Runs) -> str:
    """A row per method and step of one run: errors on target and source."""
    lines = []
    for (method,), same in _by(runs, lambda s: (s["method"],)):
        s = same[0]["settings"]
        at: dict[int, dict[str, list[Evaluation]]] = defaultdict(lambda: defaultdict(list))
        for r in same:
            for e in r["evaluations"]:
                at[e["step"]][e["voice"]].append(e)
        lines += [[NAMES[method], str(step), str(len(same)), rate(found[s["voices"][-1]]), rate(found[s["source"]])]
                  for step, found in sorted(at.items())]  # fmt: skip
    return markdown(["method", "steps", "seeds", "WER target", "WER source"], lines)


def tested_shares(settings: dict[str, Any]) -> tuple[float, ...]:
    """The shares of W' - W0 that a run was tested with, all of it last."""
    return *settings.get("shares", ()), 1.0


def shares(runs: Runs) -> str:
    """A row per method and share of what it learnt: development speakers, by whom one is chosen, test, source."""
    lines = []
    for (method,), same in _by(runs, lambda s: (s["method"],)):
        s, target = same[0]["settings"], same[0]["settings"]["voices"][-1]
        for share in tested_shares(s):
            found = [ends(same, voice, split, share) for voice, split in
                     ((target, "dev"), (target, "test"), (s["source"], "test"))]  # fmt: skip
            lines.append([NAMES[method], "-" if method == "none" else f"{share:g}", str(len(same)),
                          mean(found[0], "wer"), *map(rate, found[1:])])  # fmt: skip
    return markdown(["method", "share", "seeds", "WER dev", "WER test", "WER source"], lines)


def shifts(runs: Runs) -> str:
    """A row per voice that the model was tested on before training."""
    lines = []
    for e in (e for r in runs if r["settings"]["method"] == "none" for e in r["evaluations"]):
        lines.append([e["voice"], rate([e]), *(f"{e[k]:.1f}" for k in ("capped", "cer", "deletions"))])
    return markdown(["before training", "WER", "capped", "CER", "deleted"], lines)


Point = tuple[float, float, str]


def frontier(runs: Runs) -> dict[str, list[Point]]:
    """By method: (WER on the target, WER on the source, rate), a point per rate, seeds averaged."""
    found: dict[str, list[Point]] = defaultdict(list)
    for (method, value), same in _by(runs, lambda s: (s["method"], s["rate"])):
        s = same[0]["settings"]
        x, y = ends(same, s["voices"][-1]), ends(same, s["source"])
        if x and y:
            label = "" if method == "none" else f"{value:g}"
            found[method].append((statistics.fmean(e["wer"] for e in x), statistics.fmean(e["wer"] for e in y), label))
    return found


def between_ends(runs: Runs) -> dict[str, list[Point]]:
    """By method: (WER on the target, WER on the source, share), from the model before to all that was learnt."""
    found: dict[str, list[Point]] = {}
    for (method,), same in _by(runs, lambda s: (s["method"],)):
        s = same[0]["settings"]
        wer = [[[e["wer"] for e in ends(same, voice, share=share)] for voice in (s["voices"][-1], s["source"])]
               for share in tested_shares(s)]  # fmt: skip
        texts = [""] if method == "none" else [f"{share:g}" for share in tested_shares(s)]
        found[method] = [(statistics.fmean(x), statistics.fmean(y), text)
                         for (x, y), text in zip(wer, texts, strict=True)]  # fmt: skip
    return found


def curve(runs: Runs) -> dict[str, list[Point]]:
    """By method: (WER on the target, WER on the source, steps), seeds averaged."""
    found: dict[str, list[Point]] = {}
    for (method,), same in _by(runs, lambda s: (s["method"],)):
        s = same[0]["settings"]
        at: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for r in same:
            for e in r["evaluations"]:
                if e["voice"] in (s["voices"][-1], s["source"]):
                    at[e["step"]][e["voice"] == s["source"]].append(e["wer"])
        found[method] = [(statistics.fmean(x), statistics.fmean(y), str(k or "")) for k, (x, y) in sorted(at.items())]
    return found


def plot(points: dict[str, list[Point]], labels: str, target: str, path: Path, limit: float = 60.0) -> str:
    """Learning against forgetting, a line per method, as Markdown. Points beyond `limit` are named, not drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    left_out = [f"{NAMES[method]} {text} ({x:.0f}, {y:.0f})" for method, own in points.items() for x, y, text in own
                if max(x, y) > limit]  # fmt: skip
    for method in [m for m in NAMES if m in points]:
        xs, ys, texts = zip(*(p for p in points[method] if max(p[:2]) <= limit), strict=True)
        axes.plot(xs, ys, "*k" if method == "none" else "o-", markersize=9 if method == "none" else 4, linewidth=1,
                  label=NAMES[method])  # fmt: skip
        _annotate(axes, zip(xs, ys, texts, strict=True))
    axes.set(xlabel=f"WER {target}, % (labels: {labels})", ylabel="WER LibriSpeech test-other, %")
    if left_out:
        axes.set_title(f"beyond the axes: {', '.join(left_out)}", fontsize=7)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return f"![{path.stem}](experiments/{path.name})"


def _annotate(axes: Any, points: Iterable[Point]) -> None:
    for x, y, text in points:
        axes.annotate(text, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
