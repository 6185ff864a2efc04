"""Speaks sentences with espeak-ng and flite and writes FLAC files and a manifest.

    python -m examples.asr.make_speech                          # the committed set (examples/asr/speech)
    python -m examples.asr.make_speech --out corpus --lab       # what the experiments use: more voices, a dev set

The test sentences are the last 60 of sentences.txt (of lexical.txt for the voice "lexical": the standard voice saying
words and phrases of another trade), so no voice trains on a sentence that any voice is tested on. Speed varies by
utterance with a fixed seed. Needs the programs espeak-ng and, for --lab, flite;
the demo itself needs neither.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from .corpus import RATE
from .options import TARGET
from .shifts import resample
from .whisper import SECONDS

HERE = Path(__file__).parent
TEST_SENTENCES = 60
LAB = {"train": 200, "dev": 40, "test": 60}
STEPS = 1 << 10  # amplitude steps a side: 11 bits halve the FLAC files, and the noise stays 60 dB below the speech
# voice: (command, training and test utterances committed); espeak-ng is a formant synthesiser, flite's voices are
# statistical models of real speakers (CMU ARCTIC)
VOICES: dict[str, tuple[list[str], int, int]] = {
    "en-us": (["espeak-ng", "-v", "en-us"], 0, 48),
    "scottish": (["espeak-ng", "-v", "en-gb-scotland"], 200, 48),
    "caribbean": (["espeak-ng", "-v", "en-029"], 0, 24),
    "west-midlands": (["espeak-ng", "-v", "en-gb-x-gbcwmd"], 0, 24),
    "child": (["espeak-ng", "-v", "en-us+f4", "-p", "95"], 0, 24),
    "arctic": (["flite", "-voice", "rms"], 0, 0),
}


@dataclass(frozen=True)
class Take:
    """One utterance to speak."""

    voice: str
    index: int
    text: str
    split: str
    command: list[str]

    @property
    def name(self) -> str:
        """Its file, relative to the manifest."""
        return f"{self.voice}/{self.index:04d}.flac"


def sentences(name: str = "sentences") -> list[str]:
    """The lines of sentences.txt, or of another list beside it."""
    return (HERE / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")


def committed() -> list[Take]:
    """The set in the repository: one voice to train on, all to test on."""
    lines, takes = sentences(), []
    first = len(lines) - TEST_SENTENCES
    for voice, (command, trained, tested) in VOICES.items():
        chosen = [(i, "train") for i in range(trained)] + [(i, "test") for i in range(first, first + tested)]
        takes += [Take(voice, i, lines[i], split, command) for i, split in chosen]
    return takes


def lab() -> list[Take]:
    """The experiments' set: every voice with train, dev and test sentences, and the lexical domain."""
    takes = []
    for voice in (*VOICES, "lexical"):
        lines = sentences("lexical" if voice == "lexical" else "sentences")
        command = VOICES[voice if voice in VOICES else "en-us"][0]
        test = len(lines) - LAB["test"]
        ranges = {"train": range(LAB["train"]), "dev": range(test - LAB["dev"], test), "test": range(test, len(lines))}
        takes += [Take(voice, i, lines[i], split, command) for split, r in ranges.items() for i in r]
    return takes


def speak(text: str, command: list[str], speed: int) -> torch.Tensor:
    """16 kHz samples of `text` at about `speed` words a minute."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        if command[0] == "flite":
            rest = ["--setf", f"duration_stretch={160 / speed:.3f}", "-t", text, "-o", str(wav)]
        else:
            rest = ["-s", str(speed), "-w", str(wav), text]
        subprocess.run([*command, *rest], check=True)
        samples, rate = soundfile.read(wav, dtype="float32")
    return resample(torch.from_numpy(samples), rate, RATE)


def record(out: Path, take: Take) -> None:
    """Writes one FLAC file, unless it is there; an utterance longer than 6 s is spoken faster."""
    if (out / take.name).exists():
        return
    speed = random.Random(f"{take.voice} {take.index}").randint(150, 185)
    audio = speak(take.text, take.command, speed)
    while audio.numel() > SECONDS * RATE:
        speed += 20
        audio = speak(take.text, take.command, speed)
    audio = (audio * STEPS).round().clamp(-STEPS, STEPS - 1) / STEPS
    temporary = out / f"{take.name}.{os.getpid()}.part"
    soundfile.write(temporary, audio.numpy(), RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    temporary.replace(out / take.name)


def manifest(takes: list[Take]) -> str:
    """The TSV that lists the recordings."""
    rows = ["path\ttext\tvoice\tsplit", *(f"{t.name}\t{t.text}\t{t.voice}\t{t.split}" for t in takes)]
    return "\n".join(rows) + "\n"


def make(out: Path, takes: list[Take]) -> None:
    """Writes the recordings that are not there yet, on all cores, and out/manifest.tsv last.

    Raises:
        RuntimeError: a synthesiser is not installed.
    """
    absent = [program for program in sorted({t.command[0] for t in takes}) if shutil.which(program) is None]
    if absent:
        raise RuntimeError(f"not installed: {', '.join(absent)} (Debian, Ubuntu: apt install {' '.join(absent)})")
    for voice in {t.voice for t in takes}:
        (out / voice).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.map(record, [out] * len(takes), takes, chunksize=8)
        for _ in tqdm(done, total=len(takes), desc="speaking", unit="utterance", mininterval=2):
            pass
    temporary = out / f"manifest.tsv.{os.getpid()}.part"
    temporary.write_text(manifest(takes), encoding="utf-8")
    temporary.replace(out / "manifest.tsv")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=TARGET, default=HERE / "speech", help="folder to write")
    parser.add_argument("--lab", action="store_true", help="the experiments' set, not the committed one")
    options = parser.parse_args()
    try:
        make(options.out, lab() if options.lab else committed())
    except RuntimeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
