"""Shared by the tests of compiled layers: a model, how it is compiled, and its gradients."""

import copy

import torch
from helpers import assert_close, randomise
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import host


def clear(calls):
    for sizes in calls.values():
        sizes.clear()


def model(dtype=torch.float32, blocks=1, **options):
    """Blocks of a tall layer and a wide one, alike and so prepared together, and a square one."""
    torch.manual_seed(0)
    many = [part for _ in range(blocks) for part in (nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))]
    net = nn.Sequential(*many, nn.Linear(16, 16, bias=False)).to(dtype)
    names = [str(i) for i in range(len(many)) if i % 3 != 1]
    apply_ssvdo(net, SSVDOConfig(target_modules=names, outer_rank=3, init_angle=0.3, **options))
    apply_ssvdo(net, SSVDOConfig(target_modules=[str(len(many))], outer_rank=0, **options))
    for _, layer in hosts(net):
        randomise(layer)
    return net


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, 16, dtype=dtype, requires_grad=True)


def compiled(net, **options):
    return torch.compile(net, fullgraph=True, **{"backend": "aot_eager", **options})


def gradients(function, net, x):
    net.zero_grad()
    x.grad = None
    y = function(x)
    (y.float() if y.dtype.itemsize < 4 else y).square().sum().backward()
    return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)]


def same(got, want, tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype
        assert_close(str(i), a, b, tolerance)


def value(net, x):
    """What a copy computes, which starts afresh."""
    with torch.no_grad():
        return copy.deepcopy(net)(x)


def as_copied(net, x):
    """What a copy computes, and its gradients."""
    fresh = copy.deepcopy(net)
    return gradients(fresh, fresh, x)


def in_place(net):
    with torch.no_grad():
        net[0].adapter.outer.mul_(1.5)


def in_groups(count):
    """How a model of so many blocks is prepared: its tall layers, its wide ones and the square one."""
    return [count, count, 1] if host.available() else [1] * (2 * count + 1)
