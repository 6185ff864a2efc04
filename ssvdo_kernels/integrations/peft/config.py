"""SSVD-O's configuration for PEFT, and its place among PEFT's types."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from ...config import SSVDOConfig as CoreConfig
from ...config import checked_scale

PART_OPTIONS = ("inner_ratio", "outer_rank", "tau", "rotation", "outer", "outer_scale", "dropout", "neumann_terms",
                "inner_ratio_pattern", "outer_rank_pattern")  # fmt: skip
"""What an adapter that is combined with others has of its own."""
BIASES = ("none", "all", "ssvdo_only")


def check_saved(what: str) -> None:
    """ValueError where the PEFT that is installed would not save and load all of `what`."""
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        raise ValueError(f"{what} needs PEFT 0.21: older ones do not load again what they save of it")


def _register_type() -> None:
    """Adds SSVDO to PeftType, an enum that PEFT means to be closed."""
    if "SSVDO" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "SSVDO")
    member._name_, member._value_ = "SSVDO", "SSVDO"
    type.__setattr__(PeftType, "SSVDO", member)
    PeftType._member_names_.append("SSVDO")
    PeftType._member_map_["SSVDO"] = PeftType._value2member_map_["SSVDO"] = member


_register_type()
_IMPORT = "import ssvdo_kernels.integrations.peft"
_LOADING = f"""## Loading

This is an SSVD-O adapter. PEFT knows its type once `ssvdo_kernels` is installed and imported:

```python
{_IMPORT}
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```

