"""Corpora: the synthetic one, a TSV manifest, a Kaldi data folder, a Hugging Face audio folder."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .corpus import SPEECH, Utterance, existing, read_manifest, read_rows, read_text, repeated
from .make_speech import lab, make, manifest
from .whisper import cache_folder

LAB_FOLDER = "speech-1"


def read_kaldi(folder: Path) -> list[Utterance]:
    """A Kaldi data folder: wav.scp, text, and, where there is one, segments (a stop of -1: the recording's end).
    Its own name is the voice.

    Raises:
        ValueError: a file is missing, a line is wrong or a name stands twice (named), or wav.scp holds a command
            (nothing is ever run).
    """
    folder = Path(folder)
    for needed in ("wav.scp", "text"):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder}: no {needed}; a Kaldi data folder has wav.scp and text")
    recordings = {}
    for number, (key, value) in kaldi_lines(folder / "wav.scp"):
        if value.endswith("|"):
            raise ValueError(f"{folder}/wav.scp, line {number}: a command, which is not run; convert the audio first")
        recordings[key] = existing(folder, value, f"{folder}/wav.scp, line {number}")
    parts: dict[str, tuple[str, float, float | None]] = {key: (key, 0.0, None) for key in recordings}
    if (folder / "segments").is_file():
        parts = {}
        for number, (key, value) in kaldi_lines(folder / "segments"):
            where = f"{folder}/segments, line {number}"
            try:
                recording, *times = value.split()
                start, stop = map(float, times)
            except ValueError:
                raise ValueError(f"{where}: expected an utterance, a recording, start and stop") from None
            if math.isinf(stop) or not 0 <= start < (math.inf if stop == -1 else stop):
                raise ValueError(f"{where}: start and stop are {' '.join(times)}; allowed: 0 <= start < stop, or -1 as "
                                 "stop, the end of the recording")
            parts[key] = (recording, start, None if stop == -1 else stop)
    found = []
    for number, (key, text) in kaldi_lines(folder / "text"):
        if key not in parts or parts[key][0] not in recordings:
            raise ValueError(f"{folder}/text, line {number}: utterance {key!r} has no recording")
        recording, begin, end = parts[key]
        found.append(Utterance(recordings[recording], text, folder.name, "", begin, end))
    return _some(found, folder)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line), without blank lines at the end. Newlines alone end a line: U+2028, NEL and the like are text."""
    lines = read_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    yield from enumerate(lines, 1)


def kaldi_lines(path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """(number, (name, value)) of a Kaldi list.

    Raises:
        ValueError: a line has no value, or a name stands twice; names the line.
    """
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        key, *value = re.split("[ \t]+", line.strip(" \t"), maxsplit=1)
        if not value or not value[0].strip():
            raise ValueError(f"{path}, line {number}: expected a name and a value")
        if seen.setdefault(key, number) != number:
            raise ValueError(f"{path}, line {number}: {key!r} stands on line {seen[key]} already")
        yield number, (key, value[0].strip())


def read_audio_folder(folder: Path) -> list[Utterance]:
    """A Hugging Face audio folder: metadata.csv or metadata.jsonl with file_name and text (or transcription, sentence).

    Subfolders named train, dev (or validation) and test, each with metadata of its own, become splits.

    Raises:
        ValueError: there is no metadata or a folder has both kinds, a field is missing or a recording does not exist;
            names the file and line.
    """
    folder = Path(folder)
    found: list[Utterance] = []
    for name, split in {"": "", "train": "train", "validation": "dev", "dev": "dev", "test": "test"}.items():
        for number, row, path in _metadata(folder / name if name else folder):
            text = next((row[k] for k in ("text", "transcription", "sentence") if row.get(k)), "")
            if not row.get("file_name") or not text.strip():
                raise ValueError(f"{path}, line {number}: needs file_name and text (or transcription, sentence)")
            audio = existing(path.parent, row["file_name"], f"{path}, line {number}")
            found.append(Utterance(audio, text.strip(), row.get("voice") or folder.name, split or row.get("split", "")))
    return _some(found, folder)


def _metadata(folder: Path) -> Iterator[tuple[int, dict[str, str], Path]]:
    name = _only(folder, "metadata.csv", "metadata.jsonl")
    path = folder / (name or "")
    if name == "metadata.csv":
        for number, row in read_rows(path):
            yield number, row, path
    elif name:
        for number, line in _lines(path):
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: no JSON object")
            yield number, {name: value for name, value in row.items() if isinstance(value, str)}, path


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := repeated(name for name, _ in pairs):
        raise ValueError(f"{twice[0]!r} stands twice")
    return dict(pairs)


def _only(folder: Path, *names: str) -> str | None:
    """Which of the files the folder has; a ValueError where it has two, since one would be left out."""
    there = [name for name in names if (folder / name).is_file()]
    if len(there) > 1:
        raise ValueError(f"{folder}: holds {' and '.join(there)}; one list of recordings is allowed")
    return there[0] if there else None


def _some(found: list[Utterance], folder: Path) -> list[Utterance]:
    if not found:
        raise ValueError(f"{folder}: holds no utterance (no metadata.csv or metadata.jsonl, or empty files)")
    return found


def read_corpus(path: Path) -> list[Utterance]:
    """A TSV manifest, a Kaldi data folder, a Hugging Face audio folder, or a folder with manifest.tsv, told apart.

    Raises:
        ValueError: it is none of them or several, or a line of it is wrong.
    """
    path = Path(path)
    if path.is_file():
        return read_manifest(path)
    listed = _only(path, "manifest.tsv", "wav.scp", "metadata.csv", "metadata.jsonl")
    if listed == "manifest.tsv":
        return read_manifest(path / listed)
    if listed == "wav.scp":
        return read_kaldi(path)
    if path.is_dir():
        return read_audio_folder(path)
    raise ValueError(f"corpus={str(path)!r}: no such file or folder")


@dataclass(frozen=True)
class Corpus:
    """Utterances by voice and split."""

    utterances: tuple[Utterance, ...]

    def of(self, voice: str, split: str) -> list[Utterance]:
        """Those of one voice and split. "voice@shift": the same recordings after one of `shifts.SHIFTS`.

        Raises:
            ValueError: there are none; names the voices and splits that there are.
        """
        voice, _, shift = voice.partition("@")
        found = [replace(u, shift=shift) for u in self.utterances if u.voice == voice and u.split == split]
        if not found:
            there = sorted({(u.voice, u.split) for u in self.utterances})
            raise ValueError(f"voice {voice!r} has no utterance of split {split!r}; the corpus has {there}")
        return found


def real_folder() -> Path:
    """Where the real recordings are: $SSVDO_SPEECH, or "real-speech" in the cache."""
    return Path(os.environ.get("SSVDO_SPEECH", cache_folder() / "real-speech"))


def real_manifests() -> list[Path]:
    """The manifests of the real recordings.

    Raises:
        ValueError: one is not there; says how to make it.
    """
    listed = [real_folder() / name / "manifest.tsv" for name in ("speechocean762", "librispeech_other")]
    for path in listed:
        if not path.is_file():
            raise ValueError(f"corpus='speech': no {path}; set SSVDO_SPEECH, or make it from the public corpora: "
                             "python -m examples.asr.make_real --help")
    return listed


def open_corpus(source: str) -> Corpus:
    """"committed": the speech in the repository. "synthetic": the experiments' set, spoken on first use and kept
    in the cache. "speech": real recordings, in the folder that `make_real` has filled. Else "name=path,name=path,...":
    each path a corpus, read as voice `name`; Kaldi's usual folders of one split each are given as
    "name/train=path,name/test=path".

    Raises:
        ValueError: a part is wrong, or the real recordings are not there. RuntimeError: a synthesiser is not installed.
    """  # fmt: skip
    if source == "committed":
        return Corpus(tuple(read_manifest(SPEECH)))
    if source == "synthetic":
        folder = cache_folder() / LAB_FOLDER
        listed = folder / "manifest.tsv"
        if not listed.exists() or listed.read_text(encoding="utf-8") != manifest(lab()):
            make(folder, lab())
        return Corpus(tuple(read_manifest(folder / "manifest.tsv")))
    if source == "speech":
        return Corpus(tuple(u for listed in real_manifests() for u in read_manifest(listed)))
    found: list[Utterance] = []
    for part in source.split(","):
        name, equals, path = part.partition("=")
        voice, _, split = name.partition("/")
        if not equals or not voice:
            raise ValueError(f"corpus={source!r}: expected 'committed', 'synthetic', 'speech', or "
                             "name=path,name/split=path,...")
        found += [replace(u, voice=voice, split=split or u.split) for u in read_corpus(Path(path))]
    return Corpus(tuple(found))
