"""PEFT's host for `target_parameters`: a parameter that holds a matrix for each expert of a mixture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...adapter import Adapter
from ...experts import stacks
from ...host import outside_of_graphs
from ...ops.base import Base, DenseBase
from .config import SSVDOConfig
from .tuner import TunerLayer, new_adapter, not_finite_as_value_error


class ParamWrapper(TunerLayer):
    """A module, called with W' in place of W0 in its parameter `parameter_name` (experts x rows x columns).

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
        """The parameter, as it was trained before: experts x rows x columns."""
        original = self.ssvdo_original
        return stacks(self.get_base_layer())[self.parameter_name] if original is None else original

    def base(self, adapter: Adapter | None = None) -> Base:
        return DenseBase(self.stack()[0 if adapter is None else int(adapter.name.rpartition(".")[2])])

    def _of(self, name: str) -> list[Adapter]:
        return [cast(Adapter, a) for a in cast(nn.ModuleList, self.ssvdo_adapters[name])]

    def adapters(self) -> list[Adapter]:
        active = self.active_adapters
        names = sorted(self.ssvdo_adapters, key=lambda name: name not in active)
        return [adapter for name in names for adapter in self._of(name)]

    def named_adapters(self) -> Iterator[tuple[str, Adapter]]:
        return ((f"ssvdo_adapters.{name}.{i}", adapter) for name in self.ssvdo_adapters
                for i, adapter in enumerate(self._of(name)))  # fmt: skip

    def update_layer(self, adapter_name: str, config: SSVDOConfig, key: str) -> None:
        """Adds an adapter to every expert. Raises as `new_adapter` does."""
        made = [new_adapter(matrix, config, f"{key}.{i}") for i, matrix in enumerate(self.stack().detach())]
        self.ssvdo_adapters[adapter_name] = nn.ModuleList(made)
        self.added(adapter_name, config)

    def _changed(self, names: list[str]) -> Tensor:
        """The parameter with the changes of these adapters, with gradients to them."""
        found = []
        for i, matrix in enumerate(self.stack()):
            base = DenseBase(matrix)
            made = [self._of(name)[i].weight(base) for name in names]
            found.append(sum((w - matrix for w in made[1:]), made[0]))
        return torch.stack(found)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with its experts adapted."""
        if kwargs.pop("adapter_names", None) is not None and not self.disable_adapters:
            raise ValueError(f"{self.parameter_name} does not support mixed batch inference (adapter_names)")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self._waiting and not self.disable_adapters:
            self.arrive()
        names = [n for n in self.active_adapters if n in self.ssvdo_adapters]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(*args, **kwargs)
        inner, path = self.base_layer, self.parameter_name
        while isinstance(inner, ParamWrapper):
            inner, path = inner.base_layer, f"base_layer.{path}"
        made = outside_of_graphs(self._changed)(names)
        return torch.func.functional_call(self.base_layer, {path: made}, args, kwargs)

    def check_mergeable(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        self.arrive()
        given = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in given if n in self.ssvdo_adapters and n not in self.merged_adapters]
        with not_finite_as_value_error(names, safe_merge):
            for name in names:
                for adapter in self._of(name):
                    adapter.prepared(self.base(adapter))
            if safe_merge and names:
                self._merged_with(names, safe_merge)

    @torch.no_grad()
    def _merged_with(self, names: list[str], safe_merge: bool) -> Tensor:
        made = self._changed([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(made).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        return made

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapted matrices into the parameter; W0 is kept beside it.

        Raises:
            ValueError: safe_merge, and a matrix is not finite; nothing is changed.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.ssvdo_adapters]
        if names:
            made, own = self._merged_with(names, safe_merge), stacks(self.get_base_layer())[self.parameter_name]
            if self.ssvdo_original is None:
                self.ssvdo_original = own.data
            own.data = made
            self.merged_adapters.extend(names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrappers."""
        if merge:
            self.merge(safe_merge, adapter_names)
        if isinstance(self.base_layer, ParamWrapper):
            return self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.base_layer

    def merge_again(self) -> None:
        names = list(self.merged_adapters)
        self.unmerge()
        self.merge(adapter_names=names)

    def unmerge(self) -> None:
        """Gives the parameter the bits of W0 back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self.ssvdo_original is not None
        stacks(self.get_base_layer())[self.parameter_name].data, self.ssvdo_original = self.ssvdo_original, None
        self.merged_adapters.clear()
