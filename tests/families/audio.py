"""Families that hear or speak."""

import torch
import transformers

from .family import Family
from .inputs import (
    PLACEHOLDER,
    around,
    by_signature,
    codes,
    draw,
    ids,
    masked_mel,
    mel,
    text,
    wave,
    with_placeholders,
)
from .shrink import OMIT, tiny_config

NAMES = """whisper wav2vec2 wav2vec2-bert wav2vec2-conformer hubert wavlm sew sew-d unispeech unispeech-sat
data2vec-audio speech_to_text speecht5 seamless_m4t seamless_m4t_v2 moonshine moonshine_streaming parakeet_ctc
parakeet_tdt parakeet_rnnt granite_speech granite_speech_plus granite_speech5_ctc voxtral voxtral_realtime qwen2_audio
qwen2_5_omni qwen3_omni_moe qwen3_asr kyutai_speech_to_text mimi encodec dac clap clvp musicgen musicgen_melody bark
pop2piano audio-spectrogram-transformer phi4_multimodal gemma3n_text gemma3n_audio gemma4 gemma4_audio gemma4_unified
dia csm glmasr vibevoice vibevoice_asr vibevoice_acoustic_tokenizer moshi xcodec xcodec2 lasr_ctc cohere_asr canary
omniasr omniasr_ctc fun_asr_nano audioflamingo3 musicflamingo fastspeech2_conformer vits pe_audio pe_audio_video
higgs_audio_v2 higgs_audio_v2_tokenizer nemotron_asr_streaming nemotron3_5_asr nemotron3_diarization nemo_speechlm
moss_transcribe_diarize muse_spark inkling_mm_model dots3_note apertus1p5 pocket_tts pocket_tts_audio_tokenizer
gradium_phonon_tts neucodec wavtokenizer univnet embedding_gemma2 nemotron_h_omni speech-encoder-decoder"""

_AUDIO = "audio_config"
_HEARD = {"audio_token_id": PLACEHOLDER}
_GRANITE = Family({**_HEARD, "audio_token_index": PLACEHOLDER, "encoder_config": {"dim_head": 18}},
                  inputs=with_placeholders(mel(1, 60, 36)))  # fmt: skip
_FLAMINGO = {_AUDIO: {"max_source_positions": 32, "intermediate_size": 144}, **_HEARD}
_ENCODEC = {"num_filters": 8, "hidden_size": 36, "upsampling_ratios": [4, 2], "codebook_dim": 36}
_MIMI = {"num_filters": 4, "upsampling_ratios": [4, 2], "codebook_dim": 36, "vector_quantization_hidden_dimension": 36,
         "upsample_groups": 36, "num_quantizers": 4, "num_semantic_quantizers": 1, "sliding_window": 20}  # fmt: skip
_DAC = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "upsampling_ratios": [4, 2], "n_codebooks": 2,
        "decoder_hidden_size": 32, "codebook_dim": 4, "hidden_size": 32}  # fmt: skip
_VIBE = {"num_filters": 4, "channels": 1, "depths": [1, 1, 1], "downsampling_ratios": [2, 2], "hidden_size": 36}
_VIBE_LAYERS = r".*\.ffn\.linear[12]"
_GEMMA = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
_FLOW = {"flow_head_config": {"condition_dim": 36, "latent_dim": 20, "frequency_embedding_size": 20}, "latent_dim": 20}
_MAMBA = {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 18}
_WAVTOKENIZER = {"decoder_hidden_size": 64, "num_filters": 4, "upsampling_ratios": [4, 2],
                 "decoder_intermediate_size": 84}  # fmt: skip


def _omni(name):
    rope = {"rope_type": "default", "mrope_section": [3, 3, 3], "rope_theta": 10000.0}
    config = {"text_config": {"rope_parameters": rope}, "vision_config": {"num_position_embeddings": 64}, **_HEARD}
    return Family(config, kind=f"{name}ThinkerConfig", cls=f"{name}ThinkerForConditionalGeneration")


