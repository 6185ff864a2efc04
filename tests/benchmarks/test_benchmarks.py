"""The benchmarks measure what they say: peers compute their methods, timings and memory are right."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import assert_close, make_layer, require_triton
from torch import nn

pytest.importorskip("peft", reason="the peers need PEFT")
from benchmarks import bench_kernels, bench_model, bench_preparation, runner, soak
from benchmarks.ceiling import floors, measure
from benchmarks.peers import DenseSSVDO, EspnetStyleSSVD, peers
from benchmarks.record import TIME_IS_UP
from benchmarks.report import markdown, plot
from benchmarks.runner import interleave, peak_extra_bytes
from benchmarks.stacks import Recogniser, Stack
from ssvdo_kernels import SSVDOConfig, SSVDOLinear, reference
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.factorize import Factors
from ssvdo_kernels.ops.engines import adjoint
from ssvdo_kernels.traffic import Machine


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])  # 8 roundings of 2^-8
@pytest.mark.parametrize("m, n", [(64, 32), (32, 64)])
def test_every_peer_starts_at_the_pretrained_layer_and_trains(m, n, dtype, tolerance):
    torch.manual_seed(0)
    linear, x = nn.Linear(n, m, dtype=dtype), torch.randn(5, n, dtype=dtype)
    for name, make in peers(0.5, 4).items():
        module = make(linear)
        y = module(x.requires_grad_())
        assert y.dtype == dtype
        assert_close(name, y, linear(x), max(tolerance, 2e-3) if name in ("dense SSVD-O", "PiSSA") else tolerance)
        y.sum().backward()
        trained = [p for p in module.parameters() if p.requires_grad]
        assert (not trained) == (name == "frozen")
        assert all(p.grad is not None for p in trained), name


@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_espnet_style_ssvd_is_first_order_ssvd(m, n):
    linear = nn.Linear(n, m).double()
    peer = EspnetStyleSSVD(linear, 0.5)
    with torch.no_grad():
        peer.rotation.normal_(0, 0.1)
        peer.scale.normal_(0, 0.1)
    config = SSVDOConfig(inner_ratio=0.5, outer_rank=0, rotation="first_order")
    x = torch.randn(3, n, dtype=torch.float64)
    outer = torch.zeros(abs(m - n), 0, dtype=torch.float64)
    want = reference.linear(x, linear.weight.detach(), linear.bias, peer.rotation, peer.scale, outer, config)
    assert_close("y", peer(x), want, 1e-12)


def test_dense_ssvdo_is_our_layer():
    config, linear = SSVDOConfig(outer_rank=3), nn.Linear(8, 24).double()
    peer, layer = DenseSSVDO(linear, config), SSVDOLinear.from_linear(linear, config)
    with torch.no_grad():
        for name in PARAMETER_NAMES:
            peer.get_parameter(name).copy_(layer.adapter.get_parameter(name).normal_(0, 0.2))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_close("y", peer(x), layer(x), 1e-12)


def test_the_autograd_loop_prepares_the_same():
    layers = [make_layer(96, 24, outer_rank=4, dtype=torch.float32, spread=0.05, seed=seed) for seed in range(2)]
    adapters = [layer.adapter for layer in layers]
    made = [a.prepared(layer.base()) for a, layer in zip(adapters, layers, strict=True)]
    given = [(torch.randn_like(one.mixer), torch.randn_like(one.columns)) for one in made]
    want = adjoint(made, [d for d, _ in given], [d for _, d in given])

    def check(of, *arguments):
        got = bench_preparation.autograd(*arguments[:3], adapters[0].shape, adapters[0].config, arguments[3])
        for name, a, b in zip(PARAMETER_NAMES, got, of, strict=True):
            assert_close(name, a, b, 1e-4)

    one_by_one = [(a.parts, layer.weight.detach(), a.factors, d)
                  for a, layer, d in zip(adapters, layers, given, strict=True)]  # fmt: skip
    for gradients, arguments in zip(want, one_by_one, strict=True):
        check(gradients, *arguments)
    three, talls, factors, d = zip(*one_by_one, strict=True)  # and stacked
    check([torch.stack(g) for g in zip(*want, strict=True)], [torch.stack(p) for p in zip(*three, strict=True)],
          torch.stack(talls), Factors.of({n: torch.stack([f.tensors()[n] for f in factors])
                                          for n in factors[0].tensors()}),
          [torch.stack(t) for t in zip(*d, strict=True)])  # fmt: skip


def test_preparation_is_timed_in_every_way():
    row = bench_preparation.measure(2, 0.25, 4, 1, "cpu", d=32)
    compiled = {"compiled, layer by layer", "compiled, one batch"}
    assert set(row["ms"]) == {"torch, autograd", "torch, hand-written", *compiled}
    assert row["ratio_to_batch"]["compiled, one batch"] == 1.0 and all(ms > 0 for ms in row["ms"].values())


def test_ratios_come_from_interleaved_rounds(monkeypatch):
    order, clock = [], [0.0]
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(runner.time, name, lambda: clock[0])

    def step(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds * ((len(order) + 1) // 2)  # a machine that is slower in every round

        return run

    timings = interleave({"floor": step("floor", 0.01), "twice": step("twice", 0.02)}, 5, "floor")
    assert order[:4] == ["floor", "twice", "twice", "floor"] and len(order) == 12
    assert timings["floor"].ratio == 1.0 and timings["twice"].ratio == pytest.approx(2.0)
    assert timings["floor"].median_ms == pytest.approx(40.0)  # of 20, 30, 40, 50, 60: the first round is not timed


def test_memory_counts_what_a_step_holds_at_once():
    def step():
        a = torch.empty(1 << 20, dtype=torch.float32)
        del a
        torch.empty(1 << 19, dtype=torch.float32)

    assert peak_extra_bytes(step) == pytest.approx(4 << 20, rel=0.01)
    layer, x = make_layer(256, 64, dtype=torch.float32, outer_rank=4), torch.randn(512, 64, requires_grad=True)
    assert peak_extra_bytes(lambda: layer(x).sum().backward()) > 4 * 512 * 256  # y alone


def test_floors_grow_with_the_adapter_and_with_slower_machines():
    shape = LayerShape.of(4096, 1024, SSVDOConfig())
    fast, slow = Machine("", 1e12, 1e14, 1e13), Machine("", 1e12, 1e13, 1e12)
    frozen, adapted = floors(shape, 64, 2048, 2, fast)
    assert frozen == pytest.approx(2 * 2 * 2048 * 4096 * 1024 / 1e14)  # bound by arithmetic
    assert frozen < adapted < 3 * frozen
    assert floors(shape, 64, 2048, 2, slow)[0] == pytest.approx(10 * frozen)


def test_peaks_are_measured():
    machine = measure(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.bandwidth < 1e13 and 1e8 < machine.rate < 1e14


def test_kernel_table(monkeypatch):
    require_triton()
    machine = Machine("", 1e12, 1e14, 1e13)
    monkeypatch.setattr(bench_kernels, "sample", lambda call, device, repeats: (call(), (1e-3, 5e-6))[1])
    found = bench_kernels.rows(machine, 5, 16, 16, 3, torch.float32, torch.device("cpu"))
    names = {"expand", "expand, keeping h and z", "contract, keeping g", "g^T h", "merge"}
    assert {r["kernel"] for r in found} == names and all(0 < r["share"] < 1 and r["ms"] == 1.0 for r in found)
    row = {"machine": {"bandwidth": 1e12, "rate": 1e14}, "kernels": found}
    text = bench_kernels.markdown({"device": "x", "dtype": "float32", "date": "d", "rows": [row]})
    assert text.count("\n") == 10 and text.count("| 5 |\n") == 5


def test_both_forms_of_wide_kernels_are_timed(monkeypatch):
    """The rows of one kernel differ in what took them; one pass moves less."""
    require_triton()
    monkeypatch.setattr(bench_kernels, "sample", lambda call, device, repeats: (call(), (1e-3, 5e-6))[1])
    found = bench_kernels.rows(Machine("", 1e9, 1e14, 1e13), 5, 144, 144, 16, torch.float16, torch.device("cpu"))
    floors = {r["kernel"]: r["floor_ms"] for r in found}
    for name in ("expand", "expand, keeping h and z", "contract, keeping g"):
        assert floors[name] < floors[f"{name}: two launches"]
        once = [floor for row, floor in floors.items() if row.startswith(f"{name}: ") and "two" not in row]
        assert len(once) >= 2 and set(once) == {floors[name]}
    assert len(floors) == len(found) == 5 + 3 + 3 + 4


def test_report(tmp_path):
    row = {
        "case": {"kind": "tall", "d": 8, "tokens": 4, "p": 0.5, "l": 2},
        "methods": {"frozen": {"median_ms": 2.0, "ratio": 1.0, "peak_extra_mb": None},
                    "LoRA": {"median_ms": 3.0, "ratio": 1.5, "peak_extra_mb": 7.0}},
        "floor": {"frozen_ms": 1.0, "ratio": 1.25},
        "planner": {"chosen": "folded", "fastest": "folded", "loss": 0.031},
    }  # fmt: skip
    results = {"device": "x", "threads": 2, "dtype": "float32", "torch": "2", "commit": "c", "date": "d", "rows": [row]}
    text = markdown(json.loads(json.dumps(results)))
    assert "| 8->32 T=4 p=0.5 l=2 | 2.0 | 1.50 | - | 1.25 (50%) |  | folded (3%) |" in text
    assert text.endswith("within 5% of the fastest at 1 of 1 points.\n") and "A star" not in text
    own = {"SSVD-O, cached": {**row["methods"]["LoRA"], "host_ms": 0.25, "queued": False}}
    text = markdown({**results, "rows": [{**row, "methods": {**row["methods"], **own}}]})
    assert "| - / - / 0.25* |" in text and "A star: the GPU waited" in text
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    plot(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


TINY = Stack(16, 2, 2, 2, True, frames=6, labels=3, vocabulary=11)


def test_models_are_measured_by_every_method(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_model.STACKS, "owsm-0.1b", TINY)
    monkeypatch.setattr(bench_model, "peak_of", lambda *about: {"frozen": 1.0, "LoRA": 3.5}.get(about[-1]))
    bench_model.main(["owsm-0.1b", "--device", "cpu", "--dtype", "float32", "--batch", "2", "--rank", "4", "--rounds",
                      "2", "--out", str(tmp_path)])  # fmt: skip
    (file,) = tmp_path.glob("*-float32-models.json")
    results = json.loads(file.read_text())
    rows = {row["method"]: row for row in results["rows"]}
    training = {method: row["training"] for method, row in rows.items()}
    assert "missing" not in results and "errors" not in results and rows["LoRA"]["tokens"] == 2 * (6 + 3)
    feed_forward = 2 * (2 * 2 + 2)  # layers: two in each encoder block, one in each decoder block, of two matrices
    trained = {name: m["trained"] for name, m in training.items()}
    assert trained["frozen"] == 0 and trained["LoRA"] == feed_forward * 4 * (16 + 64)
    assert trained["SSVD-O, p=0.5"] == trained["dense SSVD-O, p=0.5"] == feed_forward * (8 * 9 // 2 + 48 * 4)
    assert training["frozen"]["ratio"] == rows["frozen"]["decoding"]["plain"]["ratio"] == 1.0
    assert set(rows["SSVD-O, p=0.5"]["decoding"]) == {"unmerged, p=0.5", "merged, p=0.5", "removed, p=0.5"}
    ours, lora, shown = training["SSVD-O, p=0.5"], training["LoRA"], capsys.readouterr().out
    assert f"| LoRA | {lora['median_ms']:.1f} |" in shown and "| 0.000 | 0.000 | 2.5 |" in shown
    assert ours["held"] > 0 == lora["held"] and ours["peak_mib"] is None
    assert ours["frozen_state"] == pytest.approx((16 * 16 + 16 + 64 * 4) / (16 * 64))  # V, S, U_l
    assert training["dense SSVD-O, p=0.5"]["frozen_state"] == pytest.approx((64 * 16 + 16 * 16 + 16) / (16 * 64))


def test_graphs_are_of_all_tokens_and_as_long_as_plain_ones(monkeypatch):
    """Without a GPU: what would be captured, and how often."""
    replayed = []

    def captured(step):
        said = step()
        return lambda: replayed.append(said)

    monkeypatch.setattr(bench_model, "captured", captured)
    base = bench_model.pretrained(TINY, "cpu", torch.float32)
    found = bench_model.decode(TINY, {"plain": base}, 2, length=3, graphs=True)
    assert set(found) == {"plain"} and found["plain"]["ratio"] == 1.0
    assert len(replayed) > 2 and all(len(said) == 3 for said in replayed)


def test_a_graph_that_fails_costs_no_row(monkeypatch):
    base = bench_model.pretrained(TINY, "cpu", torch.float32)
    real = bench_model.decode

    def decode(*about, graphs=False):
        if graphs:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return real(*about, length=2)

    monkeypatch.setattr(bench_model, "decode", decode)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    said = bench_model.decoded(TINY, base, "frozen", base, 1)
    assert said["plain"]["ratio"] == 1.0 and said["plain, graph"] == {
        "error": "operation not permitted when stream is capturing"}  # fmt: skip


def test_a_model_that_does_not_fit_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_model.STACKS, "owsm-0.1b", TINY)
    monkeypatch.setattr(bench_model, "peak_of", lambda *about: None)
    real = bench_model.methods

    def methods(*about):
        def too_large(model):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

        return {**real(*about), "full": too_large}

    monkeypatch.setattr(bench_model, "methods", methods)
    done = bench_model.main(["owsm-0.1b", "--device", "cpu", "--dtype", "float32", "--batch", "1", "--rank", "4",
                             "--rounds", "1", "--methods", "full", "LoRA", "--out", str(tmp_path)])  # fmt: skip
    shown = capsys.readouterr().out
    assert done == 1 and "not measured: owsm-0.1b, full: OutOfMemoryError: CUDA out of memory. Tried" in shown
    assert "| LoRA |" in shown and "| full |" not in shown


def test_a_peer_is_made_once_for_each_shape():
    model, made = Recogniser(TINY), []
    peer = bench_model.replacing(lambda linear: made.append(tuple(linear.weight.shape)) or nn.Identity())
    peer(model)
    assert sorted(made) == [(16, 64), (64, 16)]


def test_decoding_one_by_one_is_the_whole_sequence():
    torch.manual_seed(0)
    model = Recogniser(TINY).double().eval()
    speech, start = torch.randn(2, 6, 16).double(), torch.tensor([[3], [4]])
    memory = model.encode(speech)
    memories = [block.src_attn.keys_and_values(memory) for block in model.decoder]
    tokens = torch.cat([start, *model.decode(memories, start, 4)], 1)
    x = model.embed(tokens[:, :-1])
    for block, pair in zip(model.decoder, memories, strict=True):
        x = block(x, pair)
    assert torch.equal(model.output(model.norm(x)).argmax(-1), tokens[:, 1:])


def test_time_that_is_up_leaves_models_out(tmp_path, capsys):
    assert bench_model.main(["owsm-1b", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path)]) == TIME_IS_UP
    assert "not run for want of time: owsm-1b, frozen, owsm-1b, full" in capsys.readouterr().out


def test_the_soak_sees_memory_that_grows(tmp_path, monkeypatch, capsys):
    flat = [{"allocated": 0, "resident": 100.0 + n % 2} for n in range(50)]
    leaking = [{"allocated": 0, "resident": 100.0 + n} for n in range(50)]
    assert soak.growth(flat, "resident") < 0 < soak.GROWTH < soak.growth(leaking, "resident")
    assert soak.growth(flat, "allocated") == 0.0
    monkeypatch.setitem(bench_model.STACKS, "owsm-0.1b", TINY)
    few = ["--device", "cpu", "--dtype", "float32", "--minutes", "0.005", "--rank", "4", "--out", str(tmp_path)]
    soak.main(few)
    (file,) = tmp_path.glob("*-soak.json")
    assert "rounds; memory grew by" in capsys.readouterr().out and json.loads(file.read_text())["rounds"]
    monkeypatch.setattr(soak, "growth", lambda rounds, what: 0.5)
    assert soak.main(few) == 1


def test_every_method_runs_under_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "-k", "tall-128", "--benchmark-disable"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
