"""The preparation is kept while parameters stand and never stale; merging, modes, copies and state_dicts."""

import copy
import pickle
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import Made, assert_close, count_preparations, make_layer, prepared, randomise, reference_linear, three
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, cache, gradient_accumulation
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.diagnostics import complement_departure
from ssvdo_kernels.factorize import DEPARTURE
from ssvdo_kernels.model import group_layers
from ssvdo_kernels.ops import products, streams


def want(layer, x):
    return reference_linear(layer, x)


@pytest.fixture
def counted(monkeypatch):
    return count_preparations(monkeypatch)


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


def test_prepared_once_for_accumulation_evaluation_and_generation(counted):
    layer = make_layer(24, 8, outer_rank=3)
    for _ in range(3):
        layer(X).sum().backward()
    with torch.no_grad():
        layer.eval()(X)
        layer.train()(X[:1])
    assert counted == {"forward": [1], "backward": [1, 1, 1]}


def optimiser_step(layer):
    layer(X).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()


class OldStyle(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(0.01)


def in_place(layer):
    with torch.no_grad():
        layer.adapter.outer[0, 0] += 0.5


def load(layer):
    layer.load_state_dict(make_layer(24, 8, outer_rank=3, seed=5).state_dict())


def load_assign(layer):
    layer.load_state_dict(make_layer(24, 8, outer_rank=3, seed=5).state_dict(), assign=True)


def replace_data(layer):
    layer.adapter.inner_scale.data = torch.ones_like(layer.adapter.inner_scale)


def one_number_through_data(layer):
    layer.adapter.inner_rotation.data[0] += 0.5


def edit_weight(layer):
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.adapter.singular_values.mul_(2)
    layer.adapter.origin.forget()  # the factors are the new weight's


def scale_weight_through_data(layer):
    """Twice, so that the second may come to lie where the first did."""
    layer.adapter.singular_values.data = layer.adapter.singular_values.data * 4
    for _ in range(2):
        layer.weight.data = layer.weight.data * 2
    layer.adapter.origin.forget()


def exchange_parameters(layer):
    for name in PARAMETER_NAMES:
        setattr(layer.adapter, name, nn.Parameter(getattr(layer.adapter, name).detach() + 0.5))


CHANGES = [optimiser_step, lambda layer: OldStyle(layer.adapter.trained).step(), in_place, load, load_assign,
           replace_data, one_number_through_data, edit_weight, scale_weight_through_data, exchange_parameters]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("<>"))
def test_never_stale(change, merged):
    layer = make_layer(24, 8, outer_rank=3)
    if merged:
        layer.merge()
    before = layer(X)
    change(layer)
    after = layer(X)
    assert_close("after", after, want(layer, X), 1e-11)
    assert not torch.allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", ["weight", "basis", "singular_values", "outer_basis", "null_basis", "set_factors"])
def test_an_edit_of_any_frozen_tensor_is_seen(name, rank, merged):
    """Of one alone, which no reference describes: a copy that starts afresh is the truth."""
    layer = make_layer(24, 8, outer_rank=rank, inner_ratio=1.0, rank=5, path="merged" if merged else "factored")
    before = layer(X)
    with torch.no_grad():
        if name == "set_factors":
            flipped = replace(layer.adapter.factors, basis=layer.adapter.basis.flip(1).contiguous())
            layer.adapter.set_factors(flipped, layer.weight)
        elif (tensor := getattr(layer if name == "weight" else layer.adapter, name)) is not None:
            tensor.mul_(1.5)
    if name == "weight":
        with pytest.raises(RuntimeError, match="layer: weight is no longer the one that was factorised"):
            layer(X)
        layer.adapter.origin.forget()
    after = layer(X)
    assert torch.equal(after, copy.deepcopy(layer)(X))
    assert torch.equal(after, before) == (name == "outer_basis" and rank == 0)


def rescale(layer):
    layer.adapter.scale = 0.5


def replace_basis(layer):
    layer.adapter.basis = nn.Parameter(layer.adapter.basis.detach().clone(), requires_grad=False)


@pytest.mark.parametrize("change", [optimiser_step, in_place, load, load_assign, edit_weight, scale_weight_through_data,
                                    exchange_parameters, replace_basis, rescale, SSVDOLinear.refresh,
                                    SSVDOLinear.float], ids=lambda f: f.__name__)  # fmt: skip
