"""Adapters as files: a folder with `ssvdo_model.safetensors` and, for people to read, `ssvdo_config.json`.

The safetensors file alone is what is loaded; its metadata holds the configuration, so that tensors and configuration
can never belong to different saves. Nothing is unpickled. fingerprint.py ties an adapter to its base weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapter import PARAMETER_NAMES, Adapter
from .config import LayerShape, SSVDOConfig
from .distributed import first_writes, group_of_replicas
from .factorize import Factors, check_weight, factorize
from .files import as_file, check_name, opened, write_atomically
from .fingerprint import BASIS_TOLERANCE, DTYPES, Bases, CheckpointError, Fingerprint, departure
from .host import Host, OwnHost, exchange, onloaded, places, warn_of_untrained
from .linear_maps import linear_map
from .model import freeze_rest, group_layers, require_adapted
from .ops import lasting
from .ops.base import Base, DenseBase
from .origin import SKETCH
from .sites import Plan, Site, adapted, site_at
from .targets import check_ties, reason_against
from .watchers import not_there

FORMAT, VERSION = "ssvdo", 1
MODEL_FILE, CONFIG_FILE = "ssvdo_model.safetensors", "ssvdo_config.json"


def save_ssvdo(model: nn.Module, path: str | os.PathLike[str], *, include_basis: bool = True) -> Path:
    """Writes the adapters of `model` into the folder `path` and returns it. The files are replaced atomically.

    Where FSDP2 has sharded the model, or DistributedDataParallel wraps it, every rank calls this: the first writes, the
    others wait for it. Of a wrapped model the first may also call it alone; of a bare one, whoever calls writes.

    Args:
        include_basis: also writes V_k (d x max(k, l), in the weight's dtype), so that the adapter loads where a
            factorisation comes out otherwise, on a base in another dtype above all. Without it the file is smaller.

    Raises:
        ValueError: the model has no adapted layer, or FSDP1 or DeepSpeed has sharded a weight.
        RuntimeError: a weight is no longer the one that was factorised.
        OSError: the folder cannot be written; an old file stays whole.

    Examples:
        >>> folder = save_ssvdo(model, "adapter")
        >>> sorted(file.name for file in folder.iterdir())
        ['ssvdo_config.json', 'ssvdo_model.safetensors']
    """
    found = {name: layer for name, layer in require_adapted(model).items() if isinstance(layer, OwnHost)}
    if not found:
        raise ValueError("model has no adapted layer of its own; another package's layers are saved by that package")
    named = [(f"{n}.{part}" if part else n, host, adapter) for n, host in found.items()
             for part, adapter in host.parts().items()]  # fmt: skip
    folder, contents = Path(path), partial(_contents, named, Path(path), include_basis)
    sharded = any(_is_sharded(adapter) for *_, adapter in named)
    if sharded:
        gathered = contents()
        first_writes(partial(write_atomically, gathered), folder)
    elif (group := group_of_replicas(model)) is not None:
        first_writes(lambda: write_atomically(contents()), folder, group)
    else:
        write_atomically(contents())
    if not sharded:
        warn_of_untrained([(name, adapter) for name, _, adapter in named], stacklevel=3)
    return folder


def _contents(named: list[tuple[str, OwnHost, Adapter]], folder: Path, include_basis: bool) -> dict[Path, bytes]:
    """The files."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, layer, adapter in named:
        with onloaded(layer):
            layers[name] = _put(tensors, name, layer, adapter, include_basis)
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{', '.join(bad[:4])} have non-finite numbers (NaN or infinity), and no such file could be "
                         "loaded; nothing has been written")  # fmt: skip
    header = {"format": FORMAT, "version": VERSION, "include_basis": include_basis, "layers": layers}
    return {
        folder / MODEL_FILE: as_file(tensors, {"ssvdo": json.dumps(header, sort_keys=True)}),
        folder / CONFIG_FILE: f"{json.dumps(header, indent=2, sort_keys=True)}\n".encode(),
    }


