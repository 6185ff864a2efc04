"""What Python takes for a layer in two checkouts, in turns of one round: both meet the same moods of the machine.

    python -m benchmarks.host_turns OTHER [--cases cached merged] [--restarts 5] [--seconds 20] [--out DIR]

OTHER: a checkout with bench_host.py and its compiled core, such as a worktree of an earlier commit. Each case runs in
processes of its own, several times anew, as where things come to lie in memory changes a process's times by a tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from .bench_host import CASES, GOALS, SIZES
from .record import ROOT, commit, facts, stem
from .report import as_markdown

_SERVER = """
import sys, torch
from contextlib import ExitStack
from benchmarks import bench_host as b
from benchmarks.fake_gpu import fake_gpu
torch.set_num_threads(1)
torch.set_flush_denormal(True)  # a fake GPU's results are whatever lay in memory
case = sys.argv[1]
count = b.LAYERS if case == b.GROUP else 1
with fake_gpu(), ExitStack() as stack:
    steps = {kind: b.CASES[case](kind, stack) for kind in b.SIZES}
    for step in steps.values():
        for _ in range(3):
            step()
    print("ready", flush=True)
    for kind in sys.stdin:
        print(b.microseconds(steps[kind.strip()], count, 1), flush=True)
"""


class Server:
    """A process of one checkout that runs a round of a case when asked."""

    def __init__(self, checkout: Path, case: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _SERVER, case], cwd=checkout, text=True,
                                        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def line(self) -> str:
        """What it says next; RuntimeError where it has died."""
        assert self.process.stdout is not None
        if not (said := self.process.stdout.readline()):
            raise RuntimeError(f"the process in {self.process.args} ended with {self.process.wait()}")
        return said.strip()

    def round(self, kind: str) -> float:
        """Microseconds a layer."""
        assert self.process.stdin is not None
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()
        return float(self.line())


@contextmanager
def serving(checkouts: dict[str, Path], case: str) -> Iterator[dict[str, Server]]:
    """A process for each checkout, ready."""
    with ExitStack() as stack:
        servers = {name: Server(path, case) for name, path in checkouts.items()}
        for server in servers.values():
            stack.callback(server.process.wait)
            stack.callback(server.process.terminate)
        for server in servers.values():
            while server.line() != "ready":  # libraries say things, too
                pass
        yield servers


def measure(checkouts: dict[str, Path], case: str, restarts: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each kind of layer."""
    times: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in checkouts for kind in SIZES}
    ratios: dict[str, list[float]] = {kind: [] for kind in SIZES}
    for _ in range(restarts):
        now: dict[str, list[float]] = {kind: [] for kind in SIZES}
        with serving(checkouts, case) as servers:
            end, turn = time.monotonic() + seconds / restarts, 0
            while time.monotonic() < end or not turn:
                for kind in SIZES:
                    order = list(servers)[:: 1 if turn % 2 else -1]
                    found = {name: servers[name].round(kind) for name in order}
                    now[kind].append(found["now"] / found["before"])
                    for name, us in found.items():
                        times[name, kind].append(us)
                turn += 1
        for kind in SIZES:
            ratios[kind].append(median(now[kind]))
    return [{"case": case, "kind": kind, "ratio": median(ratios[kind]), "ratios": ratios[kind],
             **{name: {"least": min(times[name, kind]), "median": median(times[name, kind])} for name in checkouts}}
            for kind in SIZES]  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The rows as a table: the least of all rounds, and the median of the rounds' ratios. The goal of "one token" is
    what it takes beyond nn.Linear."""
    lines = []
    for row in results["rows"]:
        goal = GOALS.get(row["case"], (None, None))[0]
        lines.append([row["case"], row["kind"], f"{row['before']['least']:.0f}", f"{row['now']['least']:.0f}",
                      f"{goal}" if goal else "-", f"{row['ratio']:.2f}"])  # fmt: skip
    header = ["forward + backward, a layer", "kind", "us, before", "us, now", "goal", "ratio"]
    return "\n".join(as_markdown(header, lines)) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="of measuring a case, all restarts together")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if not (options.other / "benchmarks" / "bench_host.py").is_file():
        parser.error(f"OTHER={str(options.other)!r} has no benchmarks/bench_host.py; allowed: a checkout that has")
    checkouts = {"before": options.other.resolve(), "now": ROOT.resolve()}
    rows = [row for case in options.cases for row in measure(checkouts, case, options.restarts, options.seconds)]
    results = {**facts("cpu"), "commits": {name: commit(path) for name, path in checkouts.items()},
               "restarts": options.restarts, "rows": rows}  # fmt: skip
    path = stem(options.out, results, "host-turns")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results), f"results: {path}.json", sep="\n")


if __name__ == "__main__":
    main()
