"""Manifests, audio and batches."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperFeatureExtractor

from .shifts import RATE, resample, shifted
from .whisper import ENGLISH, SECONDS, Prompt

ROUNDING = 0.01  # seconds that a part may end after its file does: times are written to hundredths
UNKNOWN = 0x7FFF0000  # bytes; the size in the header of a WAV file written to a pipe is this or more
_SIZES = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)  # libsndfile's log
SPEECH = Path(__file__).parent / "speech" / "manifest.tsv"


@dataclass(frozen=True)
class Utterance:
    """One recording: its file, what is said, and, where the manifest says so, whose voice, which split, which person.

    shift: what is done to the samples when they are loaded, one of `shifts.SHIFTS`.
    """

    path: Path
    text: str
    voice: str = ""
    split: str = ""
    start: float = 0.0  # seconds into the file
    stop: float | None = None  # None: to its end
    speaker: str = ""
    shift: str = ""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; ValueError names one that cannot be read as such."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: not read as text ({error.strerror})") from None


def repeated(names: Iterable[str]) -> list[str]:
    """Those that stand more than once."""
    return [name for name, times in Counter(names).items() if times > 1]


def read_rows(path: Path, **how: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, fields by the header's names) of a table with a header. how: as `csv.reader` takes it.

    The line is the one where the row begins. Fields missing at a row's end are empty.

    Raises:
        ValueError: the file is not UTF-8, the csv module cannot read a line, a row has more fields than the header, or
            the header a name twice; names the line.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, **how)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if row and not header:
                header = row
                if twice := repeated(filter(None, row)):
                    raise ValueError(f"{path}, line {line}: columns {twice} stand twice")
            elif len(row) > len(header):
                raise ValueError(f"{path}, line {line}: {len(row)} fields; the header names {len(header)} (quote a "
                                 "field that holds the separator, or leave the separator out)")
            elif row:
                values = row + [""] * (len(header) - len(row))
                yield line, {name: value for name, value in zip(header, values, strict=True) if name}
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def read_manifest(path: Path) -> list[Utterance]:
    """Reads a TSV with a header naming at least `path` (relative to it) and `text`; also `voice`, `split`, `speaker`.

    Raises:
        ValueError: a column is missing, a text is empty, or a recording does not exist; names the file and line.
    """
    path = Path(path)
    if path == SPEECH and not path.is_file():
        raise ValueError(f"{path.parent}: no recordings, as in every source archive; clone the repository, or make "
                         "them with espeak-ng: python -m examples.asr.make_speech")
    utterances = []
    for number, row in read_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE):
        if missing := {"path", "text"} - set(row):
            raise ValueError(f"{path}: columns {sorted(missing)} are missing; the header has {list(row)}")
        text = row["text"].strip()
        if not text:
            raise ValueError(f"{path}, line {number}: the text is empty")
        audio = existing(path.parent, row["path"], f"{path}, line {number}")
        utterances.append(Utterance(audio, text, row.get("voice", ""), row.get("split", ""),
                                    speaker=row.get("speaker", "")))
    if not utterances:
        raise ValueError(f"{path}: holds no utterance")
    return utterances


def existing(folder: Path, name: str, where: str) -> Path:
    """The recording of that name in a folder; a ValueError that says `where` it is named if there is none."""
    audio = folder / name
    if not os.path.isfile(audio):  # False, not an error, for a name that no file can have
        raise ValueError(f"{where}: no recording at {audio}")
    return audio


@contextmanager
def _opened(path: Path) -> Iterator[soundfile.SoundFile]:
    try:
        with soundfile.SoundFile(path) as file:
            yield file
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # a TypeError: raw samples, by the name's end
        why = getattr(error, "error_string", error)
        raise ValueError(f"{path}: not read as audio ({why})") from None


def _part(path: Path, file: soundfile.SoundFile, start: float, stop: float | None, seconds: int) -> tuple[int, int]:
    """(first frame, how many) of a part, as the header tells; refuses what `load_audio` refuses, as far as it can."""
    rate, length = file.samplerate, file.frames / file.samplerate
    if not file.frames:
        raise ValueError(f"{path}: holds no samples")
    if file.frames >= 1 << 62:
        raise ValueError(f"{path}: the header names no length; write the file anew, not to a pipe")
    if sizes := _SIZES.search(file.extra_info):  # WAV, AIFF, AU: `frames` is what is there already
        named, there = map(int, sizes.groups())
        if named < UNKNOWN and (named - there) * length > ROUNDING * there:
            raise ValueError(f"{path}: cut short: the header names {named} bytes of samples, {there} are there")
    end = length if stop is None else stop
    if not 0 <= start < end <= length + ROUNDING:
        raise ValueError(f"{path}: start={start}, stop={stop} of {length:.2f} s; allowed: 0 <= start < stop <= the "
                         "length")
    first = round(start * rate)
    count = min(round(end * rate), file.frames) - first
    if file.format != "MP3":  # whose header may only guess the length
        _check_length(path, int(count * RATE / rate), seconds)
    return first, count


def _check_length(path: Path, samples: int, seconds: int) -> None:
    if samples > seconds * RATE:
        raise ValueError(f"{path}: {samples / RATE:.1f} s long; the context holds {seconds} s")


def load_audio(path: Path, start: float = 0.0, stop: float | None = None, seconds: int = SECONDS) -> Tensor:
    """Mono float32 samples at 16 kHz; channels are averaged, other rates resampled by a windowed sinc.

    Args:
        start, stop: the part of the file, in seconds. seconds: the model's context.

    Raises:
        ValueError: the recording cannot be read, is empty, cut short or not finite, the part is not inside it, or it
            is longer than the context.
    """
    with _opened(path) as file:
        rate, (first, count) = file.samplerate, _part(path, file, start, stop, seconds)
        file.seek(first)
        samples = file.read(count, dtype="float32", always_2d=True)
        if len(samples) < count and file.format != "MP3":
            raise ValueError(f"{path}: cut short: {count} frames wanted, {len(samples)} are there")
    audio = torch.from_numpy(samples).mean(1)
    if rate != RATE:
        audio = resample(audio, rate, RATE)
    if not audio.numel():
        raise ValueError(f"{path}: holds no samples from start={start} to stop={stop}")
    if not audio.isfinite().all():
        raise ValueError(f"{path}: holds samples that are not finite; allowed: finite ones")
    _check_length(path, audio.numel(), seconds)
    return audio


def features(utterances: list[Utterance], seconds: int = SECONDS) -> Tensor:
    """Log-mel features, utterances x 80 x 100 seconds (10 ms frames, padded to the context)."""
    extractor = WhisperFeatureExtractor(feature_size=80, sampling_rate=RATE, hop_length=160, n_fft=400,
                                        chunk_length=seconds)
    audio = []
    for u in utterances:
        samples = shifted(load_audio(u.path, u.start, u.stop, seconds), u.shift)
        _check_length(u.path, samples.numel(), seconds)
        audio.append(samples.numpy())
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
