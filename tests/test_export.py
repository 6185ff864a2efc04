"""`ssvdo merge`: what it writes loads as the base did, or nothing is written and one line says why."""

import json
import os
import resource
import stat
import struct
import warnings

import pytest
import torch
from helpers import randomise, randomise_all
from safetensors.torch import load_file, save_file
from torch import nn

from ssvdo_kernels import (
    SSVDOConfig,
    SSVDOLinear,
    apply_ssvdo,
    export,
    merge_ssvdo,
    remove_ssvdo,
    save_ssvdo,
    unmerge_ssvdo,
)
from ssvdo_kernels.cli import main
from ssvdo_kernels.host import OwnHost, hosts


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
    before, beside = contents(out), {f.name for f in folder.iterdir()}
    assert merge(folder, *more, base=base) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(text in line for text in said), line
    assert contents(out) == before and {f.name for f in folder.iterdir()} == beside


def contents(folder):
    """What is there, with folders; None: it is not."""
    files = {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}
    return files if folder.exists() else None


def index(folder, **where):
    names = {n.replace("_", "."): f for n, f in where.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def whisper(transformers):
    """A small one; its output and embedding are tied."""
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=20, max_target_positions=10,
        num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config.max_length = 7
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.tensor([[3, 5], [3, 6]])}
    return model, inputs


