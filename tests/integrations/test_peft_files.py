"""Adapters of PEFT's models on disk, on another base, and exchanged in place."""

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft_models import MLP, adapt, adapters_of, base, cases, pair, same, train, x_of
from safetensors.torch import load_file

import ssvdo_kernels.integrations.peft as integration
from ssvdo_kernels import BaseMismatchError, refactorize_ssvdo
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.factorize import FACTOR_NAMES
from ssvdo_kernels.integrations.peft import Linear, SSVDOConfig


@cases
def test_save_and_load(options, tmp_path):
    model = adapt(base(), init_weights=False, **options)
    train(model, x_of())
    want = model(x_of())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "SSVDO" and config["outer_rank"] == options.get("outer_rank", 3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors and all("ssvdo_" in name or "head" in name for name in tensors)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(loaded(x_of()), want)
        assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())
    renamed = PeftModel.from_pretrained(base(), tmp_path, adapter_name="other")
    assert torch.equal(renamed(x_of()), want)


@cases
def test_the_trained_numbers_and_what_they_are_of_are_saved(options):
    model, x = adapt(base(), init_weights=False, **options), x_of()
    found = adapters_of(model)
    marks = {"base_digest", "base_sketch", "basis_sketch", "basis", "formula"}
    ours = {f"{n}.ssvdo_adapters.{name}.{part}" for n, name, a in found
            for part in (*marks, *(p for p, _ in a.named_parameters()))}  # fmt: skip
    assert {k for k in model.state_dict() if "ssvdo_" in k} == ours
    assert {k.rsplit(".", 1)[1] for k in ours} <= {*marks, *PARAMETER_NAMES} and len(ours) >= 6 * len(found)
    saved = get_peft_model_state_dict(model)
    assert {k for k in saved if "ssvdo_" in k} == {k.replace(".default.", ".") for k in ours}
    factors = {f"{n}.{part}": t for n, _, a in found for part, t in a.factors.tensors().items()}
    assert {k.rsplit(".", 1)[1] for k in factors} <= set(FACTOR_NAMES) and len(factors) >= 2 * len(found)
    parameters, before = {id(p) for p in model.parameters()}, {k: t.clone() for k, t in factors.items()}
    assert not any(id(t) in parameters or t.requires_grad for t in factors.values())
    train(model, x)
    assert all(torch.equal(t, before[k]) for k, t in factors.items())
    other = adapt(base(), **options)
    assert not torch.equal(other(x), model(x))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    state = model.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in other.state_dict().items()) and same(other(x), model(x))


@pytest.mark.parametrize("adapter", ["outer", "basis", "inner_scale", "ssvdo_adapters"])
def test_names_that_hold_our_names_are_saved_and_loaded(adapter, tmp_path):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(
            OrderedDict(outer=nn.Linear(10, 24), router=nn.Sequential(OrderedDict(inner_scale=nn.Linear(24, 8)))))

    model = adapt(plain(), adapter, target_modules=["outer", "inner_scale"], init_weights=False)
    want = model(x_of())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain(), tmp_path / adapter, adapter_name=adapter)
    assert torch.equal(loaded(x_of()), want) and not torch.equal(want, plain()(x_of()))
    renamed = PeftModel.from_pretrained(plain(), tmp_path / adapter)
    assert torch.equal(renamed(x_of()), want)


def test_adapters_of_other_names_are_saved_side_by_side(tmp_path):
    model = adapt(base(), "one", target_modules=["lin0"], init_weights=False)
    model.add_adapter("two", SSVDOConfig(target_modules=["lin1"], outer_rank=1, init_weights=False))
    model.set_adapter("two")
    want = model(x_of())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "one", adapter_name="one")
    loaded.load_adapter(tmp_path / "two", adapter_name="two")
    loaded.set_adapter("two")
    assert torch.equal(loaded(x_of()), want)


def learnt(model, source, dtype):
    """What the adapter adds to the outputs."""
    torch.manual_seed(7)
    x = torch.randn(64, 48)
    with torch.no_grad():
        return model(x.to(dtype)).double() - pair(source, dtype)(x.to(dtype)).double()


