"""Layers that are prepared together where processes train together: in DDP's modes, and in the units of FSDP."""

import copy
from contextlib import nullcontext
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from groups import agree, clear, nets, train
from helpers import TORCH, assert_close, count_preparations, require_fully_shard, two_processes
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, cache, gradient_accumulation, watchers
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import graph, host

if not host.available():
    pytest.skip("the compiled core was not built", allow_module_level=True)
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)


FULLY_SHARDS = TORCH >= (2, 7)  # there is a `fully_shard` on a CPU


def x_of(*shape):
    return torch.randn(*shape, 8, dtype=torch.float64)


def batches(steps):
    torch.manual_seed(1)
    return x_of(steps, 4)


@pytest.fixture
def counts(monkeypatch):
    """How many layers each preparation, and each way back, was for."""
    return count_preparations(monkeypatch)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel(one_process, counts):
    """DDP takes a layer without gradients for unused, though the node that it shares reaches its parameters."""
    net, alone = nets()
    ddp = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    for skip in ((), (1,), (0, 3)):
        net.zero_grad()
        alone.zero_grad()
        torch.manual_seed(1)
        clear(counts)
        ddp(x_of(4), skip=skip).square().sum().backward()
        assert counts["backward"] == [4 - len(skip)] * 2
        torch.manual_seed(1)
        train(alone, x_of(4), skip=skip)
        agree(net, alone)


def test_data_parallel_gets_gradients_of_some_layers_while_others_go_back(one_process, counts, monkeypatch):
    monkeypatch.setattr(watchers, "LAYERS", 3)
    net, alone = nets()
    ddp = nn.parallel.DistributedDataParallel(net)
    arrived, x = [], x_of(4)
    for i, block in enumerate(net.blocks):
        block[0].adapter.outer.register_post_accumulate_grad_hook(lambda _, i=i: arrived.append(i))
        block.register_full_backward_hook(lambda *_, i=i: arrived.append(f"after {i}"))
    train(ddp, x.requires_grad_())
    assert counts["forward"] == [4, 4] and sorted(counts["backward"]) == [1, 1, 3, 3]
    assert arrived.index(3) < arrived.index("after 2") < arrived.index("after 0")
    train(alone, x)
    agree(net, alone)


def test_data_parallel_that_waits_for_every_gradient_hears_of_a_layer_without(one_process):
    net, _ = nets()
    ddp = nn.parallel.DistributedDataParallel(net)
    train(ddp, x_of(4))
    with ddp.no_sync():
        train(ddp, x_of(4), skip=(1,))
    loss = ddp(x_of(4), skip=(1,)).square().sum()
    torch.autograd.grad(loss, net.blocks[0][0].adapter.outer, retain_graph=True)  # on which it does not wait
    with pytest.raises(RuntimeError, match=r"blocks\.1\.2: no gradient came .*find_unused_parameters=True"):
        loss.backward()
    net.blocks[1].requires_grad_(False)
    train(nn.parallel.DistributedDataParallel(net), x_of(4), skip=(1,))


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
def test_gradient_accumulation_where_data_parallel_counts_parameters_is_refused(one_process, option):
    net, _ = nets()
    ddp = nn.parallel.DistributedDataParallel(net, **{option: True})
    with pytest.raises(RuntimeError, match=rf"gradient_accumulation in .*{option}=True"), gradient_accumulation(ddp):
        ddp(x_of(4))
    assert net.blocks[0][0].adapter.outer.grad is None


@pytest.mark.parametrize("inside, bucket", [(True, 25), (False, 25), (False, 0.002)])
def test_compiled_data_parallel(one_process, counts, monkeypatch, inside, bucket):
    """With gradients in small buckets the graph is split between layers; each hook runs once."""
    monkeypatch.setattr(graph, "LAYERS", 2)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", min(2**20, int(bucket * 2**20)))
    torch._dynamo.reset()
    net, alone = nets()
    split = CompileCounterWithBackend("aot_eager")
    given = torch.compile(net, backend=split) if inside else net
    ddp = nn.parallel.DistributedDataParallel(given, bucket_cap_mb=bucket)
    function, ran = ddp if inside else torch.compile(ddp, backend=split), []
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    for name in trained:
        net.get_parameter(name).register_post_accumulate_grad_hook(lambda _, name=name: ran.append(name))
    for _ in range(2):
        x = x_of(4)
        clear(counts)
        ran.clear()
        train(function, x)
        assert counts["backward"] == [2] * 4 and sorted(ran) == sorted(trained)
        train(alone, x)
    agree(net, alone)
    assert (split.frame_count > 1) == (bucket < 1)


