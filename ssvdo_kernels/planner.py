"""Which form computes a forward: the one that costs least, counted in floating-point operations.

Per token (multiply-adds, e = l + q, w = max(k, l), m*n the frozen product, b = max(m, n), d = min(m, n)):

    form       forward                     backward (with parameter gradients)
    factored   2dw + w^2 + we + be         2dw + 2w^2 + 3we + 2be
    folded     2dw + we + be               2dw + w^2 + 2we + de + 2be
    core       d(d + e) + be               2d(d + e) + de + 2be
    merged     0                           mn                        (dW' = dy^T x)

A wide layer keeps z and saves its recomputation: we, or de in the core form.

A form's matrices are built once per preparation. Whether that pays depends on the tokens still to come, which nobody
knows; so the planner rents until renting has cost what buying would have (the ski-rental rule): it counts the tokens
that this preparation, or the one before it, has already served as if they came again. Within one preparation it is
never worse than twice the best in hindsight.

The core and merged forms, besides, bring the gradients of E and W' to the parameters' matrices once a backward, however
few its tokens.

With the Triton kernels the choice is between folded and merged, by the larger of the bandwidth and the arithmetic floor
of every launch (traffic.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from . import traffic
from .config import LayerShape, SSVDOConfig
from .traffic import Machine, Traffic, machine

FORMS = ("factored", "folded", "core", "merged")
SMALL = FORMS[:3]
"""Forms without W'."""


def token_cost(form: str, shape: LayerShape, extra: int, grad: bool) -> float:
    """Multiply-adds per token beyond the frozen layer's m*n (forward) and m*n (backward)."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    if form == "factored":
        forward, backward = 2 * d * w + w * w + w * e + b * e, 2 * d * w + 2 * w * w + 3 * w * e + 2 * b * e
    elif form == "folded":
        forward, backward = 2 * d * w + w * e + b * e, 2 * d * w + w * w + 2 * w * e + d * e + 2 * b * e
    elif form == "core":
        forward, backward = d * (d + e) + b * e, 2 * d * (d + e) + d * e + 2 * b * e
    elif form == "merged":
        forward, backward = 0, b * d
    else:
        raise ValueError(f"form={form!r} is unknown; allowed: {', '.join(map(repr, FORMS))}")
    if shape.transposed and form != "merged":
        backward -= e * (d if form == "core" else w)  # z is kept, not recomputed
    return forward + (backward if grad else 0)


def build_cost(form: str, shape: LayerShape, extra: int) -> float:
    """Multiply-adds to build a form's matrices, once per preparation."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    if form == "factored":
        return 0
    folded = (w + e) * w * d + w * w * d
    if form == "folded":
        return folded
    if form == "core":
        return folded + d * d * w
    return folded + b * d * w + b * (w + e) * d


def call_cost(form: str, shape: LayerShape, extra: int, grad: bool) -> float:
    """Multiply-adds of one backward that do not depend on tokens: from dE or dW' to dM and dF."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    if not grad or form in ("factored", "folded"):
        return 0
    if form == "core":
        return d * (d + e) * w + d * w * w
    return b * d * w + b * (w + e) * d + d * (w + e) * w + b * d * e


def plan(
    shape: LayerShape, extra: int, tokens: int, seen: int, grad: bool, built: frozenset[str],
    forms: tuple[str, ...] = FORMS,
) -> str:  # fmt: skip
    """The cheapest of `forms` for `tokens` rows.

    Args:
        extra: e, the columns of F.
        seen: tokens that this preparation has served before, taken to have come in calls like this one.
        grad: whether a backward with parameter gradients follows.
        built: the forms whose matrices exist already.
    """
    calls = 1 + seen / max(1, tokens)

    def cost(form: str) -> float:
        build = 0 if form in built else build_cost(form, shape, extra)
        running = token_cost(form, shape, extra, grad) * (tokens + seen) + calls * call_cost(form, shape, extra, grad)
        return running + build

    return min(forms, key=cost)


def joins(tokens: int, d: int, extra: int) -> bool:
    """Whether to copy [W0 | F] together (2b(d + e) numbers) and save the second pass over T x b numbers."""
    return extra > 0 and tokens >= d + extra


def launches(form: str, shape: LayerShape, extra: int, tokens: int, grad: bool, size: int) -> list[Traffic]:
    """What the Triton path launches beyond the frozen layer's products, for `tokens` rows of `size` bytes a number."""
    d, b, w, e, t = shape.d, shape.large, shape.width, extra, tokens
    if form == "merged":
        return [traffic.product(b, t, d, size)] if grad else []
    one_pass = w <= 128
    grow, shrink = traffic.product(t, e, b, size, addend=True), traffic.product(t, b, e, size)  # z F^T, x F
    if joins(t, d, e):
        grow = shrink = Traffic(size * (2 * b * (d + e) + (t + b) * e), 2 * t * e * b)
    out = traffic.expand(t, d, w, e, size, one_pass=one_pass, store_h=grad and shape.transposed)
    back = traffic.contract(t, d, w, e, size, one_pass=one_pass, store_g=grad)
    if not grad:
        return [back, shrink] if shape.transposed else [out, grow]
    gradients = [traffic.token_product(t, w + e, w, size, 4), traffic.token_product(t, b, e, size, 4)]
    again = [] if shape.transposed else [traffic.product(t, d, w, size), traffic.product(t, w, e, size)]  # h, z
    return [out, back, grow, shrink, *again, *gradients]


