"""Whole models computed through the dense W', and given back as plain layers.

W0 is never written to. A merged layer keeps its weight bit for bit, and so does its state_dict: it can be saved,
loaded, trained and unmerged at any time, and its W' follows the parameters. So unmerging is exact.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from .host import OwnHost, exchange, onloaded, settle
from .linear_maps import kind_of
from .model import require_adapted


def merge_ssvdo(model: nn.Module) -> nn.Module:
    """Computes every adapted layer through its dense W' from now on: one product a forward, as fast as nn.Linear.

    What is saved stays the same: `save_ssvdo` writes the adapter; a state_dict, `save_pretrained`'s too, holds W0 and
    the adapter, of which it warns. Files with W' in W0's place: `remove_ssvdo(model, merge=True).save_pretrained(...)`.

    Examples:
        >>> before = model(x)
        >>> torch.allclose(merge_ssvdo(model)(x), before, atol=1e-5)
        True
    """
    for layer in require_adapted(model).values():
        for adapter in layer.adapters():
            adapter.merged = True
    return model


def unmerge_ssvdo(model: nn.Module) -> nn.Module:
    """Undoes `merge_ssvdo`.

    Examples:
        >>> before = model(x)
        >>> torch.equal(unmerge_ssvdo(merge_ssvdo(model))(x), before)
        True
    """
    for layer in require_adapted(model).values():
        for adapter in layer.adapters():
            adapter.unmerge()
    return model


@torch.no_grad()
def remove_ssvdo(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Puts the layers back, with W0 (the original tensors) or, with merge=True, with W' (quantised ones as nn.Linear).

    The layers stay frozen, as the rest of the model: what is to be trained next is the caller's to say. With merge=True
    the model is as the base was, and saved as the base is (`save_pretrained`, `torch.save` of its state_dict).

    Raises:
        ValueError: the model has no adapted layer. TypeError: a layer is another package's, which takes it out itself.

    Examples:
        >>> remove_ssvdo(model, merge=True)[0]
        Linear(in_features=64, out_features=256, bias=True)
    """
    layers = require_adapted(model)
    for name, layer in layers.items():
        if not isinstance(layer, OwnHost):
            raise TypeError(f"{name} is a {kind_of(layer)}; allowed: adapted layers of apply_ssvdo")
    made = {}
    for layer in (layer for layer in layers.values() if isinstance(layer, OwnHost)):
        with onloaded(layer) if merge else nullcontext():
            made[id(layer)] = layer.plain(merge)
    exchange(model, made)
    settle(model)
    return model