Without the import PEFT raises `KeyError: 'SSVDO'`.
"""


@dataclass
class SSVDOConfig(PeftConfig):  # type: ignore[misc]
    """SSVD-O's hyper-parameters for PEFT; those of `ssvdo_kernels.SSVDOConfig`, and PEFT's ways of choosing layers.

    As in `ssvdo_kernels.SSVDOConfig` are ``inner_ratio``, ``outer_rank`` (0 for a square layer),
    ``tau``, ``rotation``, ``outer``, ``outer_scale``, ``neumann_terms`` and ``backend``; as in LoraConfig
    ``exclude_modules``, ``modules_to_save``, ``layers_to_transform`` and ``layers_pattern``.

    Args:
        init_angle: radians; the default, 0, starts at the base model exactly, as PEFT's methods do.
        dropout: as LoRA's lora_dropout: y = x W0^T + d(x) (W' - W0)^T in training.
        bias: biases that are trained and saved, too: "none", "all" those of the model, "ssvdo_only" those of adapted
            layers. Without the adapter the model is no longer the base then. From PEFT 0.21 on.
        target_modules: list of suffixes, one regular expression or "all-linear"; None: the feed-forward layers.
        target_parameters: names of parameters that are a matrix, or hold one for each expert; None: those of known
            feed-forward layers, where target_modules is None too.
        trainable_token_indices: rows of the embedding that are trained beside the adapters, as in LoraConfig.
        inner_ratio_pattern: other values for single layers, by suffix or regular expression.
        outer_rank_pattern: the same for outer_rank.
        combination: what `add_weighted_adapter` writes: the adapters that this one is the sum of.
        init_weights: False draws random adapters (for tests).
        factor_cache: a folder in which factorisations are kept by weight content; None: none.
        include_basis: also saves V_k (d x max(k, l) a layer, in the weight's dtype), with which an adapter loads onto
            the same base in another dtype; without it such a base may be refused.

    Raises:
        ValueError: a value is out of range; the message names the argument, the value and what is allowed.

    Examples:
        >>> import peft
        >>> import ssvdo_kernels.integrations.peft
        >>> config = peft.SSVDOConfig(target_modules="all-linear", outer_rank=16)
        >>> peft.get_peft_model(plain, config).print_trainable_parameters()
        trainable params: 7,200 || all params: ...
    """

    inner_ratio: float = field(default=0.5, metadata={"help": "share of the singular vectors that G rotates"})
    outer_rank: int = field(default=64, metadata={"help": "how many vectors of the large side turn"})
    tau: float = field(default=1e-2, metadata={"help": "regulariser of the Cholesky factor"})
    rotation: str = field(default="cayley", metadata={"help": "cayley, neumann or first_order"})
    outer: str = field(default="rotation", metadata={"help": "rotation or additive"})
    outer_scale: str | float = field(default="balanced", metadata={"help": "balanced, or a number"})
    init_angle: float = field(default=0.0, metadata={"help": "radians that outer vectors are turned by at first"})
    dropout: float = field(default=0.0, metadata={"help": "of the input of the adapter's change, in training"})
    bias: str = field(default="none", metadata={"help": "none, all or ssvdo_only"})
    neumann_terms: int = field(default=4, metadata={"help": "terms of rotation='neumann'"})
    backend: str = field(default="auto", metadata={"help": "auto, reference or triton"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to adapt"})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "parameters to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave alone"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained whole"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "rows of the embedding to train"})
    inner_ratio_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "by layer"})
    outer_rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "by layer"})
    combination: list[dict[str, Any]] | None = field(default=None, metadata={"help": "of add_weighted_adapter"})
    init_weights: bool = field(default=True, metadata={"help": "start at the base model"})
    factor_cache: str | None = field(default=None, metadata={"help": "folder for factorisations"})
    include_basis: bool = field(default=True, metadata={"help": "save V_k, for a base in another dtype"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SSVDO
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        named = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if named and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform cannot be used when target_modules is a str; "
                             "put the layers into the regular expression")  # fmt: skip
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform")
        given = self.target_parameters
        if given is not None and (isinstance(given, str) or not all(isinstance(name, str) for name in given)):
            raise TypeError(f"`target_parameters` must be a list of strings or None. It is {given!r}")
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r} is unknown; allowed: {', '.join(map(repr, BIASES))}")
        if self.bias != "none":
            check_saved(f"bias={self.bias!r}")
        for name in ("init_weights", "include_basis"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is of the wrong type; allowed: True, False")
        for name in ("inner_ratio_pattern", "outer_rank_pattern"):
            pattern = getattr(self, name) or {}
            if not isinstance(pattern, dict):
                raise ValueError(f"{name}={pattern!r} is of the wrong type; allowed: a dict of patterns and values")
            for key in pattern:
                try:
                    re.compile(key)
                except (re.error, TypeError) as error:
                    raise ValueError(f"{name} has {key!r}, which is no regular expression: {error}") from None
        self.core("")
        for entry in self.combination or ():
            self._part(entry)

    def parts(self, key: str) -> list[tuple[float, SSVDOConfig]]:
        """(weight, configuration) of the adapters that a combination has in the layer called `key`."""
        return [(entry["weight"], self._part(entry)) for entry in self.combination or () if key in entry["layers"]]

    def _part(self, entry: Any) -> SSVDOConfig:
        known = isinstance(entry, dict) and entry.keys() == {"weight", "layers", "config"}
        if not known or not isinstance(entry["config"], dict) or entry["config"].keys() != set(PART_OPTIONS):
            raise ValueError(f"combination has {entry!r}; allowed: what add_weighted_adapter writes")
        checked_scale(entry["weight"], "combination's weight")
        return replace(self, combination=None, **entry["config"])

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's; the folder's model card, if there is one, is told what to import, as PEFT knows no such type."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.exists() and _IMPORT not in (text := card.read_text(encoding="utf-8")):
            card.write_text(f"{text.rstrip()}\n\n{_LOADING}", encoding="utf-8")

    def core(self, key: str) -> CoreConfig:
        """The configuration of the layer called `key`."""
        ratios, ranks = self.inner_ratio_pattern or {}, self.outer_rank_pattern or {}
        return CoreConfig(
            inner_ratio=ratios.get(get_pattern_key(ratios.keys(), key), self.inner_ratio),
            outer_rank=ranks.get(get_pattern_key(ranks.keys(), key), self.outer_rank), tau=self.tau,
            rotation=self.rotation, outer=self.outer, outer_scale=self.outer_scale, init_angle=self.init_angle,
            dropout=self.dropout, neumann_terms=self.neumann_terms, backend=self.backend)  # fmt: skip
