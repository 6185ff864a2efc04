"""Linear layers under other names: the same numbers as a dense float64 W', trained, saved, merged and given back."""

import copy
import pickle

import pytest
import torch
from helpers import randomise_all, three
from torch import nn
from transformers.pytorch_utils import Conv1D

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, load_ssvdo, merge_ssvdo, reference, remove_ssvdo, save_ssvdo
from ssvdo_kernels.host import hosts
from ssvdo_kernels.linear_maps import linear_map


class FalconLinear(nn.Linear):
    """As Transformers' Falcon has it."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear does."""


LAYERS = {
    "Conv1D": (lambda: Conv1D(12, 5), (3, 7, 5)), "Conv1D, wide": (lambda: Conv1D(5, 12), (2, 12)),
    "Conv1D, square": (lambda: Conv1D(6, 6), (2, 6)), "Falcon": (lambda: FalconLinear(5, 12), (3, 5)),
    "Falcon, no bias": (lambda: FalconLinear(12, 5, bias=False), (3, 12)), "subclass": (lambda: Renamed(5, 12), (3, 5)),
    "pointwise": (lambda: nn.Conv1d(5, 12, 1), (3, 5, 7)),
    "pointwise, no batch": (lambda: nn.Conv1d(12, 5, 1), (12, 7)),
    "pointwise 2d": (lambda: nn.Conv2d(5, 12, 1, bias=False), (2, 5, 3, 4)),
    "kernel 3": (lambda: nn.Conv1d(5, 12, 3, padding=1), (2, 5, 8)),
    "strided": (lambda: nn.Conv1d(5, 20, 3, stride=2, dilation=2, padding=2), (5, 9)),
    "same": (lambda: nn.Conv1d(5, 12, 4, padding="same", padding_mode="circular"), (2, 5, 9)),
    "kernel 3 x 2": (lambda: nn.Conv2d(3, 7, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 6, 5)),
    "kernel 3d": (lambda: nn.Conv3d(2, 5, (1, 2, 3), padding=(0, 0, 1)), (2, 2, 3, 4, 4)),
}  # fmt: skip


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build().to(dtype)
    with torch.no_grad():
        layer.weight.normal_(0, 0.3)
    return nn.ModuleDict({"fc1": layer}), torch.randn(shape, dtype=dtype)


def adapted(kind, dtype=torch.float64, **options):
    model, x = made(kind, dtype)
    apply_ssvdo(model, SSVDOConfig(**{"outer_rank": 2, "target_modules": ("fc1",), **options}))
    return randomise_all(model), x


def dense(kind, weight):
    """The plain layer with W' (out_features x in_features) in its weight."""
    layer = copy.deepcopy(made(kind, weight.dtype)[0]["fc1"])
    kept = linear_map(layer).as_kept(weight)
    return lambda x: torch.func.functional_call(layer, {"weight": kept}, (x,))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:outer_rank=2 is lowered", "ignore:Using padding='same'")
def test_outputs_and_gradients_are_those_of_the_dense_weight(kind):
    model, x = adapted(kind)
    (_, host), = hosts(model)
    base = linear_map(made(kind)[0]["fc1"]).base().dense()
    free = [p.detach().clone().requires_grad_() for p in three(host)]
    weight = reference.adapted_weight(base, *free, host.adapter.config)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = model["fc1"](mine), dense(kind, weight)(theirs)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    assert y.is_contiguous()
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    for p, q in zip(host.adapter.parts, free, strict=True):
        if p is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:outer_rank=2 is lowered", "ignore:Using padding='same'")
def test_the_life_of_a_layer(kind, tmp_path):
    plain, x = made(kind)
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    start = plain["fc1"](x)
    torch.testing.assert_close(apply_ssvdo(copy.deepcopy(plain), SSVDOConfig(outer_rank=2, init_angle=0.0))["fc1"](x),
                               start)  # fmt: skip
    model, _ = adapted(kind)
    y = model["fc1"](x).detach()
    assert float((y - start).abs().max()) > 1e-3
    save_ssvdo(model, tmp_path)
    torch.testing.assert_close(load_ssvdo(copy.deepcopy(plain), tmp_path)["fc1"](x), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))["fc1"](x), y)
    merge_ssvdo(model)
    torch.testing.assert_close(model["fc1"](x), y)
    twin = remove_ssvdo(copy.deepcopy(model), merge=True)["fc1"]
    assert type(twin) is type(plain["fc1"]) and twin.weight.shape == plain["fc1"].weight.shape
    torch.testing.assert_close(twin(x), y)
    back = remove_ssvdo(model)
    assert type(back["fc1"]) is type(plain["fc1"])
    state = back.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in state.items())


def test_what_the_layer_has_can_still_be_read_and_its_hooks_are_called():
    model, x = made("Conv1D")
    layer, seen = model["fc1"], []
    handle = layer.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
    apply_ssvdo(model, SSVDOConfig(outer_rank=2))
    host = model["fc1"]
    assert host is not layer and host.nf == 12 and host.weight is layer.weight and host.bias is layer.bias
    with pytest.raises(AttributeError, match="nothing"):
        _ = host.nothing
    host(x)
    assert seen == [(3, 7, 12)]
    handle.remove()
    assert remove_ssvdo(model)["fc1"] is layer
    layer(x)
    assert seen == [(3, 7, 12)]


@pytest.mark.parametrize("layer, words", [
    (nn.Embedding(4, 8), "looked up"), (nn.ConvTranspose1d(4, 8, 1), "no layer that is known"),
    (nn.Conv1d(4, 8, 1, groups=2), "groups=2"), (nn.LayerNorm(4), "no layer that is known"),
    (nn.Bilinear(4, 4, 8), "not linear in its input"),
    (type("Router", (nn.Linear,), {"forward": lambda self, x: x})(4, 8), "forward of its own"),
])
def test_what_is_no_linear_layer_is_refused_by_name_and_reason(layer, words):
    model = nn.ModuleDict({"fc1": layer, "fc2": nn.Linear(4, 8)})
    with pytest.raises(TypeError, match=rf"^fc1 is a .*{words}.*allowed: linear layers"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules=("fc1", "fc2")))
    assert model["fc1"] is layer and not any(True for _ in hosts(model))
    with pytest.warns(UserWarning, match=f"left out: fc1 is a .*{words}"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=2))
    assert [name for name, _ in hosts(model)] == ["fc2"] and model["fc1"] is layer


def test_a_wrong_shape_names_what_is_allowed():
    model, _ = adapted("kernel 3")
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 8\); allowed: \(N, 5\)"):
        model["fc1"](torch.randn(2, 4, 8, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["Conv1D", "pointwise", "kernel 3"])
def test_compiled_layers_agree(kind):
    model, x = adapted(kind)
    compiled = torch.compile(model["fc1"], fullgraph=True, backend="aot_eager")
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = compiled(mine), model["fc1"](theirs)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_an_all_linear_layer_whose_sizes_are_tensors():
    model = nn.ModuleDict({"fc1": nn.Linear(6, torch.tensor(14))})
    apply_ssvdo(model, SSVDOConfig(outer_rank=2))
    assert model["fc1"](torch.randn(3, 6)).shape == (3, 14)
