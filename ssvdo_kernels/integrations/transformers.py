"""Hugging Face Trainer: diagnostics and forgetting as a callback."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..monitor import DiagnosticsMonitor, ForgettingMonitor


class SSVDOCallback(TrainerCallback):  # type: ignore[misc]
    """Looks at the adapters, and at a source domain's loss, every so many optimiser steps, and logs what it sees.

        monitor = DiagnosticsMonitor(model, every=100)
        Trainer(..., callbacks=[SSVDOCallback(monitor, ForgettingMonitor(model, source_batches, loss))])

    Logged with the Trainer's next log, wherever it reports to: ssvdo/drift, ssvdo/inner_angle, ssvdo/outer_angle,
    ssvdo/orthonormality (the largest over the layers), ssvdo/source_loss and ssvdo/source_loss_increase.

    Args:
        monitor: its `every` sets how often both look; it counts the Trainer's global steps.
        forgetting: None leaves the source domain out.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> callback = SSVDOCallback(DiagnosticsMonitor(model, every=100))
        >>> trainer = Trainer(model, TrainingArguments("runs", report_to="none"), callbacks=[callback])
    """

    def __init__(self, monitor: DiagnosticsMonitor, forgetting: ForgettingMonitor | None = None) -> None:
        self.monitor, self.forgetting = monitor, forgetting
        self.pending: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks when it is time."""
        if state.global_step % self.monitor.every:
            return
        reports = self.monitor.look(state.global_step)
        for name in ("drift", "inner_angle", "outer_angle", "orthonormality"):
            self.pending[f"ssvdo/{name}"] = max(getattr(report, name) for report in reports)
        if self.forgetting is not None:
            found = self.forgetting.measure(state.global_step)
            self.pending |= {"ssvdo/source_loss": found.now, "ssvdo/source_loss_increase": found.increase}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds what was seen since the last log. Reporters that stand before this callback log before it is added."""
        if logs is not None and self.pending:
            logs.update(self.pending)
            if state.log_history:
                state.log_history[-1].update(self.pending)
            self.pending = {}
