"""A base model's files with an adapter merged in, as `from_pretrained` or `torch.load` read them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapter import Adapter
from .checkpoint import Entry, adapter_file, checked, fill, read_adapter
from .factorize import check_weight
from .files import as_bytes, beside, check_places, move_all, opened
from .linear_maps import laid_out
from .lora import Lora, check_rank, lora_of, write_lora
from .model_files import FOREIGN, TORCH, WHOLE, is_torch, loaded, named_by, read_header, tensor_names, weight_files
from .ops.base import Base, matrix_of
from .sites import Plan, Site, adapted

WEIGHTS = (".safetensors", *TORCH, ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".ot", ".tflite", ".pb",
           ".distcp")  # fmt: skip
IN_MEMORY = "merge in memory, by remove_ssvdo(model, merge=True)"


class Merged(NamedTuple):
    """The files that were written, and the names of those in the base's folder that were not: "name", "folder/"."""

    written: list[Path]
    left_out: list[str]


@dataclass(frozen=True)
class Where:
    """A matrix in a file: the tensor's name and, where it holds several, the matrix's index."""

    tensor: str
    index: int | None = None

    def __str__(self) -> str:
        return self.tensor if self.index is None else f"{self.tensor}[{self.index}]"


def merge_files(base: Path, adapter: Path, out: Path, *, overwrite: bool = False) -> Merged:
    """Writes the base model's files with the adapter merged in: weights in the base's format, W' in the weight's own
    dtype; their index; and, where there is a config.json, what else is beside it and below (configurations, tokenizer,
    preprocessor, code). All of it appears in `out`, or nothing. In memory: one W' at a time, of a .bin, .pt, .pth those
    of a file.

    Args:
        base: see `weight_files`. adapter: made by save_ssvdo. out: a folder, new or empty. overwrite: or neither.

    Raises:
        ValueError: the base lacks a weight of the adapter, holds one twice, tied to another, or is not whole; `out` is
            the base's own folder, or holds weights that would stay beside the new ones.
        TypeError: a weight of the adapter is quantised in the base, or was where it was trained.
        FileExistsError: `out` is not empty, without `overwrite`.
        CheckpointError: the adapter is damaged, or made for other weights.
    """
    files, index = weight_files(base)
    folder = files[0].parent
    copied, left_out = _company(folder, {*files, index}, out)
    copied += [index] if index else []
    made = [] if index or len(files) == 1 else [f"{WHOLE[is_torch(files[0])]}.index.json"]
    _check_out(out, folder, made + [str(f.relative_to(folder)) for f in files + copied], overwrite)
    file = adapter_file(adapter)
    places, names = _places(base, files, file)
    new = not out.exists()
    stage = beside(out if new else out / "merged")
    created = [p for p in (out, *out.parents) if not p.exists()]
    try:
        stage.mkdir(parents=True)
        with tqdm(total=len(places), desc="merging", unit="layer", delay=2, leave=False, disable=None) as bar:
            for source in files:
                mine = {place: e for place, e in places.items() if names[place.tensor] == source}
                write = _write_torch if is_torch(source) else _write_safetensors
                write(source, stage / source.name, mine, file, bar)
        for path in copied:
            target = stage / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        for name in made:
            content = {"metadata": {}, "weight_map": {n: f.name for n, f in names.items()}}
            (stage / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        staged = sorted(p for p in stage.rglob("*") if p.is_file())
        for path in staged:
            with path.open("rb+") as opened:
                os.fsync(opened.fileno())
        written = {out / p.relative_to(stage): p for p in staged}
        if new:
            os.rename(stage, out)
        else:
            for place in written:
                created += [p for p in place.parents if not p.exists()]
                place.parent.mkdir(parents=True, exist_ok=True)
            move_all(written)
            shutil.rmtree(stage, ignore_errors=True)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for path in sorted(created, reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    return Merged(list(written), left_out)


def _places(base: Path, files: list[Path], file: Path) -> tuple[dict[Where, Entry], dict[str, Path]]:
    """Where the model's files keep the weight of each of the adapter's entries; and the file of each tensor."""
    names: dict[str, Path] = {}
    for source in files:
        for name in tensor_names(source):
            if name in names:
                raise ValueError(f"{names[name]} and {source} both hold {name}; name the file that counts")
            names[name] = source
    entries = read_adapter(file)
    for entry in entries:
        if entry.layout == "quantised":
            raise TypeError(f"{file}: layer {entry.name} was trained on a quantised weight, and W' cannot take its "
                            f"place in a file; allowed: to {IN_MEMORY}")  # fmt: skip
    places = {_where(entry.name, names): entry for entry in entries}
    if missing := sorted({place.tensor for place in places} - set(names)):
        raise ValueError(f"{base} has no tensor {missing[:4]}; the adapter's names must be the model file's (of tied "
                         f"weights a file holds one, which cannot be merged alone); otherwise {IN_MEMORY}")
    return places, names


def export_lora(base: Path, adapter: Path, out: Path, rank: int | None = None) -> dict[str, Lora]:
    """Writes the adapter as a LoRA of PEFT's format into the folder `out`: see `save_lora`. One weight in memory at a
    time. Returns what was written, by layer.

    Args:
        base: see `weight_files`; the weights are read, and must be those that the adapter was trained on.
        adapter: made by save_ssvdo. rank: None: exact.

    Raises:
        as `merge_files`; ValueError where rank < 1. TypeError: the adapter has experts or convolutions.
    """
    check_rank(rank)
    files, _ = weight_files(base)
    file = adapter_file(adapter)
    places, names = _places(base, files, file)
    for place, entry in places.items():
        if place.index is not None or entry.layout == "flattened":
            raise TypeError(f"{file}: layer {entry.name} is an expert or a convolution, whose LoRA is of another form; "
                            "allowed: linear layers")
    found: dict[str, Lora] = {}
    steps = tqdm(places.items(), desc="exporting", unit="layer", delay=2, leave=False, disable=None)
    for place, entry in steps:
        source = names[place.tensor]
        with contextlib.ExitStack() as stack:
            read = loaded(source).__getitem__ if is_torch(source) else None
            read = stack.enter_context(opened(source)).get_tensor if read is None else read
            found[entry.name] = lora_of(*_adapted(_matrix(read(place.tensor), entry, str(source)), entry, file), rank)
    config = base / "config.json" if base.is_dir() else base.parent / "config.json"
    write_lora(found, out, str(base.absolute()) if config.is_file() else None,
               all(entry.layout == "transposed" for entry in places.values()))  # fmt: skip
    return found


def _company(folder: Path, weights: set[Path | None], out: Path) -> tuple[list[Path], list[str]]:
    """What goes along with a config.json, and the names of what does not: other weights, folders with weights of their
    own (checkpoints, other formats), adapters. Hidden files do not count."""
    along: list[Path] = []
    left: list[str] = []
    for path in sorted(folder.iterdir()) if (folder / "config.json").is_file() else ():
        if path.name.startswith(".") or path in weights or path.resolve() == out.resolve():
            continue
        own = [p for p in (path.rglob("*") if path.is_dir() else [path])
               if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)]  # fmt: skip
        foreign = not path.is_dir() and (path.name.startswith(FOREIGN) or (".index" in path.name and named_by(path)))
        if not own or foreign or any(p.suffix.lower() in WEIGHTS and p.parent.name != "language_model" for p in own):
            left.append(f"{path.name}{'/' if path.is_dir() else ''}")
        else:
            along += own
    return along, left


def _where(name: str, tensors: Mapping[str, Path]) -> Where:
    """Where a file keeps the layer's weight, or the expert's matrix."""
    stack, _, index = name.rpartition(".")
    weight = f"{name}.weight" if name else "weight"
    found = weight not in tensors and stack in tensors and re.fullmatch(r"[0-9]{1,9}", index)
    return Where(stack, int(index)) if found else Where(weight)


def _check_out(out: Path, folder: Path, names: list[str], overwrite: bool) -> None:
    """names: of what is to be written there."""
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the base model's own folder; allowed: another one")
    check_places(out / name for name in names)
    there = sorted(f.name for f in out.iterdir()) if out.exists() else []
    if there and not overwrite:
        raise FileExistsError(f"--out {out} is not empty ({there[0]}); allowed: a new folder, or --overwrite")
    stay = [n for n in there if n not in names and (n.endswith((".safetensors", *TORCH)) or ".index" in n)]
    if stay:
        raise ValueError(f"--out {out} has {stay[0]}, which would stay beside the new weights; remove it")


def _write_safetensors(source: Path, target: Path, entries: Mapping[Where, Entry], file: Path, bar: tqdm[Any]) -> None:
    """Copies the file and overwrites the bytes of the merged weights: the header stays as it is."""
    header, begin = read_header(source)
    shutil.copyfile(source, target)
    with opened(source) as read, target.open("rb+") as written:
        tied = {kept: other for other, kept in (read.metadata() or {}).items()}  # as safetensors' save_model notes it
        for place, entry in entries.items():
            kept = read.get_slice(place.tensor)
            _check_index(place, kept.get_shape(), source)
            weight = read.get_tensor(place.tensor) if place.index is None else kept[place.index]
            merged = _merged(weight, entry, f"{source}: {place}", file, tied.get(place.tensor))
            at = begin + header[place.tensor]["data_offsets"][0]  # type: ignore[index]
            written.seek(at + (place.index or 0) * merged.nbytes)
            written.write(as_bytes(merged))
            bar.update()


def _write_torch(source: Path, target: Path, entries: Mapping[Where, Entry], file: Path, bar: tqdm[Any]) -> None:
    """Saves what the file holds, with the merged weights in their places."""
    state = loaded(source)
    wanted = {place.tensor for place in entries}
    spans: dict[int, list[tuple[int, int, str]]] = {}  # the bytes of each tensor, by storage
    for name, t in state.items():
        if isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta and t.numel():
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            own = t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name
            spans.setdefault(t.untyped_storage().data_ptr(), []).append(own)
    tied = {name: other for own in spans.values() for begin, end, name in own if name in wanted
            for start, stop, other in own if other != name and begin < stop and start < end}  # fmt: skip
    for place, entry in entries.items():
        tensor = state[place.tensor]
        _check_index(place, list(tensor.shape), source)
        weight = tensor if place.index is None else tensor[place.index]
        merged = _merged(weight, entry, f"{source}: {place}", file, tied.get(place.tensor))
        if place.index is None:
            state[place.tensor] = merged
        else:
            if place.tensor in wanted:  # the file's own stays as it is
                state[place.tensor] = tensor.detach().clone()
                wanted.remove(place.tensor)
            state[place.tensor][place.index] = merged
        bar.update()
    try:  # torch's own writer makes a RuntimeError of a full disk, that of torch 2.6 nothing
        with target.open("wb") as written:
            torch.save(state, written)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{target} cannot be written ({str(error).splitlines()[0]})") from None


def _check_index(place: Where, shape: list[int], source: Path) -> None:
    if place.index is not None and not (len(shape) == 3 and place.index < shape[0]):
        raise ValueError(f"{source}: {place.tensor} has shape {tuple(shape)}, and no matrix of index {place.index}")


def _matrix(weight: Tensor, entry: Entry, name: str) -> Tensor:
    """W0, out_features x in_features, of a weight as a file keeps it."""
    if weight.layout != torch.strided:
        raise TypeError(f"{name} has layout {weight.layout}; allowed: torch.strided, an ordinary tensor")
    if not weight.is_floating_point() or weight.element_size() < 2:
        kind = str(weight.dtype).removeprefix("torch.")
        raise TypeError(f"{name} has {kind} weights: this base is quantised, and W' cannot take their place in a file; "
                        f"allowed: the base before quantisation, or to {IN_MEMORY}")
    matrix = matrix_of(weight, entry.layout) if weight.ndim > 1 else weight
    check_weight(matrix, name)
    return matrix


def _adapted(matrix: Tensor, entry: Entry, file: Path) -> tuple[Adapter, Base]:
    """The entry's adapter of W0, checked against it."""
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    site = Site(entry.name, linear)
    factors = checked(site, entry, file)
    assert factors is not None
    (layer,) = adapted([(Plan(site, entry.shape, entry.config), factors)]).values()
    (adapter,) = layer.adapters()
    fill(adapter, entry)
    return adapter, layer.base()


@torch.no_grad()
def _merged(weight: Tensor, entry: Entry, name: str, file: Path, tied: str | None) -> Tensor:
    """W' as the file keeps W0, in its dtype. tied: another name of the same weight."""
    matrix = _matrix(weight, entry, name)
    if tied:
        raise ValueError(f"{name} is tied to {tied}, which must not change with it; store the two apart first")
    adapter, base = _adapted(matrix, entry, file)
    return laid_out(adapter.adapted_weight(base), entry.layout, weight.shape)
