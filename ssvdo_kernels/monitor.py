"""Watching a training: the adapters' diagnostics every so many steps, and the loss on what must not be forgotten."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .diagnostics import LayerReport, orthogonality
from .host import hosts, warn_of_untrained


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is out of range; allowed: an integer >= 1")


class DiagnosticsMonitor:
    """`orthogonality(model)` every `every` steps of a plain loop.

        monitor = DiagnosticsMonitor(model, every=100, csv_path="diagnostics.csv")
        for batch in data:
            ...
            optimiser.step()
            monitor.step()

    Attributes:
        history: (step, reports) of each time it looked.

    At the first look a warning names adapters that have learnt nothing while others have.

    Args:
        every: optimiser steps between two looks, at least 1; a look costs about one preparation a layer.
        csv_path: each look adds its rows (step and LayerReport's fields) to this file; one that is there is replaced
            at the first look.

    Raises:
        ValueError: every < 1.

    Examples:
        >>> monitor = DiagnosticsMonitor(model, every=2)
        >>> for step in range(4):
        ...     loss = model(x).square().mean().backward()
        ...     optimiser.step()
        ...     reports = monitor.step()
        >>> [step for step, reports in monitor.history]
        [2, 4]
    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, csv_path: str | os.PathLike[str] | None = None
    ) -> None:
        _positive("every", every)
        self.model, self.every = model, every
        self.csv_path = None if csv_path is None else Path(csv_path)
        self.steps = 0
        self.history: list[tuple[int, list[LayerReport]]] = []

    def step(self) -> list[LayerReport] | None:
        """Counts an optimiser step; the reports when it is time to look, else None."""
        self.steps += 1
        return self.look(self.steps) if self.steps % self.every == 0 else None

    def look(self, step: int) -> list[LayerReport]:
        """Looks now, and keeps what it sees under the number `step`."""
        reports = orthogonality(self.model)
        first = not self.history
        if first:
            warn_of_untrained([(a.name, a) for _, h in hosts(self.model) for a in h.adapters()], stacklevel=4)
        self.history.append((step, reports))
        if self.csv_path is not None:
            with self.csv_path.open("w" if first else "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["step", *(f.name for f in fields(LayerReport))], lineterminator="\n")
                if first:
                    writer.writeheader()
                writer.writerows({"step": step, **asdict(report)} for report in reports)
        return reports


@dataclass(frozen=True)
class Forgetting:
    """Mean loss on the source batches: before training, now, and how much it grew (negative: it fell)."""

    step: int
    before: float
    now: float

    @property
    def increase(self) -> float:
        """now - before."""
        return self.now - self.before


class ForgettingMonitor:
    """The loss on a few batches of the source domain, before and while a model learns another one.

        monitor = ForgettingMonitor(model, source_batches, lambda model, batch: model(**batch).loss)
        ...                                     # train on the target
        print(monitor.measure().increase)

    The batches are kept and used each time, so that only the model differs. It measures in eval mode without gradients
    and puts the modes back. Constructing it measures `before`: do that before the first step.

    Args:
        loss: (model, batch) -> the batch's mean loss, a tensor of one number.

    Raises:
        ValueError: there are no batches, or a loss is not one finite number.

    Examples:
        >>> monitor = ForgettingMonitor(model, [x], lambda model, x: model(x).square().mean())
        >>> monitor.measure().increase  # nothing was trained between
        0.0
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> None:
        self.model, self.batches, self.loss = model, list(batches), loss
        if not self.batches:
            raise ValueError("batches is empty; at least one batch of the source domain is needed")
        self.before = self._mean()
        self.history: list[Forgetting] = []

    def measure(self, step: int = 0) -> Forgetting:
        """The loss now beside the one before; kept in `history` under the number `step`."""
        found = Forgetting(step, self.before, self._mean())
        self.history.append(found)
        return found

    @torch.no_grad()
    def _mean(self) -> float:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            losses = [self.loss(self.model, batch) for batch in self.batches]
        finally:
            for module, training in modes.items():
                module.training = training
        for value in losses:
            if value.numel() != 1 or not bool(torch.isfinite(value)):
                raise ValueError(f"loss returned {value!r}; allowed: one finite number")
        return sum(float(v) for v in losses) / len(losses)
