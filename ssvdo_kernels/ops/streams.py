"""Work that was queued on one CUDA stream and is used on another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def current(like: Tensor) -> int:
    """The current stream of a tensor's device, as a number; -1 on a CPU."""
    if not like.is_cuda:
        return -1
    raw: Any = torch._C
    return int(raw._cuda_getCurrentRawStream(like.get_device()))


class Queued:
    """The stream on which something was made, and an event that comes after it."""

    def __init__(self, like: Tensor) -> None:
        self._stream, self._event = current(like), event(like)

    def wait(self, like: Tensor) -> None:
        """Lets the current stream wait, where it is another one."""
        if self._event is not None and current(like) != self._stream:
            self._event.wait()


def event(like: Tensor) -> Any:
    """An event recorded on the current stream of a tensor's device; None on a CPU, and in a graph's capture, whose
    order is the graph's."""
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    with torch.cuda.device(like.get_device()):
        made = torch.cuda.Event()  # type: ignore[no-untyped-call]
        made.record()
    return made
