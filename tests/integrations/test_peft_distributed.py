"""`accelerate launch` of two processes that train through PEFT, by DDP, FSDP1 with PEFT's policy and FSDP2, to the
losses and the adapter of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
import peft
from peft import get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import ssvdo_kernels.integrations.peft  # noqa: F401 - registers SSVD-O
from ssvdo_kernels.integrations.peft import SSVDOConfig

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)
STEPS, ROWS = 4, 4


def adapted():
    """Tall, wide and square layers, and a matrix by its parameter's name."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=20, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2)).double()  # fmt: skip
    named = {"target_parameters": ["gate_proj.weight"]} if peft.__version__ >= "0.21" else {}
    config = SSVDOConfig(target_modules=["q_proj", "up_proj", "down_proj"], outer_rank=2, init_angle=0.2, **named)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def fit(model, rows=slice(None), optimiser=None):
    """The losses of some steps."""
    optimiser = optimiser or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    torch.manual_seed(3)
    losses = []
    for ids in torch.randint(0, 40, (STEPS, ROWS, 7)):
        optimiser.zero_grad()
        loss = (model(input_ids=ids[rows]).logits - ids[rows][..., None] / 40.0).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def ddp(model):
    from accelerate import Accelerator

    wrapped = Accelerator(cpu=True).prepare(model)
    assert type(wrapped) is torch.nn.parallel.DistributedDataParallel
    ours = {id(buffer) for name, buffer in model.named_buffers() if "ssvdo_" in name}
    assert ours and not ours & {id(buffer) for buffer in wrapped.modules_buffers}  # not sent in every forward
    return wrapped, model.state_dict


def fsdp1(model, use_orig_params):
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    wrapped = FSDP(model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=use_orig_params,
                   device_id=torch.device("cpu"))  # fmt: skip

    def state():
        with FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            return wrapped.state_dict()

    return wrapped, state


def fsdp1_original(model):
    return fsdp1(model, True)


def fsdp1_flat(model):
    return fsdp1(model, False)


def fsdp2(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    wrapped = fully_shard(model)
    return wrapped, lambda: get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))


KINDS = {kind.__name__: kind for kind in (ddp, fsdp1_original, fsdp1_flat, fsdp2)}


def work(folder):
    """What each process does: trains on its rows, and the first one writes the losses and the adapter."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    for name, wrap in KINDS.items():  # the last may be missing in torch
        model = adapted()
        wrapped, gathered = wrap(model)
        losses = accelerator.reduce(fit(wrapped, slice(2 * rank, 2 * rank + 2)), "mean")
        state = get_peft_model_state_dict(model, state_dict=gathered())
        if accelerator.is_main_process:
            torch.save((losses, state), folder / f"{name}.pt")


@pytest.fixture(scope="module")
def alone():
    model = adapted()
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    losses = fit(model)
    state = get_peft_model_state_dict(model)
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in state.items()) > 0.02
    return losses, state


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder, root = tmp_path_factory.mktemp("launched"), Path(__file__).parents[2]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
               "--num_machines=1", "--mixed_precision=no", "--main_process_port=0", __file__, str(folder)]  # fmt: skip
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return folder, done.stderr[-3000:]


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_train_and_save_what_one_does(name, alone, launched):
    if name == "fsdp2":
        from helpers import require_fully_shard

        require_fully_shard()
    folder, errors = launched
    assert (folder / f"{name}.pt").exists(), errors
    losses, state = torch.load(folder / f"{name}.pt")
    torch.testing.assert_close(losses, alone[0], rtol=1e-9, atol=1e-9)
    assert state.keys() == alone[1].keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, alone[1][key], rtol=1e-8, atol=1e-8)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