def _put(
    tensors: dict[str, Tensor], name: str, layer: OwnHost, adapter: Adapter, include_basis: bool
) -> dict[str, Any]:
    """Adds one adapter's tensors; returns what the header says of it."""
    for part in PARAMETER_NAMES:
        if getattr(adapter, part) is not None:
            tensors[f"{name}.{part}"] = _whole(getattr(adapter, part))
    assert adapter.basis is not None
    stored = layer.base(adapter).dense()
    weight = _whole(stored)
    if weight.shape != (adapter.shape.out_features, adapter.shape.in_features):
        raise ValueError(f"{not_there(f'{name}.weight', stored)} on every rank, save_ssvdo on the first")
    if adapter.origin is not None:
        adapter.origin.check(DenseBase(weight), name, by_value=True)
    bases = Bases.of(weight, _whole_factors(adapter), adapter.shape)
    origin = Fingerprint.of(weight, bases)
    tensors[f"{name}.weight_sketch"], tensors[f"{name}.basis_sketch"] = origin.weight, origin.basis
    if include_basis:
        tensors[f"{name}.basis"] = bases.V.to(weight.dtype)
    if include_basis and bases.N is not None:
        tensors[f"{name}.null_basis"] = bases.N.to(weight.dtype)
    return {
        "config": adapter.config.to_dict(),
        "out_features": adapter.shape.out_features, "in_features": adapter.shape.in_features,
        "dtype": origin.dtype, "sha256": origin.sha256, "layout": layer.layout,
    }  # fmt: skip


def _is_sharded(adapter: Adapter) -> bool:
    return hasattr(adapter.inner_scale, "full_tensor")


def _whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all ranks; any other tensor as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def _whole_factors(adapter: Adapter) -> Factors:
    return Factors.of({name: _whole(t) for name, t in adapter.factors.tensors().items()})


@dataclass(frozen=True)
class Entry:
    """One layer's adapter in a file."""

    name: str
    shape: LayerShape
    config: SSVDOConfig
    origin: Fingerprint
    tensors: dict[str, Tensor]
    bases: Bases | None
    layout: str = "plain"  # of the base's weight: see `LinearMap`