def test_a_merged_model_says_what_its_save_pretrained_writes_and_a_removed_one_writes_w(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = whisper(transformers)
    adapt(model, tmp_path)
    merge_ssvdo(model)
    want = model(**inputs).logits
    with pytest.warns(UserWarning, match=r"holds W0 .* not W'.*remove_ssvdo\(model, merge=True\)"):
        model.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        unmerge_ssvdo(model).state_dict()
        remove_ssvdo(model, merge=True).save_pretrained(tmp_path / "removed")
    loaded, report = type(model).from_pretrained(tmp_path / "removed", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(**inputs).logits, want)


@pytest.mark.parametrize("kind", ["single", "sharded", "unindexed", "bin", "sharded bin"])
def test_from_pretrained_gives_the_merged_model(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = whisper(transformers)
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
    refused(tmp_path, capsys, "fc2.weight has int8 weights: this base is quantised")
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
        refused(tmp_path, capsys, "is a PEFT adapter, which PEFT loads")
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


COMPANY = (
    "config.json", "source.spm", "vocab.bpe", "bpe.codes", "tokenizer.model.v3", "feats.npz", "custom.yml", "LICENSE",
    "faiss.index.json", "language_model/5gram.bin", "language_model/attrs.json", "templates/a/t.jinja")
LEFT = (
    "optimizer.pt", "flax_model.msgpack", "tf_model.h5", "adapter_config.json", "onnx/model.onnx", "onnx/config.json",
    "checkpoint-5/model.safetensors", "checkpoint-5/trainer_state.json")


def test_all_but_other_weights_goes_along_and_what_does_not_is_said(tmp_path, state, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    save_file(state, base / "model.safetensors")
    for name in (*COMPANY, *LEFT, ".hidden", ".git/config"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    assert merge(tmp_path) == 0
    copied = contents(out)
    assert {n for n, c in copied.items() if c is not None} == {"model.safetensors", *COMPANY}
    assert all(copied[n].decode() == n for n in COMPANY)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "left out: " + ", ".join(sorted({n.split("/")[0] + "/" * ("/" in n) for n in LEFT}))
    assert merge(tmp_path, "--overwrite") == 0 and contents(out) == copied
    other = base / "merged"  # what is below the base is not copied into itself
    assert main(["merge", str(base), str(tmp_path / "adapter"), "--out", str(other)]) == 0
    assert main(["merge", str(base), str(tmp_path / "adapter"), "--out", str(other), "--overwrite"]) == 0
    assert contents(other) == copied


def test_a_whole_model_beside_other_weights_is_not_guessed_about(tmp_path, state, capsys):
    base = tmp_path / "base"
    save_file(state, base / "model.safetensors")
    save_file({"layers.0.w": torch.ones(2)}, base / "consolidated.safetensors")
    (base / "config.json").write_text("{}")
    refused(tmp_path, capsys, "model.safetensors is a whole model by its name, but consolidated.safetensors beside it")
    assert merge(tmp_path, base="base/model.safetensors") == 0
    assert set(contents(tmp_path / "out")) == {"config.json", "model.safetensors"}
    assert "left out: consolidated.safetensors" in capsys.readouterr().out


def test_merging_again_over_an_unindexed_model(tmp_path, state):
    """The index that the first time wrote does not stay: it is written anew."""
    for name in state:
        save_file({name: state[name]}, tmp_path / "base" / f"{name}.safetensors")
    assert merge(tmp_path) == 0
    first = contents(tmp_path / "out")
    assert merge(tmp_path, "--overwrite") == 0 and contents(tmp_path / "out") == first


def test_files_beside_and_names_that_do_not_count(tmp_path, state):
    base, out = tmp_path / "base", tmp_path / "out"
    (base / "x.safetensors").mkdir()
    (base / "._model.safetensors").write_bytes(b"of another system")
    (base / "faiss.index.json").write_text("[]")
    save_file(state, base / "model.safetensors")
    assert merge(tmp_path) == 0
    assert merge(tmp_path, "--overwrite", base="base/model.safetensors") == 0
    assert set(contents(out)) == {"model.safetensors"}
    want = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    for name in ("MODEL.PTH", "last.ckpt"):
        torch.save(state, base / name)
        assert merge(tmp_path, base=f"base/{name}") == 0
        assert torch.equal(torch.load(out / name)["fc1.weight"], want["fc1.weight"])
        (out / name).unlink()


class Whole(nn.Linear):
    """Not to be unpickled."""


def test_torch_files_that_cannot_be_merged_are_named(tmp_path, state, capsys, recwarn):
    file = tmp_path / "base" / "model.pth"
    fused = torch.cat([torch.zeros(3, 8), state["fc1.weight"]])
    for content, said in (
        (state | {"fc1.weight": fused[3:], "fused": fused}, "fc1.weight is tied to fused"),
        (state | {"fc1.weight": state["fc1.weight"].to_sparse()}, "fc1.weight has layout torch.sparse_coo; allowed"),
        ({n: t.to("meta") for n, t in state.items()}, "fc1.weight is on the meta device"),
        (Whole(2, 2), "or holds objects of other classes"),
    ):
        torch.save(content, file)
        refused(tmp_path, capsys, "model.pth", said, base="base/model.pth")
    torch.jit.script(nn.Linear(2, 2)).save(str(file))
    recwarn.clear()
    refused(tmp_path, capsys, "model.pth is no whole file of tensors", base="base/model.pth")
    assert not recwarn
    both = torch.cat([state["fc1.weight"], torch.ones(2, 8)])  # one storage, but no number in two tensors
    torch.save(state | {"fc1.weight": both[:24], "other": both[24:]}, file)
    assert merge(tmp_path, base="base/model.pth") == 0


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, state, capsys, name):
    file = tmp_path / "base" / name
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        refused(tmp_path, capsys, name, base=f"base/{name}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_all_or_nothing_appears(tmp_path, state, capsys, monkeypatch):
    """A folder in a file's place, and a failure or an interrupt after any number of files have taken theirs."""
    base, out, real = tmp_path / "base", tmp_path / "out", os.replace
    save_file(state, base / "model.safetensors")
    (base / "sub").mkdir()
    for name in ("config.json", "sub/one.txt", "tokenizer.json"):
        (base / name).write_text("new")
    (out / "tokenizer.json").mkdir(parents=True)
    (out / "config.json").write_text("old")
    refused(tmp_path, capsys, "out/tokenizer.json is a folder", more=["--overwrite"])
    (out / "tokenizer.json").rmdir()
    (out / "tokenizer.json").symlink_to("config.json")
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)):
        for last in (1, 2, 3):
            done = []

            def failing(*paths, last=last, error=error, done=done):
                done.append(paths)
                if len(done) == last + 1:
                    raise error
                return real(*paths)

            monkeypatch.setattr(os, "replace", failing)
            refused(tmp_path, capsys, "ssvdo: ", more=["--overwrite"], code=code)
            assert len(done) > last and (out / "tokenizer.json").is_symlink()
    monkeypatch.setattr(os, "replace", real)
    assert merge(tmp_path, "--overwrite") == 0
    assert {n for n, c in contents(out).items() if c == b"new"} == {"config.json", "sub/one.txt", "tokenizer.json"}
    assert set(contents(out)) == set(contents(base))


def test_a_new_folder_appears_as_a_whole(tmp_path, state, capsys, monkeypatch):
    save_file(state, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    moved, real = [], os.rename
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("a file was moved by itself"))
    monkeypatch.setattr(os, "rename", lambda *paths: moved.append(contents(paths[0])) or real(*paths))
    assert merge(tmp_path) == 0
    assert moved == [contents(tmp_path / "out")]
    (tmp_path / "file").write_text("")
    adapter, deep = str(tmp_path / "adapter"), tmp_path / "a" / "b" / "c"
    assert main(["merge", str(tmp_path / "base"), adapter, "--out", str(tmp_path / "file" / "x")]) == 1
    assert "file is no folder" in capsys.readouterr().err
    monkeypatch.setattr(export, "checked", lambda *_: 1 / 0)
    assert main(["merge", str(tmp_path / "base"), adapter, "--out", str(deep)]) == 1 and not (tmp_path / "a").exists()


def test_the_layer_that_is_the_whole_model(tmp_path):
    linear = nn.Linear(6, 14)
    (tmp_path / "base").mkdir()
    save_file(linear.state_dict(), tmp_path / "base" / "model.safetensors")
    layer = SSVDOLinear.from_linear(linear, SSVDOConfig(outer_rank=3))
    randomise(layer)
    save_ssvdo(layer, tmp_path / "adapter")
    assert merge(tmp_path) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], layer.adapted_weight())


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Conv1d(5, 12, 3), nn.Conv2d(1, 6, (2, 3)), nn.Linear(8, 24)

    def forward(self, x):
        return self.fc3(self.fc2(self.fc1(x)[:, None]).flatten(2)[..., :8])


