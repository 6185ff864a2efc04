"""Which layers of a model a configuration means."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from .config import SSVDOConfig
from .experts import stacks
from .host import Host, Place, check_module, places
from .linear_maps import is_linear, kind_of, linear_map, refusal
from .sites import Site
from .weight_readers import reader_of

FEED_FORWARD = (
    "feed_forward.w_1", "feed_forward.w_2", "feed_forward_macaron.w_1", "feed_forward_macaron.w_2",  # ESPnet
    "fc1", "fc2", "fc1.proj",  # Whisper, BART, ViT; CLVP
    "intermediate_dense", "output_dense", "intermediate.dense", "output.dense",  # wav2vec 2, BERT
    "intermediate_query.dense", "output_query.dense",  # Q-Former
    "gate_proj", "up_proj", "down_proj", "gate_up_proj",  # LLaMA; Phi-3, GLM
    "feed_forward1.linear1", "feed_forward1.linear2", "feed_forward2.linear1", "feed_forward2.linear2",  # NeMo
    "ffw_layer_1", "ffw_layer_2", "ffw_layer_1.linear", "ffw_layer_2.linear",  # Gemma's audio towers
    "DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo",  # T5
    "mlp.wi", "mlp.wo", "mlp.input_linear", "mlp.output_linear",  # Switch Transformers, JetMoE
    r"expert_\d+.wi", r"expert_\d+.wo",
    "mlp.c_fc", "mlp.c_proj", "mlp.fc_in", "mlp.fc_out", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",  # GPT-2, J, NeoX
    "mlp.Wi", "mlp.Wo", "mlp.in_proj", "mlp.out_proj", "mlp.linear_fc1", "mlp.linear_fc2",  # ModernBERT, Bark, Qwen VL
    "ffn.lin1", "ffn.lin2", "mlp.lin1", "mlp.lin2", "ffn.linear1", "ffn.linear2", "ffn.linear_1", "ffn.linear_2",
    "ffn", "ffn_output", "ff.layer_1", "ff.layer_2", "mlp.dense1", "mlp.dense2",  # ALBERT, XLNet, PVT
    "pwconv1", "pwconv2", "feed_forward.intermediate", "feed_forward.output",  # ConvNeXt, ProphetNet
    "feed_forward.key", "feed_forward.value", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",  # RWKV, LFM2
    "mlp.proj_in", "mlp.proj_out", "intermediate.conv1d", "output.conv1d",  # SAM 2, SqueezeBERT
    "feed_forward.conv_1", "feed_forward.conv_2", "feed_forward.conv1", "feed_forward.conv2",  # VITS, FastSpeech 2
    "feed_forward_macaron.conv1", "feed_forward_macaron.conv2", "ffn.proj_up", "ffn.proj_up_gate", "ffn.proj_down",
)  # fmt: skip
"""Name suffixes of feed-forward layers; a component may be a regular expression."""

_NOT_FEED_FORWARD = re.compile(
    r"(.*\.)?("
    r".*attention\.output\.(dense|conv1d)"  # BERT calls both so
    r"|(self_)?attn\.(gate_proj|up_proj|down_proj)"  # gates of attention
    r"|(timestep|time)_(proj|embeddings?(\.\d+)?)\.fc[12]"
    r"|.*(multi_modal_projector|merger|connector|patch_embedder|adapter|aligner|flow_head)\..*"
    r")"
)


def matches(name: str, patterns: str | tuple[str, ...] | None) -> bool:
    """Whether a module's dotted name is meant: one of the suffixes (whole components) or the regular expression."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


_FEED_FORWARD = re.compile(rf"(.*\.)?({'|'.join(s.replace('.', chr(92) + '.') for s in FEED_FORWARD)})")


def is_feed_forward(name: str) -> bool:
    """Whether a layer of this name is adapted by default."""
    return _FEED_FORWARD.fullmatch(name) is not None and _NOT_FEED_FORWARD.fullmatch(name) is None


def _is_projection(place: Place) -> bool:
    """Whether a layer with a feed-forward layer's name stands in a whole model of Transformers itself, as in codecs."""
    return place.child in ("fc1", "fc2") and hasattr(place.parent, "base_model_prefix")


