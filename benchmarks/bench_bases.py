"""Each kind of base, adapted by SSVD-O and by PEFT's LoRA: time of a training step, and what is kept.

    python -m benchmarks.bench_bases [--tokens 256 1024] [--rounds 15]

and a model in NF4 under QLoRA and under SSVD-O: what is kept, and the peak of a training step.

Ratios are forward + backward against the same kind of layer, frozen, in the same interleaved run. Kept is what lies in
memory between steps, as a multiple of a dense weight in bfloat16: the base, and beside it the adapter's parameters,
frozen factors and prepared matrices.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.host import hosts
from ssvdo_kernels.linear_maps import linear_map

from .memory import Meter, alone, held, storages
from .record import facts, stem
from .runner import interleave

IN, OUT, RANK = 1024, 4096, 64


def _linear(m: int, n: int) -> nn.Module:
    return nn.Linear(n, m)


def _nf4(m: int, n: int) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(n, m, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=True)
    layer.load_state_dict(nn.Linear(n, m).state_dict())
    return layer.to("cpu")  # type: ignore[no-any-return]


def _int8(m: int, n: int) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(nn.Linear(n, m).state_dict())
    return layer.to("cpu")  # type: ignore[no-any-return]


def _torchao(m: int, n: int) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Sequential(nn.Linear(n, m))
    quantize_(layer, Int8WeightOnlyConfig())
    return layer[0]


def _conv1d(m: int, n: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(m, n)  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "nn.Linear": _linear, "Conv1D": _conv1d, "nn.Conv1d, kernel 1": lambda m, n: nn.Conv1d(n, m, 1),
    "bitsandbytes NF4": _nf4, "bitsandbytes int8": _int8, "torchao int8": _torchao,
}  # fmt: skip


def step(model: nn.Module, x: Tensor, fresh: bool) -> Callable[[], None]:
    """A training step; fresh: the parameters have changed since the last one, so that the adapter prepares."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        if fresh:
            with torch.no_grad():
                for p in trained:
                    p.add_(1e-6)
        x.grad = None
        for p in trained:
            p.grad = None
        model(x).sum().backward()

    return run


def measure(kind: str, m: int, n: int, tokens: int, rounds: int) -> dict[str, object]:
    """One kind of layer at one size."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"fc": KINDS[kind](m, n)})
    base.requires_grad_(False)
    x = torch.randn(1, n, tokens) if "nn.Conv1d" in kind else torch.randn(tokens, n)
    x.requires_grad_()
    models = {"frozen": copy.deepcopy(base)["fc"]}
    config = SSVDOConfig(inner_ratio=0.5, outer_rank=RANK, target_modules=("fc",))
    models["SSVD-O"] = apply_ssvdo(copy.deepcopy(base), config)["fc"]
    models["SSVD-O, prepared"] = copy.deepcopy(models["SSVD-O"])
    lora = LoraConfig(r=RANK, target_modules=["fc"])
    if "nn.Conv1d" not in kind and kind != "torchao int8":  # it asks for the configuration that quantised the model
        models["LoRA"] = get_peft_model(copy.deepcopy(base), lora).base_model.model["fc"]
    steps = {name: step(model, x, "prepared" in name) for name, model in models.items()}
    times = interleave(steps, rounds, "frozen")
    dense, own = 2 * m * n, kept(models["frozen"])
    return {
        "kind": kind, "out": m, "in": n, "tokens": tokens, "base": own / dense,
        "beside": {name: (kept(model) - own) / dense for name, model in models.items() if name in ("SSVD-O", "LoRA")},
        "ms": {name: t.median_ms for name, t in times.items()},
        "ratio": {name: t.ratio for name, t in times.items()},
    }  # fmt: skip


def kept(module: nn.Module) -> int:
    """Bytes in memory between steps: parameters, buffers, gradients, what packed weights are made of, and prepared."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    packed = [t for m in module.modules() if (found := linear_map(m)) is not None for t in found.base().tensors]
    known = storages([*module.parameters(), *module.buffers(), *gradients])
    scales = {at: size for at, size in storages(packed).items() if at not in known}  # bitsandbytes keeps these apart
    return sum(known.values()) + max(held(module), sum(scales.values()))


# -- a whole model -----------------------------------------------------------------------------------------------------
LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 8192}  # fmt: skip
MLP = ["gate_proj", "up_proj", "down_proj"]


