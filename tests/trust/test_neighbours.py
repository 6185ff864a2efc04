"""Neighbours of the silent failures in docs/compatibility.md: ways in which an adapter could be lost without a word."""

import copy
import warnings

import pytest
import torch
from helpers import randomise_all
from torch import nn

from ssvdo_kernels import (
    BaseMismatchError,
    CheckpointError,
    SSVDOConfig,
    SSVDOLinear,
    apply_ssvdo,
    load_ssvdo,
    refactorize_ssvdo,
    remove_ssvdo,
    save_ssvdo,
)
from ssvdo_kernels.host import hosts

CONFIG = SSVDOConfig(outer_rank=4, target_modules=("0", "fc1"))
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))


def adapted(seed=0, **options):
    model = apply_ssvdo(net(seed), SSVDOConfig(**{"outer_rank": 4, "target_modules": ("0", "2"), **options}))
    torch.manual_seed(5)
    return randomise_all(model)


# -- where a layer stands ----------------------------------------------------------------------------------------------
class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(16, 16)
        self.alias, self.listed = self.fc1, nn.ModuleList([self.fc1, nn.Identity(), self.fc1])

    def forward(self, x):
        return self.listed[2](self.alias(self.fc1(x)))


@pytest.mark.filterwarnings("ignore:outer_rank=4 is lowered")
@pytest.mark.parametrize("way", ["apply", "load"])
def test_a_layer_with_several_names_in_one_parent_is_one_adapted_layer(way, tmp_path):
    model = randomise_all(apply_ssvdo(Twice(), CONFIG))
    if way == "load":
        model = load_ssvdo(Twice(), save_ssvdo(model, tmp_path))
    assert model.alias is model.fc1 and model.listed[0] is model.fc1 and model.listed[2] is model.fc1
    W, b = model.fc1.adapted_weight(), model.fc1.bias
    torch.testing.assert_close(model(X), ((X @ W.T + b) @ W.T + b) @ W.T + b)
    back = remove_ssvdo(model, merge=True)
    assert back.alias is back.fc1 and type(back.listed[2]) is nn.Linear


def test_a_plain_list_that_goes_on_holding_the_old_layer_is_said():
    model = nn.ModuleDict({"fc1": nn.Linear(16, 48)})
    model.layers_by_hand = [model["fc1"]]
    with pytest.warns(UserWarning, match=r"the model\.layers_by_hand goes on holding a layer that was exchanged"):
        apply_ssvdo(model, CONFIG)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
@pytest.mark.parametrize("when", ["apply", "load", "remove"])
def test_a_layer_that_is_compiled_by_itself_is_refused(how, when, tmp_path):
    folder = save_ssvdo(adapted(), tmp_path)
    model = adapted() if when == "remove" else net()
    if how == "in place":
        model[0].compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    kept, before = model[0], model(X)
    with pytest.raises((TypeError, CheckpointError), match=r"compiled by (itself|themselves)"):
        {"apply": lambda: apply_ssvdo(model, CONFIG), "load": lambda: load_ssvdo(model, folder),
         "remove": lambda: remove_ssvdo(model)}[when]()  # fmt: skip
    assert model[0] is kept
    torch.testing.assert_close(model(X), before)


def test_the_model_that_is_the_layer_itself_is_refused(tmp_path):
    layer = SSVDOLinear.from_linear(nn.Linear(16, 48), SSVDOConfig(outer_rank=4))
    with pytest.raises(ValueError, match=r"model is the layer itself.*to_linear"):
        remove_ssvdo(layer)
    save_ssvdo(layer, tmp_path)
    plain = layer.to_linear()
    with pytest.raises(ValueError, match=r"model is the layer itself.*from_linear"):
        load_ssvdo(plain, tmp_path)


def test_the_very_parameters_stay_and_come_back():
    model = net()
    weight, bias = model[0].weight, model[0].bias
    model[0].register_buffer("steps", torch.ones(2))
    model[0].extra = nn.Linear(2, 2)
    weight.tag = "tensor parallel"
    before = set(model.state_dict())
    apply_ssvdo(model, CONFIG)
    assert model[0].weight is weight and model[0].bias is bias and model[0].weight.tag == "tensor parallel"
    assert before <= set(model.state_dict()) and torch.equal(model[0].steps, torch.ones(2))
    remove_ssvdo(model)
    assert model[0].weight is weight and model[0].bias is bias and set(model.state_dict()) == before


