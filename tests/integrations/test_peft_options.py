"""What PEFT's users configure besides the method: biases, dropout, and weighted combinations."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft_models import needs_0_21
from safetensors.torch import load_file

from ssvdo_kernels.integrations.peft import Linear, SSVDOConfig


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


@needs_0_21
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
    model = adapted()
    monkeypatch.delattr(BaseTuner, "_remove_adapter_name_from_key", raising=False)
    with pytest.raises(ValueError, match=r"bias='all' needs PEFT 0\.21"):
        SSVDOConfig(bias="all")
    with pytest.raises(ValueError, match=r"add_weighted_adapter needs PEFT 0\.21"):
        model.add_weighted_adapter(["default"], [1], "new")
    with pytest.raises(ValueError, match=r"target_parameters with 0\.weight needs PEFT 0\.21"):
        get_peft_model(base(), config([], target_parameters=["0.weight"]))


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


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear does."""


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(24, 10)


class Whole(nn.Linear):
    """Adapted as a parameter, not as a layer."""


KINDS = {"subclass": lambda: Renamed(10, 24), "Conv1D": conv1d, "parameter": lambda: Whole(10, 24),
         "convolution": lambda: nn.Conv1d(10, 24, 3, padding=1)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_gives_its_change_and_drops_what_it_is_given(kind):
    if kind == "parameter" and not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        pytest.skip("target_parameters needs PEFT 0.21")

    def made():
        torch.manual_seed(0)
        return nn.Sequential(KINDS[kind]()).double()

    def model_of(**options):
        own = config([], target_parameters=["0.weight"]) if kind == "parameter" else config(["0"], **options)
        torch.manual_seed(3)
        return get_peft_model(made(), own, autocast_adapter_dtype=False)

    model, plain, tokens = model_of(), made(), x().mT[None] if kind == "convolution" else x()
    change = model.base_model.model[0].get_delta_weight("default")
    assert change.shape == plain[0].weight.shape and float(change.norm()) > 0.1
    with torch.no_grad():
        plain[0].weight += change
    torch.testing.assert_close(model(tokens), plain(tokens))
    if kind != "parameter":
        dropping = model_of(dropout=0.3)
        torch.manual_seed(7)
        y = dropping(tokens)
        torch.manual_seed(7)
        dropped = nn.functional.dropout(tokens, 0.3)
        torch.testing.assert_close(y, made()(tokens) + plain(dropped) - made()(dropped))
    unloaded = model.merge_and_unload()
    assert type(unloaded[0]) is type(plain[0])
    torch.testing.assert_close(unloaded(tokens), plain(tokens))


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


# -- weighted combinations ---------------------------------------------------------------------------------------------
def three_adapters(**options):
    """Of other layers, sizes and formulas; "third" is a combination itself."""
    model = adapted(["0", "2"], **options)
    model.add_adapter("second", config(["0", "3"], outer_rank=1, inner_ratio=1.0, rotation="first_order"))
    model.base_model.add_weighted_adapter(["second", "default"], [0.5, 0.2], "third")
    return model


def deltas(model, name):
    """Layer -> W' - W0 of one adapter."""
    return {layer.adapters()[0].name: layer.get_delta_weight(name) for layer in layers(model)
            if name in layer.ssvdo_adapters}  # fmt: skip


def weighted(parts):
    found = {}
    for changes_, w in parts:
        for key, change in changes_.items():
            found[key] = found.get(key, 0) + w * change
    return found


def plain_with(changes_):
    model = base()
    with torch.no_grad():
        for key, change in changes_.items():
            model.get_submodule(key).weight += change
    return model


@needs_0_21
def test_a_linear_combination_is_exact_and_saved_whole(tmp_path):
    model = three_adapters()
    layers(model)[0].set_scale("default", 0.5)
    names, weights = ["default", "second", "third"], [0.7, -0.4, 2.0]
    want = weighted((deltas(model, n), w) for n, w in zip(names, weights, strict=True))
    model.add_weighted_adapter(names, weights, "sum")  # as PeftModel passes it on
    assert set(want) == {"0", "2", "3"} == set(deltas(model, "sum"))
    for key, change in deltas(model, "sum").items():
        torch.testing.assert_close(change, want[key])
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    model.set_adapter("sum")
    torch.testing.assert_close(model(x()), plain_with(want)(x()))
    model.delete_adapter("default")  # it keeps what it needs
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(base(), tmp_path / "sum", autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(x()), plain_with(want)(x()))
    for one in (model, loaded):
        one.merge_adapter()
        torch.testing.assert_close(one(x()), plain_with(want)(x()))
        one.unmerge_adapter()
    torch.testing.assert_close(loaded.merge_and_unload(safe_merge=True)(x()), plain_with(want)(x()))
    loss = model(x()).square().sum()
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".sum." in n)


