"""ESPnet's real encoders and decoder, its adapter table, its order: build, adapt, optimiser, load, train, save."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn

pytest.importorskip("espnet2", reason="espnet is not installed")
pytest.importorskip("typeguard", reason="typeguard is not installed")
if "espnet2.asr.frontend.s3prl" not in sys.modules:  # needs torchaudio; only its class is asked for
    stub = types.ModuleType("espnet2.asr.frontend.s3prl")
    stub.S3prlFrontend = type("S3prlFrontend", (nn.Module,), {})
    sys.modules[stub.__name__] = stub
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
from espnet2.layers import create_adapter as table

import ssvdo_kernels.integrations.espnet as integration
from ssvdo_kernels import BaseMismatchError, gradient_accumulation
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.host import Host
from ssvdo_kernels.integrations.espnet import DeferredSSVDOLinear, create_ssvdo_adapter

CONF = {"adapter_type": "ssvdo", "inner_ratio": 0.5, "outer_rank": 4,
        "target_modules": ["feed_forward.w_1", "feed_forward.w_2"]}  # fmt: skip
SIZES = {"input_size": 20, "output_size": 16, "attention_heads": 2, "linear_units": 40, "num_blocks": 2}
ENCODERS = {
    "transformer": lambda: TransformerEncoder(**SIZES),
    "conformer": lambda: ConformerEncoder(**SIZES, cnn_module_kernel=3, rel_pos_type="latest"),
    "e_branchformer": lambda: EBranchformerEncoder(
        20, output_size=16, attention_heads=2, linear_units=40, num_blocks=2, cgmlp_linear_units=32,
        use_ffn=True, macaron_ffn=True, rel_pos_type="latest"),
}  # fmt: skip
encoders = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS.keys())


class Model(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.encoder = make()
        self.decoder = TransformerDecoder(11, 16, attention_heads=2, linear_units=40, num_blocks=1, dropout_rate=0.0,
                                          positional_dropout_rate=0.0)  # fmt: skip

    def forward(self, x, tokens):
        lengths = torch.full((len(x),), x.shape[1])
        hidden, hidden_lengths, _ = self.encoder(x, lengths)
        return self.decoder(hidden, hidden_lengths, tokens, torch.full((len(tokens),), tokens.shape[1]))[0]


def build(make, seed):
    torch.manual_seed(seed)
    model = Model(make)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch():
    torch.manual_seed(9)
    return torch.randn(2, 60, 20), torch.randint(0, 11, (2, 5))


def run(model, train=False):
    model.train(train)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # the Conformer's: train and eval are to differ in nothing
            module.eval()
    return model(*batch())


def fit(model, optimiser, steps=3):
    for _ in range(steps):
        optimiser.zero_grad()
        run(model, True).log_softmax(-1)[..., 0].mean().neg().backward()
        optimiser.step()


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)


def saved(state):
    """Through a file, as ESPnet does."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@encoders
def test_espnets_order(make):
    pretrained = build(make, 1).eval()
    want = run(pretrained)
    model = build(make, 2)
    table.create_adapter(model, "lora", dict(CONF))
    assert not model.training
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DeferredSSVDOLinear)}
    assert {n.rsplit(".", 2)[-2] for n in layers} == {"feed_forward"} and len(layers) == 6
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    optimiser = adam(model)  # before the weights are there
    model.load_state_dict(saved(pretrained.state_dict()), strict=False)
    assert torch.allclose(run(model), want, atol=2e-3) and torch.allclose(run(model, True), want, atol=2e-3)
    bases = {n: m.weight.detach().clone() for n, m in layers.items()}
    for _ in range(2):
        fit(model, optimiser)
        after = run(model)
        assert torch.equal(run(model), after) and torch.allclose(run(model, True), after, atol=1e-5)
        epochs = saved(model.state_dict())
    assert not torch.allclose(after, want, atol=1e-2)
    assert all(torch.equal(m.weight, bases[n]) for n, m in layers.items())  # W0 is never merged into
    assert not any(t.dtype in (torch.bool, torch.int64) for n, t in epochs.items() if "feed_forward" in n)

    inference = build(make, 3)  # inference: build, adapt, load
    table.create_adapter(inference, "lora", dict(CONF))
    missing = inference.load_state_dict(epochs, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    with torch.inference_mode():
        assert torch.allclose(run(inference), after, atol=1e-5)
    fit(inference, adam(inference), 1)  # and on with training after a first forward in inference mode
    assert not torch.allclose(run(inference), after, atol=1e-5)


def test_owsm_shapes():
    """One E-Branchformer block of OWSM-1B's sizes, random weights."""
    torch.manual_seed(0)
    encoder = EBranchformerEncoder(80, output_size=1024, attention_heads=16, linear_units=4096, num_blocks=1,
                                   cgmlp_linear_units=4096, use_ffn=True, macaron_ffn=True, dropout_rate=0.0,
                                   positional_dropout_rate=0.0, attention_dropout_rate=0.0)  # fmt: skip
    x, lengths = torch.randn(1, 80, 80), torch.tensor([80])
    with torch.no_grad():
        want = encoder.eval()(x, lengths)[0]
    targets = [f"feed_forward{m}.w_{i}" for m in ("", "_macaron") for i in (1, 2)]
    create_ssvdo_adapter(encoder, targets, inner_ratio=0.5, outer_rank=64, init_angle=0.0)
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == 4 * 327_936
    got = encoder(x, lengths)[0]
    assert torch.allclose(got, want, atol=1e-4)
    got.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters() if p.requires_grad)


