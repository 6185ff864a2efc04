"""Merging, modes, casts, state_dicts and gradient accumulation of a layer."""

import copy
from contextlib import nullcontext

import pytest
import torch
from groups import agree
from helpers import (
    Made,
    assert_close,
    count_preparations,
    make_layer,
    prepared,
    randomise,
    reference_linear,
    storages,
    three,
)
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, gradient_accumulation
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.diagnostics import complement_departure
from ssvdo_kernels.factorize import DEPARTURE
from ssvdo_kernels.model import group_layers
from ssvdo_kernels.ops import products

X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("forwards", [1, 40])
def test_inference_mode_leaves_nothing_that_training_cannot_use(forwards):
    layer = make_layer(24, 8, outer_rank=3)
    x = torch.randn(50, 8, dtype=torch.float64)
    want = layer(x).detach()
    layer.refresh()
    with torch.inference_mode():
        for _ in range(forwards):  # later ones build the folded matrices
            assert_close("y", layer(x), want, 1e-12)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.adapter.trained)


def test_a_state_dict_loaded_in_inference_mode_leaves_what_trains():
    layer = make_layer(24, 8, outer_rank=3, inner_ratio=1.0, rank=5)
    other = make_layer(24, 8, outer_rank=3, inner_ratio=1.0, rank=3, seed=1)
    with torch.inference_mode():
        layer.load_state_dict(other.state_dict())
    assert not any(p.is_inference() for p in layer.parameters())
    torch.func.grad(lambda x: layer(x).sum())(X)
    assert torch.equal(layer(X), other(X))


@pytest.mark.parametrize("form", ["auto", "merged", "core"])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_gradient_accumulation_gives_the_same_gradients_with_one_preparation(monkeypatch, m, n, form):
    counted = count_preparations(monkeypatch)
    plain, once = (make_layer(m, n, outer_rank=3, path=form) for _ in range(2))
    batches = [torch.randn(4, n, dtype=torch.float64) for _ in range(3)]
    for layer in (plain, once):  # gradients that are there already
        layer(batches[0]).square().sum().backward()
    for x in batches:
        plain(x).square().sum().backward()
    counted["forward"].clear()
    counted["backward"].clear()
    with gradient_accumulation(nn.Sequential(once)):
        for x in batches:
            once(x).square().sum().backward()
    assert counted == {"forward": [], "backward": [1]}
    agree(once, plain, 1e-12)


def test_gradient_accumulation_refuses_steps_inside_nesting_and_keeps_grad_on_errors():
    layer = make_layer(24, 8, outer_rank=3)
    with pytest.raises(RuntimeError, match="changed inside gradient_accumulation"), gradient_accumulation(layer):
        layer(X).sum().backward()
        randomise(layer)
        layer(X)
    assert layer.adapter.outer.grad is None
    with gradient_accumulation(layer):
        with pytest.raises(RuntimeError, match="already open"), gradient_accumulation(layer):
            pass
        layer(X).sum().backward()
    assert layer.adapter.outer.grad is not None