def quantised_llama() -> nn.Module:
    """A LLaMA of random bfloat16 weights whose linear layers but the head are in NF4."""
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                layer = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4",
                                          compute_dtype=torch.bfloat16)  # fmt: skip
                layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, layer.to("cpu"))
    return model.requires_grad_(False)


def adapt(model: nn.Module, method: str) -> nn.Module:
    """QLoRA or SSVD-O on the feed-forward layers."""
    if method == "QLoRA, r = 64":
        return get_peft_model(model, LoraConfig(r=RANK, target_modules=MLP))  # type: ignore[no-any-return]
    if method.startswith("SSVD-O"):
        p = float(method.rpartition("=")[2])
        return apply_ssvdo(model, SSVDOConfig(inner_ratio=p, outer_rank=RANK, target_modules=tuple(MLP)))
    return model


def one_model(method: str) -> dict[str, float | None]:
    """Bytes of a method on the model, and the peak of training steps beyond it; in a process of its own."""
    warnings.simplefilter("ignore")
    base = quantised_llama()
    before = kept(base)
    model = adapt(base, method)
    tokens = torch.randint(0, LLAMA["vocab_size"], (2, 256))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained) if trained else None
    meter = Meter(torch.device("cpu"))
    for _ in range(2):
        loss = model(tokens, labels=tokens).loss
        if optimiser is not None:
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    peak = meter.mebibytes()
    number = sum(p.numel() for p in trained)
    del loss
    layers = [adapter for _, h in hosts(model) for adapter in h.adapters()]
    factors = sum(t.nbytes for a in layers for t in a.factors.tensors().values())
    return {"trained": number, "base": before / 2**20, "beside": (kept(model) - before) / 2**20,
            "factors": factors / 2**20, "peak": peak}  # fmt: skip


def markdown(rows: list[dict[str, object]]) -> str:
    """The table."""
    lines = ["| base | size | tokens | frozen, ms | SSVD-O prepared | SSVD-O cached | LoRA r = 64 | base kept "
             "| SSVD-O beside it | LoRA beside it |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        ms, ratio, beside = r["ms"], r["ratio"], r["beside"]
        assert isinstance(ms, dict) and isinstance(ratio, dict) and isinstance(beside, dict)
        of_lora = [f"{v['LoRA']:.2f}" if "LoRA" in v else "-" for v in (ratio, beside)]
        lines.append(f"| {r['kind']} | {r['in']} -> {r['out']} | {r['tokens']} | {ms['frozen']:.1f} | "
                     f"{ratio['SSVD-O, prepared']:.2f} | {ratio['SSVD-O']:.2f} | {of_lora[0]} | {r['base']:.2f} | "
                     f"{beside['SSVD-O']:.2f} | {of_lora[1]} |")  # fmt: skip
    return "\n".join(lines)


def model_markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table of the whole model."""
    lines = ["| method | trained | base, MiB | kept beside it, MiB | of this V, S, U_l | peak of a step beyond, MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| {name} | {r['trained']:,} | {r['base']:.0f} | {r['beside']:.0f} | {r['factors']:.0f} "
              f"| {r['peak']:.0f} |" for name, r in rows.items()]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Prints the tables and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=15, help="0 leaves the layers out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, Any] = facts("cpu")
    results["layers"] = [measure(kind, m, n, tokens, options.rounds) for kind in KINDS if options.rounds
                         for m, n in ((OUT, IN), (IN, OUT)) for tokens in options.tokens]  # fmt: skip
    methods = ("frozen", "QLoRA, r = 64", "SSVD-O, p = 0.25", "SSVD-O, p = 0.5")
    results["model"] = {method: alone(one_model, method) for method in methods}
    text = "\n\n".join((
        f"{results['date']}, {results['device']}, {results['threads']} threads, torch {results['torch']}.",
        "Ratios to the same layer, frozen; kept: multiples of the weight in bfloat16.", markdown(results["layers"]),
        f"LLaMA of {LLAMA['num_hidden_layers']} layers, d = {LLAMA['hidden_size']}, feed-forward "
        f"{LLAMA['intermediate_size']}, in NF4 and bfloat16, adapted; 2 x 256 tokens, AdamW.",
        model_markdown(results["model"])))  # fmt: skip
    path = stem(options.out, results, "bases")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text, f"results: {path}.json and .md", sep="\n")


if __name__ == "__main__":
    main()