def adapted(seed=1, **options):
    model = build(ENCODERS["transformer"], seed)
    create_ssvdo_adapter(model, **{"outer_rank": 4, "init_angle": 0.2, **options})
    return model


def adapter_only(model):
    return {k: v for k, v in model.state_dict().items() if "lora_" in k}


def test_an_adapter_alone_finds_its_base_or_is_refused():
    model = adapted()
    fit(model, adam(model))
    want, alone = run(model), saved(adapter_only(model))
    marks = ("base_digest", "base_sketch", "basis_sketch", "formula")
    assert len(alone) == 6 * 8
    assert {k.rpartition(".")[2] for k in alone} == {"lora_guard", *marks, *PARAMETER_NAMES}
    same_base = adapted()
    assert not same_base.load_state_dict(alone, strict=False).unexpected_keys
    assert torch.allclose(run(same_base), want, atol=1e-5)
    with pytest.raises(BaseMismatchError, match=r"encoders\.0\.feed_forward\.w_1: trained on other base weights"):
        other = adapted(seed=2)
        other.load_state_dict(alone, strict=False)
        run(other)
    late = adapted(seed=2)  # the adapter first, the base later
    late.load_state_dict(alone, strict=False)
    late.load_state_dict({k: v for k, v in saved(model.state_dict()).items() if "lora_" not in k}, strict=False)
    for name, value in alone.items():
        assert torch.equal(late.state_dict()[name], value)
    assert torch.allclose(run(late), want, atol=1e-5)
    warm = adapted(seed=2)  # a forward on the wrong base before the load changes nothing
    run(warm)
    with pytest.raises(BaseMismatchError, match="other base weights"):
        warm.load_state_dict(alone, strict=False)
        run(warm)


def test_another_base_is_factorised_anew_and_the_same_one_is_not(monkeypatch):
    calls = []
    original = integration.layer.factorize
    monkeypatch.setattr(integration.layer, "factorize", lambda *a, **k: calls.append(k["name"]) or original(*a, **k))
    model = adapted()
    with torch.no_grad():  # ESPnet's attention keeps its weights, which in a graph could not be copied
        run(model)
        assert len(calls) == 6
        run(model, True)
    model.load_state_dict(saved(model.state_dict()))
    with torch.no_grad():
        run(model)
        run(copy.deepcopy(model))
        run(pickle.loads(pickle.dumps(model)))
    assert len(calls) == 6
    model.load_state_dict(build(ENCODERS["transformer"], 5).state_dict(), strict=False)
    run(model)
    assert len(calls) == 12


def test_a_weight_edited_under_the_adapter_is_noticed():
    model = adapted()
    run(model)
    with torch.no_grad():
        model.encoder.encoders[0].feed_forward.w_1.weight.mul_(2)
    with pytest.raises(BaseMismatchError, match="other base weights"):
        run(model)


def orthogonal(like):
    return torch.linalg.qr(torch.randn(like, like)).Q


@pytest.mark.parametrize("change", [
    lambda w: w + 0.03 * w.norm() / w.numel() ** 0.5 * torch.randn_like(w),  # a fine-tuned sibling
    lambda w: orthogonal(w.shape[0]) @ w,  # the same singular values with other vectors
], ids=["noise", "turned"])  # fmt: skip
def test_a_weight_of_like_spectrum_is_another(change):
    model, other = adapted(), adapted()
    fit(model, adam(model))
    alone = saved(adapter_only(model))
    torch.manual_seed(5)
    with torch.no_grad():
        weight = other.encoder.encoders[1].feed_forward.w_2.weight
        weight.copy_(change(weight))
    other.load_state_dict(alone, strict=False)
    with pytest.raises(BaseMismatchError, match=r"encoders\.1\.feed_forward\.w_2: trained on other base weights"):
        run(other)


