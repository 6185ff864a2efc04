"""The differentiable operations of an SSVD-O layer: preparation, the small-side transforms, the adapted linear map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_dtypes() -> Iterator[None]:
    """Autocast off on every device: inside, each product runs in the dtype that we chose for it.

    Also needed in backward, which runs under autocast where a user calls it there.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
