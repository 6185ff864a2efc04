"""The command line: plans from headers alone, adapters shown, adapters merged into model files."""

import json
import math
import struct
import time

import pytest
import torch
from helpers import randomise
from safetensors.torch import load_file, save_file
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, budget, merge_ssvdo, remove_ssvdo, save_ssvdo
from ssvdo_kernels.cli import main
from ssvdo_kernels.host import hosts


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.fc1, self.fc2, self.out = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.fc2(torch.relu(self.fc1(x))))


def trained(folder, dtype=torch.float32, **options):
    """(base folder, adapter folder, adapted model)."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    (folder / "base").mkdir()
    state = model.state_dict()
    for file, second in (("model-1.safetensors", False), ("model-2.safetensors", True)):
        save_file({n: t for n, t in state.items() if ("fc2" in n) == second}, folder / "base" / file, {"format": "pt"})
    apply_ssvdo(model, SSVDOConfig(**{"outer_rank": 3, **options}))
    for _, layer in hosts(model):
        randomise(layer)
    save_ssvdo(model, folder / "adapter")
    return folder / "base", folder / "adapter", model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_writes_what_merging_computes(tmp_path, dtype, capsys):
    base, adapter, model = trained(tmp_path, dtype)
    before = {f.name: f.read_bytes() for f in base.iterdir()}
    assert main(["merge", str(base), str(adapter), "--out", str(tmp_path / "merged")]) == 0
    assert "model-2.safetensors" in capsys.readouterr().out
    merged = {}
    for file in sorted((tmp_path / "merged").glob("*.safetensors")):
        merged |= load_file(file)
    fresh = Net().to(dtype)
    fresh.load_state_dict(merged)
    x = torch.randn(5, 8).to(dtype)
    merge_ssvdo(model)
    assert torch.equal(fresh(x), remove_ssvdo(model, merge=True)(x))
    assert torch.equal(fresh.out.weight, load_file(base / "model-1.safetensors")["out.weight"])
    assert before == {f.name: f.read_bytes() for f in base.iterdir()}
    assert {f.name for f in (tmp_path / "merged").iterdir()} == {*before, "model.safetensors.index.json"}


def test_merge_refuses_and_leaves_nothing(tmp_path, capsys):
    base, adapter, _ = trained(tmp_path)
    out = tmp_path / "out"
    assert main(["merge", str(base), str(adapter), "--out", str(base)]) == 1
    assert "own folder" in capsys.readouterr().err
    assert main(["merge", str(base / "model-1.safetensors"), str(adapter), "--out", str(out)]) == 1
    assert "has no tensor ['fc2.weight']" in capsys.readouterr().err
    other = {n: t + 1 for n, t in load_file(base / "model-2.safetensors").items()}
    save_file(other, base / "model-2.safetensors")
    assert main(["merge", str(base), str(adapter), "--out", str(out)]) == 1
    assert "other base weights" in capsys.readouterr().err
    assert not out.exists()
    assert main(["merge", str(tmp_path / "none"), str(adapter), "--out", str(out)]) == 1
    assert "none does not exist; name a model's folder" in capsys.readouterr().err
    assert main(["merge", str(base), str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "none does not exist; name an adapter's folder" in capsys.readouterr().err


@pytest.mark.parametrize("include_basis", [False, True])
def test_inspect(tmp_path, capsys, include_basis):
    _, adapter, model = trained(tmp_path)
    save_ssvdo(model, adapter, include_basis=include_basis)
    assert main(["inspect", str(adapter)]) == 0
    shown = capsys.readouterr().out
    parameters = sum(layer.adapter.shape.parameters for _, layer in hosts(model))
    assert f"2 layers, {parameters:,} trained numbers" in shown and "fc1" in shown
    assert ("with V_k" in shown, "without V_k" in shown) == (include_basis, not include_basis)
    (adapter / "broken").mkdir()
    assert main(["inspect", str(adapter / "broken")]) == 1
    assert "ssvdo: no adapter at" in capsys.readouterr().err


def header_file(path, shapes, dtype="BF16"):
    """A safetensors file of these sizes whose data are a hole."""
    at, header = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def test_plan_of_two_billion_parameters_reads_headers_alone(tmp_path, capsys):
    shapes = {"embed_tokens.weight": (50000, 2048)}
    for i in range(60):
        shapes |= {f"layers.{i}.fc1.weight": (8192, 2048), f"layers.{i}.fc2.weight": (2048, 8192),
                   f"layers.{i}.fc1.bias": (8192,), f"layers.{i}.q_proj.weight": (2048, 2048)}  # fmt: skip
    header_file(tmp_path / "model.safetensors", shapes)
    assert sum(math.prod(s) for s in shapes.values()) > 2e9
    start = time.process_time()
    assert main(["plan", str(tmp_path), "--inner-ratio", "0.25"]) == 0
    assert time.process_time() - start < 5  # of this process alone: others do not count
    shown = capsys.readouterr().out
    k = 512
    total = 120 * (k * (k + 1) // 2 + 6144 * 64)
    assert f"{total:,} trained numbers" in shown
    assert f"LoRA r = 64 on the same layers: {120 * 64 * 10240:,}" in shown


def test_equal_budgets_meet_the_paper_s(tmp_path):
    header_file(tmp_path / "m.safetensors", {"a.fc1.weight": (4096, 1024)})
    layers = budget.chosen(budget.matrices(tmp_path), SSVDOConfig())
    lora = budget.lora_budget(layers, 64)
    assert lora == 327_680
    found = {p: (rank, numbers) for p, rank, numbers in budget.equal_budgets(layers, lora)}
    assert found[0.5] == (64, 327_936) and 1.0 not in found
    assert all(abs(n - lora) <= 3072 / 2 for _, n in found.values())


def test_the_plan_s_parameters_are_the_model_s(tmp_path, capsys):
    base, _, model = trained(tmp_path)
    assert main(["plan", str(base), "--outer-rank", "3"]) == 0
    want = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{want:,} trained numbers" in capsys.readouterr().out
    numbers = sum(budget.factor_numbers(layer.adapter.shape) for _, layer in hosts(model))
    assert numbers == sum(t.numel() for _, layer in hosts(model) for t in layer.adapter.factors.tensors().values())
    assert main(["plan", str(base), "--outer-rank", "3", "--target-modules", "all-linear"]) == 0
    assert "8 -> 8" in capsys.readouterr().out
    assert main(["plan", str(base), "--outer-rank", "3", "--target-modules", r"fc\d"]) == 0


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 8 + b"x" * 20, struct.pack("<Q", 4) + b"null",
                                     struct.pack("<Q", 9) + b'{"a": 1}x', struct.pack("<Q", 2) + b"[]"])
def test_what_is_no_model_file_is_refused(tmp_path, content, capsys):
    (tmp_path / "m.safetensors").write_bytes(content)
    assert main(["plan", str(tmp_path)]) == 1
    assert "is no safetensors file" in capsys.readouterr().err


def test_bad_choices_are_refused(tmp_path, capsys):
    base, _, _ = trained(tmp_path)
    for given, message in ((["--outer-rank", "-1"], "outer_rank=-1 is out of range"),
                           (["--target-modules", "nothing"], "matches no linear layer of the model; linear layers"),
                           (["--inner-ratio", "2"], "inner_ratio"),
                           (["--target-modules", "fc(1"], "target_modules='fc(1' is no regular expression"),
                           *((["--lora-rank", r], f"lora_rank={r} is out of range; allowed: 1 <= lora_rank <= 8")
                             for r in ("-5", "0", "9", str(10**30)))):  # fmt: skip
        assert main(["plan", str(base), *given]) == 1
        assert message in capsys.readouterr().err
    for where, message in ((tmp_path / "adapter", "has no weights; name a model's folder"),
                           (tmp_path / "none", "none does not exist; name a model's folder")):
        assert main(["plan", str(where)]) == 1
        assert message in capsys.readouterr().err


def test_plan_of_a_torch_file_and_of_what_has_no_plan(tmp_path, capsys):
    torch.save(Net().state_dict(), tmp_path / "model.pth")
    assert main(["plan", str(tmp_path / "model.pth"), "--outer-rank", "3"]) == 0
    assert "8 -> 24" in capsys.readouterr().out
    for shapes, dtype, message in (
        ({"a.query.weight": (16, 48)}, "F32", "no layer has a default name (feed-forward layers', such as fc1); name "
                                              "some in target_modules; linear layers with close names: ['a.query']"),
        ({"fc1.weight": (16, 48), "fc1.SCB": (16,)}, "I8", "holds I8 weights, such as fc1.weight: it is quantised"),
    ):  # fmt: skip
        header_file(tmp_path / "m.safetensors", shapes, dtype)
        assert main(["plan", str(tmp_path / "m.safetensors")]) == 1
        assert message in capsys.readouterr().err


def test_headers_with_odd_values_are_refused(tmp_path, capsys):
    file = tmp_path / "m.safetensors"
    for shape in ([-4, 8], ["4", 8], [4.5, 8], [True, 8], [None, 8], [2**70, 8], "48", {"0": 4}):
        text = json.dumps({"fc1.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + b"    ")
        assert main(["plan", str(file)]) == 1
        line = capsys.readouterr().err
        assert "m.safetensors is no safetensors file: tensor fc1.weight has {" in line and line.count("\n") == 1


@pytest.mark.parametrize("content", [
    None, "", "null", '{"model_type": 5}', '{"model_type": "whisper", "d_model": "x"}',
    '{"model_type": "whisper", "d_model": -4}', '{"auto_map": {"AutoConfig": "x.C"}, "model_type": "zzz"}'])
def test_a_configuration_of_no_model_is_one_line(tmp_path, capsys, monkeypatch, content):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the console"))
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["plan", str(tmp_path / "config.json")]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(f"ssvdo: {tmp_path / 'config.json'} "), line


def test_a_folder_of_a_model_file_s_name_is_no_file(tmp_path, capsys):
    header_file(tmp_path / "m.safetensors", {"fc1.weight": (160, 80)})
    (tmp_path / "x.safetensors").mkdir()
    assert main(["plan", str(tmp_path)]) == 0 and "80 -> 160" in capsys.readouterr().out


def test_plan_of_a_configuration_allocates_nothing(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path / "config.json")]) == 0
    k, c = 2048, 11008 - 4096
    assert f"{96 * (k * (k + 1) // 2 + c * 64):,} trained numbers" in capsys.readouterr().out
