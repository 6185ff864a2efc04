"""Weights that change after they were factorised are noticed, in every way that they can change."""

import copy

import pytest
import torch
from helpers import make_layer
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, refactorize_ssvdo, save_ssvdo
from ssvdo_kernels.ops.base import DenseBase
from ssvdo_kernels.origin import Origin, weight_sketch

CONFIG = SSVDOConfig(outer_rank=3, init_angle=0.2)
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def plain(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))


def adapted(seed=0):
    torch.manual_seed(9)
    return apply_ssvdo(plain(seed), SSVDOConfig(outer_rank=3, init_angle=0.2, target_modules=("0", "2")))


def load(model, other):
    model.load_state_dict(other.state_dict(), strict=False)


def assign(model, other):
    model.load_state_dict(other.state_dict(), strict=False, assign=True)
    model.requires_grad_(False)


def data(model, other):
    model[2].weight.data = other[2].weight.data


def copy_into(model, other):
    with torch.no_grad():
        model[2].weight.copy_(other[2].weight)


def copy_into_data(model, other):
    """Leaves neither another version nor another storage."""
    model[2].weight.data.copy_(other[2].weight)


def initialise(model, other):
    nn.init.xavier_uniform_(model[2].weight.data)


def one_entry(model, other):
    with torch.no_grad():
        model[2].weight[3, 4] += 1e-6


WITH_TRACE, WITHOUT = [load, assign, data, copy_into, one_entry], [copy_into_data, initialise]
CASES = [(way, ran) for ran in (False, True) for way in (*WITH_TRACE, *([] if ran else WITHOUT))]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way, ran", CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_another_weight_is_refused_and_adapted_where_asked(way, ran, merged):
    model = adapted()
    if merged:
        model[2].merge()
    if ran:
        model(X).sum().backward()
    way(model, plain(1))
    with pytest.raises(RuntimeError, match=r"[02]: weight is no longer the one that was factorised.*refactorize_ssvdo"):
        model(X)
    made = copy.deepcopy(model)
    assert refactorize_ssvdo(made) is made
    want = apply_ssvdo(nn.Sequential(*(m.to_linear() if hasattr(m, "adapter") else m for m in copy.deepcopy(made))),
                       SSVDOConfig(outer_rank=3, target_modules=("0", "2")))  # fmt: skip
    for i in (0, 2):
        want[i].adapter.load_state_dict({n: p for n, p in made[i].adapter.state_dict().items()
                                         if n in ("inner_rotation", "inner_scale", "outer")}, strict=False)
    torch.testing.assert_close(made(X), want(X))


@pytest.mark.parametrize("way", WITHOUT, ids=lambda f: f.__name__)
def test_what_leaves_no_trace_is_noticed_at_saving(tmp_path, way):
    model = adapted()
    model(X)
    way(model, plain(1))
    with pytest.raises(RuntimeError, match="2: weight is no longer"):
        save_ssvdo(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_compiled_model_notices_too():
    model = adapted()
    run = torch.compile(model, backend="aot_eager")
    run(X)
    load(model, plain(1))
    with pytest.raises(RuntimeError, match="weight is no longer"):
        run(X)


def same(model):
    load(model, plain(0))


def moved_and_cast(model):
    model.double().float()


def checkpoint(model):
    """Weights, factors and all, as a resumed run has them."""
    model.load_state_dict(adapted(1).state_dict())


def assigned_checkpoint(model):
    model.load_state_dict(adapted(1).state_dict(), assign=True)


@pytest.mark.parametrize("change", [same, moved_and_cast, checkpoint, assigned_checkpoint], ids=lambda f: f.__name__)
def test_the_same_weight_and_weights_with_their_factors_pass(change, tmp_path):
    model = adapted()
    model(X)
    change(model)
    model(X).sum().backward()
    save_ssvdo(model, tmp_path)
    copy_into(model, plain(2))  # and the next change is seen again
    with pytest.raises(RuntimeError, match="weight is no longer"):
        model(X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_weight_is_known_and_another_of_that_dtype_is_not(dtype):
    model = adapted().to(dtype)
    model(X.to(dtype))
    load(model, plain(1).to(dtype))
    with pytest.raises(RuntimeError, match="weight is no longer"):
        model(X.to(dtype))


def test_numbers_are_read_once_a_weight(monkeypatch):
    read = []
    monkeypatch.setattr("ssvdo_kernels.origin.weight_sketch", lambda w: read.append(1) or weight_sketch(w))
    layer = make_layer(24, 8, outer_rank=3)
    optimiser = torch.optim.SGD(layer.adapter.trained, 0.1)
    for _ in range(4):
        layer(X.double()).sum().backward()
        optimiser.step()
    assert len(read) == 2  # when it was factorised and at the first forward


def test_an_origin_that_was_told_nothing_takes_the_first_weight():
    origin, w = Origin(), torch.randn(4, 3)
    origin.check(DenseBase(w), "a")
    origin.check(DenseBase(w.clone()), "a")
    with pytest.raises(RuntimeError, match="a: weight"):
        origin.check(DenseBase(w + 1e-3), "a")
