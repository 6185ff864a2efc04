"""A model's files: which of a folder hold its weights, and which tensors are in them."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import check_name

TORCH = (".bin", ".pt", ".pth")  # read by torch.load(weights_only=True)
WHOLE = ("model.safetensors", "pytorch_model.bin")  # what from_pretrained takes alone
WANTED = f"a model's folder, its index or a .safetensors, {', '.join(TORCH)} file"
FOREIGN = ("adapter", "ssvdo")  # how an adapter's own files begin
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HEADER_LIMIT = 100_000_000  # bytes: safetensors' own bound


def weight_files(base: Path) -> tuple[list[Path], Path | None]:
    """The files that hold a model's weights, and the index that names them, if one does.

    base: a file, an index, or a folder: of it what its index names, else every .safetensors file, else every
    pytorch_model*.bin, else every .bin, .pt and .pth.

    Raises:
        FileNotFoundError: there is none, or not all that the index names.
        ValueError: an index is broken, or it is not clear which files count.
    """
    if not base.exists():
        raise FileNotFoundError(f"{base} does not exist; name {WANTED}")
    folder = base if base.is_dir() else base.parent
    if base.is_file():
        if base.suffix == ".json":
            return _indexed(base), base
        if index := next((i for i in folder.glob("*.index*.json") if base.name in named_by(i)), None):
            raise ValueError(f"{base} is one of the files of {index}; name the folder or the index")
        return [base], None
    for kinds in ((".safetensors",), TORCH):
        files = sorted(f for f in folder.glob("*") if f.suffix.lower() in kinds and f.is_file()
                       and not f.name.startswith((*FOREIGN, ".")))  # fmt: skip
        files = [f for f in files if f.name.startswith("pytorch_model")] or files  # not optimizer.bin
        indices = sorted(f for kind in kinds for f in folder.glob(f"*{kind}.index*.json"))
        if indices:
            named, whole = _indexed(indices[0]), folder / indices[0].name.split(".index")[0]
            rivals = [f for f in (*indices[1:], whole) if f.is_file() and f not in named]
            if rivals:
                raise ValueError(f"{indices[0]} and {rivals[0]} both say what the model is; name the one that counts")
            return named, indices[0]
        if len(files) > 1 and (one := next((f for f in files if f.name in WHOLE), None)):
            others = [f.name for f in files if f != one]
            raise ValueError(f"{one} is a whole model by its name, but {', '.join(others[:4])} beside it may belong to "
                             "it; name the file that counts")
        if files:
            return files, None
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{base} is a PEFT adapter; name its base model's folder")
    raise FileNotFoundError(f"{base} has no weights; name {WANTED}")


def named_by(index: Path) -> set[str]:
    """The names of the files that an index names; none: it is no index."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return names if all(name and Path(name).name == name for name in names) else set()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    names = named_by(index)
    if not names:
        raise ValueError(f"{index} is no index: a weight_map is needed, of tensors to names of files beside it")
    files = [index.parent / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which does not exist")
    return files


def is_torch(source: Path) -> bool:
    """Whether torch.load reads the file."""
    return source.suffix.lower() in (*TORCH, ".ckpt")


def loaded(source: Path) -> dict[str, Any]:
    """A .bin, .pt or .pth file's content, mapped into memory where its format allows it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, and of old storages
            state = torch.load(source, "cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(f"{source} is no whole file of tensors: it is damaged, or holds objects of other classes, as "
                         "torch.save of a whole model writes; allowed: torch.save(model.state_dict(), file)") from None
    except Exception as error:  # what an unpickler finds in damaged bytes may be anything
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{source} is no whole file of tensors (torch.load with weights_only=True: {said})") from None
    if not isinstance(state, dict) or not any(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{source} does not hold tensors by name; a training checkpoint is no model file")
    return state


def tensor_names(source: Path) -> list[str]:
    """The tensors of a file that is whole."""
    check_name(source)
    if is_torch(source):
        return [name for name, t in loaded(source).items() if isinstance(t, Tensor)]
    try:
        with safe_open(source, "pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{source} is no whole safetensors file ({error})") from None


def sizes(source: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype as safetensors writes it, shape). Of a safetensors file the header alone is read."""
    if is_torch(source):
        check_name(source)
        held = {name: t for name, t in loaded(source).items() if isinstance(t, Tensor)}
        return {name: (_DTYPES.get(t.dtype, str(t.dtype)), list(t.shape)) for name, t in held.items()}
    header: Any = read_header(source)[0]
    return {name: (values["dtype"], values["shape"]) for name, values in header.items()}


def read_header(file: Path) -> tuple[dict[str, dict[str, object]], int]:
    """A safetensors file's header (without its metadata), and where its data begins.

    Raises:
        ValueError: this is no safetensors file.
    """
    with file.open("rb") as source:
        head = source.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, file.stat().st_size - 8):
            raise ValueError(f"{file} is no safetensors file")
        try:
            header = json.loads(source.read(length))
            header.pop("__metadata__", None)
            bad = [f": tensor {name} has {values}"[:200] for name, values in header.items() if not _is_tensor(**values)]
        except (ValueError, TypeError, AttributeError, RecursionError):
            bad = [""]
        if bad:
            raise ValueError(f"{file} is no safetensors file{bad[0]}")
    return header, 8 + length


def _is_tensor(dtype: object, shape: object, data_offsets: object, **_: object) -> bool:
    """Whether a header may say this of a tensor."""
    lists = [shape, data_offsets]
    whole = all(isinstance(n, list) and all(type(i) is int and 0 <= i < 2**63 for i in n) for n in lists)
    return isinstance(dtype, str) and whole and len(data_offsets) == 2  # type: ignore[arg-type]
