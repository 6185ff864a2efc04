"""Fills a Hugging Face cache with tiny random models under the names that PEFT's tests ask for: no network.

    HF_HOME=FOLDER python -m tests.peft_suite.hub
"""

import os
from pathlib import Path

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

SNAPSHOT = "0" * 40
VOCABULARY = 200
INNER = "peft-internal-testing/tiny-random-"


def save_tokenizer(folder: Path) -> None:
    """One word a token."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{i}" for i in range(VOCABULARY - 40)] + list("abcdefghijklmnopqrstuvwxyz")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                              eos_token="</s>").save_pretrained(folder)  # fmt: skip


def put(name: str, kind: type, config: T.PretrainedConfig) -> None:
    """A model of this kind under this name."""
    torch.manual_seed(0)
    repository = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / SNAPSHOT
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(SNAPSHOT)
    kind(config).eval().save_pretrained(folder)
    save_tokenizer(folder)


def main() -> None:
    """Writes every model."""
    common = {"vocab_size": VOCABULARY}
    opt = {**common, "hidden_size": 16, "ffn_dim": 4, "num_hidden_layers": 5, "num_attention_heads": 4,
           "max_position_embeddings": 100, "word_embed_proj_dim": 16, "init_std": 0.1, "pad_token_id": 1,
           "bos_token_id": 2, "eos_token_id": 2}  # fmt: skip
    put(f"{INNER}OPTForCausalLM", T.OPTForCausalLM, T.OPTConfig(**opt))
    larger = {**opt, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    put("peft-internal-testing/opt-125m", T.OPTForCausalLM, T.OPTConfig(**larger))
    gpt = {**common, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 100, "initializer_range": 0.1,
           "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
    for name in (f"{INNER}GPT2LMHeadModel", "hf-internal-testing/tiny-random-gpt2", f"{INNER}gpt2", "gpt2"):
        put(name, T.GPT2LMHeadModel, T.GPT2Config(**gpt))
    put(f"{INNER}GPTJForCausalLM", T.GPTJForCausalLM, T.GPTJConfig(**gpt, rotary_dim=4))
    llama = {**common, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "max_position_embeddings": 100, "initializer_range": 0.1, "pad_token_id": 0,
             "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
    for name in ("trl-internal-testing/tiny-random-", INNER, "hf-internal-testing/tiny-random-"):
        put(f"{name}LlamaForCausalLM", T.LlamaForCausalLM, T.LlamaConfig(**llama))
    fewer = {**llama, "num_key_value_heads": 2}
    put("hf-internal-testing/tiny-random-MistralForCausalLM", T.MistralForCausalLM, T.MistralConfig(**fewer))
    put("peft-internal-testing/tiny-dummy-qwen2", T.Qwen2ForCausalLM,
        T.Qwen2Config(**{**fewer, "hidden_size": 8, "intermediate_size": 32}))  # fmt: skip
    put("hf-internal-testing/tiny-random-Gemma3ForCausalLM", T.Gemma3ForCausalLM,
        T.Gemma3TextConfig(**{**llama, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 1}))  # fmt: skip
    put("trl-internal-testing/tiny-Qwen3ForCausalLM", T.Qwen3ForCausalLM, T.Qwen3Config(**llama, head_dim=8))
    put("trl-internal-testing/tiny-LlamaForSequenceClassification-3.2", T.LlamaForSequenceClassification,
        T.LlamaConfig(**llama))  # fmt: skip
    four = {**fewer, "head_dim": 4}
    put("trl-internal-testing/tiny-Llama4ForCausalLM", T.Llama4ForCausalLM,
        T.Llama4TextConfig(**four, intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1))  # fmt: skip
    put("trl-internal-testing/tiny-GptOssForCausalLM", T.GptOssForCausalLM,
        T.GptOssConfig(**four, num_local_experts=4, num_experts_per_tok=2))  # fmt: skip
    t5 = T.T5Config(**common, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
                    decoder_start_token_id=0, initializer_factor=1.0)  # fmt: skip
    for name in ("T5ForConditionalGeneration-calibrated", "T5ForConditionalGeneration", "t5"):
        put(f"{INNER}{name}", T.T5ForConditionalGeneration, t5)
    put(f"{INNER}BartForConditionalGeneration", T.BartForConditionalGeneration, T.BartConfig(
        **common, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=4, decoder_ffn_dim=4, max_position_embeddings=100, init_std=0.1, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2))  # fmt: skip
    bert = {**common, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 37,
            "max_position_embeddings": 100, "initializer_range": 0.1}  # fmt: skip
    for family in ("Bert", "Roberta"):
        config = getattr(T, f"{family}Config")(**bert)
        put(f"{INNER}{family}Model", getattr(T, f"{family}Model"), config)
        put(f"{INNER}{family}ForSequenceClassification", getattr(T, f"{family}ForSequenceClassification"), config)
    put("bert-base-uncased", T.BertForSequenceClassification, T.BertConfig(**bert))
    for family in ("Deberta", "DebertaV2"):
        config = getattr(T, f"{family}Config")(**bert, relative_attention=True, pos_att_type=["c2p", "p2c"],
                                               type_vocab_size=0)  # fmt: skip
        put(f"{INNER}{family}Model", getattr(T, f"{family}Model"), config)


if __name__ == "__main__":
    main()
