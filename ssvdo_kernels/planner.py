"""Which form computes a forward: the one that costs least, counted in floating-point operations.

Per token (multiply-adds, e = l + q, w = max(k, l), m*n the frozen product, b = max(m, n), d = min(m, n)):

    form       forward                     backward (with parameter gradients)
    factored   2dw + w^2 + we + be         2dw + 2w^2 + 2we + 2be
    folded     2dw + we + be               2dw + w^2 + we + de + 2be
    core       d(d + e) + be               2d(d + e) + 2be
    merged     0                           dw + bw                   (dC, of A' = A + C V^T)

A form's matrices are built once per preparation. Whether that pays depends on the tokens still to come, which nobody
knows; so the planner rents until renting has cost what buying would have (the ski-rental rule): it counts the tokens
that this preparation, or the one before it, has already served as if they came again. Within one preparation it is
never worse than twice the best in hindsight.

The core form, besides, brings the gradient of E to the parameters' matrices once a backward, however few its tokens;
the merged form that of C, once for all the backwards of a gradient accumulation.

With the Triton kernels the choice is between folded, core and merged, by the larger of the bandwidth and the arithmetic
floor of every launch (traffic.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from . import traffic
from .config import LayerShape, SSVDOConfig
from .traffic import Machine, Traffic, machine, tf32

FORMS = ("factored", "folded", "core", "merged")
SMALL = FORMS[:3]
"""Forms without W'."""


def token_cost(form: str, shape: LayerShape, extra: int, grad: bool) -> float:
    """Multiply-adds per token beyond the frozen layer's m*n (forward) and m*n (backward)."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    if form == "factored":
        forward, backward = 2 * d * w + w * w + w * e + b * e, 2 * d * w + 2 * w * w + 2 * w * e + 2 * b * e
    elif form == "folded":
        forward, backward = 2 * d * w + w * e + b * e, 2 * d * w + w * w + w * e + d * e + 2 * b * e
    elif form == "core":
        forward, backward = d * (d + e) + b * e, 2 * d * (d + e) + 2 * b * e
    elif form == "merged":
        forward, backward = 0, (b + d) * w
    else:
        raise ValueError(f"form={form!r} is unknown; allowed: {', '.join(map(repr, FORMS))}")
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
    """Multiply-adds of one backward that do not depend on tokens: from dE or dC to dM and dF."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    if not grad or form in ("factored", "folded"):
        return 0
    if form == "core":
        return d * (d + e) * w + d * w * w
    return b * d * w + d * w * w + 2 * b * e * w


@lru_cache(maxsize=1024)
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


def keeps_joined(tokens: int, large: int, d: int, extra: int) -> bool:
    """Whether [W0 | F] is kept between steps: where the layer's own rows take 16 times its memory."""
    return tokens * (d + large) >= 16 * large * (d + extra)


def launches(
    form: str, shape: LayerShape, extra: int, tokens: int, grad: bool, size: int, machine: Machine | None = None
) -> list[Traffic]:
    """What the Triton path launches beyond the frozen layer's products, for `tokens` rows of `size` bytes a number.

    machine: whose cache tells whether dF is taken in chunks. V of more than 128 columns is counted as two launches,
    which it takes unless one pass has been timed faster.
    """
    d, b, w, e, t, wide = shape.d, shape.large, shape.width, extra, tokens, shape.transposed
    if form == "merged":
        return [traffic.product(t, d, w, size), traffic.over_tokens(t, b, w, size)] if grad else []
    large = traffic.product(t, e, b, size, addend=True), traffic.product(t, b, e, size)  # z F^T, x F
    joining = joins(t, d, e)
    if joining:
        more = Traffic(size * (t + b) * e, 2 * t * e * b)
        made = traffic.copy(b * e if keeps_joined(t, b, d, e) else b * (d + e), size)
        beside = Traffic(0, 0) if form == "core" else traffic.copy(t * e, size)  # z to its place in g
        large = more + made, more + (Traffic(0, 0) if keeps_joined(t, b, d, e) else made) + beside
    grow, shrink = large
    if form == "core":
        out, back = traffic.product(t, d, d + e, size), traffic.product(t, d + e, d, size)
        small = traffic.over_tokens(t, d + e, d, size)
    else:
        one_pass = w <= 128
        out = traffic.expand(t, d, w, e, size, one_pass=one_pass, keep=grad)
        back = traffic.contract(t, d, w, e, size, one_pass=one_pass, keep=grad)
        small = traffic.over_tokens(t, w + e, w, size)
    if not grad:
        return [back, shrink] if wide else [out, grow]
    chunked = joining and not wide and machine is not None and machine.chunk(t, b * size, d + e) > 0
    return [out, back, grow, shrink, small, traffic.over_tokens(t, b, e, size, cached=chunked)]