def build_launches(form: str, shape: LayerShape, extra: int) -> list[Traffic]:
    """What builds a form's matrices, in float32."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    folded = [traffic.product(w + e, w, d, 4), traffic.product(w, w, d, 4)]
    return folded if form == "folded" else [*folded, traffic.contract(b, d, w, e, 4, one_pass=False)]


def call_launches(form: str, shape: LayerShape, extra: int, grad: bool) -> list[Traffic]:
    """What one backward adds whatever its tokens, in float32."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    if not grad or form == "folded":
        return []
    return [traffic.product(b, d, w, 4), traffic.product(w + e, b, d, 4), traffic.product(w + e, d, w, 4),
            traffic.product(b, d, e, 4)]  # fmt: skip


def plan_kernels(
    shape: LayerShape,
    extra: int,
    tokens: int,
    seen: int,
    grad: bool,
    built: frozenset[str],
    size: int,
    machine: Machine,
) -> str:
    """folded or merged, whichever has the lower floor for `tokens` rows; arguments as for `plan`."""
    calls = 1 + seen / max(1, tokens)

    def seconds(form: str) -> float:
        build = [] if form in built else build_launches(form, shape, extra)
        running = sum(t.seconds(machine) for t in launches(form, shape, extra, tokens, grad, size))
        fixed = sum(t.seconds(machine, single=True) for t in call_launches(form, shape, extra, grad))
        return calls * (running + fixed) + sum(t.seconds(machine, single=True) for t in build)

    return min(("folded", "merged"), key=seconds)


class History(Protocol):
    """What the planner reads of a preparation."""

    shape: LayerShape
    config: SSVDOConfig
    tokens: int
    expected: int
    choices: dict[int, str]

    @property
    def extra(self) -> int: ...
    @property
    def built(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class Work:
    """One forward: its rows, whether parameters get gradients, what computes it, on what, and whether W0 is held dense
    (where it is not, nobody wants W' beside it)."""

    tokens: int
    grad: bool
    backend: str
    dtype: torch.dtype
    device: torch.device
    held: bool = True


ALIKE = ("factored", "folded")
"""Forms that save the same tensors for backward."""


def choose(prepared: History, work: Work) -> str:
    """The form for one forward through a preparation: the configuration's, or the cheapest."""
    if prepared.config.path != "auto":
        return prepared.config.path
    seen = max(prepared.tokens, prepared.expected - work.tokens)
    if work.backend == "triton" and not work.held:
        form = "folded"
    elif work.backend == "triton":
        name = torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else ""
        peaks = machine(name, work.dtype, torch.backends.cuda.matmul.allow_tf32)
        form = plan_kernels(prepared.shape, prepared.extra, work.tokens, seen, work.grad, prepared.built,
                            work.dtype.itemsize, peaks)  # fmt: skip
    else:
        form = plan(prepared.shape, prepared.extra, work.tokens, seen, work.grad, prepared.built,
                    FORMS if work.held else SMALL)
    if not work.grad:
        return form
    # Activation checkpointing runs a forward twice and needs the same tensors saved: within a preparation, forwards of
    # as many rows keep to forms that save alike.
    first = prepared.choices.setdefault(work.tokens, form)
    return form if form == first or (form in ALIKE and first in ALIKE) else first