def wanted(name: str, config: SSVDOConfig) -> bool:
    """Whether `config` means the layer of this name."""
    if matches(name, config.exclude_modules):
        return False
    if config.target_modules is None:
        return is_feed_forward(name)
    return config.target_modules == "all-linear" or matches(name, config.target_modules)


def check_patterns(config: SSVDOConfig) -> None:
    """Raises ValueError where target_modules or exclude_modules is no regular expression."""
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if isinstance(pattern, str) and pattern != "all-linear":
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{field}={pattern!r} is no regular expression: {error}") from None


def find_targets(model: nn.Module, config: SSVDOConfig) -> dict[str, Site]:
    """Name -> site of every linear layer (linear_maps.py) and expert (experts.py) that `config` names, in the model's
    order. Experts are named by their parameter: "experts.gate_up_proj" means all matrices that it holds.

    ``"all-linear"`` takes nn.Linear and its kin, Conv1D and quantised layers, but for the output embedding: a layer
    whose weight is shared with an embedding, or that `model.get_output_embeddings()` returns. Layers that share one
    weight, and by default what has a feed-forward layer's name and cannot be adapted, are left out with a warning.

    Raises:
        ValueError: nothing matches (the message lists close names), or target_modules is no regular expression.
        TypeError: a named layer is adapted already, or cannot be.
    """
    check_module(model)
    check_patterns(config)
    everything = config.target_modules == "all-linear"
    named = config.target_modules is not None and not everything
    heads = _heads(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    shared = shared_weights(model)
    found: dict[str, Site] = {}
    linear_names: list[str] = []
    foreign: list[str] = []
    left_out: list[str] = []
    for place in places(model):
        name, module = place.name, place.module
        if any(name.startswith(outside) for outside in foreign):
            continue
        tuner = not isinstance(module, Host) and hasattr(module, "adapter_layer_names")  # PEFT's mark
        if tuner:
            foreign.append(f"{name}.")
        elif isinstance(module, Host):
            foreign.append(f"{name}.")
            linear_names.append(name)
        elif not refusal(module):
            linear_names.append(name)
        elif own := _experts(place, config):
            found |= own
            continue
        if not name or not wanted(name, config) or (config.target_modules is None and _is_projection(place)):
            continue
        if isinstance(module, Host):
            raise TypeError(f"{name} is adapted already; call remove_ssvdo(model) first")
        if tuner:
            raise TypeError(f"{name} is a {kind_of(module)}, another adapter; allowed: a plain layer "
                            "(merge_and_unload the other adapter first, or leave this layer out)")
        if everything and (not is_linear(module) or id(module) in heads or id(_weight(module)) in embeddings):
            continue
        if not (isinstance(module, nn.Linear) or _is_leaf_with_weight(module)):
            continue
        reason = reason_against(module, place.parent, place.child)
        if everything and id(_weight(module)) in shared:
            reason = "shares its weight with another layer"
        if not reason:
            found[name] = Site(name, module)
        elif named:
            raise TypeError(f"{name} {reason}")
        else:
            left_out.append(f"{name} {reason}")
    if left_out:
        said = "; ".join(left_out[:3]) + (f"; and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        if not found:
            raise TypeError(f"nothing to adapt: {said}")
        warnings.warn(f"left out: {said}", stacklevel=5)
    if not found:
        raise ValueError(nothing_found(config, linear_names))
    check_ties(found)
    _warn_of_idle(config, [*found, *linear_names])
    return found


def _warn_of_idle(config: SSVDOConfig, names: Collection[str]) -> None:
    """Says which entries of the lists of names mean no linear layer of the model: a typing error, perhaps."""
    for field in ("target_modules", "exclude_modules"):
        given = getattr(config, field)
        idle = [p for p in given if not any(matches(n, (p,)) or matches(n.rpartition(".")[0], (p,)) for n in names)
                ] if isinstance(given, tuple) else []  # fmt: skip
        if idle:
            warnings.warn(f"{field}: {idle} match no linear layer of the model", stacklevel=6)


def _experts(place: Place, config: SSVDOConfig) -> dict[str, Site]:
    """The experts of a module whose parameters `config` names."""
    prefix = f"{place.name}." if place.name else ""
    return {f"{prefix}{name}.{i}": Site(f"{prefix}{name}.{i}", place.module, f"{name}.{i}")
            for name, stack in _expert_stacks(place, config).items() for i in range(len(stack))}  # fmt: skip


def _expert_stacks(place: Place, config: SSVDOConfig) -> dict[str, Tensor]:
    """The parameters of a module that hold experts and are named; "all-linear" means layers alone, as in PEFT."""
    if config.target_modules == "all-linear" or type(place.module).__module__.startswith("torch.nn."):
        return {}
    if isinstance(config.target_modules, str) and "xpert" not in type(place.module).__name__:
        return {}  # a regular expression may mean more than it names
    own = place.name.replace(".base_layer", "")  # of PEFT
    prefix = f"{own}." if own else ""
    return {name: stack for name, stack in stacks(place.module).items()
            if wanted(prefix + name, config) or (name == "weight" and wanted(own, config))}  # fmt: skip


def default_names(model: nn.Module) -> list[str]:
    """The names of all feed-forward layers that can be adapted or are."""
    return [p.name for p in places(model) if is_feed_forward(p.name) and not _is_projection(p)
            and (isinstance(p.module, Host) or not reason_against(p.module, p.parent, p.child))]  # fmt: skip


def default_parameters(model: nn.Module) -> list[str]:
    """The names of all parameters that hold experts' feed-forward matrices."""
    found = [(place, name) for place in places(model) for name in _expert_stacks(place, SSVDOConfig())]
    return [f"{p.name}.{name}".replace(".base_layer", "") if p.name else name for p, name in found]


def reason_against(layer: nn.Module, parent: nn.Module, child: str) -> str:
    """Why a layer that stands as `child` in `parent` cannot be adapted, to follow its name; "" where it can."""
    if reason := refusal(layer):
        return reason
    if reader := reader_of(parent, child):
        return (f"is multiplied by in {reader}, which never calls it, so that an adapter would do nothing; allowed: "
                "layers that are called")
    if child == "_orig_mod":
        return "is compiled by itself; allowed: a layer that is not (adapt, then torch.compile)"
    return ""


def _heads(model: nn.Module) -> set[int]:
    """The output embeddings of the model, and of models of Transformers inside of it."""
    found = set()
    for module in model.modules():
        try:
            found.add(id(module.get_output_embeddings()))  # type: ignore[operator]
        except (AttributeError, NotImplementedError, TypeError):
            continue
    return found


def _weight(module: nn.Module) -> object:
    return module._parameters.get("weight")


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of weights that several modules hold."""
    held = Counter(id(weight) for m in model.modules() if (weight := _weight(m)) is not None)
    return {key for key, count in held.items() if count > 1}


def check_ties(found: Mapping[str, Site]) -> None:
    """Raises ValueError where two of the layers hold one weight."""
    names: dict[int, str] = {}
    for name, site in found.items():
        if site.part or (weight := _weight(site.module)) is None:
            continue
        other = names.setdefault(id(weight), name)
        if other != name:
            raise ValueError(f"{other} and {name} share one weight, and each would get an adapter of its own; allowed: "
                             "one of them (exclude_modules), one shared module, or weights that are not tied")


def _is_leaf_with_weight(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and (hasattr(module, "weight") or linear_map(module) is not None)


def nothing_found(config: SSVDOConfig, names: Sequence[str]) -> str:
    """That `config` means none of the linear layers of these names, and which there are."""
    wanted = config.target_modules if config.target_modules is not None else FEED_FORWARD
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    tails = sorted({re.sub(r"^(.*\.)?\d+\.", "", name) for name in names})
    near = {t for a in asked for t in difflib.get_close_matches(a, tails, 5, 0.4)}
    shown = sorted(near) or tails[:12]
    hint = f"linear layers with close names: {shown}" if any(shown) else "the model holds no linear layer"
    if config.target_modules is None:
        return f"no layer has a default name (feed-forward layers', such as fc1); name some in target_modules; {hint}"
    return f"target_modules={config.target_modules!r} matches no linear layer of the model; {hint}"
