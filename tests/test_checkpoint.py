"""Adapter files: round trips, every refusal, and atomic writing."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import ssvdo_kernels.checkpoint as checkpoint
from ssvdo_kernels import (
    BaseMismatchError,
    CheckpointError,
    SSVDOConfig,
    SSVDOLinear,
    apply_ssvdo,
    load_ssvdo,
    merge_ssvdo,
    save_ssvdo,
)
from ssvdo_kernels.checkpoint import CONFIG_FILE, MODEL_FILE
from ssvdo_kernels.factorize import Factors, factorize
from ssvdo_kernels.host import hosts

CONFIG = SSVDOConfig(outer_rank=3)


def base(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.ModuleDict({"fc1": nn.Linear(6, 14), "fc2": nn.Linear(14, 6), "head": nn.Linear(6, 2)}).to(dtype)


def run(model, x):
    return model["head"](model["fc2"](torch.relu(model["fc1"](x))))


def trained(seed=0, config=CONFIG, make=base):
    model = apply_ssvdo(make(seed), config)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for _, layer in hosts(model):
            for p in layer.adapter.trained:
                p.normal_(0, 0.2)
    return model


def trained_names(model):
    return {f"{n}.adapter.{p}" for n, m in hosts(model) for p, t in m.adapter.named_parameters() if t.requires_grad}


def contents(folder):
    """(header, tensors) of a saved file."""
    with safe_open(folder / MODEL_FILE, "pt") as source:
        return (json.loads(source.metadata()["ssvdo"]),
                {k: source.get_tensor(k) for k in source.keys()})  # noqa: SIM118


def rewrite(folder, change):
    """Applies change(header, tensors) to a saved file."""
    header, tensors = contents(folder)
    change(header, tensors)
    save_file(tensors, folder / MODEL_FILE, {"ssvdo": json.dumps(header)})


@pytest.mark.parametrize("include_basis", [False, True])
@pytest.mark.parametrize("adapted_before", [False, True])
def test_round_trip_is_bit_identical(tmp_path, include_basis, adapted_before):
    model, x = trained(), torch.randn(5, 6)
    save_ssvdo(model, tmp_path / "a", include_basis=include_basis)
    fresh = apply_ssvdo(base(), CONFIG) if adapted_before else base()
    assert load_ssvdo(fresh, tmp_path / "a") is fresh
    assert torch.equal(run(fresh, x), run(model, x))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == trained_names(fresh)
    assert len(trained_names(fresh)) == 6
    human = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert human["layers"]["fc1"]["config"]["outer_rank"] == 3


@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.DataParallel])
def test_a_layer_that_is_the_whole_model(tmp_path, wrap):
    def single():
        torch.manual_seed(0)
        return SSVDOLinear.from_linear(nn.Linear(6, 14), CONFIG)

    layer, x = single(), torch.randn(3, 6)
    with torch.no_grad():
        layer.adapter.outer.normal_(0, 0.2)
    fresh = wrap(single())
    assert not torch.equal(fresh(x), layer(x))
    assert torch.equal(load_ssvdo(fresh, save_ssvdo(wrap(layer), tmp_path))(x), layer(x))


def test_a_merged_model_saves_the_same_file(tmp_path):
    model = trained()
    save_ssvdo(model, tmp_path / "a")
    run(merge_ssvdo(model), torch.randn(2, 6))
    save_ssvdo(model, tmp_path / "b")
    assert (tmp_path / "a" / MODEL_FILE).read_bytes() == (tmp_path / "b" / MODEL_FILE).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_small_and_the_basis_adds_its_own_size(tmp_path, dtype):
    torch.manual_seed(0)
    config = SSVDOConfig(inner_ratio=0.25, outer_rank=4)
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Linear(64, 256)}).to(dtype), config)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (save_ssvdo(model, tmp_path, include_basis=False) / MODEL_FILE).stat().st_size
    assert 4 * numbers < size < 4 * numbers * 1.3 + 4096
    whole = (save_ssvdo(model, tmp_path) / MODEL_FILE).stat().st_size
    assert 0 <= whole - size - 64 * 16 * dtype.itemsize < 256  # V_k, d x max(k, l), and its place in the header


def square_and_narrow():
    torch.manual_seed(0)
    return nn.ModuleDict({"square": nn.Linear(8, 8), "one": nn.Linear(2, 12), "fc1": nn.Linear(6, 14)})


@pytest.mark.parametrize("include_basis", [False, True])
def test_square_layers_and_single_components_are_saved_without_empty_tensors(tmp_path, include_basis):
    config = SSVDOConfig(outer_rank=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match="lowered to min.* in 1 layers.*square \\(0\\)"):
        model = apply_ssvdo(square_and_narrow(), config)
    with torch.no_grad():
        for _, layer in hosts(model):
            for p in layer.adapter.trained:
                p.normal_(0, 0.2)
    _, tensors = contents(save_ssvdo(model, tmp_path, include_basis=include_basis))
    assert all(t.numel() for t in tensors.values())
    assert "square.outer" not in tensors and "one.inner_rotation" not in tensors  # l = 0; k = 1
    fresh = load_ssvdo(square_and_narrow(), tmp_path)
    for name, layer in hosts(fresh):
        assert torch.equal(layer.adapted_weight(), model[name].adapted_weight())
        assert not torch.equal(layer.adapted_weight(), layer.weight)
    assert fresh["square"].adapter.outer is None and fresh["one"].adapter.inner_rotation is None


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
    for basis in (layer.adapter.basis, layer.adapter.outer_basis):
        basis[:, 0].neg_()


def rotate(layer):
    c, s = 0.9, 0.19**0.5
    for basis in (layer.adapter.basis, layer.adapter.outer_basis):
        a, b = basis[:, 0].clone(), basis[:, 1].clone()
        basis[:, 0], basis[:, 1] = c * a + s * b, c * b - s * a


def equal_values(seed=0):
    """fc1 has singular values 2, 2, 2, 1, 1, 1: any rotation among the equal ones is as good a factorisation."""
    model = base(seed)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(model["fc1"].weight, full_matrices=False)
        model["fc1"].weight.copy_(u @ torch.diag(torch.tensor([2.0, 2, 2, 1, 1, 1])) @ v)
    return model


def adapt_elsewhere(model, change, monkeypatch, adapted_before):
    """`model`, which another machine's factorisation gives the changed basis in fc1."""
    if adapted_before:
        apply_ssvdo(model, CONFIG)
        with torch.no_grad():
            change(model["fc1"])
        return model

    def elsewhere(weight, shape, *, basis=None, **options):
        found = factorize(weight, shape, basis=basis, **options)
        if basis is not None or options["name"] != "fc1.weight":
            return found
        layer = SSVDOLinear(weight, None, found, shape, CONFIG)
        with torch.no_grad():
            change(layer)
        return Factors.of({n: t.detach() for n, t in layer.adapter.factors.tensors().items()})

    monkeypatch.setattr(checkpoint, "factorize", elsewhere)
    return model


