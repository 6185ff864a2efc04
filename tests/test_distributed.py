"""DDP and FSDP2 with two processes (gloo): one process's losses, adapters from sharded state, shared factorisation."""

import copy
import os
import time

import pytest
import torch
import torch.distributed as dist
from helpers import require_fully_shard, two_processes
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, checkpoint, gradient_accumulation, load_ssvdo, save_ssvdo, sites
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.host import hosts

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)
CONFIG = SSVDOConfig(target_modules="all-linear", outer_rank=3, init_angle=0.2)
STEPS = 20


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def base():
    torch.manual_seed(0)
    return Net().double()


def batches():
    torch.manual_seed(1)
    return torch.randn(STEPS, 4, 8, dtype=torch.float64), torch.randn(STEPS, 4, 8, dtype=torch.float64)


def fit(model, rows=slice(None)):
    """The losses of 20 steps."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for x, y in zip(*batches(), strict=True):
        optimiser.zero_grad()
        loss = (model(x[rows]) - y[rows]).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def close(a, b, what):
    assert torch.allclose(a, b, atol=1e-9, rtol=1e-9), f"{what}: {(a - b).abs().max()}"


def start(rank, folder):
    """A fresh adapter, drawn as everywhere: each process has the same seed."""
    model = base()
    calls = []
    original = sites.factorize
    sites.factorize = lambda *a, **k: calls.append(k["name"]) or original(*a, **k)
    torch.manual_seed(2)
    apply_ssvdo(model, CONFIG, process_group=dist.group.WORLD)
    sites.factorize = original
    assert len(calls) == 3, calls  # six layers, two processes
    return model


def check_shared_factors(model, alone):
    for (name, a), (_, b) in zip(hosts(model), hosts(alone), strict=True):
        assert a.adapter.name == name
        ours, theirs = a.adapter.factors.tensors(), b.adapter.factors.tensors()
        assert ours.keys() == theirs.keys()
        for part, tensor in ours.items():
            assert torch.equal(tensor, theirs[part]), (name, part)


def mean_loss(losses):
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


def ddp(rank, folder, alone, want):
    model = start(rank, folder)
    check_shared_factors(model, alone)
    model.load_state_dict(alone.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert not list(model.buffers())  # nothing to send in every forward
    close(mean_loss(fit(wrapped, slice(2 * rank, 2 * rank + 2))), want, "DDP")
    check_saving(rank, folder, wrapped)
    x, y = (t[0][2 * rank : 2 * rank + 2] for t in batches())
    wrapped.zero_grad()
    with wrapped.no_sync():
        (wrapped(x) - y).square().mean().backward()
    (wrapped(x) - y).square().mean().backward()
    summed = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    wrapped.zero_grad()
    (wrapped(x) - y).square().mean().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            close(p.grad * 2, summed[n], f"no_sync {n}")


def check_saving(rank, folder, wrapped):
    """Of the wrapped model the first writes and the others wait, or it writes alone; of the bare one whoever calls."""
    written, original = [], checkpoint.write_atomically

    def slow(contents):
        time.sleep(0.3)
        written.extend(contents)
        original(contents)

    checkpoint.write_atomically = slow
    for n in (1, 2):
        assert (save_ssvdo(wrapped, folder / "ddp") / "ssvdo_model.safetensors").is_file()
        assert len(written) == (2 * n if rank == 0 else 0)
    if rank == 0:
        save_ssvdo(wrapped, folder / "alone")
    save_ssvdo(wrapped.module, folder / f"bare{rank}")
    checkpoint.write_atomically = original
    dist.barrier()
    want = (folder / "ddp" / "ssvdo_model.safetensors").read_bytes()
    assert all((folder / n / "ssvdo_model.safetensors").read_bytes() == want for n in ("alone", "bare0", "bare1"))
    (folder / "file").touch()
    with pytest.raises(OSError if rank == 0 else RuntimeError, match="rank 0 has not written" if rank else "file"):
        save_ssvdo(wrapped, folder / "file" / "x")


def ddp_failure(rank, folder, alone, want):
    """One process fails: all say so, none is left waiting."""
    model, original = base(), sites.factorize

    def failing(*a, **k):
        if rank == 1:
            raise ValueError("disk full")
        return original(*a, **k)

    sites.factorize = failing
    with pytest.raises(RuntimeError, match="process 1: ValueError: disk full"):
        apply_ssvdo(model, CONFIG, process_group=dist.group.WORLD)
    sites.factorize = original
    assert not any(True for _ in hosts(model))
    other = nn.ModuleDict({"fc1": nn.Linear(4, 8 + rank)})
    with pytest.raises(RuntimeError, match="do not hold the same layers"):
        apply_ssvdo(other, SSVDOConfig(outer_rank=1), process_group=dist.group.WORLD)


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def fsdp(rank, folder, alone, want):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = start(rank, folder)
    model.load_state_dict(alone.state_dict())
    whole = {n: p.numel() for n, p in model.named_parameters()}
    shard(model)
    for n, p in model.named_parameters():  # frozen factors too
        assert p.to_local().numel() <= (whole[n] + 1) // 2 + 64, n
    close(mean_loss(fit(model, slice(2 * rank, 2 * rank + 2))), want, "FSDP2")
    x = batches()[0][0]
    y = model(x).detach()
    save_ssvdo(model, folder / "fsdp")
    fresh = load_ssvdo(base(), folder / "fsdp")
    close(fresh(x), y, "saved from shards")
    another = shard(apply_ssvdo(base(), CONFIG))
    assert not torch.allclose(another(x), y, atol=1e-3)
    close(load_ssvdo(another, folder / "fsdp")(x), y, "loaded into shards")
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=str(folder / "dcp"))
    again = shard(apply_ssvdo(base(), CONFIG))
    state = get_model_state_dict(again)
    dcp.load({"model": state}, checkpoint_id=str(folder / "dcp"))
    set_model_state_dict(again, state)
    close(again(x), y, "distributed checkpoint")


def fsdp1(rank, folder, alone, want):
    """FullyShardedDataParallel with use_orig_params=True, as accelerate has it."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = start(rank, folder)
    model.load_state_dict(alone.state_dict())
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}), device_id=torch.device("cpu"))
    close(mean_loss(fit(wrapped, slice(2 * rank, 2 * rank + 2))), want, "FSDP1")
    x = batches()[0][0]
    y = wrapped(x).detach()
    with pytest.raises(ValueError, match="FSDP1 has sharded it"):
        save_ssvdo(wrapped, folder / "fsdp1")
    assert not (folder / "fsdp1").exists()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        if rank == 0:
            save_ssvdo(wrapped, folder / "fsdp1")
    dist.barrier()
    close(load_ssvdo(base(), folder / "fsdp1")(x), y, "saved from FSDP1")


