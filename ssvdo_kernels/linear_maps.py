"""Which layers compute x W0^T + b, under whatever name, and how each keeps W0.

    kind                                                        W0 is                               layout
    nn.Linear, subclasses with its forward, FalconLinear        weight                              plain
    Conv1D of Transformers                                      weight^T                            transposed
    nn.Conv1d, Conv2d, Conv3d without groups                    weight.flatten(1), on patches of x  flattened
    bitsandbytes, torchao, HQQ                                  quantised: quantized.py             quantised

A layer of another kind is refused with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import quantized
from .host import patched
from .ops.base import Base, DenseBase
from .watchers import not_there, offloads

_SAME = ("FalconLinear",)  # subclasses of nn.Linear that compute the same by a forward of their own
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WHY_NOT = {
    "Embedding": "rows of its weight are looked up, not multiplied",
    "EmbeddingBag": "rows of its weight are looked up, not multiplied",
    "MultiheadAttention": "its forward never calls a layer: torch's kernel takes the weights",
    "Bilinear": "it is not linear in its input",
}


def kind_of(layer: object) -> str:
    """The full name of its type."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def laid_out(matrix: Tensor, layout: str, shape: Sequence[int]) -> Tensor:
    """A matrix, out_features x in_features, as a weight of this layout and shape."""
    if layout == "transposed":
        return matrix.mT.contiguous()
    return matrix.reshape(shape) if layout == "flattened" else matrix