def test_what_follows_from_frozen_tensors_is_made_once(change):
    """A source is that of the last preparation where nothing but numbers of the parameters has changed since."""
    layer = make_layer(24, 8, outer_rank=3)
    before = prepared(layer)
    change(layer)
    after = prepared(layer)
    assert after is not before
    assert (after.source is before.source) == (change in (optimiser_step, in_place))


@pytest.mark.parametrize("name", ["basis", "singular_values", "outer_basis", "null_basis"])
def test_what_is_made_once_holds_no_numbers(name):
    """An edit of a frozen tensor that leaves no trace is in the next preparation."""
    layer = make_layer(24, 8, outer_rank=3, inner_ratio=1.0, rank=5)
    layer(X)
    getattr(layer.adapter, name).data.mul_(1.5)
    in_place(layer)
    assert torch.equal(layer(X), copy.deepcopy(layer)(X))


def test_a_weight_where_another_lay_is_another():
    """An address and a version tell tensors apart only while the first is alive."""
    layer = make_layer(24, 8, outer_rank=0)
    layer.merge()
    for factor in (2, 3, 5, 7, 11, 13):
        layer(X)
        for _ in range(2):  # the second may take the place of what was there at the forward
            layer.weight.data = layer.weight.data * factor
        layer.adapter.singular_values.data *= factor**2
        layer.adapter.origin.forget()
        assert_close(f"times {factor}", layer(X), want(layer, X), 1e-11)


def grads(layer):
    return [p.grad.clone() for p in layer.adapter.trained]


@pytest.mark.parametrize("accumulate", [False, True])
def test_exchanged_parameters_of_the_same_numbers_get_their_gradients(accumulate):
    layer, plain = make_layer(24, 8, outer_rank=3), make_layer(24, 8, outer_rank=3)
    layer(X)
    old = layer.adapter.trained
    for name in PARAMETER_NAMES:
        setattr(layer.adapter, name, nn.Parameter(getattr(layer.adapter, name).detach().clone()))
    plain(X).square().sum().backward()
    if accumulate:
        with gradient_accumulation(layer):
            layer(X).square().sum().backward()
    else:
        layer(X).square().sum().backward()
    assert all(p.grad is None for p in old)
    for a, b in zip(grads(layer), grads(plain), strict=True):
        assert_close("grad", a, b, 1e-12)


def test_parameters_exchanged_inside_gradient_accumulation_are_an_error():
    layer = make_layer(24, 8, outer_rank=3)
    with pytest.raises(RuntimeError, match="changed inside gradient_accumulation"), gradient_accumulation(layer):
        layer(X).sum().backward()
        layer.adapter.outer = nn.Parameter(layer.adapter.outer.detach().clone())
        layer(X)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("rotation", ["cayley", "neumann", "first_order"])
