"""A base model's files with an adapter merged in, as `from_pretrained` or `torch.load` read them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from .budget import read_header
from .checkpoint import MODEL_FILE, Entry, adapter_file, checked, fill, read_adapter
from .factorize import check_weight
from .files import as_bytes
from .sites import Plan, Site, adapted

TORCH = (".bin", ".pt", ".pth")  # read by torch.load(weights_only=True)
TEXTS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".yaml")  # what goes along with a config.json
FOREIGN = ("adapter", "ssvdo")  # how an adapter's own files begin


def own_adapter(path: Path) -> Path:
    """`adapter_file`; ValueError where the adapter is one of PEFT."""
    folder = path if path.is_dir() else path.parent
    if (folder / "adapter_config.json").is_file() and not (folder / MODEL_FILE).is_file():
        raise ValueError(f"{path} is a PEFT adapter; PEFT merges it: PeftModel.from_pretrained(model, folder)"
                         ".merge_and_unload(), after `import ssvdo_kernels.integrations.peft` where it is SSVD-O")
    return adapter_file(path)


def weight_files(base: Path) -> tuple[list[Path], Path | None]:
    """The files that hold a model's weights, and the index that names them, if one does.

    base: a file, an index, or a folder: of it what its index names, else every .safetensors file, else every
    pytorch_model*.bin, else every .bin, .pt and .pth.

    Raises:
        FileNotFoundError: there is none, or not all that the index names.
        ValueError: an index is broken, or it is not clear which files count.
    """
    folder = base if base.is_dir() else base.parent
    if base.is_file():
        if ".index" in base.name:
            return _indexed(base), base
        for index in folder.glob("*.index*.json"):
            if base in _indexed(index):
                raise ValueError(f"{base} is one of the files of {index}; name the folder or the index")
        return [base], None
    for kinds in ((".safetensors",), TORCH):
        files = sorted(f for f in folder.glob("*") if f.suffix in kinds and not f.name.startswith(FOREIGN))
        files = [f for f in files if f.name.startswith("pytorch_model")] or files  # not optimizer.bin
        indices = sorted(f for kind in kinds for f in folder.glob(f"*{kind}.index*.json"))
        if indices:
            named, whole = _indexed(indices[0]), folder / indices[0].name.split(".index")[0]
            rivals = [f for f in (*indices[1:], whole) if f.is_file() and f not in named]
            if rivals:
                raise ValueError(f"{indices[0]} and {rivals[0]} both say what the model is; name the one that counts")
            return named, indices[0]
        if files:
            return files, None
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{base} is a PEFT adapter; name its base model's folder")
    raise FileNotFoundError(f"{base} has no weights; name a model's folder or a .safetensors, {', '.join(TORCH)} file")


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain or not names:
        raise ValueError(f"{index} is no index: a weight_map is needed, of tensors to names of files beside it")
    files = [index.parent / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which does not exist")
    return files


def _loaded(source: Path) -> dict[str, Any]:
    """A .bin, .pt or .pth file's content, mapped into memory where its format allows it."""
    try:
        state = torch.load(source, "cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except OSError:
        raise
    except Exception as error:  # what an unpickler finds in damaged bytes may be anything
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{source} is no whole file of tensors (torch.load with weights_only=True: {said})") from None
    if not isinstance(state, dict) or not any(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{source} does not hold tensors by name; a training checkpoint is no model file")
    return state


def _names(source: Path) -> list[str]:
    """The tensors of a file that is whole."""
    if source.suffix in TORCH:
        return [name for name, t in _loaded(source).items() if isinstance(t, Tensor)]
    try:
        with safe_open(source, "pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{source} is no whole safetensors file ({error})") from None


def merge_files(base: Path, adapter: Path, out: Path, *, overwrite: bool = False) -> list[Path]:
    """Writes the base model's files with the adapter merged in: weights in the base's format, W' in the weight's own
    dtype; their index; and, where there is a config.json, the texts beside it (configurations, tokenizer, preprocessor,
    code). All of it appears in `out`, or nothing. In memory: one W' at a time, of a .bin, .pt, .pth those of a file.

    Args:
        base: see `weight_files`. adapter: made by save_ssvdo. out: a folder, new or empty. overwrite: or neither.

    Raises:
        ValueError: the base lacks a weight of the adapter, holds one twice, tied to another, or is not whole; `out` is
            the base's own folder, or holds weights that would stay beside the new ones.
        TypeError: a weight of the adapter is quantised in the base.
        FileExistsError: `out` is not empty, without `overwrite`.
        CheckpointError: the adapter is damaged, or made for other weights.
    """
    files, index = weight_files(base)
    folder = files[0].parent
    texts = [f for f in folder.glob("*") if f.suffix in TEXTS and f.is_file() and ".index" not in f.name
             and not f.name.startswith(FOREIGN)] if (folder / "config.json").is_file() else []  # fmt: skip
    copied = ([index] if index else []) + texts
    _check_out(out, folder, {f.name for f in files + copied}, overwrite)
    file = own_adapter(adapter)
    entries = {f"{e.name}.weight": e for e in read_adapter(file)}
    where: dict[str, Path] = {}
    for source in files:
        for name in _names(source):
            if name in where:
                raise ValueError(f"{where[name]} and {source} both hold {name}; name the file that counts")
            where[name] = source
    if missing := sorted(set(entries) - set(where)):
        raise ValueError(f"{base} has no tensor {missing[:4]}; the adapter's names must be the model file's (of tied "
                         "weights a file holds one, which cannot be merged alone)")
    created, stage = not out.exists(), out / f".{uuid.uuid4().hex}"
    stage.mkdir(parents=True)
    try:
        with tqdm(total=len(entries), desc="merging", unit="layer", delay=2, leave=False, disable=None) as bar:
            for source in files:
                mine = {name: e for name, e in entries.items() if where[name] == source}
                write = _write_torch if source.suffix in TORCH else _write_safetensors
                write(source, stage / source.name, mine, file, bar)
        for text in copied:
            shutil.copyfile(text, stage / text.name)
        if len(files) > 1 and not index:
            name = "model.safetensors" if files[0].suffix == ".safetensors" else "pytorch_model.bin"
            made = {"metadata": {}, "weight_map": {n: f.name for n, f in where.items()}}
            (stage / f"{name}.index.json").write_text(json.dumps(made, indent=2), encoding="utf-8")
        written = sorted(stage.iterdir())
        for path in written:
            with path.open("rb+") as opened:
                os.fsync(opened.fileno())
        for path in written:
            os.replace(path, out / path.name)
        stage.rmdir()
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    return [out / path.name for path in written]


def _check_out(out: Path, folder: Path, names: set[str], overwrite: bool) -> None:
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the base model's own folder; allowed: another one")
    there = sorted(f.name for f in out.iterdir()) if out.exists() else []
    if there and not overwrite:
        raise FileExistsError(f"--out {out} is not empty ({there[0]}); allowed: a new folder, or --overwrite")
    stay = [n for n in there if n not in names and (n.endswith((".safetensors", *TORCH)) or ".index" in n)]
    if stay:
        raise ValueError(f"--out {out} has {stay[0]}, which would stay beside the new weights; remove it")


def _write_safetensors(source: Path, target: Path, entries: Mapping[str, Entry], file: Path, bar: tqdm[Any]) -> None:
    """Copies the file and overwrites the bytes of the merged weights: the header stays as it is."""
    header, begin = read_header(source)
    shutil.copyfile(source, target)
    with safe_open(source, "pt") as opened, target.open("rb+") as written:
        tied = {kept: other for other, kept in (opened.metadata() or {}).items()}  # as safetensors' save_model notes it
        for name, entry in entries.items():
            merged = _merged(opened.get_tensor(name), entry, source, file, tied.get(name))
            written.seek(begin + header[name]["data_offsets"][0])  # type: ignore[index]
            written.write(as_bytes(merged))
            bar.update()


def _write_torch(source: Path, target: Path, entries: Mapping[str, Entry], file: Path, bar: tqdm[Any]) -> None:
    """Saves what the file holds, with the merged weights in their places."""
    state = _loaded(source)
    address = {n: t.data_ptr() for n, t in state.items() if isinstance(t, Tensor)}
    for name, entry in entries.items():
        tied = next((n for n, at in address.items() if n != name and at == address[name]), None)
        state[name] = _merged(state[name], entry, source, file, tied)
        bar.update()
    torch.save(state, target)


@torch.no_grad()
def _merged(weight: Tensor, entry: Entry, source: Path, file: Path, tied: str | None) -> Tensor:
    """W' in the dtype of W0. tied: another name of the same weight."""
    name = f"{source}: {entry.name}.weight"
    if tied:
        raise ValueError(f"{name} is tied to {tied}, which must not change with it; store the two apart first")
    check_weight(weight, name)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    site = Site(entry.name, linear)
    factors = checked(site, entry, file)
    assert factors is not None
    (layer,) = adapted([(Plan(site, entry.shape, entry.config), factors)]).values()
    (adapter,) = layer.adapters()
    fill(adapter, entry)
    return adapter.adapted_weight(layer.base())
