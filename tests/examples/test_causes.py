"""Variants of a training: which numbers move, and by how much."""

import pytest
import torch

for needed in ("transformers", "tokenizers", "soundfile", "jiwer", "peft", "yaml"):
    pytest.importorskip(needed, reason="needs the extras: pip install 'ssvdo_kernels[asr,peft]'")

from examples.asr.causes import VARIANTS, Multiplied, Variant, multipliers, read, table
from ssvdo_kernels import SSVDOConfig, apply_ssvdo


def adapted(**options):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"fc1": torch.nn.Linear(8, 24), "fc2": torch.nn.Linear(24, 8)})
    options = {"outer_rank": 2, "init_angle": 0.0, **options}
    return apply_ssvdo(model, SSVDOConfig(target_modules=["fc1", "fc2"], **options))


def step(model, variant):
    """What an Adam step of rate 0.1 makes of each part of each layer, and W' before and after."""
    layers = {name: model[name].adapter for name in ("fc1", "fc2")}
    before = {name: model[name].adapted_weight() for name in layers}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = Multiplied(trained, lr=1e-4, by=multipliers(model, variant))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()
    moved = {name: torch.linalg.norm(model[name].adapted_weight() - before[name]) for name in layers}
    return {name: {part: p.detach() / -1e-4 for part, p in a.named_parameters() if p.requires_grad}
            for name, a in layers.items()}, moved  # fmt: skip


def test_parts_and_layers_move_by_their_factors():
    found, _ = step(adapted(), Variant("", "ssvdo", 1.0, {"outer": 0.25, "fc1": 0.5}))
    for name, factor in (("fc1", 0.5), ("fc2", 1.0)):
        assert torch.allclose(found[name]["inner_rotation"], torch.full((6,), factor), atol=1e-3)
        assert torch.allclose(found[name]["inner_scale"], torch.full((4,), factor), atol=1e-3)
        assert torch.allclose(found[name]["outer"], torch.full((16, 2), factor / 4), atol=1e-3)


def test_strong_components_move_less_at_the_same_first_step():
    plain, moved = step(adapted(outer_rank=0), Variant("", "ssvdo", 1.0, {}))
    weighted, same = step(adapted(outer_rank=0), Variant("", "ssvdo", 1.0, exponent=2.0))
    for name in ("fc1", "fc2"):
        steps = weighted[name]["inner_rotation"]
        assert torch.allclose(plain[name]["inner_rotation"], torch.ones(6), atol=1e-3)
        assert steps[0] < 1 < steps[-1] and bool((steps[1:3] >= steps[:2]).all())
        assert moved[name] == pytest.approx(float(same[name]), rel=0.05)


def test_the_weakest_half_moves_alone():
    found, _ = step(adapted(inner_ratio=1.0), Variant("", "ssvdo", 1.0, minor=True))
    i, j = torch.triu_indices(8, 8, 1)
    for name in ("fc1", "fc2"):
        assert torch.equal(found[name]["inner_rotation"] != 0, (i >= 4) & (j >= 4))
        assert torch.equal(found[name]["inner_scale"] != 0, torch.arange(8) >= 4)


def test_committed_rows_are_of_the_variants():
    rows = read()
    assert {(r["name"], r["rate"]) for r in rows} == {(v.name, v.rate) for v in VARIANTS} | {("before", 0.0)}
    assert table(rows).count("\n") == len(rows) + 1