@pytest.mark.parametrize("dtype, tokens", [(torch.float64, 3), (torch.float64, 50), (torch.bfloat16, 50)])
def test_a_backward_is_of_the_inner_parameters_of_its_forward(dtype, tokens, rotation, backend):
    layer, plain = (make_layer(24, 8, dtype=dtype, outer_rank=3, rotation=rotation, backend=backend) for _ in range(2))
    x = torch.randn(tokens, 8).to(dtype)
    plain(x).square().sum().backward()
    loss = layer(x).square().sum()
    with torch.no_grad():
        layer.adapter.inner_rotation.add_(0.5)
        layer.adapter.inner_scale.add_(0.5)
    loss.backward()
    for a, b in zip(grads(layer), grads(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("through_data", [False, True])
def test_an_edit_of_the_outer_part_before_the_backward_is_an_error(through_data, backend):
    """As PyTorch says of its own operations; on a CPU, where it leaves no trace, too."""
    layer = make_layer(24, 8, outer_rank=3, backend=backend)
    y = layer(X)
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        (layer.adapter.outer.data if through_data else layer.adapter.outer).add_(0.5)
    with pytest.raises(RuntimeError, match="`outer` was changed in place between a forward and its backward"):
        y.sum().backward()


def write_the_same(layer):
    with torch.no_grad():
        for p in layer.adapter.trained:
            p.mul_(1)


def step_by_nothing(layer):
    """As a schedule that warms up from 0 does."""
    layer(X).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.0).step()


def there_and_back(layer):
    for outer in (torch.zeros_like(layer.adapter.outer), layer.adapter.outer.detach().clone()):
        with torch.no_grad():
            layer.adapter.outer.copy_(outer)


def exchange_for_the_same(layer):
    """And the old ones go on elsewhere."""
    old = layer.adapter.trained
    for name in PARAMETER_NAMES:
        setattr(layer.adapter, name, nn.Parameter(getattr(layer.adapter, name).detach().clone()))
    with torch.no_grad():
        for p in old:
            p.add_(0.5)


@pytest.mark.parametrize("write", [write_the_same, step_by_nothing, there_and_back, exchange_for_the_same,
                                   lambda layer: layer.load_state_dict(layer.state_dict())])  # fmt: skip
def test_writing_the_same_numbers_is_no_edit(write):
    layer, plain = make_layer(24, 8, outer_rank=3), make_layer(24, 8, outer_rank=3)
    plain(X).square().sum().backward()
    layer(X)
    for _ in range(2):
        write(layer)
        layer.zero_grad()
        layer(X).square().sum().backward()
        for a, b in zip(grads(layer), grads(plain), strict=True):
            assert_close("grad", a, b, 1e-12)


def test_dtype_moves_and_copies_are_not_stale():
    layer = make_layer(24, 8, outer_rank=3, path="factored")
    layer(X)
    twin = copy.deepcopy(layer)
    randomise(twin)
    assert_close("copy", twin(X), want(twin, X), 1e-11)
    assert_close("original", layer(X), want(layer, X), 1e-11)
    thawed = pickle.loads(pickle.dumps(layer))
    assert torch.equal(thawed(X), layer(X))
    y = layer(X)
    layer.float()
    assert_close("float32", layer(X.float()), y, 1e-5)
    layer.double()
    assert_close("and back", layer(X), y, 1e-5)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("rank", [None, 3])
def test_modules_may_swap_their_tensors(swapping, rank):
    layer = make_layer(24, 8, outer_rank=3, rank=rank)
    y = layer(X).detach()
    layer.load_state_dict({key: t.clone() for key, t in layer.state_dict().items()})
    assert torch.equal(layer(X), y)
    layer.float()
    assert_close("float32", layer(X.float()), y, 1e-5)
    layer.double()(X).sum().backward()


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
def test_gradient_accumulation_gives_the_same_gradients_with_one_preparation(counted, m, n, form):
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
    for a, b in zip(grads(once), grads(plain), strict=True):
        assert_close("grad", a, b, 1e-12)


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
    for a, b in zip(grads(layer), grads(plain), strict=True):
        assert_close("grad", a, b, 1e-11)


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
    assert_close("y", layer(X), want(layer, X), 1e-11)


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
    assert_close("y", layer(x), want(layer, x), 1e-11)
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


def test_what_was_captured_is_never_trusted_again(monkeypatch):
    """A replay of a CUDA graph changes parameters without a trace: each eager forward looks for itself."""
    layer, x = make_layer(24, 8, outer_rank=3), torch.randn(5, 8, dtype=torch.float64)
    layer(x)
    monkeypatch.setattr(cache, "_on_cpu", lambda _: False)  # parameters are known by their stamps, as on a GPU
    monkeypatch.setattr(cache, "capturing", lambda _: True)
    monkeypatch.setattr("ssvdo_kernels.adapter.capturing", lambda _: True)
    layer(x).sum().backward()
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_on_cpu", lambda _: False)
    for _ in range(2):
        for p in layer.adapter.trained:
            p.data.add_(0.1)  # no stamp changes
        assert_close("y", layer(x), reference_linear(layer, x), 1e-11)
    with gradient_accumulation(layer):  # which takes the preparation that it sums on
        layer.zero_grad()
        for part in x.split(2):
            layer(part).sum().backward()
    wide = [p.detach().clone().requires_grad_() for p in three(layer)]
    reference_linear(layer, x, wide).sum().backward()
    for p, q in zip(three(layer), wide, strict=True):
        assert_close("grad", p.grad, q.grad, 1e-11)


def test_another_stream_waits_for_what_was_made_on_the_first(monkeypatch):
    waited, stream = [], [1]
    monkeypatch.setattr(streams, "current", lambda _: stream[0])
    monkeypatch.setattr(streams, "event", lambda _: SimpleNamespace(wait=lambda made=stream[0]: waited.append(made)))
    layer, x = make_layer(24, 8, outer_rank=3), torch.randn(5, 8, dtype=torch.float64)
    layer(x)
    layer(x)
    assert waited == []
    stream[0] = 2
    layer(x)
    assert waited == [1]
    layer.merge()
    layer(x)  # W' is built on the second stream
    waited.clear()
    stream[0] = 1
    layer(x)
    assert waited == [2]
