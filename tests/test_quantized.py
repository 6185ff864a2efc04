"""Quantised bases: the same numbers as float64 equations on the dequantised weight; W0 is never kept dense."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import randomise_all, three
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, load_ssvdo, merge_ssvdo, reference, remove_ssvdo, save_ssvdo
from ssvdo_kernels.host import hosts
from ssvdo_kernels.linear_maps import linear_map

SIZES = {"tall": (192, 64), "wide": (64, 192), "square": (64, 64)}
CONFIG = SSVDOConfig(outer_rank=8, target_modules=("fc1",))
pytestmark = pytest.mark.filterwarnings("ignore:outer_rank=8 is lowered", "ignore:.*MatMul8bitLt.*")


def plain(m, n, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({"fc1": nn.Linear(n, m, dtype=dtype)})


def nf4(m, n, kind="nf4", **options):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = plain(m, n)
    layer = bnb.nn.Linear4bit(n, m, quant_type=kind, compute_dtype=torch.float32, **options)
    layer.load_state_dict(model["fc1"].state_dict())
    model["fc1"] = layer.to("cpu")
    return model


def int8(m, n):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = plain(m, n)
    layer = bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(model["fc1"].state_dict())
    model["fc1"] = layer.to("cpu")
    return model


def torchao(m, n, config, dtype=torch.float32):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = plain(m, n, dtype)
    quantization.quantize_(model, config(quantization))
    return model


def hqq(m, n):
    core = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    model, config = plain(m, n), core.BaseQuantizeConfig(nbits=4, group_size=32)
    model["fc1"] = core.HQQLinear(model["fc1"], config, compute_dtype=torch.float32, device="cpu")
    return model


FORMATS = {
    "nf4": nf4, "fp4": lambda m, n: nf4(m, n, "fp4"),
    "nf4, double": lambda m, n: nf4(m, n, compress_statistics=True), "int8": int8,
    "torchao int8": lambda m, n: torchao(m, n, lambda q: q.Int8WeightOnlyConfig()),
    "torchao int4": lambda m, n: torchao(m, n, lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao float8": lambda m, n: torchao(m, n, lambda q: q.Float8WeightOnlyConfig(), torch.bfloat16), "hqq": hqq,
}  # fmt: skip

# bitsandbytes' int8 product rounds each row of x to 127 steps: |dx| <= max|x| / 254, so that y errs by about
# max|x| / 254 / sqrt(3) |W| a row. bfloat16 tokens and weights round to 2^-9 at each of the three products.
TOLERANCE = {"int8": 0.03, "torchao float8": 0.02}


def close(got, want, kind):
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm())
    assert error <= TOLERANCE.get(kind, 2e-5), error


def adapted(kind, size):
    model = apply_ssvdo(FORMATS[kind](*SIZES[size]), CONFIG)
    torch.manual_seed(3)
    return randomise_all(model, 0.1)


def inputs(kind, size):
    x = torch.randn(24, SIZES[size][1], generator=torch.Generator().manual_seed(1))
    return x.bfloat16() if kind == "torchao float8" else x


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", FORMATS)
def test_outputs_and_gradients_are_those_of_the_dequantised_weight(kind, size):
    model, x = adapted(kind, size), inputs(kind, size)
    host = model["fc1"]
    weight = linear_map(host.base_layer).base().dense().double()
    free = [p.detach().double().requires_grad_() for p in three(host)]
    bias = host.bias.detach().double()
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y = model["fc1"](mine)
    want = reference.linear(theirs, weight, bias, *free, config=host.adapter.config)
    assert y.dtype == x.dtype
    close(y, want, kind)
    assert float((want - nn.functional.linear(theirs, weight, bias)).norm() / want.norm()) > 0.05
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy.double())
    close(mine.grad, theirs.grad, kind)
    for p, q in zip(host.adapter.parts, free, strict=True):
        if p is not None:
            close(p.grad, q.grad, kind)


def test_dropout_leaves_nothing_dense_for_the_backward():
    model = apply_ssvdo(FORMATS["nf4"](*SIZES["tall"]), replace(CONFIG, dropout=0.3))
    host, x, saved = randomise_all(model, 0.1)["fc1"], inputs("nf4", "tall").requires_grad_(), []
    W0 = host.base().dense()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.manual_seed(7)
        y = host(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.3)
    want = nn.functional.linear(x, W0, host.bias) + dropped @ (host.adapted_weight() - W0).mT
    close(y, want, "nf4")
    close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (y, want)), "nf4")
    assert all(t.numel() < W0.numel() or not t.is_floating_point() or t.shape == x.shape for t in saved)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_life_of_a_quantised_layer(kind, tmp_path):
    base, x = FORMATS[kind](*SIZES["tall"]), inputs(kind, "tall")
    start = base["fc1"](x).detach()
    bits = [t.clone() for t in linear_map(base["fc1"]).base().tensors]
    fresh = apply_ssvdo(FORMATS[kind](*SIZES["tall"]), SSVDOConfig(outer_rank=8, init_angle=0.0))
    close(fresh["fc1"](x), start, kind)
    model = adapted(kind, "tall")
    y = model["fc1"](x).detach()
    save_ssvdo(model, tmp_path)
    close(load_ssvdo(FORMATS[kind](*SIZES["tall"]), tmp_path)["fc1"](x), y, kind)
    merge_ssvdo(model)
    close(model["fc1"](x), y, kind)
    merged = remove_ssvdo(model, merge=True)["fc1"]
    assert type(merged) is nn.Linear and type(merged.weight.data) is torch.Tensor
    close(merged(x.to(merged.weight.dtype)), y, kind)
    back = remove_ssvdo(adapted(kind, "tall"))["fc1"]
    assert all(torch.equal(a, b) for a, b in zip(linear_map(back).base().tensors, bits, strict=True))
    close(back(x), start, kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_dense_is_kept(kind):
    """Of the size of W0, only V (a quarter or a third), U_l and the packed weight are held between steps."""
    model = adapted(kind, "tall")
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(3):
        model["fc1"](inputs(kind, "tall")).square().sum().backward()
        optimiser.step()
    large = 192 * 64
    prepared = model["fc1"].adapter.prepared(model["fc1"].base())
    held = [t for t in vars(prepared).values() if isinstance(t, torch.Tensor)] + list(prepared.kept.values())
    assert all(t.numel() < large for t in held if t.is_floating_point())
    assert all(t.numel() < large for n, t in model.named_parameters() if ".adapter." in n)
    assert prepared.source.base.held is False


@pytest.mark.parametrize("kind", ["nf4", "torchao int8", "hqq"])
def test_an_edited_quantised_weight_is_noticed(kind):
    model, x = adapted(kind, "tall"), inputs(kind, "tall")
    model["fc1"](x)
    tensors = linear_map(model["fc1"].base_layer).base().tensors
    with torch.no_grad():
        tensors[1][:1].zero_()  # one of its scales
    with pytest.raises(RuntimeError, match="fc1: weight is no longer the one that was factorised"):
        model["fc1"](x)


def test_compiled_models_with_a_quantised_layer_agree():
    model, x = adapted("nf4", "tall"), inputs("nf4", "tall")
    body = nn.Sequential(model["fc1"], nn.GELU())
    want = body(x)
    torch.testing.assert_close(torch.compile(body, backend="aot_eager")(x), want, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_not_quantised_yet_is_refused():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = nn.ModuleDict({"fc1": bnb.nn.Linear4bit(64, 192)})
    with pytest.raises(TypeError, match=r"fc1.*not quantised yet"):
        apply_ssvdo(model, CONFIG)
    model = nn.ModuleDict({"fc1": bnb.nn.Linear8bitLt(64, 192, has_fp16_weights=True)})
    with pytest.raises(TypeError, match=r"fc1.*trains its weight"):
        apply_ssvdo(model, CONFIG)


# -- through PEFT ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao int8", "hqq"])
def test_through_peft(kind, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.21", reason="its quantisation backends came with PEFT 0.21")
    import ssvdo_kernels.integrations.peft  # noqa: F401

    base, x = FORMATS[kind](*SIZES["tall"]), inputs(kind, "tall")
    start = base["fc1"](x).detach()
    config = peft.SSVDOConfig(target_modules=["fc1"], outer_rank=8)
    model = peft.get_peft_model(base, config)
    close(model.base_model.model["fc1"](x), start, kind)
    layer = model.base_model.model["fc1"]
    torch.manual_seed(3)
    randomise_all(model, 0.1)
    y = layer(x).detach()
    assert float((y - start).norm() / start.norm()) > 0.05
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(FORMATS[kind](*SIZES["tall"]), tmp_path)
    close(again.base_model.model["fc1"](x), y, kind)
    if kind == "torchao int8":  # nobody knows its configuration, but where Transformers applied it
        with pytest.raises(TypeError, match="fc1: its weight is quantised in a way that PEFT cannot quantise anew"):
            model.merge_adapter()
        assert torch.equal(layer(x), y)
        return
    model.merge_adapter()  # PEFT's rule: the merged weight is quantised again
    assert type(layer.base_layer) is type(FORMATS[kind](*SIZES["tall"])["fc1"])
    merged = layer(x).detach()
    assert float((merged - y).norm() / y.norm()) < 0.15
    model.unmerge_adapter()
    assert torch.equal(layer(x), y) or float((layer(x) - y).norm() / y.norm()) < 1e-6
    assert [n for n, _ in hosts(model)] == ["fc1"]
    if kind != "hqq":  # HQQ's own layers cannot be copied
        torch.testing.assert_close(copy.deepcopy(model).base_model.model["fc1"](x), layer(x))