def test_merge_keeps_the_weight_bit_for_bit_and_is_undone_exactly():
    layer = make_layer(24, 8, dtype=torch.float32, outer_rank=3)
    x = X.float()
    weight, state, y = layer.weight.clone(), copy.deepcopy(layer.state_dict()), layer(x)
    layer.merge()
    assert layer.merged
    assert_close("merged", layer(x), y, 1e-6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.adapted_weight(), layer.bias))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key
    layer.unmerge()
    assert torch.equal(layer(x), y) and torch.equal(layer.weight, weight)
    assert torch.equal(layer.to_linear().weight, weight)
    assert_close("to_linear", layer.to_linear(merge=True)(x), y, 1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_train_and_eval_change_nothing_by_themselves(merged):
    layer = make_layer(24, 8, outer_rank=3, path="factored")
    if merged:
        layer.merge()
    y, state = layer(X), copy.deepcopy(layer.state_dict())
    for switch in (layer.eval, layer.train, layer.eval):
        switch()
        assert torch.equal(layer(X), y) and layer.merged == merged
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def test_a_merged_layer_still_trains():
    layer, plain = make_layer(24, 8, outer_rank=3), make_layer(24, 8, outer_rank=3)
    layer.merge()
    for each in (layer, plain):
        each(X).square().sum().backward()
    agree(layer, plain, 1e-11)


@pytest.mark.parametrize("how", ["alone", "grouped", "accumulated"])
@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_one_backward_may_be_of_several_forms(m, n, how):
    """Through M and F, through W' and through W' as a tensor."""
    layers = [make_layer(m, n, outer_rank=3, seed=seed) for seed in (0, 1)]
    if how == "grouped":
        group_layers(nn.ModuleList(layers))
    x = torch.randn(5, n, dtype=torch.float64)
    for layer in layers:
        with gradient_accumulation(layer) if how == "accumulated" else nullcontext():
            ys = [layer(x), layer(x[:2])]
            layer.merge()
            ys += [layer(x), layer(x[1:]), x @ layer.adapter.dense(layer.base()).mT]
            sum((i + 1) * y.square().sum() for i, y in enumerate(ys)).backward()
        wide = [p.detach().clone().requires_grad_() for p in three(layer)]
        ys = [reference_linear(layer, rows, wide) for rows in (x, x[:2], x, x[1:], x)]
        ys[-1] = ys[-1] - layer.bias
        sum((i + 1) * y.square().sum() for i, y in enumerate(ys)).backward()
        for p, q in zip(three(layer), wide, strict=True):
            assert_close("grad", p.grad, q.grad, 1e-10)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_state_dict_holds_everything(rank, assign):
    """A layer over other (random) weights becomes the saved one: its factors, null space and all."""
    saved = make_layer(24, 8, outer_rank=3, inner_ratio=1.0, rank=rank, path="factored")
    for other in (None, 3, 5):  # the rank of the other weights
        layer = make_layer(24, 8, outer_rank=3, inner_ratio=1.0, rank=other, seed=9, path="factored")
        layer(X)
        layer.load_state_dict(saved.state_dict(), assign=assign)
        assert torch.equal(layer(X), saved(X))
    assert all(v.is_floating_point() for v in saved.state_dict().values())  # checkpoint averaging sums integers wrongly


def ill_conditioned(seed):
    """A bfloat16 layer whose V is kept in float32."""
    torch.manual_seed(seed)
    linear = nn.Linear(8, 24).double()
    with torch.no_grad():
        u, _, vt = torch.linalg.svd(linear.weight, full_matrices=False)
        linear.weight.copy_(u * torch.logspace(0, -2.5, 8, dtype=torch.float64) @ vt)
    return SSVDOLinear.from_linear(linear.bfloat16(), SSVDOConfig(outer_rank=3))


def test_state_dict_brings_the_dtype_of_the_basis():
    half, single = make_layer(24, 8, dtype=torch.bfloat16, outer_rank=3), ill_conditioned(0)
    assert (half.adapter.basis.dtype, single.adapter.basis.dtype) == (torch.bfloat16, torch.float32)
    for source, target in ((half, ill_conditioned(1)), (single, make_layer(24, 8, dtype=torch.bfloat16, outer_rank=3))):
        target.load_state_dict(source.state_dict())
        assert target.adapter.basis.dtype == source.adapter.basis.dtype
        assert torch.equal(target(X.bfloat16()), source(X.bfloat16()))


@pytest.mark.parametrize("name, size", [("null_basis", (23, 2)), ("null_basis", (24, 9)), ("basis", (8, 7)),
                                        ("outer_basis", (24, 2)), ("inner_scale", (3,))])  # fmt: skip
def test_a_state_dict_of_other_sizes_is_refused_and_names_the_tensor(name, size):
    layer = make_layer(24, 8, outer_rank=3)
    state = layer.state_dict() | {f"adapter.{name}": torch.zeros(size, dtype=torch.float64)}
    with pytest.raises(RuntimeError, match=rf"adapter\.{name}"):
        layer.load_state_dict(state)


def test_a_state_dict_of_trained_numbers_alone_keeps_the_factors():
    layer, other = (make_layer(24, 8, outer_rank=3, inner_ratio=1.0, rank=3, seed=seed) for seed in (0, 1))
    trained = {f"adapter.{name}": getattr(other.adapter, name).detach() for name in PARAMETER_NAMES}
    assert layer.load_state_dict(trained, strict=False).unexpected_keys == []
    assert layer.adapter.null_basis.shape == (24, 5)
    for name, value in zip(PARAMETER_NAMES, three(layer), strict=True):
        assert torch.equal(value, trained[f"adapter.{name}"])
    assert_close("y", layer(X), reference_linear(layer, X), 1e-11)


# m, n, options, the parts that are not there
BARE = [(8, 8, {"outer_rank": 0}, {"outer", "outer_basis", "null_basis"}),
        (24, 8, {"outer_rank": 0}, {"outer", "outer_basis", "null_basis"}),
        (24, 8, {"outer_rank": 3, "inner_ratio": 0.1}, {"inner_rotation", "null_basis"}),
        (8, 24, {"outer_rank": 3}, {"null_basis"}),
        (24, 8, {"outer_rank": 3, "inner_ratio": 1.0, "rank": 5}, set()),
        (1, 1, {"outer_rank": 0}, {"inner_rotation", "outer", "outer_basis", "null_basis"})]  # fmt: skip


@pytest.mark.parametrize("m, n, options, missing", BARE)
def test_what_has_no_numbers_is_not_there(m, n, options, missing, tmp_path):
    """No empty tensor anywhere: of one, safetensors, DeepSpeed, Adafactor and the largest of norms have no use."""
    from safetensors.torch import load_file, save_file

    layer = make_layer(m, n, path="factored", **options)
    parts = {*PARAMETER_NAMES, "basis", "singular_values", "outer_basis", "null_basis"}
    assert {part for part in parts if getattr(layer.adapter, part) is None} == missing
    assert set(layer.state_dict()) == {"weight", "bias", *(f"adapter.{part}" for part in parts - missing)}
    assert all(t.numel() for t in (*layer.state_dict().values(), *layer.parameters(), *layer.buffers()))
    x = torch.randn(5, n, dtype=torch.float64)
    layer(x).square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in layer.parameters() if p.grad is not None)
    assert float(nn.utils.clip_grad_norm_(layer.parameters(), 1.0, norm_type=float("inf"))) == largest
    before = layer.adapter.inner_scale.detach().clone()
    torch.optim.Adafactor([p for p in layer.parameters() if p.requires_grad]).step()
    assert not torch.equal(layer.adapter.inner_scale, before)
    assert_close("y", layer(x), reference_linear(layer, x), 1e-11)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = make_layer(m, n, seed=7, path="factored", **options)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), layer(x))


