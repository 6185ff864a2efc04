"""PEFT's host for `target_parameters`: a parameter that is a matrix, or holds one for each expert of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...changes import Change, changed_weight
from ...experts import call_with, stacks
from ...host import outside_of_graphs
from ...ops.base import Base, DenseBase
from .config import SSVDOConfig
from .tuner import TunerLayer, new_adapter


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """The module's own parameter, where it can be adapted: rows x columns, or experts x rows x columns."""
    own = module._parameters.get(name)
    matrix = own is not None and own.ndim == 2 and own.is_floating_point()
    return own if matrix else stacks(module).get(name)


def _weight(adapter: Adapter, base: Base) -> Tensor:
    made: Tensor = adapter(None, base)  # a call, in which FSDP gathers its parameters
    return made


class ParamWrapper(TunerLayer):
    """A module, called with W' in place of W0 in its parameter `parameter_name`, as `parameter_of` takes it.

    Two parameters of a module are two wrappers, one inside the other, as PEFT's own methods have it. W' is dense for
    the time of a forward and its backward.
    """

    def __init__(
        self, base_layer: nn.Module, parameter_name: str, adapter_name: str, config: SSVDOConfig, key: str
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.parameter_name = parameter_name
        self.update_layer(adapter_name, config, key)

    def stack(self) -> Tensor:
        """The parameter, as it was trained before: experts x rows x columns; a matrix is that of one expert."""
        original = self._own if self.ssvdo_original is None else self.ssvdo_original
        return original[None] if original.ndim == 2 else original

    @property
    def _own(self) -> Tensor:
        own: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return own

    def base(self, adapter: Adapter | None = None) -> Base:
        if self._own.ndim == 1 or not self._own.untyped_storage().nbytes():  # FSDP1 has it elsewhere
            return DenseBase(self._own)
        return DenseBase(self.stack()[0 if adapter is None else int(adapter.name.rpartition(".")[2])])

    def of(self, name: str) -> list[Adapter]:
        return [cast(Adapter, a) for a in cast(nn.ModuleList, self.ssvdo_adapters[name])]

    def named_adapters(self) -> Iterator[tuple[str, Adapter]]:
        return ((f"ssvdo_adapters.{name}.{i}", adapter) for name in self.ssvdo_adapters
                for i, adapter in enumerate(self.of(name)))  # fmt: skip

    def update_layer(self, adapter_name: str, config: SSVDOConfig, key: str) -> None:
        """Adds an adapter to every expert. Raises as `new_adapter` does."""
        made = [new_adapter(matrix, config, f"{key}.{i}") for i, matrix in enumerate(self.stack().detach())]
        self.ssvdo_adapters[adapter_name] = nn.ModuleList(made)
        self.added(adapter_name, config)

    def adapted(self, names: list[str]) -> Tensor:
        """The parameter with the changes of these adapters, with gradients to them."""
        by_matrix = zip(*map(self.of, names), strict=True)
        made = [changed_weight(list(map(Change, own)), DenseBase(matrix), _weight)
                for matrix, own in zip(self.stack(), by_matrix, strict=True)]  # fmt: skip
        return torch.stack(made).view(self._own.shape)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W0, laid out as the parameter."""
        return self.adapted([adapter]) - self.stack().view(self._own.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with W' in its parameter."""
        if kwargs.pop("adapter_names", None) is not None and not self.disable_adapters:
            raise ValueError(f"{self.parameter_name} does not support mixed batch inference (adapter_names)")
        if not (names := self.in_use()):
            return self.base_layer(*args, **kwargs)
        inner, path = self.base_layer, self.parameter_name
        while isinstance(inner, ParamWrapper):
            inner, path = inner.base_layer, f"base_layer.{path}"
        made = outside_of_graphs(self.adapted)(names)
        return call_with(self.base_layer, {path: made}, args, kwargs)

    def now(self) -> Tensor:
        return self._own.detach()

    def put(self, weight: Tensor) -> None:
        own = self._own
        if self.ssvdo_original is None:
            self.ssvdo_original = own.data
        own.data = weight

    def put_back(self) -> None:
        assert self.ssvdo_original is not None
        self._own.data, self.ssvdo_original = self.ssvdo_original, None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrappers."""
        if merge:
            self.merge(safe_merge, adapter_names)
        if isinstance(self.base_layer, ParamWrapper):
            return self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.base_layer
