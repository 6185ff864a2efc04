"""The adapter file format: what was written once stays readable (docs/compatibility.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ssvdo_kernels import CheckpointError, SSVDOConfig, apply_ssvdo, load_ssvdo, save_ssvdo
from ssvdo_kernels.checkpoint import VERSION

DATA = Path(__file__).parents[1] / "data"
VERSIONS = sorted(DATA.glob("adapter_v*"))


def base():
    """The same weights to the bit on every machine and version: from a file, since even torch.cos differs by an ulp."""
    model = nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 5)).double()
    model.load_state_dict(load_file(DATA / "base.safetensors"))
    return model


def probe():
    return torch.sin(torch.arange(15, dtype=torch.float64)).view(3, 5)


def write(folder):
    """Made the committed files: run by hand when the format's version grows, never over an old one."""
    model = apply_ssvdo(base(), SSVDOConfig(inner_ratio=0.6, outer_rank=3, target_modules=("0", "1")))
    with torch.no_grad():
        for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.copy_(0.3 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) + number).view(p.shape))
    save_ssvdo(model, folder)
    save_file({"output": model(probe()).detach()}, folder / "expected.safetensors")


def test_each_version_has_its_file():
    assert [p.name for p in VERSIONS] == [f"adapter_v{n}" for n in range(1, VERSION + 1)]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda p: p.name)
def test_files_of_every_version_load_and_mean_the_same(folder):
    model = load_ssvdo(base(), folder)
    want = load_file(folder / "expected.safetensors")["output"]
    assert torch.allclose(model(probe()), want, rtol=1e-9, atol=1e-10)


def test_a_newer_file_is_refused_with_what_to_do(tmp_path):
    with safe_open(VERSIONS[-1] / "ssvdo_model.safetensors", "pt") as source:
        header = json.loads(source.metadata()["ssvdo"])
        tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    header["version"] = VERSION + 1
    save_file(tensors, tmp_path / "ssvdo_model.safetensors", {"ssvdo": json.dumps(header)})
    with pytest.raises(CheckpointError, match=rf"format {VERSION + 1} is newer than {VERSION}; upgrade"):
        load_ssvdo(base(), tmp_path)
