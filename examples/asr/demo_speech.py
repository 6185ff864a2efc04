"""The speech of the demo: synthetic voices from the repository, your own recordings, or children."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .corpus import SPEECH, Utterance, read_manifest
from .make_real import listed, speechocean762

TESTED = 48  # utterances of a corpus


def splits(utterances: list[Utterance], voice: str) -> tuple[list[Utterance], list[Utterance]]:
    """(train, test) of one voice; a manifest without splits tests every fifth utterance."""
    own = [u for u in utterances if u.voice == voice or not voice]
    if not any(u.split for u in own):
        return [u for i, u in enumerate(own) if i % 5], own[::5]
    return [u for u in own if u.split == "train"], [u for u in own if u.split == "test"]


@dataclass(frozen=True)
class Speech:
    """What the demo trains on and is tested on. about: said before anything else."""

    target: str
    train: list[Utterance]
    test: list[Utterance]
    source: str
    kept: list[Utterance]
    about: str


def committed() -> Speech:
    """The synthetic voices of the repository."""
    utterances = read_manifest(SPEECH)
    train, test = splits(utterances, "scottish")
    return Speech("Scottish, synthetic", train, test, "en-us, synthetic", splits(utterances, "en-us")[1],
                  "These voices are SYNTHETIC (espeak-ng), far more regular than people: error rates fall further than "
                  "on recordings. To adapt to real children: --corpus FOLDER.")  # fmt: skip


def own_recordings(manifest: Path) -> Speech:
    """A manifest, beside the synthetic standard voice.

    Raises:
        ValueError: it has nothing to train or to test on.
    """
    train, test = splits(read_manifest(manifest), "")
    if not train or not test:
        raise ValueError(f"{manifest}: needs utterances to train and to test on")
    return replace(committed(), target="your recordings", train=train, test=test,
                   about="Your recordings; what is forgotten is measured on a SYNTHETIC voice.")  # fmt: skip


def children(corpus: Path) -> Speech:
    """Children of speechocean762, as it is unpacked or as `make_real` writes it. Forgetting: LibriSpeech, else adults.

    Raises:
        ValueError: the folder is neither, or holds none of the utterances to train or to test on.
    """
    made = corpus / "speechocean762" / "manifest.tsv"
    if made.is_file():
        utterances = read_manifest(made)
    else:
        there = speechocean762(corpus)
        utterances = [Utterance(there[r.id][0], there[r.id][1].lower(), r.voice, r.split)
                      for r in listed() if r.id in there]  # fmt: skip
    native = corpus / "librispeech_other" / "manifest.tsv"
    train, test = splits(utterances, "child")
    kept, name = splits(utterances, "adult")[1][:TESTED], "adults"
    if native.is_file():
        every = read_manifest(native)
        kept, name = every[:: -(-len(every) // TESTED)], "LibriSpeech test-other"
    if not train or not test or not kept:
        raise ValueError(f"{corpus}: no utterance of children or adults to {'test' if train else 'train'} on; allowed: "
                         "the whole corpus")  # fmt: skip
    return Speech("children", train, test[:TESTED], name, kept,
                  "Children of 6 to 15 years who read English with a Mandarin accent (speechocean762).")  # fmt: skip
