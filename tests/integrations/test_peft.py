"""PEFT's own cases for custom models (its tests/test_custom_models.py and testing_common.py), rewritten for SSVD-O."""

import copy
import json
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file

import ssvdo_kernels.integrations.peft as integration
from ssvdo_kernels import BaseMismatchError, gradient_accumulation, orthogonality, refactorize_ssvdo, reference
from ssvdo_kernels import SSVDOConfig as CoreConfig
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.factorize import FACTOR_NAMES
from ssvdo_kernels.integrations.peft import Linear, SSVDOConfig

needs_0_21 = pytest.mark.skipif(not hasattr(BaseTuner, "_remove_adapter_name_from_key"),
                                reason="PEFT before 0.21 does not load again what it saves of these")  # fmt: skip


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 24, bias=bias)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(24, 8, bias=bias)
        self.square = nn.Linear(8, 8, bias=bias)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.square(self.lin1(self.relu(self.lin0(x)))))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 20), "down": nn.Linear(20, 8)}) for _ in range(4))

    def forward(self, x):
        for layer in self.body.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return x


CASES = {
    "lin0": {"target_modules": "lin0"},
    "list": {"target_modules": ["lin0", "lin1"]},
    "regex": {"target_modules": r"lin\d"},
    "all-linear": {"target_modules": "all-linear"},
    "square": {"target_modules": ["square"]},
    "first order": {"target_modules": ["lin0", "lin1"], "rotation": "first_order", "outer": "additive"},
    "ssvd": {"target_modules": ["lin0"], "outer_rank": 0},
    "modules_to_save": {"target_modules": ["lin0"], "modules_to_save": ["head"]},
    "angle": {"target_modules": ["lin0", "lin1"], "init_angle": 0.1},
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())


