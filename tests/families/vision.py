"""Families that see."""

import torch

from .family import Family
from .inputs import PLACEHOLDER, around, draw, ids, text_and_image, video
from .shrink import OMIT

NAMES = """vit deit beit swin swinv2 dinov2 dinov2_with_registers dinov3_vit clip siglip siglip2 convnext convnextv2
vit_mae vit_msn segformer pvt hiera yolos detr ijepa vjepa2 videomae timesformer sam sam2 blip blip-2 llava llava_next
qwen2_vl qwen2_5_vl qwen3_vl gemma3 idefics3 smolvlm internvl paligemma florence2 trocr layoutlmv3 dpt mask2former
owlvit pixtral mllama janus altclip git metaclip_2"""

_NO_STAGES = dict.fromkeys(("out_features", "out_indices", "_out_features", "_out_indices", "stage_names"), OMIT)
_SWIN = {"embed_dim": 36, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4, **_NO_STAGES}
_CONVNEXT = {"depths": [1, 1], "hidden_sizes": [18, 36], "num_stages": 2, **_NO_STAGES}
_PYRAMID = {"depths": [1, 1], "hidden_sizes": [18, 36], "num_attention_heads": [1, 2], "num_encoder_blocks": 2,
            "strides": [4, 2], "mlp_ratios": [4, 4]}  # fmt: skip
_FRAMES = {"num_frames": 4, "image_size": 32, "patch_size": 8}
_MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [3, 3, 3],
                                              "rope_theta": 10000.0}}}  # fmt: skip
_BY_FOURS = frozenset({72, 144, 288})  # 4 times the widths of stages


def _image(model):
    return {"pixel_values": draw(2, 3, 64, 64)}


def _siglip2(model):
    return {"input_ids": ids(model.config.text_config), "pixel_values": draw(2, 16, 192),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}  # fmt: skip


def _blip2(model):
    tokens = around(PLACEHOLDER, model.config.num_query_tokens)
    return {**tokens, "pixel_values": draw(1, 3, 32, 32), "use_cache": False}


def _layout(model):
    boxes = torch.randint(0, 99, (2, 12, 4))
    return {"input_ids": ids(model.config), "bbox": boxes, "pixel_values": draw(2, 3, 32, 32)}


SPECIAL = {
    "beit": Family(_NO_STAGES),
    "dinov2": Family(_NO_STAGES),
    "dinov2_with_registers": Family(_NO_STAGES),
    "dinov3_vit": Family({**_NO_STAGES, "hidden_size": 40}),
    "swin": Family(_SWIN, widths=frozenset({144, 288})),
    "swinv2": Family(_SWIN, widths=frozenset({144, 288})),
    "clip": Family(cls="CLIPModel", inputs=text_and_image),
    "siglip": Family({"vision_config": {"image_size": 32, "patch_size": 8}}, cls="SiglipModel", inputs=text_and_image),
    "siglip2": Family({"vision_config": {"hidden_size": 36, "num_patches": 16, "patch_size": 8}}, cls="Siglip2Model",
                      inputs=_siglip2),
    "convnext": Family(_CONVNEXT, cls="ConvNextModel", inputs=_image, widths=_BY_FOURS),
    "convnextv2": Family(_CONVNEXT, cls="ConvNextV2Model", inputs=_image, widths=_BY_FOURS),
    "videomae": Family(_FRAMES, inputs=video),
    "timesformer": Family(_FRAMES, inputs=video),
    "vjepa2": Family({"crop_size": 32, "frames_per_clip": 4},
                     inputs=lambda m: {"pixel_values_videos": draw(2, 4, 3, 32, 32)}),
    "qwen2_vl": Family(_MROPE),
    "qwen2_5_vl": Family(_MROPE),
    "hiera": Family({**_NO_STAGES, "depths": [1, 1], "num_heads": [1, 2], "embed_dim": 36, "image_size": [32, 32],
                     "patch_size": [7, 7], "masked_unit_size": [2, 2], "query_stride": [2, 2], "num_query_pool": 1},
                    widths=frozenset({144, 288})),
    "segformer": Family({**_PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [7, 3]}, widths=_BY_FOURS),
    "pvt": Family({**_PYRAMID, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]}, widths=_BY_FOURS),
    "sam": Family({"vision_config": {"num_pos_feats": 18, "output_channels": 36},
                   "prompt_encoder_config": {"image_embedding_size": OMIT}}),
    "sam2": Family({"vision_config": {"backbone_config": {
        "embed_dim_per_stage": [36, 72, 144], "num_attention_heads_per_stage": [1, 2, 4], "blocks_per_stage": [1, 1, 1],
        "window_size_per_stage": [2, 2, 2], "global_attention_blocks": [], "num_query_pool_stages": 2,
        "image_size": [32, 32]}, "backbone_channel_list": [144, 72, 36],
        "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]}, "prompt_encoder_config": {"patch_size": 16}},
        widths=frozenset({84}), feed_forward=r"vision_encoder\.backbone\.blocks\.\d+\.mlp\.proj_(in|out)"),
    "blip-2": Family({"image_token_index": PLACEHOLDER}, inputs=_blip2),
    "layoutlmv3": Family({"coordinate_size": 6, "shape_size": 6, "input_size": 32}, inputs=_layout),
    "detr": Family({"backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4,
        "out_features": ["stage4"], "out_indices": [4]}, "use_timm_backbone": False, "use_pretrained_backbone": False,
        "backbone": OMIT}),
    "yolos": Family({"image_size": [64, 64], "num_detection_tokens": 10}),
    "blip": Family(inputs=text_and_image),
    "florence2": Family({"vision_config": {"embed_dim": [16, 16, 32, 32], "num_heads": [2] * 4, "num_groups": [2] * 4,
                                           "depths": [1, 1, 2, 1], "window_size": 2}},
                        feed_forward=r".*\.(spatial|channel)_block\.ffn\.fc[12]"),
    "mask2former": Family(widths=frozenset({84, 2048}), feed_forward=r".*\.swin\..*\.mlp\.fc[12]"),
    "owlvit": Family(inputs=text_and_image),
    "altclip": Family(inputs=text_and_image),
    "metaclip_2": Family(cls="MetaClip2Model", inputs=text_and_image),
}  # fmt: skip
FAMILIES = {name: SPECIAL.get(name, Family()) for name in NAMES.split()}
