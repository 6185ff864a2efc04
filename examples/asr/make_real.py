"""Makes the real recordings' folder from the two public corpora: fixed utterances, listed in real_speech.tsv.

    python -m examples.asr.make_real --speechocean762 DIR --librispeech DIR [--out DIR]

speechocean762 (https://openslr.org/101: English read by Mandarin speakers, free for every use; Zhang et al.,
Interspeech 2021) and LibriSpeech test-other (https://openslr.org/12: CC BY 4.0, Vassil Panayotov), unpacked. The
experiments read the folder as corpus "speech", from $SSVDO_SPEECH or, by default, the cache.

Chosen from speechocean762: at most 6 s, two words or more, no strings of digits; children of 6 to 15 years and adults.
Test speakers are the corpus's own; train and dev are its training speakers. No speaker is in two splits, no sentence of
test in train or dev; rows alternate between speakers. From LibriSpeech: short utterances of ten speakers.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from .corpus import RATE, load_audio, read_rows
from .options import FOLDER, TARGET, as_script
from .readers import kaldi_lines, real_folder

LISTED = Path(__file__).parent / "real_speech.tsv"
PEAK, STEPS = 0.95, 1 << 10  # speechocean762 is quiet at times; fewer steps halve the FLAC files
SECONDS = 10


@dataclass(frozen=True)
class Row:
    """One utterance of the list."""

    id: str
    voice: str
    split: str

    @property
    def speaker(self) -> str:
        """speechocean762: five of nine digits, without the first; LibriSpeech: what stands before the first hyphen."""
        return self.id.partition("-")[0] if "-" in self.id else self.id[1:5]


Source = tuple[Path, str]  # a recording, and what is said in it


def listed() -> list[Row]:
    """The utterances of the real recordings, in the order of the manifests."""
    return [Row(row["id"], row["voice"], row["split"]) for _, row in read_rows(LISTED, delimiter="\t")]


def speechocean762(folder: Path) -> dict[str, Source]:
    """Every utterance of the corpus, by its name.

    Raises:
        ValueError: a list of the corpus is not there, or a line of one is wrong.
    """
    found: dict[str, Source] = {}
    for part in ("train", "test"):
        for needed in ("wav.scp", "text"):
            if not (folder / part / needed).is_file():
                raise ValueError(f"--speechocean762 {folder}: no {part}/{needed}; allowed: the corpus, unpacked")
        said = {name: text for _, (name, text) in kaldi_lines(folder / part / "text")}
        for number, (name, path) in kaldi_lines(folder / part / "wav.scp"):
            if name not in said:
                raise ValueError(f"{folder / part / 'wav.scp'}, line {number}: {name!r} has no line in text")
            found[name] = folder / path, said[name]
    return found


def librispeech(folder: Path) -> dict[str, Source]:
    """Every utterance below a folder of LibriSpeech, by its name.

    Raises:
        ValueError: there is none.
    """
    found = {name: (path.parent / f"{name}.flac", text)
             for path in sorted(folder.rglob("*.trans.txt")) for _, (name, text) in kaldi_lines(path)}  # fmt: skip
    if not found:
        raise ValueError(f"--librispeech {folder}: no *.trans.txt below it; allowed: LibriSpeech/test-other, unpacked")
    return found


def levelled(audio: Tensor) -> Tensor:
    """At a peak of 0.95, in STEPS steps a side."""
    return (audio * (PEAK / audio.abs().max()) * STEPS).round() / STEPS


def write(out: Path, rows: list[Row], there: dict[str, Source], level: Callable[[Tensor], Tensor]) -> None:
    """The recordings of `rows` as FLAC, and their manifest.

    Raises:
        ValueError: an utterance is not in the corpus, or its recording cannot be read.
    """
    if missing := [r.id for r in rows if r.id not in there]:
        raise ValueError(f"{len(missing)} of {len(rows)} utterances are not in the corpus, {missing[0]!r} the first")
    lines = ["path\ttext\tvoice\tsplit\tspeaker"]
    for row in tqdm(rows, desc=out.name, unit="utterance"):
        path, text = there[row.id]
        name = f"{row.voice}/{row.id}.flac"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        samples = (level(load_audio(path, seconds=SECONDS)) * (1 << 15)).round().to(torch.int16)
        soundfile.write(out / name, samples.numpy(), RATE)
        lines.append(f"{name}\t{text.lower()}\t{row.voice}\t{row.split}\t{row.speaker}")
    (out / "manifest.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speechocean762", type=FOLDER, required=True, help="unpacked: has WAVE, train and test")
    parser.add_argument("--librispeech", type=FOLDER, required=True, help="test-other, or a folder above it")
    parser.add_argument("--out", type=TARGET, help="default: $SSVDO_SPEECH, or a folder in the cache")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Writes both folders."""
    options = parse(arguments)
    out = options.out or real_folder()
    rows: dict[bool, list[Row]] = defaultdict(list)
    for row in listed():
        rows[row.voice == "librispeech"].append(row)
    sources = speechocean762(options.speechocean762), librispeech(options.librispeech)
    write(out / "speechocean762", rows[False], sources[0], levelled)
    write(out / "librispeech_other", rows[True], sources[1], lambda audio: audio)
    print(f"{sum(map(len, rows.values()))} utterances in {out}; to use another folder than the default: "
          f"SSVDO_SPEECH={out}")
    return 0


if __name__ == "__main__":
    as_script(main)
