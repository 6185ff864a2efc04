"""Adapter files: round trips, every refusal, and atomic writing."""

import json
import struct

import pytest
import torch
from torch import nn

import ssvdo_kernels.checkpoint as checkpoint
from ssvdo_kernels import (
    BaseMismatchError,
    CheckpointError,
    SSVDOConfig,
    apply_ssvdo,
    load_ssvdo,
    merge_ssvdo,
    save_ssvdo,
)
from ssvdo_kernels.checkpoint import CONFIG_FILE, MODEL_FILE
from ssvdo_kernels.linear import PARAMETER_NAMES
from ssvdo_kernels.model import adapted_layers

CONFIG = SSVDOConfig(outer_rank=3)


def base(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.ModuleDict({"fc1": nn.Linear(6, 14), "fc2": nn.Linear(14, 6), "head": nn.Linear(6, 2)}).to(dtype)


def run(model, x):
    return model["head"](model["fc2"](torch.relu(model["fc1"](x))))


def trained(seed=0, config=CONFIG):
    model = apply_ssvdo(base(seed), config)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            for p in layer.adapter_parameters:
                p.normal_(0, 0.2)
    return model


def parameters(model):
    return {f"{n}.{p}": getattr(m, p).detach().clone() for n, m in adapted_layers(model) for p in PARAMETER_NAMES}


def rewrite(folder, change):
    """Applies change(header, tensors) to a saved file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = folder / MODEL_FILE
    with safe_open(file, "pt") as source:
        header = json.loads(source.metadata()["ssvdo"])
        tensors = {k: source.get_tensor(k) for k in source.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, file, {"ssvdo": json.dumps(header)})


@pytest.mark.parametrize("include_factors", [False, True])
@pytest.mark.parametrize("adapted_before", [False, True])
def test_round_trip_is_bit_identical(tmp_path, include_factors, adapted_before):
    model, x = trained(), torch.randn(5, 6)
    save_ssvdo(model, tmp_path / "a", include_factors=include_factors)
    fresh = apply_ssvdo(base(), CONFIG) if adapted_before else base()
    assert load_ssvdo(fresh, tmp_path / "a") is fresh
    assert torch.equal(run(fresh, x), run(model, x))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == set(parameters(fresh))
    human = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert human["layers"]["fc1"]["config"]["outer_rank"] == 3


def test_a_merged_model_saves_the_same_file(tmp_path):
    model = trained()
    save_ssvdo(model, tmp_path / "a")
    run(merge_ssvdo(model), torch.randn(2, 6))
    save_ssvdo(model, tmp_path / "b")
    assert (tmp_path / "a" / MODEL_FILE).read_bytes() == (tmp_path / "b" / MODEL_FILE).read_bytes()


def test_the_file_is_small_without_factors(tmp_path):
    torch.manual_seed(0)
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Linear(64, 256)}), SSVDOConfig(inner_ratio=0.25, outer_rank=4))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (save_ssvdo(model, tmp_path) / MODEL_FILE).stat().st_size
    assert 4 * numbers < size < 4 * numbers * 1.3 + 4096


@pytest.mark.parametrize("adapted_before", [False, True])
def test_other_base_weights_are_refused_and_nothing_changes(tmp_path, adapted_before):
    save_ssvdo(trained(), tmp_path)
    other = base()
    with torch.no_grad():
        other["fc2"].weight[0, 0] += 1e-6  # one entry, one part in 10^5
    if adapted_before:
        apply_ssvdo(other, CONFIG)
    before, kinds = other.state_dict(), [type(m) for m in other.modules()]
    copies = {k: v.clone() for k, v in before.items()}
    with pytest.raises(BaseMismatchError, match="layer fc2: trained on other base weights"):
        load_ssvdo(other, tmp_path)
    assert [type(m) for m in other.modules()] == kinds
    assert all(torch.equal(v, copies[k]) for k, v in other.state_dict().items())


def flip(layer):
    layer.inner_basis[:, 0].neg_()
    layer.outer_basis[:, 0].neg_()


def rotate(layer):
    c, s = 0.9, 0.19**0.5
    a, b = layer.inner_basis[:, 0].clone(), layer.inner_basis[:, 1].clone()
    layer.inner_basis[:, 0], layer.inner_basis[:, 1] = c * a + s * b, c * b - s * a


def other_complement(layer):
    layer.reflector[-1].neg_()


@pytest.mark.parametrize("change", [flip, rotate, other_complement])
def test_another_singular_basis_is_refused_with_the_remedy_and_the_remedy_works(tmp_path, change):
    model, x = trained(), torch.randn(3, 6)
    save_ssvdo(model, tmp_path / "small")
    save_ssvdo(model, tmp_path / "whole", include_factors=True)
    elsewhere = apply_ssvdo(base(), CONFIG)
    with torch.no_grad():
        change(elsewhere["fc1"])
    with pytest.raises(BaseMismatchError, match=r"layer fc1: the singular vectors.*include_factors=True"):
        load_ssvdo(elsewhere, tmp_path / "small")
    load_ssvdo(elsewhere, tmp_path / "whole")
    assert torch.equal(run(elsewhere, x), run(model, x))


def test_the_same_base_in_another_dtype_loads_with_factors_and_another_base_does_not(tmp_path):
    model = trained()
    save_ssvdo(model, tmp_path, include_factors=True)
    half = load_ssvdo(base(dtype=torch.bfloat16), tmp_path)
    x = torch.randn(3, 6)
    torch.testing.assert_close(run(half, x.bfloat16()).float(), run(model, x), rtol=0.05, atol=0.05)
    with pytest.raises(BaseMismatchError):
        load_ssvdo(base(seed=5, dtype=torch.bfloat16), tmp_path)


def test_rank_deficient_weights_round_trip(tmp_path):
    def deficient():
        model = base()
        with torch.no_grad():
            model["fc1"].weight[:, 1:] = model["fc1"].weight[:, :1]
        return model

    config = SSVDOConfig(inner_ratio=1.0, outer_rank=2)
    model = apply_ssvdo(deficient(), config)
    with torch.no_grad():
        model["fc1"].inner_scale.normal_()
    assert model["fc1"].null_basis.shape[1] == 5
    save_ssvdo(model, tmp_path, include_factors=True)
    x = torch.randn(3, 6)
    assert torch.equal(run(load_ssvdo(deficient(), tmp_path), x), run(model, x))


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_files_are_refused(tmp_path, cut):
    file = save_ssvdo(trained(), tmp_path) / MODEL_FILE
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load_ssvdo(base(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"not a tensor file at all" * 10,
                                     struct.pack("<Q", 1 << 60) + b"{}"])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / MODEL_FILE).write_bytes(content)
    with pytest.raises(CheckpointError):
        load_ssvdo(base(), tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda h, t: h.update(format="lora"), "not an SSVD-O adapter"),
    (lambda h, t: h.update(version=99), "format 99 is newer"),
    (lambda h, t: h.pop("layers"), "not an SSVD-O adapter"),
    (lambda h, t: h["layers"].update(fc1=3), "not an SSVD-O adapter"),
    (lambda h, t: h["layers"]["fc1"]["config"].update(tau=-1), "tau=-1"),
    (lambda h, t: h["layers"]["fc1"]["config"].update(colour=1), "colour"),
    (lambda h, t: t.pop("fc1.outer"), "fc1.outer is missing"),
    (lambda h, t: t.update({"fc9.outer": torch.zeros(1)}), "unknown tensors"),
    (lambda h, t: t.update({"fc1.outer": torch.zeros(2, 2)}), r"fc1.outer is \(2, 2\)"),
    (lambda h, t: t.update({"fc1.outer": torch.zeros(8, 3, dtype=torch.int32)}), "floating dtype"),
    (lambda h, t: t["fc1.inner_scale"].fill_(float("inf")), "non-finite"),
    (lambda h, t: h["layers"]["fc1"].update(in_features=7), "inner_rotation|fc1"),
])
def test_damaged_contents_are_refused_before_anything_changes(tmp_path, change, words):
    rewrite(save_ssvdo(trained(), tmp_path), change)
    model = base()
    with pytest.raises(CheckpointError, match=words):
        load_ssvdo(model, tmp_path)
    assert all(type(m) is not checkpoint.SSVDOLinear for m in model.modules())


def test_models_that_do_not_fit_are_refused(tmp_path):
    save_ssvdo(trained(), tmp_path)
    with pytest.raises(CheckpointError, match="layer fc1: the model has nothing of that name"):
        load_ssvdo(nn.ModuleDict({"other": nn.Linear(6, 14)}), tmp_path)
    with pytest.raises(CheckpointError, match="saved for a weight of 14 x 6, the model's is 15 x 6"):
        load_ssvdo(nn.ModuleDict({"fc1": nn.Linear(6, 15), "fc2": nn.Linear(15, 6)}), tmp_path)
    with pytest.raises(CheckpointError, match=r"adapted otherwise.*'tau': \(0.01, 0.1\)"):
        load_ssvdo(apply_ssvdo(base(), SSVDOConfig(outer_rank=3, tau=0.1)), tmp_path)
    more = apply_ssvdo(base(), SSVDOConfig(outer_rank=2, target_modules=["fc1", "fc2", "head"]))
    with pytest.raises(CheckpointError, match=r"holds no adapter for \['head'\]"):
        load_ssvdo(more, tmp_path)


def test_missing_files_and_plain_models(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ssvdo_model\.safetensors"):
        load_ssvdo(base(), tmp_path)
    with pytest.raises(ValueError, match="has no SSVDOLinear"):
        save_ssvdo(base(), tmp_path)


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    folder = save_ssvdo(trained(), tmp_path)
    old = (folder / MODEL_FILE).read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("ssvdo_kernels.factorize.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_ssvdo(trained(seed=3), tmp_path)
    assert (folder / MODEL_FILE).read_bytes() == old
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE, MODEL_FILE]
