"""Greedy transcription and word error rates."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jiwer
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from .whisper import prompt_of


@torch.no_grad()
def transcribe(
    model: WhisperForConditionalGeneration, tokenizer: Tokenizer, mel: Tensor, *, size: int = 24, limit: int = 40
) -> list[str]:
    """Greedy transcripts of mel (utterances x 80 x frames), `size` at a time, at most `limit` tokens each."""
    texts: list[str] = []
    prompt = prompt_of(model)
    device = next(model.parameters()).device
    for part in mel.split(size):
        heard = model.model.encoder(part.to(device)).last_hidden_state
        tokens = torch.tensor([prompt.start], device=device).repeat(len(part), 1)
        done, step, cache = torch.zeros(len(part), dtype=torch.bool, device=device), tokens, None
        for _ in range(limit):
            out = model.model.decoder(
                input_ids=step, encoder_hidden_states=heard, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            scores = model.proj_out(out.last_hidden_state[:, -1])
            step = scores[:, : prompt.start[0]].argmax(-1, keepdim=True).masked_fill(done[:, None], prompt.end)
            tokens = torch.cat([tokens, step], 1)
            done = done | (step[:, 0] == prompt.end)
            if bool(done.all()):
                break
        for row in tokens[:, len(prompt.start) :].tolist():
            ended = row.index(prompt.end) if prompt.end in row else len(row)
            texts.append(tokenizer.decode(row[:ended]).strip())
    return texts


def normalise(text: str) -> str:
    """Lower case, letters, digits and apostrophes only, single spaces."""
    text = text.lower().replace("\u2019", "'").replace("-", " ")
    return " ".join(re.sub(r"[^a-z0-9' ]", " ", text).split())


def wer(references: list[str], hypotheses: list[str]) -> float:
    """Word error rate in percent over all words, after `normalise`. Errors: substitutions, deletions, insertions."""
    return 100 * float(jiwer.wer([normalise(r) for r in references], [normalise(h) for h in hypotheses]))


@dataclass(frozen=True)
class Errors:
    """Counts per utterance, after `normalise`: wrong words (substitutions, deletions, insertions) of how many, and
    wrong characters of how many."""

    words_wrong: list[int]
    words: list[int]
    characters_wrong: list[int]
    characters: list[int]

    @classmethod
    def count(cls, references: list[str], hypotheses: list[str]) -> Errors:
        """Compares transcripts with what was said."""
        found = cls([], [], [], [])
        for said, heard in zip(map(normalise, references), map(normalise, hypotheses), strict=True):
            for unit, wrong, total in (
                (jiwer.process_words, found.words_wrong, found.words),
                (jiwer.process_characters, found.characters_wrong, found.characters),
            ):
                out = unit(said, heard)
                wrong.append(out.substitutions + out.deletions + out.insertions)
                total.append(out.hits + out.substitutions + out.deletions)
        return found

    @property
    def wer(self) -> float:
        """Word error rate, percent."""
        return 100 * sum(self.words_wrong) / sum(self.words)

    @property
    def cer(self) -> float:
        """Character error rate, percent."""
        return 100 * sum(self.characters_wrong) / sum(self.characters)
