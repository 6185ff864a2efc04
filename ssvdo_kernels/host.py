"""What every layer that hosts adapters offers to the functions over whole models."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapter import Adapter
from .cache import Cache
from .group import Member, group_alike
from .ops.base import Base
from .ops.preparation import Source
from .watchers import units


class Host(nn.Module):
    """A layer that computes through adapters of its base operator."""

    def base(self, adapter: Adapter | None = None) -> Base:
        """The operator that is adapted, as it is now; that of one of its adapters, where there are several."""
        raise NotImplementedError

    def adapters(self) -> list[Adapter]:
        """The adapters, those in use first."""
        raise NotImplementedError

    def rescale(self, scale: float) -> None:
        """Sets `Adapter.scale` of all adapters."""
        for adapter in self.adapters():
            adapter.scale = scale

    @property
    def adapter_parameters(self) -> list[nn.Parameter]:
        """What is trained, of all adapters: for an optimiser or for clipping."""
        return [p for adapter in self.adapters() for p in adapter.trained]


class OwnHost(Host):
    """A layer that `apply_ssvdo` makes, `save_ssvdo` writes and `remove_ssvdo` takes out again."""

    @property
    def layout(self) -> str:
        """How the weights that are adapted hold W0: see `LinearMap`."""
        return "plain"

    def parts(self) -> dict[str, Adapter]:
        """Its adapters by the name below the layer's that they have in a file; "" is the layer's own."""
        raise NotImplementedError

    def plain(self, merge: bool = False) -> nn.Module:
        """The layer that stood here, with W0 or, with merge, W'."""
        raise NotImplementedError

    def adapters(self) -> list[Adapter]:
        return list(self.parts().values())


class WrappingHost(OwnHost):
    """A host that keeps the module it adapts whole, below as ``base_layer``, and shows its attributes."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as a break in a graph that is being compiled."""
    disable: Any = torch.compiler.disable
    return disable(function) if torch.compiler.is_compiling() else function


_OWN = frozenset(vars(nn.Linear(1, 1, device="meta")))
_NEVER = ("_hf_hook", "forward", "_old_forward", "_compiled_call_impl")  # of accelerate, and of the old module's call
_PARTS = ("weight", "bias", "adapter", "base_layer", "adapted")


def carry_over(source: nn.Module, target: nn.Module) -> None:
    """Gives `target`, which takes the place of `source`, its hooks (handles go on working) and what was put on it.

    A host that keeps its layer whole, as ``base_layer``, shows the layer's attributes; hooks alone are carried then.
    """
    whole = any("base_layer" in m._modules for m in (source, target))
    for name, value in list(vars(source).items()):
        if "_hook" in name if name in _OWN else not whole and name not in _NEVER:
            vars(target)[name] = value
    for own in ("_parameters", "_buffers", "_modules") if not whole else ():
        for name, value in vars(source)[own].items():
            if name not in _PARTS:
                vars(target)[own][name] = value
    if not whole:
        target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    for hook in source._load_state_dict_pre_hooks.values():
        known: Any = hook
        if getattr(known, "with_module", False):  # it knows its module by a weak reference
            known.module = weakref.ref(target)
    if "_hf_hook" in vars(source):
        from accelerate.hooks import add_hook_to_module

        own_hook: Any = vars(source)["_hf_hook"]
        here = not any(p.is_meta for p in target._parameters.values() if p is not None)
        if here and getattr(own_hook, "offload", False):  # other weights than those offloaded: they stay in memory
            own_hook = copy.copy(own_hook)
            own_hook.offload, own_hook.weights_map = False, None
        add_hook_to_module(target, own_hook)


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[None]:
    """The layer's weights in memory, where accelerate's hook keeps them elsewhere between forwards (offloading)."""
    hook = vars(layer).get("_hf_hook")
    if hook is None or not any(p.is_meta for p in layer.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)


def patched(layer: nn.Module) -> bool:
    """Whether somebody has put a forward on the layer itself, in place of its class's; accelerate's hooks do not count.
    """
    own = vars(layer)
    forward = own.get("_old_forward" if "_hf_hook" in own else "forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(layer).forward


def exchange(model: nn.Module, replacements: Mapping[int, nn.Module], hooks: bool = True) -> None:
    """Puts replacements[id(child)], with the child's hooks and attributes, in every place where that child stands.
    hooks: False leaves these where they are.

    Raises:
        TypeError: a child is compiled by itself, or has a forward of its own. ValueError: it is the model itself.
    """
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()
              if child is not None and id(child) in replacements]  # fmt: skip
    for _, name, child in places:
        if name == "_orig_mod" or vars(child).get("_compiled_call_impl") is not None:
            raise TypeError("a layer is compiled by itself, and would go on computing what it does; allowed: a layer "
                            "that is not (change the model first, then compile it)")
        if patched(child):
            raise TypeError(f"{name} has a forward of its own, which would be lost; allowed: its class's (take the "
                            "patch off, and put it on again)")
    if id(model) in replacements:
        raise ValueError("model is the layer itself, which cannot be exchanged in place; allowed: a module that holds "
                         "it (SSVDOLinear.from_linear and SSVDOLinear.to_linear return a new layer)")
    done: set[int] = set()
    for parent, name, child in places:
        made = replacements[id(child)]
        if hooks and id(child) not in done:
            carry_over(child, made)
            done.add(id(child))
        parent._modules[name] = made
    _warn_of_references(model, replacements)


