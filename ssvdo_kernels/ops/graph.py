"""A layer in a graph that torch.compile makes: which operation it becomes, and how layers of one shape are joined.

In the graph as Dynamo captures it every layer is an operation of its own. Before a compiler sees the graph, `join`
puts one `stand_ins` before all layers of one shape and configuration, and lets them send their gradients there: so the
way back from M and F to the parameters is one operation for all. A graph that is not joined is right as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..watchers import LAYERS, ddp
from .base import Base
from .compiled import decode, infer, train
from .compiled_batch import Own, pack
from .preparation import Parameters, version


def adapted(
    x: Tensor,
    tokens: Tensor,
    base: Base,
    bias: Tensor | None,
    parameters: Parameters,
    factors: tuple[Tensor | None, ...],
    spec: str,
    merged: bool,
) -> Tensor:
    """y = x W'^T + b through the operations of `compiled`.

    Args:
        x: T x in_features. tokens: W0 in x's dtype; base: W0 as it is stored. factors: in the order of `Factors`.
        spec: from `encode`. merged: whether to go through the dense W'.
    """
    layer = (tokens, base.stored, *parameters, *factors)
    spec = spec if base.layout == "plain" else base.layout + spec
    learns = x.requires_grad or any(p is not None and p.requires_grad for p in (bias, *parameters))
    if torch.is_grad_enabled() and learns:
        if torch.compiler.is_dynamo_compiling():
            from torch._dynamo.comptime import comptime

            comptime(_join_later)
        return train(x, bias, *layer, spec, merged)[0]  # type: ignore[no-any-return]
    return infer(x, bias, *layer, spec, merged)  # type: ignore[no-any-return]


def _join_later(context: Any) -> None:
    """Has the graph that Dynamo is making joined when it is whole."""
    output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
    add, there = getattr(output, "add_graph_finalizer", None), getattr(output, "register_finalizer_fns", ())
    if add is not None and not output.export and join not in there:
        add(join)


class _Region(NamedTuple):
    """The whole graph, or what one call of torch.utils.checkpoint in it runs. inputs: its placeholders, each with what
    of the whole graph comes there."""

    module: GraphModule
    call: Any
    inputs: dict[Node, Any]


class _Layer(NamedTuple):
    """A layer by the inputs of the whole graph that it is made of."""

    own: Own
    spec: str


_Use = tuple[_Layer, Node, _Region]
"""A layer, its node, and the region in which that is."""


def join(module: GraphModule) -> None:
    """Lets the layers of one shape and configuration in a graph of Dynamo's share one `stand_ins`.

    Left alone are layers whose parameters want no gradients, and those whose tensors are not inputs of the graph or are
    written to in it: then they may not be at its start what they are where the layer stands.

    In a forward of DDP, whose optimiser splits the graph where a bucket of gradients is full, a `stand_ins` is for a
    few layers that follow one another, and stands before the first of them.
    """
    near = ddp() is not None
    regions = _regions(module)
    written = _written(regions)
    kinds: dict[Hashable, list[_Use]] = {}
    for region in regions:
        for node in region.module.graph.nodes:
            if node.target == torch.ops.ssvdo_kernels.adapted_train.default:
                *tensors, spec = node.args[3:-1]
                layer = _Layer(Own(*(t and region.inputs.get(t) for t in tensors)), spec)
                if all(t is None or t in region.inputs for t in tensors) and _joinable(layer, written):
                    kinds.setdefault(decode(spec), []).append((layer, node, region))
    for uses in kinds.values():
        uses.sort(key=_place)
        layers = list(dict.fromkeys(layer for layer, _, _ in uses))
        step = LAYERS if near else len(layers)
        for some in (layers[i : i + step] for i in range(0, len(layers), step)):
            chosen = set(some)
            own = [use for use in uses if use[0] in chosen]
            if len(own) > 1:
                _share(module.graph, some, own, near)
    for region in regions:
        region.module.recompile()


def _place(use: _Use) -> Node:
    """Where it is in the whole graph."""
    return use[1] if use[2].call is None else use[2].call


def _share(graph: Graph, layers: Sequence[_Layer], uses: Sequence[_Use], near: bool) -> None:
    """Lets layers of one kind share a `stand_ins`, which stands before the first of their uses, or at the start."""
    pairs = _stand_ins(graph, layers, _place(uses[0]) if near else None)
    for layer, node, region in uses:
        x, bias, *rest = node.args
        node.args = (x, bias, *(_brought(t, region) for t in pairs[layer]), *rest)
        node.target = torch.ops.ssvdo_kernels.adapted_joined.default


def _at_start(graph: Graph) -> AbstractContextManager[Any]:
    """Where nodes come to stand after the inputs."""
    return graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder"))


def _inputs(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _regions(module: GraphModule) -> list[_Region]:
    found = [_Region(module, None, {node: node for node in _inputs(module.graph)})]
    for call in module.graph.nodes:
        if call.op == "call_function" and str(call.target) == "tag_activation_checkpoint":
            function, *given = call.args
            if len(function.users) == 1:  # nothing else runs it
                body: Any = module.get_submodule(function.target)
                found.append(_Region(body, call, dict(zip(_inputs(body.graph), given, strict=True))))
    return found


def _written(regions: Sequence[_Region]) -> set[int]:
    """The storages that something in the graph writes to."""
    found: set[int] = set()
    for node in (node for region in regions for node in region.module.graph.nodes):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        # of foreach, versions tell nothing here
        in_place = node.op != "placeholder" and name.endswith("_") and not name.endswith("__")
        for known in (node, *node.all_input_nodes) if in_place else (node,):
            value = known.meta.get("example_value")
            if isinstance(value, Tensor) and (in_place or version(value)):
                found.add(value.untyped_storage()._cdata)
    return found


def _joinable(layer: _Layer, written: set[int]) -> bool:
    if not all(node is None or (isinstance(node, Node) and node.op == "placeholder") for node in layer.own):
        return False
    own = Own(*(None if node is None else node.meta["example_value"] for node in layer.own))
    learns = any(p is not None and p.requires_grad for p in own.parameters)
    return learns and not any(t is not None and t.untyped_storage()._cdata in written for t in own)


def _stand_ins(graph: Graph, layers: Sequence[_Layer], first: Node | None) -> dict[_Layer, tuple[Node, Node]]:
    """Puts the stand-ins of layers before `first`, or at the start of the graph."""
    with _at_start(graph) if first is None else graph.inserting_before(first):
        tensors, present = pack(layer.own for layer in layers)
        specs = "\n".join(layer.spec for layer in layers)
        made = graph.call_function(torch.ops.ssvdo_kernels.stand_ins.default, (tensors, specs, present))
        found = [graph.call_function(getitem, (made, i)) for i in range(2 * len(layers))]
    return dict(zip(layers, zip(found[::2], found[1::2], strict=True), strict=True))


def _brought(tensor: Node, region: _Region) -> Node:
    """A tensor of the whole graph in a region."""
    if region.call is None:
        return tensor
    for own, given in region.inputs.items():
        if given is tensor:
            return own
    with _at_start(region.module.graph):
        own = region.module.graph.placeholder(tensor.name)
    region.call.args = (*region.call.args, tensor)
    region.inputs[own] = tensor
    return own