@pytest.mark.parametrize("patch", ["under accelerate's hook", "on the adapted layer"])
def test_a_patch_is_not_dropped(patch):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = net()
    if patch == "on the adapted layer":
        apply_ssvdo(model, CONFIG)
        model[0].forward = lambda x: x
        with pytest.raises(TypeError, match="0 has a forward of its own, which would be lost"):
            remove_ssvdo(model)
        assert isinstance(model[0], SSVDOLinear)
        return
    model[0].forward = lambda x: x
    accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook())
    with pytest.raises(TypeError, match="0 has a forward of its own"):
        apply_ssvdo(model, CONFIG)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("change, words", [
    (lambda m: m.register_parameter("bias", None) or setattr(m, "adapter", 3), r"has attributes \['adapter'\]"),
    (lambda m: (delattr(m, "bias"), m.register_buffer("bias", torch.zeros(48))), "has no parameter `bias`"),
])
def test_what_the_adapted_layer_would_need_or_lose_is_refused_first(change, words):
    model = net()
    change(model[0])
    with pytest.raises(TypeError, match=f"0 {words}"):
        apply_ssvdo(model, CONFIG)
    assert type(model[0]) is nn.Linear and not any(True for _ in hosts(model))


class FairseqAttention(nn.Module):
    """q_proj's weight goes to torch's function, as in fairseq and s3prl."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.fc1 = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x):
        return self.fc1(nn.functional.linear(x, self.q_proj.weight, self.q_proj.bias))


def test_layers_that_their_parent_multiplies_by_are_refused_on_loading_too(tmp_path):
    donor = nn.ModuleDict({"q_proj": nn.Linear(16, 48)})
    model = FairseqAttention()
    donor["q_proj"].load_state_dict(model.q_proj.state_dict())
    folder = save_ssvdo(apply_ssvdo(donor, SSVDOConfig(outer_rank=4, target_modules=("q_proj",))), tmp_path)
    with pytest.raises(CheckpointError, match=r"q_proj.*is multiplied by in FairseqAttention"):
        load_ssvdo(model, folder)
    assert type(model.q_proj) is nn.Linear


def test_tied_weights_are_refused_on_loading_too(tmp_path):
    folder = save_ssvdo(adapted(), tmp_path)
    model = nn.Sequential(net()[0], nn.GELU(), nn.Linear(48, 16))
    donor = net()
    model.load_state_dict(donor.state_dict())
    load_ssvdo(copy.deepcopy(model), folder)
    tied = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save_ssvdo(apply_ssvdo(copy.deepcopy(tied), SSVDOConfig(target_modules=("0", "2"))), tmp_path)
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="0 and 2 share one weight"):
        load_ssvdo(tied, folder)


# -- what belongs to which weight --------------------------------------------------------------------------------------
def test_factors_that_come_without_their_weight_are_refused_on_another():
    state = {k: v for k, v in adapted(0).state_dict().items() if ".adapter." in k}
    model = adapted(1)
    model.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"0: the factors that were loaded .* are not those of its weight"):
        model(X)
    refactorize_ssvdo(model)
    model(X)
    same = adapted(0)
    same.load_state_dict(state, strict=False)
    torch.testing.assert_close(same(X), adapted(0)(X))


@pytest.mark.parametrize("options", [{"rotation": "first_order"}, {"outer": "additive"}, {"outer_scale": 0.7},
                                     {"tau": 0.5}])  # fmt: skip
def test_another_formula_of_the_same_sizes_is_refused(options):
    target = adapted(**options)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(RuntimeError, match="saved with another formula"):
        target.load_state_dict(adapted().state_dict())
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items() if ".adapter." in k)


@pytest.mark.parametrize("how", ["deepcopy", "file"])
def test_a_copy_does_not_trust_an_address(how, tmp_path):
    for _ in range(10):
        model = adapted()
        model(X)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            torch.save(model, tmp_path / "model")
            twin = torch.load(tmp_path / "model", weights_only=False)
        del model
        for place in (0, 2):
            twin[place].weight = nn.Parameter(net(1)[place].weight.detach().clone(), requires_grad=False)
        with pytest.raises(RuntimeError, match="weight is no longer"):
            twin(X)


def test_casts_without_a_forward_in_between_are_the_same_weight():
    model = adapted()
    want = model(X)
    torch.testing.assert_close(model.half().float()(X), want, rtol=0.02, atol=0.02)
    model[2].weight.data += 1e-4
    model.float()
    with pytest.raises(RuntimeError, match="weight is no longer"):
        save_ssvdo(model, "unused")


def test_numbers_that_could_not_be_loaded_are_not_saved(tmp_path):
    model = adapted()
    save_ssvdo(model, tmp_path)
    want = model(X)
    with torch.no_grad():
        model[2].adapter.inner_scale[0] = float("nan")
    with pytest.raises(ValueError, match=r"2\.inner_scale have non-finite numbers"):
        save_ssvdo(model, tmp_path)
    torch.testing.assert_close(load_ssvdo(net(), tmp_path)(X), want)


def kept_bases(change):
    """Bases of a file for an orthogonal weight, whose singular vectors come out otherwise elsewhere."""
    from ssvdo_kernels.config import LayerShape
    from ssvdo_kernels.factorize import factorize
    from ssvdo_kernels.fingerprint import Bases, Fingerprint

    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(24, 8)).Q.contiguous()
    shape = LayerShape.of(24, 8, SSVDOConfig(outer_rank=2))
    there = factorize(weight, shape, basis=torch.linalg.qr(torch.randn(8, 8)).Q[:, : shape.width])
    trained = Fingerprint.of(weight, Bases.of(weight, there, shape))
    kept = Bases.of(weight, there, shape)
    return trained, factorize(weight, shape), weight, shape, Bases(change(kept.V), kept.N)


@pytest.mark.parametrize("change", [
    torch.zeros_like, lambda V: V[:, :2], lambda V: torch.linalg.qr(torch.randn_like(V)).Q, lambda V: V.int(),
    lambda V: V * float("nan"), lambda V: torch.cat([V[:, :1], V[:, :1] * 0.5, V[:, 2:]], 1),
])
def test_a_kept_basis_is_looked_at_before_it_is_taken(change):
    trained, own, weight, shape, kept = kept_bases(lambda V: V)
    assert trained.adopt(own, weight, shape, kept, "fc1") is not own
    *rest, kept = kept_bases(change)
    with pytest.raises(BaseMismatchError, match="fc1: the basis that was kept"):
        rest[0].adopt(*rest[1:], kept, "fc1")


def test_an_all_zero_half_weight_can_be_adapted():
    model = nn.ModuleDict({"fc1": nn.Linear(16, 48).to(torch.bfloat16)})
    nn.init.zeros_(model["fc1"].weight)
    y = apply_ssvdo(model, CONFIG)["fc1"](X.to(torch.bfloat16))
    torch.testing.assert_close(y, model["fc1"].bias.expand_as(y))


def test_offloaded_weights_say_so(tmp_path):
    model = adapted()
    model[0].weight = nn.Parameter(model[0].weight.to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"0: weight is on the meta device \(offloaded"):
        save_ssvdo(model, tmp_path)


def test_nested_tensors_come_back_to_an_encoder_that_is_adapted_no_more():
    layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    assert model.use_nested_tensor
    apply_ssvdo(model, SSVDOConfig(outer_rank=4, target_modules=("linear1",)))
    assert not model.use_nested_tensor
    remove_ssvdo(model)
    assert model.use_nested_tensor


# -- arguments ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", [apply_ssvdo, lambda m: save_ssvdo(m, "unused"), remove_ssvdo, refactorize_ssvdo,
                                  lambda m: load_ssvdo(m, "tests/data/adapter_v1")])  # fmt: skip
@pytest.mark.parametrize("model", [None, "model", []])
def test_what_is_no_module_is_refused_by_name(call, model):
    with pytest.raises(TypeError, match=r"model=.* is a .*; allowed: a torch\.nn\.Module"):
        call(model)


@pytest.mark.parametrize("config", [{"outer_rank": 3}, SSVDOConfig, "default"])
def test_what_is_no_configuration_is_refused_by_name(config):
    for call in (lambda: apply_ssvdo(net(), config), lambda: SSVDOLinear.from_linear(nn.Linear(16, 48), config)):
        with pytest.raises(TypeError, match=r"config=.*; allowed: None or an SSVDOConfig"):
            call()


def test_numbers_beyond_floats_are_out_of_range():
    with pytest.raises(ValueError, match=r"tau=1000.* is out of range"):
        SSVDOConfig(tau=10**400)


def test_names_that_mean_no_layer_are_said():
    with pytest.warns(UserWarning, match=r"target_modules: \['fc9'\] match no linear layer"):
        apply_ssvdo(net(), SSVDOConfig(outer_rank=4, target_modules=("0", "fc9")))
    with pytest.warns(UserWarning, match=r"exclude_modules: \['1', 'typo'\] match no linear layer"):
        apply_ssvdo(net(), SSVDOConfig(outer_rank=4, target_modules=("0",), exclude_modules=("1", "2", "typo")))


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.factor


def test_a_parametrisation_of_the_weight_that_starts_at_it_is_refused():
    model = adapted()
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Halved())
    with pytest.raises(RuntimeError, match=r"requires_grad is True, but SSVD-O keeps W0 frozen"):
        model(X)

