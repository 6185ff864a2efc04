"""How far adapters turn, through PEFT: what its users know from LoRA's layers."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale

import ssvdo_kernels.integrations.peft  # noqa: F401
from ssvdo_kernels import reference, set_scale
from ssvdo_kernels.integrations.peft import Linear, SSVDOConfig


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 8)).double().eval()


def config(targets=("0", "2"), **options):
    return SSVDOConfig(target_modules=list(targets), outer_rank=3, init_weights=False, **options)


def adapted(**options):
    return get_peft_model(base(), config(**options), autocast_adapter_dtype=False)


def layers(model):
    return [m for m in model.modules() if isinstance(m, Linear)]


def x():
    torch.manual_seed(1)
    return torch.randn(7, 10, dtype=torch.float64)


def by_the_equations(layer, tokens, scales):
    """W0 and the changes of the adapters called so, each turned by its scale, times the tokens."""
    W0 = layer.get_base_layer().weight.detach()
    changed = W0.clone()
    for name, scale in scales.items():
        adapter = layer.ssvdo_adapters[name]
        three = (scale * p.detach() for p in adapter.trained)
        changed += reference.adapted_weight(W0, *three, adapter.config) - W0
    return nn.functional.linear(tokens, changed, layer.get_base_layer().bias)


def test_a_layer_is_scaled_and_scaled_back_as_loras_are():
    model = adapted()
    model.add_adapter("second", config(["0"]))
    layer, last = layers(model)
    whole = layer(x())
    for call, want in ((lambda: layer.set_scale("default", 0.5), 0.5), (lambda: layer.scale_layer(3), 1.5),
                       (lambda: layer.unscale_layer(2), 0.75), (lambda: layer.scaling.update(default=-2), -2.0),
                       (lambda: setattr(layer, "scaling", {"default": 0.25}), 0.25)):  # fmt: skip
        call()
        assert layer.scaling == {"default": want, "second": 1.0} and last.scaling == {"default": 1.0}
        torch.testing.assert_close(layer(x()), by_the_equations(layer, x(), {"default": want}))
    model.base_model.set_adapter(["default", "second"])
    layer.set_scale("second", 0.1)
    torch.testing.assert_close(layer(x()), by_the_equations(layer, x(), {"default": 0.25, "second": 0.1}))
    delta = layer.get_delta_weight("second") + layer.base_layer.weight
    torch.testing.assert_close(nn.functional.linear(x(), delta, layer.bias),
                               by_the_equations(layer, x(), {"second": 0.1}))  # fmt: skip
    layer.unscale_layer()
    model.set_adapter("default")
    torch.testing.assert_close(layer(x()), whole, rtol=0, atol=0)
    last.set_scale("second", 3)  # which it does not have: nothing happens, as with LoRA
    with pytest.raises(KeyError, match="second"):
        last.scaling["second"] = 3
    with pytest.raises(ValueError, match="scale=nan is out of range; allowed: a finite number"):
        layer.scaling = {"default": 2, "second": float("nan")}
    assert layer.scaling == {"default": 1.0, "second": 1.0}


@pytest.mark.parametrize("merged", [False, True])
def test_rescale_adapter_scale(merged):
    model = adapted()
    plain, whole = base()(x()), model(x())
    if merged:
        model.merge_adapter()
    bits = [layer.get_base_layer().weight.clone() for layer in layers(model)]
    before = model(x())
    torch.testing.assert_close(before, whole)
    with rescale_adapter_scale(model, 0.5):
        half = model(x())
        with rescale_adapter_scale(model, 0):
            torch.testing.assert_close(model(x()), plain)
        assert torch.equal(model(x()), half)
    assert torch.equal(model(x()), before)
    assert all(torch.equal(layer.get_base_layer().weight, b) for layer, b in zip(layers(model), bits, strict=True))
    other = set_scale(adapted(), 0.5)  # natively
    torch.testing.assert_close(half, other(x()))
    if merged:
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x()), plain)


def test_training_at_a_scale_gives_the_gradients_of_the_multiples():
    model = adapted()
    layer = layers(model)[0]
    adapter = layer.ssvdo_adapters["default"]
    with rescale_adapter_scale(model, 0.3):
        found = torch.autograd.grad(layer(x()).square().sum(), adapter.trained)
    own = [p.detach().clone().requires_grad_() for p in adapter.trained]
    W = reference.adapted_weight(layer.base_layer.weight.detach(), *(0.3 * p for p in own), adapter.config)
    y = nn.functional.linear(x(), W, layer.bias)
    for got, want in zip(found, torch.autograd.grad(y.square().sum(), own), strict=True):
        torch.testing.assert_close(got, want)


def test_files_hold_what_was_trained_and_merged_models_the_scaled_weight(tmp_path):
    model = adapted()
    whole = model(x())
    with rescale_adapter_scale(model, 0.5):
        half = model(x())
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x()), half)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(loaded(x()), whole)
    with rescale_adapter_scale(model, 0.5):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x()), half)  # what has been handed over is left alone


def test_experts_are_scaled():
    pytest.importorskip("peft", minversion="0.21", reason="target_parameters came with newer PEFT")

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Parameter(torch.randn(2, 24, 10).double())

        def forward(self, tokens):
            return torch.einsum("eoi,ti->eto", self.up, tokens)

    own = config([], target_parameters=["mlp.up"])
    model = get_peft_model(nn.ModuleDict({"mlp": Experts()}), own, autocast_adapter_dtype=False)
    wrapper = model.base_model.model["mlp"]
    for merge in (False, True):
        if merge:
            model.merge_adapter()
        with rescale_adapter_scale(model, 0.5):
            for i, adapter in enumerate(wrapper.ssvdo_adapters["default"]):
                own = (0.5 * p.detach() for p in adapter.trained)
                W = reference.adapted_weight(wrapper.stack()[i].detach(), *own, adapter.config)
                torch.testing.assert_close(wrapper(x())[i], x() @ W.mT)


def test_other_models_are_treated_as_before():
    lora = get_peft_model(base(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    with rescale_adapter_scale(lora, 0):
        torch.testing.assert_close(lora(x()), base()(x()))
    with pytest.raises(ValueError, match="scaling is only supported"), rescale_adapter_scale(base(), 1):
        pass
