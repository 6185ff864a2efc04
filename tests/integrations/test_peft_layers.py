"""Which layers of a model PEFT adapts with SSVD-O, and which are refused."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
import peft
from peft import PeftModel, get_peft_model
from peft_models import MLP, Deep, adapt, adapters_of, base, needs_0_21, pair, x_of

from ssvdo_kernels.integrations.peft import Linear, SSVDOConfig


def test_choosing_layers():
    def found(**options):
        model = get_peft_model(Deep(), SSVDOConfig(**{"outer_rank": 3, **options}))
        return {n.removeprefix("base_model.model.body."): m for n, m in model.named_modules() if isinstance(m, Linear)}

    everything = {f"layers.{i}.{n}" for i in range(4) for n in ("up", "down")}
    assert set(found(target_modules="all-linear")) == everything
    assert set(found(target_modules=["up"])) == {n for n in everything if n.endswith("up")}
    assert set(found(target_modules=["up", "down"], exclude_modules=["layers.0.up"])) == everything - {"layers.0.up"}
    assert set(found(target_modules=["up"], layers_to_transform=[1, 3], layers_pattern="layers")) == {
        "layers.1.up", "layers.3.up"}
    by_layer = found(target_modules=["up", "down"], outer_rank_pattern={"up": 5, r"layers\.2\.down": 0},
                     inner_ratio_pattern={r"layers\.1\.up": 1.0})  # fmt: skip
    shapes = {n: m.ssvdo_adapters["default"].shape for n, m in by_layer.items()}
    assert (shapes["layers.0.up"].l, shapes["layers.2.down"].l, shapes["layers.3.down"].l) == (5, 0, 3)
    assert (shapes["layers.1.up"].k, shapes["layers.0.up"].k) == (8, 4)


BAD = [
    ({"inner_ratio": 0.0}, "inner_ratio=0.0"), ({"outer_rank": -1}, "outer_rank=-1"),
    ({"rotation": "x"}, "rotation='x'"),
    ({"target_modules": "lin0", "layers_to_transform": [0]}, "layers_to_transform"),
    ({"layers_pattern": "layers", "target_modules": ["lin0"]}, "layers_pattern"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", BAD)
def test_a_bad_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SSVDOConfig(**options)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Target module relu is a torch\.nn\.modules\.activation\.ReLU"):
        adapt(base(), target_modules=["relu"])
    with pytest.raises(ValueError, match="target_modules"):
        adapt(base())


def test_an_outer_rank_above_what_a_layer_has_is_lowered_with_one_warning():
    with pytest.warns(UserWarning, match=r"outer_rank=99 is lowered to min\(d, c\) in 2 layers.*lin0 \(\d+\)") as seen:
        model = adapt(base(), target_modules=["lin0", "lin1"], outer_rank=99)
    assert len([w for w in seen if "lowered" in str(w.message)]) == 1
    for _, _, adapter in adapters_of(model):
        assert adapter.shape.l == min(adapter.shape.d, adapter.shape.c)
    x = x_of()
    torch.testing.assert_close(model(x), base()(x))


def test_hooks_of_the_base_layer_see_the_adapted_layer():
    seen, base_model = [], pair(torch.float32, torch.float32)
    base_model.fc1.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    base_model.fc1.register_forward_hook(lambda m, args, y: seen.append(y) or y + 1)
    model = get_peft_model(base_model, peft.SSVDOConfig(target_modules=["fc1"], outer_rank=8, init_weights=False))
    layer, x = model.base_model.model.fc1, torch.randn(3, 48)
    y = layer(x)
    adapted = layer.ssvdo_adapters["default"].adapted_weight(layer.base())
    want = nn.functional.linear(2 * x, adapted, layer.base_layer.bias)
    assert torch.allclose(y, want + 1, atol=1e-5) and len(seen) == 1 and torch.allclose(seen[0], want, atol=1e-5)
    assert "forward" not in vars(layer.base_layer)
    with model.disable_adapter():
        plain = nn.functional.linear(2 * x, layer.base_layer.weight, layer.base_layer.bias)
        assert torch.allclose(layer(x), plain + 1, atol=1e-6) and len(seen) == 2


def test_a_patched_forward_is_refused():
    base_model = pair(torch.float32, torch.float32)
    base_model.fc1.forward = lambda x: x
    with pytest.raises(ValueError, match="fc1 has a forward of its own"):
        get_peft_model(base_model, peft.SSVDOConfig(target_modules=["fc1"], outer_rank=8))


def test_a_refused_layer_leaves_the_model_as_it_was():
    model = nn.ModuleDict({"fc1": nn.Linear(8, 24), "fc2": nn.Linear(24, 8), "norm": nn.LayerNorm(8)})
    plain, flags = model["fc1"], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"norm is a .*LayerNorm"):
        get_peft_model(model, SSVDOConfig(target_modules=["fc1", "fc2", "norm"], outer_rank=2))
    assert model["fc1"] is plain and type(model["fc2"]) is nn.Linear
    assert [p.requires_grad for p in model.parameters()] == flags
    made = get_peft_model(model, SSVDOConfig(target_modules=["fc1"], outer_rank=2))
    with pytest.raises(ValueError, match="norm is a"):
        made.add_adapter("second", SSVDOConfig(target_modules=["fc1", "fc2", "norm"], outer_rank=2))
    assert list(model["fc1"].ssvdo_adapters) == ["default"] and type(model["fc2"]) is nn.Linear


def test_layers_that_share_a_weight_are_refused():
    model = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})
    model["fc2"].weight = model["fc1"].weight
    with pytest.raises(ValueError, match="fc1 and fc2 share one weight"):
        get_peft_model(model, SSVDOConfig(target_modules=["fc1", "fc2"], outer_rank=0))
    assert type(model["fc1"]) is nn.Linear


def test_all_linear_leaves_layers_out_that_share_a_weight():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    made = get_peft_model(model, SSVDOConfig(target_modules="all-linear", outer_rank=0)).base_model.model
    assert [name for name, layer in made.named_children() if isinstance(layer, Linear)] == ["c"]


def test_a_layer_in_two_places_is_one_adapted_layer():
    layer = nn.Linear(8, 8)
    model = get_peft_model(nn.Sequential(layer, nn.GELU(), layer), SSVDOConfig(target_modules=["0"], outer_rank=0))
    inner = model.base_model.model
    assert inner[0] is inner[2] and isinstance(inner[0], Linear)


def test_a_forward_that_is_put_on_the_base_layer_afterwards_is_refused():
    model = adapt(base(), target_modules=["lin0"], outer_rank=2)
    model.base_model.model.lin0.base_layer.forward = lambda x: x
    with pytest.raises(TypeError, match="the base layer of lin0 has been given a forward of its own"):
        model(x_of())


def test_a_hooked_base_layer_may_be_called_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    model = adapt(base(), target_modules=["lin0"], outer_rank=2, init_weights=False)
    model.base_model.model.lin0.base_layer.register_forward_hook(lambda m, args, y: y)
    x = x_of()
    want = model(x).detach()
    with ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: model(x).detach(), range(200)):
            torch.testing.assert_close(y, want)


@pytest.mark.parametrize("options, words", [
    ({"init_weights": None}, "init_weights=None"), ({"include_basis": "no"}, "include_basis='no'"),
    ({"inner_ratio_pattern": [1]}, "inner_ratio_pattern"), ({"outer_rank_pattern": {"(": 3}}, "outer_rank_pattern"),
])
def test_flags_and_patterns_of_the_wrong_type_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        SSVDOConfig(target_modules=["lin0"], **options)


def test_the_feed_forward_layers_of_any_model_are_the_default():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"c_fc": nn.Linear(8, 24), "gate": nn.Linear(8, 3)})})
    made = get_peft_model(model, SSVDOConfig(outer_rank=2))
    assert isinstance(model["mlp"]["c_fc"], Linear) and type(model["mlp"]["gate"]) is nn.Linear
    assert set(made.peft_config["default"].target_modules) == {"mlp.c_fc"}


def test_conv1d_layers_of_gpt2_are_adapted_merged_and_saved(tmp_path):
    from transformers.pytorch_utils import Conv1D

    def plain():
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(24, 8), nn.GELU(), Conv1D(8, 24))

    x = torch.randn(3, 8)
    model = get_peft_model(plain(), SSVDOConfig(target_modules=["0", "2"], outer_rank=2, init_weights=False))
    y = model(x).detach()
    assert not torch.allclose(y, plain()(x), atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(plain(), tmp_path)(x), y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y)
    merged = model.merge_and_unload()
    assert type(merged[0]) is Conv1D
    torch.testing.assert_close(merged(x), y)


class Free(nn.Module):
    """A matrix that no linear layer holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(6, 10))
        self.inner.forward = lambda x: x @ self.inner.weight.mT
        self.layer = nn.Linear(6, 10)

    def forward(self, x):
        return self.layer(self.inner(x))


