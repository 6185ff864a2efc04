"""Whether Whisper tiny.en still tells times after tuning on transcripts that have none.

    python -m examples.asr.timestamps [--steps N] > FILE.md

Tuned as the demo is (6 s, Scottish, no timestamps), tested as Whisper runs (30 s), by Whisper's own rules for times. A
time is wrong by its distance from where the recording's sound begins or ends.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, WhisperForConditionalGeneration
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from .corpus import RATE, SPEECH, Utterance, batches, features, load_audio, read_manifest
from .demo_speech import splits
from .methods import adapt
from .options import COUNT
from .recognise import transcribe, wer
from .train import Batch, fine_tune
from .whisper import ENGLISH, load_whisper

START, FIRST = ENGLISH.start[0], ENGLISH.start[1] + 1  # <|startoftranscript|>; <|0.00|>, in steps of 0.02 s from there
STEP = 0.02
RULES = WhisperTimeStampLogitsProcessor(
    GenerationConfig(eos_token_id=ENGLISH.end, no_timestamps_token_id=FIRST - 1, max_initial_timestamp_index=50), 1)
METHODS = {
    "before": None, "LoRA": {"method": "lora"}, "SSVD-O": {"method": "ssvdo"},
    "SSVD-O, every second batch with times": {"method": "ssvdo", "timed": True},
}  # fmt: skip


def sounding(audio: Tensor) -> tuple[float, float]:
    """Seconds at which the sound first and last exceeds a hundredth of its peak."""
    loud = (audio.abs() > 0.01 * audio.abs().max()).nonzero()
    return float(loud[0]) / RATE, float(loud[-1]) / RATE


def with_times(data: Iterator[Batch], mel: Tensor, spans: list[tuple[float, float]]) -> Iterator[Batch]:
    """Every second batch with <|start|> before its transcript and <|end|> behind it, in place of <|notimestamps|>."""
    for number, (heard, inputs, labels) in enumerate(data):
        if number % 2:
            inputs = torch.cat([inputs, torch.full_like(inputs[:, :1], ENGLISH.end)], 1)
            labels = torch.cat([labels, torch.full_like(labels[:, :1], -100)], 1)
            for row, one in enumerate(heard):
                which = next(i for i, m in enumerate(mel) if torch.equal(m, one))
                begin, end = (FIRST + round(s / STEP) for s in spans[which])
                last = int((labels[row] == ENGLISH.end).nonzero()[0])  # the label of the text's last token
                inputs[row, 1], inputs[row, last + 1] = begin, end
                labels[row, 0], labels[row, last], labels[row, last + 1] = begin, end, ENGLISH.end
        yield heard, inputs, labels


@dataclass
class Timed:
    """Per utterance: the probability of a time at the first place, the text, and its first and last time in s."""

    first: list[float]
    texts: list[str]
    spans: list[tuple[float | None, float | None]]


@torch.no_grad()
def transcribe_timed(
    model: WhisperForConditionalGeneration, tokenizer: Tokenizer, mel: Tensor, limit: int = 48
) -> Timed:
    """Greedy transcripts with times."""
    found = Timed([], [], [])
    for part in mel.split(8):
        heard = model.model.encoder(part).last_hidden_state
        tokens = torch.full((len(part), 1), START)
        done, step, cache = torch.zeros(len(part), dtype=torch.bool), tokens, None
        for place in range(limit):
            out = model.model.decoder(
                input_ids=step, encoder_hidden_states=heard, past_key_values=cache, use_cache=True)
            cache, scores = out.past_key_values, model.proj_out(out.last_hidden_state[:, -1])
            scores[:, START:FIRST] = -torch.inf  # no language, task or <|notimestamps|>
            if not place:
                found.first += scores.softmax(-1)[:, FIRST:].sum(-1).tolist()
            step = RULES(tokens, scores).argmax(-1, keepdim=True).masked_fill(done[:, None], ENGLISH.end)
            tokens = torch.cat([tokens, step], 1)
            done |= step[:, 0] == ENGLISH.end
            if bool(done.all()):
                break
        for row in tokens[:, 1:].tolist():
            row = row[: row.index(ENGLISH.end)] if ENGLISH.end in row else row
            found.texts.append(tokenizer.decode([t for t in row if t < START]).strip())
            begin = (row[0] - FIRST) * STEP if row and row[0] >= FIRST else None
            found.spans.append((begin, (row[-1] - FIRST) * STEP if len(row) > 1 and row[-1] >= FIRST else None))
    return found


def measure(
    model: WhisperForConditionalGeneration, tokenizer: Tokenizer, mel: Tensor, said: list[Utterance],
    spans: list[tuple[float, float]],
) -> list[str]:  # fmt: skip
    """A row of the table."""
    texts = [u.text for u in said]
    timed = transcribe_timed(model, tokenizer, mel)
    begin, end = ([abs(found[i] - true[i]) for found, true in zip(timed.spans, spans, strict=True)
                   if found[i] is not None] for i in (0, 1))  # fmt: skip
    end.sort()
    ends = (f"{statistics.median(end):.2f}", f"{end[int(0.9 * len(end))]:.2f}") if end else ("-", "-")
    return [f"{wer(texts, transcribe(model, tokenizer, mel)):.1f}", f"{wer(texts, timed.texts):.1f}",
            f"{statistics.mean(timed.first):.3f}", f"{len(end)} of {len(said)}",
            f"{statistics.median(begin):.2f}" if begin else "-", *ends]  # fmt: skip


HEADINGS = ("", "trained", "WER, without times", "WER, with times", "P(time) at the start", "ends told",
            "start wrong by, s (median)", "end wrong by, s (median)", "(90th percentile)")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs all of METHODS, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=COUNT, default=120)
    parser.add_argument("--utterances", type=COUNT, default=48, help="to test on, at most")
    options, began = parser.parse_args(arguments), time.perf_counter()
    train, test = splits(read_manifest(SPEECH), "scottish")
    test = test[: options.utterances]
    mel, test_mel = features(train), features(test, 30)
    spans, test_spans = ([sounding(load_audio(u.path)) for u in us] for us in (train, test))
    rows = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    short, whole = load_whisper(seconds=6), load_whisper(seconds=30)[0]
    for name, settings in METHODS.items():
        model, tokenizer, trained = copy.deepcopy(short[0]), short[1], 0
        torch.manual_seed(0)
        if settings is not None:
            adapted = adapt(model, {**settings, "inner_ratio": 0.5, "outer_rank": 24})
            trained = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
            data: Iterator[Batch] = batches(mel, train, tokenizer, 8, 0)
            data = with_times(data, mel, spans) if settings.get("timed") else data
            fine_tune(adapted.model, islice(data, options.steps), options.steps, 3e-4, quiet=True)
            model = adapted.bake()
        state = model.state_dict()
        positions = "model.encoder.embed_positions.weight"
        tuned = copy.deepcopy(whole)
        tuned.load_state_dict({**state, positions: whole.state_dict()[positions]})
        cells = [name, f"{trained:,}", *measure(tuned, tokenizer, test_mel, test, test_spans)]
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], file=sys.stderr, flush=True)
    about = (f"{__doc__.splitlines()[0]}\n\n`python -m examples.asr.timestamps --steps {options.steps}`: {len(train)} "
             f"utterances of the Scottish voice, batches of 8 at 3e-4, seed 0; {len(test)} others to test on. "
             f"{datetime.date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
             f"{torch.get_num_threads()} threads, {time.perf_counter() - began:.0f} s.\n")  # fmt: skip
    print("\n".join([about, *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
