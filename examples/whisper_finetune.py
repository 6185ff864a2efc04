"""Fine-tunes a Hugging Face Whisper with SSVD-O on your own recordings.

    python -m examples.whisper_finetune MODEL MANIFEST --out adapter [--steps 500] [--eval-manifest DEV.tsv]

MODEL: a local folder with config.json, generation_config.json, model.safetensors and the processor's files, as
`save_pretrained` of the model and of the processor writes them.
MANIFEST: a TSV with the columns `path` (relative to it) and `text`; recordings as long as the model's context, 30 s.
All recordings and texts are read once before the model is. Writes the adapter with save_ssvdo; with an eval manifest it
prints the word error rate before and after, merged. Needs the extra [asr].
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from jiwer import wer
from torch import Tensor
from transformers import (
    GenerationConfig,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, merge_ssvdo, save_ssvdo, trainable_summary, unmerge_ssvdo

from .asr.corpus import RATE, Utterance, load_audio, read_manifest
from .asr.options import COUNT, FILE, FOLDER, LEARNING_RATE, SEED, TARGET
from .asr.recognise import spoken

SHOWN = 20  # errors


class Collator:
    """Utterances -> input_features, labels (padded with -100, which the loss leaves out).

    Labels are the prompt without its first token, the text and the end: the model puts decoder_start_token_id before.
    """

    def __init__(self, processor: Any, config: WhisperConfig) -> None:
        self.processor, self.start = processor, config.decoder_start_token_id
        self.max_tokens: int = config.max_target_positions
        self.seconds: int = processor.feature_extractor.chunk_length

    def __call__(self, batch: list[Utterance]) -> dict[str, Tensor]:
        texts = [torch.tensor(self.labels(u)) for u in batch]
        return {"input_features": self.features(batch),
                "labels": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)}  # fmt: skip

    def labels(self, utterance: Utterance) -> list[int]:
        """What the decoder is to say; a ValueError where it cannot say as much."""
        tokens: list[int] = self.processor.tokenizer(utterance.text).input_ids
        tokens = tokens[1:] if tokens[0] == self.start else tokens
        if len(tokens) > self.max_tokens:
            raise ValueError(f"{utterance.path}: its text is {len(tokens)} tokens long; the decoder holds "
                             f"{self.max_tokens}")
        return tokens

    def audio(self, utterance: Utterance) -> Tensor:
        """The samples; a ValueError where they cannot be read, are not finite or are longer than the context."""
        return load_audio(utterance.path, seconds=self.seconds)

    def features(self, batch: list[Utterance]) -> Tensor:
        """Log-mel features of the recordings."""
        audio = [self.audio(u).numpy() for u in batch]
        found: Tensor = self.processor.feature_extractor(audio, sampling_rate=RATE, return_tensors="pt").input_features
        return found

    def check(self, training: list[Utterance], held_out: list[Utterance]) -> None:
        """Reads everything once. Raises a ValueError with a line for each fault."""
        faults = [*_faults(self.labels, training), *_faults(self.audio, [*training, *held_out])]
        if len(faults) > SHOWN:
            faults[SHOWN:] = [f"and {len(faults) - SHOWN} more"]
        if faults:
            raise ValueError("\n".join(faults))
        if held_out:
            spoken([u.text for u in held_out], self.processor.tokenizer.basic_normalize)


def _faults(read: Callable[[Utterance], object], utterances: Iterable[Utterance]) -> list[str]:
    found = []
    for utterance in utterances:
        try:
            read(utterance)
        except ValueError as error:
            found.append(str(error))
    return found


@torch.inference_mode()
def error_rate(model: Any, collator: Collator, utterances: list[Utterance], batch: int = 8, **options: str) -> float:
    """Word error rate in percent, greedy decoding, after Whisper's basic normalisation."""
    model.eval()
    normalise, heard = collator.processor.tokenizer.basic_normalize, []
    said = spoken([u.text for u in utterances], normalise)
    for start in range(0, len(utterances), batch):
        features = collator.features(utterances[start : start + batch]).to(model.device, model.dtype)
        tokens = model.generate(features, num_beams=1, do_sample=False, **options)
        heard += [normalise(t) for t in collator.processor.batch_decode(tokens, skip_special_tokens=True)]
    return 100 * float(wer(said, heard))


def _read(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # each library that reads a part has errors of its own
        raise ValueError(f"model={str(folder)!r} is not read ({' '.join(str(error).split())[:400]}); allowed: a "
                         "Whisper as save_pretrained writes it") from error


def _spoken_in(language: str | None, folder: Path) -> dict[str, str]:
    """What a multilingual model must be told, and an English one cannot be."""
    multilingual = getattr(_read(GenerationConfig, folder), "is_multilingual", False)
    if multilingual and language is None:
        raise ValueError(f"--language is missing; model={str(folder)!r} is multilingual")
    if language is not None and not multilingual:
        raise ValueError(f"--language={language!r} is refused; model={str(folder)!r} is not multilingual")
    return {} if language is None else {"language": language, "task": "transcribe"}


def run(options: argparse.Namespace) -> dict[str, float]:
    """Trains and saves; returns the first and last loss and, with an eval manifest, error rates before and after."""
    torch.manual_seed(options.seed)
    config = SSVDOConfig(inner_ratio=options.inner_ratio, outer_rank=options.outer_rank)
    utterances = read_manifest(options.manifest)
    held_out = read_manifest(options.eval_manifest) if options.eval_manifest else []
    language = _spoken_in(options.language, options.model)
    collator = Collator(_read(WhisperProcessor, options.model, **language), _read(WhisperConfig, options.model))
    collator.check(utterances, held_out)
    model = _read(WhisperForConditionalGeneration, options.model)
    found = {"wer_before": error_rate(model, collator, held_out, **language)} if held_out else {}
    apply_ssvdo(model, config)
    trainable_summary(model)
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"), max_steps=options.steps, learning_rate=options.lr,
        weight_decay=0.0, per_device_train_batch_size=options.batch, lr_scheduler_type="linear", logging_steps=1,
        logging_nan_inf_filter=False, report_to=[], save_strategy="no", remove_unused_columns=False, seed=options.seed,
        dataloader_pin_memory=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=utterances, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if (bad := next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)) is not None:
        raise ArithmeticError(f"the loss of step {bad} is {losses[bad - 1]}; nothing is saved (use a smaller --lr)")
    save_ssvdo(model, options.out)
    found |= {"first_loss": losses[0], "last_loss": losses[-1]}
    if held_out:
        merge_ssvdo(model)
        found["wer_after"] = error_rate(model, collator, held_out, **language)
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
    parser.add_argument("--lr", type=LEARNING_RATE, default=3e-4, help="default 3e-4; linear decay, no warm-up")
    parser.add_argument("--language", help="of a multilingual model's recordings, such as dutch or nl")
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
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))
