"""Small models for PEFT's cases."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner

from ssvdo_kernels.integrations.peft import Linear, SSVDOConfig

needs_0_21 = pytest.mark.skipif(not hasattr(BaseTuner, "_remove_adapter_name_from_key"),
                                reason="PEFT before 0.21 does not load again what it saves of these")  # fmt: skip


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 24, bias=bias)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(24, 8, bias=bias)
        self.square = nn.Linear(8, 8, bias=bias)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.square(self.lin1(self.relu(self.lin0(x)))))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 20), "down": nn.Linear(20, 8)}) for _ in range(4))

    def forward(self, x):
        for layer in self.body.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return x


CASES = {
    "lin0": {"target_modules": "lin0"},
    "list": {"target_modules": ["lin0", "lin1"]},
    "regex": {"target_modules": r"lin\d"},
    "all-linear": {"target_modules": "all-linear"},
    "square": {"target_modules": ["square"]},
    "first order": {"target_modules": ["lin0", "lin1"], "rotation": "first_order", "outer": "additive"},
    "ssvd": {"target_modules": ["lin0"], "outer_rank": 0},
    "modules_to_save": {"target_modules": ["lin0"], "modules_to_save": ["head"]},
    "angle": {"target_modules": ["lin0", "lin1"], "init_angle": 0.1},
}

cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())


def base(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return MLP().to(dtype).eval()


def adapt(model, adapter="default", **options):
    options.setdefault("outer_rank", 3)
    return get_peft_model(model, SSVDOConfig(**options), adapter_name=adapter)


def x_of(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(7, 10).to(dtype)


def same(a, b):
    """To rounding: the planner may take another form of the layer once more tokens have passed."""
    return torch.allclose(a, b, atol=1e-6)


def train(model, x, steps=3, lr=0.01):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()


def adapters_of(model):
    """(layer's name, adapter's name, adapter) of all."""
    return [(n, name, adapter) for n, m in model.named_modules() if isinstance(m, Linear)
            for name, adapter in m.ssvdo_adapters.items()]  # fmt: skip


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(48, 192), nn.Linear(192, 48)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def pair(source, dtype, seed=0):
    """The numbers of a model in `source`, in `dtype`."""
    torch.manual_seed(seed)
    return Pair().to(source).to(dtype)
