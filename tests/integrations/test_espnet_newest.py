"""What ESPnet's newer versions ask of a backend, by stand-ins written from their rules; no ESPnet is needed."""

import importlib.util
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import ssvdo_kernels.integrations.espnet as integration
from ssvdo_kernels import BaseMismatchError, reference
from ssvdo_kernels.integrations.espnet import DeferredSSVDOLinear, create_ssvdo_adapter
from ssvdo_kernels.integrations.espnet.run import main as run_launcher

STRATEGIES = [("all", False), ("adapter_only", False), ("adapter_only", True), ("required_grad_only", False)]


class LoRALayer:
    """ESPnet's own, without its constructor."""


def saved(model, strategy, newest):
    """What ESPnet's trainer writes, read again. newest: adapter_only keeps parameters, before it kept names."""
    state, parameters = model.state_dict(), dict(model.named_parameters())
    if strategy == "required_grad_only":
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                state.pop(name)
    if strategy == "adapter_only":
        state = {k: t for k, t in state.items() if "lora_" in k and (k in parameters or not newest)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def adapted(seed, **options):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"w_1": nn.Linear(8, 24), "w_2": nn.Linear(24, 8)})
    create_ssvdo_adapter(model, ["w_1", "w_2"], **{"inner_ratio": 0.5, "outer_rank": 3, **options})
    return model


def run(model):
    torch.manual_seed(7)
    return model["w_2"](model["w_1"](torch.randn(4, 8)).relu())


