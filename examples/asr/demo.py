"""Adapts Whisper tiny.en to an accent with SSVD-O and shows what it cost and what it brought.

    python -m examples.asr.demo [--corpus FOLDER | --manifest your.tsv] [--model FOLDER] [--steps N]

Without either it uses the speech in the repository, which is synthetic. A corpus is speechocean762 as it is unpacked,
or the folder that `make_real` has made of it: then it adapts to children. A manifest is a TSV with the columns path,
text (and voice, split); without splits, every fifth utterance is tested.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import WhisperForConditionalGeneration

from benchmarks.peers import DenseSSVDO, EspnetStyleSSVD
from benchmarks.runner import interleave
from ssvdo_kernels import (
    SSVDOConfig,
    apply_ssvdo,
    load_ssvdo,
    merge_ssvdo,
    orthogonality,
    save_ssvdo,
    trainable_summary,
)
from ssvdo_kernels.host import exchange
from ssvdo_kernels.targets import find_targets

from .corpus import batches, features
from .ctranslate2 import WeightsError
from .demo_speech import children, committed, own_recordings
from .options import COUNT, FILE, FOLDER, LEARNING_RATE, SEED, TARGET, as_script
from .recognise import transcribe, wer
from .train import Batch, fine_tune, loss_of
from .whisper import load_whisper, prompt_of

SECONDS = 10  # of context: cut to 6 s, tiny.en loops on people
LORA_RANK = 24  # (384 + 1536) * 24 = 46,080 numbers a layer; SSVD-O with p = 0.5, l = 24 has 46,176


def compare_steps(
    base: WhisperForConditionalGeneration, config: SSVDOConfig, batch: Batch, rounds: int
) -> Table:
    """One training step (forward, backward, Adam) of each method, interleaved in this run."""
    models = {"frozen (forward + backward only)": freeze(copy.deepcopy(base))}
    models["LoRA (PEFT), equal budget"] = peft_lora(copy.deepcopy(base))
    models["SSVD, dense W' as published"] = dense(copy.deepcopy(base), replace(config, outer_rank=0))
    models["SSVD, this package"] = apply_ssvdo(copy.deepcopy(base), replace(config, outer_rank=0))
    models["SSVD-O, dense W'"] = dense(copy.deepcopy(base), config)
    models["SSVD-O, this package"] = apply_ssvdo(copy.deepcopy(base), config)
    timings = interleave({name: training_step(m, batch) for name, m in models.items()}, rounds, next(iter(models)))
    table = Table(title=f"One training step, batch of {len(batch[0])}, {torch.get_num_threads()} threads")
    for column in ("method", "trainable", "ms/step", "ratio to frozen"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, timing in timings.items():
        count = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        table.add_row(name, f"{count:,}", f"{timing.median_ms:.0f}", f"{timing.ratio:.2f}")
    return table


def freeze(model: nn.Module) -> nn.Module:
    """Nothing trains; the encoder's input projections still pass a gradient on, as below an adapter."""
    model.requires_grad_(False)
    first = model.get_submodule("model.encoder.conv1")
    first.register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def peft_lora(model: WhisperForConditionalGeneration) -> nn.Module:
    """PEFT's LoRA on fc1 and fc2."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=["fc1", "fc2"])).base_model.model


def dense(model: nn.Module, config: SSVDOConfig) -> nn.Module:
    """The same layers with a dense W' in every forward: published SSVD (first order) for outer_rank=0, else SSVD-O."""
    layers = find_targets(model, config)
    model.requires_grad_(False)
    made = {id(x): DenseSSVDO(x, config) if config.outer_rank else EspnetStyleSSVD(x, config.inner_ratio)
            for x in (site.module for site in layers.values())}
    exchange(model, made)
    return model


