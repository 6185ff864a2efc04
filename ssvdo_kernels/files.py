"""Tensors as files: safetensors content, written so that a path holds either the old content or the whole new one."""

from __future__ import annotations

import ctypes
import os
import uuid
from pathlib import Path
from typing import Any

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


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Writes files so that each path holds either the old content or the whole new one, whatever happens.

    All are written beside their places and flushed to the disk before the first takes its place; on an error before
    that, nothing has changed. A killed process may leave a file named .NAME.* behind.
    """
    written: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            with temporary.open("xb") as file:  # with the user's own permissions, which tempfile's would not have
                written[path] = temporary
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(written[path], path)
            del written[path]
    except BaseException:
        for left in written.values():
            left.unlink(missing_ok=True)
        raise