@needs_0_21
def test_a_combination_beside_another_adapter_and_scaled():
    model = three_adapters()
    model.base_model.set_adapter(["default", "third"])
    want = weighted([(deltas(model, "default"), 1), (deltas(model, "third"), 1)])
    torch.testing.assert_close(model(x()), plain_with(want)(x()))
    for layer in layers(model):
        layer.set_scale("third", 0)
    torch.testing.assert_close(model(x()), plain_with(deltas(model, "default"))(x()))


@needs_0_21
def test_parameters_combine_to_one_rotation():
    model = adapted()
    model.add_adapter("second", config(["0", "3"]))
    layers(model)[0].set_scale("second", 0.5)
    model.add_weighted_adapter(["default", "second"], [0.6, -0.3], "sum", combination_type="parameters")
    assert {layer.of("sum")[0].name for layer in layers(model)} == {"0", "2", "3"}
    for layer in layers(model):
        of = {n: layer.of(n)[0] for n in layer.ssvdo_adapters}
        like = [torch.zeros_like(p) for p in of["sum"].trained]
        first, second = (list(of[n].trained) if n in of else like for n in ("default", "second"))
        scale = of["second"].scale if "second" in of else 1
        for got, a, b in zip(of["sum"].trained, first, second, strict=True):
            torch.testing.assert_close(got, 0.6 * a - 0.3 * scale * b)
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="parameters")
    want = model(x())
    model.set_adapter("copy")
    torch.testing.assert_close(model(x()), want)


@needs_0_21
def test_what_cannot_be_combined_is_refused_and_nothing_changes():
    model = three_adapters()
    names = [n for n, _ in model.named_modules()]
    add = model.base_model.add_weighted_adapter
    two, half = ["default", "second"], [0.5, 0.5]
    for args, words in (
        ((two, half, "new", "ties"), r"combination_type='ties' is one of LoRA's factors; .* as an exact LoRA"),
        ((two, half, "third"), "adapter_name='third' exists already"),
        ((two, [1], "new"), "adapters has 2 names, and weights 1 numbers"), (([], [], "new"), "0 names"),
        ((two, [1, float("inf")], "new"), "weights=inf is out of range"),
        ((["default", "fourth"], half, "new"), "Adapter fourth does not exist"),
        ((two, half, "new", "parameters"), r"inner_ratio is 0\.5 in 'default' and 1\.0 in 'second'"),
        ((["third"], [1], "new", "parameters"), "'third' is a combination itself"),
    ):
        with pytest.raises(ValueError, match=words):
            add(*args)
    with pytest.raises(TypeError, match=r"arguments \['density'\] are LoRA's"):
        add(two, half, "new", density=0.5)
    with torch.no_grad():
        layers(model)[1].base_layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="cannot be factorised"):
        add(two, half, "new")
    assert names == [n for n, _ in model.named_modules()] and set(model.peft_config) == {*two, "third"}
    saves = get_peft_model(base(), config(["0"], modules_to_save=["3"]))
    with pytest.raises(ValueError, match=r"adapter 'default' has modules_to_save="):
        saves.add_weighted_adapter(["default"], [1.0], "new")
    with pytest.raises(ValueError, match="combination has 3; allowed: what add_weighted_adapter writes"):
        SSVDOConfig(combination=[3])


@needs_0_21
def test_exact_loras_of_adapters_combine_by_loras_own_ways(tmp_path):
    model = adapted(["0"])
    model.add_adapter("second", config(["0"], outer_rank=1, inner_ratio=1.0))
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum")
    for name in ("default", "second"):
        model.set_adapter(name)
        peft.save_as_lora(tmp_path / name, model, rank=10, adapter_name=name)
    lora = PeftModel.from_pretrained(base(), tmp_path / "default", "default", autocast_adapter_dtype=False)
    lora.load_adapter(tmp_path / "second", "second", autocast_adapter_dtype=False)
    lora.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type="cat")
    lora.set_adapter("sum")
    model.set_adapter("sum")
    torch.testing.assert_close(lora(x()), model(x()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["weight", [3]])
def test_names_of_parameters_are_a_list(given):
    with pytest.raises(TypeError, match="`target_parameters` must be a list of strings or None"):
        SSVDOConfig(target_parameters=given)
