"""examples/whisper_finetune.py on a tiny random Whisper, a byte-level tokenizer and the committed recordings."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("jiwer", reason="jiwer is not installed")
pytest.importorskip("soundfile", reason="soundfile is not installed")
import transformers
from tokenizers import pre_tokenizers

from examples.asr.corpus import SPEECH, read_manifest
from examples.whisper_finetune import main
from ssvdo_kernels import load_ssvdo
from ssvdo_kernels.host import hosts

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>",
           "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A local model folder as save_pretrained writes it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *SPECIAL])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.WhisperTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"),
                                              additional_special_tokens=SPECIAL[1:])  # fmt: skip
    features = transformers.WhisperFeatureExtractor(feature_size=8)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    end, start = vocabulary["<|endoftext|>"], vocabulary["<|startoftranscript|>"]
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary), num_mel_bins=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, d_model=16, encoder_ffn_dim=48, decoder_ffn_dim=48, max_target_positions=40,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start)  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        max_length=20, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        no_timestamps_token_id=vocabulary["<|notimestamps|>"])  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_trains_and_saves_an_adapter(folder, tmp_path, capsys):
    rows = ["path\ttext", *(f"{u.path.resolve()}\t{u.text}" for u in read_manifest(SPEECH)[:6])]
    manifest = tmp_path / "few.tsv"
    manifest.write_text("\n".join(rows) + "\n")
    main([str(folder), str(manifest), "--out", str(tmp_path / "out"), "--steps", "8", "--batch", "2", "--lr", "0.01",
          "--outer-rank", "4", "--eval-manifest", str(manifest)])  # fmt: skip
    shown = capsys.readouterr().out
    values = dict(line.split(": ") for line in shown.splitlines() if line.startswith(("first", "last", "wer")))
    assert float(values["last_loss"]) < float(values["first_loss"])
    assert set(values) == {"first_loss", "last_loss", "wer_before", "wer_after"}
    fresh = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    load_ssvdo(fresh, tmp_path / "out")
    assert sum(1 for _ in hosts(fresh)) == 4
