"""Configuration of an SSVD-O adapter: what is adapted, how much of it, and by which formula."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

ROTATIONS = ("cayley", "neumann", "first_order")
OUTERS = ("rotation", "additive")
ORIENTATIONS = ("auto", "input", "output")
PATHS = ("auto", "factored", "folded", "core", "merged")
BACKENDS = ("auto", "reference", "triton")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")


def _number(name: str, value: object, allowed: str, ok: bool) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is out of range; allowed: {allowed}")


def _is_real(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that is no float
        return False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SSVDOConfig:
    """Hyper-parameters of SSVD-O (arXiv 2601.12600); see docs/method.md for the equations.

    With d = min(out_features, in_features), c = |out_features - in_features| and k = max(1, int(inner_ratio * d)),
    a layer trains k(k+1)/2 + c * outer_rank numbers.

    Args:
        inner_ratio: p in (0, 1], the share of the d singular vectors on the small side that G rotates.
        outer_rank: l >= 0, how many vectors of the large side turn towards their orthonormal complement.
            0 is SSVD (arXiv 2509.02830); at most min(d, c), so a square layer has 0.
        tau: the regulariser, > 0, in R R^T = Z^T Z + tau I. With ``outer_scale="balanced"`` it is no learning rate.
        rotation: ``"cayley"``: G = (I + K)^-1 (I - K), orthogonal; ``"neumann"``: G = I + 2 sum_{i=1..s} (-K)^i;
            ``"first_order"``: G = I - 2K, what the published SSVD code uses.
        outer: ``"rotation"``: U_l' = U_l C + Q, orthonormal for every L; ``"additive"``: U_l' = U_l + Q.
        outer_scale: L = s * outer. ``"balanced"`` takes s = 2 sqrt(k tau large) / c, so that one learning rate serves
            the inner and the outer part; a float > 0 sets s (1.0 is the literal form).
        init_angle: radians, >= 0, by which each outer vector is turned at the start; 0 starts exactly at W0.
        dropout: p in [0, 1), the share of the numbers of x that the change does not see in training:
            y = x W0^T + d(x) (W' - W0)^T, at another product with W0. Merged layers drop nothing; experts cannot.
        orientation: the side on which G acts. ``"auto"``: the smaller side (input for square layers).
            ``"input"`` / ``"output"`` are accepted where that side is the smaller one, or the layer is square.
        neumann_terms: s >= 1, used by ``rotation="neumann"`` alone.
        target_modules: names of the linear layers to adapt: a list of name suffixes, one regular expression that
            matches whole names, or ``"all-linear"``. None: the feed-forward layers
            known by name (targets.py), experts too.
        exclude_modules: suffixes, or one regular expression, of layers to leave alone.
        path: the form in which a forward is computed; ``"auto"`` lets the planner choose per call.
        backend: what computes the per-token work: ``"reference"`` (plain PyTorch), ``"triton"`` (fused kernels for
            NVIDIA GPUs, paths folded and merged), or ``"auto"`` (see `python -m ssvdo_kernels.info`).

    Raises:
        ValueError: a value is out of range or unknown; the message names the argument, the value and what is allowed.

    Examples:
        >>> config = SSVDOConfig(inner_ratio=0.25, outer_rank=16, target_modules=["fc1", "fc2"])
        >>> config.fitting(512, 512).outer_rank  # a square weight has no complement to turn towards
        0
    """

    inner_ratio: float = 0.5
    outer_rank: int = 64
    tau: float = 1e-2
    rotation: str = "cayley"
    outer: str = "rotation"
    outer_scale: str | float = "balanced"
    init_angle: float = 1e-3
    dropout: float = 0.0
    orientation: str = "auto"
    neumann_terms: int = 4
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    path: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        _number("inner_ratio", self.inner_ratio, "0 < inner_ratio <= 1",
                _is_real(self.inner_ratio) and 0 < self.inner_ratio <= 1)
        _number("outer_rank", self.outer_rank, "an integer >= 0", _is_int(self.outer_rank) and self.outer_rank >= 0)
        _number("tau", self.tau, "a finite number > 0", _is_real(self.tau) and self.tau > 0)
        _number("init_angle", self.init_angle, "a finite number >= 0",
                _is_real(self.init_angle) and self.init_angle >= 0)
        _number("dropout", self.dropout, "0 <= dropout < 1", _is_real(self.dropout) and 0 <= self.dropout < 1)
        _number("neumann_terms", self.neumann_terms, "an integer >= 1",
                _is_int(self.neumann_terms) and self.neumann_terms >= 1)
        if self.outer_scale != "balanced":
            _number("outer_scale", self.outer_scale, "'balanced' or a finite number > 0",
                    _is_real(self.outer_scale) and self.outer_scale > 0)  # type: ignore[operator]
        _choice("rotation", self.rotation, ROTATIONS)
        _choice("outer", self.outer, OUTERS)
        _choice("orientation", self.orientation, ORIENTATIONS)
        _choice("path", self.path, PATHS)
        _choice("backend", self.backend, BACKENDS)
        if self.backend == "triton" and self.path in ("factored", "core"):
            raise ValueError(f"path={self.path!r} has no Triton kernels; "
                             "allowed with backend='triton': 'auto', 'folded', 'merged'")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value):
                object.__setattr__(self, name, tuple(value))
            elif value is not None and not isinstance(value, str):
                raise ValueError(f"{name}={value!r} is of the wrong type; allowed: None, a string or a list of strings")

    def fitting(self, out_features: int, in_features: int) -> SSVDOConfig:
        """This configuration for a weight of that shape: outer_rank is at most min(d, c), 0 for a square one."""
        most = min(out_features, in_features, abs(out_features - in_features))
        return replace(self, outer_rank=most) if self.outer_rank > most else self

    def formula(self) -> dict[str, Any]:
        """What decides the meaning of the trained numbers; the rest is how they are chosen, started or computed."""
        names = ("inner_ratio", "outer_rank", "tau", "rotation", "outer", "outer_scale", "orientation", "neumann_terms")
        return {name: getattr(self, name) for name in names}

    def digest(self) -> Tensor:
        """Four bytes of a hash of `formula`, as numbers that every dtype and an average of equal ones keep."""
        own = json.dumps({k: float(v) if isinstance(v, (int, float)) else v for k, v in self.formula().items()})
        return torch.tensor(list(hashlib.sha256(own.encode()).digest()[:4]), dtype=torch.float32, device="cpu")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SSVDOConfig:
        """The inverse of `to_dict`; an unknown key is a ValueError that names it."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown config keys {unknown}; allowed: {sorted(known)}")
        return cls(**values)


