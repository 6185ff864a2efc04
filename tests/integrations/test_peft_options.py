"""What PEFT's users configure besides the method: biases, dropout, and weighted combinations."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file

from ssvdo_kernels.integrations.peft import Linear, SSVDOConfig

saves_biases = pytest.mark.skipif(not hasattr(BaseTuner, "_get_learnable_bias_state_dict"),
                                  reason="PEFT before 0.21 saves no biases of other methods")  # fmt: skip


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.LayerNorm(24), nn.Linear(24, 8, bias=False), nn.Linear(8, 24)).double()


def config(targets=("0", "2"), **options):
    options = {"outer_rank": 3, "init_weights": False, **options}
    return SSVDOConfig(target_modules=list(targets), **options)


def adapted(*targets, **options):
    return get_peft_model(base(), config(*targets, **options), autocast_adapter_dtype=False)


def layers(model):
    return [m for m in model.modules() if isinstance(m, Linear)]


def x():
    return torch.randn(7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(model):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(x()).square().sum().backward()
    optimiser.step()


@saves_biases
@pytest.mark.parametrize("bias, trained", [("all", {"0.base_layer.bias", "1.bias", "3.bias"}),
                                           ("ssvdo_only", {"0.base_layer.bias"})])  # fmt: skip
def test_biases_are_trained_saved_merged_and_loaded(bias, trained, tmp_path):
    model = adapted(bias=bias)
    layer, plain = layers(model)[0], base()
    found = {n.removeprefix("base_model.model.") for n, p in model.named_parameters()
             if p.requires_grad and "ssvdo_" not in n}  # fmt: skip
    assert found == trained
    y = layer(x())
    got = torch.autograd.grad(y.square().sum(), layer.base_layer.bias)[0]
    torch.testing.assert_close(got, 2 * y.sum(0))
    train(model)
    want = model(x())
    assert not any(torch.equal(p, dict(plain.named_parameters())[n.replace("base_layer.", "")])
                   for n, p in model.base_model.model.named_parameters() if n in trained)  # fmt: skip
    model.save_pretrained(tmp_path)
    saved = {n for n in load_file(tmp_path / "adapter_model.safetensors") if "ssvdo_" not in n}
    assert saved == {f"base_model.model.{n}" for n in trained}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == bias
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(x()), want)
    assert loaded.base_model.model[0].base_layer.bias.requires_grad
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x()), want)
    model.merge_adapter()
    torch.testing.assert_close(model(x()), want)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x()), want)
    with pytest.warns(UserWarning, match=f"bias configured to be '{bias}'"), model.disable_adapter():
        model(x())
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", config(bias="all"))


def test_no_bias_is_trained_or_saved_by_default():
    model = adapted()
    assert all("ssvdo_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert all("ssvdo_" in n for n in get_peft_model_state_dict(model))


def test_biases_that_are_unknown_or_would_not_be_saved_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="bias='lora_only' is unknown; allowed: 'none', 'all', 'ssvdo_only'"):
        SSVDOConfig(bias="lora_only")
    monkeypatch.delattr(BaseTuner, "_get_learnable_bias_state_dict", raising=False)
    with pytest.raises(ValueError, match=r"bias='all' needs PEFT 0\.21"):
        SSVDOConfig(bias="all")


def changes(model):
    """W' - W0 of each layer as it lies in the active adapters, dense."""
    return [layer.get_delta_weight(layer.active_adapters[0]) for layer in layers(model)]


def test_dropout_is_that_of_the_change_in_training_alone(tmp_path):
    model = adapted(["0"], dropout=0.3)
    layer = layers(model)[0]
    W0, (change,), tokens = layer.base_layer.weight, changes(model), x().requires_grad_()
    torch.manual_seed(7)
    y = layer(tokens)
    torch.manual_seed(7)
    want = nn.functional.linear(tokens, W0, layer.bias) + nn.functional.dropout(tokens, 0.3) @ change.mT
    torch.testing.assert_close(y, want)
    got, true = (torch.autograd.grad(t.square().sum(), tokens)[0] for t in (y, want))
    torch.testing.assert_close(got, true)
    whole = nn.functional.linear(tokens, W0 + change, layer.bias)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, autocast_adapter_dtype=False)
    assert loaded.peft_config["default"].dropout == 0.3
    assert not torch.allclose(layers(loaded)[0](tokens), whole, atol=1e-3)
    torch.testing.assert_close(layers(loaded.eval())[0](tokens), whole)
    torch.testing.assert_close(layers(model.eval())[0](tokens), whole)
    model.train().merge_adapter()
    torch.testing.assert_close(layers(model)[0](tokens), whole)


def test_each_of_several_adapters_draws_its_own_mask():
    model = adapted(["0"], dropout=0.3)
    model.add_adapter("second", config(["0"], dropout=0.6))
    model.base_model.set_adapter(["default", "second"])
    layer = layers(model)[0]
    torch.manual_seed(7)
    y = layer(x())
    torch.manual_seed(7)
    want = layer.base_layer(x())
    for name, p in (("default", 0.3), ("second", 0.6)):
        want = want + nn.functional.dropout(x(), p) @ layer.get_delta_weight(name).mT
    torch.testing.assert_close(y, want)


def test_an_adapter_that_is_added_to_a_model_in_evaluation_drops_nothing():
    model = get_peft_model(base().eval(), config(dropout=0.5), autocast_adapter_dtype=False)
    assert torch.equal(model(x()), model(x()))
    model.add_adapter("second", config(dropout=0.5))
    model.set_adapter("second")
    assert torch.equal(model(x()), model(x()))
    assert not torch.equal(model.train()(x()), model(x()))
