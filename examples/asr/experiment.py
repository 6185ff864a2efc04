"""Runs the experiments described in examples/asr/experiments/*.yaml and keeps every result.

    python -m examples.asr.experiment baseline              # one experiment, reduced
    python -m examples.asr.experiment all --quick           # a smoke test of every kind of run, minutes
    python -m examples.asr.experiment baseline --full       # the whole grid; stop and go on as you like

Each result is written as soon as it is there; what is there is not run again. results/NAME.json also lists what the
full grid still lacks. Several runs go side by side on a CPU, a thread or so each; one at a time on a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from ssvdo_kernels import SSVDOConfig

from .corpus import read_text
from .methods import METHODS
from .options import COUNT, MINUTES, TARGET, as_script
from .run import EXTRA, SETTINGS, Run, check, prepare

HERE = Path(__file__).parent
PROFILES = ("quick", "reduced", "full")
ALLOWED = {f.name for f in fields(SSVDOConfig)} | set(EXTRA)


@dataclass(frozen=True)
class Experiment:
    """A grid of runs. `grids`: each maps settings to lists of values; `cases` of a grid are named sets of settings."""

    name: str
    question: str
    settings: dict[str, Any]
    rates: dict[str, float]
    grids: list[dict[str, Any]]
    overrides: dict[str, dict[str, Any]]
    finding: str = ""

    @classmethod
    def read(cls, path: Path) -> Experiment:
        """From YAML: question, finding, settings, rates (by method), grids, reduced, quick.

        Raises:
            ValueError: a key or setting is unknown, or a method has no rate; names the file.
        """
        text = read_text(path)
        try:
            data = yaml.safe_load(text)
            if not isinstance(data, dict):
                raise ValueError("no mapping at the top")
            known = {"question", "finding", "settings", "rates", "grids", "reduced", "quick"}
            if unknown := set(data) - known:
                raise ValueError(f"key {sorted(unknown)[0]!r} is unknown; allowed: {', '.join(sorted(known))}")
            overrides = {p: data.get(p) or {} for p in PROFILES[:2]}
            if unknown := {k for o in overrides.values() for k in o} - {"grid", "settings"}:
                raise ValueError(f"key {sorted(unknown)[0]!r} of a profile is unknown; allowed: grid, settings")
            made = cls(path.stem, data.get("question", ""), data.get("settings") or {}, data.get("rates") or {},
                       data.get("grids") or [], {**overrides, "full": {}}, data.get("finding", ""))  # fmt: skip
            for profile in PROFILES:
                for cell in made.cells(profile):
                    check(cell, ALLOWED)
                    if cell.get("method") not in (*METHODS, "none"):
                        raise ValueError(f"method={cell.get('method')!r} is unknown; allowed: {', '.join(METHODS)}")
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None
        return made

    def cells(self, profile: str) -> list[dict[str, Any]]:
        """The settings of every run, the most telling first: seed by seed.

        A profile replaces values of the grids that have them (`grid`) and single settings (`settings`).
        """
        changed = self.overrides[profile]
        common = {**self.settings, **changed.get("settings", {})}
        found: dict[str, dict[str, Any]] = {}
        for whole in self.grids:
            grid = {k: v if k == "cases" else changed.get("grid", {}).get(k, v) for k, v in whole.items()}
            for cell in _product(grid, common):
                if cell.get("method") == "none":
                    cell = {k: v for k, v in cell.items() if k not in ("evaluate_at", "shares")} | {"steps": 0}
                if "rate" not in cell and cell.get("method") != "none":
                    if cell.get("method") not in self.rates:
                        raise ValueError(f"rates: none for method {cell.get('method')!r}")
                    cell["rate"] = self.rates[cell["method"]]
                found.setdefault(key_of(cell), cell)
        return sorted(found.values(), key=lambda c: c.get("seed", 0))


def _product(grid: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cases = grid.get("cases") or [{}]
    names = [k for k in grid if k != "cases"]
    for case in cases:
        for values in itertools.product(*(grid[k] for k in names)):
            yield {**common, **dict(zip(names, values, strict=True)), **case}


def key_of(settings: Mapping[str, Any]) -> str:
    """What tells one run from another: a hash of all its settings, defaults included."""
    full = {**SETTINGS, **settings}
    return hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:12]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The runs in a results file, by their keys.

    Raises:
        ValueError: the file holds something else; names it.
    """
    text = read_text(path)
    try:
        runs: dict[str, dict[str, Any]] = json.loads(text)["runs"]
        if all(isinstance(r["settings"], dict) and isinstance(r["evaluations"], list) for r in runs.values()):
            return runs
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged, or no file of results; move it away to begin anew") from None