@needs_0_21
def test_matrices_are_adapted_by_the_names_of_their_parameters(tmp_path):
    def linear():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 10))

    x, kind = x_of(), {"outer_rank": 3, "target_modules": []}
    model = get_peft_model(linear(), SSVDOConfig(**kind, target_parameters=["0.weight", "1.weight"]))
    other = get_peft_model(linear(), SSVDOConfig(outer_rank=3, target_modules=["0", "1"]))
    assert len(list(model.parameters())) == len(list(other.parameters()))
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if ours.requires_grad:
                theirs.copy_(ours.normal_(0, 0.1))
    want = other(x).detach()
    assert not torch.allclose(want, linear()(x), atol=1e-3)
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    other(x).sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert not ours.requires_grad or torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(linear(), tmp_path)(x), want)
    bits = linear()[0].weight
    model.merge_adapter()
    torch.testing.assert_close(model(x), want)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, bits)
    torch.testing.assert_close(model.merge_and_unload()(x), want)
    free = get_peft_model(Free(), SSVDOConfig(**kind, target_parameters=["inner.weight"], init_weights=False))
    assert not torch.allclose(free(x), Free()(x), atol=1e-3)


@needs_0_21
def test_parameters_that_cannot_be_adapted_are_refused():
    kind = {"outer_rank": 0, "target_modules": []}
    with pytest.raises(ValueError, match=r"target_parameters: lin0.bias has shape \(24,\)"):
        get_peft_model(MLP(), SSVDOConfig(**kind, target_parameters=["lin0.bias"]))
    tied = base()
    tied.other = nn.Linear(24, 8)
    tied.other.weight = tied.lin1.weight
    with pytest.raises(ValueError, match=r"target_parameters: lin1\.weight is shared with another module"):
        get_peft_model(tied, SSVDOConfig(**kind, target_parameters=["lin1.weight"]))
    reader = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"out_proj\.weight is multiplied by in"):
        get_peft_model(reader, SSVDOConfig(**kind, target_parameters=["out_proj.weight"]))