@pytest.mark.parametrize("adapted_before", [False, True])
@pytest.mark.parametrize("change", [flip, rotate])
@pytest.mark.parametrize("make", [base, equal_values])
def test_another_singular_basis_is_refused_with_the_remedy_and_the_remedy_works(
    tmp_path, monkeypatch, make, change, adapted_before
):
    model, x = trained(make=make), torch.randn(3, 6)
    save_ssvdo(model, tmp_path / "small", include_basis=False)
    save_ssvdo(model, tmp_path / "whole")
    elsewhere = adapt_elsewhere(make(), change, monkeypatch, adapted_before)
    with pytest.raises(BaseMismatchError, match=r"layer fc1: the singular vectors.*include_basis=True"):
        load_ssvdo(elsewhere, tmp_path / "small")
    assert isinstance(elsewhere["fc1"], SSVDOLinear) == adapted_before
    load_ssvdo(elsewhere, tmp_path / "whole")
    torch.testing.assert_close(run(elsewhere, x), run(model, x), rtol=1e-5, atol=1e-6)


def change_of(layer):
    """W' - W0 of a tall layer in the dtype of the work, without the rounding of W' to a half type."""
    p = layer.adapter.prepared(layer.base())
    A, V = layer.weight.detach().to(p.dtype), p.basis.to(p.dtype)
    return (torch.cat([A @ V, p.columns], 1) @ p.mixer @ V.mT).double()


DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_an_adapter_moves_between_dtypes_of_its_base(tmp_path, source, target):
    """There and back, within 1% of what it changes; without the basis it is right as well, or refused."""
    config, deviations = SSVDOConfig(inner_ratio=0.5, outer_rank=8, target_modules=("0",)), {}

    def plain(dtype):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(48, 144)).to(source).to(dtype)  # the numbers of the source, in any dtype

    for include_basis in (True, False):
        model = apply_ssvdo(plain(source), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model[0].adapter.trained:
                p.normal_(0, 0.1)
        want, folder = change_of(model[0]), tmp_path / str(include_basis)
        assert float(want.norm()) > 0.1 * float(model[0].weight.norm())
        for step, dtype in enumerate((target, source)):
            try:
                save_ssvdo(model, folder, include_basis=include_basis)
                model = load_ssvdo(plain(dtype), folder)
            except BaseMismatchError:
                assert not include_basis and source != target
                break
            assert model[0].weight.dtype == dtype
            off = float((change_of(model[0]) - want).norm() / want.norm())
            deviations[include_basis, step] = off
            assert off <= (0.01 if source != target else 0.0), deviations
    assert {(True, 0), (True, 1)} <= set(deviations)


def test_near_equal_singular_values_in_another_dtype_need_the_basis(tmp_path):
    """Rounding W0 to bfloat16 mixes vectors whose values are nearer than that: the file's basis stays the meaning."""
    def plain(dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 144))
        with torch.no_grad():
            u, _, v = torch.linalg.svd(model[0].weight.double(), full_matrices=False)
            model[0].weight.copy_(u @ torch.diag(1 + 1e-4 * torch.linspace(1, 0, 48).double()) @ v)
        return model.to(dtype)

    model = apply_ssvdo(plain(torch.float32), SSVDOConfig(outer_rank=8, target_modules=("0",)))
    with torch.no_grad():
        for p in model[0].adapter.trained:
            p.normal_(0, 0.1)
    want = change_of(model[0])
    with pytest.raises(BaseMismatchError, match="include_basis=True"):
        load_ssvdo(plain(torch.bfloat16), save_ssvdo(model, tmp_path / "small", include_basis=False))
    half = load_ssvdo(plain(torch.bfloat16), save_ssvdo(model, tmp_path / "whole"))
    assert float((change_of(half[0]) - want).norm() / want.norm()) <= 0.01
    back = load_ssvdo(plain(torch.float32), save_ssvdo(half, tmp_path / "half"))
    assert float((change_of(back[0]) - want).norm() / want.norm()) <= 0.01


