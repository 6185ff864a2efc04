"""The Trainer's callback."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
import transformers

from ssvdo_kernels import DiagnosticsMonitor, ForgettingMonitor, SSVDOConfig, apply_ssvdo
from ssvdo_kernels.integrations.transformers import SSVDOCallback


def test_what_it_sees_is_in_the_trainer_s_logs(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0)  # fmt: skip
    model = apply_ssvdo(transformers.LlamaForCausalLM(config), SSVDOConfig(outer_rank=4))
    tokens = torch.randint(3, 60, (8, 12))
    source = [{"input_ids": tokens[:2], "labels": tokens[:2]}]
    monitor = DiagnosticsMonitor(model, every=3)
    forgetting = ForgettingMonitor(model, source, lambda m, batch: m(**batch).loss)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=7, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True)  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=[{"input_ids": t, "labels": t} for t in tokens],
        callbacks=[SSVDOCallback(monitor, forgetting)])  # fmt: skip
    trainer.train()
    assert [step for step, _ in monitor.history] == [f.step for f in forgetting.history] == [3, 6]
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "ssvdo/drift" in entry}
    assert sorted(logged) == [3, 6]
    for (step, reports), seen in zip(monitor.history, forgetting.history, strict=True):
        assert logged[step]["ssvdo/drift"] == max(r.drift for r in reports) > 0
        assert logged[step]["ssvdo/source_loss_increase"] == seen.increase != 0
