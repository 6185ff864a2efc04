"""Training: the loss, and an Adam loop that can stop to be looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Batch = tuple[Tensor, Tensor, Tensor]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch (mel, decoder inputs, labels), teacher forced."""
    mel, inputs, labels = (t.to(next(model.parameters()).device) for t in batch)
    scores = model(input_features=mel, decoder_input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def precision(name: str, device: str) -> contextlib.AbstractContextManager[Any]:
    """What "fp32" or "bf16" (autocast; parameters stay float32) means while training or transcribing.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ("fp32", "bf16"):
        raise ValueError(f"precision={name!r} is unknown; allowed: 'fp32', 'bf16'")
    return torch.autocast(device, torch.bfloat16) if name == "bf16" else contextlib.nullcontext()


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What is trained, by each parameter's own name."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(name.rpartition(".")[2], []).append(parameter)
    return found


def _groups(model: nn.Module, rate: float, part_rates: Mapping[str, float]) -> list[dict[str, Any]]:
    there = parts(model)
    if unknown := sorted(set(part_rates) - set(there)):
        raise ValueError(f"part_rates names {unknown[0]!r}; the model trains {', '.join(there)}")
    plain = [p for p in model.parameters() if p.requires_grad]
    if not part_rates:
        return [{"params": plain}]
    return [{"params": own, "lr": rate * part_rates.get(name, 1.0)} for name, own in there.items()]


def fine_tune(
    model: nn.Module, data: Iterator[Batch], steps: int, rate: float, *, after: Callable[[int], None] | None = None,
    autocast: str = "fp32", quiet: bool = False, warmup: int = 0, part_rates: Mapping[str, float] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> list[float]:  # fmt: skip
    """Adam (no weight decay) over what requires gradients; the rate falls linearly to zero. Returns the losses.

    after(step) is called with the model in eval mode when `step` optimiser steps are done, for step = 1 to `steps`.
    warmup: so many first steps have the rate times 1 / warmup, 2 / warmup, ... on top. part_rates: factors on the rate
    by the parameter's own name (`outer`, `inner_scale`, ...). optimizer: another than Adam.

    Raises:
        ValueError: part_rates names what the model does not train.
    """
    model.train()
    optimiser = optimizer(_groups(model, rate, part_rates or {}), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: (1 - done / steps) * min(1.0, (done + 1) / max(1, warmup)))
    device = next(model.parameters()).device.type
    losses = []
    with tqdm(total=steps, desc="fine-tuning", unit="step", disable=quiet) as bar:
        for step, batch in zip(range(1, steps + 1), data, strict=False):
            with precision(autocast, device):
                loss = loss_of(model, batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
            if after is not None:
                model.eval()
                after(step)
                model.train()
    model.eval()
    return losses
