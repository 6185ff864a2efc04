"""Manifests, audio and batches."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperFeatureExtractor

from .whisper import ENGLISH, SECONDS, Prompt

RATE = 16_000
SPEECH = Path(__file__).parent / "speech" / "manifest.tsv"


@dataclass(frozen=True)
class Utterance:
    """One recording: its file, what is said, and, where the manifest says so, whose voice and which split."""

    path: Path
    text: str
    voice: str = ""
    split: str = ""
    start: float = 0.0  # seconds into the file
    stop: float | None = None  # None: to its end


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; ValueError names one in another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None


def read_rows(path: Path, **how: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, fields by the header's names) of a table with a header. how: as `csv.reader` takes it.

    Raises:
        ValueError: the file is not UTF-8, or the csv module cannot read a line; names it.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), **how)
    try:
        for row in reader:
            yield reader.line_num, {name: value or "" for name, value in row.items() if name}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num + 1}: {error}") from None


def read_manifest(path: Path) -> list[Utterance]:
    """Reads a TSV with a header naming at least `path` (relative to the manifest) and `text`; also `voice`, `split`.

    Raises:
        ValueError: a column is missing, a text is empty, or a recording does not exist; names the file and line.
    """
    path = Path(path)
    utterances = []
    for number, row in read_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE):
        if missing := {"path", "text"} - set(row):
            raise ValueError(f"{path}: columns {sorted(missing)} are missing; the header has {list(row)}")
        audio, text = path.parent / row["path"], row["text"].strip()
        if not text:
            raise ValueError(f"{path}, line {number}: the text is empty")
        if not audio.is_file():
            raise ValueError(f"{path}, line {number}: no recording at {audio}")
        utterances.append(Utterance(audio, text, row.get("voice", ""), row.get("split", "")))
    if not utterances:
        raise ValueError(f"{path}: holds no utterance")
    return utterances


def load_audio(path: Path, start: float = 0.0, stop: float | None = None, seconds: int = SECONDS) -> Tensor:
    """Mono float32 samples at 16 kHz; channels are averaged, other rates resampled by a windowed sinc.

    Args:
        start, stop: the part of the file, in seconds. seconds: the model's context.

    Raises:
        ValueError: the recording is longer than the context.
    """
    rate = soundfile.info(path).samplerate
    end = None if stop is None else round(stop * rate)
    samples, rate = soundfile.read(path, start=round(start * rate), stop=end, dtype="float32", always_2d=True)
    audio = torch.from_numpy(samples).mean(1)
    if rate != RATE:
        audio = resample(audio, rate, RATE)
    if audio.numel() > seconds * RATE:
        raise ValueError(f"{path}: {audio.numel() / RATE:.1f} s long; the context holds {seconds} s")
    return audio


def resample(audio: Tensor, rate: int, target: int, zeros: int = 24) -> Tensor:
    """Band-limited resampling: a sinc with `zeros` zero crossings a side, under a Hann window. audio: samples."""
    count = int(audio.numel() * target / rate)
    cutoff = min(1.0, target / rate)
    centre = torch.arange(count, dtype=torch.float64) * (rate / target)
    reach = int(zeros / cutoff) + 1
    offsets = torch.arange(-reach, reach + 1)
    index = centre.floor().long()[:, None] + offsets
    distance = index - centre[:, None]
    window = torch.cos(torch.pi * distance / (2 * (reach + 1))).square()
    kernel = cutoff * torch.sinc(cutoff * distance) * window
    padded = torch.nn.functional.pad(audio.double(), (reach, reach + 1))
    return (padded[(index + reach).clamp(0, padded.numel() - 1)] * kernel).sum(1).float()


def features(utterances: list[Utterance], seconds: int = SECONDS) -> Tensor:
    """Log-mel features, utterances x 80 x 100 seconds (10 ms frames, padded to the context)."""
    extractor = WhisperFeatureExtractor(feature_size=80, sampling_rate=RATE, hop_length=160, n_fft=400,
                                        chunk_length=seconds)
    audio = [load_audio(u.path, u.start, u.stop, seconds).numpy() for u in utterances]
    return extractor(audio, sampling_rate=RATE, return_tensors="pt").input_features


def batches(
    mel: Tensor, utterances: list[Utterance], tokenizer: Tokenizer, size: int, seed: int, prompt: Prompt = ENGLISH
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless shuffled batches (mel, decoder_input_ids, labels) for teacher forcing.

    Decoder input: the prompt, then the text's tokens; labels: the tokens one step ahead, the end last, -100 where
    nothing counts (nothing of the prompt does).
    """
    rows = [tokenizer.encode(" " + u.text, add_special_tokens=False).ids for u in utterances]
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(order) - size + 1, size) if len(order) >= size else [0]:
            chosen = order[first : first + size]
            head = len(prompt.start)
            width = max(len(rows[i]) for i in chosen) + head
            inputs = torch.full((len(chosen), width), prompt.end)
            labels = torch.full((len(chosen), width), -100)
            for row, i in enumerate(chosen):
                ids = rows[i]
                inputs[row, : len(ids) + head] = torch.tensor([*prompt.start, *ids])
                labels[row, head - 1 : len(ids) + head] = torch.tensor([*ids, prompt.end])
            yield mel[chosen], inputs, labels
