"""accelerate: prepare, accumulate, clip, save_state and load_state, save_model."""

import pytest
import torch
from helpers import allocated, storages
from torch import nn

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from safetensors.torch import load_file

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, load_ssvdo, merge_ssvdo, remove_ssvdo, save_ssvdo
from ssvdo_kernels.host import hosts

CONFIG = SSVDOConfig(outer_rank=4, target_modules=("0", "2", "3"), init_angle=0.2)


def net():
    """A tall, a wide and a square layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 16), nn.Linear(16, 16))
    with pytest.warns(UserWarning, match=r"lowered to min.* in 1 layers"):
        return apply_ssvdo(model, CONFIG)


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0)


def batches():
    torch.manual_seed(1)
    return [torch.randn(4, 16) for _ in range(8)]


def test_the_usual_loop_trains_as_torch_alone_does_and_resumes(tmp_path):
    plain = net()
    optimiser = adam(plain)
    for i, x in enumerate(batches()):
        (plain(x).square().mean() / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.5)
            optimiser.step()
            optimiser.zero_grad()
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    model, optimiser = accelerator.prepare(net(), adam(net()))
    optimiser = accelerator.prepare(adam(model))
    for i, x in enumerate(batches()):
        if i == 4:  # a run that stops here and goes on
            accelerator.save_state(tmp_path / "state")
            accelerator.load_state(tmp_path / "state")
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimiser.step()
            optimiser.zero_grad()
    x = batches()[0]
    torch.testing.assert_close(model(x), plain(x))
    before = model(x)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    accelerator.save_model(model, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(t.numel() for t in saved.values()) and saved.keys() == model.state_dict().keys()
    changed = model(x)
    accelerator.load_state(tmp_path / "state")
    assert not torch.allclose(model(x), changed) and not torch.allclose(model(x), before)
    fresh = net()
    fresh.load_state_dict(saved)
    torch.testing.assert_close(fresh(x), changed)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_are_adapted_run_saved_loaded_and_given_back(where, tmp_path):
    from accelerate import cpu_offload, disk_offload

    def offloaded():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
        if where == "cpu":
            return cpu_offload(model, execution_device="cpu")
        return disk_offload(model, str(tmp_path / "disk"), execution_device="cpu")

    config = SSVDOConfig(outer_rank=2, target_modules=("0", "2"))
    x = torch.randn(3, 8)
    with torch.no_grad():
        start = offloaded()(x)
        model = offloaded()
        assert model[0].weight.is_meta
        apply_ssvdo(model, config)
        for _, layer in hosts(model):
            for p in layer.adapter_parameters:
                p.normal_(0, 0.2)
        there = storages(8 * 24 * 4)  # bytes of a weight
        y = model(x)
        assert storages(8 * 24 * 4) <= there
        assert model[0].weight.is_meta and float((y - start).abs().max()) > 1e-2
        folder = save_ssvdo(model, tmp_path / "adapter")
        torch.testing.assert_close(load_ssvdo(offloaded(), folder)(x), y)
        torch.testing.assert_close(remove_ssvdo(load_ssvdo(offloaded(), folder), merge=True)(x), y)
        back = remove_ssvdo(model)
        torch.testing.assert_close(back(x), start)
        assert back[0].weight.is_meta


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_model_that_is_offloaded_holds_nothing_between_forwards(tmp_path, merged):
    from accelerate import disk_offload

    sizes = 31 * 67 * 4, 31 * 31 * 4  # bytes of W0 (or W') and V, uncommon ones
    before = [storages(size) for size in sizes]
    model = apply_ssvdo(nn.Sequential(nn.Linear(31, 67), nn.GELU(), nn.Linear(67, 31)),
                        SSVDOConfig(outer_rank=4, target_modules=("0", "2")))  # fmt: skip
    for _, layer in hosts(model):
        for p in layer.adapter_parameters:
            nn.init.normal_(p, 0, 0.2)
    x = torch.randn(3, 31)
    with torch.no_grad():
        want = model(x)
        if merged:
            merge_ssvdo(model)
        disk_offload(model, str(tmp_path), execution_device="cpu")
        for _ in range(2):
            torch.testing.assert_close(model(x), want)
            assert all(storages(size) <= own for size, own in zip(sizes, before, strict=True))


def test_a_model_of_peft_that_is_offloaded_holds_no_weight_between_forwards(tmp_path):
    """To the byte: what holds a storage alone is no tensor."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from accelerate import disk_offload

    from ssvdo_kernels.integrations.peft import SSVDOConfig as PeftConfig

    def held(folder):
        before = allocated()
        model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
        model = peft.get_peft_model(model, PeftConfig(inner_ratio=0.1, outer_rank=4, target_modules=["0", "2"]))
        x = torch.randn(3, 256)
        with torch.no_grad():
            want = model(x)
            there = allocated() - before
            disk_offload(model, str(folder), execution_device="cpu")
            for _ in range(2):
                torch.testing.assert_close(model(x), want)
        return there, allocated() - before

    held(tmp_path / "first")  # libraries make buffers of their own
    there, left = held(tmp_path / "second")
    assert there > 2 * 2**20  # bytes: two weights
    assert left < 2**20  # two of V, which are buffers and stay, have half of it
