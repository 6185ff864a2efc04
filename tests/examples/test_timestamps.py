"""Times in the transcripts that a model is tuned on: every second batch, in their places."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("jiwer", reason="jiwer is not installed")

from examples.asr.corpus import Utterance, batches
from examples.asr.timestamps import FIRST, sounding, with_times
from examples.asr.whisper import ENGLISH


class Words:
    def encode(self, text, add_special_tokens):
        return SimpleNamespace(ids=[len(word) for word in text.split()])


def test_every_second_batch_has_times_around_its_words():
    mel = torch.arange(3.0)[:, None]
    said = [Utterance(Path("x"), text) for text in ("a bb", "cccc", "a a a")]
    data = batches(mel, said, Words(), 3, 0)
    spans = [(0.0, 1.0), (0.1, 2.5), (0.02, 3.0)]
    (_, plain, _), (heard, inputs, labels) = islice(with_times(data, mel, spans), 2)
    assert plain.shape[1] == 5 and (plain[:, 1] == ENGLISH.start[1]).all()
    want = {0: (0, [1, 2], 50), 1: (5, [4], 125), 2: (1, [1, 1, 1], 150)}
    for row, which in enumerate(heard[:, 0].tolist()):
        begin, words, end = want[int(which)]
        tokens = [FIRST + begin, *words, FIRST + end]
        assert inputs[row, : len(tokens) + 1].tolist() == [ENGLISH.start[0], *tokens]
        counted = labels[row, : len(tokens) + 1].tolist()
        assert counted == [*tokens, ENGLISH.end] and (labels[row, len(tokens) + 1 :] == -100).all()


def test_where_a_recording_sounds():
    audio = torch.zeros(16_000)
    audio[1600:8001] = 0.5
    assert sounding(audio) == (0.1, 0.5)
