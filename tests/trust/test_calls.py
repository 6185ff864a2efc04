"""Ways to call a layer other than y = layer(x): fast paths, nested, meta and fake tensors, tracers, torch.func."""

import copy

import pytest
import torch
from helpers import make_layer
from torch import nn
from torch._subclasses import FakeTensorMode

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo, diagnose, load_ssvdo, remove_ssvdo, save_ssvdo
from ssvdo_kernels.host import hosts

CONFIG = SSVDOConfig(outer_rank=4, target_modules=("linear1", "linear2"))
X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def change(model):
    for _, host in hosts(model):
        for adapter in host.adapters():
            with torch.no_grad():
                for p in adapter.trained:
                    p.normal_(0, 0.1)
    return model.eval()


def native(model):
    return apply_ssvdo(model, CONFIG)


def by_hand(model):
    for layer in getattr(model, "layers", [model]):
        layer.linear1 = SSVDOLinear.from_linear(layer.linear1, CONFIG)
        layer.linear2 = SSVDOLinear.from_linear(layer.linear2, CONFIG)
    return model.requires_grad_(False)


def through_peft(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import ssvdo_kernels.integrations.peft  # noqa: F401

    return peft.get_peft_model(model, peft.SSVDOConfig(target_modules=["linear1", "linear2"], outer_rank=4))


def through_espnet(model):
    from ssvdo_kernels.integrations.espnet import create_ssvdo_adapter

    create_ssvdo_adapter(model, ["linear1", "linear2"], outer_rank=4)
    return model


HOSTS = [native, by_hand, through_peft, through_espnet]


@pytest.mark.parametrize("adapt", HOSTS, ids=lambda f: f.__name__)
def test_the_transformer_layers_fast_path_does_not_pass_the_adapter_by(adapt):
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(16, 2, 64, 0.0, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 16)
    base = plain(x)
    model = adapt(copy.deepcopy(plain))
    if adapt is through_espnet:
        model(x)  # factorises
    change(model)
    want = model.train()(x)  # no dropout: the slow path
    with torch.no_grad():
        got = model.eval()(x)
    torch.testing.assert_close(got, want)
    assert float((got - base).abs().max()) > 0.01


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("adapt", [native, through_peft, through_espnet], ids=lambda f: f.__name__)
def test_padded_batches_pass_an_encoder(adapt, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    model = adapt(copy.deepcopy(plain))
    if adapt is through_espnet:
        model(x)
    change(model)
    want = torch.stack([model(x[:1])[0, :3], model(x[1:, :3])[0]])
    with torch.set_grad_enabled(grad):
        got = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(got[1, :3], want[1])
    torch.testing.assert_close(got[0, :5], model(x[:1])[0])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_pass_as_through_nn_linear(layout):
    layer = make_layer(24, 8, outer_rank=3)
    parts = [X.clone(), X[:3].clone()]
    y = layer(torch.nested.nested_tensor(parts, layout=layout, requires_grad=True))
    assert y.is_nested and y.layout == layout
    for got, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(got, layer(part))
    (y.values() if layout == torch.jagged else torch.cat(y.unbind())).square().sum().backward()
    got = [p.grad.clone() for p in layer.adapter.trained]
    layer.zero_grad()
    layer(torch.cat(parts)).square().sum().backward()
    for a, p in zip(got, layer.adapter.trained, strict=True):
        torch.testing.assert_close(a, p.grad)


SIZES = [(24, 8, {"outer_rank": 3}), (8, 24, {"outer_rank": 3}), (24, 8, {"outer_rank": 0}),
         (24, 8, {"outer_rank": 8, "inner_ratio": 0.1}), (24, 8, {"outer_rank": 3, "rank": 5, "inner_ratio": 1.0}),
         (24, 8, {"outer_rank": 3, "outer": "additive", "rotation": "first_order"})]  # fmt: skip


@pytest.mark.parametrize("m, n, options", SIZES)
def test_torch_func_sees_the_same_map(m, n, options):
    layer = make_layer(m, n, **options)
    x = torch.randn(5, n, dtype=torch.float64)
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    assert trained

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    want = layer(x)
    torch.testing.assert_close(torch.vmap(layer)(x), want)
    found = torch.func.grad(loss)(trained, x)
    want.square().sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, layer.get_parameter(name).grad)
    tangents = {name: torch.randn_like(p) for name, p in trained.items()}
    _, along = torch.func.jvp(lambda p: loss(p, x), (trained,), (tangents,))
    torch.testing.assert_close(along, sum((found[name] * tangents[name]).sum() for name in trained))
    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    for name, gradient in found.items():
        torch.testing.assert_close(per_sample[name].sum(0), gradient)
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(jacobian, layer.adapted_weight())


@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_holds_the_adapted_weight(grad):
    model = change(apply_ssvdo(nn.Sequential(nn.Linear(8, 24)), SSVDOConfig(outer_rank=3, target_modules=("0",))))
    x = X.float()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
    want = model(torch.cat([x, x]))
    torch.testing.assert_close(traced(torch.cat([x, x])), want)
    change(model)
    assert not torch.allclose(model(x), want[:5], atol=1e-3)
    torch.testing.assert_close(traced(x), want[:5])  # as it was when it was traced


@pytest.mark.parametrize("call, says", [(torch.jit.script, "torch.jit.trace"),
                                        (torch.fx.symbolic_trace, "torch.export")])  # fmt: skip
def test_what_cannot_work_says_what_does(call, says):
    model = apply_ssvdo(nn.Sequential(nn.Linear(8, 24)), SSVDOConfig(outer_rank=3, target_modules=("0",)))
    before = model[0]
    with pytest.raises(TypeError, match=rf"{says}.*remove_ssvdo\(model, merge=True\)"):
        call(model)
    assert model[0] is before
    call(remove_ssvdo(model, merge=True))


def test_meta_and_fake_tensors_have_shapes():
    layer = make_layer(24, 8, outer_rank=3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(X.view(1, 5, 8)))
        assert y.shape == (1, 5, 24) and y.dtype == torch.float64
    layer.to("meta")
    y = layer(X.to("meta"))
    assert y.is_meta and y.shape == (5, 24)
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in layer.adapter.trained)