@pytest.fixture
def trained():
    model = adapted(0)
    run(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("strategy, newest", STRATEGIES)
def test_what_is_saved_belongs_to_its_base(trained, strategy, newest):
    state, want = saved(trained, strategy, newest), run(trained)
    assert not newest or not any("base_digest" in k for k in state)
    same = adapted(0)
    assert not same.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(run(same), want)
    again = adapted(0)
    again.load_state_dict(saved(same, strategy, newest), strict=False)
    torch.testing.assert_close(run(again), want)
    if strategy != "all":
        other = adapted(1)
        other.load_state_dict(state, strict=False)
        with pytest.raises(BaseMismatchError, match="w_1: trained on other base weights"):
            run(other)
    with pytest.raises(RuntimeError, match="saved with another formula"):
        adapted(0, tau=0.5).load_state_dict(state, strict=False)


@pytest.mark.parametrize("strategy, newest", STRATEGIES[1:])
def test_the_guard_of_an_average_is_that_of_its_checkpoints(trained, strategy, newest):
    first = saved(trained, strategy, newest)
    with torch.no_grad():
        trained["w_1"].lora_adapter.inner_scale.add_(0.1)
    second = saved(trained, strategy, newest)
    average = {k: (first[k] + second[k]) / 2 for k in first}
    model = adapted(0)
    model.load_state_dict(average, strict=False)
    assert bool(run(model).isfinite().all())
    other = adapted(1)
    other.load_state_dict(average, strict=False)
    with pytest.raises(BaseMismatchError):
        run(other)


def test_the_guard_trains_nothing_and_follows_no_cast(trained):
    guards = [m.lora_guard for m in trained.modules() if isinstance(m, DeferredSSVDOLinear)]
    assert len(guards) == 2 and not any(g.requires_grad for g in guards)
    want = {k: t for k, t in saved(trained, "adapter_only", True).items() if "guard" in k}
    for guard in guards:
        guard.data.normal_()  # its value is written where it is saved
    got = saved(trained.bfloat16(), "adapter_only", True)
    assert want and all(torch.equal(got[k], t) for k, t in want.items())


@pytest.fixture
def backend(monkeypatch):
    """The class as it is where ESPnet has LINEAR_BACKENDS and LoRALayer, and the table with it."""
    newer = types.ModuleType("espnet2.layers.lora")
    newer.LINEAR_BACKENDS, newer.LoRALayer = {}, LoRALayer
    newer.__spec__ = types.SimpleNamespace(name=newer.__name__)
    for name in ("espnet2", "espnet2.layers"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name, types.ModuleType(name)))
    monkeypatch.setitem(sys.modules, newer.__name__, newer)
    path = Path(integration.layer.__file__)
    spec = importlib.util.spec_from_file_location("ssvdo_kernels.integrations.espnet.newer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(integration, "DeferredSSVDOLinear", module.DeferredSSVDOLinear)
    assert "espnet2.layers.lora.LINEAR_BACKENDS" in integration.register()
    return newer.LINEAR_BACKENDS["ssvdo"]


def test_a_backend_is_a_lora_layer_that_freezes_its_weight_and_trains(backend):
    torch.manual_seed(0)
    layer, x = backend(in_features=16, out_features=16, r=4, lora_alpha=4), torch.randn(2, 16)
    assert isinstance(layer, LoRALayer) and not layer.weight.requires_grad
    before = layer.weight.detach().clone()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():  # every one, frozen or not, as their tests do
            if name not in ("weight", "bias"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    want = layer.train()(x)
    for mode in (False, True) * 3:
        torch.testing.assert_close(layer.train(mode)(x), want)
        assert torch.equal(layer.weight, before)
    for mode in (False, True):
        noisy = backend(in_features=16, out_features=16, r=4, lora_alpha=4, lora_dropout=0.5).train(mode)
        assert {m.training for m in noisy.modules()} == {mode}


def test_newer_espnets_way_of_building():
    """LINEAR_BACKENDS' classes get r, lora_alpha, lora_dropout and the rest of adapter_conf, then weight and bias."""
    linear = nn.Linear(8, 24)
    layer = DeferredSSVDOLinear(8, 24, bias=True, r=8, lora_alpha=8, lora_dropout=0.0, inner_ratio=0.5, outer_rank=3)
    layer.weight, layer.bias = linear.weight, linear.bias
    x = torch.randn(4, 8)
    adapter, wide = layer.lora_adapter, [p.detach().double() for p in layer.lora_adapter.trained]
    with torch.no_grad():
        want = reference.linear(x.double(), linear.weight.double(), linear.bias.double(), *wide, config=adapter.config)
        assert torch.allclose(layer(x).double(), want, atol=1e-5)


@pytest.mark.parametrize("rows, columns", [(24, 8), (8, 24)])
def test_dropout_is_of_the_change_alone(rows, columns):
    torch.manual_seed(0)
    layer = DeferredSSVDOLinear(columns, rows, lora_dropout=0.4, inner_ratio=0.5, outer_rank=3, init_angle=0.5)
    x = torch.randn(6, columns, requires_grad=True)
    layer.train()
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    kept = nn.functional.dropout(x, 0.4)
    want = nn.functional.linear(x, layer.weight, layer.bias) + kept @ (layer.adapted_weight() - layer.weight).mT
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))
    torch.testing.assert_close(layer.eval()(x), nn.functional.linear(x, layer.adapted_weight(), layer.bias))
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"dropout=.* is out of range; allowed: 0 <= dropout < 1"):
            DeferredSSVDOLinear(columns, rows, lora_dropout=wrong)


MODULE = """
import multiprocessing, sys, espnet_child
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(sys.argv[1:], "ssvdo_kernels.integrations.espnet" in sys.modules, pool.apply(espnet_child.knows))
"""


def test_the_launcher_runs_a_module_after_the_import_and_so_do_its_processes(tmp_path):
    (tmp_path / "espnet_train.py").write_text(MODULE)
    (tmp_path / "espnet_child.py").write_text(
        'import sys\ndef knows():\n    return "ssvdo_kernels.integrations.espnet" in sys.modules\n')
    (tmp_path / "espnet2").mkdir()  # an ESPnet with no adapters, which is imported quickly
    (tmp_path / "espnet2" / "__init__.py").write_text("")
    env = {"PYTHONPATH": f"{Path(integration.__file__).parents[3]}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "ssvdo_kernels.integrations.espnet.run", "-m", "espnet_train", "--a", "b c"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout == "['--a', 'b c'] True True\n", done.stderr


@pytest.mark.parametrize("arguments", [[], ["-m"], ["-m", "pip", "list"], ["-c", "0"], ["local/prepare.py", "-m"]])
def test_the_launcher_leaves_the_rest_to_python(monkeypatch, arguments):
    asked = []
    monkeypatch.setattr(os, "execv", lambda *call: asked.append(call) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        run_launcher()
    assert asked == [(sys.executable, [sys.executable, *arguments])]
