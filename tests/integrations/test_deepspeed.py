"""DeepSpeed: ZeRO's stages train what one process does; what cannot work there is refused. `nox -s deepspeed`."""

import copy
import os

import pytest
import torch
from helpers import assert_close, count_preparations, storages, two_processes
from torch import nn

from ssvdo_kernels import (
    SSVDOConfig,
    apply_ssvdo,
    gradient_accumulation,
    load_ssvdo,
    merge_ssvdo,
    remove_ssvdo,
    save_ssvdo,
    unmerge_ssvdo,
)

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is first imported
deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed; nox -s deepspeed has it")
STEPS = 4
WEIGHT = 16 * 32 * 4  # bytes of each
ALL = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def base():
    torch.manual_seed(0)
    sizes = (16, 32), (32, 16), (16, 32), (32, 16)
    return nn.Sequential(*(part for n, m in sizes for part in (nn.Linear(n, m), nn.GELU())))


def adapted():
    return apply_ssvdo(base(), SSVDOConfig(outer_rank=4, target_modules="all-linear", init_angle=0.2))


def batch(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)


def optimiser_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)


def alone(model):
    optimiser = optimiser_of(model)
    for i in range(STEPS):
        x, y = batch(i)
        optimiser.zero_grad()
        (model(x) - y).square().mean().backward()
        optimiser.step()
    return model


def engine_of(model, stage):
    sharding = {"stage": stage, **(ALL if stage == 3 else {})}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": sharding,
              "zero_allow_untested_optimizer": True}  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimiser_of(model), config=config)[0]


def trains(rank, stage, folder):
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    model, one = adapted(), adapted()
    engine = engine_of(copy.deepcopy(model), stage)
    counts = count_preparations(pytest.MonkeyPatch())
    for i in range(STEPS):
        x, y = (t[4 * rank : 4 * rank + 4] for t in batch(i))
        engine.backward((engine(x) - y).square().mean())
        engine.step()
    assert sum(counts["forward"]) == 4 * STEPS  # each layer once a step
    assert stage != 3 or set(counts["forward"]) == {1}  # its weights are gathered for one layer at a time
    if stage == 3:
        del model
        own, y = storages(WEIGHT), engine(x)
        assert storages(WEIGHT) == own and len(own) == 4  # of `one`
        engine.backward(y.mean())
        engine.zero_grad()
        assert storages(WEIGHT) == own
    x, one = batch(STEPS)[0], alone(one)
    with torch.no_grad():
        want = one(x)
        assert_close("trained", engine(x), want, 1e-4)  # as a plain model's do: gradients are summed in another order
        merge_ssvdo(engine.module)
        assert_close("merged", engine(x), want, 1e-4)
        unmerge_ssvdo(engine.module)
    with pytest.raises(RuntimeError, match="DeepSpeed trains"), gradient_accumulation(engine.module):
        pass
    if stage == 3:
        inside = r"0.weight has shape \(0,\) here: DeepSpeed has sharded it; .* deepspeed.zero.GatheredParameters"
        with pytest.raises(ValueError, match=inside):
            save_ssvdo(engine.module, folder / str(rank))
        with pytest.raises(RuntimeError, match=inside):
            engine.module[0].adapted_weight()
        with pytest.raises(RuntimeError, match=inside):
            remove_ssvdo(engine.module, merge=True)
    gathered = [*engine.module.parameters()] if stage == 3 else []
    with deepspeed.zero.GatheredParameters(gathered):
        save_ssvdo(engine.module, folder / str(rank))
    with torch.no_grad():
        assert_close("loaded", load_ssvdo(base(), folder / str(rank))(x), engine(x), 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_as_one_process_does(stage, tmp_path):
    two_processes(trains, stage, tmp_path)