class Unit(nn.Module):
    """Two layers of a shape up and two down."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)) for _ in range(2))

    def forward(self, x):
        return self.second(self.first(x))


def test_fully_sharded(one_process):
    fsdp = require_fully_shard()
    net, alone = nets()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in net.blocks:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(net, mesh=mesh)
    with pytest.raises(RuntimeError, match="FSDP shards"), gradient_accumulation(net):
        net(x_of(4))
    for model in net, alone:
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for seed in range(2):
            optimiser.zero_grad()
            torch.manual_seed(seed)
            train(model, x_of(4))
            optimiser.step()
    for (name, p), (_, q) in zip(net.named_parameters(), alone.named_parameters(), strict=True):
        if q.grad is not None:
            assert_close(name, p.grad.full_tensor(), q.grad, 1e-11)
            assert_close(name, p.full_tensor(), q, 1e-11)


MODES = [  # options of DDP, what the training does, which blocks process 0 skips, sizes of the ways back in a step
    ({}, "", (), [4, 4]),
    ({"gradient_as_bucket_view": True}, "", (), [4, 4]),
    ({}, "no_sync", (), [4, 4, 4, 4]),
    ({}, "accumulation", (), [4, 4]),
    ({}, "accumulation, no_sync", (), [4, 4]),
    ({}, "checkpoint", (), [4, 4]),
    ({}, "checkpoint, reentrant", (), [1] * 8),
    ({"find_unused_parameters": True}, "", (0, 2), [2, 2]),
    ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, "no_sync", (2,), [3, 3, 3, 3]),
    ({"static_graph": True}, "", (2,), [1] * 6),
    ({"static_graph": True}, "checkpoint, reentrant", (), [1] * 8),
]


def losses_of(model, rows, mode, skip):
    """Of one process's micro-batches of a step, one after the other."""
    net = getattr(model, "module", model)
    if "checkpoint" in mode:
        for block in net.blocks:
            layers = nn.Sequential.forward.__get__(block)
            block.forward = partial(checkpoint, layers, use_reentrant="reentrant" in mode)
    parts = (rows[:1], rows[1:]) if "no_sync" in mode or "accumulation" in mode else (rows,)
    return (model(x.clone().requires_grad_(), skip=skip).square().mean() / len(parts) for x in parts)


def modes_of_ddp(rank):
    """Layers of one shape go back together in every mode that allows it, and all train as one process does."""
    counts = count_preparations(pytest.MonkeyPatch())["backward"]
    for options, mode, skip, sizes in MODES:
        net, alone = nets()
        wrapped = nn.parallel.DistributedDataParallel(net, **options)
        optimisers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (net, alone)]
        for x in batches(2):
            counts.clear()
            losses = losses_of(wrapped, x[2 * rank : 2 * rank + 2], mode, () if rank else skip)
            with gradient_accumulation(wrapped) if "accumulation" in mode else nullcontext():
                if "no_sync" in mode:
                    with wrapped.no_sync():
                        next(losses).backward()
                for loss in losses:
                    loss.backward()
            assert rank or counts == sizes, (options, mode, counts)
            for other in range(2):
                for loss in losses_of(alone, x[2 * other : 2 * other + 2], mode, () if other else skip):
                    (loss / 2).backward()
            agree(net, alone)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()


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
    return apply_ssvdo(Mixed().double(), SSVDOConfig(target_modules="all-linear", outer_rank=3, init_angle=0.2))


