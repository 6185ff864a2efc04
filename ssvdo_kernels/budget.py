"""What an adapter would cost, from layer sizes alone: parameters, memory, time; and sizes for a given budget."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .config import LayerShape, SSVDOConfig
from .linear_maps import linear_map
from .model_files import sizes, weight_files
from .planner import plan
from .targets import check_patterns, find_targets, nothing_found, wanted

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SVD_RATE = 3.0e9  # large x d^2 a second: 48 layers of 1024 x 4096 in 70 s on 2 CPU cores (AMD EPYC)


@dataclass(frozen=True)
class Matrix:
    """A weight of a model file: out_features x in_features, bytes a number."""

    out_features: int
    in_features: int
    size: int


def matrices(path: Path) -> dict[str, Matrix]:
    """Layer name -> size, of every two-dimensional `*.weight` of a model's files (`weight_files`; of safetensors the
    headers alone are read), or of what a config.json describes.

    Files do not tell linear layers from embeddings; names with "embed", "lm_head" or "proj_out" are left out.

    Raises:
        FileNotFoundError: there is none. ValueError: a file is damaged, or its matrices are quantised.
    """
    if path.name == "config.json":
        return _from_config(path)
    found: dict[str, Matrix] = {}
    quantised: dict[str, str] = {}
    for file in weight_files(path)[0]:
        for name, (dtype, shape) in sizes(file).items():
            layer = name.removesuffix(".weight")
            if layer == name or len(shape) != 2 or re.search("embed|lm_head|proj_out", name):
                continue
            if size := _SIZES.get(dtype):
                found[layer] = Matrix(shape[0], shape[1], size)
            else:
                quantised[layer] = dtype
    if len(quantised) > len(found):
        raise ValueError(f"{path} holds {', '.join(sorted(set(quantised.values())))} weights, such as "
                         f"{next(iter(quantised))}.weight: it is quantised, and files do not tell its layers' sizes; "
                         "name the model before quantisation, or its config.json")
    return found


def _from_config(path: Path) -> dict[str, Matrix]:
    """The linear layers of a model of Transformers, built on the meta device."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ValueError(f"{path}: a config.json needs the package transformers; a safetensors file does not") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; name a safetensors file, a folder of them, or a config.json")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
            model = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # a configuration class, or a layer, may raise anything over a value
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path} describes no model that Transformers itself can build ({said})") from None
    maps = {name: linear_map(m) for name, m in model.named_modules()}
    return {name: Matrix(*m.sizes, m.base().dtype.itemsize) for name, m in maps.items() if m is not None}


def chosen(layers: Mapping[str, Matrix], config: SSVDOConfig) -> dict[str, tuple[Matrix, LayerShape]]:
    """The layers that `config` names, with their shapes; square ones get outer_rank 0.

    Raises:
        ValueError: nothing matches, or a size does not fit.
    """
    check_patterns(config)
    found = {}
    for name, m in layers.items():
        if not wanted(name, config):
            continue
        own = config.fitting(m.out_features, m.in_features)
        try:
            found[name] = (m, LayerShape.of(m.out_features, m.in_features, own))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not found:
        raise ValueError(nothing_found(config, list(layers)))
    return found


def factor_numbers(shape: LayerShape) -> int:
    """How many numbers a layer's frozen factors hold: V, S and U_l."""
    return (shape.d + 1) * shape.kept + shape.large * shape.l


def prepared_numbers(shape: LayerShape) -> int:
    """How many float32 numbers one preparation of a layer holds: F, (I + K)^-1, R^-T and the folded pair."""
    k, l, w = shape.k, shape.l, shape.width  # noqa: E741
    return shape.large * l + k * k + l * l + shape.d * (2 * w + l)


def factor_seconds(shape: LayerShape) -> float:
    """About how long factorising takes on 2 CPU cores."""
    return shape.large * shape.d**2 / SVD_RATE


def lora_budget(layers: Mapping[str, tuple[Matrix, LayerShape]], rank: int) -> int:
    """Trained numbers of LoRA of this rank on the same layers. ValueError: no matrix has so many dimensions."""
    most = max(s.d for _, s in layers.values())
    if not 1 <= rank <= most:
        raise ValueError(f"lora_rank={rank} is out of range; allowed: 1 <= lora_rank <= {most}")
    return sum(rank * (m.out_features + m.in_features) for m, _ in layers.values())


