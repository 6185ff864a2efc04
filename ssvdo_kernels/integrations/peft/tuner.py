"""What PEFT's hosts share: adapters by name, and what a state_dict holds of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...adapter import Adapter
from ...config import LayerShape
from ...factorize import Factors, factorize
from ...fingerprint import Bases, CheckpointError, Fingerprint
from ...host import Host
from ...ops.base import Base
from ...origin import alike, coarser, weight_sketch
from .config import SSVDOConfig
from .scaling import Scaled

_BASES = ("basis", "null_basis")


class OwnAdapter(Adapter):
    """An adapter that PEFT's FSDP policy wraps by itself, as it does leaves with a trained `weight`. Its parameters are
    gathered in its forward alone then, which gives W' too."""

    @property
    def weight(self) -> Tensor:
        """One of the trained parameters."""
        return self.inner_scale

    def forward(self, x: Tensor | None, base: Base, bias: Tensor | None = None) -> Tensor:
        """y = x W'^T + b or, without x, W' with gradients to the parameters."""
        return self.dense(base) if x is None else super().forward(x, base, bias)


def new_adapter(weight: Tensor, config: SSVDOConfig, key: str, known: Sequence[Adapter] = ()) -> Adapter:
    """An adapter of W0 (out_features x in_features) as `config` means it for the layer called `key`.

    That of a weight on the meta device has no factors until `TunerLayer.arrive` makes them. known: new ones of the same
    weight, whose factors serve this one too, where its sizes are the same.

    Raises:
        ValueError: the sizes do not fit, or the weight is not finite.
    """
    rows, columns = weight.shape
    own = config.core(key).fitting(rows, columns)
    shape = LayerShape.of(rows, columns, own)
    factors = next((one.factors for one in known if one.shape == shape), None)
    if weight.is_meta:
        factors = None
    elif factors is None:
        factors = factorize(weight, shape, name=f"{key}.weight", cache_dir=config.factor_cache)
    adapter = OwnAdapter(shape, own, factors, weight, buffers=True)
    adapter.name = key
    if not config.init_weights and not adapter.inner_scale.is_meta:  # PEFT fills in what it loads
        _randomise(adapter)
    return adapter


@contextmanager
def not_finite_as_value_error(names: list[str], safe_merge: bool) -> Iterator[None]:
    """PEFT's error, where a safe merge meets parameters that nothing can be prepared from."""
    try:
        yield
    except ArithmeticError as error:
        if not safe_merge:
            raise
        said = f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken ({error})"
        raise ValueError(said) from None