def test_checkpoints_may_be_averaged():
    model = adapted()
    optimiser, states = adam(model), []
    for _ in range(3):
        fit(model, optimiser, 1)
        states.append(saved(model.state_dict()))
    average = {k: sum(s[k] for s in states) / 3 for k in states[0]}
    model.load_state_dict(average)
    assert bool(run(model).isfinite().all())
    other = adapted(seed=2)
    other.load_state_dict({k: v for k, v in average.items() if "lora_" in k}, strict=False)
    with pytest.raises(BaseMismatchError, match="other base weights"):
        run(other)


@pytest.mark.parametrize("options, error, message", [
    ({"target_modules": ["nothing"]}, ValueError, "not found in the base model"),
    ({"outer_rank": -1}, ValueError, r"w_1: outer_rank=-1"), ({"rank": 8}, ValueError, r"unknown options \['rank'\]"),
    ({"bias_type": "some"}, ValueError, "bias_type='some'"), ({"target_modules": ["norm1"]}, TypeError, "LayerNorm"),
])  # fmt: skip
def test_bad_input_changes_nothing(options, error, message):
    model = build(ENCODERS["transformer"], 1)
    with pytest.raises(error, match=message):
        create_ssvdo_adapter(model, **{"outer_rank": 4, **options})
    assert not any(isinstance(m, Host) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_twice_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="adapted already"):
        create_ssvdo_adapter(model, outer_rank=4)


@pytest.mark.parametrize("bias_type, count", [("none", 0), ("lora_only", 6)])
def test_biases(bias_type, count):
    model = adapted(bias_type=bias_type)
    assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")) == count
    everything = adapted(bias_type="all")
    assert all(p.requires_grad for n, p in everything.named_parameters() if n.endswith(".bias"))


def test_groups_and_accumulation():
    model = adapted()
    run(model, True).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with gradient_accumulation(model):
        run(model, True).square().sum().backward()
    for n, p in model.named_parameters():
        assert not p.requires_grad or torch.allclose(p.grad, want[n], atol=1e-4), n


