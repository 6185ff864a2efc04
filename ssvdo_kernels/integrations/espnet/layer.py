"""The adapted layer that ESPnet builds before it loads the pretrained weights, with its place among LoRA layers."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...changes import Change, changed
from ...config import LayerShape, SSVDOConfig
from ...factorize import content_key, factorize
from ...files import as_bytes
from ...host import Host
from ...ops import lasting
from ...ops.base import DenseBase
from ...origin import stamp

MARKS = ("base_digest", "base_sketch", "basis_sketch", "formula")  # buffers of `Adapter`: what it was trained on
_log = logging.getLogger(__name__)


def espnet_module(name: str) -> Any:
    """An ESPnet module, or None where this ESPnet has none or cannot import it."""
    try:
        return importlib.import_module(name) if importlib.util.find_spec(name) else None
    except ImportError as error:
        _log.info("%s cannot be imported (%s)", name, error)
        return None


_LoRALayer: type = getattr(espnet_module("espnet2.layers.lora"), "LoRALayer", object)  # newer ESPnet's mark


class DeferredSSVDOLinear(Host, _LoRALayer):  # type: ignore[misc]
    """An adapted layer made before its pretrained weight is there; arguments as ESPnet's adapter classes have them.

    ESPnet saves either all tensors, or those of trained parameters and buffers (required_grad_only), or those of
    parameters alone (adapter_only, newer versions). What ties the adapter to its weight must be in each: it stands in
    the adapter's buffers, and in a state_dict once more under the name of a frozen parameter, ``lora_guard``.

    Args:
        in_features: as nn.Linear's.
        out_features: as nn.Linear's.
        bias: as nn.Linear's.
        r: ignored; outer_rank and inner_ratio say how much is trained.
        lora_alpha: ignored.
        lora_dropout: `SSVDOConfig.dropout`, which acts on the change W' - W0 alone, as LoRA's does.
        cache_dir: see `factorize`.
        options: fields of SSVDOConfig. A square layer gets outer_rank 0.

    Raises:
        ValueError: a size does not fit. (Forward) BaseMismatchError: the adapter was trained on another weight.

    Examples:
        >>> layer = DeferredSSVDOLinear(64, 256, inner_ratio=0.25, outer_rank=16)
        >>> done = layer.load_state_dict(nn.Linear(64, 256).state_dict(), strict=False)
        >>> layer(x).shape
        torch.Size([8, 256])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        asked = SSVDOConfig(**{"dropout": lora_dropout, **options})
        config, self.asked = asked.fitting(out_features, in_features), asked.outer_rank
        shape = LayerShape.of(out_features, in_features, config)
        self.in_features, self.out_features = in_features, out_features
        plain = nn.Linear(in_features, out_features, bias)
        self.weight = nn.Parameter(plain.weight.detach(), requires_grad=False)
        self.register_parameter("bias", plain.bias)
        self.lora_adapter = Adapter(shape, config, None, self.weight, buffers=True)
        self.lora_guard = nn.Parameter(self._marks(), requires_grad=False)
        self.r, self.lora_alpha, self.merged, self.merge_weights = r, lora_alpha, False, False  # of LoRALayer
        self._cache_dir, self._key = cache_dir, ""
        self._made_for: tuple[object, ...] | None = None
        self._cast = False  # whether the weight has been cast since its factors were made
        self._start = self._outer_digest()

    def base(self, adapter: Adapter | None = None) -> DenseBase:
        self._factorise()
        return DenseBase(self.weight)

    def adapters(self) -> list[Adapter]:
        return [self.lora_adapter]

    def adapted_weight(self) -> Tensor:
        """W' (out_features x in_features), in the weight's dtype; a new tensor."""
        return self.lora_adapter.adapted_weight(self.base())

    @lasting
    def forward(self, x: Tensor) -> Tensor:
        """y = x W'^T + b."""
        if not torch.compiler.is_compiling():  # compile after one eager forward
            self._factorise()
        if self.lora_adapter.drops:
            return changed(x, [Change(self.lora_adapter)], DenseBase(self.weight), self.bias)
        y: Tensor = self.lora_adapter(x, DenseBase(self.weight), self.bias)
        return y

    def _factorise(self) -> None:
        now = stamp(self.weight)
        if now != self._made_for:
            self._make_factors(now)

    @lasting
    @torch.no_grad()
    def _make_factors(self, now: tuple[object, ...]) -> None:
        """Makes the factors of the weight if it is another than that of the factors at hand."""
        adapter = self.lora_adapter
        if self._cast and adapter.singular_values is not None and adapter.origin is not None:
            adapter.origin.check(DenseBase(self.weight), adapter.name)  # the same weight, rounded
            self._cast, self._made_for, self._key = False, now, ""
            return
        key = content_key(self.weight, adapter.shape)
        if key == self._key and adapter.singular_values is not None:
            factors = adapter.factors
        else:
            factors = factorize(self.weight, adapter.shape, name=f"{adapter.name}.weight", cache_dir=self._cache_dir)
        if (trained := adapter.trained_on()) is not None:
            trained.check(self.weight, adapter.name, exact=False)
            factors = trained.adopt(factors, self.weight, adapter.shape, None, adapter.name)
        adapter.set_factors(factors, self.weight)
        self._key, self._made_for = key, now
        self.weight.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeferredSSVDOLinear:
        # A cast of what was trained keeps its basis, which nothing saves: the rounded weight may have another.
        before = self.weight.dtype
        cast = fn(self.weight.new_empty(0)).dtype != before and not self.weight.is_meta
        if cast and self.lora_adapter.trained_on() is not None:
            self._factorise()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._cast = self._cast or (cast and self.lora_adapter.trained_on() is not None)
        return self

    def _outer_digest(self) -> tuple[torch.dtype | None, str]:
        """The dtype of `outer` and a hash of its numbers, which training changes."""
        outer = self.lora_adapter.outer
        if outer is None or outer.is_meta:
            return None, ""
        return outer.dtype, hashlib.sha256(as_bytes(outer.detach())).hexdigest()

    def _marks(self) -> Tensor:
        """The adapter's MARKS in one row, float64."""
        return torch.cat([getattr(self.lora_adapter, name).flatten().double() for name in MARKS])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "lora_guard"] = self._marks()

    def _unpacked(self, guard: Tensor, prefix: str) -> dict[str, Tensor]:
        """The inverse of `_marks`, for a state_dict."""
        own = [getattr(self.lora_adapter, name) for name in MARKS]
        parts = torch.split(guard, [t.numel() for t in own])
        return {f"{prefix}lora_adapter.{name}": part.view_as(t)
                for name, part, t in zip(MARKS, parts, own, strict=True)}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_made_for": None})  # type: ignore[no-untyped-call]  # it lies elsewhere

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        guard = state_dict.get(prefix + "lora_guard")
        if guard is not None and guard.shape == self.lora_guard.shape:
            state_dict.update({k: t for k, t in self._unpacked(guard, prefix).items() if k not in state_dict})
        base, known = (prefix + name in state_dict for name in ("weight", "lora_adapter.base_digest"))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._made_for, self._cast = None, False
        inner = (self.lora_adapter.inner_rotation, self.lora_adapter.inner_scale)
        dtype, digest = self._outer_digest()
        moved = dtype == self._start[0] and digest != self._start[1]
        trained = moved or any(bool(p.any()) for p in inner if p is not None)
        if base and not known and not trained:
            self.lora_adapter.base_digest.zero_()  # nothing has been trained on the weight before
            _log.info("%s: the checkpoint holds a weight and no SSVD-O adapter; the adapter stays as it is",
                      self.lora_adapter.name)  # fmt: skip