@lasting
def load_ssvdo(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Loads adapters saved by `save_ssvdo` into `model` (plain, or adapted with the same configuration); returns it.

    A plain model is adapted on the way, and all but the adapters frozen. Everything is checked before anything changes.
    Where FSDP2 has sharded the model, every rank calls this.

    Raises:
        FileNotFoundError: `path` has no adapter.
        CheckpointError: the file is damaged, foreign or of a newer format, or names layers or sizes that the model
            does not have, or the model is adapted otherwise.
        BaseMismatchError: it was trained on other base weights or in another singular basis.

    Examples:
        >>> folder = save_ssvdo(model, "adapter")
        >>> torch.allclose(load_ssvdo(plain, folder)(x), model(x), atol=1e-5)
        True
    """
    file = adapter_file(path)
    entries = read_adapter(file)
    found = list(places(model))
    modules = {place.name: place.module for place in found}  # a wrapper's last: what it holds
    held = {f"{n}.{part}" if part else n for n, m in modules.items() if isinstance(m, OwnHost) for part in m.parts()}
    held |= {n for n, m in modules.items() if isinstance(m, Host) and not isinstance(m, OwnHost)}
    extra = sorted(held - {e.name for e in entries})
    compiled = sorted(p.name for p in found if p.child == "_orig_mod" and linear_map(p.module) is not None)
    if alone := sorted({e.name for e in entries} & set(compiled)):
        raise CheckpointError(f"{file}: layers {alone[:4]} are compiled by themselves; load, then torch.compile")
    if extra:
        raise CheckpointError(f"{file}: holds no adapter for {extra[:4]}, which the model has adapted")
    sites = {entry.name: site_at(entry.name, modules) for entry in entries}
    own = {p.name: p for p in found if p.name in sites}
    reasons = {name: reason_against(p.module, p.parent, p.child) for name, p in own.items()
               if not isinstance(p.module, Host)}  # fmt: skip
    check_ties({name: site for name, site in sites.items() if site is not None and name in reasons})
    factors = {entry.name: checked(sites[entry.name], entry, file, reasons.get(entry.name, "")) for entry in entries}
    new = {e.name: (Plan(cast(Site, sites[e.name]), e.shape, e.config), cast(Factors, factors[e.name]))
           for e in entries if _adapter_at(sites[e.name]) is None}  # fmt: skip
    replacements = adapted(new.values())
    with torch.no_grad():
        for entry in entries:
            site = cast(Site, sites[entry.name])
            host = cast(OwnHost, replacements.get(id(site.module), site.module))
            adapter, others = host.parts()[site.part], factors[entry.name]
            fill(adapter, entry)
            if entry.name not in new and others is not None:
                adapter.set_factors(others, host.base(adapter).dense())
    exchange(model, replacements)
    if replacements:
        freeze_rest(model)
        group_layers(model)
    return model


@torch.no_grad()
def fill(adapter: Adapter, entry: Entry) -> None:
    """Gives the adapter the entry's trained numbers."""
    for part in PARAMETER_NAMES:
        place = getattr(adapter, part)
        if place is not None:
            place.copy_(_sharded_as(entry.tensors[part], place))
    adapter.refresh()


def _sharded_as(tensor: Tensor, place: Any) -> Tensor:
    """The tensor; where `place` is a DTensor, this rank's share of it."""
    if not hasattr(place, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(place.device, place.dtype), place.device_mesh, place.placements)


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def checked(site: Site | None, entry: Entry, file: Path, reason: str = "") -> Factors | None:
    """The factors in which the entry is meant, checked against what stands at its site; None where an adapter that is
    there keeps its own. reason: why a layer at this site cannot be adapted."""
    where = f"{file}: layer {entry.name}"
    adapter = _adapter_at(site)
    base = None if site is None or adapter is not None else site.base()
    if site is None or reason or (adapter is None and base is None):
        there = "the model has nothing of that name" if site is None else f"the model's {reason}"
        raise CheckpointError(f"{where}: {there}; a linear or an adapted layer is needed")
    have = site.sizes if adapter is None else (adapter.shape.out_features, adapter.shape.in_features)
    want = (entry.shape.out_features, entry.shape.in_features)
    if have != want:
        raise CheckpointError(f"{where}: saved for a weight of {_by(want)}, the model's is {_by(have)}")
    if adapter is not None and adapter.config.formula() != entry.config.formula():
        ours, theirs = adapter.config.formula(), entry.config.formula()
        differ = {k: (theirs[k], ours[k]) for k in ours if ours[k] != theirs[k]}
        raise CheckpointError(f"{where}: the model is adapted otherwise (saved, model): {differ}")
    with onloaded(site.module):
        host = site.module if isinstance(site.module, OwnHost) else None
        base = site.base() if adapter is None or host is None else host.base(adapter)
        return _factors_meant(cast(Base, base), adapter, entry, where)


def _factors_meant(base: Base, adapter: Adapter | None, entry: Entry, where: str) -> Factors | None:
    weight = _whole(base.dense())
    check_weight(weight, f"{entry.name}.weight")
    entry.origin.check(weight, where)
    if adapter is None:
        own = factorize(weight, entry.shape, name=f"{entry.name}.weight")
        return entry.origin.adopt(own, weight, entry.shape, entry.bases, where)
    own = _whole_factors(adapter)
    used = entry.origin.adopt(own, weight, entry.shape, entry.bases, where)
    if used is not own and _is_sharded(adapter):
        raise CheckpointError(f"{where}: the singular vectors of W0 came out otherwise here, and the model is "
                              "sharded; load the adapter before fully_shard")
    return None if used is own else used


def _adapter_at(site: Site | None) -> Adapter | None:
    return site.module.parts().get(site.part) if site is not None and isinstance(site.module, OwnHost) else None


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """The adapter's file in the folder `path`, or `path` itself.

    Raises:
        FileNotFoundError: there is none. CheckpointError: the adapter is one of PEFT.
    """
    path = Path(path)
    check_name(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name an adapter's folder, or its {MODEL_FILE}")
    folder, file = (path, path / MODEL_FILE) if path.is_dir() else (path.parent, path)
    if (folder / "adapter_config.json").is_file() and not (folder / MODEL_FILE).is_file():
        raise CheckpointError(f"{path} is a PEFT adapter, which PEFT loads (PeftModel.from_pretrained(model, folder), "
                              "after `import ssvdo_kernels.integrations.peft` where it is SSVD-O) and merges "
                              "(.merge_and_unload())")
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {file}; expected a folder with {MODEL_FILE}, as save_ssvdo writes it")
    return file


def read_adapter(file: Path) -> list[Entry]:
    """What the file holds, checked for wholeness. CheckpointError where it does not hold."""
    try:
        with opened(file) as source:
            metadata = source.metadata() or {}
            tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: no whole safetensors file ({error})") from None
    try:
        header = json.loads(metadata["ssvdo"])
        if header["format"] != FORMAT or type(header["version"]) is not int or header["version"] < 1:
            raise KeyError("format")
        if header["version"] > VERSION:
            raise CheckpointError(f"{file}: format {header['version']} is newer than {VERSION}; upgrade ssvdo_kernels")
        own = bool(header["include_basis"])
        entries = [_entry(name, values, own, tensors, file) for name, values in dict(header["layers"]).items()]
        if not entries:
            raise CheckpointError(f"{file}: holds no layer")
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: not an SSVD-O adapter (metadata: {error})") from None
    if tensors:
        raise CheckpointError(f"{file}: unknown tensors {sorted(tensors)[:4]}")
    return entries


def _entry(name: str, values: dict[str, Any], with_basis: bool, tensors: dict[str, Tensor], file: Path) -> Entry:
    config = SSVDOConfig.from_dict(values["config"])
    shape = LayerShape.of(values["out_features"], values["in_features"], config)
    vectors = tensors[f"{name}.basis_sketch"].shape[0] if f"{name}.basis_sketch" in tensors else shape.width
    q = min(max(0, vectors - shape.width), shape.width)
    sizes: dict[str, tuple[int, ...]] = {
        "inner_rotation": (shape.rotated,), "inner_scale": (shape.k,), "outer": (shape.c, shape.l),
        "weight_sketch": (SKETCH, SKETCH), "basis_sketch": (shape.width + q, SKETCH)}  # fmt: skip
    if with_basis:
        sizes.update(basis=(shape.d, shape.width), null_basis=(shape.large, q))
    found = {}
    for part, size in sizes.items():
        if 0 in size:
            continue  # what has no numbers is not in the file
        tensor = tensors.pop(f"{name}.{part}", None)
        if tensor is None:
            raise CheckpointError(f"{file}: tensor {name}.{part} is missing")
        if tuple(tensor.shape) != size or str(tensor.dtype) not in DTYPES:
            found_one = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(f"{file}: tensor {name}.{part} is {found_one}, expected {size} of a floating dtype "
                                  f"({', '.join(d.removeprefix('torch.') for d in DTYPES)})")  # fmt: skip
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: tensor {name}.{part} has non-finite entries")
        found[part] = tensor
    if not isinstance(values["sha256"], str) or values["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: layer {name} has no valid fingerprint")
    origin = Fingerprint(values["dtype"], values["sha256"], found.pop("weight_sketch"), found.pop("basis_sketch"))
    bases = Bases(found.pop("basis"), found.pop("null_basis", None)) if with_basis else None
    if bases is not None and not departure(bases.sketch(), origin.basis) <= BASIS_TOLERANCE:  # "not": it may be NaN
        raise CheckpointError(f"{file}: tensor {name}.basis is not the basis that the adapter was trained in")
    return Entry(name, shape, config, origin, found, bases, str(values.get("layout", "plain")))
