"""The run on a GPU machine, without one: steps that fail, hang or are killed cost no other step, and a call goes on."""

import importlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the peers need PEFT")
from benchmarks import __main__ as bench_layers
from benchmarks import bench_model, bench_preparation, gpu_run, soak
from benchmarks.gpu_run import PARTS, Step, plan, python, run
from benchmarks.record import TIME_IS_UP, lines

ROOT = Path(__file__).parents[2]


def says(text, code=0, **options):
    return Step(text, python("-S", "-c", f"import sys; print({text!r}, sys.argv[1:]); sys.exit({code})"), 60, **options)


def results(out):
    return {line["step"]: line["result"] for line in lines(out / "steps.jsonl")}


def test_every_step_runs_whatever_failed_before(tmp_path, capsys):
    hangs = Step("hangs", python("-S", "-c", "import time; print('begun', flush=True); time.sleep(60)"), 1.0)
    steps = [says("first"), says("breaks", 3), Step("absent", ("no-such-tool",), 9), hangs, says("last", minutes=True)]
    assert run(steps, tmp_path / "out", 1.0, tmp_path / "all.tar.gz") == 1
    found = {"first": "ok", "breaks": "failed", "absent": "failed", "hangs": "too long", "last": "ok"}
    assert results(tmp_path / "out") == found
    shown, log = capsys.readouterr().out, (tmp_path / "out" / "log.txt").read_text()
    assert "| breaks | failed | 3 |" in shown and "| absent | failed | 127 |" in shown and "    begun" in shown
    assert "    breaks []" in shown
    assert "last ['--minutes', '0." in log and shown.endswith((tmp_path / "out" / "summary.md").read_text() + "\n")
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"out/log.txt", "out/steps.jsonl", "out/summary.md"} <= set(archive.getnames())


def test_the_next_call_goes_on_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    marks = tmp_path / "marks"

    def marked(name, code=0, **options):
        command = f"import sys; open({str(marks)!r}, 'a').write({name!r}); sys.exit({code})"
        return Step(name, python("-S", "-c", command), 60, **options)

    steps = [marked("b", always=True), marked("f", 2), marked("c", TIME_IS_UP, minutes=True), marked("n")]
    monkeypatch.setattr(gpu_run, "ENOUGH", 1e9)
    assert run(steps, tmp_path, 1.0) == TIME_IS_UP and "| n | not run | - | - |" in capsys.readouterr().out
    assert not marks.exists()
    monkeypatch.undo()
    assert run(steps, tmp_path, 1.0) == 1 and marks.read_text() == "bfcn"
    assert run(steps, tmp_path, 1.0) == 1 and marks.read_text() == "bfcn" + "bc"  # what is made anew, what was cut
    monkeypatch.setattr(gpu_run, "code", lambda: "other")
    run(steps, tmp_path, 1.0)
    assert marks.read_text() == "bfcnbc" + "bfcn"


def test_a_step_that_had_less_than_its_time_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "ENOUGH", 0.1)
    slow = Step("slow", python("-S", "-c", "import time; time.sleep(30)"), 60)
    assert run([slow, says("after")], tmp_path, 1 / 60) == TIME_IS_UP
    assert results(tmp_path) == {"slow": "cut"}


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_goes_on(tmp_path, kind):
    script = (
        "import sys; from benchmarks import gpu_run; from benchmarks.gpu_run import Step, python\n"
        "slow = 'import os, sys, time; open(sys.argv[1], \"w\").write(str(os.getpid())); time.sleep(60)'\n"
        "steps = [Step('quick', python('-S', '-c', ''), 60),"
        " Step('slow', python('-S', '-c', slow, sys.argv[1] + '/pid'), 60)]\n"
        "gpu_run.plan = lambda *_: steps\n"
        "sys.exit(gpu_run.main(['gpu', '--out', sys.argv[1]]))")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(kind)
    process.wait(10)
    child = int((tmp_path / "pid").read_text())
    if kind == signal.SIGTERM:
        assert process.returncode == TIME_IS_UP and "| slow | not run |" in (tmp_path / "summary.md").read_text()
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    else:
        os.kill(child, signal.SIGKILL)
    assert results(tmp_path) == {"quick": "ok"}
    assert run([Step("quick", ("no-such-tool",), 9), says("slow")], tmp_path, 1.0) == 0


def test_the_plan(tmp_path, monkeypatch):
    steps = plan("gpu", tmp_path)
    names = [step.name for step in steps]
    tests = sorted(path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    assert names == ["build", "info", *tests, "preparation", "kernels", "layers", "memcheck", "racecheck"]
    assert steps[0].always and steps[0].environment["SSVDO_BUILD"] == "1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, wanted in (((9, 0), "90a"), ((8, 6), "86"), ((10, 0), "100a")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        for set_by_make in ("", "none"):
            monkeypatch.setenv("SSVDO_CUDA_ARCHS", set_by_make)
            assert gpu_run.architecture() == wanted
    monkeypatch.setenv("SSVDO_CUDA_ARCHS", "80,90a")
    assert gpu_run.architecture() == "80,90a"
    assert all(step.seconds <= 240 and not step.minutes for step in steps[1:-5])
    for part in PARTS[1:]:
        assert plan(part, tmp_path)[-1].minutes


@pytest.mark.parametrize("dry", [False, True])
def test_every_benchmark_takes_the_plan_s_options(tmp_path, monkeypatch, dry):
    """With nothing measured: each row is an error, or there is no GPU."""

    def none(*about, **more):
        raise ArithmeticError("nothing is measured here")

    for module, name in ((bench_layers, "measure_layer"), (bench_model, "measure"), (bench_preparation, "measure"),
                         (soak, "soak")):  # fmt: skip
        monkeypatch.setattr(module, name, none)
    ran = []
    for step in (s for part in PARTS for s in plan(part, tmp_path, dry) if s.minutes):
        module = importlib.import_module({"benchmarks": "benchmarks.__main__"}.get(step.command[2], step.command[2]))
        if torch.cuda.is_available() or (dry and step.name != "kernels"):
            with pytest.raises(ArithmeticError) if step.name == "soak" else nullcontext():
                assert module.main([*step.command[3:], "--minutes", "1"]) == 1
        else:
            with pytest.raises(SystemExit):
                module.main([*step.command[3:], "--minutes", "1"])
        ran.append(step.name)
    assert ran == ["preparation", "kernels", "layers", "all layers", "models", "soak"]
