"""Tiny configurations: a family's default one with its numbers made small, by their names."""

import re

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, HEADS, HEAD, LAYERS, VOCABULARY = 36, 2, 18, 2, 97
FEED_FORWARD, EXPERT, SHARED_EXPERT = 84, 52, 44  # widths that nothing else has, so that they tell what a layer is
OMIT = object()  # as an override: the value is left to the configuration's class
_DERIVED = {"layer_types", "mlp_layer_types", "per_layer_sliding_window", "per_layer_config", "transformers_version",
            "architectures", "dtype", "torch_dtype"}  # fmt: skip


def _to(size):
    return lambda old: size if old else old


def _at_most(size):
    return lambda old: min(old, size)


_RULES = [(re.compile(names), change) for names, change in (
    (r"(|vq_|semantic_|acoustic_)codebook_size", _to(64)),
    (r"(|audio_|text_|entity_)vocab_size|num_audio_tokens", _at_most(VOCABULARY)),
    (r"(moe_)?shared_expert_intermediate_size|shared_intermediate_size", _to(SHARED_EXPERT)),
    (r"(moe|expert)_(intermediate_size|ffn_hidden_size)|expert_dim", _to(EXPERT)),
    (r".*(intermediate_(size|dim|features|length)|ffn_dim|d_ff|n_inner|ff_dim|inner_dim|mlp_dim|feed_?forward_dim"
     r"|ffn_hidden_size|feed_forward_hidden_dim)", _to(FEED_FORWARD)),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts",
     lambda old: 4 if old and old > 1 else old),
    (r"num_experts_per_tok(en)?|moe_topk|num_selected_experts|moe_top_k|moe_k",
     lambda old: 2 if old and old > 1 else old),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace", _to(1)),
    (r".*head_dim|d_kv|kv_channels|.*head_size|embedding_size_per_head|head_width", _to(HEAD)),
    (r".*(num_(attention_|attn_)?heads|n_heads?|attention_heads)", _to(HEADS)),
    (r".*(num_key_value_heads|num_kv_heads|n_kv_heads)", lambda old: 1 if old == 1 else HEADS if old else old),
    (r".*(num_hidden_layers|num_layers|n_layers?|coder_layers|depth|num_(de|en)coder_layers|coder_num_layers"
     r"|num_(conformer_)?blocks|num_adapter_layers)", lambda old: min(old, LAYERS) if isinstance(old, int) else old),
    (r"q_lora_rank|kv_lora_rank", _to(16)),
    (r".*(hidden_size|d_model|n_embd|hidden_dim|embed_dims?|embedding_size|hidden_channels|projection_(dim|size)"
     r"|word_embed_proj_dim|hidden_width|input_dim|output_dim|codebook_dim|num_channels_latent)|dim", _to(HIDDEN)),
    (r".*(max_(position_embeddings|source_positions|target_positions|seq_len)|n_positions|n_ctx)", _at_most(256)),
    (r"image_size", _to(32)),
    (r"patch_size", _to(8)),
    (r".*(pos_conv_depth|num_conv_pos_embeddings)", _to(4)),
    (r".*num_conv_pos_embedding_groups", _to(2)),
    (r".*pad_token_id", _to(0)),
    (r".*(token_id|token_index)", _at_most(VOCABULARY - 1)),
    (r".*(drop(out(_p|_rate)?|_rate|_path.*)?|layerdrop|pdrop|_prob)", _to(0.0)),
)]  # fmt: skip


def _smaller(name, value):
    if isinstance(value, (list, tuple)):
        return [HIDDEN] * len(value) if name in ("conv_dim", "tdnn_dim") else value
    if isinstance(value, (str, bool, dict)) or value is None:
        return value
    change = next((change for names, change in _RULES if names.fullmatch(name)), None)
    return value if change is None else change(value)


def _is_configuration(name, value):
    return isinstance(value, dict) and bool(value) and ("model_type" in value or name.endswith("_config"))


def shrink(values, overrides):
    """The values of a configuration made small, those of the configurations in it too."""
    found = {}
    for name, value in values.items():
        given = overrides.get(name)
        if name in _DERIVED:
            continue
        if _is_configuration(name, value):
            found[name] = shrink(value, given if isinstance(given, dict) else {})
        else:
            found[name] = _smaller(name, value)
    for name, value in overrides.items():
        if not (isinstance(value, dict) and _is_configuration(name, values.get(name))):
            found[name] = value
    return {name: value for name, value in found.items() if value is not OMIT}


def tiny_config(kind, overrides=None):
    """The tiny configuration of a model type, or of a configuration's class."""
    cls = CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    values = cls().to_dict()
    values.pop("model_type", None)
    return cls(**shrink(values, overrides or {}))