def test_another_base_in_another_dtype_is_refused(tmp_path):
    save_ssvdo(trained(), tmp_path)
    x = torch.randn(3, 6)
    half = load_ssvdo(base(dtype=torch.bfloat16), tmp_path)
    torch.testing.assert_close(run(half, x.bfloat16()).float(), run(trained(), x), rtol=0.05, atol=0.05)
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
        model["fc1"].adapter.inner_scale.normal_()
    assert model["fc1"].adapter.null_basis.shape[1] == 5
    save_ssvdo(model, tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(run(load_ssvdo(deficient(), tmp_path), x), run(model, x))


def deficient():
    model = base()
    with torch.no_grad():
        model["fc1"].weight[:, 2:] = model["fc1"].weight[:, :2].repeat(1, 2)  # rank 2 of 6
    return model


def other_null_columns(layer):
    """As another LAPACK gives them: N is any basis of what W0 does not reach."""
    N = layer.adapter.null_basis
    turn = torch.linalg.qr(torch.randn(N.shape[0], N.shape[1])).Q
    reached = torch.linalg.qr(layer.weight[:, :2]).Q
    N.copy_(torch.linalg.qr(turn - reached @ (reached.mT @ turn)).Q)


@pytest.mark.parametrize("adapted_before", [False, True])
def test_null_columns_that_come_out_otherwise_are_noticed_and_the_file_brings_its_own(
    tmp_path, monkeypatch, adapted_before
):
    config = SSVDOConfig(inner_ratio=1.0, outer_rank=3)
    model, x = trained(config=config, make=lambda seed: deficient()), torch.randn(3, 6)
    save_ssvdo(model, tmp_path / "small", include_basis=False)
    save_ssvdo(model, tmp_path / "whole")
    assert contents(tmp_path / "whole")[1]["fc1.null_basis"].shape == (14, 4)
    monkeypatch.setattr("test_checkpoint.CONFIG", config)
    elsewhere = adapt_elsewhere(deficient(), other_null_columns, monkeypatch, adapted_before)
    with pytest.raises(BaseMismatchError, match=r"layer fc1: the singular vectors.*include_basis=True"):
        load_ssvdo(elsewhere, tmp_path / "small")
    load_ssvdo(elsewhere, tmp_path / "whole")
    torch.testing.assert_close(run(elsewhere, x), run(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_weak_components_move_between_dtypes_with_the_columns_of_the_file(tmp_path, source, target):
    """Half types hold as N what float32 divides by (S_i <= S_0 / 32): N goes along, more columns or fewer."""
    def plain(dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 144))
        with torch.no_grad():
            u, _, v = torch.linalg.svd(model[0].weight.double(), full_matrices=False)
            model[0].weight.copy_(u @ torch.diag(torch.logspace(0, -2.5, 48).double()) @ v)
        return model.to(source).to(dtype)

    model = apply_ssvdo(plain(source), SSVDOConfig(inner_ratio=1.0, outer_rank=8, target_modules=("0",)))
    torch.manual_seed(1)
    with torch.no_grad():
        model[0].adapter.inner_rotation.normal_(0, 0.02)
        model[0].adapter.inner_scale.normal_(0, 0.05)
        model[0].adapter.outer.normal_(0, 0.1)
    want = change_of(model[0])
    assert (model[0].adapter.null_basis is None) == (source == torch.float32)
    moved = load_ssvdo(plain(target), save_ssvdo(model, tmp_path))
    assert moved[0].weight.dtype == target
    off = float((change_of(moved[0]) - want).norm() / want.norm())
    assert off <= (0.01 if source != target else 0.0), off


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
    (lambda h, t: h.pop("include_basis"), "not an SSVD-O adapter"),
    (lambda h, t: t.pop("fc1.outer"), "fc1.outer is missing"),
    (lambda h, t: t.pop("fc1.basis"), "fc1.basis is missing"),
    (lambda h, t: h.update(include_basis=False), "unknown tensors"),
    (lambda h, t: t.update({"fc1.basis": t["fc1.basis"][:, :2].clone()}), r"fc1.basis is \(6, 2\)"),
    (lambda h, t: t.update({"fc1.basis": t["fc1.basis"].int()}), "floating dtype"),
    (lambda h, t: t["fc1.basis"][0, 0].fill_(float("nan")), "fc1.basis has non-finite"),
    (lambda h, t: t["fc1.basis"].zero_(), "fc1.basis is not the basis"),
    (lambda h, t: t["fc1.basis"][:, 0].neg_(), "fc1.basis is not the basis"),
    (lambda h, t: t.update({"fc1.basis": torch.randn(6, 3)}), "fc1.basis is not the basis"),
    (lambda h, t: t.update({"fc1.basis": t["fc2.basis"].clone()}), "fc1.basis is not the basis"),
    (lambda h, t: t.update({"fc1.inner_rotation": torch.zeros(0)}), r"fc1.inner_rotation is \(0,\)"),
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
    assert all(type(m) is not SSVDOLinear for m in model.modules())


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

    monkeypatch.setattr("ssvdo_kernels.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_ssvdo(trained(seed=3), tmp_path)
    assert (folder / MODEL_FILE).read_bytes() == old
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE, MODEL_FILE]
