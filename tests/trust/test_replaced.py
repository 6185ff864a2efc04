"""What stood on a layer, or around it, before it was adapted: hooks, patches, attributes, wrappers, other adapters."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from ssvdo_kernels import (
    CheckpointError,
    SSVDOConfig,
    SSVDOLinear,
    apply_ssvdo,
    diagnose,
    load_ssvdo,
    remove_ssvdo,
    save_ssvdo,
)

CONFIG = SSVDOConfig(outer_rank=4, target_modules=("0", "1"), init_angle=0)
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 16))


def by_apply(model):
    return apply_ssvdo(model, CONFIG)


def by_hand(model):
    model[0] = SSVDOLinear.from_linear(model[0], CONFIG)
    return model


def by_load(model, tmp_path):
    return load_ssvdo(model, save_ssvdo(apply_ssvdo(net(), CONFIG), tmp_path))


@pytest.mark.parametrize("way", ["apply", "hand", "load"])
def test_hooks_and_attributes_stay_and_come_back(way, tmp_path):
    model, seen = net(), []
    model[0].register_forward_pre_hook(lambda m, args: (2 * args[0],))
    model[0].register_forward_hook(lambda m, args, kwargs, y: y + len(kwargs), with_kwargs=True, always_call=True)
    gone = model[0].register_forward_hook(lambda m, args, y: seen.append("forward"))
    model[0].register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    model[0]._register_state_dict_hook(lambda m, state, prefix, meta: seen.append("state_dict"))
    model[0].register_load_state_dict_pre_hook(lambda m, *rest: seen.append("load"))
    model[0].extra = "kept"

    def run():
        seen.clear()
        y = model(X.clone().requires_grad_())
        y.sum().backward()
        model.load_state_dict(model.state_dict())
        return y.detach(), list(seen)

    want, calls = run()
    assert calls == ["forward", "backward", "state_dict", "load"]
    model = {"apply": by_apply, "hand": by_hand, "load": lambda m: by_load(m, tmp_path)}[way](model)
    y, found = run()
    assert isinstance(model[0], SSVDOLinear) and model[0].extra == "kept" and found == calls
    torch.testing.assert_close(y, want)
    gone.remove()
    assert run()[1] == calls[1:]
    plain = model[0].to_linear() if way == "hand" else remove_ssvdo(model)[0]
    model[0] = plain
    y, found = run()
    assert type(plain) is nn.Linear and plain.extra == "kept" and found == calls[1:]
    torch.testing.assert_close(y, want)


def test_a_hook_of_accelerate_stays():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")

    class Doubling(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return tuple(2 * a for a in args), kwargs

    model = net()
    hooks.add_hook_to_module(model[0], Doubling())
    want = model(X).detach()
    by_apply(model)
    torch.testing.assert_close(model(X).detach(), want)
    remove_ssvdo(model)
    torch.testing.assert_close(model(X).detach(), want)
    hooks.remove_hook_from_module(model[0])
    torch.testing.assert_close(model(X), net()(X))


def patched(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


RECOMPUTED = {"patched": (patched, "forward of its own"),
              "weight_norm": (nn.utils.weight_norm, "WeightNorm"),
              "spectral_norm": (nn.utils.spectral_norm, "SpectralNorm"),
              "prune": (lambda m: prune.random_unstructured(m, "weight", 0.5), "RandomUnstructured")}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", RECOMPUTED)
@pytest.mark.parametrize("way", [by_apply, by_hand, None], ids=["apply", "hand", "load"])
def test_what_computes_otherwise_is_refused_before_anything_changes(kind, way, tmp_path):
    change, words = RECOMPUTED[kind]
    model = net()
    change(model[0])
    y = model.eval()(X)
    with pytest.raises((TypeError, CheckpointError), match=words):
        by_load(model, tmp_path) if way is None else way(model)
    assert all(type(m) is nn.Linear for m in model)
    torch.testing.assert_close(model(X), y)


def compiled_child(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


def wrapped_child(model):
    model[0] = checkpoint_wrapper(model[0])
    return model


def through_lora(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(nn.Sequential(*model, nn.Linear(16, 16)), peft.LoraConfig(target_modules=["2"]))


WRAPPERS = {"DataParallel": nn.DataParallel, "compile": lambda m: torch.compile(m, backend="eager"),
            "checkpoint_wrapper": wrapped_child, "compiled child": compiled_child,
            "averaged": torch.optim.swa_utils.AveragedModel, "lora": through_lora,
            "two": lambda m: nn.DataParallel(torch.compile(wrapped_child(m), backend="eager"))}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_files_of_wrapped_models_are_those_of_plain_ones(name, tmp_path):
    model = by_apply(net())
    torch.manual_seed(3)
    with torch.no_grad():
        for p in (*model[0].adapter.trained, *model[1].adapter.trained):
            p.normal_(0, 0.2)
    want = model(X).detach()
    save_ssvdo(model, tmp_path / "plain")
    wrapped = WRAPPERS[name](model)
    save_ssvdo(wrapped, tmp_path / "wrapped")
    assert (tmp_path / "plain/ssvdo_config.json").read_text() == (tmp_path / "wrapped/ssvdo_config.json").read_text()
    assert [report.name for report in diagnose(wrapped)] == ["0", "1"]
    torch.testing.assert_close(load_ssvdo(net(), tmp_path / "wrapped")(X), want)
    if name == "compiled child":  # its own code would go on calling the plain layer
        with pytest.raises(CheckpointError, match=r"\['0'\] are compiled by themselves"):
            load_ssvdo(WRAPPERS[name](net()), tmp_path / "plain")
    fresh = WRAPPERS[name](by_apply(net()) if name in ("compiled child", "averaged", "lora") else net())
    load_ssvdo(fresh, tmp_path / "plain")
    got = fresh.base_model.model[:2](X) if name == "lora" else fresh(X)
    torch.testing.assert_close(got.detach(), want)


def test_a_layer_that_is_compiled_by_itself_is_refused():
    model = compiled_child(net())
    with pytest.raises(TypeError, match="0 is compiled by itself"):
        by_apply(model)


@pytest.mark.parametrize("targets", ["all-linear", ("0", "1")])
def test_layers_of_other_adapters_are_refused_and_never_adapted_inside(targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"]))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=r"0 is a peft\.tuners\.lora\.layer\.Linear, another adapter"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=4, target_modules=targets))
    assert [type(m) for m in model.modules()] == kinds
    apply_ssvdo(model, SSVDOConfig(outer_rank=4, target_modules=("1",)))  # beside it is another matter
    assert isinstance(model.base_model.model[1], SSVDOLinear)


def test_layers_that_share_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(16, 48), nn.Linear(16, 48))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        by_apply(model)
    assert all(type(m) is nn.Linear for m in model)
    apply_ssvdo(model, SSVDOConfig(outer_rank=4, target_modules=("0", "1"), exclude_modules=("1",)))