def saved_pair(folder, source, **options):
    torch.manual_seed(1)
    config = peft.SSVDOConfig(target_modules=["fc1", "fc2"], outer_rank=8, **options)
    model = get_peft_model(pair(source, source), config)
    with torch.no_grad():
        for _, _, adapter in adapters_of(model):
            for p in adapter.trained:
                p.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_an_adapter_moves_to_the_same_base_in_another_dtype(tmp_path, source, target):
    """Within 1% of what was learnt, and the roundings of outputs of which that is a part."""
    model = saved_pair(tmp_path, source)
    want = learnt(model, source, source)
    moved = PeftModel.from_pretrained(pair(source, target), str(tmp_path))
    off = float((learnt(moved, source, target) - want).norm() / want.norm())
    assert float(want.norm()) > 10
    assert off <= (0.0 if source == target else 0.01 + 4 * max(torch.finfo(t).eps for t in (source, target))), off
    back = get_peft_model_state_dict(moved)  # saved there, it is the same adapter
    assert torch.equal(back["base_model.model.fc1.ssvdo_adapters.outer"],
                       get_peft_model_state_dict(model)["base_model.model.fc1.ssvdo_adapters.outer"])  # fmt: skip


def test_without_its_basis_an_adapter_is_refused_where_the_basis_comes_out_otherwise(tmp_path):
    saved_pair(tmp_path, torch.bfloat16, include_basis=False)
    assert not any(k.endswith(".basis") for k in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(BaseMismatchError, match=r"fc1: the singular vectors.*include_basis=True"):
        PeftModel.from_pretrained(pair(torch.float32, torch.float32), str(tmp_path))  # not rounded


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("make", [lambda: pair(torch.float32, torch.float32, seed=1),
                                  lambda: pair(torch.float32, torch.bfloat16, seed=1)], ids=["seed", "dtype"])
def test_another_base_is_refused(tmp_path, make, low):
    saved_pair(tmp_path, torch.float32)
    with pytest.raises(BaseMismatchError, match="fc1: trained on other base weights"):
        PeftModel.from_pretrained(make(), str(tmp_path), low_cpu_mem_usage=low)


def test_a_refused_base_changes_nothing(tmp_path):
    saved_pair(tmp_path, torch.float32)
    base = pair(torch.float32, torch.float32)
    with torch.no_grad():
        base.fc2.weight[0, 0] += 1e-5  # the last layer alone is another
    model = get_peft_model(base, peft.SSVDOConfig(target_modules=["fc1", "fc2"], outer_rank=8))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(BaseMismatchError, match="fc2: trained on other base weights"):
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_base_weights_loaded_late_are_noticed():
    model = get_peft_model(pair(torch.float32, torch.float32), peft.SSVDOConfig(target_modules=["fc1"], outer_rank=8))
    x = torch.randn(3, 48)
    model(x)
    model.base_model.model.fc1.base_layer.load_state_dict(pair(torch.float32, torch.float32, 3).fc1.state_dict())
    with pytest.raises(RuntimeError, match="fc1: weight is no longer the one that was factorised"):
        model(x)
    refactorize_ssvdo(model)
    other = pair(torch.float32, torch.float32)
    other.fc1.load_state_dict(pair(torch.float32, torch.float32, 3).fc1.state_dict())
    assert same(model(x), other(x))  # init_angle 0 starts at the base model, whichever


def test_a_base_that_is_loaded_while_merged_is_not_thrown_away():
    model = adapt(base(), target_modules=["lin0"], outer_rank=2, init_weights=False)
    layer = model.base_model.model.lin0
    model.merge_adapter()
    with torch.no_grad():
        layer.base_layer.weight.add_(0.1)
    with pytest.raises(RuntimeError, match="lin0: the merged weight is no longer what was merged"):
        model.unmerge_adapter()
    with torch.no_grad():
        layer.base_layer.weight.sub_(0.1)
    model.unmerge_adapter()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_base_on_the_meta_device_is_factorised_when_its_weights_arrive(with_adapter, tmp_path):
    trained = adapt(base(), target_modules=["lin0", "lin1"], outer_rank=2, init_weights=False)
    trained.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = MLP()
    if with_adapter:
        model = PeftModel.from_pretrained(empty, tmp_path, low_cpu_mem_usage=True)
    else:
        model = get_peft_model(empty, SSVDOConfig(target_modules=["lin0", "lin1"], outer_rank=2))
    model.eval()
    with pytest.raises(RuntimeError, match="lin0: weight is on the meta device; load the base model first"):
        model(x_of())
    weights = {k.replace("lin0.", "lin0.base_layer.").replace("lin1.", "lin1.base_layer."): v
               for k, v in base().state_dict().items()}  # fmt: skip
    model.base_model.model.load_state_dict(weights, strict=False, assign=True)
    if with_adapter:
        with pytest.raises(RuntimeError, match="lin0: the adapter was loaded while its base was on the meta device"):
            model(x_of())
        set_peft_model_state_dict(model, peft.load_peft_weights(str(tmp_path)), low_cpu_mem_usage=True)
    want = trained.eval() if with_adapter else base().eval()
    torch.testing.assert_close(model(x_of()), want(x_of()))
    model.merge_adapter()
    torch.testing.assert_close(model(x_of()), want(x_of()), atol=1e-4, rtol=1e-4)


def test_an_adapter_that_is_loaded_while_merged_is_merged(tmp_path):
    other = adapt(base(), target_modules=["lin0", "lin1"], outer_rank=2, init_weights=False).eval()
    other.save_pretrained(tmp_path)
    model = adapt(base(), target_modules=["lin0", "lin1"], outer_rank=2).eval()
    model.merge_adapter()
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(x_of()), other(x_of()), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x_of()), other(x_of()))
    with model.disable_adapter():
        assert torch.equal(model(x_of()), base().eval()(x_of()))