def _warn_of_references(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Says where a plain list, tuple or dict of the model goes on holding a layer that was exchanged."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            held = list(value.values()) if isinstance(value, dict) else value
            found = held if isinstance(held, (list, tuple)) else [held]
            if attribute not in _OWN and any(id(one) in replacements for one in found):
                warnings.warn(f"{name or 'the model'}.{attribute} goes on holding a layer that was exchanged, and a "
                              "call through it reaches the old one; set it anew", stacklevel=4)


_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # by compile, checkpoint_wrapper, FSDP1
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "AveragedModel": "module",
             "PeftModel": "base_model", "BaseTuner": "model"}  # fmt: skip


def _in_wrapper(parent: nn.Module, child: str) -> bool:
    return child in _WRAPPED or any(_WRAPPERS.get(c.__name__) == child for c in type(parent).__mro__)


class Place(NamedTuple):
    """A module with its name in the model, in which the names of wrappers do not count, and where it stands."""

    name: str
    module: nn.Module
    parent: nn.Module
    child: str


def check_module(model: object) -> None:
    """TypeError where `model` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__qualname__}; allowed: a torch.nn.Module")


def places(model: nn.Module) -> Iterator[Place]:
    """Every module of the model, each once; the model itself first, as "", and in its own place."""
    check_module(model)
    names, modules = {"": ""}, {"": model}
    for path, module in model.named_modules():
        before, _, child = path.rpartition(".")
        parent, own = modules[before], names[before]
        if path:
            names[path] = own if _in_wrapper(parent, child) else f"{own}.{child}" if own else child
            modules[path] = module
        yield Place(names[path], module, parent, child)


def hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    """(name, layer) of every host of the model, each layer once; the model itself may be one."""
    return ((p.name, p.module) for p in places(model) if isinstance(p.module, Host))


def settle(model: nn.Module) -> None:
    """What follows where a model's layers have become hosts: adapters of one shape and configuration are prepared
    together, and nn.TransformerEncoder, which looks at linear1.weight alone, no longer makes nested tensors for a fast
    path that its layers do not take."""
    layers = [layer for _, layer in hosts(model)]
    members = [_member(layer, adapter) for layer in layers for adapter in layer.adapters()]
    group_alike(members, partial(_units, weakref.ref(model)))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            adapted = any(isinstance(m, Host) for m in module.modules())
            if adapted and module.use_nested_tensor:
                module.use_nested_tensor, vars(module)["_nested_without_ssvdo"] = False, True
            elif not adapted and vars(module).pop("_nested_without_ssvdo", False):
                module.use_nested_tensor = True


def warn_of_untrained(adapters: Sequence[tuple[str, Adapter]], stacklevel: int) -> None:
    """Says which adapters are as they were at the start while others have been trained: nothing calls their layers, or
    no gradient reaches them."""
    still = [name for name, a in adapters if not any(bool(p.any()) for p in (a.inner_rotation, a.inner_scale)
                                                     if p is not None)]  # fmt: skip
    if 0 < len(still) < len(adapters):
        warnings.warn(
            f"{len(still)} of {len(adapters)} adapters have learnt nothing, as no forward calls their layers or no "
            f"gradient reaches them: {', '.join(still[:4])}{', ...' if len(still) > 4 else ''}", stacklevel=stacklevel)


def warn_of_lowered(outer_rank: int, layers: Sequence[tuple[str, int]], stacklevel: int) -> None:
    """Says once which layers, with the rank that they got, have too small a complement for `outer_rank`."""
    if layers:
        shown = ", ".join(f"{name} ({rank})" for name, rank in layers[:4])
        warnings.warn(
            f"outer_rank={outer_rank} is lowered to min(d, c) in {len(layers)} layers with a smaller complement "
            f"(square ones have none): {shown}{', ...' if len(layers) > 4 else ''}", stacklevel=stacklevel)


def _member(layer: Host, adapter: Adapter) -> Member:
    kind = adapter.shape, adapter.config
    return Member(adapter.cache, kind, partial(_source, weakref.ref(layer), weakref.ref(adapter)))


def _units(model: weakref.ref[nn.Module]) -> weakref.WeakKeyDictionary[Cache, int]:
    found = units(whole) if (whole := model()) is not None else ()
    return weakref.WeakKeyDictionary({m.cache: unit for m, unit in found if isinstance(m, Adapter)})


def _source(layer: weakref.ref[Host], adapter: weakref.ref[Adapter], as_before: bool) -> Source | None:
    host, own = layer(), adapter()
    return None if host is None or own is None else own.source(host.base(own), as_before)
