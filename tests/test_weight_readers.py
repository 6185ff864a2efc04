"""Modules that multiply by a layer's weight themselves are all known, and their layers are left out or refused."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo
from ssvdo_kernels.weight_readers import READERS, reader_of

HARMLESS = {"dtype", "device", "shape", "size", "is_meta", "ndim", "data", "requires_grad", "requires_grad_", "numel"}


def is_own(node, attribute=None):
    """self.<attribute>, as an expression."""
    return (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            and attribute in (None, node.attr))  # fmt: skip


def readers(source):
    """(class, layer) for every nn.Linear of a class whose weight a method takes for more than its dtype and size."""
    for cls in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)):
        made = [node for node in ast.walk(cls) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
        linear = {target.attr for node in made for target in node.targets if is_own(target)
                  and ast.unparse(node.value.func) in ("nn.Linear", "torch.nn.Linear", "Linear")}  # fmt: skip
        above = {child: node for node in ast.walk(cls) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(cls):
            if not (isinstance(node, ast.Attribute) and node.attr == "weight" and is_own(node.value)):
                continue
            user = above[node]
            asks = isinstance(user, ast.Call) and ast.unparse(user.func) in ("isinstance", "hasattr")
            harmless = asks or (isinstance(user, ast.Attribute) and user.attr in HARMLESS)
            if node.value.attr in linear and isinstance(node.ctx, ast.Load) and not harmless:
                yield cls.name, node.value.attr


def test_the_scan_finds_a_reader():
    source = "class A:\n def __init__(self):\n  self.a = nn.Linear(1, 1)\n def f(self, x):\n  return x @ self.a.weight"
    assert set(readers(source)) == {("A", "a")}
    assert not set(readers(source + ".dtype"))


def test_transformers_has_no_reader_that_is_not_known():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    files = sorted((Path(transformers.__file__).parent / "models").rglob("modeling_*.py"))
    assert len(files) > 100
    texts = [text for file in files if ".weight" in (text := file.read_text(encoding="utf-8"))]
    found = {pair for text in texts for pair in readers(text)}
    assert {("WavLMAttention", "q_proj"), ("MambaMixer", "dt_proj")} <= found
    assert {(cls, layer) for cls, layer in found if layer not in READERS.get(cls, ())} == set()


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
    with pytest.raises(TypeError, match=r"attention\.q_proj: WavLMAttention multiplies by its weight"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=0, target_modules=("q_proj", "extra")))
    assert type(model["attention"].extra) is nn.Linear
    with pytest.warns(UserWarning, match=r"attention\.q_proj: WavLMAttention.*left out"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules="all-linear"))
    assert type(model["attention"].q_proj) is nn.Linear and isinstance(model["attention"].extra, SSVDOLinear)


def test_peft_leaves_them_out():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import ssvdo_kernels.integrations.peft  # noqa: F401

    model = nn.ModuleDict({"attention": WavLMAttention()})
    with pytest.warns(UserWarning, match=r"attention\.q_proj: WavLMAttention.*left out"):
        made = peft.get_peft_model(model, peft.SSVDOConfig(outer_rank=2, target_modules=["q_proj", "extra"]))
    found = made.base_model.model["attention"]
    assert type(found.q_proj) is nn.Linear and type(found.extra) is not nn.Linear
    torch.testing.assert_close(found(torch.ones(2, 8)).shape, torch.Size([2, 24]))
