"""`ssvdo merge`: what it writes loads as the base did, or nothing is written and one line says why."""

import json
import os
import stat
import struct

import pytest
import torch
from helpers import randomise
from safetensors.torch import load_file, save_file
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, export, merge_ssvdo, save_ssvdo
from ssvdo_kernels.cli import main
from ssvdo_kernels.host import hosts


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)


@pytest.fixture
def state(tmp_path):
    """The base's tensors; its adapter is in `adapter`."""
    torch.manual_seed(0)
    model = Net()
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    adapt(model, tmp_path)
    (tmp_path / "base").mkdir()
    return kept


def adapt(model, folder):
    apply_ssvdo(model, SSVDOConfig(outer_rank=3))
    for _, layer in hosts(model):
        randomise(layer)
    save_ssvdo(model, folder / "adapter")


def merge(folder, *more, base="base"):
    return main(["merge", str(folder / base), str(folder / "adapter"), "--out", str(folder / "out"), *more])


def refused(folder, capsys, *said, more=(), base="base", code=1):
    """That the command says all of `said` in one line and leaves `out` as it was."""
    out = folder / "out"
    before = {f.name: f.read_bytes() for f in out.iterdir()} if out.exists() else None
    assert merge(folder, *more, base=base) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(text in line for text in said), line
    assert ({f.name: f.read_bytes() for f in out.iterdir()} if out.exists() else None) == before