class Store:
    """results/NAME.json: written whole after every run, through a temporary file."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.path = experiment, folder / f"{experiment.name}.json"
        self.runs: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.runs = read_results(self.path)

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keeps a result."""
        self.runs[key] = {**result, "versions": versions()}
        self.write()

    def write(self) -> None:
        """The file of what is there and what is missing."""
        missing = [c for c in self.experiment.cells("full") if key_of(c) not in self.runs]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        lines = [f'{json.dumps(k)}: {json.dumps(v)}' for k, v in sorted(self.runs.items())]
        text = ",\n".join(lines)
        temporary.write_text(f'{{"experiment": {json.dumps(self.experiment.name)},\n"missing": '
                             f'{json.dumps(missing)},\n"runs": {{\n{text}\n}}}}\n', encoding="utf-8")
        temporary.replace(self.path)


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    import peft
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
            "device": device, "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """One run, in a worker."""
    return Run(settings).result()


def known(stores: list[Store]) -> dict[str, dict[str, Any]]:
    """Every run in the folders of `stores`, other experiments' too: one setting is run once."""
    found: dict[str, dict[str, Any]] = {}
    for folder in {store.path.parent for store in stores}:
        for path in sorted(folder.glob("*.json")):
            found.update(read_results(path))
    return found


def run_all(stores: list[Store], profile: str, workers: int, minutes: float | None, rerun: bool = False,
            threads: int | None = None) -> int:  # fmt: skip
    """Runs what is missing; returns how many runs of the profile remain. Ctrl-C keeps what is done."""
    elsewhere = {} if rerun else known(stores)
    for store in stores:
        store.runs.update({k: elsewhere[k] for k in map(key_of, store.experiment.cells("full")) if k in elsewhere})
    wanted = [(store, key_of(c), c) for store in stores for c in store.experiment.cells(profile)
              if rerun or key_of(c) not in store.runs]  # fmt: skip
    for store in stores:
        store.write()
    began, queue, running = time.monotonic(), list(reversed(wanted)), {}
    for shared in sorted({tuple({**SETTINGS, **c}[k] for k in ("corpus", "model", "seconds")) for _, _, c in wanted}):
        prepare(*shared)
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        with tqdm(total=len(wanted), unit="run", desc=profile) as bar:
            while queue or running:
                late = minutes is not None and time.monotonic() - began > 60 * minutes
                while queue and len(running) < workers and not late:
                    store, key, cell = queue.pop()
                    running[pool.submit(work, cell)] = (store, key)
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    _keep(done, *running.pop(done), bar)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return len(queue)


def _keep(done: Future[dict[str, Any]], store: Store, key: str, bar: Any) -> None:
    result = done.result()
    store.add(key, result)
    last = result["evaluations"][-1]
    bar.set_postfix_str(f"{store.experiment.name}: {result['settings']['method']} {last['voice']} {last['wer']:.1f}%")
    bar.update()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", help="names in examples/asr/experiments, paths of YAML files, or all")
    profile = parser.add_mutually_exclusive_group()
    profile.add_argument("--quick", action="store_const", const="quick", dest="profile", help="a step of a few runs")
    profile.add_argument("--full", action="store_const", const="full", dest="profile", help="every seed and setting")
    parser.add_argument("--workers", type=COUNT,
                        default=1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1))
    parser.add_argument("--threads", type=COUNT, help="of each worker (default: the processors, shared out)")
    parser.add_argument("--minutes", type=MINUTES, help="start no run after so many minutes")
    parser.add_argument("--out", type=TARGET, help="folder of the results (default: examples/asr/results; quick: a "
                        "temporary one)")  # fmt: skip
    parser.set_defaults(profile="reduced")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 when everything asked for is there, 3 when time ran out first."""
    options = parse(arguments)
    names = options.experiments
    if names == ["all"]:
        names = sorted(p.stem for p in (HERE / "experiments").glob("*.yaml"))
    paths = [Path(n) if n.endswith(".yaml") else HERE / "experiments" / f"{n}.yaml" for n in names]
    for path in paths:
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in (HERE / "experiments").glob("*.yaml")))
            raise ValueError(f"experiment {path.stem!r} is unknown; allowed: all, {known}, or a YAML file")
    folder = options.out or (Path("build/quick") if options.profile == "quick" else HERE / "results")
    stores = [Store(Experiment.read(path), folder) for path in paths]
    left = run_all(stores, options.profile, options.workers, options.minutes, rerun=options.profile == "quick",
                   threads=options.threads)
    print(f"results in {folder}" + (f"; {left} runs of this profile remain" if left else ""))
    return 3 if left else 0


if __name__ == "__main__":
    try:
        as_script(main, RuntimeError)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was done is kept, the same command goes on")