def build_launches(form: str, shape: LayerShape, extra: int) -> list[Traffic]:
    """What builds a form's matrices, in float32."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    folded = [traffic.product(w + e, w, d, 4), traffic.product(w, w, d, 4)]
    if form == "folded":
        return folded
    return [*folded, traffic.product(d, w, d + e, 4) if form == "core" else
            traffic.contract(b, d, w, e, 4, one_pass=False)]  # fmt: skip


def call_launches(form: str, shape: LayerShape, extra: int, grad: bool, size: int) -> list[Traffic]:
    """What one backward adds whatever its tokens, in their dtype."""
    d, b, w, e = shape.d, shape.large, shape.width, extra
    if not grad or form == "folded":
        return []
    if form == "core":
        return [traffic.product(d + e, d, w, size), traffic.product(w, d, w, size)]
    return [traffic.over_tokens(b, d, w, size), traffic.product(w, d, w, 4), traffic.product(e, b, w, 4),
            traffic.product(b, w, e, 4)]  # fmt: skip


@lru_cache(maxsize=1024)
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
    """folded, core or merged, whichever has the lowest floor for `tokens` rows; arguments as for `plan`."""
    calls = 1 + seen / max(1, tokens)

    def seconds(form: str) -> float:
        build = [] if form in built else build_launches(form, shape, extra)
        running = launches(form, shape, extra, tokens, grad, size, machine)
        each = sum(t.seconds(machine) for t in (*running, *call_launches(form, shape, extra, grad, size)))
        return calls * each + sum(t.seconds(machine, single=True) for t in build)

    return min(("folded", "core", "merged"), key=seconds)


def peaks(device: torch.device, dtype: torch.dtype) -> Machine:
    """The data sheet of a device, for tokens of a dtype."""
    return _peaks(device, dtype, dtype == torch.float32 and tf32())


@lru_cache(maxsize=64)
def _peaks(device: torch.device, dtype: torch.dtype, tf32: bool) -> Machine:
    return machine(torch.cuda.get_device_name(device) if device.type == "cuda" else "", dtype, tf32)


class History(Protocol):
    """What the planner reads of a preparation, and what it remembers there.

    built: the forms whose matrices exist. plans: what was found for the same layer before.
    """

    shape: LayerShape
    tokens: int
    expected: int
    choices: dict[int, str]
    plans: dict[tuple[object, ...], str]

    @property
    def extra(self) -> int: ...
    @property
    def built(self) -> frozenset[str]: ...


class Work(NamedTuple):
    """One forward: its rows, whether parameters get gradients, what computes it, on what, and whether W0 is held dense
    (where it is not, nobody wants W' beside it)."""

    tokens: int
    grad: bool
    backend: str
    dtype: torch.dtype
    device: torch.device
    held: bool = True


PLANS = 1024
"""How many of a layer are remembered at a time: ragged batches bring ever new numbers of rows."""
ALIKE = ("factored", "folded")
"""Forms that save the same tensors for backward."""


def given(config: SSVDOConfig, merged: bool) -> str:
    """The form that a layer takes without being asked; "" where it is to be chosen."""
    return "merged" if merged else "" if config.path == "auto" else config.path


def choose(prepared: History, work: Work) -> str:
    """The cheapest form for one forward through a preparation."""
    seen = _leading_bits(max(prepared.tokens, prepared.expected - work.tokens))
    key = work, seen, prepared.built
    form = prepared.plans.get(key)
    if form is None:
        if len(prepared.plans) >= PLANS:
            prepared.plans.clear()
        form = prepared.plans[key] = _planned(prepared, work, seen)
    if not work.grad:
        return form
    # Activation checkpointing runs a forward twice and needs the same tensors saved: within a preparation, forwards of
    # as many rows keep to forms that save alike.
    first = prepared.choices.setdefault(work.tokens, form)
    return form if form == first or (form in ALIKE and first in ALIKE) else first


def _leading_bits(count: int) -> int:
    """The count to three bits, so that a decision stands for a while: at most an eighth below it."""
    less = max(0, count.bit_length() - 4)
    return count >> less << less


def _planned(prepared: History, work: Work, seen: int) -> str:
    if work.backend != "triton":
        return plan(prepared.shape, prepared.extra, work.tokens, seen, work.grad, prepared.built,
                    FORMS if work.held else SMALL)  # fmt: skip
    if not work.held:
        return "folded"
    return plan_kernels(prepared.shape, prepared.extra, work.tokens, seen, work.grad, prepared.built,
                        work.dtype.itemsize, peaks(work.device, work.dtype))  # fmt: skip