def index(folder, **where):
    names = {n.replace("_", "."): f for n, f in where.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("kind", ["single", "sharded", "unindexed", "bin", "sharded bin"])
def test_from_pretrained_gives_the_merged_model(tmp_path, kind):
    """Of a base whose output and embedding are tied, as Whisper's are."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=20, max_target_positions=10,
        num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config.max_length = 7
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base, max_shard_size="20KB" if kind in ("sharded", "unindexed") else "1GB")
    if kind.endswith("bin"):
        whole = model.state_dict()
        (base / "model.safetensors").unlink()
        names = ["pytorch_model.bin"] if kind == "bin" else [f"pytorch_model-{i}.bin" for i in range(2)]
        for i, name in enumerate(names):
            torch.save({n: t for j, (n, t) in enumerate(whole.items()) if j % len(names) == i}, base / name)
        torch.save({"a": torch.ones(1)}, base / "optimizer.bin")
    if kind == "unindexed":
        (base / "model.safetensors.index.json").unlink()
    for name in ("preprocessor_config.json", "vocab.txt", "adapter_config.json"):
        (base / name).write_text("{}")
    adapt(model, tmp_path)
    merge_ssvdo(model)
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.tensor([[3, 5], [3, 6]])}
    assert merge(tmp_path) == 0
    loaded, report = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    assert loaded.generation_config.max_length == 7
    names = {f.name for f in out.iterdir()}
    weights = {f.name for f in base.iterdir() if f.suffix in (".bin", ".safetensors")} - {"optimizer.bin"}
    assert names - {"model.safetensors.index.json", "pytorch_model.bin.index.json"} == {
        "config.json", "generation_config.json", "preprocessor_config.json", "vocab.txt", *weights}  # fmt: skip
    assert len(weights) == 1 or len(names) == len(weights) + 5
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(f.stat().st_mode) for f in out.iterdir()} == {0o666 & ~mask}


def test_two_files_with_one_tensor(tmp_path, state, capsys):
    """No index: an error that names both; an index says which files count."""
    base = tmp_path / "base"
    save_file(state, base / "a.safetensors")
    save_file({"fc2.weight": state["fc2.weight"] + 1}, base / "b.safetensors")
    refused(tmp_path, capsys, "a.safetensors and ", "b.safetensors both hold fc2.weight")
    index(base, **{n.replace(".", "_"): "a.safetensors" for n in state})
    assert merge(tmp_path) == 0
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"a.safetensors", "model.safetensors.index.json"}
    assert not torch.equal(load_file(tmp_path / "out" / "a.safetensors")["fc2.weight"], state["fc2.weight"])
    index(base, fc1_weight="a.safetensors", fc2_weight="b.safetensors")  # both count: from_pretrained reads both
    refused(tmp_path, capsys, "both hold fc2.weight", more=["--overwrite"])


def test_an_index_that_does_not_say_what_counts(tmp_path, state, capsys):
    base = tmp_path / "base"
    save_file(state, base / "a.safetensors")
    index(base, **{n.replace(".", "_"): "a.safetensors" for n in state})
    refused(tmp_path, capsys, "a.safetensors is one of the files of", base="base/a.safetensors")
    save_file(state, base / "model.safetensors")  # which from_pretrained would take
    refused(tmp_path, capsys, "model.safetensors.index.json and ", "model.safetensors both say")
    assert merge(tmp_path, base="base/model.safetensors.index.json") == 0
    for names, said in (({"fc1_weight": "gone.safetensors"}, "names gone.safetensors, which does not exist"),
                        ({"fc1_weight": "../x"}, "is no index"), ({}, "is no index")):
        index(base, **names)
        refused(tmp_path, capsys, said)


def test_torch_files_keep_what_else_they_hold(tmp_path, state):
    """An ESPnet model is one .pth file beside others of its training."""
    extra = {"steps": torch.tensor(3), "note": "text"}
    torch.save(state | extra, tmp_path / "base" / "valid.acc.best.pth")
    torch.save(state, tmp_path / "base" / "1epoch.pth")
    assert merge(tmp_path, base="base/valid.acc.best.pth") == 0
    found = torch.load(tmp_path / "out" / "valid.acc.best.pth", weights_only=True)
    assert found["note"] == "text" and found["steps"] == 3 and torch.equal(found["fc1.bias"], state["fc1.bias"])
    torch.save(state, tmp_path / "base" / "old.pt", _use_new_zipfile_serialization=False)
    assert merge(tmp_path, "--overwrite", base="base/old.pt") == 1  # the other would stay
    (tmp_path / "out" / "valid.acc.best.pth").unlink()
    assert merge(tmp_path, base="base/old.pt") == 0
    assert torch.equal(torch.load(tmp_path / "out" / "old.pt")["fc2.weight"], found["fc2.weight"])


class Code:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize(("content", "said"), [
    (b"PK\3\4 and no more", "no whole file of tensors"), (b"", "no whole file of tensors"),
    ({"model": {"fc1.weight": torch.ones(2)}}, "a training checkpoint is no model file"),
    ({"fc1.weight": Code()}, "no whole file of tensors"), ({"other": torch.ones(2)}, "has no tensor ['fc1.weight'")])
def test_torch_files_that_are_refused(tmp_path, state, capsys, content, said):
    file = tmp_path / "base" / "model.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    refused(tmp_path, capsys, said, base="base/model.pth")


def test_what_cannot_be_merged_is_named(tmp_path, state, capsys):
    base, file = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    refused(tmp_path, capsys, "has no weights")
    save_file(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    refused(tmp_path, capsys, "is no whole safetensors file", str(file))
    save_file(state | {"fc2.weight": torch.ones(8, 24, dtype=torch.int8)}, file)
    refused(tmp_path, capsys, "fc2.weight has dtype torch.int8; allowed: float16")
    save_file(state | {"fc2.weight": torch.ones(8)}, file)
    refused(tmp_path, capsys, "model.safetensors: fc2.weight has shape (8,)")
    save_file(state, file, {"embed.weight": "fc2.weight"})  # as safetensors.torch.save_model notes tied weights
    refused(tmp_path, capsys, "fc2.weight is tied to embed.weight")
    file.unlink()
    torch.save(state | {"embed.weight": state["fc2.weight"]}, base / "pytorch_model.bin")
    refused(tmp_path, capsys, "fc2.weight is tied to embed.weight")
    (base / "pytorch_model.bin").unlink()
    (base / "adapter_config.json").write_text("{}")
    refused(tmp_path, capsys, "is a PEFT adapter; name its base model")


@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_a_peft_adapter_is_recognised(tmp_path, state, capsys, command):
    save_file(state, tmp_path / "base" / "model.safetensors")
    for file in (tmp_path / "adapter").iterdir():
        file.unlink()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    if command == "merge":
        refused(tmp_path, capsys, "is a PEFT adapter; PEFT merges it")
    else:
        assert main(["inspect", str(tmp_path / "adapter")]) == 1
        assert "is a PEFT adapter" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten_unasked(tmp_path, state, capsys):
    out = tmp_path / "out"
    save_file(state, tmp_path / "base" / "model.safetensors")
    out.mkdir()
    (out / "notes").write_text("mine")
    refused(tmp_path, capsys, "is not empty (notes)", "--overwrite")
    (out / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert merge(tmp_path, "--overwrite") == 0
    assert {f.name for f in out.iterdir()} == {"notes", "model.safetensors"}
    assert "fc1.weight" in load_file(out / "model.safetensors")
    (out / "model.safetensors.index.json").write_text("{}")  # of an earlier merge: from_pretrained could take it
    refused(tmp_path, capsys, "model.safetensors.index.json, which would stay", more=["--overwrite"])


def test_an_interrupt_is_one_line_and_leaves_nothing(tmp_path, state, capsys, monkeypatch):
    save_file(state, tmp_path / "base" / "model.safetensors")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "checked", interrupt)
    refused(tmp_path, capsys, "interrupted", code=130)