class TunerLayer(Scaled, Host, BaseTunerLayer):  # type: ignore[misc]
    """A layer of PEFT's with SSVD-O adapters by name, below ``ssvdo_adapters``."""

    adapter_layer_names = ("ssvdo_adapters",)
    other_param_names = ()

    ssvdo_adapters: nn.ModuleDict
    ssvdo_original: Tensor | None
    base_layer: nn.Module
    if TYPE_CHECKING:  # what BaseTunerLayer has
        merged: bool
        disable_adapters: bool
        active_adapters: list[str]
        get_base_layer: Callable[[], nn.Module]
        quantization_backend: Any
        set_adapter: Callable[..., None]
        _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ssvdo_adapters = nn.ModuleDict()
        self._with_basis: set[str] = set()
        self._waiting: dict[str, Bases | None] = {}  # adapters without factors, with the bases that a file brought
        self._brought: set[str] = set()  # those of them that a file has brought numbers for
        self.register_buffer("ssvdo_original", None, persistent=False)  # the weight, while adapters are merged
        self._merged_as: Tensor | None = None  # a sketch of the merged weight
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # what `peft.helpers.disable_input_dtype_casting` switches
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self._loaded_while_merged = False
        self.register_load_state_dict_post_hook(_merge_again)  # type: ignore[no-untyped-call]

    def added(self, adapter_name: str, config: SSVDOConfig) -> None:
        """What follows where an adapter has been added."""
        self._waiting.update({name: None for name, adapter in self.named_adapters() if adapter.basis is None})
        (self._with_basis.add if config.include_basis else self._with_basis.discard)(adapter_name)
        self.ssvdo_adapters[adapter_name].train(self.get_base_layer().training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def arrive(self) -> None:
        """Makes the factors of adapters that were added while the base weight was on the meta device.

        Raises:
            RuntimeError: the weight is there no more than before. BaseMismatchError: it is not the one trained on.
        """
        for name, adapter in self.named_adapters() if self._waiting else ():
            if adapter.basis is not None:
                continue
            weight = self.base(adapter).dense()
            if weight.is_meta:
                raise RuntimeError(f"{adapter.name}: weight is on the meta device; load the base model first")
            if adapter.inner_scale.is_meta and name in self._brought:
                raise RuntimeError(f"{adapter.name}: the adapter was loaded while its base was on the meta device, "
                                   "where PEFT put it too; load it again (load_adapter) now that the base is there")
            if adapter.inner_scale.is_meta:
                adapter.to_empty(device=weight.device)
                adapter.reset_parameters()
                for place in adapter.buffers():
                    place.zero_()
                adapter.formula.copy_(adapter.config.digest())
            factors = factorize(weight, adapter.shape, name=f"{adapter.name}.weight")
            if (trained := adapter.trained_on()) is not None:
                trained.check(weight, adapter.name)
                factors = trained.adopt(factors, weight, adapter.shape, self._waiting.get(name), adapter.name)
            adapter.set_factors(factors, weight)
        self._waiting.clear()

    def named_adapters(self) -> Iterator[tuple[str, Adapter]]:
        """(the name in a state_dict below the layer's, adapter) of each."""
        raise NotImplementedError

    def of(self, name: str) -> list[Adapter]:
        """The adapters that the adapter called `name` has here."""
        raise NotImplementedError

    def adapters(self) -> list[Adapter]:
        active = self.active_adapters
        names = sorted(self.ssvdo_adapters, key=lambda name: name not in active)
        return [adapter for name in names for adapter in self.of(name)]

    def in_use(self) -> list[str]:
        """Names of the adapters that a forward computes with: none where they are disabled or merged."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if self._waiting:
            self.arrive()
        return [] if self.merged else [n for n in self.active_adapters if n in self.ssvdo_adapters]

    def adapted(self, names: list[str]) -> Tensor:
        """W' of these adapters, whose changes of W0 add."""
        raise NotImplementedError

    def now(self) -> Tensor:
        """The weight that the base layer computes with, merged or not."""
        raise NotImplementedError

    def put(self, weight: Tensor) -> None:
        """Makes `weight` the base layer's; W0 is kept."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Makes W0 the base layer's, with the bits that it had."""
        raise NotImplementedError

    def check_writable(self) -> None:
        """Raises where nothing can be merged into the base layer."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapted weight into the base layer; W0 is kept beside it.

        Raises:
            ValueError: safe_merge, and the adapted weight is not finite; nothing is changed.
            TypeError: the weight is quantised in a way that PEFT cannot quantise anew.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.ssvdo_adapters]
        if names:
            self.check_writable()
            made = self._merged_with(names, safe_merge)
            self.put(made)
            held = self.ssvdo_original is not None  # a quantised layer is exchanged, and W0's is as it was
            self._merged_as = weight_sketch(made.flatten(0, -2)) if held else None
            self.merged_adapters.extend(names)

    def check_mergeable(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Raises what `merge` would raise, and changes nothing."""
        given = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in given if n in self.ssvdo_adapters and n not in self.merged_adapters]
        if not names:
            return
        self.check_writable()
        if safe_merge:
            self._merged_with(names, safe_merge)
            return
        self.arrive()
        for adapter in (a for name in names for a in self.of(name)):
            adapter.prepared(self.base(adapter))

    @torch.no_grad()
    def _merged_with(self, names: list[str], safe_merge: bool) -> Tensor:
        """W' of what is merged and of these adapters."""
        self.arrive()
        with not_finite_as_value_error(names, safe_merge):
            made = self.adapted([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(made).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        return made

    def merge_again(self) -> None:
        """Merges what is merged from W0 anew, as the adapters have been loaded meanwhile."""
        names, self._merged_as = list(self.merged_adapters), None
        self.unmerge()
        self.merge(adapter_names=names)

    def unmerge(self) -> None:
        """Gives the base layer the bits of W0 back.

        Raises:
            RuntimeError: the merged weight has been written to; nothing is changed.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._merged_as is not None:
            now = self.now().flatten(0, -2)
            if not alike(self._merged_as, now, coarser(now.dtype)):
                raise RuntimeError(f"{self.adapters()[0].name}: the merged weight is no longer what was merged "
                                   "(a base was loaded, or it was trained), and unmerging would lose that; load the "
                                   "base after unmerge_adapter()")  # fmt: skip
        self.put_back()
        self._merged_as = None
        self.merged_adapters.clear()

    def handed_over(self) -> None:
        """Lets go of what is merged: the base layer, with the weight that it has, is somebody else's now."""
        self.merged_adapters.clear()
        self.ssvdo_original, self._merged_as = None, None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, adapter in self.named_adapters():  # in one order in every process
            weight = self.base(adapter).dense()
            if name.split(".")[1] in self._with_basis and adapter.basis is not None and not weight.is_meta:
                bases = Bases.of(weight, adapter.factors, adapter.shape)
                for part, vectors in zip(_BASES, (bases.V, bases.N), strict=True):
                    if vectors is not None:
                        destination[f"{prefix}{name}.{part}"] = vectors.detach().to(weight.dtype).contiguous()

    def factors_for(self, state_dict: Mapping[str, Tensor], prefix: str) -> list[tuple[Adapter, Factors]]:
        """The factors in which what `state_dict` holds of an adapter is meant, where those at hand are others.

        Raises:
            CheckpointError: it was trained with another formula.
            BaseMismatchError: it was trained on another weight, or in another basis that it does not bring.
        """
        found = []
        for name, adapter in self.named_adapters():
            own = f"{prefix}{name}."
            places = {n: state_dict.get(own + n) for n in Fingerprint.places(adapter.shape)}
            if any(t is None for t in places.values()) or adapter.basis is None:
                continue
            trained = Fingerprint.read(cast("dict[str, Tensor]", places), adapter.shape)
            if trained is None:
                continue
            formula = state_dict.get(own + "formula")
            if formula is not None and formula.tolist() != adapter.config.digest().tolist():
                raise CheckpointError(f"{adapter.name}: {name!r} was trained with another formula (rotation, outer, "
                                      "outer_scale, tau, ...) than it is configured with here")  # fmt: skip
            weight, V = self.base(adapter).dense(), state_dict.get(own + "basis")
            trained.check(weight, adapter.name)
            bases = None if V is None else Bases(V, state_dict.get(own + "null_basis"))
            at_hand = adapter.factors
            used = trained.adopt(at_hand, weight, adapter.shape, bases, adapter.name)
            if used is not at_hand:
                found.append((adapter, used))
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = tuple(f"{prefix}ssvdo_adapters.{name}." for name in self.merged_adapters)
        self._loaded_while_merged = bool(own) and any(key.startswith(own) for key in state_dict)
        for name in self._waiting:
            self._brought |= {name} if f"{prefix}{name}.inner_scale" in state_dict else set()
            if (V := state_dict.get(f"{prefix}{name}.basis")) is not None:
                self._waiting[name] = Bases(V, state_dict.get(f"{prefix}{name}.null_basis"))
        for adapter, factors in self.factors_for(state_dict, prefix):
            adapter.set_factors(factors, self.base(adapter).dense())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __repr__(self) -> str:
        return "ssvdo." + super().__repr__()


def _merge_again(layer: nn.Module, _: Any) -> None:
    if isinstance(layer, TunerLayer) and layer._loaded_while_merged:
        layer._loaded_while_merged = False
        layer.merge_again()


@torch.no_grad()
def _randomise(adapter: Adapter) -> None:
    """Draws an adapter that departs from the base model, for tests."""
    assert adapter.singular_values is not None
    if adapter.inner_rotation is not None:
        adapter.inner_rotation.normal_(0, 0.3 / adapter.shape.k**0.5)
    adapter.inner_scale.normal_(0, 0.05 * float(adapter.singular_values[0]))
    if adapter.outer is not None:
        adapter.outer.normal_(0, adapter.shape.outer_deviation(replace(adapter.config, init_angle=0.3)))
