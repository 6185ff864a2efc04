"""Modules that multiply by a layer's weight themselves are all known, and their layers are left out or refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo
from ssvdo_kernels.weight_readers import reader_of, readings


def test_the_scan_finds_a_reader_and_leaves_questions_and_initialisations_alone():
    source = "class A:\n def f(self, x):\n  return x @ self.a.weight"
    assert set(readings(source)) == {("A", "a")}
    passed = "class A:\n def f(self, x, one):\n  return x @ one.weight\n def g(self, x):\n  return self.f(x, self.a)"
    assert set(readings(passed)) == {("A", "a")}
    assert not set(readings(passed.replace("one.weight", "one.weight.dtype")))
    for harmless in (f"{source}.dtype", source.replace("x @ self.a.weight", "isinstance(self.a.weight, int)"),
                     source.replace("x @", "nn.init.zeros_(").replace("weight", "weight)"),
                     source.replace(" f(", " reset_parameters(")):  # fmt: skip
        assert not set(readings(harmless)), harmless


def test_readers_of_transformers_and_torch_are_found():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    files = sorted((Path(transformers.__file__).parent / "models").rglob("modeling_*.py"))
    assert len(files) > 100
    texts = [text for file in files if ".weight" in (text := file.read_text(encoding="utf-8"))]
    found = {pair for text in texts for pair in readings(text)}
    assert {("WavLMAttention", "q_proj"), ("MambaMixer", "dt_proj"), ("BloomMLP", "dense_4h_to_h")} <= found
    feed_forward = {(c, n) for c, n in found if n in ("fc1", "fc2", "gate_proj", "up_proj", "down_proj", "w_1", "wo")}
    assert feed_forward == set()  # T5 asks for the dtype of `wo` alone
    assert reader_of(nn.MultiheadAttention(4, 2), "out_proj") == "MultiheadAttention"
    assert reader_of(nn.TransformerEncoderLayer(4, 2), "linear1") is None


class WavLMAttention(nn.Module):
    """As Transformers' class of that name: the weights go to a function."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.extra = nn.Linear(8, 8), nn.Linear(8, 24)

    def forward(self, x):
        return self.extra(x @ self.q_proj.weight.mT)


class Derived(WavLMAttention):
    pass


@pytest.mark.parametrize("kind", [WavLMAttention, Derived])
def test_their_layers_are_refused_by_name_and_left_out_where_nobody_named_them(kind):
    model = nn.ModuleDict({"attention": kind()})
    assert reader_of(model["attention"], "q_proj") == "WavLMAttention" and reader_of(model, "attention") is None
    with pytest.raises(TypeError, match=r"attention\.q_proj is multiplied by in WavLMAttention"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=0, target_modules=("q_proj", "extra")))
    assert type(model["attention"].extra) is nn.Linear
    with pytest.warns(UserWarning, match=r"left out: attention\.q_proj .*WavLMAttention"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules="all-linear"))
    assert type(model["attention"].q_proj) is nn.Linear and isinstance(model["attention"].extra, SSVDOLinear)


def test_peft_refuses_them_by_name_and_leaves_them_out_where_nobody_named_them():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import ssvdo_kernels.integrations.peft  # noqa: F401

    with pytest.raises(ValueError, match=r"attention\.q_proj is multiplied by in WavLMAttention"):
        peft.get_peft_model(nn.ModuleDict({"attention": WavLMAttention()}),
                            peft.SSVDOConfig(outer_rank=2, target_modules=["q_proj", "extra"]))  # fmt: skip
    model = nn.ModuleDict({"attention": WavLMAttention()})
    found = peft.get_peft_model(model, peft.SSVDOConfig(outer_rank=2, target_modules="all-linear")).base_model.model
    assert type(found["attention"].q_proj) is nn.Linear and type(found["attention"].extra) is not nn.Linear
    torch.testing.assert_close(found["attention"](torch.ones(2, 8)).shape, torch.Size([2, 24]))
