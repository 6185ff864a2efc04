"""Where a model keeps weights that can be adapted, and the adapted layers that take their places.

A site is a linear layer (linear_maps.py), or one matrix of a parameter that holds several: an expert of a mixture.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .config import LayerShape, SSVDOConfig
from .experts import SSVDOExperts, matrix_at
from .factorize import Factors, factorize
from .host import OwnHost, onloaded
from .layer import SSVDOLayer
from .linear import SSVDOLinear
from .linear_maps import linear_map
from .ops.base import Base
from .quantized import format_of


@dataclass(frozen=True)
class Site:
    """A weight: the module that holds it, and "" or, for an expert, the parameter and the index ("up_proj.3")."""

    name: str
    module: nn.Module
    part: str = ""

    def base(self) -> Base | None:
        """Its base operator; None: there is none."""
        if self.part:
            return matrix_at(self.module, self.part)
        found = linear_map(self.module)
        return None if found is None else found.base()

    @property
    def sizes(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        found = None if self.part else linear_map(self.module)
        if found is not None:
            return found.sizes
        base = self.base()
        assert base is not None
        rows, columns = base.dense().shape
        return rows, columns


def site_at(name: str, modules: Mapping[str, nn.Module]) -> Site | None:
    """The site that has this name in a file; None: the model has no module for it."""
    if name in modules:
        return Site(name, modules[name])
    path, part = ".".join(name.split(".")[:-2]), ".".join(name.split(".")[-2:])
    module = modules.get(path)
    module = module.base_layer if isinstance(module, SSVDOExperts) else module
    return None if module is None or matrix_at(module, part) is None else Site(name, modules[path], part)


@dataclass(frozen=True)
class Plan:
    """A site to adapt, and how."""

    site: Site
    shape: LayerShape
    config: SSVDOConfig

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def base(self) -> Base:
        """The site's base operator."""
        found = self.site.base()
        assert found is not None
        return found

    def factorize(self, cache_dir: str | os.PathLike[str] | None) -> Factors:
        """Its weight's factors."""
        with onloaded(self.site.module):
            return factorize(self.base.dense(), self.shape, name=f"{self.name}.weight", cache_dir=cache_dir)


def adapted(plans: Iterable[tuple[Plan, Factors]]) -> dict[int, OwnHost]:
    """id(module) -> the adapted layer that takes its place, for every module of the plans."""
    by_module: dict[int, list[tuple[Plan, Factors]]] = {}
    for plan, factors in plans:
        by_module.setdefault(id(plan.site.module), []).append((plan, factors))
    made = {}
    for key, found in by_module.items():
        module = found[0][0].site.module
        with onloaded(module):
            host = _adapted(found)
        for name, parameter in module._parameters.items():  # an offloaded one, which the hook brings for a forward
            if parameter is not None and parameter.is_meta and name in host._parameters:
                host._parameters[name] = parameter
        made[key] = host
    return made


def _adapted(plans: list[tuple[Plan, Factors]]) -> OwnHost:
    (plan, factors), module = plans[0], plans[0][0].site.module
    if plan.site.part:
        return SSVDOExperts.of(module, {p.site.part: (f, p.shape, p.config, p.name) for p, f in plans})
    made = SSVDOLinear if type(module) is nn.Linear and format_of(module) is None else SSVDOLayer
    return made.of(module, factors, plan.shape, plan.config, plan.name)  # type: ignore[arg-type]
