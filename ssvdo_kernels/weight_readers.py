"""Modules that read the weight of a layer of theirs and multiply by it themselves.

Such a layer is called by nobody, so that an adapter on it would be without effect, and no error would say so: torch's
and fairseq's MultiheadAttention, WavLM's attention, Mamba's mixers and some forty more classes of Transformers. They
are known by their source: a method reads ``self.<layer>.weight`` for more than its dtype and size.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn

_ASKS = frozenset({"dtype", "device", "shape", "size", "is_meta", "ndim", "data", "requires_grad", "requires_grad_",
                   "numel"})  # fmt: skip
_PREPARES = ("__init__", "extra_repr", "init_weights", "_init_weights", "reset_parameters", "_reset_parameters",
             "tie_weights", "_tie_weights")  # fmt: skip
_HARMLESS = ("TransformerEncoderLayer",)  # its fast path, which reads weights, is not taken where there is an adapter


def readings(source: str) -> Iterator[tuple[str, str]]:
    """(class, layer) for every layer whose weight a method of a class takes for more than its dtype and size."""
    for cls in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)):
        methods = {m.name: m for m in cls.body if isinstance(m, ast.FunctionDef) and m.name not in _PREPARES}
        taken = {name: list(_taken(method)) for name, method in methods.items()}
        for layer in (layer for layers in taken.values() for layer in layers):
            if _of_self(layer):
                yield cls.name, layer.attr  # type: ignore[attr-defined]
        for call in (node for m in methods.values() for node in ast.walk(m) if isinstance(node, ast.Call)):
            called: str = call.func.attr if _of_self(call.func) else ""  # type: ignore[attr-defined]
            if called in methods:  # it may take the weight of a layer that it is given
                names = [a.arg for a in methods[called].args.args if a.arg != "self"]
                read = {ast.unparse(layer) for layer in taken[called]}
                for name, given in zip(names, call.args, strict=False):
                    if name in read and _of_self(given):
                        yield cls.name, given.attr  # type: ignore[attr-defined]


def _of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"


def _taken(method: ast.FunctionDef) -> Iterator[ast.AST]:
    """Whose weights the method takes for more than their dtype and size."""
    above = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in above:
        taken = isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)
        if taken and not _is_question(above[node]):
            yield node.value  # type: ignore[attr-defined]


def _is_question(user: ast.AST) -> bool:
    if isinstance(user, ast.Call):
        name = ast.unparse(user.func)
        return name in ("isinstance", "hasattr") or ".init." in f".{name}"
    return isinstance(user, ast.Attribute) and user.attr in _ASKS


@lru_cache(maxsize=1024)
def _read_by(cls: type) -> frozenset[str]:
    try:
        return frozenset(layer for _, layer in readings(textwrap.dedent(inspect.getsource(cls))))
    except (OSError, TypeError, SyntaxError):  # no source
        return frozenset()


def reader_of(parent: nn.Module, child: str) -> str | None:
    """The class of `parent` that multiplies by the weight of its layer `child` itself; None: it calls the layer."""
    if getattr(parent, "pretraining_tp", 2) == 1:  # BLOOM's slices
        return None
    classes: list[Any] = [c for c in type(parent).__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    return next((c.__name__ for c in classes if c.__name__ not in _HARMLESS and child in _read_by(c)), None)