def equal_budgets(layers: Mapping[str, tuple[Matrix, LayerShape]], budget: int) -> list[tuple[float, int, int]]:
    """(p, l, trained numbers) for p = 0.125 to 1, l the nearest to `budget`; none where l = 0 is too much."""
    found = []
    for p in (0.125, 0.25, 0.5, 0.75, 1.0):
        inner = sum(k * (k + 1) // 2 for k in (max(1, int(p * s.d)) for _, s in layers.values()))
        complement = sum(s.c for _, s in layers.values())
        limit = min((min(s.d, s.c) for _, s in layers.values() if s.c), default=0)
        if inner > budget * 1.05 or not complement:
            continue
        l = min(limit, round((budget - inner) / complement)) if budget > inner else 0  # noqa: E741
        found.append((p, l, inner + l * complement))
    return found


def forms(shape: LayerShape, tokens: list[int]) -> list[str]:
    """The form that the CPU planner takes for training with so many tokens a forward, in the long run."""
    return [plan(shape, shape.l, t, 100 * t, True, frozenset()) for t in tokens]


def layer_matrices(model: nn.Module, config: SSVDOConfig) -> dict[str, Matrix]:
    """Layer name -> size, of the layers of `model` that `config` names. Raises as `apply_ssvdo` does for the names."""
    return {name: Matrix(*site.sizes, site.base().dtype.itemsize)  # type: ignore[union-attr]
            for name, site in find_targets(model, config).items()}  # fmt: skip


def trained_numbers(model: nn.Module, config: SSVDOConfig) -> int:
    """Sum over the layers that `config` names of k(k+1)/2 + c l. Nothing is factorised or changed."""
    shapes = [shape for _, shape in chosen(layer_matrices(model, config), config).values()]
    return sum(s.k * (s.k + 1) // 2 + s.c * s.l for s in shapes)


def lora_rank(layers: Mapping[str, Matrix], parameters: int) -> int:
    """The rank (at least 1) with which LoRA on these layers trains a number nearest to `parameters`."""
    return max(1, round(parameters / sum(m.out_features + m.in_features for m in layers.values())))


def fitted_ratio(model: nn.Module, config: SSVDOConfig, parameters: int) -> float:
    """The inner_ratio with which `config`'s other values train a number nearest to `parameters`; 1.0 is the most."""
    d = max(min(m.out_features, m.in_features) for m in layer_matrices(model, config).values())
    ratios = [(k + 0.5) / d if k < d else 1.0 for k in range(1, d + 1)]  # the half: int(p d) is k whatever the rounding
    low, high = 0, d - 1
    while low < high:  # the count grows with p
        middle = (low + high) // 2
        if trained_numbers(model, replace(config, inner_ratio=ratios[middle])) < parameters:
            low = middle + 1
        else:
            high = middle
    nearest = ratios[max(low - 1, 0) : low + 1]
    return min(nearest, key=lambda p: abs(trained_numbers(model, replace(config, inner_ratio=p)) - parameters))


@dataclass(frozen=True)
class Suggestion:
    """A configuration and how many numbers it trains."""

    config: SSVDOConfig
    trained: int


def suggest_budget(model: nn.Module, parameters: int, config: SSVDOConfig | None = None) -> list[Suggestion]:
    """Configurations of `model` that train about `parameters` numbers, for p = 0.25, 0.5, 0.75, 1 and for l = 0.

    Beside each p, l is the nearest that fits in min(d, c) of every layer; the last one, l = 0, has the p that fits.
    A p that alone exceeds the budget by 5% is left out. Nothing is factorised or changed.

    Args:
        config: its other values (target_modules, tau, ...) are taken over. None takes `SSVDOConfig()`.

    Raises:
        ValueError: parameters < 1, or no layer matches.

    Examples:
        >>> for s in suggest_budget(plain, 4_000, SSVDOConfig(target_modules="all-linear")):
        ...     print(s.config.inner_ratio, s.config.outer_rank, s.trained)
        0.25 10 4112
        0.5 8 4128
        0.75 4 3888
        0.9921875 0 4032
    """
    if not isinstance(parameters, int) or isinstance(parameters, bool) or parameters < 1:
        raise ValueError(f"parameters={parameters!r} is out of range; allowed: an integer >= 1")
    own = SSVDOConfig() if config is None else config
    bare = replace(own, outer_rank=0)
    shapes = [s for _, s in chosen(layer_matrices(model, bare), bare).values()]
    complement = sum(s.c for s in shapes)
    limit = min((min(s.d, s.c) for s in shapes if s.c), default=0)
    found = []
    for p in (0.25, 0.5, 0.75, 1.0):
        inner = trained_numbers(model, replace(bare, inner_ratio=p))
        l = min(limit, round((parameters - inner) / complement)) if complement else 0  # noqa: E741
        if inner <= 1.05 * parameters and l > 0:
            chosen_one = replace(own, inner_ratio=p, outer_rank=l)
            found.append(Suggestion(chosen_one, inner + l * complement))
    alone = replace(bare, inner_ratio=fitted_ratio(model, bare, parameters))
    return [*found, Suggestion(alone, trained_numbers(model, alone))]
