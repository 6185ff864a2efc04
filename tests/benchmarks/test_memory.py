"""What methods keep and take is counted and measured as `benchmarks.memory` says."""

import json
import os
from dataclasses import replace

import pytest
import torch
from helpers import alive
from torch import nn

pytest.importorskip("peft", reason="the peers need PEFT")
from benchmarks import bench_layer, bench_memory, bench_model, memory
from benchmarks.peers import peers
from benchmarks.report import MEMORY, markdown
from benchmarks.stacks import STACKS, Recogniser
from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo

linux = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from /proc")


def layer(m=64, n=32, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(n, m, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, n", [(64, 32), (32, 64), (32, 32)])
def test_frozen_state_is_what_each_method_stores_beside_w0(m, n, dtype):
    d, large, k, size = 32, max(m, n), 16, dtype.itemsize
    l = 0 if m == n else 4  # noqa: E741
    factors = size * (large * d + d * d + d)  # U, V and S whole
    want = {"frozen": 0, "full": 0, "LoRA": 0, "DoRA": 0, "PiSSA": 0, "dense SSVD-O": factors,
            "ESPnet-style SSVD": factors + 8 * k * (k - 1)}  # fmt: skip
    linear = layer(m, n, dtype)
    for name, make in peers(0.5, l).items():
        if name != "OFT":
            assert memory.frozen_state(make(linear), linear) == want[name], name
    ours = SSVDOLinear.from_linear(linear, SSVDOConfig(inner_ratio=0.5, outer_rank=l))
    kept = ours.adapter.basis.nbytes + ours.adapter.singular_values.nbytes + size * large * l
    kept += 0 if ours.adapter.null_basis is None else ours.adapter.null_basis.nbytes
    assert memory.frozen_state(ours, linear) == kept
    assert ours.adapter.basis.shape == (d, d if l else k)
    with_buffer = nn.Sequential(linear)
    with_buffer.register_buffer("extra", torch.zeros(7), persistent=False)
    assert memory.frozen_state(with_buffer, linear) == 28


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["factored", "folded", "core", "merged"])
def test_held_is_every_tensor_that_outlives_a_step(dtype, path):
    """Two layers of one shape and one of another, prepared together where they are alike."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64)).to(dtype)
    model = apply_ssvdo(base, SSVDOConfig(outer_rank=4, target_modules="all-linear", path=path))
    assert memory.held(model) == 0
    x = torch.randn(40, 32, dtype=dtype)
    before = alive()
    model(x).sum().backward()
    after = alive()
    own = {t.untyped_storage().data_ptr() for p in model.parameters() for t in (p, p.grad) if t is not None}
    assert memory.held(model) == sum(n for at, n in after.items() if at not in before and at not in own) > 0
    for each in model:
        each.refresh()
    assert memory.held(model) == 0


def test_peers_hold_nothing_and_what_is_kept_in_attributes_is_seen():
    linear, x = layer(), torch.randn(5, 32)
    for name, make in peers(0.5, 4).items():
        module = make(linear)
        module(x.clone().requires_grad_()).sum().backward()
        assert memory.held(module) == 0, name
    hoarder = nn.Sequential(nn.Linear(2, 2))
    one = torch.zeros(8)
    hoarder[0].cache = {"a": [one, (one[2:],)], "b": hoarder[0].weight.detach()}
    assert memory.held(hoarder) == 32  # once, and not the weight's


class Hungry(nn.Module):
    """Keeps 24 MiB and takes 40 MiB more in a step."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.kept = inner, nn.Parameter(torch.ones(6 << 20), requires_grad=False)


def step_of(module):
    def step():
        if isinstance(module, Hungry):
            torch.ones(10 << 20).add_(1)

    return step


def peak(method):
    makers = {"frozen": lambda module: module, "hungry": Hungry, "copying": lambda module: nn.Linear(1024, 1024)}
    return memory.training_peak(lambda: nn.Linear(1024, 1024), makers[method], step_of, torch.device("cpu"))


@linux
def test_the_peak_is_what_is_kept_and_taken_beyond_the_pretrained_module():
    found = memory.peaks(("frozen", "hungry", "copying"), lambda name: memory.alone(peak, name))
    assert found["hungry"] == pytest.approx(64, abs=2)
    assert abs(found["frozen"]) < 2 and abs(found["copying"]) < 2  # a copy of W0 takes W0's place


def test_peaks_that_cannot_be_told_are_none():
    assert memory.peaks(("frozen", "a"), lambda name: None) == {"frozen": None, "a": None}
    given = {"frozen": 3.0, "a": 10.0, "b": None}
    assert memory.peaks(("a", "b"), given.get) == {"a": 7.0, "b": None}


@linux
def test_the_meter_knows_what_was_there():
    meter = memory.Meter(torch.device("cpu"))
    kept = torch.ones(8 << 20)  # 32 MiB
    assert meter.mebibytes() == pytest.approx(32, abs=3)
    torch.ones(16 << 20).add_(1)
    assert meter.mebibytes() == pytest.approx(96, abs=3)
    meter.reset()
    assert meter.mebibytes() == pytest.approx(32, abs=3)
    del kept
    meter.reset()
    assert meter.mebibytes() == pytest.approx(0, abs=3)


def about(what):
    return {"pid": os.getpid(), "threads": torch.get_num_threads()}[what]


def die(how):
    if how == "raise":
        raise ValueError("no")
    os._exit(7)


def test_a_process_of_its_own():
    first, second = memory.alone(about, "pid"), memory.alone(about, "pid")
    assert len({os.getpid(), first, second}) == 3
    assert memory.alone(about, "threads") == torch.get_num_threads()
    with pytest.raises(ChildProcessError, match="die ended with code 7"):
        memory.alone(die, "exit")
    with pytest.raises(ChildProcessError, match="die ended with code 1"):
        memory.alone(die, "raise")


@linux
@pytest.mark.parametrize("name", ["LoRA", bench_layer.EVERY])
def test_a_layer_s_peak(name, tmp_path):
    """Above frozen: at least its parameters and their gradients; at few tokens not many times as much."""
    case, dtype = ("tall", 512, 64, 1.0, 128), torch.float32
    found = memory.peaks((name,), lambda n: bench_layer.peak_of(case, tmp_path, "cpu", dtype, n))
    trained = 128 * (512 + 2048) if name == "LoRA" else 512 * 513 // 2 + 1536 * 128
    assert 8 * trained / 2**20 - 0.5 < found[name] < 32


def test_which_cases_have_peaks():
    assert bench_layer.peaked(("tall", 1024, 1024, 0.5, 64), True, False)
    assert not bench_layer.peaked(("wide", 1024, 1024, 0.5, 64), True, False)
    assert bench_layer.peaked(("wide", 256, 1024, 0.25, 64), False, False)
    assert not bench_layer.peaked(("wide", 256, 128, 0.25, 64), False, False)
    assert bench_layer.peaked(("wide", 256, 16, 0.25, 64), False, True)


@linux
def test_the_model_benchmark_tells_memory_alone(tmp_path, monkeypatch, capsys):
    small = replace(STACKS["owsm-0.1b"], width=32, encoder=1, decoder=1, heads=2, labels=3, vocabulary=11)
    monkeypatch.setitem(bench_model.STACKS, "owsm-0.1b", small)
    bench_model.main(["owsm-0.1b", "--device", "cpu", "--dtype", "bfloat16", "--batch", "1", "--rank", "4", "--rounds",
                      "0", "--frames", "6", "--methods", "LoRA", "SSVD-O, p=0.5", "--out", str(tmp_path)])  # fmt: skip
    shown = capsys.readouterr().out
    assert all(column in shown for column in MEMORY) and "decoding" not in shown
    lines = {line.split("|")[1].strip(): line for line in shown.splitlines() if line.startswith("| ")}
    assert {"frozen", "LoRA", "SSVD-O, p=0.5"} < set(lines) and "DoRA" not in lines
    base = Recogniser(replace(small, frames=6)).to(torch.bfloat16)
    model = apply_ssvdo(base, SSVDOConfig(inner_ratio=0.5, outer_rank=4))
    factors = sum(t.nbytes for m in model.modules() if isinstance(m, SSVDOLinear)
                  for t in m.adapter.factors.tensors().values())  # fmt: skip
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, SSVDOLinear))
    assert f"| {factors / weights:.3f} |" in lines["SSVD-O, p=0.5"] and "| 0.000 | 0.000 |" in lines["LoRA"]
    with pytest.raises(SystemExit):
        bench_model.main(["owsm-0.1b", "--device", "cpu", "--methods", "lora"])
    assert "--methods: 'lora' is unknown; allowed: frozen, full, LoRA" in capsys.readouterr().err