def fit(model, rows):
    """The mean losses of three steps, each process on its rows, and what is trained."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for x in batches(3):
        optimiser.zero_grad()
        losses.append(model(x[rows]).square().mean())
        losses[-1].backward()
        optimiser.step()
    return torch.stack(losses).detach()


def sharded_again(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model)


def sharded_once(model):
    """Gathered until the backward has run, so that all blocks are there when the second forward prepares."""
    return sharded_again(model, reshard_after_forward=False)


def sharded_flat(model):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Gated}),
                                    device_id=torch.device("cpu"))  # fmt: skip


def units_of_fsdp(rank):
    """The layers of a shape in a unit of FSDP go back together; those of other units, and of the root, on their own."""
    patch = pytest.MonkeyPatch()
    counts = count_preparations(patch)
    patch.setattr(cache, "_on_cpu", lambda _: False)  # steps count, as on a GPU: anew may lie where it lay before
    for check in (None, False, True):
        Mixed.check = check
        want = fit(mixed(), slice(4))
        for way in (sharded_again, sharded_once, sharded_flat) if FULLY_SHARDS else (sharded_flat,):
            model = way(mixed())
            losses = fit(model, slice(2 * rank, 2 * rank + 2)) / 2
            dist.all_reduce(losses)
            assert_close(f"{way.__name__} {check}", losses, want, 1e-9)
            if check is not True:
                assert counts["backward"][-6:] == [1, 3, 1, 3, 1, 1], (way.__name__, check, counts["backward"][-6:])
    if FULLY_SHARDS:
        batch_of_several_units(counts)


def batch_of_several_units(counts):
    Mixed.check = None
    grads, (x,) = [], batches(1)
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
        assert_close("gradient", got.full_tensor(), want, 1e-9)


def edits_of_shards(rank):
    """What is written into shards between forwards, without a step, is seen, though what FSDP gathers lies where it lay
    before and its counters say nothing."""
    patch = pytest.MonkeyPatch()
    counts, stamps = count_preparations(patch), cache.stamps
    patch.setattr(cache, "_on_cpu", lambda _: False)
    patch.setattr(cache, "stamps", lambda tensors: [part for i, part in enumerate(stamps(tensors)) if i % 3])
    Mixed.check, (x,) = None, batches(1)
    for way in (sharded_again, sharded_flat) if FULLY_SHARDS else (sharded_flat,):
        alone, model = mixed(), way(mixed())

        def made(model=model):
            y = model(x)
            y.sum().backward()  # FSDP lets go of the root's parameters
            return y.detach()

        for factor in (0.5, 1.5):
            made()
            with torch.no_grad():
                for p in (*alone.parameters(), *model.parameters()):
                    if p.requires_grad:
                        p.mul_(factor)
            assert_close(f"{way.__name__} {factor}", made(), made(alone), 1e-12)
        clear(counts)
        made()
        assert counts["forward"] == []
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("weight"):
                    p.mul_(1.5)
        with pytest.raises(RuntimeError, match="no longer the one that was factorised"):
            model(x)


class Stack(nn.Module):
    """Units, of which a forward may skip some."""

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList(Unit() for _ in range(2))

    def forward(self, x, skip=()):
        for i, unit in enumerate(self.units):
            x = x if i in skip else x + unit(x)
        return x


COMPILED = [  # options of DDP, or how it is sharded; which units are skipped; sizes of the way there and back in a step
    ({"static_graph": True}, (1,), [2, 2], [2, 2]),  # a unit that never changes is prepared once
    ({"find_unused_parameters": True}, (0,), [2, 2], [2, 2]),
    ("units", (), [2] * 4, [2] * 4),  # each a graph: the prepared matrices outlive that its parameters are resharded
    ("whole", (), [2] * 4, [2] * 4),  # as `model.compile` after fully_shard, and torch.compile of both
]


def compiled_net(given):
    net = Stack().double()
    apply_ssvdo(net, SSVDOConfig(target_modules="all-linear", outer_rank=3, init_angle=0.2))
    alone = copy.deepcopy(net)
    if not isinstance(given, str):
        return torch.compile(nn.parallel.DistributedDataParallel(net, **given), backend="aot_eager"), net, alone
    from torch.distributed.fsdp import fully_shard

    for unit in net.units:
        if given == "units":
            unit.compile(backend="aot_eager")
        fully_shard(unit)
    fully_shard(net)
    if given != "units":
        net.compile(backend="aot_eager")
    return net, net, alone


def compiled_layers(rank):
    """Compiled, in DDP and in FSDP: prepared together once a step and brought back together, with the numbers of one
    process."""
    counts = count_preparations(pytest.MonkeyPatch())
    for given, skip, prepared, ways_back in COMPILED:
        if isinstance(given, str) and not FULLY_SHARDS:
            continue
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, net, alone = compiled_net(given)
        steps = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1e-3) for m in (net, alone)]
        for x in batches(2):
            clear(counts)
            train(model, x[2 * rank : 2 * rank + 2], skip=skip)
            sizes = copy.deepcopy(counts)
            (alone(x, skip=skip).square().sum() / 2).backward()
            for optimiser in steps:
                optimiser.step()
                optimiser.zero_grad()
        assert sizes == {"forward": prepared, "backward": ways_back}, (given, sizes)
        for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
            assert_close(f"{given} {name}", p.full_tensor() if isinstance(given, str) else p, q, 1e-11)


@pytest.mark.parametrize("work", [modes_of_ddp, units_of_fsdp, edits_of_shards, compiled_layers])
def test_two_processes_train_as_one_does(work):
    two_processes(work)
