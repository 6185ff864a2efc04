"""The example in the docstring of every public name runs, and prints what it says."""

import doctest
import importlib
import inspect
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import ssvdo_kernels

INTEGRATIONS = {  # module: (names, the package that it needs)
    "peft": (("SSVDOConfig",), "peft"),
    "transformers": (("SSVDOCallback",), "accelerate"),
    "espnet": (("create_ssvdo_adapter", "DeferredSSVDOLinear", "from_espnet_ssvd", "plain_state_dict"), "espnet"),
}  # fmt: skip
NAMES = [("ssvdo_kernels", name, "torch") for name in ssvdo_kernels.__all__] + [
    (f"ssvdo_kernels.integrations.{module}", name, package)
    for module, (names, package) in INTEGRATIONS.items() for name in names]  # fmt: skip


def surroundings():
    """What docs/api.md says that every example has at hand."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    config = ssvdo_kernels.SSVDOConfig(outer_rank=16, target_modules="all-linear")
    model = ssvdo_kernels.apply_ssvdo(deepcopy(plain), config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4, weight_decay=0)
    public = {name: getattr(ssvdo_kernels, name) for name in ssvdo_kernels.__all__}
    return dict(public, torch=torch, nn=nn, deepcopy=deepcopy, Path=Path, plain=plain, model=model,
                optimiser=optimiser, x=torch.randn(8, 64))  # fmt: skip


def espnet_checkpoint():
    """A state_dict as ESPnet's SSVD leaves it: k = 16 of 64 components."""
    weight = torch.randn(256, 64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    state = {"u": u, "v": vh, "s_pre": s, "s": torch.zeros(16), "gate": torch.ones(16), "K_vec": torch.zeros(120),
             "weight": weight, "bias": torch.zeros(256)}  # fmt: skip
    return {f"encoder.w_1.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(("module", "name", "package"), NAMES, ids=[f"{m}.{n}" for m, n, _ in NAMES])
def test_the_example_runs(module, name, package, tmp_path, monkeypatch):
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    found = getattr(importlib.import_module(module), name)
    around = surroundings() | {name: found}
    torch.save(espnet_checkpoint(), "espnet.pth")
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(found), around, name, None, 0)
    assert test.examples, f"{name} has no example"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=flags)
    runner.run(test, out=printed.append)
    assert not runner.failures, "".join(printed)


def test_no_description_becomes_a_quotation():
    """Markdown takes a line that begins with ">" for one."""
    folder = Path(ssvdo_kernels.__file__).parent
    found = [f"{path.name}: {line.strip()}" for path in folder.rglob("*.py") for line in path.read_text().splitlines()
             if re.match(r"\s+(\w+: )?>=? ", line) and ">>>" not in line]  # fmt: skip
    assert found == []