def base(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return MLP().to(dtype).eval()


def adapt(model, adapter="default", **options):
    options.setdefault("outer_rank", 3)
    return get_peft_model(model, SSVDOConfig(**options), adapter_name=adapter)


def x_of(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(7, 10).to(dtype)


def same(a, b):
    """To rounding: the planner may take another form of the layer once more tokens have passed."""
    return torch.allclose(a, b, atol=1e-6)


def train(model, x, steps=3, lr=0.01):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()


@cases
def test_starts_at_the_base_model_and_trains_the_adapter_alone(options):
    plain, model = base(), adapt(base(), **options)
    if "init_angle" not in options:
        assert torch.allclose(model(x_of()), plain(x_of()), atol=1e-5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, x_of())
    for name, p in model.named_parameters():
        trained = "ssvdo_" in name or "modules_to_save" in name
        assert p.requires_grad == trained, name
        if trained and p.numel():
            assert not torch.equal(p, before[name]), name
        elif not trained:
            assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_is_the_equations(dtype):
    model = adapt(base(dtype), target_modules=["lin0"], init_weights=False)
    layer = model.base_model.model.lin0
    adapter = layer.ssvdo_adapters["default"]
    x = x_of(dtype)
    wide = [p.detach().double() for p in adapter.trained]
    with torch.no_grad():
        want = reference.linear(x.double(), layer.weight.double(), layer.bias.double(), *wide, config=adapter.config)
    tolerance = (64 if dtype.itemsize > 2 else 8) * torch.finfo(dtype).eps * float(want.abs().max())
    assert float((layer(x).double() - want).detach().abs().max()) <= tolerance
    assert float((want - layer.base_layer(x).double()).abs().max()) > 100 * tolerance or dtype.itemsize == 2


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


def adapters_of(model):
    """(layer's name, adapter's name, adapter) of all."""
    return [(n, name, adapter) for n, m in model.named_modules() if isinstance(m, Linear)
            for name, adapter in m.ssvdo_adapters.items()]  # fmt: skip


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


@cases
def test_merging(options):
    model = adapt(base(), init_weights=False, **options)
    x, plain = x_of(), base()
    want, bits = model(x), model.base_model.model.lin0.weight.detach().clone()
    model.merge_adapter()
    assert torch.allclose(model(x), want, atol=1e-4)
    model.merge_adapter()  # once merged, merging again changes nothing
    assert torch.allclose(model(x), want, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.lin0.weight, bits) and same(model(x), want)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert torch.allclose(merged(x), want, atol=1e-4)
    assert not any(isinstance(m, Linear) for m in merged.modules())
    assert {type(m) for m in merged.modules()} == {type(m) for m in plain.modules()}
    unloaded = model.unload()
    assert torch.equal(unloaded.lin0.weight, plain.lin0.weight)
    if "modules_to_save" not in options:
        assert torch.equal(unloaded(x), plain(x))


def test_safe_merge_of_a_broken_adapter_changes_nothing():
    model = adapt(base(), target_modules=["lin0"])
    layer, bits = model.base_model.model.lin0, base().lin0.weight
    with torch.no_grad():
        layer.ssvdo_adapters["default"].inner_scale[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.weight, bits) and not layer.merged


def test_a_merge_that_fails_leaves_every_layer_as_it_was():
    model = adapt(base(), target_modules=["lin0", "lin1"], init_weights=False).eval()
    model.add_adapter("second", SSVDOConfig(target_modules=["lin0", "lin1"], outer_rank=1, init_weights=False))
    model.merge_adapter()
    layers = [model.base_model.model.lin0, model.base_model.model.lin1]
    x, bits = x_of(), [layer.weight.clone() for layer in layers]
    want = model(x)
    with torch.no_grad():
        layers[1].ssvdo_adapters["second"].inner_scale[0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter second"):
            merge(adapter_names=["second"], safe_merge=True)
        assert [layer.merged_adapters for layer in layers] == [["default"]] * 2
        assert all(torch.equal(layer.weight, w) for layer, w in zip(layers, bits, strict=True))
        assert torch.equal(model(x), want)


@cases
def test_disabled_adapters_are_the_base_model(options):
    plain, model, x = base()(x_of()), adapt(base(), init_weights=False, **options), x_of()
    adapted = model(x)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert same(model(x), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)


def trained_adapters(model):
    """Names of the adapters that train; nothing else does."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(n.rsplit(".", 1)[1] in PARAMETER_NAMES for n in names)
    return {n.split(".ssvdo_adapters.")[1].split(".")[0] for n in names}


def test_several_adapters():
    x, plain = x_of(), base()(x_of())
    model = adapt(base(), target_modules=["lin0"], init_weights=False)
    first = model(x)
    model.add_adapter("second", SSVDOConfig(target_modules=["lin0", "lin1"], outer_rank=2, inner_ratio=1.0,
                                            init_weights=False))  # fmt: skip
    assert same(model(x), first)  # not active yet
    assert not any(p.requires_grad for n, p in model.named_parameters() if "second" in n)
    assert trained_adapters(model) == {"default"}
    model.set_adapter("second")
    second = model(x)
    assert not torch.allclose(second, first, atol=1e-3)
    assert trained_adapters(model) == {"second"}
    with model.disable_adapter():
        assert trained_adapters(model) == set()
    assert trained_adapters(model) == {"second"}
    model.base_model.set_adapter("second", inference_mode=True)
    assert trained_adapters(model) == set() and same(model(x), second)
    assert {r.name for r in orthogonality(model)} == {"lin0", "lin1"}
    model.base_model.set_adapter(["default", "second"])
    both, layer = model.base_model.model.lin0(x), model.base_model.model.lin0
    alone = [layer.ssvdo_adapters[n](x, layer.base(), layer.bias) for n in ("default", "second")]
    assert torch.allclose(both, alone[0] + alone[1] - layer.base_layer(x), atol=1e-5)
    want = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), want, atol=1e-4)
    model.unmerge_adapter()
    model.base_model.merge_adapter(["second"])
    assert layer.merged_adapters == ["second"]
    model.base_model.merge_adapter(["default"])  # one after the other: each still turns W0, not what is merged already
    assert torch.allclose(model(x), want, atol=1e-4)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert same(model(x), first)
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("third")
    model.delete_adapter("second")
    assert set(layer.ssvdo_adapters) == {"default"}
    assert not any("second" in name for name in model.state_dict()) and same(model(x), first)
    model.add_adapter("third", SSVDOConfig(target_modules=["lin0"], outer_rank=1))
    with pytest.warns(UserWarning, match="Setting active adapter to third"):
        model.delete_adapter("default")
    assert same(model(x), plain) and layer.active_adapters == ["third"]


def test_an_adapter_added_while_another_is_merged_is_one_of_w0():
    model, x = adapt(base(), target_modules=["lin0"], init_weights=False), x_of()
    model.merge_adapter()
    model.add_adapter("second", SSVDOConfig(target_modules=["lin0"], outer_rank=3))
    layer = model.base_model.model.lin0
    assert torch.equal(layer.ssvdo_adapters["second"].singular_values, layer.ssvdo_adapters["default"].singular_values)
    if layer.merged:  # PEFT unmerges by itself once it adds an adapter, in some versions
        model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.allclose(model(x), base()(x), atol=1e-5)


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


def test_trainable_parameters_are_counted(capsys):
    model = adapt(base(), target_modules=["lin0", "square"], inner_ratio=0.5, outer_rank=3)
    k, ks = 5, 4
    assert model.get_nb_trainable_parameters()[0] == k * (k + 1) // 2 + 14 * 3 + ks * (ks + 1) // 2
    model.print_trainable_parameters()
    assert "trainable params: 67" in capsys.readouterr().out


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


def test_copies_and_pickles():
    model = adapt(base(), target_modules=["lin0", "lin1"], init_weights=False)
    want = model(x_of())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x_of()), want)
        train(twin, x_of())
        assert not torch.allclose(twin(x_of()), want, atol=1e-4)
        assert torch.allclose(model(x_of()), want, atol=1e-6)
        assert len(adapters_of(twin)) == 2 and all(a.basis is not None for _, _, a in adapters_of(twin))
        ours = {t.data_ptr() for _, _, a in adapters_of(model) for t in (*a.parameters(), *a.buffers())}
        assert not ours & {t.data_ptr() for _, _, a in adapters_of(twin) for t in (*a.parameters(), *a.buffers())}
    model.merge_adapter()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(twin(x_of()), want, atol=1e-4)
        twin.unmerge_adapter()
        assert torch.equal(twin.base_model.model.lin0.weight, base().lin0.weight)


def test_gradients_flow_in_groups_with_checkpointing_and_accumulation():
    torch.manual_seed(0)
    model = get_peft_model(Deep(), SSVDOConfig(target_modules="all-linear", outer_rank=3, init_weights=False))
    groups = {m.ssvdo_adapters["default"].cache.group for m in model.modules() if isinstance(m, Linear)}
    assert len(groups) == 2 and None not in groups
    x = torch.randn(5, 8)
    model(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    for how in ("checkpoint", "accumulate"):
        model.zero_grad()
        if how == "checkpoint":
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
        else:
            with gradient_accumulation(model):
                model(x).square().sum().backward()
        for n, p in model.named_parameters():
            assert not p.requires_grad or torch.allclose(p.grad, want[n], atol=1e-5), (how, n)


def test_autocast_and_half_precision():
    model = adapt(base(torch.bfloat16), target_modules=["lin0"], init_weights=False)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "ssvdo_" in n)
    assert model(x_of(torch.bfloat16)).dtype == torch.bfloat16
    model = adapt(base(), target_modules=["lin0"], init_weights=False)
    want = model(x_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(x_of()).float(), want, atol=0.1)


def test_a_change_of_dtype_takes_the_adapters_along():
    model = adapt(base(), target_modules=["lin0"], init_weights=False)
    want = model(x_of())
    assert torch.allclose(model.double()(x_of(torch.float64)).float(), want, atol=1e-5)


def test_the_core_config_is_the_same():
    fields = set(CoreConfig.__dataclass_fields__) - {"orientation", "path", "target_modules", "exclude_modules"}
    ours, defaults = SSVDOConfig(), CoreConfig()
    assert all(getattr(ours, f) == getattr(defaults, f) for f in fields - {"init_angle"}) and ours.init_angle == 0


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(48, 192), nn.Linear(192, 48)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def pair(source, dtype, seed=0):
    """The numbers of a model in `source`, in `dtype`."""
    torch.manual_seed(seed)
    return Pair().to(source).to(dtype)


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


def test_mixed_batches_take_each_input_by_its_own_adapter():
    model = adapt(base(), target_modules=["lin0"], outer_rank=2, init_weights=False).eval()
    model.add_adapter("second", SSVDOConfig(target_modules=["lin0", "lin1"], outer_rank=1, init_weights=False))
    model.eval()
    x, wanted = x_of(), {}
    for name in ("default", "second"):
        model.set_adapter(name)
        wanted[name] = model(x)
    with model.disable_adapter():
        wanted["__base__"] = model(x)
    names = (["second", "__base__", "default"] * len(x))[: len(x)]
    y = model(x, adapter_names=names)
    torch.testing.assert_close(y, torch.stack([wanted[name][i] for i, name in enumerate(names)]))
    with pytest.raises(ValueError, match=r"non-existing adapter.*: third"):
        model(x, adapter_names=["third"] * len(x))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=names[:-1])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=names)


def test_mixed_batches_take_modules_that_were_saved_by_their_own_adapter():
    model = adapt(base(), target_modules=["lin0"], modules_to_save=["head"], init_weights=False).eval()
    model.add_adapter("second", SSVDOConfig(target_modules=["lin0"], modules_to_save=["head"], init_weights=False,
                                            outer_rank=1))  # fmt: skip
    model.eval()
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["second"].weight.add_(1)
    x, wanted = x_of(), {}
    for name in ("default", "second"):
        model.set_adapter(name)
        wanted[name] = model(x)
    names = (["second", "default"] * len(x))[: len(x)]
    want = torch.stack([wanted[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(model(x, adapter_names=names), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_keep_the_dtype_of_the_base_where_that_is_asked_for(dtype):
    config = SSVDOConfig(target_modules=["lin0"], outer_rank=2, init_weights=False)
    model = get_peft_model(base(dtype), config, autocast_adapter_dtype=False)
    assert {p.dtype for _, p in model.named_parameters() if p.requires_grad} == {dtype}
    model(x_of(dtype)).float().square().sum().backward()
    assert all(p.grad.dtype == dtype and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


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


def test_casts_of_the_input_can_be_switched_off():
    from peft.helpers import disable_input_dtype_casting

    model = adapt(base(), target_modules=["lin0"], outer_rank=2).eval()
    layer, x = model.base_model.model.lin0, x_of().double()
    assert layer(x).dtype == torch.float64  # cast, and cast back
    with disable_input_dtype_casting(model), pytest.raises(TypeError, match=r"x has dtype torch.float64"):
        layer(x)
    layer(x)


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


def test_rows_of_an_embedding_are_trained_beside_the_adapters(tmp_path):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(emb=nn.Embedding(12, 10), lin=nn.Linear(10, 24)))

    rows = torch.arange(12)
    model = get_peft_model(plain(), SSVDOConfig(target_modules=["lin"], outer_rank=2,
                                                trainable_token_indices={"emb": [1, 3]}))  # fmt: skip
    train(model, rows)
    want = model(rows)
    changed = (want - plain()(rows)).abs().amax(1)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(plain(), tmp_path)(rows), want)
    merged = model.merge_and_unload()
    moved = (merged.emb.weight - plain().emb.weight).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [1, 3] and bool((changed > 0).all())
    torch.testing.assert_close(merged(rows), want)


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


def test_mixed_models_refuse_the_method_by_name():
    with pytest.raises(ValueError, match="`peft_type` 'SSVDO' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base(), SSVDOConfig(target_modules=["lin0"]), mixed=True)


def test_importing_twice_registers_once():  # last: it makes the classes anew
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(integration)
    assert peft.PeftType.SSVDO == "SSVDO" and peft.PeftType("SSVDO") is peft.PeftType.SSVDO
