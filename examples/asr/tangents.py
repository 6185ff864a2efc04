"""How much of the full gradient each method can follow in its first step, at one budget.

    python -m examples.asr.tangents [--batches 6]        # Whisper tiny.en on the children of corpus "speech"

A method that starts at W0 can move W' in some directions; the share is the energy (squared norm) of dLoss/dW0 that lies
in them. LoRA (B = 0): dW = B A for any B, A as it was drawn. SSVD-O: U_k diag(ds) V_k^T, U_k diag(S_k) K V_k^T with K
skew, and N V_l^T with N orthogonal to U. It says what can be learnt first, not what an optimiser makes of it.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.budget import chosen, layer_matrices, lora_rank, trained_numbers
from ssvdo_kernels.config import LayerShape

from .corpus import batches, features
from .methods import FEED_FORWARD
from .options import COUNT
from .readers import open_corpus
from .tables import markdown
from .train import loss_of
from .whisper import load_whisper, prompt_of


def shares(weight: Tensor, gradient: Tensor, shape: LayerShape, rank: int, seed: int = 0) -> dict[str, float]:
    """Energy of `gradient` along LoRA's directions and each part's of SSVD-O, and all of it. Both: out x in."""
    W, D = weight.double(), gradient.double()
    drawn = torch.randn(W.shape[1], rank, dtype=W.dtype, generator=torch.Generator().manual_seed(seed))
    lora = (D @ torch.linalg.qr(drawn).Q).square().sum()
    if shape.transposed:
        W, D = W.T, D.T
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    k = shape.k
    inside, weights = U[:, :k].T @ D @ Vh[:k].T, S[:k, None] * torch.ones(k, dtype=W.dtype)
    turned = (weights * inside - (weights * inside).T).square() / (weights.square() + weights.T.square())
    new = D @ Vh[: shape.l].T
    new = new - U @ (U.T @ new)
    parts = {"LoRA": lora, "inner_rotation": turned.triu(1).sum(), "inner_scale": inside.diagonal().square().sum(),
             "outer": new.square().sum(), "all": D.square().sum()}  # fmt: skip
    return {name: float(value) for name, value in parts.items()}


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
    """Prints a row per kind of layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=COUNT, default=6, help="of 8 utterances (default: 6)")
    count = parser.parse_args(arguments).batches
    model, tokenizer = load_whisper("tiny.en", 10)
    config = SSVDOConfig(inner_ratio=0.5, outer_rank=24, target_modules=FEED_FORWARD)
    matrices = layer_matrices(model, config)
    rank = lora_rank(matrices, trained_numbers(model, config))
    layers = {name: shape for name, (_, shape) in chosen(matrices, config).items()}
    said = open_corpus("speech").of("child", "train")[: 8 * count]
    source = batches(features(said, 10), said, tokenizer, 8, 0, prompt_of(model))
    found = gradients(model, list(layers), [next(source) for _ in range(count)])
    sums: dict[str, dict[str, float]] = {}
    for name, shape in layers.items():
        parts = shares(model.get_submodule(name).weight.detach(), found[name], shape, rank)  # type: ignore[operator]
        for kind in (" ".join(name.split(".")[1::3]), "all layers"):
            own = sums.setdefault(kind, dict.fromkeys(parts, 0.0))
            for part, energy in parts.items():
                own[part] += energy
    columns = ("LoRA", "inner_rotation", "inner_scale", "outer")
    print(markdown(["layers", *columns, "SSVD-O"], [
        [kind, *(f"{own[c] / own['all']:.2%}" for c in columns), f"{sum(own[c] for c in columns[1:]) / own['all']:.2%}"]
        for kind, own in sums.items()]))  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