@pytest.mark.parametrize("adapted_inside", [False, True])
def test_a_model_made_in_inference_mode_trains(adapted_inside, tmp_path):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 24, bias=False))

    config = SSVDOConfig(outer_rank=3, target_modules=("0",), init_angle=0)
    with torch.inference_mode():
        model = plain()
        if adapted_inside:
            apply_ssvdo(model, config)
    if not adapted_inside:
        apply_ssvdo(model, config)
    torch.testing.assert_close(model(X.float()), plain()(X.float()))
    with torch.inference_mode():
        again = load_ssvdo(plain(), save_ssvdo(model, tmp_path))
    for one in (model, again):
        x = X.float().requires_grad_()
        one(x).sum().backward()
        assert x.grad is not None and all(p.grad is not None for p in one[0].adapter.trained)


def test_a_default_device_of_meta_does_not_reach_what_is_computed(tmp_path):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 24))

    bare, fresh, config = plain(), plain(), SSVDOConfig(outer_rank=3, target_modules=("0",))
    with torch.device("meta"):
        model = apply_ssvdo(bare, config)
        y = model(X.float())
        save_ssvdo(model, tmp_path)
        again = load_ssvdo(fresh, tmp_path)
        assert torch.equal(again(X.float()), y)
        diagnose(model)


def ragged(kind):
    parts = [torch.randn(k, 4, 8, dtype=torch.float64) for k in (2, 5, 3)]
    if kind == "transposed":
        return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    starts, lengths = torch.tensor([0, 0, 0]), torch.tensor([2, 3, 4])
    return torch.nested.narrow(torch.randn(3, 6, 8).double(), 1, starts, lengths, layout=torch.jagged)


@pytest.mark.parametrize("kind", ["transposed", "holes"])
def test_jagged_tensors_that_are_not_contiguous_are_refused_as_by_nn_linear(kind):
    layer, x = make_layer(24, 8, outer_rank=3), ragged(kind)
    with pytest.raises(ValueError, match="contiguous"):
        nn.Linear(8, 24).double()(x)
    with pytest.raises(ValueError, match="transposed or has holes; allowed: a contiguous one"):
        layer(x)
    if kind == "holes":
        for got, part in zip(layer(x.contiguous()).unbind(), x.unbind(), strict=True):
            torch.testing.assert_close(got, layer(part))


@pytest.mark.parametrize("made, says", [
    (lambda: None, "x is a NoneType; allowed"), (X.tolist, "x is a list"), (X.numpy, "x is a ndarray"),
    (X.to_sparse, r"layout torch.sparse_coo; allowed: torch.strided \(x.to_dense\(\)\)"),
    (X.to_sparse_csr, "layout torch.sparse_csr"), (lambda: X.float().to_mkldnn(), "layout torch._mkldnn"),
    (lambda: torch.nested.nested_tensor([]), "without components")],
    ids=["None", "list", "numpy", "COO", "CSR", "mkldnn", "no components"])  # fmt: skip
def test_what_is_no_dense_tensor_is_named(made, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make_layer(24, 8, outer_rank=3)(made())


def test_float64_under_autocast():
    layer = make_layer(24, 8, outer_rank=3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(X), layer(X.clone()))
        assert layer(X).dtype == torch.float64
        with pytest.raises(TypeError, match=r"x has dtype torch.float64; allowed: the weight's torch.float32"):
            layer.float()(X)


@pytest.mark.parametrize("grad", [False, True])
def test_what_comes_of_rows_is_no_view(grad):
    layer = make_layer(24, 8, outer_rank=3)
    with torch.set_grad_enabled(grad):
        y = layer(X).detach_()
    assert not y.requires_grad and y.shape == (5, 24)
    assert layer(X.view(1, 5, 8)).shape == (1, 5, 24) and layer(X[0]).shape == (24,)


def test_thawing_an_adapter_thaws_what_is_trained():
    layer = make_layer(24, 8, outer_rank=3)
    adapter = layer.adapter.requires_grad_(False)
    assert not any(p.requires_grad for p in adapter.parameters())
    assert adapter.requires_grad_() is adapter
    assert [p for p in adapter.parameters() if p.requires_grad] == adapter.trained
    layer(X).sum().backward()


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_on_an_adapter_are_called(kind, everywhere):
    layer, seen = make_layer(12, 5, outer_rank=3), []
    place = torch.nn.modules.module if everywhere else layer.adapter
    register = getattr(place, f"register_{'module_' if everywhere else ''}{kind}_hook")
    handle = register(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(4, 5, dtype=torch.float64, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert seen.count(layer.adapter) == 1
