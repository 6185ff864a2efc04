"""Tensors as files: safetensors content, written so that a path holds either the old content or the whole new one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it lies on the CPU so already."""
    data = tensor.detach().contiguous().cpu()
    block: Any = (ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr())
    block.tensor = data  # alive as long as the view; Tensor.numpy would forbid FSDP1 to free the storage later
    return memoryview(block)


def as_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file's content."""
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata or None)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, of which tensors come on the CPU: the default device is where safetensors 0.4 puts them."""
    from safetensors import safe_open

    with torch.device("cpu"), safe_open(file, "pt") as source:
        yield source


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Writes files so that each path holds either the old content or the whole new one, whatever happens.

    All are written beside their places and flushed to the disk before the first takes its place; on an error, nothing
    has changed. A killed process may leave files named .NAME.* behind.
    """
    check_places(contents)
    written: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = beside(path)
            with temporary.open("xb") as file:  # with the user's own permissions, which tempfile's would not have
                written[path] = temporary
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        move_all(written)
    except BaseException:
        for left in written.values():
            left.unlink(missing_ok=True)
        raise


def beside(path: Path) -> Path:
    """A hidden name of its own in the same folder."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def check_places(paths: Iterable[Path]) -> None:
    """OSError where a file cannot be put at one of the paths, since a folder is there or a file is above."""
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; a file is to be written there: remove or rename it")
        above = next((p for p in path.parents if os.path.lexists(p) and not p.is_dir()), None)
        if above:
            raise NotADirectoryError(f"{path} cannot be written: {above} is no folder")


def check_name(path: Path) -> None:
    """ValueError where safetensors and torch.load could not open a file of this name."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} has bytes in its name that are not UTF-8, and safetensors and torch.load cannot open "
                         "it; rename it") from None  # fmt: skip


def move_all(files: Mapping[Path, Path]) -> None:
    """Moves files (the values) to their places (the keys), or on an error none: what was there is put back."""
    old: dict[Path, Path] = {}
    try:
        for place in list(files)[:-1]:  # where the last has been moved, all have
            if os.path.lexists(place):
                old[place] = beside(place)
                try:
                    os.link(place, old[place], follow_symlinks=False)
                except (OSError, NotImplementedError):  # this file system has no hard links
                    shutil.copy2(place, old[place], follow_symlinks=False)
        for place, file in files.items():
            os.replace(file, place)
    except BaseException:
        moved = [place for place, file in files.items() if not os.path.lexists(file)]
        for place in moved if len(moved) < len(files) else ():
            if place in old:
                os.replace(old[place], place)
            else:
                place.unlink()
        _remove(old.values())
        raise
    _remove(old.values())


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