def test_layers_are_found_again_from_a_state_dict():
    trained = adapt(base(), target_modules=["lin0", "lin1"], init_weights=False).eval()
    state = {k.removeprefix("base_model.model."): t for k, t in get_peft_model_state_dict(trained).items()}
    for low in (False, True):
        model = base()
        with pytest.warns(RuntimeWarning, match="state_dict contained these additional target modules"):
            peft.inject_adapter_in_model(SSVDOConfig(target_modules=["lin0"], outer_rank=3), model, state_dict=state,
                                         low_cpu_mem_usage=low)  # fmt: skip
        assert isinstance(model.lin1, Linear)
        set_peft_model_state_dict(model, state, low_cpu_mem_usage=low)
        torch.testing.assert_close(model(x_of()), trained(x_of()))


def test_the_model_card_says_what_to_import(tmp_path):
    model = adapt(base(), target_modules=["lin0"])
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert card.count("import ssvdo_kernels.integrations.peft\nfrom peft import PeftModel") == 1


def trained(folder=None, lr=0.01, **options):
    model = adapt(base(), **{"target_modules": ["lin0", "lin1"], "init_angle": 0.1, **options})
    train(model, x_of(), lr=lr)
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_is_exchanged_in_place(compiled, tmp_path):
    other = trained(tmp_path, lr=0.05)
    model = trained()
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    graphs = []
    run = torch.compile(model, backend=lambda graph, _: graphs.append(1) or graph.forward) if compiled else model
    with torch.no_grad():
        assert not torch.allclose(run(x_of()), other(x_of()), atol=1e-3)
        built = len(graphs)
        integration.hotswap_adapter(run, tmp_path)
        torch.testing.assert_close(run(x_of()), other(x_of()))
    assert len(graphs) == built and (built > 0) == compiled
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places


def test_what_cannot_be_exchanged_is_refused_and_changes_nothing(tmp_path):
    model = trained()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    for name, options, words in (
        ("layers", {"target_modules": ["lin0"]}, "does not fit the adapter 'default'"),
        ("sizes", {"outer_rank": 2}, r"does not fit.*ssvdo_adapters\.outer"),
        ("formula", {"rotation": "first_order"}, "trained with another formula"),
    ):
        trained(tmp_path / name, **options)
        with pytest.raises(ValueError, match=words):
            integration.hotswap_adapter(model, tmp_path / name)
    foreign = adapt(base(seed=1), target_modules=["lin0", "lin1"], init_angle=0.1)
    foreign.save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatchError):
        integration.hotswap_adapter(model, tmp_path / "base")
    get_peft_model(base(), peft.LoHaConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "loha")
    with pytest.raises(ValueError, match=r"holds an adapter of .*LOHA"):
        integration.hotswap_adapter(model, tmp_path / "loha")
    with pytest.raises(ValueError, match=r"adapter_name='other' is no SSVD-O adapter.*\['default'\]"):
        integration.hotswap_adapter(model, tmp_path / "base", "other")
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    trained(tmp_path / "same")
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged"):
        integration.hotswap_adapter(model, tmp_path / "same")
