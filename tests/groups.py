"""Shared by the tests of layers that are prepared together: two groups of four, and the same layers without groups."""

import copy

import torch
from helpers import assert_close, randomise
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.host import hosts


class Net(nn.Module):
    """Four blocks up and down: two groups of four layers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)) for _ in range(4))

    def forward(self, x, skip=()):
        for i, block in enumerate(self.blocks):
            x = x if i in skip else x + block(x)
        return x


def nets(**options):
    """(grouped, alone): equal models."""
    torch.manual_seed(0)
    net = Net().double()
    apply_ssvdo(net, SSVDOConfig(target_modules="all-linear", outer_rank=3, init_angle=0.2, **options))
    for _, layer in hosts(net):
        randomise(layer)
    alone = copy.deepcopy(net)  # a copy has no groups
    assert all(layer.adapter.cache.group is None for _, layer in hosts(alone))
    return net, alone


def clear(calls):
    """Keeps the dictionary that is being counted in."""
    for sizes in calls.values():
        sizes.clear()


def agree(net, alone, tolerance=1e-11):
    for (name, p), (_, q) in zip(net.named_parameters(), alone.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_close(name, p.grad, q.grad, tolerance)


def train(net, x, forward=None, **options):
    (forward or net)(x, **options).square().sum().backward()