@linux
def test_a_layer_s_memory_without_times(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_memory, "peak_of", lambda *about: {"frozen": 1.0, "LoRA": 2.25}.get(about[-1], 3.0))
    bench_memory.main(["--dtypes", "float32", "bfloat16", "--kinds", "wide", "square", "--d", "32", "--tokens", "8",
                       "--rank", "4", "--out", str(tmp_path)])  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.count("| 128->32 T=8 p=0.5 l=4 | LoRA | 0.000 | 0.000 | 1.2 |") == 2  # a dtype each
    (file,) = tmp_path.glob("*-memory.json")
    found = json.loads(file.read_text())["dtypes"]
    wide, square = (row["methods"] for row in found["float32"])
    assert set(wide) == {*peers(0.5, 4), bench_layer.EVERY}
    ours = wide[bench_layer.EVERY]
    assert ours["frozen_state"] == (32 * 32 + 32 + 128 * 4) / (128 * 32) and ours["peak_mib"] == 2.0
    assert square[bench_layer.EVERY]["frozen_state"] == (32 * 16 + 16) / (32 * 32)  # V_k and S_k
    assert ours["held"] > 0 == wide["DoRA"]["held"]


def test_the_tables_of_a_layer_s_memory():
    def row(tokens, **ours):
        methods = {"frozen": {"median_ms": 2.0, "ratio": 1.0, "peak_extra_mb": None},
                   "LoRA": {"median_ms": 3.0, "ratio": 1.5, "peak_extra_mb": 7.0, **ours}}  # fmt: skip
        return {"case": {"kind": "tall", "d": 8, "tokens": tokens, "p": 0.5, "l": 2}, "methods": methods,
                "planner": {"chosen": "folded", "fastest": None, "loss": None}}  # fmt: skip

    about = {"device": "x", "threads": 2, "dtype": "float32", "torch": "2", "commit": "c", "date": "d"}
    kept = {"frozen_state": 0.25, "held": 0.5}
    text = markdown({**about, "rows": [row(4, **kept), row(1024, **kept, peak_mib=12.3), row(4096, **kept)]})
    assert "| 8->32 T=1024 p=0.5 l=2 | LoRA | 0.250 | 0.500 | 12.3 |" in text and text.count("| LoRA | 0.250") == 1
    assert "| 8->32 T=4 p=0.5 l=2 | LoRA | 0.250 | 0.500 | - |" in markdown({**about, "rows": [row(4, **kept)]})
    assert "Memory" not in markdown({**about, "rows": [row(4)]})  # a file from before these columns
