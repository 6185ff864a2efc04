"""Benchmarks that are cut, fail or are killed keep what they have measured, and go on from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the peers need PEFT")
from benchmarks import __main__ as layers
from benchmarks import record, runner
from benchmarks.record import TIME_IS_UP, Rows
from benchmarks.runner import interleave

ROOT = Path(__file__).parents[2]
TINY = ["--d", "16", "--rank", "2", "--p", "0.5", "--kinds", "tall"]


def table(results):
    return f"{len(results['rows'])} rows"


def test_rows_are_on_disk_at_once_and_are_not_measured_again(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(key):
        measured.append(key)
        if key == "b":
            raise torch.OutOfMemoryError("much too large\nand more")
        on_disk = [line["key"] for line in record.lines(next(tmp_path.glob("*.jsonl")))[1:]]
        assert on_disk == measured[:-1]
        return {"value": len(measured)}

    clock = iter([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 61.0])
    monkeypatch.setattr(record.time, "monotonic", lambda: next(clock))
    first = Rows(tmp_path, "cpu", "float32", "some", dtype="float32")
    missing = first.fill("abc", measure, minutes=1.0)
    assert missing == ["c"] and first.finish(table, missing) == TIME_IS_UP
    assert "not measured: b: OutOfMemoryError: much too large\n" in capsys.readouterr().out
    with next(tmp_path.glob("*.jsonl")).open("a") as file:
        file.write('{"key": "c", "val')  # killed in the middle of a line
    monkeypatch.undo()
    again = Rows(tmp_path, "cpu", "float32", "some", dtype="float32")
    assert again.fill("abc", measure) == [] and measured == ["a", "b", "c"]
    assert again.finish(table, []) == 1  # b is an error still
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert [row["value"] for row in results["rows"]] == [1, 3] and "missing" not in results
    assert results["errors"] == {"b": "OutOfMemoryError: much too large"} and not list(tmp_path.glob("*.jsonl"))


def test_rows_of_other_code_are_not_taken_over(tmp_path, monkeypatch):
    Rows(tmp_path, "cpu", "some").fill("a", lambda key: {})
    assert [row["key"] for row in Rows(tmp_path, "cpu", "some").rows] == ["a"]
    assert Rows(tmp_path, "cpu", "some", dtype="float64").rows == []
    Rows(tmp_path, "cpu", "some").fill("a", lambda key: {})
    monkeypatch.setattr(record, "code", lambda: "other")
    assert Rows(tmp_path, "cpu", "some").rows == []


def test_rows_outlive_a_process_that_is_killed(tmp_path):
    dying = ("import os, sys; from pathlib import Path; from benchmarks.record import Rows;"
             "Rows(Path(sys.argv[1]), 'cpu').fill('ab', lambda key: os._exit(9) if key == 'b' else {'value': 1})")
    done = subprocess.run([sys.executable, "-c", dying, str(tmp_path)], cwd=ROOT, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)  # fmt: skip
    assert done.returncode == 9
    again = Rows(tmp_path, "cpu")
    assert [(row["key"], row["value"]) for row in again.rows] == [("a", 1)]
    assert again.fill("ab", lambda key: {"value": 2}) == [] and [row["value"] for row in again.rows] == [1, 2]


def test_the_layer_suite_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "measure_layer", lambda case, *about: {"case": case})
    monkeypatch.setattr(layers, "markdown", table)
    monkeypatch.setattr(layers, "plot", lambda *about: None)
    arguments = [*TINY, "--tokens", "4", "5", "--out", str(tmp_path)]
    assert layers.main([*arguments, "--minutes", "0"]) == TIME_IS_UP
    assert layers.main(arguments) == 0
    (file,) = tmp_path.glob("*.json")
    keys = [row["key"] for row in json.loads(file.read_text())["rows"]]
    assert keys == ["16->64 T=4 p=0.5 l=2", "16->64 T=5 p=0.5 l=2"]


def test_a_method_that_fails_costs_no_other_its_numbers(tmp_path, monkeypatch, capsys):
    def broken(self, x):
        raise ValueError("no such kernel")

    monkeypatch.setattr("benchmarks.peers.EspnetStyleSSVD.forward", broken)
    monkeypatch.setattr("benchmarks.bench_layer.peaked", lambda *about: False)
    wanted = ["--peers", "LoRA", "ESPnet-style SSVD"]
    assert layers.main([*TINY, "--tokens", "4", *wanted, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "not measured: 16->64 T=4 p=0.5 l=2, ESPnet-style SSVD: ValueError: no such kernel" in shown
    assert "| LoRA |" in shown and "DoRA" not in shown
    with pytest.raises(SystemExit):
        layers.main(["--peers", "lora"])
    assert "--peers: 'lora' is unknown; allowed: frozen, full, LoRA" in capsys.readouterr().err


class FakeStream:
    """A GPU that works through what the host starts, on one clock; a launch takes the host 1 unit, a step the GPU 5."""

    def __init__(self):
        self.now = self.free = 0.0

    def launch(self, host, busy):
        self.now += host
        self.free = max(self.free, self.now) + busy

    def sleep(self, cycles):
        self.launch(0.0, cycles)

    def wait(self, *_):
        self.now = max(self.now, self.free)


@pytest.mark.parametrize("waits", [False, True])
def test_gpu_time_has_no_gaps_and_host_time_no_waiting(monkeypatch, waits):
    stream = FakeStream()

    class Event:
        def __init__(self, **_):
            self.at = 0.0

        def record(self):
            self.at = max(stream.free, stream.now)

        def query(self):
            return stream.now >= self.at

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(runner.time, "perf_counter", lambda: stream.now)
    monkeypatch.setattr(runner, "launches", lambda step: 1)
    for name, value in {"synchronize": stream.wait, "_sleep": stream.sleep, "Event": Event}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(runner.Queue, "CYCLES", 1.0)
    flushed = []
    buffer = type("", (), {"zero_": lambda self: flushed.append(stream.now)})()
    monkeypatch.setattr(runner.torch, "empty", lambda *_, **__: buffer)

    def step(busy):
        def run():
            stream.launch(10.0, busy)  # Python takes twice as long as, or as long as, the GPU
            if waits:
                stream.wait()

        return run

    found = interleave({"floor": step(5.0), "twice": step(10.0)}, 3, "floor", torch.device("cuda"))
    assert len(flushed) >= 4 * 2 * runner.Queue.STEPS
    if waits:
        assert not found["floor"].queued and not found["twice"].queued
        return
    assert found["floor"].median_ms == pytest.approx(5e3) and found["twice"].ratio == pytest.approx(2.0)
    assert found["floor"].host_ms == pytest.approx(10e3) and found["twice"].queued
