"""Who watches parameters and their gradients in work among processes, how many layers may share a node for that, what
FSDP gathers parameters from, and who takes tensors away when a forward is over."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

LAYERS = 8
"""Of a node in DDP: 8 of 1024 x 4096 have 11 MB of gradients, less than what DDP sends at once (25 MiB)."""


_AVAILABLE = dist.is_available()


def hooked() -> bool:
    """Whether hooks of work among processes (DDP, FSDP, ZeRO) may watch the parameters, or gather weights anew."""
    return _AVAILABLE and dist.is_initialized()


def ddp() -> Any:
    """The DDP whose forward this is; None elsewhere."""
    return DistributedDataParallel._active_ddp_module


def units(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """(module, its unit's number) of every module that FSDP gathers and shards with others: those below the same
    nearest module that is sharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(getattr(fsdp, n) for n in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, n))
    todo = [(model, 0)] if kinds else []
    while todo:
        module, unit = todo.pop()
        unit = id(module) if isinstance(module, kinds) else unit
        if unit:
            yield module, unit
        todo += [(child, unit) for child in module.children()]


def trained_by_deepspeed(model: nn.Module) -> bool:
    """Whether DeepSpeed takes gradients of the model's parameters in its own backward, as its hooks on them (ZeRO) or
    on the model (stage 0) say."""
    if "deepspeed" not in sys.modules:
        return False
    on_modules = ((*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for m in model.modules())
    on_parameters = ((p._post_accumulate_grad_hooks or {}).values() for p in model.parameters())
    hooks = chain.from_iterable(chain(on_modules, on_parameters))
    return any(str(getattr(hook, "__module__", "")).startswith("deepspeed.") for hook in hooks)


def comes_and_goes(tensors: Iterable[Tensor | None]) -> bool:
    """Whether DeepSpeed's ZeRO-3 has the numbers of some of them there for their own module's use alone."""
    return any(hasattr(t, "ds_tensor") and not getattr(t, "ds_persist", False) for t in tensors)


def offloads(module: nn.Module) -> bool:
    """Whether accelerate brings the module's own tensors for a forward and takes them away again."""
    hook: Any = vars(module).get("_hf_hook")
    return hook is not None and any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


def lasting_part(tensor: Tensor) -> Tensor:
    """What ZeRO-3 gathers it from; elsewhere itself."""
    shard: Tensor = getattr(tensor, "ds_tensor", tensor)
    return shard


def not_there(name: str, tensor: Tensor) -> str:
    """What an error says of a tensor whose numbers FSDP1 or ZeRO-3 has taken away."""
    whose, inside = "FSDP1", "FullyShardedDataParallel.summon_full_params(model)"
    if hasattr(tensor, "ds_tensor"):
        whose, inside = "DeepSpeed", "deepspeed.zero.GatheredParameters(list(model.parameters()))"
    return f"{name} has shape {tuple(tensor.shape)} here: {whose} has sharded it; allowed: inside of {inside}"


_gathered = WeakTensorKeyDictionary()  # to what FSDP2 keeps of a parameter, weakly, from what it gathers into; or None


def shards(tensors: Iterable[Tensor | None], frozen: bool = False) -> Sequence[Any]:
    """What FSDP has gathered them from, for `writes`; nothing where it has not. frozen: not from what is trained.

    FSDP hides from a gathered tensor's version counter what it gathers, and may put it where it lay before.
    """
    if not hooked() or ddp() is not None or "torch.distributed.fsdp" not in sys.modules:
        return ()
    found: dict[int, Any] = {}
    for t in tensors:
        if t is None:
            continue
        if (flat := t._base) is not None:  # FSDP1: a view of a flat parameter, which has trained and frozen ones
            own = [flat, *(p for p in getattr(flat, "_params", None) or () if not (frozen and p.requires_grad))]
        else:
            if t not in _gathered:
                _gathered[t] = None
                _look_for_gathered()
            own = [] if (kept := _gathered[t]) is None else [kept()]
        found.update((id(one), one) for one in own if one is not None)
    return tuple(found.values())


def _look_for_gathered() -> None:
    from torch.distributed._composable_state import _module_state_mapping  # no public way leads to the parameters
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                for one in () if group is None else group.fsdp_params:
                    if (into := getattr(one, "_unsharded_param", None)) is not None:
                        _gathered[into] = weakref.ref(one)


def writes(sources: Sequence[Any]) -> list[int]:
    """What changes where something is written to what `shards` found."""
    found: list[int] = []
    for one in sources:
        if isinstance(one, Tensor):
            found.append(one._version)
        else:
            own = one.sharded_param  # a DTensor
            found += id(own), own._version, own._local_tensor._version
    return found


def layers_a_node() -> int:
    """How many layers' gradients may come from one node: all in a single process, some in a forward of DDP, else 1 (or
    those of one unit of FSDP).

    A node of several brings nothing to layers that nothing used, though it reaches their parameters; DDP takes that as
    it is meant. With static_graph it counts on them each time, and they may be in one batch and not in the next. FSDP
    and ZeRO want a unit's gradients when the unit's own backward is over; so does DDP where a reentrant checkpoint's is
    a backward of its own.
    """
    if not hooked():
        return sys.maxsize
    wrapper = ddp()
    return 1 if wrapper is None or wrapper.static_graph else LAYERS


def all_used() -> weakref.ref[DistributedDataParallel] | None:
    """The DDP whose forward this is, where it waits for a gradient of every parameter."""
    wrapper = ddp()
    if wrapper is None or wrapper.find_unused_parameters or not wrapper.require_backward_grad_sync:
        return None
    return weakref.ref(wrapper)


def refuse_unused(wrapper: Any, unused: Iterable[tuple[str, Sequence[Tensor | None]]]) -> None:
    """RuntimeError where a layer (name, parameters) without gradients is one of which `wrapper` waits for some: from a
    node that others share it would take zeros."""
    own: set[int] = set()
    for name, parameters in unused:
        own = own or {id(p) for n, p in wrapper.module.named_parameters() if n not in wrapper.parameters_to_ignore}
        if any(p is not None and p.requires_grad and id(p) in own for p in parameters):
            raise RuntimeError(f"{name}: no gradient came to this layer, and DistributedDataParallel waits for one; "
                               "allowed: DistributedDataParallel(find_unused_parameters=True)")  # fmt: skip


def refuse_counting(name: str) -> None:
    """RuntimeError in a forward of a DDP that counts which parameters a graph reaches: with gradients that are summed
    elsewhere at first it reaches none."""
    wrapper = ddp()
    if wrapper is None or not wrapper.require_backward_grad_sync:
        return
    for option in ("find_unused_parameters", "static_graph"):
        if getattr(wrapper, option):
            raise RuntimeError(f"{name}: gradient_accumulation in DistributedDataParallel({option}=True), which asks a "
                               f"forward's graph for the parameters that it reaches; allowed: {option}=False, or "
                               "no_sync() without gradient_accumulation")  # fmt: skip
