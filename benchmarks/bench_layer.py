"""Forward and backward of one layer: SSVD-O, its forms and its peers, interleaved, as ratios to a frozen nn.Linear."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, gradient_accumulation
from ssvdo_kernels.ops.dispatch import token_path
from ssvdo_kernels.planner import FORMS

from . import memory
from .ceiling import floors, measure
from .peers import peers
from .record import attempt
from .runner import interleave, launches, peak_extra_bytes

EVERY, CACHED, PLAIN = "SSVD-O, prepared every step", "SSVD-O, cached", "SSVD-O, accumulating without the context"
ROUNDS = {128: 15, 1024: 5, 4096: 4}  # on a CPU
ROUNDS_ON_A_GPU = 7  # of up to 20 steps
COMPILED_AT = 16384  # on a GPU, with l = 64: each torch.compile takes seconds
Case = tuple[str, int, int, float, int]  # kind, d, tokens, p, l
FULL_AT = (1024, 2048)  # the token counts at which --quick has every peer, for p = 0.5


def grid(quick: bool, gpu: bool, **given: Sequence[Any] | None) -> list[Case]:
    """The cases, the most telling first. given: kinds, d, tokens, p or rank, in place of the grid's own values."""
    axes: dict[str, Sequence[Any]] = {
        "rank": (64,) if quick else (64, 256, 0) if gpu else (64, 128, 0),
        "p": (0.5, 0.25) if quick else (0.25, 0.5, 1.0),
        "kinds": ("tall", "wide") if quick or gpu else ("tall", "wide", "square"),
        "d": (1024,) if quick or gpu else (256, 512, 1024),
        "tokens": (128, 1024, 4096) if not gpu else (16384, 2048) if quick else (16384, 2048, 65536, 256, 16),
    }  # fmt: skip
    axes |= {name: values for name, values in given.items() if values}
    cases = [(kind, d, tokens, p, 0 if kind == "square" else rank)
             for rank, p, kind, d, tokens in product(*axes.values())]  # fmt: skip
    return list(dict.fromkeys(cases))


def kept(p: float, tokens: int, quick: bool, only: Sequence[str] | None = None) -> tuple[frozenset[str], bool]:
    """(The peers to leave out, whether our forms are timed one by one): --quick has each once, where it tells most.

    only: the peers that are wanted, without our forms.
    """
    if only is not None:
        return frozenset(peers(p, 64)) - {"frozen", *only}, False
    if not quick or (p == 0.5 and tokens in FULL_AT):
        return frozenset(), not quick
    left_out = {"full", "DoRA", "PiSSA", "OFT", "dense SSVD-O"} | (set() if p == 0.5 else {"ESPnet-style SSVD"})
    return frozenset(left_out), p == 0.5 and tokens == 128


def pretrained(kind: str, d: int, device: str, dtype: torch.dtype) -> nn.Linear:
    """The frozen layer that is adapted; the same numbers every time."""
    out_features, in_features = {"tall": (4 * d, d), "wide": (d, 4 * d), "square": (d, d)}[kind]
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, device=device, dtype=dtype).requires_grad_(False)


@lru_cache(maxsize=1)
def make_peers(
    kind: str, d: int, p: float, rank: int, device: str, dtype: torch.dtype
) -> tuple[nn.Linear, Callable[[str], nn.Module]]:
    """The pretrained layer and its peers by name; kept for the next token count, because most begin with an SVD."""
    linear, makers = pretrained(kind, d, device, dtype), peers(p, rank)
    return linear, lru_cache(maxsize=None)(lambda name: makers[name](linear))


def adapted(linear: nn.Linear, p: float, rank: int, cache: Path, path: str = "auto") -> SSVDOLinear:
    """Our layer."""
    return SSVDOLinear.from_linear(linear, SSVDOConfig(inner_ratio=p, outer_rank=rank, path=path), cache_dir=cache)


def peaked(case: Case, quick: bool, gpu: bool) -> bool:
    """Whether peaks are taken of this case: on a CPU, where each takes a process of its own, at one token count."""
    kind, _, tokens, p, _ = case
    return tokens in FULL_AT and p == 0.5 and kind == "tall" if quick else gpu or tokens in FULL_AT