def test_no_tensor_of_the_size_of_the_complement():
    """The complement is m x (m - n); nothing as large is made by factorising, preparing, or a forward and backward."""
    m, n = 256, 32
    with Made() as mode:
        layer = SSVDOLinear.from_linear(nn.Linear(n, m), SSVDOConfig(outer_rank=8))
        layer(torch.randn(4, n)).sum().backward()
    assert mode.numel <= m * n < m * (m - n) / 4


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, n", [(160, 64), (64, 160)])
def test_a_preparation_makes_no_copy_of_the_frozen_matrices(m, n, dtype, backend, monkeypatch):
    """V is 64 x 64, W0 larger; both ways make (m + n) x l or k x k at most, and a tile where a half type is upcast."""
    monkeypatch.setattr(products, "TILE", 512)
    layer = make_layer(m, n, dtype=dtype, outer_rank=4, inner_ratio=0.25, backend=backend)
    assert layer.adapter.basis.dtype == dtype
    with Made(layer.parameters()) as mode:
        made = prepared(layer)
    assert mode.numel <= 160 * 4 < 64 * 64 / 4
    held = {t.untyped_storage().data_ptr() for t in layer.parameters()}
    assert made.outer.projector.basis.untyped_storage().data_ptr() in held
    assert made.outer.projector.tall.untyped_storage().data_ptr() in held
    with Made(layer.parameters()) as mode, gradient_accumulation(layer):
        layer(torch.randn(3, n).to(dtype)).sum().backward()
        mode.numel = 0  # of the preparation's way back alone, which leaving brings
    assert mode.numel <= (160 + 64) * 4 < 64 * 64 / 4  # [dF; A^T dF], where the tokens give it


