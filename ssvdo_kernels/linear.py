"""SSVDOLinear: the drop-in for a pretrained nn.Linear."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter
from .changes import Change, changed
from .config import LayerShape, SSVDOConfig, checked_config
from .factorize import Factors, factorize
from .host import Host, OwnHost, carry_over
from .linear_maps import kind_of, refusal
from .ops import lasting
from .ops.base import DenseBase
from .watchers import offloads


class SSVDOLinear(OwnHost):
    """y = x W'^T + b, W' = U' diag(S + dS) blockdiag(G, I) V^T (transposed for out_features < in_features).

    Made from a pretrained layer with `from_linear`; the weight must be the trained one, as it is factorised at once.
    ``weight`` (out_features x in_features) is W0: frozen, never written to, merged or not. ``adapter`` holds what is
    trained and what W0 is factorised into, as frozen parameters: a state_dict holds all that the layer is, FSDP shards
    them, and DDP sends them once.

    Shape: x (..., in_features), in the weight's dtype or, under autocast, any floating one; y (..., out_features).

    Raises (forward):
        TypeError: x is not floating, or not of the weight's dtype outside autocast.
        ValueError: x has another last dimension or is on another device.
        RuntimeError: ``weight.requires_grad`` was switched on.
        ArithmeticError: Z^T Z + tau I is not positive definite (non-finite or huge parameters). On a GPU, a
            later forward or the backward says so, before there are gradients.

    Examples:
        >>> layer = SSVDOLinear.from_linear(nn.Linear(64, 256), SSVDOConfig(outer_rank=16))
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 256])
        >>> layer.adapter.shape.parameters  # k(k+1)/2 + c l for k = 32, c = 192, l = 16
        3600
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, factors: Factors, shape: LayerShape, config: SSVDOConfig
    ) -> None:
        super().__init__()
        self.weight = _kept(weight)
        self.weight.requires_grad_(False)
        self.register_parameter("bias", None if bias is None else _kept(bias))
        self.adapter = Adapter(shape, config, factors, weight)

    @classmethod
    @lasting
    def from_linear(
        cls,
        linear: nn.Linear,
        config: SSVDOConfig | None = None,
        *,
        name: str = "weight",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> SSVDOLinear:
        """Adapts a pretrained layer; its weight and bias tensors are taken over, not copied.

        Args:
            linear: nn.Linear with its trained weight loaded. The weight is frozen; the bias stays as it is.
            config: sizes and formula; None takes `SSVDOConfig()`.
            name: how errors call the weight. cache_dir: see `factorize`.

        Raises:
            TypeError: linear is no plain nn.Linear (quantised, adapted, a subclass), or its weight is not floating.
            ValueError: the weight is on the meta device, not finite, or config does not fit its shape.
        """
        config = checked_config(config)
        if isinstance(linear, Host):
            raise TypeError(f"linear ({name}) is adapted already; remove_ssvdo restores the original layer")
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear ({name}) is a {kind_of(linear)}; allowed: torch.nn.Linear itself (apply_ssvdo "
                            "adapts other linear layers)")
        if reason := refusal(linear):
            raise TypeError(f"linear ({name}) {reason}")
        shape = LayerShape.of(linear.out_features, linear.in_features, config)
        factors = factorize(linear.weight, shape, name=name, cache_dir=cache_dir)
        layer = cls.of(linear, factors, shape, config, "layer" if name == "weight" else name.removesuffix(".weight"))
        carry_over(linear, layer)
        return layer

    @classmethod
    def of(cls, linear: nn.Linear, factors: Factors, shape: LayerShape, config: SSVDOConfig, name: str) -> SSVDOLinear:
        """The layer that takes the place of `linear`, checked before, without its hooks. name: how errors call it."""
        layer = cls(linear.weight, linear.bias, factors, shape, config).train(linear.training)
        layer.adapter.name = name
        return layer

    @property
    def in_features(self) -> int:
        return self.adapter.shape.in_features

    @property
    def out_features(self) -> int:
        return self.adapter.shape.out_features

    def base(self, adapter: Adapter | None = None) -> DenseBase:
        return DenseBase(self.weight, passing=offloads(self))

    def parts(self) -> dict[str, Adapter]:
        return {"": self.adapter}

    def plain(self, merge: bool = False) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.adapted_weight(), requires_grad=False) if merge else self.weight
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """y = x W'^T + b. input: x, (..., in_features); returns (..., out_features)."""
        adapter: Any = self._modules["adapter"]  # as an attribute it is looked for in four places
        own = self._parameters
        try:
            weight, bias = own["weight"], own["bias"]
        except KeyError:  # FSDP1 puts views in their places
            weight, bias = self.weight, self.bias
        passing = "_hf_hook" in self.__dict__ and offloads(self)
        base = DenseBase(weight, passing=passing)  # type: ignore[arg-type]
        if adapter.drops:
            return changed(input, [Change(adapter)], base, bias)
        y: Tensor = adapter(input, base, bias)
        return y

    def adapted_weight(self) -> Tensor:
        """W' (out_features x in_features) for the current parameters, in the weight's dtype; a new tensor."""
        return self.adapter.adapted_weight(self.base())

    @property
    def merged(self) -> bool:
        """Whether forwards go through the dense W'."""
        return self.adapter.merged

    def merge(self) -> None:
        """Computes with the dense W' from now on: one product a forward, as fast as nn.Linear.

        ``weight`` stays W0, bit for bit, and so does the state_dict; W' follows the parameters. `remove_ssvdo(model,
        merge=True)` gives an nn.Linear whose weight is W'.
        """
        self.adapter.merged = True

    def unmerge(self) -> None:
        """Undoes `merge`, exactly."""
        self.adapter.unmerge()

    def to_linear(self, merge: bool = False) -> nn.Linear:
        """nn.Linear with W0 (the very same Parameter) or, with merge, W'. The weight is left frozen."""
        linear = self.plain(merge)
        carry_over(self, linear)
        return linear

    def refresh(self) -> None:
        """Forgets what was prepared; the next forward prepares anew."""
        self.adapter.refresh()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _kept(tensor: Tensor) -> nn.Parameter:
    """The very Parameter, so that who holds it (an optimiser, a tie) goes on holding it; a copy of one of inference
    mode, which autograd would not save."""
    if isinstance(tensor, nn.Parameter) and not tensor.is_inference():
        return tensor
    return nn.Parameter(tensor.detach().clone() if tensor.is_inference() else tensor.detach(), tensor.requires_grad)
