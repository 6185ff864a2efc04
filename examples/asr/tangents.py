"""How much of the full gradient each method can follow in its first step, and how far Adam then moves, at one budget.

    python -m examples.asr.tangents [--batches 6]        # Whisper tiny.en on the children of corpus "speech"

A method that starts at W0 can move W' in some directions; the share is the energy (squared norm) of dLoss/dW0 that lies
in them. LoRA (B = 0): dW = B A for any B, A as it was drawn. SSVD-O: U_k diag(ds) V_k^T, U_k diag(S_k) K V_k^T with K
skew, and N V_l^T with N orthogonal to U. It says what can be learnt first, not what an optimiser makes of it.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.budget import chosen, layer_matrices, lora_rank, trained_numbers
from ssvdo_kernels.config import LayerShape

from .corpus import batches, features
from .methods import FEED_FORWARD, adapt
from .options import COUNT, as_script
from .readers import open_corpus
from .tables import markdown
from .train import loss_of
from .whisper import load_whisper, prompt_of

PARTS = ("inner_rotation", "inner_scale", "outer")
STEPS = (*(("ssvdo", part, 2e-4) for part in PARTS), ("lora", "lora_B", 2e-3))
SPLITS = ((0.5, 24), (0.003, 40), (0.25, 36), (0.75, 4), (0.78, 0))  # (p, l), nearly one size


def lora_share(gradient: Tensor, rank: int, seed: int = 0) -> float:
    """Energy of `gradient` (out x in) in the rows that a drawn A (rank x in) spans."""
    drawn = torch.randn(gradient.shape[1], rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return float((gradient.double() @ torch.linalg.qr(drawn).Q).square().sum())


def shares(weight: Tensor, gradient: Tensor, shapes: Sequence[LayerShape]) -> list[dict[str, float]]:
    """Energy of `gradient` along each part of SSVD-O, for each of several k and l. Both matrices: out x in."""
    W, D = weight.double(), gradient.double()
    if shapes[0].transposed:
        W, D = W.T, D.T
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    inside = U.T @ D @ Vh.T
    outside = (D @ Vh.T - U @ inside).square().sum(0)
    scaled = S[:, None] * inside
    turned = (scaled - scaled.T).square() / (S.square()[:, None] + S.square())
    return [{"inner_rotation": float(turned[: s.k, : s.k].triu(1).sum()),
             "inner_scale": float(inside.diagonal()[: s.k].square().sum()),
             "outer": float(outside[: s.l].sum())} for s in shapes]  # fmt: skip


@torch.no_grad()
def moved(model: WhisperForConditionalGeneration, settings: Mapping[str, Any], part: str, rate: float) -> float:
    """|W' - W0| over all layers after every number of one part moved by `rate`, up or down, as in Adam's first step."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapted, generator = adapt(copy.deepcopy(model), {**settings, "init_angle": 0.0}), torch.Generator().manual_seed(0)
    for name, p in adapted.model.named_parameters():
        if p.requires_grad and part in name.split("."):
            p += rate * (2 * torch.randint(0, 2, p.shape, generator=generator) - 1)
    after = dict(adapted.bake().named_parameters())
    return math.sqrt(sum(float((after[name] - W).square().sum()) for name, W in before.items()))


def gradients(model: nn.Module, names: list[str], source: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """The mean gradient over batches of the named layers' weights."""
    weights = [model.get_submodule(name).weight for name in names]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)  # type: ignore[operator]
    total = [torch.zeros_like(w) for w in weights]  # type: ignore[arg-type]
    for batch in source:
        for sum_, own in zip(total, torch.autograd.grad(loss_of(model, batch), weights), strict=True):  # type: ignore[arg-type]
            sum_ += own / len(source)
    return dict(zip(names, total, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Prints a row per method and split of the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=COUNT, default=6, help="of 8 utterances (default: 6)")
    count = parser.parse_args(arguments).batches
    model, tokenizer = load_whisper("tiny.en", 10)
    steps = []
    for method, part, rate in STEPS:
        settings = {"method": method, "inner_ratio": SPLITS[0][0], "outer_rank": SPLITS[0][1]}
        steps.append([method, part, f"{rate:g}", f"{moved(model, settings, part, rate):.2g}"])
    print(markdown(["method", "part", "rate", "norm of W' - W0 after a step"], steps) + "\n")
    configs = [SSVDOConfig(inner_ratio=p, outer_rank=rank, target_modules=FEED_FORWARD) for p, rank in SPLITS]
    matrices = layer_matrices(model, configs[0])
    rank = lora_rank(matrices, trained_numbers(model, configs[0]))
    said = open_corpus("speech").of("child", "train")[: 8 * count]
    source = batches(features(said, 10), said, tokenizer, 8, 0, prompt_of(model))
    found = gradients(model, list(matrices), [next(source) for _ in range(count)])
    total, lora, parts = 0.0, 0.0, [dict.fromkeys(PARTS, 0.0) for _ in SPLITS]
    for name, own in found.items():
        total += float(own.double().square().sum())
        lora += lora_share(own, rank)
        shapes = [chosen({name: matrices[name]}, c)[name][1] for c in configs]
        for sums, split in zip(parts, shares(model.get_submodule(name).weight.detach(), own, shapes), strict=True):  # type: ignore[operator]
            for part, energy in split.items():
                sums[part] += energy
    rows = [[f"LoRA r = {rank}", f"{trained:,}", "-", "-", "-", f"{lora / total:.1%}"]
            for trained in [rank * sum(m.out_features + m.in_features for m in matrices.values())]]  # fmt: skip
    for config, sums in zip(configs, parts, strict=True):
        name, size = f"SSVD-O p = {config.inner_ratio:g}, l = {config.outer_rank}", trained_numbers(model, config)
        rows.append([name, f"{size:,}", *(f"{energy / total:.1%}" for energy in sums.values()),
                     f"{sum(sums.values()) / total:.1%}"])  # fmt: skip
    print(markdown(["method", "trained", *PARTS, "all of it"], rows))
    return 0


if __name__ == "__main__":
    as_script(main)