@pytest.mark.parametrize("there", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_keep_their_dtypes_where_a_layer_is_cast(dtype, there):
    """S and V rounded again would be another weight's; and P is to be applied twice as long as V is rounded."""
    layer = make_layer(96, 24, dtype=dtype, outer_rank=3)
    before = {n: t.clone() for n, t in layer.adapter.factors.tensors().items()}
    layer.to(there)
    assert layer.weight.dtype == there and layer.adapter.inner_scale.dtype == there
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype
               for n, t in layer.adapter.factors.tensors().items())  # fmt: skip
    assert complement_departure(layer) <= (DEPARTURE if there.itemsize > 2 or there == dtype else 0.02)  # W0's rounding
    assert torch.isfinite(layer(torch.randn(2, 24, dtype=there))).all()


def clipped_and_stepped(layer, optimiser):
    nn.utils.clip_grad_norm_(layer.adapter.trained, 1.0)
    optimiser.step()


def unscaled_and_stepped(layer, optimiser):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros((), dtype=torch.float32))
    scaler.unscale_(optimiser)
    optimiser.step()


@pytest.mark.parametrize("finish", [clipped_and_stepped, unscaled_and_stepped, lambda _, optimiser: optimiser.step()],
                         ids=["clipped", "unscaled", "stepped"])  # fmt: skip
def test_a_step_inside_accumulation_is_an_error_and_changes_nothing(finish):
    layer, other = make_layer(24, 8, outer_rank=3), make_layer(24, 8, outer_rank=3)
    optimiser = torch.optim.SGD(layer.adapter.trained, 0.1)
    before = [p.clone() for p in layer.adapter.trained]
    with pytest.raises(RuntimeError, match=r"layer: .* inside gradient_accumulation"), \
            gradient_accumulation(layer):
        layer(X).square().sum().backward()
        finish(layer, optimiser)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(layer.adapter.trained, before, strict=True))
    with gradient_accumulation(layer):  # another model's optimiser may step at any time
        layer(X).square().sum().backward()
        other(X).square().sum().backward()
        torch.optim.SGD(other.adapter.trained, 0.1).step()
    optimiser.step()
    assert not torch.equal(layer.adapter.outer, before[2])


@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_that_has_moved_holds_nothing_of_where_it_was(merged):
    sizes = 59 * 23 * 4, 59 * 23 * 8  # bytes of W0 in float32 and float64, uncommon ones
    before = [storages(size) for size in sizes]

    def held():
        return [len(storages(size) - own) for size, own in zip(sizes, before, strict=True)]

    layer, x = make_layer(59, 23, dtype=torch.float32, outer_rank=4), torch.randn(3, 23)
    if merged:
        layer.merge()
    want = layer(x).detach()
    assert held() == [1 + merged, 0]
    layer.float()  # nothing moves
    assert held() == [1 + merged, 0]
    layer.double()
    assert held() == [0, 1]
    assert_close("y", layer(x.double()), want.double(), 1e-5)
