"""Speaks sentences.txt with espeak-ng and writes FLAC files and a manifest.

    python -m examples.asr.make_speech                          # the committed set (examples/asr/speech)
    python -m examples.asr.make_speech --out corpus --all       # every sentence in every voice

The test sentences are the last 60 of the list, so no voice trains on a sentence that any voice is tested on. Speed
varies by utterance with a fixed seed. Needs the program espeak-ng; the demo itself does not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from .corpus import RATE, resample
from .whisper import SECONDS

HERE = Path(__file__).parent
TEST_SENTENCES = 60
STEPS = 1 << 10  # amplitude steps a side: 11 bits halve the FLAC files, and the noise stays 60 dB below the speech
# voice: (espeak-ng arguments, training and test utterances committed)
VOICES: dict[str, tuple[list[str], int, int]] = {
    "en-us": (["-v", "en-us"], 0, 48),
    "scottish": (["-v", "en-gb-scotland"], 200, 48),
    "caribbean": (["-v", "en-029"], 0, 24),
    "west-midlands": (["-v", "en-gb-x-gbcwmd"], 0, 24),
    "child": (["-v", "en-us+f4", "-p", "95"], 0, 24),
}


def sentences() -> list[str]:
    """The lines of sentences.txt."""
    return (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()


def speak(text: str, arguments: list[str], speed: int) -> torch.Tensor:
    """16 kHz samples of `text` at `speed` words a minute."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        subprocess.run(["espeak-ng", *arguments, "-s", str(speed), "-w", str(wav), text], check=True)
        samples, rate = soundfile.read(wav, dtype="float32")
    return resample(torch.from_numpy(samples), rate, RATE)


def make(out: Path, everything: bool) -> None:
    """Writes out/<voice>/NNNN.flac and out/manifest.tsv; utterances longer than 6 s are spoken faster."""
    lines = sentences()
    train, test = list(range(len(lines) - TEST_SENTENCES)), list(range(len(lines) - TEST_SENTENCES, len(lines)))
    rows = ["path\ttext\tvoice\tsplit"]
    for voice, (arguments, trained, tested) in VOICES.items():
        chosen = [(i, "train") for i in (train if everything else train[:trained])]
        chosen += [(i, "test") for i in (test if everything else test[:tested])]
        (out / voice).mkdir(parents=True, exist_ok=True)
        for index, split in tqdm(chosen, desc=voice, unit="utterance", mininterval=5):
            speed = random.Random(f"{voice} {index}").randint(150, 185)
            audio = speak(lines[index], arguments, speed)
            while audio.numel() > SECONDS * RATE:
                speed += 20
                audio = speak(lines[index], arguments, speed)
            name = f"{voice}/{index:04d}.flac"
            audio = (audio * STEPS).round().clamp(-STEPS, STEPS - 1) / STEPS
            soundfile.write(out / name, audio.numpy(), RATE, format="FLAC", subtype="PCM_16",
                            compression_level=1.0)
            rows.append(f"{name}\t{lines[index]}\t{voice}\t{split}")
    (out / "manifest.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "speech", help="folder to write")
    parser.add_argument("--all", action="store_true", help="every sentence in every voice, not the committed selection")
    options = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        parser.error("the program espeak-ng is not installed")
    make(options.out, options.all)


if __name__ == "__main__":
    main()
