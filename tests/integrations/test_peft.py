"""PEFT's own cases for custom models (its tests/test_custom_models.py and testing_common.py), rewritten for SSVD-O."""

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
import peft
from peft import PeftModel, get_peft_model
from peft_models import Deep, adapt, adapters_of, base, cases, same, train, x_of

import ssvdo_kernels.integrations.peft as integration
from ssvdo_kernels import SSVDOConfig as CoreConfig
from ssvdo_kernels import gradient_accumulation, orthogonality, reference
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.integrations.peft import Linear, SSVDOConfig


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


def test_trainable_parameters_are_counted(capsys):
    model = adapt(base(), target_modules=["lin0", "square"], inner_ratio=0.5, outer_rank=3)
    k, ks = 5, 4
    assert model.get_nb_trainable_parameters()[0] == k * (k + 1) // 2 + 14 * 3 + ks * (ks + 1) // 2
    model.print_trainable_parameters()
    assert "trainable params: 67" in capsys.readouterr().out


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


def test_casts_of_the_input_can_be_switched_off():
    from peft.helpers import disable_input_dtype_casting

    model = adapt(base(), target_modules=["lin0"], outer_rank=2).eval()
    layer, x = model.base_model.model.lin0, x_of().double()
    assert layer(x).dtype == torch.float64  # cast, and cast back
    with disable_input_dtype_casting(model), pytest.raises(TypeError, match=r"x has dtype torch.float64"):
        layer(x)
    layer(x)


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


def test_mixed_models_refuse_the_method_by_name():
    with pytest.raises(ValueError, match="`peft_type` 'SSVDO' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base(), SSVDOConfig(target_modules=["lin0"]), mixed=True)


def test_importing_twice_registers_once():  # last: it makes the classes anew
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(integration)
    assert peft.PeftType.SSVDO == "SSVDO" and peft.PeftType("SSVDO") is peft.PeftType.SSVDO
