"""Experts of mixtures, kept as one parameter of three dimensions: each is adapted, by default and by name."""

import copy

import pytest
import torch
from helpers import randomise_all, three
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, load_ssvdo, merge_ssvdo, reference, remove_ssvdo, save_ssvdo
from ssvdo_kernels.experts import SSVDOExperts
from ssvdo_kernels.host import hosts
from ssvdo_kernels.targets import find_targets

transformers = pytest.importorskip("transformers", minversion="5.0", reason="3-D experts came with Transformers 5")
SIZES = {"vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2}  # fmt: skip
CONFIG = SSVDOConfig(outer_rank=2)
X = torch.arange(12).view(2, 6)


def mixtral(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **SIZES)
    return transformers.MixtralForCausalLM(config).to(dtype).eval()


def gpt_oss(dtype=torch.float32):
    """Its experts multiply from the other side: (experts, in_features, out_features)."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(num_local_experts=3, num_experts_per_tok=2, head_dim=6, **SIZES)
    model = transformers.GptOssForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model


MODELS = {"mixtral": mixtral, "gpt_oss": gpt_oss}


@pytest.mark.parametrize("build", MODELS)
def test_every_expert_is_adapted_by_default(build):
    names = list(find_targets(MODELS[build](), CONFIG))
    assert names == [f"model.layers.{i}.mlp.experts.{p}.{e}" for i in range(2) for p in ("gate_up_proj", "down_proj")
                     for e in range(3)]  # fmt: skip


@pytest.mark.parametrize("build", MODELS)
def test_outputs_and_gradients_are_those_of_dense_weights(build):
    base, weights, free = MODELS[build](torch.float64), {}, {}
    base.set_experts_implementation("eager")  # Transformers' grouped products know no float64
    model = randomise_all(apply_ssvdo(copy.deepcopy(base), CONFIG))
    for name, host in hosts(model):
        for stack in host.adapted:
            matrices = []
            for i, matrix in enumerate(base.get_submodule(name)._parameters[stack].detach()):
                adapter = host.parts()[f"{stack}.{i}"]
                own = [p.detach().clone().requires_grad_() for p in three(adapter)]
                free[f"{name}.{stack}.{i}"] = own
                matrices.append(reference.adapted_weight(matrix, *own, adapter.config))
            weights[f"{name}.{stack}"] = torch.stack(matrices)
    y = model(X).logits
    want = torch.func.functional_call(base, weights, (X,)).logits
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    assert float((want - base(X).logits).abs().max()) > 1e-2
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    for name, host in hosts(model):
        for part, adapter in host.parts().items():
            for p, q in zip(adapter.parts, free[f"{name}.{part}"], strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("build", MODELS)
def test_the_life_of_experts(build, tmp_path):
    base = MODELS[build]()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    start = base(X).logits
    model = apply_ssvdo(copy.deepcopy(base), SSVDOConfig(outer_rank=2, init_angle=0.0))
    torch.testing.assert_close(model(X).logits, start)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(("inner_rotation", "inner_scale", "outer"))}
    y = randomise_all(model)(X).logits.detach()
    assert float((y - start).abs().max()) > 1e-3
    save_ssvdo(model, tmp_path)
    torch.testing.assert_close(load_ssvdo(copy.deepcopy(base), tmp_path)(X).logits, y)
    other = apply_ssvdo(copy.deepcopy(base), CONFIG)
    torch.testing.assert_close(load_ssvdo(other, tmp_path)(X).logits, y)
    torch.testing.assert_close(merge_ssvdo(copy.deepcopy(model))(X).logits, y)
    torch.testing.assert_close(remove_ssvdo(copy.deepcopy(model), merge=True)(X).logits, y)
    state = remove_ssvdo(model).state_dict()
    assert state.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in state.items())


def test_experts_by_name_and_some_of_them():
    model = mixtral()
    apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules=("experts.down_proj",),
                                   exclude_modules=("0.mlp.experts.down_proj",)))  # fmt: skip
    (name, host), = hosts(model)
    assert name == "model.layers.1.mlp.experts" and isinstance(host, SSVDOExperts)
    assert list(host.parts()) == ["down_proj.0", "down_proj.1", "down_proj.2"]
    assert host.num_experts == 3  # what the module has can still be read


def test_a_regular_expression_does_not_take_other_parameters_for_experts():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.fc1 = nn.Parameter(torch.randn(1, 5, 4)), nn.Linear(4, 8)

    model = nn.ModuleDict({"body": Positions(), "conv": nn.Conv1d(4, 8, 3)})
    assert list(find_targets(model, SSVDOConfig(outer_rank=2, target_modules=r".*"))) == ["body.fc1", "conv"]
    assert list(find_targets(model, SSVDOConfig(outer_rank=2, target_modules="all-linear"))) == ["body.fc1"]


def test_experts_train_in_one_batch_and_the_loss_falls():
    model = apply_ssvdo(mixtral(), CONFIG)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(8):
        loss = model(X, labels=X).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_experts_cannot_drop_numbers_of_their_input():
    model = mixtral()
    with pytest.raises(ValueError, match=r"dropout=0.1 does not fit .*experts\.gate_up_proj\.0"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=2, dropout=0.1))
    assert not list(hosts(model))


# -- through PEFT ------------------------------------------------------------------------------------------------------
def wrapped(**options):
    peft = pytest.importorskip("peft", minversion="0.21", reason="target_parameters came with newer PEFT")
    import ssvdo_kernels.integrations.peft  # noqa: F401

    torch.manual_seed(1)
    return peft, peft.get_peft_model(mixtral(), peft.SSVDOConfig(outer_rank=2, **options))


@pytest.mark.parametrize("options", [{}, {"target_modules": [], "target_parameters": ["experts.down_proj"]}])
def test_the_life_of_experts_in_peft(options, tmp_path):
    peft, model = wrapped(**options)
    start = mixtral()(X).logits
    torch.testing.assert_close(model(X).logits, start)
    loss = model(X, labels=X).loss
    loss.backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 3 * (1 if options else 2)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for _, p in trained)
    y = randomise_all(model)(X).logits.detach()
    assert float((y - start).abs().max()) > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(model(X).logits, start)
    model.save_pretrained(tmp_path)
    for name in ("default", "renamed"):
        torch.testing.assert_close(peft.PeftModel.from_pretrained(mixtral(), tmp_path, name)(X).logits, y)
    model.merge_adapter()
    torch.testing.assert_close(model(X).logits, y)
    stack = next(p for n, p in model.named_parameters() if n.endswith("base_layer.down_proj"))
    stack.data.add_(0.1)
    with pytest.raises(RuntimeError, match="the merged weight is no longer what was merged"):
        model.unmerge_adapter()
    stack.data.sub_(0.1)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X).logits, y)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(X).logits, y)
    assert plain.state_dict().keys() == mixtral().state_dict().keys()


def test_several_adapters_of_experts_add_their_changes():
    peft, model = wrapped()
    model.add_adapter("second", peft.SSVDOConfig(outer_rank=1))
    randomise_all(model)
    ys = {}
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        ys[len(ys)] = model(X).logits.detach()
    assert float((ys[0] - ys[1]).abs().max()) > 1e-4 and float((ys[2] - ys[1]).abs().max()) > 1e-4
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(model(X).logits, ys[0])


def test_through_peft_dropout_is_refused_too():
    with pytest.raises(ValueError, match=r"dropout=0.1 does not fit .*allowed with target_parameters: 0"):
        wrapped(dropout=0.1)