def checked_config(config: SSVDOConfig | None) -> SSVDOConfig:
    """The configuration; None: the default one. Raises TypeError for anything else."""
    if config is not None and not isinstance(config, SSVDOConfig):
        raise TypeError(f"config={config!r} is a {type(config).__qualname__}; allowed: None or an SSVDOConfig "
                        "(SSVDOConfig.from_dict takes a dict)")  # fmt: skip
    return SSVDOConfig() if config is None else config


def checked_scale(scale: float, name: str = "scale") -> float:
    """The scale as a float; ValueError where it is no finite number. name: how errors call it."""
    if not _is_real(scale):
        raise ValueError(f"{name}={scale!r} is out of range; allowed: a finite number")
    return float(scale)


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one adapted layer, in the symbols of docs/method.md.

    out_features x in_features is W0's shape; ``transposed`` says that W0^T is the tall matrix that is factorised;
    d and large are its two sides, c = large - d; k, l the trained inner and outer sizes; width = max(k, l).
    """

    out_features: int
    in_features: int
    transposed: bool
    k: int
    l: int  # noqa: E741

    @property
    def d(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def large(self) -> int:
        return max(self.out_features, self.in_features)

    @property
    def c(self) -> int:
        return self.large - self.d

    @property
    def width(self) -> int:
        return max(self.k, self.l)

    @property
    def rotated(self) -> int:
        """Numbers in the packed strict upper triangle of K."""
        return self.k * (self.k - 1) // 2

    @property
    def kept(self) -> int:
        """Columns of V that are kept: all d where there is an outer part, whose complement needs them, else k."""
        return self.d if self.l else self.width

    @property
    def parameters(self) -> int:
        """Trained numbers: k(k-1)/2 rotation + k scale + c*l outer."""
        return self.k * (self.k + 1) // 2 + self.c * self.l

    def outer_scale(self, config: SSVDOConfig) -> float:
        """s in L = s * outer. P keeps c / large of L's square, so that |Z| is |L| sqrt(c / large) at first."""
        if config.outer_scale == "balanced":
            return 2 * math.sqrt(self.k * config.tau * self.large) / self.c if self.c else 1.0
        return float(config.outer_scale)

    def outer_deviation(self, config: SSVDOConfig) -> float:
        """Standard deviation of `outer` with which Z = P [0; L] turns each vector by about init_angle radians."""
        if not self.l or not config.init_angle:
            return 0.0
        return config.init_angle * math.sqrt(config.tau * self.large) / self.c / self.outer_scale(config)

    @classmethod
    def of(cls, out_features: int, in_features: int, config: SSVDOConfig) -> LayerShape:
        """Sizes for W0 of out_features x in_features, or a ValueError that names what does not fit."""
        if out_features < 1 or in_features < 1:
            raise ValueError(f"weight shape {out_features} x {in_features} is empty; both sides must be >= 1")
        smaller = "input" if in_features < out_features else "output" if out_features < in_features else "either"
        if smaller == "either":
            transposed = config.orientation == "output"
        else:
            transposed = smaller == "output"
            if config.orientation not in ("auto", smaller):
                raise ValueError(
                    f"orientation={config.orientation!r} does not fit a weight of {out_features} x {in_features}: its "
                    f"smaller side is the {smaller}; allowed: 'auto', {smaller!r}")
        d, c = min(out_features, in_features), abs(out_features - in_features)
        if config.outer_rank > min(d, c):
            raise ValueError(
                f"outer_rank={config.outer_rank} is too large for a weight of {out_features} x {in_features}; "
                f"allowed: 0 <= outer_rank <= min(d, c) = {min(d, c)}")
        return cls(out_features, in_features, transposed, max(1, int(config.inner_ratio * d)), config.outer_rank)
