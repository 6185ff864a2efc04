"""DDP and FSDP2 with two processes (gloo): one process's losses, adapters from sharded state, shared factorisation."""

import copy
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial, reduce
from itertools import islice
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from helpers import count_preparations, require_fully_shard
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, cache, gradient_accumulation, load_ssvdo, save_ssvdo, sites
from ssvdo_kernels import checkpoint as files
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.host import hosts
from ssvdo_kernels.model import group_layers

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


def fit(model, rows=slice(None), steps=STEPS):
    """The losses of some steps."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for x, y in islice(zip(*batches(), strict=True), steps):
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
    written, original = [], files.write_atomically

    def slow(contents):
        time.sleep(0.3)
        written.extend(contents)
        original(contents)

    files.write_atomically = slow
    for n in (1, 2):
        assert (save_ssvdo(wrapped, folder / "ddp") / "ssvdo_model.safetensors").is_file()
        assert len(written) == (2 * n if rank == 0 else 0)
    if rank == 0:
        save_ssvdo(wrapped, folder / "alone")
    save_ssvdo(wrapped.module, folder / f"bare{rank}")
    files.write_atomically = original
    dist.barrier()
    want = (folder / "ddp" / "ssvdo_model.safetensors").read_bytes()
    assert all((folder / n / "ssvdo_model.safetensors").read_bytes() == want for n in ("alone", "bare0", "bare1"))
    (folder / "file").touch()
    with pytest.raises(OSError if rank == 0 else RuntimeError, match="rank 0 has not written" if rank else "file"):
        save_ssvdo(wrapped, folder / "file" / "x")


MODES = [  # options of DDP, what the training does, which blocks process 0 skips, sizes of the ways back in a step
    ({}, "", (), [3, 3]),
    ({"gradient_as_bucket_view": True}, "", (), [3, 3]),
    ({}, "no_sync", (), [3, 3, 3, 3]),
    ({}, "accumulation", (), [3, 3]),
    ({}, "accumulation, no_sync", (), [3, 3]),
    ({}, "checkpoint", (), [3, 3]),
    ({}, "checkpoint, reentrant", (), [1] * 6),
    ({"find_unused_parameters": True}, "", (0, 2), [1, 1]),
    ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, "no_sync", (2,), [2, 2, 2, 2]),
    ({"static_graph": True}, "", (2,), [1] * 4),
    ({"static_graph": True}, "checkpoint, reentrant", (), [1] * 6),
]


def parts_of(model, rows, mode, skip):
    """The losses of one process's micro-batches of a step, one after the other."""
    net = getattr(model, "module", model)
    run = partial(checkpoint, use_reentrant="reentrant" in mode) if "checkpoint" in mode else nn.Module.__call__
    net.forward = lambda x: reduce(lambda x, i: x if i in skip else x + run(net.blocks[i], x), range(3), x)
    parts = (rows[:1], rows[1:]) if "no_sync" in mode or "accumulation" in mode else (rows,)
    return (model(x.clone().requires_grad_()).square().mean() / len(parts) for x in parts)


def ddp_modes(rank, folder, alone, want):
    """Layers of one shape go back together in every mode that allows it, and all train as one process does."""
    counts = count_preparations(pytest.MonkeyPatch())["backward"]
    batch = batches()[0]
    for options, mode, skip, sizes in MODES:
        model, single = (copy.deepcopy(alone) for _ in range(2))
        group_layers(model)
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        optimisers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (model, single)]
        for x in batch[:2]:
            counts.clear()
            losses = parts_of(wrapped, x[2 * rank : 2 * rank + 2], mode, () if rank else skip)
            with gradient_accumulation(wrapped) if "accumulation" in mode else nullcontext():
                if "no_sync" in mode:
                    with wrapped.no_sync():
                        next(losses).backward()
                for loss in losses:
                    loss.backward()
            assert rank or counts == sizes, (options, mode, counts)
            for other in range(2):
                for loss in parts_of(single, x[2 * other : 2 * other + 2], mode, () if other else skip):
                    (loss / 2).backward()
            for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), (options, mode, name)
                if q.grad is not None:
                    close(p.grad, q.grad, f"{options} {mode} {name}")
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()


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


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
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


class Gated(nn.Module):
    """Three layers of one shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(*size) for size in ((8, 24), (8, 24), (8, 24), (24, 8)))

    def forward(self, x):
        return x + self.d(torch.tanh(self.a(x)) * self.b(x) + self.c(x))


class Mixed(nn.Module):
    """Two such blocks, and a layer of the same shape outside of them."""

    check: ClassVar[bool | None] = None  # whether blocks are checkpointed, and with reentry

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)
        self.blocks = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        for block in self.blocks:
            x = block(x) if self.check is None else checkpoint(block, x, use_reentrant=self.check)
        return x


def mixed():
    torch.manual_seed(0)
    return apply_ssvdo(Mixed().double(), CONFIG)


def sharded_again(model):
    return shard(model)


def sharded_once(model):
    """Gathered until the backward has run, so that all blocks are there when the second forward prepares."""
    return shard(model, reshard_after_forward=False)


def sharded_flat(model):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({Gated})
    return FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def units(rank, folder, alone, want):
    """The layers of a shape in a unit of FSDP go back together; those of other units, and of the root, on their own."""
    patch = pytest.MonkeyPatch()
    counts = count_preparations(patch)
    patch.setattr(cache, "_on_cpu", lambda _: False)  # steps count, as on a GPU: anew may lie where it lay before
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
    for check in (None, False, True):
        Mixed.check = check
        want = fit(mixed(), steps=3)
        for way in (sharded_again, sharded_once, sharded_flat) if newer else (sharded_flat,):
            model = way(mixed())
            close(mean_loss(fit(model, slice(2 * rank, 2 * rank + 2), steps=3)), want, f"{way.__name__} {check}")
            if check is not True:
                assert counts["backward"][-6:] == [1, 3, 1, 3, 1, 1], (way.__name__, check, counts["backward"][-6:])
    if newer:
        batch_of_several_units(counts)


def batch_of_several_units(counts):
    Mixed.check = None
    grads, x = [], batches()[0][0]
    for way in (lambda model: model, sharded_once):
        model = way(mixed())
        y = model(x)
        for _, layer in hosts(model):
            layer.refresh()
        counts["forward"].clear()
        (y + model(x)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert counts["forward"] == [7, 3]
    for got, want in zip(grads[1], grads[0], strict=True):
        close(got.full_tensor(), want, "gradient")


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


def run(rank, folder, work, state, want, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    alone = apply_ssvdo(base(), CONFIG)
    alone.load_state_dict(state)
    try:
        work(rank, folder, alone, want)
        dist.barrier()
    finally:
        dist.destroy_process_group()


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


@pytest.mark.parametrize("work", [ddp, ddp_modes, ddp_failure, fsdp, fsdp1, units, fsdp_square, fsdp_half, accelerated])
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
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run, (tmp_path, work, state, want, port), nprocs=2)
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
