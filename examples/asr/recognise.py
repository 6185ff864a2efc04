"""Greedy transcription and word error rates."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jiwer
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from .whisper import prompt_of


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Under autocast: frozen matrices of plain layers in its dtype, as it would otherwise make anew for every token."""
    device = next(model.parameters()).device.type
    plain = [m for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    kept = [m.weight for m in plain]
    try:
        if torch.is_autocast_enabled(device):
            for module in plain:
                half = module.weight.to(torch.get_autocast_dtype(device))
                module.weight = nn.Parameter(half, requires_grad=False)
        yield
    finally:
        for module, weight in zip(plain, kept, strict=True):
            module.weight = weight


@torch.no_grad()
def transcribe(
    model: WhisperForConditionalGeneration, tokenizer: Tokenizer, mel: Tensor, *, size: int = 24, limit: int = 40
) -> list[str]:
    """Greedy transcripts of mel (utterances x 80 x frames), `size` at a time, at most `limit` tokens each."""
    with cast_once(model):
        return [tokenizer.decode(ids).strip() for part in mel.split(size) for ids in _decode(model, part, limit)]


def _decode(model: WhisperForConditionalGeneration, mel: Tensor, limit: int) -> list[list[int]]:
    """The tokens of each utterance. What has ended leaves the batch once it is half of it."""
    prompt, device = prompt_of(model), next(model.parameters()).device
    heard = model.model.encoder(mel.to(device)).last_hidden_state
    found: list[list[int]] = [[] for _ in mel]
    alive = list(range(len(mel)))  # which utterance each row of the batch is
    step, cache = torch.tensor([prompt.start], device=device).repeat(len(mel), 1), None
    for _ in range(limit):
        out = model.model.decoder(input_ids=step, encoder_hidden_states=heard, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step = model.proj_out(out.last_hidden_state[:, -1])[:, : prompt.start[0]].argmax(-1, keepdim=True)
        for utterance, token in zip(alive, step[:, 0].tolist(), strict=True):
            if not found[utterance] or found[utterance][-1] != prompt.end:
                found[utterance].append(token)
        left = [row for row, utterance in enumerate(alive) if found[utterance][-1] != prompt.end]
        if not left:
            break
        if 2 * len(left) <= len(alive):
            rows = torch.tensor(left, device=device)
            alive, step, heard = [alive[row] for row in left], step[rows], heard[rows]
            cache.batch_select_indices(rows)
    return [ids[:-1] if ids[-1] == prompt.end else ids for ids in found]


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
    """Counts per utterance, after `normalise`: wrong words (substitutions, deletions, insertions) of how many, wrong
    characters of how many, and the deletions among the wrong words."""

    words_wrong: list[int]
    words: list[int]
    characters_wrong: list[int]
    characters: list[int]
    words_deleted: list[int]

    @classmethod
    def count(cls, references: list[str], hypotheses: list[str]) -> Errors:
        """Compares transcripts with what was said. Raises what `spoken` raises."""
        found = cls([], [], [], [], [])
        for said, heard in zip(spoken(references), map(normalise, hypotheses), strict=True):
            for unit, wrong, total in (
                (jiwer.process_words, found.words_wrong, found.words),
                (jiwer.process_characters, found.characters_wrong, found.characters),
            ):
                out = unit(said, heard)
                wrong.append(out.substitutions + out.deletions + out.insertions)
                total.append(out.hits + out.substitutions + out.deletions)
                if unit is jiwer.process_words:
                    found.words_deleted.append(out.deletions)
        return found

    @property
    def wer(self) -> float:
        """Word error rate, percent."""
        return 100 * sum(self.words_wrong) / sum(self.words)

    @property
    def capped(self) -> float:
        """Word error rate, percent, with an utterance's errors at most its number of words: a loop counts once."""
        return 100 * sum(map(min, self.words_wrong, self.words)) / sum(self.words)

    @property
    def deletions(self) -> float:
        """Words left out, percent."""
        return 100 * sum(self.words_deleted) / sum(self.words)

    @property
    def cer(self) -> float:
        """Character error rate, percent."""
        return 100 * sum(self.characters_wrong) / sum(self.characters)
