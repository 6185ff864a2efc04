"""Whisper, wav2vec2 and a LLaMA-type model (random weights): trained by Trainer, saved, resumed, merged; generation."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
import transformers
from helpers import assert_close, count_preparations, randomise_all
from peft import PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, load_ssvdo, merge_ssvdo, save_ssvdo
from ssvdo_kernels.host import hosts
from ssvdo_kernels.integrations.peft import SSVDOConfig as PeftSSVDOConfig
from ssvdo_kernels.ops import host


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=60, num_mel_bins=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, d_model=16, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
    row = {"input_features": torch.randn(8, 40), "labels": torch.randint(3, 60, (6,))}
    return transformers.WhisperForConditionalGeneration(config), row


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, ctc_zero_infinity=True,
        hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        layerdrop=0.0)
    row = {"input_values": torch.randn(400), "labels": torch.randint(1, 20, (5,))}
    return transformers.Wav2Vec2ForCTC(config), row


def llama():
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0)  # fmt: skip
    tokens = torch.randint(3, 60, (12,))
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens.clone()}


MODELS = {"whisper": whisper, "wav2vec2": wav2vec2, "llama": llama}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def build(make):
    torch.manual_seed(0)
    model, row = make()
    return model.eval(), row


def logits(model, row):
    with torch.no_grad():
        return model(**{k: v[None] for k, v in row.items()}).logits


def trainer(model, row, folder, steps):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, save_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="steps", seed=0,
        remove_unused_columns=False, weight_decay=0.0)  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=[row] * 8)


@models
@pytest.mark.parametrize("through", ["apply_ssvdo", "peft"])
def test_trained_saved_resumed_and_merged(make, through, tmp_path):
    model, row = build(make)
    plain = logits(model, row)
    if through == "peft":  # target_modules comes from the model's type
        model = get_peft_model(model, PeftSSVDOConfig(outer_rank=4))
    else:
        apply_ssvdo(model, SSVDOConfig(outer_rank=4, init_angle=0.0))
    assert sum(1 for _ in hosts(model)) == {"whisper": 8, "wav2vec2": 4, "llama": 6}[make.__name__]
    assert torch.allclose(logits(model, row), plain, atol=1e-5)
    whole = trainer(model, row, tmp_path / "a", 4)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.eval()
    trained = logits(model, row)

    again, _ = build(make)
    if through == "peft":
        again = get_peft_model(again, PeftSSVDOConfig(outer_rank=4))
    else:
        apply_ssvdo(again, SSVDOConfig(outer_rank=4, init_angle=0.0))
    resumed = trainer(again, row, tmp_path / "a", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    again.eval()
    assert torch.allclose(logits(again, row), trained, atol=1e-5)

    fresh, _ = build(make)
    if through == "peft":
        model.save_pretrained(tmp_path / "adapter")
        fresh = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        assert torch.allclose(logits(fresh, row), trained, atol=1e-5)
        fresh = fresh.merge_and_unload(safe_merge=True)
    else:
        save_ssvdo(model, tmp_path / "adapter")
        load_ssvdo(fresh, tmp_path / "adapter")
        assert torch.allclose(logits(fresh, row), trained, atol=1e-5)
        merge_ssvdo(fresh)
    assert torch.allclose(logits(fresh, row), trained, atol=1e-4)


@pytest.mark.parametrize("make", [whisper, llama], ids=["whisper", "llama"])
def test_generation_is_the_same_merged_and_not(make):
    model, row = build(make)
    apply_ssvdo(model, SSVDOConfig(outer_rank=4, init_angle=0.3))
    given = {k: v[None] for k, v in row.items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    want = model.generate(**given, **options)
    merge_ssvdo(model)
    assert torch.equal(model.generate(**given, **options), want)


@pytest.mark.skipif(not host.available(), reason="a CPU prepares layer by layer without the compiled core")
def test_a_compiled_model_with_gradient_checkpointing_prepares_once_each_way(monkeypatch):
    """All of it in one graph, for sequences of any length."""
    model = apply_ssvdo(build(llama)[0].double().train(), SSVDOConfig(outer_rank=3))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model, "_require_grads_hook"):  # of Transformers 5; Dynamo has no requires_grad_ inside of a graph
        model.disable_input_require_grads()
    calls, counter = count_preparations(monkeypatch), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 9):
        tokens, found = torch.randint(3, 60, (2, length)), []
        randomise_all(model, 0.1)
        for run in (compiled, model):
            for sizes in calls.values():
                sizes.clear()
            model.zero_grad()
            run(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            assert sorted(calls["backward"]) == [2, 4]
            assert sorted(calls["forward"]) == ([2, 4] if run is compiled else [])
            found.append([p.grad for p in model.parameters() if p.requires_grad])
        for got, want in zip(*found, strict=True):
            assert_close("gradient", got, want, 1e-11)
    assert counter.frame_count == 1
