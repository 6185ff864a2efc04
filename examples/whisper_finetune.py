"""Fine-tunes a Hugging Face Whisper with SSVD-O on your own recordings.

    python -m examples.whisper_finetune MODEL MANIFEST --out adapter [--steps 500] [--eval-manifest DEV.tsv]

MODEL: a local folder with config.json, model.safetensors and the processor's files (as `save_pretrained` writes them).
MANIFEST: a TSV with the columns `path` (relative to it) and `text`. Writes the adapter with save_ssvdo; with an eval
manifest it prints the word error rate before and after, merged. Needs the extra [asr].
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from jiwer import wer
from torch import Tensor
from transformers import Trainer, TrainingArguments, WhisperForConditionalGeneration, WhisperProcessor

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, merge_ssvdo, save_ssvdo, trainable_summary, unmerge_ssvdo

from .asr.corpus import RATE, Utterance, check_audio, load_audio, read_manifest
from .asr.options import COUNT, FILE, FOLDER, LEARNING_RATE, SEED, TARGET
from .asr.recognise import spoken


class Collator:
    """Utterances -> input_features, labels (padded with -100, which the loss leaves out)."""

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self.processor, self.max_tokens = processor, max_tokens
        self.seconds: int = processor.feature_extractor.chunk_length

    def __call__(self, batch: list[Utterance]) -> dict[str, Tensor]:
        features = self.features(batch)
        texts = [torch.tensor(self.processor.tokenizer(u.text).input_ids[: self.max_tokens]) for u in batch]
        return {"input_features": features,
                "labels": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)}  # fmt: skip

    def features(self, batch: list[Utterance]) -> Tensor:
        """Log-mel features of the recordings."""
        audio = [load_audio(u.path, seconds=self.seconds).numpy() for u in batch]
        found: Tensor = self.processor.feature_extractor(audio, sampling_rate=RATE, return_tensors="pt").input_features
        return found


@torch.inference_mode()
def error_rate(model: Any, collator: Collator, utterances: list[Utterance], batch: int = 8) -> float:
    """Word error rate in percent, greedy decoding, after Whisper's basic normalisation."""
    model.eval()
    normalise, heard = collator.processor.tokenizer.basic_normalize, []
    said = spoken([u.text for u in utterances], normalise)
    for start in range(0, len(utterances), batch):
        part = utterances[start : start + batch]
        tokens = model.generate(collator.features(part).to(model.device, model.dtype), num_beams=1, do_sample=False)
        heard += [normalise(t) for t in collator.processor.batch_decode(tokens, skip_special_tokens=True)]
    return 100 * float(wer(said, heard))


def run(options: argparse.Namespace) -> dict[str, float]:
    """Trains and saves; returns the first and last loss and, with an eval manifest, error rates before and after."""
    torch.manual_seed(options.seed)
    config = SSVDOConfig(inner_ratio=options.inner_ratio, outer_rank=options.outer_rank)
    utterances = read_manifest(options.manifest)
    held_out = read_manifest(options.eval_manifest) if options.eval_manifest else []
    try:
        processor = WhisperProcessor.from_pretrained(options.model, local_files_only=True)
        model = WhisperForConditionalGeneration.from_pretrained(options.model, local_files_only=True)
    except Exception as error:  # each library that reads a part has errors of its own
        raise ValueError(f"model={str(options.model)!r} is not read ({' '.join(str(error).split())[:400]}); allowed: a "
                         "Whisper as save_pretrained writes it") from error
    collator = Collator(processor, model.config.max_target_positions - 1)
    check_audio([*utterances, *held_out], collator.seconds)
    found = {"wer_before": error_rate(model, collator, held_out)} if held_out else {}
    apply_ssvdo(model, config)
    trainable_summary(model)
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"), max_steps=options.steps, learning_rate=options.lr,
        weight_decay=0.0, per_device_train_batch_size=options.batch, warmup_steps=options.steps // 10, logging_steps=1,
        report_to=[], save_strategy="no", remove_unused_columns=False, seed=options.seed,
        dataloader_pin_memory=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=utterances, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    save_ssvdo(model, options.out)
    found |= {"first_loss": losses[0], "last_loss": losses[-1]}
    if held_out:
        merge_ssvdo(model)
        found["wer_after"] = error_rate(model, collator, held_out)
        unmerge_ssvdo(model)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=FOLDER)
    parser.add_argument("manifest", type=FILE)
    parser.add_argument("--out", type=TARGET, required=True)
    parser.add_argument("--eval-manifest", type=FILE)
    parser.add_argument("--steps", type=COUNT, default=500)
    parser.add_argument("--batch", type=COUNT, default=8)
    parser.add_argument("--lr", type=LEARNING_RATE, default=1e-3)
    parser.add_argument("--inner-ratio", type=float, default=0.5)
    parser.add_argument("--outer-rank", type=int, default=64)
    parser.add_argument("--seed", type=SEED, default=0)
    options = parser.parse_args(arguments)
    for name, value in run(options).items():
        print(f"{name}: {value:.3f}")
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