def gpt2(transformers):
    """Its linear layers keep their weights transposed; attn.c_proj is square."""
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_head=2, n_layer=2, n_positions=16, n_inner=40)
    return transformers.GPT2LMHeadModel(config), ("c_fc", "c_proj", "c_attn"), torch.arange(12).view(2, 6)


def gpt_oss(transformers):
    config = transformers.GptOssConfig(
        vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, head_dim=6,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model, None, torch.arange(12).view(2, 6)


LAYOUTS = {"Conv1D": gpt2, "experts": gpt_oss, "convolution": lambda _: (Convolutions(), None, torch.randn(2, 5, 9))}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.filterwarnings("ignore:outer_rank=2 is lowered")
def test_weights_that_a_file_lays_out_otherwise(tmp_path, capsys, kind, file):
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="3-D experts came with Transformers 5")
    torch.manual_seed(0)
    model, targets, x = LAYOUTS[kind](transformers)
    model, base, out = model.eval(), tmp_path / "base", tmp_path / "out"
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or kind != "Conv1D"}  # it is tied
    base.mkdir()
    save_file(state, base / file, {"format": "pt"}) if "safe" in file else torch.save(state, base / file)
    before = model(x)
    randomise_all(apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules=targets)))
    save_ssvdo(model, tmp_path / "adapter")
    assert merge(tmp_path) == 0, capsys.readouterr().err
    want = remove_ssvdo(model, merge=True)(x)
    found = LAYOUTS[kind](transformers)[0].eval()
    found.load_state_dict(load_file(out / file) if "safe" in file else torch.load(out / file), strict=kind != "Conv1D")
    got = found(x)
    if kind != "convolution":
        before, want, got = before.logits, want.logits, got.logits
    assert torch.equal(got, want) and float((got - before).detach().abs().max()) > 1e-3
    if kind == "experts" and "safe" in file:
        name = "model.layers.0.mlp.experts.down_proj"
        save_file({n: t[:2].clone() if n == name else t for n, t in state.items()}, base / file)
        refused(tmp_path, capsys, f"{name} has shape (2, 20, 12), and no matrix of index 2", more=["--overwrite"])


def test_what_was_trained_on_a_quantised_weight_is_merged_in_memory(tmp_path, state, capsys, monkeypatch):
    save_file(state, tmp_path / "base" / "model.safetensors")
    model = apply_ssvdo(Net(), SSVDOConfig(outer_rank=3))
    monkeypatch.setattr(OwnHost, "layout", "quantised")
    save_ssvdo(model, tmp_path / "adapter")
    refused(tmp_path, capsys, "layer fc1 was trained on a quantised weight", "remove_ssvdo(model, merge=True)")
