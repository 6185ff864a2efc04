"""Families that read and write."""

from .family import Family
from .shrink import OMIT

NAMES = """llama qwen2 qwen3 gemma gemma2 gemma3_text mistral ministral3 mixtral qwen2_moe qwen3_moe qwen3_next olmoe
gpt_oss deepseek_v2 deepseek_v3 glm4_moe granitemoe granite dbrx jamba jetmoe phi phi3 phimoe gpt2 gpt_bigcode gpt_neo
gpt_neox gptj opt bloom falcon mpt codegen t5 mt5 umt5 longt5 switch_transformers bart mbart pegasus marian m2m_100
nllb-moe bert roberta xlm-roberta distilbert deberta deberta-v2 electra albert camembert mobilebert modernbert mpnet
xlnet longformer big_bird funnel roformer squeezebert nomic_bert xglm blenderbot prophetnet led olmo olmo2 olmo3 mamba
mamba2 falcon_mamba bamba zamba2 rwkv starcoder2 stablelm cohere cohere2 persimmon nemotron smollm3 exaone4
hunyuan_v1_dense ernie4_5 seed_oss arcee lfm2 lfm2_moe minimax minimax_m2 llama4_text recurrent_gemma bitnet esm xlstm
glm glm4 helium diffllama doge longcat_flash"""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CONV_AND_ATTENTION = {"layer_types": ["conv", "full_attention"]}

SPECIAL = {
    "deepseek_v2": Family({"num_experts_per_tok": 2}),
    "dbrx": Family({"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
                    "ffn_config": {"ffn_hidden_size": 84, "moe_num_experts": 4, "moe_top_k": 2}},
                   widths=frozenset({84, 168, 336}), missed="the experts' matrices lie under one another, in 2-D"),
    "phi": Family({"rope_parameters": OMIT, "num_attention_heads": 2, "hidden_size": 40}),
    "persimmon": Family({"rope_parameters": OMIT, "hidden_size": 40}, widths=frozenset({84, 160})),
    "gpt_neo": Family({"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"],
                       "num_layers": 2}),
    "gptj": Family({"rotary_dim": 8}),
    "falcon": Family({"ffn_hidden_size": 84}, widths=frozenset({84})),
    "codegen": Family({"rotary_dim": 8, "n_head": 4, "n_embd": 48}, widths=frozenset({84, 168, 192})),
    "nllb-moe": Family({"encoder_sparse_step": 2, "decoder_sparse_step": 2, "num_experts": 4}),
    "distilbert": Family({"hidden_dim": 84}),
    "mobilebert": Family({"embedding_size": 20, "true_hidden_size": 20, "intra_bottleneck_size": 20,
                          "hidden_size": 36}),
    "xlnet": Family({"d_head": 18, "d_inner": 84}),
    "funnel": Family({"block_sizes": [1, 1], "block_repeats": [1, 1], "d_inner": 84, "num_decoder_layers": 1}),
    "squeezebert": Family(feed_forward=r".*layers\.\d+\.(intermediate|output)\.conv1d",
                          missed="convolutions of groups"),
    "mamba2": Family({"num_heads": 4, "head_dim": 18, "n_groups": 2, "state_size": 8}),
    "bamba": Family({"mamba_n_heads": 4, "mamba_d_head": 18, "attn_layer_indices": [1]}),
    "zamba2": Family({"layers_block_type": ["mamba", "hybrid"], "mamba_headdim": OMIT, "attention_hidden_size": OMIT,
                      "attention_head_dim": OMIT, "hybrid_layer_ids": OMIT}),
    "nemotron": Family({"num_key_value_heads": 2}),
    "hunyuan_v1_dense": Family({"head_dim": 18, "rope_parameters": _ROPE}),
    "lfm2": Family({**_CONV_AND_ATTENTION, "block_auto_adjust_ff_dim": False, "block_ff_dim": 84,
                    "intermediate_size": 84}),
    "lfm2_moe": Family(_CONV_AND_ATTENTION),
    "llama4_text": Family({"num_local_experts": 4, "intermediate_size": 52, "intermediate_size_mlp": 84,
                           "no_rope_layers": [1, 1], "moe_layers": [1], "num_hidden_layers": 2}),
    "recurrent_gemma": Family({"lru_width": 36, "intermediate_size": 168}),
    "esm": Family({"vocab_size": 33, "pad_token_id": 1}),
    "xlstm": Family({"ffn_round_up_to_multiple_of": 4, "ffn_proj_factor": 2.3, "embedding_dim": OMIT},
                    widths=frozenset({84})),
    "longcat_flash": Family({"head_dim": 12, "qk_rope_head_dim": 12, "qk_nope_head_dim": 12, "v_head_dim": 12,
                             "qk_head_dim": 24}),
}  # fmt: skip
FAMILIES = {name: SPECIAL.get(name, Family()) for name in NAMES.split()}