def training_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """A closure that runs one optimiser step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=1e-5) if trained else None
    model.train()

    def step() -> None:
        loss_of(model, batch).backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad()

    return step


def departures(model: nn.Module) -> Table:
    """The worst layer of each of `orthogonality`'s measures."""
    reports = orthogonality(model)
    table = Table(title="SSVD-O layers: the worst of each measure")
    for column in ("measure", "worst", "layer"):
        table.add_column(column, justify="right" if column == "worst" else "left", no_wrap=True)
    for name in ("orthonormality", "inner_orthonormality", "inner_angle", "outer_angle", "drift", "scale_change"):
        worst = max(reports, key=lambda r: getattr(r, name))
        table.add_row(name, f"{getattr(worst, name):.1e}", worst.name.removeprefix("model."))
    return table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="tiny.en (default), base, or a local transformers folder of a Whisper")
    speech = parser.add_mutually_exclusive_group()
    speech.add_argument("--corpus", type=FOLDER, help="speechocean762, unpacked or made by make_real: children")
    speech.add_argument("--manifest", type=FILE, help=f"your own recordings, at most {SECONDS} s each")
    parser.add_argument("--steps", type=COUNT, default=100, help="optimiser steps of 8 utterances (default: 100)")
    parser.add_argument("--rate", type=LEARNING_RATE, default=2e-4, help="learning rate (default: 2e-4)")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--adapter", type=TARGET, help="folder to keep the adapter in (default: a temporary one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; 0 when the target's error rate fell and the reloaded, merged adapter transcribes the same."""
    options, console, started = parse(arguments), Console(), time.perf_counter()
    torch.manual_seed(options.seed)
    speech = children(options.corpus) if options.corpus else (
        own_recordings(options.manifest) if options.manifest else committed())  # fmt: skip
    console.print(speech.about, style="bold", highlight=False, markup=False)
    model, tokenizer = load_whisper(options.model, SECONDS)
    console.print(f"Whisper with {sum(p.numel() for p in model.parameters()):,} parameters, {SECONDS} s of context\n"
                  f"target: {speech.target}, {len(speech.train)} utterances to train, {len(speech.test)} to test\n"
                  f"source: {speech.source}, {len(speech.kept)} to test", highlight=False)  # fmt: skip
    mel, test_mel, source_mel = (features(u, SECONDS) for u in (speech.train, speech.test, speech.kept))
    said, said_source = [u.text for u in speech.test], [u.text for u in speech.kept]
    before = transcribe(model, tokenizer, test_mel)
    target_before, source_before = wer(said, before), wer(said_source, transcribe(model, tokenizer, source_mel))

    config = SSVDOConfig(inner_ratio=0.5, outer_rank=24)
    data = batches(mel, speech.train, tokenizer, 8, options.seed, prompt_of(model))
    base = copy.deepcopy(model)
    table = compare_steps(base, config, next(data), rounds=3)
    apply_ssvdo(model, config)
    trainable_summary(model, console=console)
    fine_tune(model, data, options.steps, options.rate)
    after = transcribe(model, tokenizer, test_mel)
    target_after, source_after = wer(said, after), wer(said_source, transcribe(model, tokenizer, source_mel))
    console.print(departures(model))

    with tempfile.TemporaryDirectory() as temporary:
        folder = save_ssvdo(model, options.adapter or Path(temporary))
        size = sum(f.stat().st_size for f in folder.glob("ssvdo_model.safetensors"))
        reloaded = load_ssvdo(base, folder)
    same = transcribe(reloaded, tokenizer, test_mel) == after
    same_merged = transcribe(merge_ssvdo(reloaded), tokenizer, test_mel) == after

    console.print(table)
    results = Table(title="Word error rate, % (fewer is better)")
    for column in ("speech", "before", "after"):
        results.add_column(column, justify="left" if column == "speech" else "right")
    results.add_row(f"target: {speech.target}", f"{target_before:.1f}", f"{target_after:.1f}")
    results.add_row(f"source: {speech.source}", f"{source_before:.1f}", f"{source_after:.1f}")
    console.print(results)
    for u, b, a in list(zip(speech.test, before, after, strict=True))[:3]:
        console.print(f"  said    {u.text}\n  before  {b}\n  after   {a}\n", highlight=False, markup=False)
    console.print(f"adapter file: {size / 1e6:.1f} MB; reloaded into a fresh model: transcripts "
                  f"{'identical' if same else 'DIFFER'}; merged: {'identical' if same_merged else 'DIFFER'}")
    console.print(f"total time {time.perf_counter() - started:.0f} s")
    return 0 if same and same_merged and target_after < target_before else 1


if __name__ == "__main__":
    as_script(main, WeightsError)
