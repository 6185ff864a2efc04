"""SSVD-O in ESPnet: after `import ssvdo_kernels.integrations.espnet`, a recipe's

    use_adapter: true
    adapter: lora
    adapter_conf: {adapter_type: ssvdo, inner_ratio: 0.5, outer_rank: 64, target_modules: [feed_forward.w_1]}

adapts those layers. ESPnet builds the model, then the adapter and the optimiser, and loads the pretrained weights last;
so a layer is factorised at its first forward, and again where its weight has become another. W0 is never written to:
what ESPnet saves is W0 and the adapter (save_strategy all), or the adapter alone (adapter_only, required_grad_only),
with the fingerprint of the weight that it was trained on. Names contain "lora_", by which ESPnet chooses what to train
and save.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..config import LayerShape, SSVDOConfig
from ..factorize import Factors, compute_dtype, content_key, factorize, without_inverse
from ..files import as_bytes
from ..host import Host, exchange, places, settle, warn_of_lowered
from ..linear import SSVDOLinear
from ..linear_maps import kind_of
from ..ops import lasting
from ..ops.base import DenseBase
from ..origin import stamp
from ..targets import matches, reason_against

FEED_FORWARD = ("feed_forward.w_1", "feed_forward.w_2")
_log = logging.getLogger(__name__)


class DeferredSSVDOLinear(Host):
    """An adapted layer made before its pretrained weight is there; arguments as ESPnet's adapter classes have them.

    Args:
        in_features, out_features, bias: as nn.Linear.
        r, lora_alpha: ignored; outer_rank and inner_ratio say how much is trained.
        lora_dropout: must be 0.
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
        if lora_dropout:
            raise ValueError(f"lora_dropout={lora_dropout} is not supported; allowed: 0")
        asked = SSVDOConfig(**options)
        config, self.asked = asked.fitting(out_features, in_features), asked.outer_rank
        shape = LayerShape.of(out_features, in_features, config)
        self.in_features, self.out_features = in_features, out_features
        plain = nn.Linear(in_features, out_features, bias)
        self.weight = nn.Parameter(plain.weight.detach(), requires_grad=False)
        self.register_parameter("bias", plain.bias)
        self.lora_adapter = Adapter(shape, config, None, self.weight, buffers=True)
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_made_for": None})  # type: ignore[no-untyped-call]  # it lies elsewhere

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
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


