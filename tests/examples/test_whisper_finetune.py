"""examples/whisper_finetune.py on a tiny random Whisper, a byte-level tokenizer and the committed recordings."""

import json
from functools import wraps

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("jiwer", reason="jiwer is not installed")
pytest.importorskip("soundfile", reason="soundfile is not installed")
import soundfile
import transformers
from tokenizers import pre_tokenizers

from examples.asr.corpus import SPEECH, Utterance, read_manifest
from examples.whisper_finetune import Collator, main
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
        decoder_attention_heads=2, d_model=16, encoder_ffn_dim=48, decoder_ffn_dim=48, max_target_positions=64,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start)  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        max_length=20, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        no_timestamps_token_id=vocabulary["<|notimestamps|>"])  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def few(path, *more):
    if not SPEECH.is_file():
        pytest.skip("a source archive has no recordings")
    rows = ["path\ttext", *(f"{u.path.resolve()}\t{u.text}" for u in read_manifest(SPEECH)[:6]), *more]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_it_trains_and_saves_an_adapter(folder, tmp_path, capsys):
    manifest = few(tmp_path / "few.tsv")
    main([str(folder), str(manifest), "--out", str(tmp_path / "out"), "--steps", "8", "--batch", "2", "--lr", "0.01",
          "--outer-rank", "4", "--eval-manifest", str(manifest)])  # fmt: skip
    shown = capsys.readouterr().out
    values = dict(line.split(": ") for line in shown.splitlines() if line.startswith(("first", "last", "wer")))
    assert float(values["last_loss"]) < float(values["first_loss"])
    assert set(values) == {"first_loss", "last_loss", "wer_before", "wer_after"}
    fresh = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    load_ssvdo(fresh, tmp_path / "out")
    assert sum(1 for _ in hosts(fresh)) == 4


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("model", "/nope", "a folder that is there"),
        ("model", __file__, "a folder that is there"),
        ("manifest", "/nope", "a file that is there"),
        ("--eval-manifest", "/", "a file that is there"),
        ("--out", __file__, "a folder, or where one can be made"),
        ("--steps", "0", "a whole number of at least 1"),
        ("--batch", "-1", "a whole number of at least 1"),
        ("--lr", "nan", "a finite number above 0"),
        ("--seed", "-1", "a whole number from 0 to 4294967295"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, capsys, option, value, allowed):
    given = {"model": str(tmp_path), "manifest": __file__, "--out": str(tmp_path / "out"), option: value}
    with pytest.raises(SystemExit) as error:
        main([given.pop("model"), given.pop("manifest"), *(f"{k}={v}" for k, v in given.items())])
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and last.endswith(f"{option}: {value!r} is refused; allowed: {allowed}")


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"model='.*model' is not read \(.*\); allowed: a Whisper") as error:
        main([str(tmp_path / "model"), str(few(tmp_path / "few.tsv")), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        (("bad.wav\thello", "long.wav\thello", f"short.wav\t{'a' * 70}"), (),
         r"(?s)short\.wav: its text is 72 tokens .* 64\n.*bad\.wav: not read as audio.*\n.*31\.0 s long; .* 30 s$"),
        (("nan.wav\thello",), (), r"^\S*nan\.wav: holds samples that are not finite"),
        (("nan.wav\thello",) * 23, (), r"(?s)not finite; allowed: finite ones\nand 3 more$"),
        ((), ("--eval-manifest", "eval.tsv"), r"references\[6\]='\.\.\.' has no words"),
        ((), ("--eval-manifest", "broken.tsv"), r"nan\.wav: holds samples that are not finite"),
        ((), ("--language", "nl"), r"--language='nl' is refused; model=.* is not multilingual"),
        ((), ("--inner-ratio", "7"), "inner_ratio=7"),
    ],
)
def test_wrong_data_is_refused_before_the_model_is_read(folder, tmp_path, monkeypatch, rows, more, said):
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "long.wav", torch.zeros(31 * 16_000).numpy(), 16_000)
    (tmp_path / "bad.wav").write_text("no sound")
    soundfile.write(tmp_path / "short.wav", torch.zeros(16_000).numpy(), 16_000)
    soundfile.write(tmp_path / "nan.wav", torch.full((16_000,), float("nan")).numpy(), 16_000, subtype="FLOAT")
    few(tmp_path / "eval.tsv", "short.wav\t...")
    few(tmp_path / "broken.tsv", "nan.wav\thello")
    monkeypatch.setattr("examples.whisper_finetune.WhisperForConditionalGeneration", None)
    with pytest.raises(ValueError, match=said):
        main([str(folder), str(few(tmp_path / "few.tsv", *rows)), "--out", "out", *more])
    assert not (tmp_path / "out").exists()


def test_a_label_does_not_begin_with_what_the_model_puts_before_it(folder):
    processor = transformers.WhisperProcessor.from_pretrained(folder)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    batch = Collator(processor, model.config)([Utterance(u.path, "hi") for u in read_manifest(SPEECH)[:2]])
    said = processor.tokenizer.convert_ids_to_tokens(batch["labels"][0].tolist())
    assert said == ["<|notimestamps|>", "h", "i", "<|endoftext|>"]
    given = {}
    model.model.decoder.register_forward_pre_hook(lambda _, args, known: given.update(known), with_kwargs=True)
    model(**batch)
    shifted = processor.tokenizer.convert_ids_to_tokens(given["input_ids"][0].tolist())
    assert shifted == ["<|startoftranscript|>", "<|notimestamps|>", "h", "i"]


def test_a_multilingual_model_must_be_told_the_language(folder, tmp_path):
    settings = transformers.GenerationConfig.from_pretrained(folder)
    settings.is_multilingual, settings.lang_to_id = True, {"<|en|>": settings.decoder_start_token_id + 1}
    settings.task_to_id = {"transcribe": settings.decoder_start_token_id + 3}
    settings.save_pretrained(folder)
    given = [str(folder), str(few(tmp_path / "few.tsv")), "--out", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(ValueError, match=r"--language is missing; model=.* is multilingual"):
        main(given)
    main([*given, "--language", "en", "--eval-manifest", str(tmp_path / "few.tsv")])
    assert (tmp_path / "out" / "ssvdo_model.safetensors").exists()


def test_a_loss_that_is_not_finite_saves_nothing(folder, tmp_path, monkeypatch):
    forward = transformers.WhisperForConditionalGeneration.forward

    @wraps(forward)  # Trainer of Transformers 4 goes by what it takes
    def broken(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(transformers.WhisperForConditionalGeneration, "forward", broken)
    with pytest.raises(ArithmeticError, match=r"the loss of step 1 is nan; nothing is saved|is not finite"):
        main([str(folder), str(few(tmp_path / "few.tsv")), "--out", str(tmp_path / "out"), "--steps", "1"])
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_default_rate_is_the_advised_one(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("examples.whisper_finetune.run", lambda options: seen.append(options) or {})
    main([str(folder), str(few(tmp_path / "few.tsv")), "--out", str(tmp_path / "out")])
    assert 2e-4 <= seen[0].lr <= 4e-4
