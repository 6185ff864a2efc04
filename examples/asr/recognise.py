"""Greedy transcription and word error rates."""

from __future__ import annotations

import re

import jiwer
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from .whisper import END, NO_TIMESTAMPS, START


@torch.no_grad()
def transcribe(
    model: WhisperForConditionalGeneration, tokenizer: Tokenizer, mel: Tensor, *, size: int = 24, limit: int = 40
) -> list[str]:
    """Greedy transcripts of mel (utterances x 80 x 600), `size` at a time, at most `limit` tokens each."""
    texts: list[str] = []
    device = next(model.parameters()).device
    for part in mel.split(size):
        heard = model.model.encoder(part.to(device)).last_hidden_state
        tokens = torch.tensor([[START, NO_TIMESTAMPS]], device=device).repeat(len(part), 1)
        done, step, cache = torch.zeros(len(part), dtype=torch.bool, device=device), tokens, None
        for _ in range(limit):
            out = model.model.decoder(
                input_ids=step, encoder_hidden_states=heard, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            scores = model.proj_out(out.last_hidden_state[:, -1])
            step = scores[:, :START].argmax(-1, keepdim=True).masked_fill(done[:, None], END)
            tokens = torch.cat([tokens, step], 1)
            done = done | (step[:, 0] == END)
            if bool(done.all()):
                break
        for row in tokens[:, 2:].tolist():
            texts.append(tokenizer.decode(row[: row.index(END)] if END in row else row).strip())
    return texts


def normalise(text: str) -> str:
    """Lower case, letters, digits and apostrophes only, single spaces."""
    text = text.lower().replace("\u2019", "'").replace("-", " ")
    return " ".join(re.sub(r"[^a-z0-9' ]", " ", text).split())


def wer(references: list[str], hypotheses: list[str]) -> float:
    """Word error rate in percent over all words, after `normalise`. Errors: substitutions, deletions, insertions."""
    return 100 * float(jiwer.wer([normalise(r) for r in references], [normalise(h) for h in hypotheses]))