def create_ssvdo_adapter(
    model: nn.Module,
    target_modules: Sequence[str] = FEED_FORWARD,
    bias_type: str | None = "none",
    cache_dir: str | None = None,
    **options: Any,
) -> None:
    """Adapts the layers named in `target_modules`, in place, freezes the rest and ends in eval(), as ESPnet does.

    Args:
        model: any module; its pretrained weights may be loaded before or afterwards.
        target_modules: suffixes of linear layers' names. Whisper in ESPnet: query, key, value, attn.out, mlp.0, mlp.2.
        bias_type: "none" trains no bias, "all" every bias of the model, "lora_only" those of adapted layers.
        cache_dir: a folder in which factorisations are kept by weight content.
        options: fields of SSVDOConfig: inner_ratio, outer_rank, tau, rotation, ...

    Raises:
        ValueError: nothing matches, a value is out of range, or a layer is adapted already; nothing is changed.
        TypeError: a named layer is of a kind that no adapter fits.

    Examples:
        >>> create_ssvdo_adapter(plain, ["0", "2"], inner_ratio=0.25, outer_rank=16)
        >>> type(plain[0]).__name__
        'DeferredSSVDOLinear'
    """
    if bias_type not in ("none", "all", "lora_only", None):
        raise ValueError(f"bias_type={bias_type!r} is unknown; allowed: 'none', 'all', 'lora_only'")
    known = {f.name for f in fields(SSVDOConfig)} - {"target_modules", "exclude_modules", "orientation"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown options {unknown}; allowed: {sorted(known)}")
    if not isinstance(target_modules, (list, tuple, set)) or not all(isinstance(t, str) for t in target_modules):
        raise ValueError(f"target_modules={target_modules!r} is of the wrong type; allowed: a list of name suffixes")
    names = tuple(target_modules)
    found = [place for place in places(model) if place.name and matches(place.name, names)]
    if not found:
        raise ValueError(f"Target modules {list(names)} not found in the base model.")
    made: dict[int, nn.Module] = {}
    weights: dict[int, str] = {}
    for name, linear, parent, child in found:
        if isinstance(linear, Host):
            raise ValueError(f"{name} is adapted already; one adapter is enough")
        if type(linear) is not nn.Linear:
            raise TypeError(f"{name} is a {kind_of(linear)}; allowed: torch.nn.Linear")
        if reason := reason_against(linear, parent, child):
            raise TypeError(f"{name} {reason}")
        if (other := weights.setdefault(id(linear.weight), name)) != name:
            raise ValueError(f"{other} and {name} share one weight; allowed: one of them")
        made[id(linear)] = _deferred(name, linear, cache_dir, options)
    exchange(model, made)
    layers = [m for m in model.modules() if isinstance(m, DeferredSSVDOLinear)]
    own = {id(layer.bias) for layer in layers}
    for name, parameter in model.named_parameters():
        biases = name.rsplit(".", 1)[-1] == "bias" if bias_type == "all" else id(parameter) in own
        parameter.requires_grad_("lora_" in name or (bias_type in ("all", "lora_only") and biases))
    settle(model)
    lowered = [(m.lora_adapter.name, m.lora_adapter.shape.l) for m in layers if m.lora_adapter.shape.l < m.asked]
    warn_of_lowered(layers[0].asked, lowered, stacklevel=2)
    model.eval()


def _deferred(name: str, linear: nn.Linear, cache_dir: str | None, options: Mapping[str, Any]) -> DeferredSSVDOLinear:
    try:
        rows, columns = linear.weight.shape
        layer = DeferredSSVDOLinear(columns, rows, linear.bias is not None, cache_dir=cache_dir, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    layer.lora_adapter.name = name
    weight = linear.weight
    layer.to(device=weight.device, dtype=compute_dtype(weight.dtype))
    layer.weight = cast(nn.Parameter, linear.weight)
    layer.bias = cast("nn.Parameter | None", linear.bias)
    return layer


def from_espnet_ssvd(state_dict: Mapping[str, Tensor]) -> dict[str, SSVDOLinear]:
    """Layers of a trained ESPnet SSVD checkpoint, by name.

    W' = U diag(s_pre + s sigmoid(gate)) blockdiag(I - 2K, I) V^T, of W'^T where in_features > out_features. The base
    weight is made from the checkpoint's own factors, as ESPnet saves the merged one under `weight`.

    Args:
        state_dict: with `u`, `v`, `s_pre`, `s`, `gate`, `K_vec`, and `bias` if there is one, below each layer's name.

    Raises:
        ValueError: no such layer, or one that lacks a tensor or was never factorised.

    Examples:
        >>> layers = from_espnet_ssvd(torch.load("espnet.pth"))
        >>> layers["encoder.w_1"](x).shape
        torch.Size([8, 256])
    """
    names = [key.removesuffix("K_vec") for key in state_dict if key == "K_vec" or key.endswith(".K_vec")]
    if not names:
        raise ValueError("state_dict holds no ESPnet SSVD layer (no key ends in 'K_vec')")
    return {name.removesuffix("."): _from_ssvd(name, state_dict) for name in names}


@torch.no_grad()
def _from_ssvd(prefix: str, state_dict: Mapping[str, Tensor]) -> SSVDOLinear:
    missing = [n for n in ("u", "v", "s_pre", "s", "gate", "weight") if prefix + n not in state_dict]
    if missing:
        raise ValueError(f"{prefix}K_vec stands without {missing}")
    u, v, singular, s, gate, saved, packed = (
        state_dict[prefix + n] for n in ("u", "v", "s_pre", "s", "gate", "weight", "K_vec"))
    if not bool(state_dict.get(prefix + "svd_initialized", torch.tensor(True))):
        raise ValueError(f"{prefix}svd_initialized is False: the checkpoint was saved before the layer was factorised")
    (rows, columns), k, d = saved.shape, s.numel(), singular.numel()
    shape = LayerShape(rows, columns, rows < columns, k, 0)
    config = SSVDOConfig(inner_ratio=min(1.0, (k + 0.5) / d), outer_rank=0, rotation="first_order")
    dtype = compute_dtype(saved.dtype)
    q = without_inverse(singular, k, shape.large, saved.dtype)
    tall = (u.double() * singular.double()) @ v.double()
    weight = (tall.mT if shape.transposed else tall).to(saved.dtype).contiguous()
    factors = Factors(v[:k].mT.to(saved.dtype).contiguous(), singular[:k].to(dtype, copy=True), None,
                      u[:, k - q : k].to(saved.dtype).contiguous() if q else None)  # fmt: skip
    bias = state_dict.get(prefix + "bias")
    layer = SSVDOLinear(weight, None if bias is None else nn.Parameter(bias.clone()), factors, shape, config)
    layer.adapter.name = prefix.removesuffix(".") or "layer"
    if layer.adapter.inner_rotation is not None:
        layer.adapter.inner_rotation.copy_(packed)
    layer.adapter.inner_scale.copy_(s * torch.sigmoid(gate))
    return layer


# -- ESPnet's own tables ----------------------------------------------------------------------------------------------
def _module(name: str) -> Any:
    """An ESPnet module, or None where this ESPnet has none or cannot import it."""
    try:
        return importlib.import_module(name) if importlib.util.find_spec(name) else None
    except ImportError as error:
        _log.info("%s cannot be imported (%s)", name, error)
        return None


def register() -> list[str]:
    """Makes `adapter_type: ssvdo` known to the ESPnet that is installed. Returns what was registered; may run again."""
    done = []
    lora = _module("espnet2.layers.lora")
    if lora is not None and hasattr(lora, "LINEAR_BACKENDS"):
        lora.LINEAR_BACKENDS["ssvdo"] = DeferredSSVDOLinear
        done.append("espnet2.layers.lora.LINEAR_BACKENDS")
    create = _module("espnet2.layers.create_adapter")
    if create is not None:
        table = cast(dict[str, Callable[..., None]], create.create_adapter_fn_table)
        table["ssvdo"] = create_ssvdo_adapter
        if not getattr(table["lora"], "knows_ssvdo", False):
            table["lora"] = _choosing(table["lora"])
        done.append("espnet2.layers.create_adapter.create_adapter_fn_table")
    return done


def _choosing(original: Callable[..., None]) -> Callable[..., None]:
    def create(model: nn.Module, adapter_type: str = "lora", **conf: Any) -> None:
        if adapter_type.lower() == "ssvdo":
            return create_ssvdo_adapter(model, **{k: v for k, v in conf.items() if k not in ("rank", "alpha")})
        return original(model=model, **(conf if adapter_type == "lora" else {**conf, "adapter_type": adapter_type}))

    create.knows_ssvdo = True  # type: ignore[attr-defined]
    return create


registered = register()