class LinearMap:
    """A layer that computes x W0^T + b.

    layout: how its weight holds W0, here and in model files: "plain", "transposed", "flattened" or "quantised".
    """

    layout = "plain"

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @property
    def sizes(self) -> tuple[int, int]:
        """(out_features, in_features), of the weight itself. Raises ValueError where it is a shard."""
        stored = getattr(self.layer, "weight", None)
        if isinstance(stored, Tensor) and stored.ndim < 2:
            raise ValueError(not_there("weight", stored))
        rows, columns = self.base().dense().shape
        return rows, columns

    def base(self, weight: Tensor | None = None) -> Base:
        """The base operator, as the layer is now, or with another weight laid out as its own."""
        own: Any = self.layer.weight if weight is None else weight
        return DenseBase(own, self.layout, offloads(self.layer))

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return bias

    def enter(self, x: Tensor) -> Tensor:
        """x as rows of in_features numbers."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """What the layer returns, from rows of out_features numbers."""
        return y

    def with_weight(self, weight: Tensor) -> nn.Module:
        """A copy of the layer, its other tensors shared, that has `weight` (out_features x in_features) for W0."""
        made = copy.copy(self.layer)
        made._parameters = dict(made._parameters)
        made.weight = nn.Parameter(self.as_kept(weight), requires_grad=False)
        return made

    def as_kept(self, weight: Tensor) -> Tensor:
        """`weight` as the layer lays its own out."""
        own: Any = self.layer
        return laid_out(weight, self.layout, own.weight.shape if self.layout == "flattened" else ())


class _Transposed(LinearMap):
    layout = "transposed"


class _Convolution(LinearMap):
    """A convolution as one product: its rows are the patches that its kernel meets, in_channels x kernel numbers each.

    With a kernel of more than one place they are made for the call (im2col), as many times x as the kernel has places.
    """

    layout = "flattened"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        conv: Any = layer
        self._conv, self._spatial = conv, len(conv.kernel_size)

    def enter(self, x: Tensor) -> Tensor:
        conv, dims = self._conv, self._spatial
        if x.ndim not in (dims + 1, dims + 2) or x.shape[-1 - dims] != conv.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (N, {conv.in_channels}) and {dims} dimensions of "
                             "places, or the same without N")
        if any(conv._reversed_padding_repeated_twice):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode)
        for size, step, spread in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True):
            x = x.unfold(x.ndim - dims, spread * (size - 1) + 1, step)[..., ::spread]  # this dimension's kernel last
        # ..., channels, places, kernel -> ..., places, channels, kernel
        places = x.movedim(-1 - 2 * dims, -1 - dims)
        return places.flatten(-1 - dims)

    def leave(self, y: Tensor) -> Tensor:
        return y.movedim(-1, -1 - self._spatial).contiguous()


class _Quantized(LinearMap):
    layout = "quantised"

    def __init__(self, layer: nn.Module, form: quantized.Format) -> None:
        super().__init__(layer)
        self._form = form

    @property
    def sizes(self) -> tuple[int, int]:
        return self._form.sizes(self.layer)

    def base(self, weight: Tensor | None = None) -> Base:
        return self._form.base(self.layer)

    def with_weight(self, weight: Tensor) -> nn.Module:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        if (bias := self.bias) is not None:
            weight = weight.to(bias.dtype)
            made.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), requires_grad=False)
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made


def refusal(layer: nn.Module) -> str:
    """Why the layer cannot be adapted, as the end of a sentence that names it; "" where it can."""
    if patched(layer):
        return ("has a forward of its own, which an adapted layer would not call; allowed: its class's (take the patch "
                "off, adapt the layer, and put it on again)")
    if why := _why_not(layer):
        return f"is a {kind_of(layer)}: {why}; allowed: linear layers (docs/compatibility.md lists them)"
    weight = layer._parameters.get("weight")
    plain = quantized.format_of(layer) is None
    if plain and isinstance(layer, nn.Linear) and weight is not None and type(weight.data) is not Tensor:
        return (f"is a {kind_of(layer)}: its weight is a {kind_of(weight.data)} (adapt a model before fully_shard); "
                "allowed: linear layers with a plain weight")
    for name in ("weight", "bias") if plain else ():
        if name not in layer._parameters or (name == "weight" and layer._parameters[name] is None):
            hooks = sorted({type(h).__name__ for h in layer._forward_pre_hooks.values()}) or "none"
            return (f"has no parameter `{name}`: hooks ({hooks}) may compute it in every forward (weight_norm, "
                    "spectral_norm, prune); allowed: a plain parameter (remove them first)")
    if type(layer) is not nn.Linear and offloads(layer):
        return f"is an offloaded {kind_of(layer)}; allowed: offloaded layers of nn.Linear itself"
    if vars(layer).get("_compiled_call_impl") is not None:
        return "is compiled by itself; allowed: a layer that is not (adapt, then compile)"
    if own := sorted(name for name in ("adapter", "adapters", "adapted", "base_layer") if hasattr(layer, name)):
        return f"has attributes {own} of its own, which an adapted layer needs; allowed: none of these names"
    return ""


def _why_not(layer: nn.Module) -> str:
    """Why a layer of this type is none that can be adapted; "" where it is one."""
    if (form := quantized.format_of(layer)) is not None:
        return form.unready(layer)
    if isinstance(layer, nn.Linear):
        if type(layer).forward is not nn.Linear.forward and type(layer).__name__ not in _SAME:
            return "a subclass of nn.Linear with a forward of its own"
        return ""
    if type(layer) in _CONVOLUTIONS:
        groups: Any = layer.groups
        return "" if groups == 1 else f"a convolution of groups={groups} mixes each group's channels alone"
    if type(layer).__name__ == "Conv1D" and isinstance(getattr(layer, "weight", None), Tensor):
        return ""
    known = next((why for c in type(layer).__mro__ if (why := _WHY_NOT.get(c.__name__))), None)
    return known or "no layer that is known to compute x W^T + b"


def linear_map(layer: nn.Module) -> LinearMap | None:
    """How a layer of this type computes x W0^T + b; None where it does not (`refusal` says why, and of more)."""
    if _why_not(layer):
        return None
    form = quantized.format_of(layer)
    if form is not None:
        return _Quantized(layer, form)
    if isinstance(layer, nn.Linear):
        return LinearMap(layer)
    return _Transposed(layer) if type(layer).__name__ == "Conv1D" else _Convolution(layer)


def is_linear(layer: nn.Module) -> bool:
    """Whether "all-linear" means the layer, as PEFT does: nn.Linear and its kin, Conv1D, quantised ones."""
    return type(layer) not in _CONVOLUTIONS and not refusal(layer)