def _speech_encoder_decoder():
    encoder, decoder = tiny_config("wav2vec2"), tiny_config("bert", {"is_decoder": True, "add_cross_attention": True})
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.SpeechEncoderDecoderModel(config)


def _musicgen(model):
    decoded = codes(2 * model.decoder.num_codebooks, 5)
    return {"input_ids": ids(model.config.text_encoder, 6), "decoder_input_ids": decoded, "use_cache": False}


def _qwen2_audio(model):
    row = around(PLACEHOLDER, 16)["input_ids"]
    return {"input_ids": row, "attention_mask": torch.ones_like(row), "input_features": draw(1, 128, 64),
            "feature_attention_mask": torch.ones(1, 64, dtype=torch.long), "use_cache": False}  # fmt: skip


def _streaming(model):
    return {**by_signature(model), "attention_mask": torch.ones(2, 64, dtype=torch.bool)}


def _clap(model):
    return {"input_ids": ids(model.config.text_config), "input_features": draw(2, 1, 1001, 64),
            "is_longer": torch.zeros(2, 1, dtype=torch.bool)}  # fmt: skip


SPECIAL = {
    "whisper": Family(inputs=lambda m: {"input_features": draw(2, 80, 512), "decoder_input_ids": ids(m.config, 7),
                                        "use_cache": False}),
    "wav2vec2-bert": Family({"vocab_size": 32}, inputs=lambda m: mel(2, 40, m.config.feature_projection_input_dim)(m)),
    "wav2vec2-conformer": Family({"vocab_size": 32}),
    "speech_to_text": Family({"conv_channels": 20}),
    "moonshine_streaming": Family({"num_key_value_heads": 2, "encoder_config": {"num_key_value_heads": 2}}),
    "granite_speech": _GRANITE,
    "granite_speech_plus": _GRANITE,
    "granite_speech5_ctc": Family(inputs=mel(2, 64, 320)),
    "voxtral": Family({_AUDIO: {"max_source_positions": 16, "intermediate_size": 144}, **_HEARD},
                      inputs=with_placeholders(mel(1, 128, 32))),
    "voxtral_realtime": Family(inputs=lambda m: {
        "input_ids": ids(m.config, 4, 1), "input_features": draw(1, m.config.audio_config.num_mel_bins, 32),
        "use_cache": False, "num_delay_tokens": 1}),
    "qwen2_audio": Family({_AUDIO: {"max_source_positions": 32}, "audio_token_index": PLACEHOLDER, **_HEARD},
                          inputs=_qwen2_audio),
    "qwen2_5_omni": _omni("Qwen2_5Omni"),
    "qwen3_omni_moe": _omni("Qwen3OmniMoe"),
    "qwen3_asr": Family(_HEARD, inputs=with_placeholders(masked_mel(128, 100))),
    "kyutai_speech_to_text": Family({"codec_config": _MIMI, "num_codebooks": 4, "ffn_dim": 168}, inputs=lambda m: {
        "input_ids": codes(2, 6, m.config.num_codebooks + 1), "use_cache": False}),
    "mimi": Family(_MIMI, inputs=wave(1600)),
    "encodec": Family({**_ENCODEC, "audio_channels": 1}, inputs=wave(1600)),
    "dac": Family(_DAC, inputs=wave(1600)),
    "clap": Family({_AUDIO: {
        "hidden_size": 144, "patch_embeds_hidden_size": 18, "depths": [1] * 4, "num_attention_heads": [2] * 4,
        "window_size": 8, "spec_size": 256, "num_mel_bins": 64, "mlp_ratio": 3.0}}, inputs=_clap,
        widths=frozenset({84, 54, 108, 216, 432})),
    "clvp": Family({"text_config": {"use_rotary_embedding": False}, "speech_config": {"use_rotary_embedding": False}},
                   inputs=lambda m: {"input_ids": ids(m.config.text_config),
                                     "input_features": draw(2, m.config.decoder_config.feature_size, 40)}),
    "musicgen": Family({"audio_encoder": _ENCODEC, "decoder": {"vocab_size": 64}},
                       cls="MusicgenForConditionalGeneration", inputs=_musicgen),
    "musicgen_melody": Family({"audio_encoder": _ENCODEC, "decoder": {"vocab_size": 64}},
                              cls="MusicgenMelodyForConditionalGeneration", inputs=_musicgen),
    "bark": Family({"block_size": 64, "input_vocab_size": 97, "output_vocab_size": 97, "hidden_size": 36},
                   kind="BarkSemanticConfig", cls="BarkSemanticModel"),
    "audio-spectrogram-transformer": Family({"max_length": 64, "num_mel_bins": 16, "image_size": 16},
                                            inputs=lambda m: {"input_values": draw(2, 64, 16)}),
    "gemma3n_text": Family({**_GEMMA, "activation_sparsity_pattern": None, "intermediate_size": 84, "laurel_rank": 10,
                            "pad_token_id": 0}),
    "gemma3n_audio": Family({"sscp_conv_channel_size": (8, 4), "input_feat_size": 32}, inputs=lambda m: {
        "audio_mel": draw(1, 64, 32), "audio_mel_mask": torch.zeros(1, 64, dtype=torch.bool)}),
    "gemma4": Family({"text_config": _GEMMA}, inputs=text),
    "gemma4_audio": Family({"subsampling_conv_channels": [8, 4], "output_proj_dims": 36}, inputs=lambda m: {
        "input_features": draw(1, 64, 8), "attention_mask": torch.ones(1, 64, dtype=torch.bool)}),
    "gemma4_unified": Family(inputs=text),
    "dia": Family({"decoder_config": {"num_channels": 9}}, inputs=lambda m: {
        "input_ids": ids(m.config.encoder_config, 8), "decoder_input_ids": codes(2, 5, 9), "use_cache": False}),
    "csm": Family({"codec_config": _MIMI, "num_codebooks": 4,
                   "depth_decoder_config": {"num_codebooks": 4, "backbone_hidden_size": 36}},
                  inputs=lambda m: {"input_ids": codes(2, 6, 4), "use_cache": False}),
    "glmasr": Family(_FLAMINGO, inputs=with_placeholders(masked_mel(128, 64))),
    "vibevoice": Family({_AUDIO: _VIBE, "semantic_model_config": _VIBE, "acoustic_hidden_size": 36},
                        feed_forward=_VIBE_LAYERS),
    "vibevoice_asr": Family({"acoustic_tokenizer_encoder_config": _VIBE, "semantic_tokenizer_encoder_config": _VIBE},
                            feed_forward=_VIBE_LAYERS),
    "vibevoice_acoustic_tokenizer": Family(_VIBE, inputs=wave(800), feed_forward=_VIBE_LAYERS),
    "moshi": Family({"audio_encoder_config": _MIMI, "ffn_dim": 168, "num_codebooks": 4,
                     "depth_decoder_config": {"ffn_dim": 168, "num_codebooks": 4}}, cls="MoshiForConditionalGeneration",
                    inputs=lambda m: {"input_ids": ids(m.config, 6), "user_audio_codes": codes(2, 4, 6),
                                      "moshi_audio_codes": codes(2, 4, 6)}),
    "xcodec": Family({
        "acoustic_model_config": _DAC, "target_bandwidths": [24], "codebook_dim": OMIT, "semantic_model_config": {
            "conv_dim": [36, 36], "num_feat_extract_layers": 2, "conv_stride": [4, 2], "conv_kernel": [4, 2]}},
        inputs=wave(800)),
    "xcodec2": Family({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
                       "encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "quantization_dim": 100},
                      inputs=lambda m: {**wave(400)(m), **mel(1, 50, 36)(m)}),
    "omniasr": Family(_HEARD, inputs=with_placeholders(wave(4000))),
    "omniasr_ctc": Family(inputs=wave(4000)),
    "fun_asr_nano": Family({"adaptor_config": {"intermediate_size": 9}, **_HEARD}),
    "audioflamingo3": Family(_FLAMINGO, inputs=with_placeholders(masked_mel(128, 64))),
    "musicflamingo": Family(_FLAMINGO, inputs=lambda m: {
        **around(PLACEHOLDER, 16), **masked_mel(128, 64)(m), "use_cache": False}),
    "fastspeech2_conformer": Family(
        {"encoder_config": {"linear_units": 84}, "decoder_config": {"linear_units": 84}, "encoder_layers": 2,
         "decoder_layers": 2, "hidden_size": 36}, inputs=lambda m: {"input_ids": ids(m.config, 9, 1)}),
    "univnet": Family({"model_hidden_channels": 32, "kernel_predictor_hidden_channels": 64},
                      inputs=lambda m: {"input_features": draw(2, 9, 100), "noise_sequence": draw(2, 9, 64)}),
    "vits": Family({"ffn_dim": 84, "upsample_initial_channel": 32, "num_flows": 4, "spectrogram_bins": 33,
                    "prior_encoder_num_wavenet_layers": 2, "posterior_encoder_num_wavenet_layers": 2}),
    "pe_audio": Family(inputs=lambda m: {"input_ids": ids(m.config.text_config), **wave(8000, 2)(m)}),
    "nemotron_asr_streaming": Family(inputs=_streaming),
    "nemotron3_5_asr": Family(inputs=_streaming),
    "nemo_speechlm": Family({"text_config": _MAMBA}),
    "moss_transcribe_diarize": Family(_HEARD),
    "muse_spark": Family({_AUDIO: {"num_hidden_layers": 4, "hidden_sizes": [18, 18, 36, 36], "depths": [1] * 4,
                                   "out_hidden_size": 36}}, feed_forward=r".*\.conv_blocks\.\d+\.mlp\.fc[12]"),
    "dots3_note": Family({"vision_config": {"adapter_in_dim": 36, "adapter_out_dim": 36, "pyramid_num_routed": [-1, 4]},
                          _AUDIO: {"adapter_input_size": 36, "adapter_out_dim": 36},
                          "text_config": {"num_hidden_layers": 3}}),
    "apertus1p5": Family({
        _AUDIO: {**_WAVTOKENIZER, "codebook_size": 30},
        "vision_config": {"codebook_size": 30, "base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1],
                          "resolution": 32, "embed_dim": 32, "latent_channels": 32},
        "image_token_id": PLACEHOLDER, "audio_token_id": 91, "image_token_offset": 20, "audio_token_offset": 50}),
    "pocket_tts": Family({**_FLOW, "audio_prompt_token_id": 93, "audio_latent_token_id": 94,
                          "audio_prompt_bos_token_id": 95, "audio_bos_token_id": 96}),
    "pocket_tts_audio_tokenizer": Family({"num_filters": 4, "upsampling_ratios": [4, 2], "upsample_groups": 36},
                                         inputs=wave(1600)),
    "gradium_phonon_tts": Family({**_FLOW, "audio_prompt_dim": 20}),
    "neucodec": Family({"hidden_size": 64, "num_attention_heads": 2, "head_dim": 18, "encoder_hidden_size": 8,
                        "downsampling_ratios": [2, 4], "quantization_dim": 100},
                       inputs=lambda m: {**wave(400)(m), **mel(1, 50, 36)(m)}),
    "wavtokenizer": Family(_WAVTOKENIZER, inputs=wave(1600)),
    "nemotron_h_omni": Family({"text_config": _MAMBA, "llm_config": {"n_groups": 2}}),
    "speech-encoder-decoder": Family(build=_speech_encoder_decoder, inputs=lambda m: {
        "input_values": draw(2, 2000), "decoder_input_ids": ids(m.config.decoder, 6)}),
}  # fmt: skip
FAMILIES = {name: SPECIAL.get(name, Family()) for name in NAMES.split()}
