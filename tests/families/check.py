"""What must hold of an adapted model: the same outputs at the start, gradients, merging, files, and the base again."""

import copy
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import ssvdo_kernels.integrations.peft as integration
from ssvdo_kernels import (
    SSVDOConfig,
    apply_ssvdo,
    load_ssvdo,
    merge_ssvdo,
    remove_ssvdo,
    save_ssvdo,
    unmerge_ssvdo,
)
from ssvdo_kernels.host import hosts

TOLERANCE = 1e-4  # of an output's largest number
SIZES = {"inner_ratio": 0.5, "outer_rank": 2}


def _tensors(outputs):
    """All floating-point tensors of a model's outputs, but for caches."""
    if torch.is_tensor(outputs):
        return [outputs] if outputs.is_floating_point() and outputs.numel() else []
    if hasattr(outputs, "items"):
        return [t for name, value in outputs.items() if "past_key_values" not in name and "cache" not in name
                for t in _tensors(value)]  # fmt: skip
    return [t for value in outputs for t in _tensors(value)] if isinstance(outputs, (list, tuple)) else []


def run(model, inputs, gradients=False):
    """The model's outputs, with the same random numbers every time."""
    torch.manual_seed(7)
    given = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
    with torch.set_grad_enabled(gradients):
        return _tensors(model(**given))


def distance(some, others):
    """The largest difference of outputs, as a share of their largest number; what is not finite does not count."""
    if [t.shape for t in some] != [t.shape for t in others]:
        return float("inf")
    worst = 0.0
    for a, b in zip(some, others, strict=True):
        counts = torch.isfinite(a) & (a.abs() < 1e30)
        a, b = torch.where(counts, a, 0).detach(), torch.where(counts, torch.nan_to_num(b, 1e30), 0).detach()
        worst = max(worst, float((a - b).abs().max() / (a.abs().max() + 1e-6)))
    return worst


def _same(model, inputs, expected, what):
    found = distance(expected, run(model, inputs))
    assert found < TOLERANCE, f"{what}: outputs differ by {found:.2g}"


def _backward(model, inputs):
    """A backward of a random weighting of all outputs; False: no output depends on a parameter that is trained."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for output in run(model, inputs, gradients=True):
        weights = torch.randn(output.shape, generator=generator)
        total = total + (torch.where(torch.isfinite(output), output, 0).double() * weights).sum() / output.numel()
    if total.requires_grad:
        total.backward()
    return total.requires_grad


def base_gradients(model, inputs):
    """Parameter name -> its largest gradient in the base model, for those that a backward reaches."""
    trained = copy.deepcopy(model).requires_grad_(True)
    _backward(trained, inputs)
    found = {name: p.grad for name, p in trained.named_parameters(remove_duplicate=False) if p.grad is not None}
    return {name: g for name, g in found.items() if g.numel() and torch.isfinite(g).all()}


def _adapters(model):
    return {adapter.name: adapter for _, host in hosts(model) for adapter in host.adapters()}


def adapted_names(model):
    """The names of adapted layers, and of parameters whose experts are adapted."""
    names = {name for name, _ in model.named_modules()}
    found = {name.removeprefix("base_model.model.") for name in _adapters(model)}
    places = {name if name in names or f"base_model.model.{name}" in names else name.rpartition(".")[0]
              for name in found}  # fmt: skip
    return {place.removesuffix(".weight") for place in places}


def _gradients_reach_adapters(model, base):
    """Asserts that an adapter has gradients where its weight has one in the base model."""
    largest = max((float(g.abs().max()) for g in base.values()), default=0.0)
    for name, adapter in _adapters(model).items():
        stack, _, index = name.rpartition(".")
        own = base.get(f"{name}.weight")
        if own is None and index.isdigit():
            whole = base.get(stack, base.get(f"{stack}.weight"))
            own = None if whole is None else whole[int(index)]
        if own is None or float(own.abs().max()) <= 1e-6 * largest:
            continue
        for p in adapter.trained:
            assert p.grad is not None, f"{name} has no gradient, and its weight has one"
            assert torch.isfinite(p.grad).all(), f"{name} has a gradient that is not finite"
        assert adapter.inner_scale.grad.any(), f"{name} has no gradient but zeros, and its weight has one"


@torch.no_grad()
def _move(parameters):
    for p in parameters:
        p.add_(torch.randn_like(p) * 0.02)


def through_core(model, inputs, targets, base):
    """Adapts a copy by `apply_ssvdo` and asserts all of it. Returns the names that were adapted."""
    start = run(model, inputs)
    adapted = apply_ssvdo(copy.deepcopy(model), SSVDOConfig(**SIZES, init_angle=0.0, target_modules=targets))
    names = adapted_names(adapted)
    _same(adapted, inputs, start, "at the start")
    if _backward(adapted, inputs):
        _gradients_reach_adapters(adapted, base)
    _move(p for _, host in hosts(adapted) for p in host.adapter_parameters)
    moved = run(adapted, inputs)
    merge_ssvdo(adapted)
    _same(adapted, inputs, moved, "merged")
    unmerge_ssvdo(adapted)
    _same(adapted, inputs, moved, "unmerged")
    with tempfile.TemporaryDirectory() as folder:
        save_ssvdo(adapted, folder)
        loaded = copy.deepcopy(model)
        load_ssvdo(loaded, folder)
    _same(loaded, inputs, moved, "loaded")
    _same(remove_ssvdo(loaded), inputs, start, "taken off")
    _same(remove_ssvdo(adapted, merge=True), inputs, moved, "merged for good")
    return names


def through_peft(model, inputs, targets, base, lora=False):
    """The same with PEFT; lora: with its LoRA in place of SSVD-O."""
    start = run(model, inputs)
    config = LoraConfig(r=2, target_modules=targets) if lora else integration.SSVDOConfig(
        **SIZES, target_modules=targets)  # fmt: skip
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    names = set() if lora else adapted_names(adapted)
    _same(adapted, inputs, start, "at the start")
    if _backward(adapted, inputs) and not lora:
        _gradients_reach_adapters(adapted, base)
    _move(p for p in adapted.parameters() if p.requires_grad)
    moved = run(adapted, inputs)
    adapted.merge_adapter()
    _same(adapted, inputs, moved, "merged")
    adapted.unmerge_adapter()
    _same(adapted, inputs, moved, "unmerged")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of base models that have no folder
        adapted.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    _same(loaded, inputs, moved, "loaded")
    with adapted.disable_adapter():
        _same(adapted, inputs, start, "disabled")
    _same(loaded.unload(), inputs, start, "taken off")
    _same(adapted.merge_and_unload(), inputs, moved, "merged for good")
    return names
