"""Choosing, adapting, merging and giving back the layers of whole models."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo, merge_ssvdo, remove_ssvdo, unmerge_ssvdo
from ssvdo_kernels.host import hosts
from ssvdo_kernels.targets import FEED_FORWARD, default_names, find_targets

SMALL = SSVDOConfig(inner_ratio=0.5, outer_rank=2)


class Block(nn.Module):
    def __init__(self, names=("fc1", "fc2"), d=6, large=12):
        super().__init__()
        setattr(self, names[0], nn.Linear(d, large))
        setattr(self, names[1], nn.Linear(large, d))
        self.names = names
        self.q_proj = nn.Linear(d, d)

    def forward(self, x):
        first, second = (getattr(self, n) for n in self.names)
        return second(torch.relu(first(self.q_proj(x))))


def net(blocks=2, **kwargs):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**kwargs) for _ in range(blocks)))


def perturb(model):
    with torch.no_grad():
        for _, layer in hosts(model):
            for p in layer.adapter.trained:
                p.add_(0.1 * torch.randn_like(p))


def snapshot(model):
    return [(n, id(m)) for n, m in model.named_modules()], [(n, p.requires_grad) for n, p in model.named_parameters()]


def test_default_targets_are_the_feed_forward_layers_and_the_rest_is_frozen():
    model = apply_ssvdo(net(), SMALL)
    assert [n for n, _ in hosts(model)] == ["0.fc1", "0.fc2", "1.fc1", "1.fc2"]
    trained = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"inner_rotation", "inner_scale", "outer"}
    out = model(torch.randn(3, 6)).sum()
    out.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_known_feed_forward_names(name):
    name = name.replace(r"\d+", "3")
    model = nn.Module()
    parent = model
    *path, leaf = ["layers", "0", *name.split(".")]
    for part in path:
        parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(leaf, nn.Linear(4, 8))
    assert list(find_targets(model, SMALL)) == [f"layers.0.{name}"]


def test_bert_attention_output_is_no_feed_forward_layer():
    model = nn.ModuleDict({"attention": nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(4, 8)})}),
                           "output": nn.ModuleDict({"dense": nn.Linear(8, 4)})})
    assert list(find_targets(model, SMALL)) == ["output.dense"]


def test_suffixes_match_whole_components_regex_matches_whole_names_and_exclusion_wins():
    model = net()
    assert list(find_targets(model, SSVDOConfig(target_modules=["fc1"], exclude_modules=["0.fc1"]))) == ["1.fc1"]
    assert list(find_targets(model, SSVDOConfig(target_modules=r"0\.fc[12]"))) == ["0.fc1", "0.fc2"]
    with pytest.raises(ValueError, match="matches no linear layer"):
        find_targets(model, SSVDOConfig(target_modules=["c1"]))


def test_all_linear_leaves_tied_output_embeddings_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 6), "body": nn.Linear(6, 12), "head": nn.Linear(6, 20)})
    model["head"].weight = model["embed"].weight
    assert list(find_targets(model, SSVDOConfig(target_modules="all-linear"))) == ["body"]


@pytest.mark.filterwarnings("ignore:outer_rank=2 is lowered")
def test_all_linear_leaves_layers_out_that_share_a_weight_and_says_so():
    model = nn.ModuleDict({"body": nn.Linear(6, 12), "out": nn.Linear(12, 6), "head": nn.Linear(12, 6)})
    model["head"].weight = model["out"].weight
    with pytest.warns(UserWarning, match="left out: out shares its weight with another layer; head shares"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules="all-linear"))
    assert [n for n, _ in hosts(model)] == ["body"]


def test_fc1_and_fc2_of_a_whole_model_of_transformers_are_projections():
    """As in audio codecs; those of its blocks, and of any other module, are feed-forward layers."""
    model = net(1)
    model.add_module("fc1", nn.Linear(6, 12))
    assert list(find_targets(model, SMALL)) == ["0.fc1", "0.fc2", "fc1"]
    model.base_model_prefix = "model"  # PreTrainedModel has it
    assert list(find_targets(model, SMALL)) == default_names(model) == ["0.fc1", "0.fc2"]
    assert list(find_targets(model, replace(SMALL, target_modules=("fc1",)))) == ["0.fc1", "fc1"]


def test_nothing_matched_lists_close_names_and_changes_nothing():
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"target_modules=\('fc3',\).*'fc1', 'fc2'"):
        apply_ssvdo(model, SSVDOConfig(target_modules=["fc3"]))
    assert snapshot(model) == before


def test_bad_regex_is_named():
    with pytest.raises(ValueError, match=r"target_modules='\('"):
        apply_ssvdo(net(), SSVDOConfig(target_modules="("))


def test_square_layers_get_no_outer_part_with_one_warning():
    model = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules="all-linear"))
    messages = [str(w.message) for w in caught if "square" in str(w.message)]
    assert len(messages) == 1 and "0.q_proj" in messages[0]
    layers = dict(hosts(model))
    assert layers["0.q_proj"].adapter.shape.l == 0 and layers["0.fc1"].adapter.shape.l == 2
    assert layers["0.q_proj"].adapter.outer is None and layers["0.q_proj"].adapter.outer_basis is None


@pytest.mark.parametrize("break_model, error, words", [
    (lambda m: m[1].fc2.weight.data.fill_(float("nan")), ValueError, r"1\.fc2\.weight.*non-finite"),
    (lambda m: setattr(m[1], "fc2", nn.Linear(12, 6, device="meta")), ValueError, r"1\.fc2\.weight.*meta"),
    (lambda m: setattr(m[1], "fc2", SSVDOLinear.from_linear(m[1].fc2, SMALL)), TypeError, r"1\.fc2 is adapted already"),
    (lambda m: setattr(m[1], "fc2", nn.Bilinear(2, 2, 2)), TypeError, r"1\.fc2 is a torch.nn.*Bilinear"),
    (lambda m: setattr(m[1], "fc2", nn.Embedding(2, 2)), TypeError, r"1\.fc2 is a torch.nn.*looked up"),
])
def test_an_error_in_the_last_layer_leaves_the_model_as_it_was(break_model, error, words):
    model = net()
    break_model(model)
    before = snapshot(model)
    with pytest.raises(error, match=words):
        apply_ssvdo(model, replace(SMALL, target_modules=("fc1", "fc2")))
    assert snapshot(model) == before


def test_a_layer_adapted_twice_is_refused():
    model = apply_ssvdo(net(), SMALL)
    with pytest.raises(TypeError, match="adapted already"):
        apply_ssvdo(model, SMALL)


def test_linear_subclasses_inside_multihead_attention_are_refused_by_name_and_skipped_by_all_linear():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "fc1": nn.Linear(4, 8)})
    with pytest.raises(TypeError, match=r"attn\.out_proj"):
        apply_ssvdo(model, SSVDOConfig(outer_rank=0, target_modules=["out_proj"]))
    apply_ssvdo(model, SSVDOConfig(outer_rank=0, target_modules="all-linear"))
    assert [n for n, _ in hosts(model)] == ["fc1"]


def test_a_layers_parameters_for_an_optimiser():
    layer = SSVDOLinear.from_linear(nn.Linear(6, 14), SSVDOConfig(outer_rank=2))
    assert [id(p) for p in layer.adapter_parameters] == [id(p) for p in layer.parameters() if p.requires_grad][1:]
    assert len(layer.adapter_parameters) == 3 and layer.bias.requires_grad


def test_shared_layers_stay_shared():
    block = Block()
    model = apply_ssvdo(nn.Sequential(block, block), SMALL)
    assert model[0].fc1 is model[1].fc1
    plain = nn.ModuleDict({"a": nn.ModuleDict({"fc1": nn.Linear(4, 8)}), "b": nn.ModuleDict({})})
    plain["b"]["fc1"] = plain["a"]["fc1"]
    apply_ssvdo(plain, SMALL)
    assert plain["a"]["fc1"] is plain["b"]["fc1"] and isinstance(plain["b"]["fc1"], SSVDOLinear)


def test_transformer_encoder_fast_path_does_not_pass_the_adapter_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    apply_ssvdo(layer, SSVDOConfig(outer_rank=2, target_modules=["linear1", "linear2"]))
    perturb(layer)
    x = torch.randn(2, 5, 8)
    with_grad = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), with_grad)
    remove_ssvdo(layer)
    with torch.no_grad():
        assert not torch.allclose(layer(x), with_grad, atol=1e-3)  # what passing it by would look like


def test_merge_unmerge_and_remove():
    model = net()
    original = {n: p.clone() for n, p in model.named_parameters()}
    x = torch.randn(4, 6)
    base = model(x)
    apply_ssvdo(model, SMALL)
    perturb(model)
    adapted = model(x)
    merge_ssvdo(model)
    torch.testing.assert_close(model(x), adapted)
    unmerge_ssvdo(model)
    assert torch.equal(model(x), adapted)
    merged = remove_ssvdo(merge_ssvdo(model), merge=True)
    torch.testing.assert_close(merged(x), adapted)
    assert all(type(m) is not SSVDOLinear for m in merged.modules())

    again = apply_ssvdo(net(), SMALL)
    perturb(again)
    remove_ssvdo(again)
    assert torch.equal(again(x), base)
    assert all(torch.equal(p, original[n]) for n, p in again.named_parameters())


@pytest.mark.parametrize("function", [merge_ssvdo, unmerge_ssvdo, remove_ssvdo])
def test_a_plain_model_is_refused(function):
    with pytest.raises(ValueError, match="has no SSVDOLinear"):
        function(net())


def test_progress_bar_waits_two_seconds(monkeypatch):
    import ssvdo_kernels.model as module

    seen = {}
    monkeypatch.setattr(module, "tqdm", lambda items, **options: seen.update(options) or items)
    apply_ssvdo(net(), SMALL)
    assert seen["delay"] == 2 and seen["unit"] == "layer"


def test_one_learning_rate_for_every_tau():
    """Adam at one rate ends at the same loss for tau = 1e-4, 1e-3, 1e-2, within the spread over seeds."""

    def train(tau, seed, scale="balanced", steps=150):
        torch.manual_seed(100)
        model, target = net(1, d=16, large=48), net(1, d=16, large=48)
        with torch.no_grad():
            for name, p in target.named_parameters():
                p.copy_(model.get_parameter(name) * (1 + 0.3 * torch.randn_like(p)))
        torch.manual_seed(seed)
        apply_ssvdo(model, SSVDOConfig(inner_ratio=0.5, outer_rank=8, tau=tau, outer_scale=scale))
        optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
        for _ in range(steps):
            x = torch.randn(64, 16)
            loss = nn.functional.mse_loss(model(x), target(x))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            return float(nn.functional.mse_loss(model(x), target(x)))

    losses = {tau: [train(tau, seed) for seed in range(3)] for tau in (1e-4, 1e-3, 1e-2)}
    means = {tau: sum(v) / 3 for tau, v in losses.items()}
    spread = max(max(v) - min(v) for v in losses.values())
    untrained = train(1e-2, 0, steps=0)
    assert max(means.values()) - min(means.values()) <= spread, losses
    assert all(mean < 0.5 * untrained for mean in means.values())
    assert train(1e-4, 0, scale=1.0) > max(means.values()) + spread  # the literal form: tau is a learning rate
