"""One run of an experiment: a method, a seed, one voice or several in sequence; what it cost and what it brought."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from benchmarks.memory import Meter
from ssvdo_kernels import orthogonality
from ssvdo_kernels.host import hosts

from .corpus import Utterance, batches, features
from .methods import adapt
from .readers import Corpus, open_corpus
from .recognise import Errors, transcribe
from .train import fine_tune, parts, precision
from .whisper import load_whisper, prompt_of

SETTINGS = {
    "model": "tiny.en", "seconds": 6, "corpus": "synthetic", "train": 200, "split": "test", "voices": ["scottish"],
    "source": "en-us", "method": "ssvdo", "layers": "feed_forward", "seed": 0, "steps": 50, "batch": 8, "rate": 1e-3,
    "precision": "bf16", "strategy": "continue", "evaluate_at": None, "evaluate": None, "utterances": None,
}  # fmt: skip
"""What a run is told, with defaults; SSVDOConfig's fields and EXTRA may stand beside them.

voices: trained on one after the other. strategy: "continue" (one adapter throughout) or "merged" (a fresh adapter for
each voice, the earlier ones merged into the weights). evaluate_at: optimiser steps of each stage after which error
rates are taken, beside the last. evaluate: the voices to test on, as "voice" or "voice/split"; None: all in `voices`
and `source`.
train, utterances: at most so many to train on and to test on. split: "test", or "dev" while rates are tuned.
"""
EXTRA = ("budget", "warmup", "part_rates", "shares")
"""budget: trained numbers. warmup, part_rates: as `fine_tune` takes them. shares: the trained model is tested, too,
with W0 + share (W' - W0) in place of W' (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022)."""
PARTS = ("inner_rotation", "inner_scale", "outer")
TRACED = 5  # every so many steps


@functools.lru_cache(maxsize=1)
def _whisper(model: str, seconds: int) -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    return load_whisper(model, seconds)


@functools.lru_cache(maxsize=2)
def _corpus(source: str) -> Corpus:
    return open_corpus(source)


@functools.lru_cache(maxsize=16)
def _features(source: str, voice: str, split: str, most: int | None, seconds: int) -> tuple[list[Utterance], Tensor]:
    chosen = _corpus(source).of(voice, split)[:most]
    return chosen, features(chosen, seconds)


def prepare(corpus: str, model: str, seconds: int) -> None:
    """Makes and fetches what runs share, the speech and the weights, before several of them want it at once."""
    open_corpus(corpus)
    load_whisper(model, seconds)


def _rms(values: Tensor) -> float:
    return float(f"{values.square().mean().sqrt().item():.4g}")


class Run:
    """The state of one run. `settings`: SETTINGS with what differs."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {**SETTINGS, **settings}
        s = self.settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base, self.tokenizer = _whisper(s["model"], s["seconds"])
        self.prompt = prompt_of(self.base)
        self.model: nn.Module = copy.deepcopy(self.base).to(self.device)
        self.evaluations: list[dict[str, Any]] = []
        self.diagnostics: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        self.losses: list[float] = []
        self.trace: list[dict[str, Any]] = []

    def data(self, voice: str, split: str, most: int | None) -> tuple[list[Utterance], Tensor]:
        """The utterances of a voice and split, and their features."""
        return _features(self.settings["corpus"], voice, split, most, self.settings["seconds"])

    def evaluate(self, stage: int, step: int, **more: float) -> None:
        """Error rates on every voice asked for, noted with `more`, and the adapters' diagnostics."""
        s = self.settings
        for named in s["evaluate"] or dict.fromkeys([*s["voices"], s["source"]]):
            voice, _, split = named.partition("/")
            said, mel = self.data(voice, split or s["split"], s["utterances"])
            with precision(s["precision"], self.device.type):
                heard = transcribe(self.model, self.tokenizer, mel)  # type: ignore[arg-type]
            errors = Errors.count([u.text for u in said], heard)
            self.evaluations.append({
                "stage": stage, "step": step, "voice": voice, "wer": errors.wer, "cer": errors.cer,
                "words_wrong": errors.words_wrong, "words": errors.words, **more,
            })  # fmt: skip
            if split:
                self.evaluations[-1]["split"] = split
            if any(u.speaker for u in said):
                self.evaluations[-1] |= {
                    "capped": errors.capped, "deletions": errors.deletions, "speakers": [u.speaker for u in said]}
        if any(True for _ in hosts(self.model)):
            reports = orthogonality(self.model)
            names = ("orthonormality", "inner_orthonormality", "inner_angle", "outer_angle", "drift", "scale_change",
                     "cholesky_condition")  # fmt: skip
            self.diagnostics.append({
                "stage": stage, "step": step, **{n: max(getattr(r, n) for r in reports) for n in names}})  # fmt: skip

    def look(self, stage: int, step: int) -> None:
        """Root mean squares of SSVD-O's parameters and of their gradients, part by part."""
        there = parts(self.model)
        for part in (p for p in PARTS if p in there):
            values = torch.cat([p.detach().flatten() for p in there[part]])
            gradients = torch.cat([p.grad.flatten() for p in there[part] if p.grad is not None])
            self.trace.append({"stage": stage, "step": step, "part": part, "value": _rms(values),
                               "gradient": _rms(gradients)})  # fmt: skip

    def stage(self, number: int, voice: str) -> None:
        """Trains on one voice."""
        s = self.settings
        wanted = set(s["evaluate_at"] or ()) | {s["steps"]}
        said, mel = self.data(voice, "train", s["train"])
        data = batches(mel, said, self.tokenizer, s["batch"], 1000 * s["seed"] + number, self.prompt)
        began = time.perf_counter()

        def after(step: int) -> None:
            nonlocal began
            self.step_seconds.append(time.perf_counter() - began)
            if step % TRACED == 0:
                self.look(number, step)
            if step in wanted:
                self.evaluate(number, step)
            began = time.perf_counter()

        if number == 0 and 0 in wanted:
            self.model.eval()
            self.evaluate(0, 0)
            began = time.perf_counter()
        if s["steps"]:
            self.losses += fine_tune(self.model, data, s["steps"], s["rate"], after=after, autocast=s["precision"],
                                     quiet=True, warmup=s.get("warmup", 0), part_rates=s.get("part_rates"))  # fmt: skip

    def evaluate_between(self, adapted: nn.Module) -> None:
        """Error rates with each share of what was learnt; adapted: a plain model with W'."""
        s, base = self.settings, dict(self.base.named_parameters())
        learnt = {name: p.detach().clone() for name, p in adapted.named_parameters()}
        self.model = adapted
        for share in s["shares"]:
            with torch.no_grad():
                for name, p in adapted.named_parameters():
                    p.copy_(torch.lerp(base[name].to(p.device), learnt[name], share))
            self.evaluate(len(s["voices"]) - 1, s["steps"], share=share)

    def result(self) -> dict[str, Any]:
        """Runs everything; what is kept of it, as JSON can hold it."""
        s = self.settings
        torch.manual_seed(s["seed"])
        trained, meter, adapted = 0, Meter(self.device), None
        for number, voice in enumerate(s["voices"]):
            if s["method"] != "none" and (number == 0 or s["strategy"] == "merged"):
                if adapted is not None:
                    self.model = adapted.bake()
                adapted = adapt(self.model, s)  # type: ignore[arg-type]
                self.model = adapted.model
                trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            self.stage(number, voice)
        memory = meter.mebibytes()
        if adapted is not None and s.get("shares"):
            self.evaluate_between(adapted.bake())
        traced = {"trace": self.trace} if self.trace else {}
        return {
            "settings": dict(s), "trained": trained, "losses": [round(v, 4) for v in self.losses],
            "step_ms": round(1000 * statistics.median(self.step_seconds), 1) if self.step_seconds else None,
            "peak_mib": None if memory is None else round(memory), "device": self.device.type,
            "threads": torch.get_num_threads(), "evaluations": self.evaluations, "diagnostics": self.diagnostics,
            **traced,
        }  # fmt: skip


def check(settings: Mapping[str, Any], extra: set[str]) -> None:
    """A ValueError that names the first unknown setting; `extra` names are allowed beside SETTINGS."""
    for name in settings:
        if name not in SETTINGS and name not in extra:
            raise ValueError(f"setting {name!r} is unknown; allowed: {', '.join(sorted({*SETTINGS, *extra}))}")
    if settings.get("strategy", "continue") not in ("continue", "merged"):
        raise ValueError(f"strategy={settings['strategy']!r} is unknown; allowed: 'continue', 'merged'")
