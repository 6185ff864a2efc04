"""What a method keeps in memory beside the pretrained weights, and the most that a training step takes.

    frozen state   what is not trained, beyond the pretrained module's own parameters and buffers
    held           what is kept between steps beyond parameters, buffers and gradients: prepared matrices, casts, copies
    peak           the most memory in use while steps run, the method's own included, beyond the pretrained module's

The first two are counted, tensor by tensor, the third is measured: by torch's allocator on a GPU; on a CPU as resident
memory, in a process of its own for each method (`alone`), since a process gives back little of what it once had.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

STEPS = 2  # after which the peak is known: the first makes gradients and the optimiser's state


class Meter:
    """Peak memory of a span: allocated on a GPU, resident on a CPU (Linux; None elsewhere), less what was there.

    Of what is resident, pages of files (libraries' code, which a process maps as it comes to run it) are left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0
        self.reset()
        self.before = self._peak() or 0

    def reset(self) -> None:
        """Forgets the peak so far, not what was there when the meter was made."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._peak() is not None:
            ctypes.CDLL(None).malloc_trim(0)  # what has been freed is given back first
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the memory in use now

    def _peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        lines = [line.split() for line in status.read_text().splitlines()] if status.exists() else []
        found = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "RssFile:")}
        return found["VmHWM:"] - found["RssFile:"] if len(found) == 2 else None

    def mebibytes(self) -> float | None:
        """The peak since the meter was made, or since `reset`."""
        peak = self._peak()
        return None if peak is None else (peak - self.before) / 2**20


def training_peak(
    pretrained: Callable[[], nn.Module],
    make: Callable[[nn.Module], nn.Module],
    step_of: Callable[[nn.Module], Callable[[], object]],
    device: torch.device,
) -> float | None:
    """MiB that training takes beyond the pretrained module. None: not known here.

    pretrained: makes it, frozen; make: the method's module from it; step_of: a module's training step.
    """
    module = pretrained()
    step_of(module)()  # loads what every step needs
    meter = Meter(device)
    module = make(module)  # and the pretrained one is let go, whether its tensors were copied or taken over
    step = step_of(module)
    meter.reset()
    for _ in range(STEPS):
        step()
    return meter.mebibytes()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a process of its own, forked from one that has imported libraries and done nothing else.

    Raises:
        ChildProcessError: it ended without an answer.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft"])
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_answer, args=(sender, torch.get_num_threads(), function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"{function.__name__} ended with code {process.exitcode}") from None
    finally:
        process.join()


_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD. Fixed, so that a tensor's memory is given back when it is freed: else it depends on chance
which freed pieces a process keeps, and one of them may be as large as the layer's output."""


def _answer(sender: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
    sender.send(function(*arguments))


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Storage -> bytes, each storage once; of a wrapper (torchao's) those of what it wraps."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for one in tensors for t in _inside(one))}


def _inside(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inside(getattr(tensor, name))


def beside(modules: Mapping[str, nn.Module], pretrained: nn.Module, adapted: int) -> dict[str, dict[str, float]]:
    """Each method's `frozen_state` and `held` as multiples of `adapted`, the bytes of the weights that are adapted."""
    return {name: {"frozen_state": frozen_state(module, pretrained) / adapted, "held": held(module) / adapted}
            for name, module in modules.items()}  # fmt: skip


def peaks(names: Iterable[str], peak: Callable[[str], float | None]) -> dict[str, float | None]:
    """What `peak` gives for each method beyond the method "frozen"; None where it gives none."""
    floor = peak("frozen")
    found = {name: floor if name == "frozen" else peak(name) for name in names}
    return {name: None if own is None or floor is None else own - floor for name, own in found.items()}


def frozen_state(module: nn.Module, pretrained: nn.Module) -> int:
    """Bytes that are not trained, beyond `pretrained`'s own."""
    own, base = ([*m.parameters(), *m.buffers()] for m in (module, pretrained))
    return max(0, sum(storages(t for t in own if not t.requires_grad).values()) - sum(storages(base).values()))


def held(module: nn.Module) -> int:
    """Bytes kept beyond parameters, buffers and gradients. Takes whole models: layers may share what they keep."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    known = storages([*module.parameters(), *module.buffers(), *gradients])
    found = storages(_tensors(v for m in module.modules() for n, v in vars(m).items() if n not in _OWN))
    return sum(n for at, n in found.items() if at not in known)


_OWN = ("_parameters", "_buffers", "_modules")
_CODE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, nn.Module)


def _tensors(start: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor that the objects lead to, through containers and attributes; not through modules and functions."""
    todo, seen = list(start), set()
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, _CODE):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            todo += one
        else:
            todo += getattr(one, "__dict__", {}).values()
