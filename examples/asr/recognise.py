"""Greedy transcription and word error rates."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
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
    """Lower case, letters (with their marks), digits and apostrophes only, single spaces. Of every script, as NFKC.

    What shows nothing, such as a soft hyphen or a joiner, is left out; a zero-width space is a space.
    """
    shown = "".join(c for c in text if c == "\u200b" or unicodedata.category(c) != "Cf")
    kept = [" "]
    for c in unicodedata.normalize("NFKC", shown).lower().replace("\u2019", "'").replace("\u02bc", "'"):
        marked = unicodedata.category(c)[0] == "M" and kept[-1] not in " '"
        kept.append(c if c.isalnum() or c == "'" or marked else " ")
    return " ".join("".join(kept).split())


def spoken(references: list[str], plain: Callable[[str], str] = normalise) -> list[str]:
    """`plain` of what was said.

    Raises:
        ValueError: there is nothing, or no word in one of them, so that no rate can be told; names it.
    """
    found = [plain(r) for r in references]
    if not found:
        raise ValueError("references is empty; at least one is needed")
    for number, text in enumerate(found):
        if not any(map(str.isalnum, text)):
            raise ValueError(f"references[{number}]={references[number]!r} has no words; allowed: at least one letter "
                             "or digit")
    return found


def wer(references: list[str], hypotheses: list[str]) -> float:
    """Word error rate in percent over all words, after `normalise`. Errors: substitutions, deletions, insertions.

    A word is what stands between spaces. Raises what `spoken` raises.
    """
    return 100 * float(jiwer.wer(spoken(references), [normalise(h) for h in hypotheses]))


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
        """Compares transcripts with what was said. Raises what `spoken` raises."""
        found = cls([], [], [], [])
        for said, heard in zip(spoken(references), map(normalise, hypotheses), strict=True):
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
