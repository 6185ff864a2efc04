"""Shared by the tests: layers with random parameters, and a comparison that names the tensor."""

import ctypes
import gc
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, reference
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.host import hosts
from ssvdo_kernels.ops import engines
from ssvdo_kernels.ops.dispatch import without_triton

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def require_triton():
    """Skips a test, or a module, where there is no Triton new enough."""
    if missing := without_triton():
        pytest.skip(missing, allow_module_level=True)


def require_fully_shard():
    """Returns torch.distributed.fsdp, or skips: torch 2.6 has no `fully_shard` on a CPU."""
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="torch was built without it")
    if TORCH < (2, 7):
        pytest.skip("fully_shard of torch 2.6 needs a GPU")
    return fsdp


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]  # fmt: skip


def allocated():
    """Bytes that malloc has given out and not got back, in all its arenas: to the byte, where resident pages are not.

    Skips where the C library does not tell (mallinfo2: glibc 2.33).
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("the C library has no mallinfo2")
    mallinfo2.restype = _Mallinfo2
    gc.collect()
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def alive():
    """Address of a storage -> its bytes, of every tensor that there is."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and not o.is_meta]
    # Graphs that other tests compiled keep torch.func's tensors, which have no storage of their own.
    found = [t.untyped_storage() for t in tensors if not torch._C._functorch.is_functorch_wrapped_tensor(t)]
    return {s.data_ptr(): s.nbytes() for s in found}


def storages(size):
    """Addresses of the storages of `size` bytes that some tensor has; others' tests may have left some of that size."""
    return {at for at, own in alive().items() if own == size}


def make_layer(m, n, *, dtype=torch.float64, bias=True, rank=None, spread=0.3, seed=0, device="cpu", **options):
    """An SSVDOLinear over a random (rank-deficient with `rank`) weight, its parameters drawn from N(0, spread^2)."""
    torch.manual_seed(seed)
    linear = nn.Linear(n, m, bias=bias, dtype=torch.float64)
    if rank is not None:
        with torch.no_grad():
            linear.weight.copy_(torch.randn(m, rank).double() @ torch.randn(rank, n).double())
    layer = SSVDOLinear.from_linear(linear.to(dtype).to(device), SSVDOConfig(**options))
    randomise(layer, spread)
    return layer


@torch.no_grad()
def randomise(layer, spread=0.3):
    for p in layer.adapter.trained:
        p.copy_(spread * torch.randn(p.shape))


@torch.no_grad()
def randomise_all(model, spread=0.3):
    """Draws the parameters of every adapter of the model; returns it."""
    for _, layer in hosts(model):
        for p in layer.adapter_parameters:
            p.copy_(spread * torch.randn(p.shape))
    return model


def three(layer):
    """(inner_rotation, inner_scale, outer) of a layer or adapter, as the reference takes them: empty where it has none.
    """
    adapter = getattr(layer, "adapter", layer)
    shape, like = adapter.shape, adapter.inner_scale.detach()
    sizes = ((shape.rotated,), (shape.k,), (shape.c, shape.l))
    parameters = zip(adapter.parts, sizes, strict=True)
    return tuple(like.new_zeros(size) if p is None else p for p, size in parameters)


def reference_linear(layer, x, parameters=None):
    """What the equations give for the layer's numbers as they are, in their dtype."""
    parameters = three(layer) if parameters is None else parameters
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    return reference.linear(x, layer.weight.detach().to(x.dtype), bias, *parameters, config=layer.adapter.config)


def prepared(layer):
    """The layer's preparation for its parameters as they are."""
    return layer.adapter.prepared(layer.base())


def count_preparations(monkeypatch):
    """{"forward": [...], "backward": [...]}: of how many layers each preparation, and each way back, was."""
    counts = {"forward": [], "backward": []}
    for name, original in (("forward", engines._prepare), ("backward", engines._inner_gradients)):

        def counting(many, *rest, name=name, original=original):
            counts[name].append(len(many))
            return original(many, *rest)

        monkeypatch.setattr(engines, original.__name__, counting)
    return counts


class Made(TorchDispatchMode):
    """The size of the largest tensor whose storage is none of `known`."""

    def __init__(self, known=()):
        super().__init__()
        self.known, self.numel = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, t.numel())
        return out


def error(got: Tensor, want: Tensor, size: Tensor | None = None) -> float:
    """|got - want|_F / |size|_F, size = want unless given (absolute where it is 0)."""
    want = want.detach().double()
    norm = float((want if size is None else size.detach()).norm()) if want.numel() else 0.0
    return float((got.detach().double() - want).norm()) / (norm or 1.0) if want.numel() else 0.0


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float, size: Tensor | None = None) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    e = error(got, want, size)
    assert e <= tolerance, f"{name}: relative error {e:.2e} > {tolerance:.2e}"


def assert_right(layer, tokens: int, tolerance: float) -> None:
    """Output and every gradient of a layer, on random tokens, against the equations in float64."""
    like = layer.weight
    x = torch.randn(tokens, layer.in_features, device=like.device).to(like.dtype).requires_grad_()
    dy = torch.randn(tokens, layer.out_features, device=like.device).to(like.dtype)
    y = layer(x)
    y.backward(dy)
    wide = [p.detach().double().requires_grad_() for p in three(layer)]
    x64 = x.detach().double().requires_grad_()
    want = reference_linear(layer, x64, wide)
    want.backward(dy.double())
    assert_close("y", y, want, tolerance)
    assert_close("dx", x.grad, x64.grad, tolerance)
    for name, p, q in zip(PARAMETER_NAMES, layer.adapter.trained, wide, strict=True):
        assert_close(name, p.grad, q.grad, tolerance)


def _process(rank, port, work, *args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        work(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def two_processes(work, *args):
    """Calls work(rank, *args) in each of two processes of a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, work, *args), nprocs=2)
