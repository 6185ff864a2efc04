"""Adapters as LoRA: exact at rank max(k, l), optimal below it, in files that PEFT loads."""

import json

import pytest
import torch
from helpers import make_layer, randomise_all
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, load_ssvdo, save_lora, save_ssvdo, to_lora
from ssvdo_kernels.lora import lora_of

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({"fc1": nn.Linear(8, 24), "act": nn.GELU(), "fc2": nn.Linear(24, 8)}).to(dtype)


def run(model, x=X):
    return model["fc2"](model["act"](model["fc1"](x)))


def adapted(dtype=torch.float32):
    torch.manual_seed(2)
    return randomise_all(apply_ssvdo(net(dtype), SSVDOConfig(outer_rank=3, inner_ratio=0.6)))


@pytest.mark.parametrize("options", [{}, {"outer_rank": 0}, {"outer_rank": 6, "inner_ratio": 0.3},
                                     {"rotation": "first_order"}, {"outer": "additive"}])  # fmt: skip
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24), (8, 8)])
def test_at_full_rank_it_is_exact(m, n, options):
    own = {"outer_rank": 0 if m == n else 3, **({} if m == n and "outer_rank" in options else options)}
    layer = make_layer(m, n, **own)
    lora = lora_of(layer.adapter, layer.base())
    assert lora.rank == layer.adapter.shape.width and lora.error == 0.0
    torch.testing.assert_close(layer.weight + lora.B @ lora.A, layer.adapted_weight(), rtol=1e-11, atol=1e-11)


def test_of_a_rank_deficient_weight_it_is_exact_too():
    layer = make_layer(24, 8, outer_rank=3, rank=4, inner_ratio=1.0)
    lora = lora_of(layer.adapter, layer.base())
    torch.testing.assert_close(layer.weight + lora.B @ lora.A, layer.adapted_weight(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_below_it_is_the_best_of_its_rank_and_says_its_error(m, n, rank):
    layer = make_layer(m, n, outer_rank=4)
    lora = lora_of(layer.adapter, layer.base(), rank)
    change = layer.adapted_weight() - layer.weight.detach()
    s = torch.linalg.svdvals(change)
    best = float(s[rank:].norm() / s.norm())
    assert lora.rank == rank and lora.error == pytest.approx(best, rel=1e-9)
    assert float((change - lora.B @ lora.A).norm() / change.norm()) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_folder_is_a_lora_of_peft(tmp_path, dtype, tolerance):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = adapted(dtype)
    x = X.to(dtype)
    found = save_lora(model, tmp_path, base_model="some/model")
    assert {name: lora.error for name, lora in found.items()} == {"fc1": 0.0, "fc2": 0.0}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["base_model_name_or_path"] == "some/model"
    loaded = peft.PeftModel.from_pretrained(net(dtype), tmp_path)
    torch.testing.assert_close(run(loaded.base_model.model, x), run(model, x), rtol=tolerance, atol=tolerance)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(run(merged, x), run(model, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_folder_is_what_vllm_reads(tmp_path, rank):
    """Its loader's demands (vllm/lora, 0.18): names, shapes, one rank, and configurations that it does not refuse."""
    model = adapted()
    save_lora(model, tmp_path, rank, base_model="some/model")
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(
        tmp_path / "adapter_model.safetensors")  # fmt: skip
    assert {"r", "lora_alpha", "target_modules"} <= config.keys() and config["lora_alpha"] == config["r"] == (rank or 4)
    assert config["bias"] == "none" and not config.get("modules_to_save") and not config["use_dora"]
    for name in ("fc1", "fc2"):  # the last part of a name is looked up among the served model's layers
        out_features, in_features = model[name].weight.shape
        A, B = (tensors.pop(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        assert A.shape == (config["r"], in_features) and B.shape == (out_features, config["r"])
    assert not tensors


def test_it_is_swapped_into_another_lora_and_weighed():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import tempfile

    from peft.utils.hotswap import hotswap_adapter

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        model = adapted()
        save_lora(model, one)
        save_lora(randomise_all(apply_ssvdo(net(), SSVDOConfig(outer_rank=3, inner_ratio=0.6))), other)
        loaded = peft.PeftModel.from_pretrained(net(), other)
        hotswap_adapter(loaded, one, adapter_name="default")
        torch.testing.assert_close(run(loaded.base_model.model), run(model), rtol=1e-5, atol=1e-5)
        loaded.add_weighted_adapter(["default"], [0.5], "weighed", combination_type="svd")
        loaded.set_adapter("weighed")
        half = loaded.base_model.model["fc1"].get_delta_weight("weighed")
        want = 0.5 * (model["fc1"].adapted_weight() - model["fc1"].weight)
        torch.testing.assert_close(half, want, rtol=1e-4, atol=1e-5)


def test_conv1d_layers_and_layers_of_several_ranks(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def plain():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc1": Conv1D(24, 8), "act": nn.GELU(), "fc2": Conv1D(12, 24)})

    model = randomise_all(apply_ssvdo(plain(), SSVDOConfig(outer_rank=3)))
    assert len({lora.rank for lora in save_lora(model, tmp_path).values()}) == 2
    loaded = peft.PeftModel.from_pretrained(plain(), tmp_path)
    torch.testing.assert_close(run(loaded.base_model.model), run(model), rtol=1e-5, atol=1e-5)


def test_what_has_no_such_lora_is_refused():
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Conv1d(4, 8, 3)}), SSVDOConfig(outer_rank=2))
    with pytest.raises(TypeError, match="fc1 is a SSVDOLayer, whose LoRA is of another form"):
        to_lora(model)
    for rank in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"rank=.* is out of range; allowed: None \(exact\)"):
            to_lora(adapted(), rank)


def test_a_loaded_adapter_exports_the_same(tmp_path):
    model = adapted()
    again = load_ssvdo(net(), save_ssvdo(model, tmp_path))
    for name, lora in to_lora(model).items():
        torch.testing.assert_close(to_lora(again)[name].B, lora.B)


@pytest.mark.parametrize("rank", [4, 2])
def test_pefts_own_conversion(tmp_path, rank):
    peft = pytest.importorskip("peft", minversion="0.21", reason="convert_to_lora came with PEFT 0.19")
    import ssvdo_kernels.integrations.peft  # noqa: F401

    config = peft.SSVDOConfig(target_modules=["fc1", "fc2"], outer_rank=3, inner_ratio=0.6, init_weights=False)
    model = peft.get_peft_model(net(), config)
    assert model.supports_lora_conversion()
    peft.save_as_lora(tmp_path, model, rank=rank)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path)
    close = float((run(loaded.base_model.model) - run(model.base_model.model)).abs().max())
    assert (close < 1e-4) == (rank == 4)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_command_reads_files_alone(tmp_path, kind, rank, capsys):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from safetensors.torch import save_file

    from ssvdo_kernels.cli import main

    base, model = net(), adapted()
    (tmp_path / "base").mkdir()
    if kind == "bin":
        torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    else:
        save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    save_ssvdo(model, tmp_path / "adapter")
    arguments = [str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "lora")]
    assert main(["export-lora", *arguments, *(["--rank", str(rank)] if rank else [])]) == 0
    assert ("exact" in capsys.readouterr().out) == (rank is None)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "lora").base_model.model
    for name, lora in to_lora(model, rank).items():
        torch.testing.assert_close(loaded[name].get_delta_weight("default"), lora.B @ lora.A, rtol=1e-5, atol=1e-6)
    assert main(["export-lora", *arguments, "--rank", "0"]) == 1
    assert "rank=0 is out of range" in capsys.readouterr().err
