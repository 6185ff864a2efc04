"""The share of a gradient that a method can follow first, beside the directions that the layer itself moves in."""

import copy
from dataclasses import replace

import pytest
import torch

for needed in ("transformers", "tokenizers", "soundfile"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

from transformers import WhisperConfig, WhisperForConditionalGeneration

from examples.asr.tangents import gradients, lora_share, moved, shares
from examples.asr.whisper import config_of
from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.budget import Matrix, chosen


@pytest.mark.parametrize(("out_features", "in_features"), [(20, 8), (8, 20)])
def test_shares_are_projections_on_what_the_layer_can_do_first(out_features, in_features):
    """The Jacobian of W' by each part's parameters spans the same directions."""
    torch.manual_seed(0)
    base = torch.nn.Linear(in_features, out_features, dtype=torch.float64)
    config = SSVDOConfig(inner_ratio=0.5, outer_rank=2, init_angle=0.0, target_modules=["0"])
    model = apply_ssvdo(torch.nn.Sequential(copy.deepcopy(base)), config)
    layer, bias = model[0], base.bias.detach()
    gradient = torch.randn_like(base.weight)
    ((_, shape),) = chosen({"0": Matrix(out_features, in_features, 8)}, config).values()
    smaller = replace(shape, k=1, l=1)
    found, less = shares(base.weight.detach(), gradient, [shape, smaller])
    eye = torch.eye(in_features, dtype=torch.float64)
    for part in ("inner_rotation", "inner_scale", "outer"):
        parameter = getattr(layer.adapters()[0], part)
        columns = []
        for i in range(parameter.numel()):
            step = torch.zeros(parameter.numel(), dtype=torch.float64)
            step[i] = 1e-6
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * step.view_as(parameter))
                    ends.append((layer(eye) - bias).T.flatten())
                    parameter.sub_(sign * step.view_as(parameter))
            columns.append((ends[0] - ends[1]) / 2e-6)
        J = torch.stack(columns, 1)
        expected = (J @ torch.linalg.pinv(J, rtol=1e-6) @ gradient.flatten()).square().sum()
        assert found[part] == pytest.approx(float(expected), rel=1e-4), part
    assert less["inner_rotation"] == 0 < less["inner_scale"] < found["inner_scale"] and less["outer"] < found["outer"]


def test_lora_follows_what_its_rows_span():
    gradient = torch.randn(20, 8)
    everything = float(gradient.double().square().sum())
    assert 0 < lora_share(gradient, 3) < lora_share(gradient, 5) < everything
    assert lora_share(gradient, 8) == pytest.approx(everything)


def test_a_step_moves_one_part_alone():
    small = {**config_of().to_dict(), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**small))
    settings = {"method": "ssvdo", "inner_ratio": 1.0, "outer_rank": 4}
    scales, nothing = (moved(model, settings, part, 1e-4) for part in ("inner_scale", "nothing"))
    assert scales == pytest.approx(1e-4 * (4 * 16) ** 0.5, rel=0.02)  # each of 4 x 16 singular values by the rate
    assert nothing < 1e-5 < moved(model, settings, "outer", 1e-4)


def test_gradients_are_the_mean_over_batches(monkeypatch):
    monkeypatch.setattr("examples.asr.tangents.loss_of", lambda model, batch: model.a(batch).sum())
    model = torch.nn.Module()
    model.a = torch.nn.Linear(3, 2)
    found = gradients(model, ["a"], [torch.ones(3), 3 * torch.ones(3)])
    assert torch.equal(found["a"], 2 * torch.ones(2, 3))