def test_square_layers_whisper_names_and_half_precision():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("query", "key", "value", "out")})
            self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    model = Block().to(torch.bfloat16)
    create_ssvdo_adapter(model, ["query", "key", "value", "attn.out", "mlp.0", "mlp.2"], outer_rank=3)
    shapes = {n: m.lora_adapter.shape.l for n, m in model.named_modules() if isinstance(m, DeferredSSVDOLinear)}
    assert shapes == {"attn.query": 0, "attn.key": 0, "attn.value": 0, "attn.out": 0, "mlp.0": 3, "mlp.2": 3}
    layer = model.mlp[0]
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_adapter.outer.dtype == torch.float32
    x = torch.randn(5, 8).to(torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16 and layer.lora_adapter.singular_values.dtype == torch.float32


def test_lora_is_left_to_espnet():
    pytest.importorskip("loralib", reason="loralib is not installed")
    model = build(ENCODERS["transformer"], 1)
    table.create_adapter(model, "lora", {"rank": 2, "target_modules": ["feed_forward.w_1"]})
    assert any("lora_A" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("names", ["feed_forward.w_1", 1, [1], iter(["feed_forward.w_1"])])
def test_target_modules_of_another_type_are_refused(names):
    model = build(ENCODERS["transformer"], 1)
    with pytest.raises(ValueError, match=r"target_modules=.* is of the wrong type; allowed: a list"):
        create_ssvdo_adapter(model, names, outer_rank=4)
    assert not any(isinstance(m, Host) for m in model.modules())


def test_layers_that_share_a_weight_are_refused():
    model = nn.ModuleDict({"w_1": nn.Linear(8, 8), "w_2": nn.Linear(8, 8)})
    model["w_2"].weight = model["w_1"].weight
    with pytest.raises(ValueError, match="w_1 and w_2 share one weight"):
        create_ssvdo_adapter(model, ["w_1", "w_2"], outer_rank=0)
    assert type(model["w_1"]) is nn.Linear


def test_layers_that_their_parent_multiplies_by_are_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    model["attention"].out_proj = nn.Linear(8, 8)
    with pytest.raises(TypeError, match=r"attention\.out_proj is multiplied by in MultiheadAttention"):
        create_ssvdo_adapter(model, ["out_proj"], outer_rank=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trained_model_may_be_cast_before_its_first_forward(dtype):
    """As Speech2Text(dtype=...) does: the rounded weight may have another basis."""
    model = adapted()
    fit(model, adam(model))
    want = run(model)
    fresh = adapted(seed=2)
    fresh.load_state_dict(saved(model.state_dict()))
    fresh = fresh.to(dtype)
    layers = [m for m in fresh.modules() if isinstance(m, DeferredSSVDOLinear)]
    for layer in layers:
        layer(torch.randn(3, layer.in_features, dtype=dtype))
    again = fresh.float()
    assert float((run(again) - want).abs().max()) < 0.05 * float(want.abs().max())


def test_a_copy_does_not_trust_an_address():
    for _ in range(5):
        model = adapted()
        with torch.no_grad():  # ESPnet's attention keeps its weights, which in a graph could not be copied
            run(model)
        twin = copy.deepcopy(model)
        del model
        other = adapted(seed=2)
        wanted = {n: p.detach().clone() for n, p in other.named_parameters() if n.endswith("feed_forward.w_1.weight")}
        for name, weight in wanted.items():
            twin.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(BaseMismatchError, match="other base weights"):
            run(twin)


def test_an_adapter_of_which_the_outer_part_alone_is_trained_belongs_to_its_base():
    model = adapted()
    with torch.no_grad():
        run(model)
    other = {k: v for k, v in saved(adapted(seed=2).state_dict()).items() if "lora_" not in k}
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(other, strict=False)  # nothing has been trained: any base will do
    run(fresh)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, DeferredSSVDOLinear):
                layer.lora_adapter.outer.add_(0.01)
    model.load_state_dict(other, strict=False)
    with pytest.raises(BaseMismatchError, match="other base weights"):
        run(model)


def test_the_layers_of_the_myst_recipe():
    model = build(ENCODERS["e_branchformer"], 1)
    model.encoder.embed = nn.ModuleDict({"out": nn.Linear(32, 16)})  # what newer ESPnet makes of a list of two
    create_ssvdo_adapter(model, "myst", inner_ratio=0.5, outer_rank=2)
    adapted_names = {n for n, m in model.named_modules() if isinstance(m, DeferredSSVDOLinear)}
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    ends = {".".join(n.split(".")[3:]) for n in adapted_names if n.count(".") > 2}
    attention = {f"{kind}.linear_{part}" for kind in ("attn", "self_attn", "src_attn") for part in [*"qkv", "out"]}
    ffn = {f"feed_forward{m}.w_{i}" for m in ("", "_macaron") for i in (1, 2)}
    assert ends == attention | ffn | {"cgmlp.channel_proj1.0", "cgmlp.channel_proj2", "merge_proj"}
    assert {n for n in adapted_names if n.count(".") <= 2} == {"encoder.embed.out", "decoder.output_layer"}
    assert {n.rsplit(".", 1)[-1] for n in left} == {"linear_pos"}
    with pytest.raises(TypeError, match=r"decoder\.embed\.0 is an embedding, which SSVD-O does not adapt"):
        create_ssvdo_adapter(build(ENCODERS["transformer"], 1), ["attn.linear_q", "decoder.embed.0"], outer_rank=0)


def test_the_recipes_own_keys_are_taken_and_idle_names_are_said():
    model = build(ENCODERS["transformer"], 1)
    names = ["attn.linear_q", "feed_forward.w_1", "merge_proj", "cgmlp.channel_proj2"]
    conf = {"rank": 0, "alpha": 0, "dropout_rate": 0.1, "adapter_type": "ssvdo", "outer_rank": 0}
    with pytest.warns(UserWarning, match=r"target_modules: \['merge_proj', 'cgmlp.channel_proj2'\] match no layer"):
        table.create_adapter(model, "lora", {**conf, "target_modules": names})
    assert {m.lora_adapter.config.dropout for m in model.modules() if isinstance(m, DeferredSSVDOLinear)} == {0.1}


def test_a_plain_model_decodes_alike():
    model = adapted()
    fit(model, adam(model))
    plain = build(ENCODERS["transformer"], 3)
    plain.load_state_dict(saved(integration.plain_state_dict(model)))
    assert torch.allclose(run(plain), run(model), atol=1e-5)
