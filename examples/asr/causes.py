"""Where does forgetting come from? Losses after short trainings in which parts of SSVD-O move by more or less.

    python -m examples.asr.causes        # 16 variants, a minute of one core each; those that are there are not repeated

Teacher-forced losses on the development speakers and on every second speaker of LibriSpeech tell apart what error rates
of as few utterances do not. Training is as in the experiment speech-baseline, seed 0. results/causes.jsonl holds the
rows, docs/experiments.md shows them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ssvdo_kernels.adapter import Adapter

from .corpus import Utterance, batches, features
from .methods import adapt
from .options import as_script
from .readers import open_corpus
from .run import SETTINGS
from .tables import markdown
from .train import Batch, fine_tune, loss_of, precision
from .whisper import load_whisper, prompt_of

RESULTS = Path(__file__).parent / "results" / "causes.jsonl"
TRAINING = {"model": "tiny.en", "seconds": 10, "corpus": "speech", "steps": 40, "batch": 8, "precision": "bf16",
            "inner_ratio": 0.5, "outer_rank": 24}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A training. factors: what an Adam step of a part is multiplied by, and of all parts of layers called fc1.
    exponent: K_ij's step is multiplied by (S_i^2 + S_j^2)^(-exponent / 2), times a number that keeps the norm of a
    first step of W' as it is. minor: G turns the weakest half of V's columns not the strongest (inner_ratio: 1).
    """

    name: str
    method: str
    rate: float
    factors: dict[str, float] = field(default_factory=dict)
    exponent: float = 0.0
    minor: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("LoRA", "lora", 1e-3), Variant("LoRA", "lora", 2e-3), Variant("SSVD (exact)", "ssvd", 2e-4),
    Variant("SSVD-O", "ssvdo", 1e-4), Variant("SSVD-O", "ssvdo", 2e-4),
    Variant("outer x 0.25", "ssvdo", 2e-4, {"outer": 0.25}), Variant("outer x 0.06", "ssvdo", 2e-4, {"outer": 0.06}),
    Variant("outer x 0", "ssvdo", 2e-4, {"outer": 0.0}),
    Variant("exponent 1", "ssvdo", 2e-4, exponent=1.0), Variant("exponent 2", "ssvdo", 2e-4, exponent=2.0),
    Variant("exponent 2, outer x 0.25", "ssvdo", 2e-4, {"outer": 0.25}, 2.0),
    Variant("exponent 2, fc1 x 0.25", "ssvdo", 2e-4, {"fc1": 0.25}, 2.0),
    Variant("fc1 x 0", "ssvdo", 2e-4, {"fc1": 0.0}),
    Variant("weakest half of V", "ssvdo", 2e-4, minor=True, settings={"inner_ratio": 1.0}),
    Variant("p = 0.25, l = 36", "ssvdo", 2e-4, settings={"inner_ratio": 0.25, "outer_rank": 36}),
    Variant("p = 0.003, l = 40", "ssvdo", 2e-4,
            settings={"inner_ratio": 0.003, "outer_rank": 40, "outer_scale": 0.08}),
)  # fmt: skip


def multipliers(model: nn.Module, variant: Variant) -> dict[nn.Parameter, Tensor | float]:
    """What a step of each parameter is multiplied by, number by number, where that is not 1."""
    found: dict[nn.Parameter, Tensor | float] = {}
    for name, m in model.named_modules():
        if not isinstance(m, Adapter) or m.inner_rotation is None or m.singular_values is None:
            continue
        inner, scale = torch.ones_like(m.inner_rotation), torch.ones_like(m.inner_scale)
        i, j = torch.triu_indices(m.shape.k, m.shape.k, 1)
        S = m.singular_values[: m.shape.k].float()
        if variant.minor:
            first = m.shape.k - m.shape.k // 2
            inner, scale = ((i >= first) & (j >= first)).float(), (torch.arange(m.shape.k) >= first).float()
        elif variant.exponent:
            squares = S[i].square() + S[j].square()
            inner = squares.pow(-variant.exponent / 2)
            inner = inner * (squares.sum() / (inner.square() * squares).sum()).sqrt()
        layer = variant.factors.get("fc1", 1.0) if "fc1" in name else 1.0
        found |= {m.inner_rotation: inner * layer, m.inner_scale: scale * layer}
        if m.outer is not None:
            found[m.outer] = variant.factors.get("outer", 1.0) * layer
    return found


class Multiplied(torch.optim.Adam):
    """Adam whose steps are multiplied, number by number."""

    def __init__(self, params: Any, lr: float, by: Mapping[nn.Parameter, Tensor | float]) -> None:
        super().__init__(params, lr=lr)
        self.by = by

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step."""
        before = {p: p.detach().clone() for p in self.by}
        super().step(closure)
        with torch.no_grad():
            for p, factor in self.by.items():
                p.copy_(before[p] + factor * (p - before[p]))


def listening(said: list[Utterance], tokenizer: Any, prompt: Any) -> list[Batch]:
    """All of `said` in batches of six."""
    source = batches(features(said, TRAINING["seconds"]), said, tokenizer, 6, 0, prompt)  # type: ignore[arg-type]
    return [next(source) for _ in range(len(said) // 6)]


@torch.no_grad()
def loss(model: nn.Module, tests: list[Batch]) -> float:
    """The mean loss."""
    with precision("bf16", "cpu"):
        return round(statistics.fmean(float(loss_of(model, batch)) for batch in tests), 4)


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """A row per variant."""
    return markdown(["variant", "rate", "training loss", "dev loss", "LibriSpeech loss"], [
        [r["name"], f"{r['rate']:g}" if r["rate"] else "-", f"{r['training']:.3f}" if r["rate"] else "-",
         f"{r['dev']:.3f}", f"{r['source']:.3f}"] for r in rows])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing, and prints the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(arguments)
    rows = read()
    there = {(r["name"], r["rate"]) for r in rows}
    base, tokenizer = load_whisper("tiny.en", 10)
    corpus, prompt = open_corpus("speech"), prompt_of(base)
    heard = corpus.of("librispeech", "test")
    some = set(sorted({u.speaker for u in heard})[::2])
    tests = [listening(said, tokenizer, prompt) for said in
             (corpus.of("child", "dev"), [u for u in heard if u.speaker in some])]  # fmt: skip
    said = corpus.of("child", "train")
    mel = features(said, 10)
    wanted = [Variant("before", "none", 0.0), *VARIANTS]
    for variant in tqdm([v for v in wanted if (v.name, v.rate) not in there], unit="variant"):
        model, losses = copy.deepcopy(base), [0.0]
        if variant.method != "none":
            torch.manual_seed(0)
            settings = {**SETTINGS, **TRAINING, **variant.settings, "method": variant.method, "rate": variant.rate}
            model = adapt(model, settings).model  # type: ignore[assignment]
            by = multipliers(model, variant) if variant.method == "ssvdo" else {}
            losses = fine_tune(model, batches(mel, said, tokenizer, 8, 0, prompt), 40, variant.rate, autocast="bf16",
                               quiet=True, optimizer=partial(Multiplied, by=by))  # fmt: skip
        dev, source = (loss(model, batch) for batch in tests)
        rows.append({**asdict(variant), "training": round(statistics.fmean(losses), 4), "dev": dev, "source": source})
        rows.sort(key=lambda r: [(v.name, v.rate) for v in wanted].index((r["name"], r["rate"])))
        RESULTS.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    as_script(main)
