"""SSVDOExperts: adapters of the experts of a mixture, which are kept as one parameter of three dimensions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .config import LayerShape, SSVDOConfig
from .factorize import Factors
from .host import WrappingHost, outside_of_graphs
from .ops.base import Base, DenseBase

Given = tuple[Factors, LayerShape, SSVDOConfig, str]  # the name is how errors call the expert


def stacks(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters that hold a matrix for each of its experts, by name."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return {name: p for name, p in own.items() if p.ndim == 3 and p.is_floating_point()}


def matrix_at(module: nn.Module, part: str) -> Base | None:
    """The base operator of one expert, "name.index"; None: there is none."""
    name, _, index = part.partition(".")
    stack = stacks(module).get(name) if re.fullmatch(r"\d+", index) else None
    return None if stack is None or int(index) >= len(stack) else DenseBase(stack[int(index)])


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """`torch.func.functional_call`; FSDP1 hides a parameter behind an attribute of its name, which is replaced then."""
    rest, hidden = dict(tensors), []
    for path in tensors:
        parent, _, name = path.rpartition(".")
        own = vars(module.get_submodule(parent))
        if name in own:
            hidden.append((own, name, own[name]))
            own[name] = rest.pop(path)
    try:
        return torch.func.functional_call(module, rest, args, kwargs)
    finally:
        for own, name, tensor in hidden:
            own[name] = tensor


class SSVDOExperts(WrappingHost):
    """The module of the experts, below as ``base_layer``, called with W' of each expert in place of W0.

    An expert's matrix is adapted as it lies; for one that multiplies from the other side (in_features first) the
    singular vectors of its smaller side are the same ones. W' is dense for the time of a forward and its backward, as
    with LoRA on parameters, since the module's own kernels multiply by it.

    Args:
        base_layer: a module with parameters of three dimensions, experts first. given: by "name.index" of the experts
            that are adapted.
    """

    def __init__(self, base_layer: nn.Module, given: Mapping[str, Given]) -> None:
        super().__init__(base_layer)
        self.adapted = nn.ModuleDict()
        for part, (factors, shape, config, name) in given.items():
            base = matrix_at(base_layer, part)
            assert base is not None
            adapter = Adapter(shape, config, factors, base.dense())
            adapter.name = name
            stack, _, index = part.partition(".")
            stacks(base_layer)[stack].requires_grad_(False)
            if stack not in self.adapted:
                self.adapted[stack] = nn.ModuleDict()
            self.adapted[stack][index] = adapter  # type: ignore[operator]

    @classmethod
    def of(cls, base_layer: nn.Module, given: Mapping[str, Given]) -> SSVDOExperts:
        """The module that takes the place of `base_layer`."""
        made = cls(base_layer, given).train(base_layer.training)
        return made

    def parts(self) -> dict[str, Adapter]:
        return {f"{stack}.{index}": adapter for stack, own in self.adapted.items()
                for index, adapter in own.items()}  # type: ignore[operator]  # fmt: skip

    def base(self, adapter: Adapter | None = None) -> Base:
        own = next(iter(self.parts().values())) if adapter is None else adapter
        found = matrix_at(self.base_layer, ".".join(own.name.split(".")[-2:]))
        assert found is not None
        return found

    def weights(self) -> dict[str, Tensor]:
        """The stacks with W' in place of W0, with gradients to the adapters."""
        found = {}
        for name, own in self.adapted.items():
            stack = list(stacks(self.base_layer)[name].unbind())
            for index, adapter in own.items():  # type: ignore[operator]
                stack[int(index)] = adapter.dense(DenseBase(stack[int(index)]))
            found[name] = torch.stack(stack)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with its experts adapted."""
        return call_with(self.base_layer, outside_of_graphs(self.weights)(), args, kwargs)

    @torch.no_grad()
    def plain(self, merge: bool = False) -> nn.Module:
        """The module itself or, with merge, with W' in its parameters (a copy; W0's tensors are left alone)."""
        if merge:
            for name, stack in self.weights().items():
                self.base_layer._parameters[name] = nn.Parameter(stack, requires_grad=False)
        return self.base_layer.train(self.training)