def layer_peak(case: Case, name: str, cache: Path, device: str, dtype: torch.dtype) -> float | None:
    """MiB that training steps of one method take beyond the pretrained layer, and the tokens and their gradients."""
    kind, d, tokens, p, rank = case

    def peak(d: int, tokens: int, rank: int) -> float | None:
        plain = pretrained(kind, d, device, dtype)
        x = torch.randn(tokens, plain.in_features, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(tokens, plain.out_features, device=device, dtype=dtype)
        del plain

        def make(linear: nn.Module) -> nn.Module:
            assert isinstance(linear, nn.Linear)
            return adapted(linear, p, rank, cache) if name == EVERY else peers(p, rank)[name](linear)

        def step_of(module: nn.Module) -> Callable[[], None]:
            return training_step(module, x, dy, module.refresh if isinstance(module, SSVDOLinear) else None)

        return memory.training_peak(lambda: pretrained(kind, d, device, dtype), make, step_of, torch.device(device))

    peak(64, 8, min(rank, 32))  # loads what the method needs of libraries, which is not the method's
    return peak(d, tokens, rank)


def peak_of(case: Case, cache: Path, device: str, dtype: torch.dtype, name: str) -> float | None:
    """`layer_peak` where it can be told: here on a GPU, else in a process of its own. None for compiled methods."""
    if name.endswith("compiled"):
        return None
    arguments = (case, name, cache, device, dtype)
    found: float | None = layer_peak(*arguments) if device.startswith("cuda") else memory.alone(
        layer_peak, *arguments)
    return found


peaks = lru_cache(maxsize=1)(measure)


def training_step(
    module: nn.Module, x: Tensor, dy: Tensor, before: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Forward and backward from a fixed dy, gradients to x and to what trains (summed, as when accumulating)."""

    def step() -> None:
        if before is not None:
            before()
        x.grad = None
        module(x).backward(dy)

    return step


@contextmanager
def contenders(
    case: Case, quick: bool, device: torch.device, dtype: torch.dtype, cache: Path, only: Sequence[str] | None
) -> Iterator[tuple[dict[str, Callable[[], None]], dict[str, nn.Module]]]:
    """(steps, modules) by name; those cached are inside `gradient_accumulation` until this is left."""
    kind, d, tokens, p, rank = case
    linear, make = make_peers(kind, d, p, rank, str(device), dtype)
    left_out, by_form = kept(p, tokens, quick, only)
    modules = {name: make(name) for name in peers(p, rank) if name not in left_out}
    x = torch.randn(tokens, linear.in_features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, linear.out_features, device=device, dtype=dtype)
    ours = partial(adapted, linear, p, rank, cache)
    if device.type == "cuda" and not quick and tokens == COMPILED_AT and rank == 64:
        for name in ("LoRA", "dense SSVD-O"):
            modules[f"{name}, compiled"] = torch.compile(make(name))  # type: ignore[assignment]
        modules["SSVD-O, compiled"] = torch.compile(ours())  # type: ignore[assignment]
    steps = {name: training_step(module, x, dy) for name, module in modules.items()}
    modules[EVERY] = fresh = ours()
    steps[EVERY] = training_step(fresh, x, dy, fresh.refresh)
    if not quick or tokens < 4096:
        steps[PLAIN] = training_step(ours(), x, dy)
    modules[CACHED] = ours()
    served = token_path("auto", device, dtype)[0]
    forms = (("folded", "merged") if served == "triton" else FORMS) if by_form else ()
    with ExitStack() as stack:
        for name, layer in {CACHED: modules[CACHED], **{f"form: {form}": ours(path=form) for form in forms}}.items():
            stack.enter_context(gradient_accumulation(layer))
            steps[name] = training_step(layer, x, dy)
        yield steps, modules


def warm(steps: dict[str, Callable[[], None]]) -> dict[str, str]:
    """Runs every step twice, takes out those that fail, and says why: a peer's error costs no other's numbers.

    The planner sees a few batches before it is timed, as it would in accumulation.
    """
    failed = {}
    for name in list(steps):
        found = attempt(lambda step=steps[name]: dict.fromkeys((step(), step())))  # type: ignore[misc]
        if "error" in found:
            failed[name] = found["error"]
            del steps[name]
    return failed


def measure_layer(
    case: Case, quick: bool, device: torch.device, dtype: torch.dtype, cache: Path, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """The row of one point of the grid; only: the peers that are wanted."""
    kind, d, tokens, p, rank = case
    gpu = device.type == "cuda"
    linear, _ = make_peers(kind, d, p, rank, str(device), dtype)
    with contenders(case, quick, device, dtype, cache, only) as (steps, modules):
        failed = warm(steps)
        timings = interleave(steps, ROUNDS_ON_A_GPU if gpu else ROUNDS.get(tokens, 5), "frozen", device)
        measured = [n for n in modules if n in steps and (not quick or (p == 0.5 and tokens in FULL_AT))]
        extra = {name: peak_extra_bytes(steps[name], device) / 1e6 for name in measured}
        started = {name: launches(steps[name]) for name in modules if name in steps} if gpu else {}
    cached, fresh = modules.pop(CACHED), modules[EVERY]
    assert isinstance(cached, SSVDOLinear) and isinstance(fresh, SSVDOLinear)
    floor, least = floors(fresh.adapter.shape, fresh.adapter.prepared(fresh.base()).extra, tokens, dtype.itemsize,
                          peaks(device, dtype))
    kept_beside = memory.beside(modules, linear, linear.weight.nbytes)
    chosen = cached.adapter.plan(tokens, cached.base())
    del steps, modules, fresh, cached
    gc.collect()
    most = memory.peaks(kept_beside, partial(peak_of, case, cache, str(device), dtype)) if peaked(
        case, quick, gpu) else {}
    forms = {name.removeprefix("form: "): t.median_ms for name, t in timings.items() if name.startswith("form: ")}
    return {
        "case": {"kind": kind, "d": d, "tokens": tokens, "p": p, "l": rank},
        "methods": {name: {**asdict(t), "peak_extra_mb": extra.get(name), "launches": started.get(name),
                           "tokens_per_second": 1e3 * tokens / t.median_ms, **kept_beside.get(name, {}),
                           "peak_mib": most.get(name)} for name, t in timings.items()},
        "failed": failed,
        "planner": {"chosen": chosen, "fastest": min(forms, key=forms.__getitem__) if forms else None,
                    "loss": forms[chosen] / min(forms.values()) - 1 if forms else None},
        "floor": {"frozen_ms": 1e3 * floor, "ratio": least / floor},
    }  # fmt: skip
