"""Which layers of a tiny model are feed-forward ones: told by their widths, which other layers do not have."""

import re

from torch import nn

from .models import FAMILIES

_OTHERS = re.compile("|".join((
    r"bias$|mlp\.gate$",  # gate: a router
    r"projector(?!\.qformer)|merger|connector|adapter|aligner|flow_head|patch_embedder|input_projections",
    r"attention\.[qkvo]_proj|attention\.(self|output)|qkv|linear_attn|lstm",
    r"\.mamba\.|\.mixer\.(?!up_proj|down_proj|shared_experts|experts)|snake|per_dim|layer_norm_|grn",
    r"\.conv\.|conv_module|pointwise|dwconv|conv_layers|feature_extractor|reduction|(up|down)sampl|dac_encoder",
)))  # fmt: skip


def feed_forward(name, model):
    """The names of the layers, and of the parameters that hold experts, of the family's tiny model."""
    family = FAMILIES[name]
    named = re.compile(family.feed_forward or r"(?!)")
    found = set()
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False) if not isinstance(module, nn.Embedding) else ():
            place = path if own == "weight" else f"{path}.{own}"
            wide = parameter.ndim >= 2 and any(size in family.widths for size in parameter.shape)
            if (wide and not _OTHERS.search(place)) or (own == "weight" and named.fullmatch(place)):
                found.add(place)
    return found


def without_numbers(names):
    """The names, N in place of numbers, each once."""
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names})
