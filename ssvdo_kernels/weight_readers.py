"""Modules that read the weight of a linear layer of theirs and multiply by it themselves.

Such a layer is called by nobody, so that an adapter on it would be without effect, and no error would say so. Found in
torch 2.13 and Transformers 5.24 (tests/test_weight_readers.py looks for others in those that are installed).
"""

from __future__ import annotations

from torch import nn

_MAMBA = ("dt_proj", "out_proj", "x_proj")
_MINICPM = ("linear_1", "linear_2")
READERS: dict[str, tuple[str, ...]] = {
    "MultiheadAttention": ("out_proj",),
    "WavLMAttention": ("k_proj", "out_proj", "q_proj", "v_proj"),
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), _MAMBA),
    "JambaMambaMixer": ("dt_proj",),
    **dict.fromkeys(("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Mamba2Mixer", "NemotronHMamba2Mixer",
                     "Zamba2MambaMixer"), ("out_proj",)),
    "BloomAttention": ("dense",), "BloomMLP": ("dense_4h_to_h",),  # where the configuration asks for it: see below
    **dict.fromkeys(("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"),
                    ("k_proj",)),
    "DabDetrMHAttentionMap": ("k_linear",),
    "TDNNLayer": ("kernel",), "DisentangledSelfAttention": ("in_proj",), "EsmFoldSelfAttention": ("g_proj",),
    "Gemma3nTextAltUp": ("correction_coefs",), "LongcatFlashTopkRouter": ("classifier",),
    **dict.fromkeys(("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"), ("lm_head",)),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    **dict.fromkeys(("MiniCPMOcrViTWindowAttentionMerger", "MiniCPMV4_6ViTWindowAttentionMerger",
                     "MiniCPMV4_7ViTWindowAttentionMerger"), _MINICPM),
    "MobileBertLMPredictionHead": ("decoder", "dense"), "NeoMMEForMaskedLM": ("unembedding_projection",),
    "LSHSelfAttention": ("query_key", "value"),
}  # fmt: skip


def reader_of(parent: nn.Module, child: str) -> str | None:
    """The class of `parent` that multiplies by the weight of its layer `child` itself; None: it calls the layer."""
    if getattr(parent, "pretraining_tp", 2) == 1:  # BLOOM's slices
        return None
    return next((c.__name__ for c in type(parent).__mro__ if child in READERS.get(c.__name__, ())), None)