class Square(Net):
    """A square layer has no outer part."""

    def __init__(self):
        super().__init__()
        self.blocks.append(nn.Sequential(nn.Linear(8, 8)))


def fsdp_square(rank, folder, alone, want):
    def square():
        torch.manual_seed(0)
        return apply_ssvdo(Square().double(), CONFIG)

    model = square()
    assert model.blocks[3][0].adapter.outer is None
    close(mean_loss(fit(shard(model), slice(2 * rank, 2 * rank + 2))), fit(square()), "square layers")


def fsdp_half(rank, folder, alone, want):
    """bf16 parameters and float32 reductions: the losses to bf16's rounding, a few products deep."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = start(rank, folder)
    model.load_state_dict(alone.state_dict())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    model = fully_shard(model.float(), mp_policy=policy)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for x, y in zip(*(t.float() for t in batches()), strict=True):
        rows = slice(2 * rank, 2 * rank + 2)
        optimiser.zero_grad()
        loss = (model(x[rows]) - y[rows]).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach().double())
    losses = mean_loss(torch.stack(losses))
    assert torch.allclose(losses, want, rtol=8 * 2**-8), (losses - want).abs().max()
    save_ssvdo(model, folder / "fsdp_half")


def run(rank, folder, work, state, want):
    alone = apply_ssvdo(base(), CONFIG)
    alone.load_state_dict(state)
    work(rank, folder, alone, want)


def accelerated(rank, folder, alone, want):
    """accelerate wraps in DDP: every process saves the wrapped model, or the main one the bare one."""
    import accelerate

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(start(rank, folder))
    accelerator.unwrap_model(model).load_state_dict(alone.state_dict())
    assert type(model) is nn.parallel.DistributedDataParallel
    close(mean_loss(fit(model, slice(2 * rank, 2 * rank + 2))), want, "accelerate")
    save_ssvdo(model, folder / "accelerated")
    if accelerator.is_main_process:
        save_ssvdo(accelerator.unwrap_model(model), folder / "main")
    accelerator.wait_for_everyone()
    files = [(folder / n / "ssvdo_model.safetensors").read_bytes() for n in ("accelerated", "main")]
    assert files[0] == files[1]


@pytest.mark.parametrize("work", [ddp, ddp_failure, fsdp, fsdp1, fsdp_square, fsdp_half, accelerated])
def test_two_processes_give_what_one_gives(work, tmp_path):
    if work in (fsdp, fsdp_square, fsdp_half):
        require_fully_shard()
    if work is accelerated:
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(2)
    alone = apply_ssvdo(base(), CONFIG)
    state = copy.deepcopy(alone.state_dict())
    want = fit(alone)
    name = "blocks.0.0.adapter.outer"
    assert (alone.state_dict()[name] - state[name]).abs().max() > 0.05  # it learns
    two_processes(run, tmp_path, work, state, want)
    if work in (ddp, fsdp, fsdp1, accelerated):
        fresh = load_ssvdo(base(), tmp_path / work.__name__)
        x = batches()[0][0]
        close(fresh(x), alone(x), "loaded by one process")


def test_accumulation_in_one_context():
    model = apply_ssvdo(base(), CONFIG)
    x, y = (t[0] for t in batches())
    (model(x) - y).square().mean().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with gradient_accumulation(model):
        for rows in (slice(0, 2), slice(2, 4)):
            ((model(x[rows]) - y[rows]).square().mean() / 2).backward()
    for _, layer in hosts(model):
        for part in PARAMETER_NAMES:
            assert getattr(layer.adapter, part).grad is not None
    for n, p in model.named_parameters():
        if p.requires_grad:
            close(p.grad, want[n], n)
