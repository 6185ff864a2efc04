"""The tiny model of each family."""

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import audio, text, vision
from .shrink import tiny_config

KINDS = {"audio": audio.FAMILIES, "text": text.FAMILIES, "vision": vision.FAMILIES}
FAMILIES = {name: family for kind in KINDS.values() for name, family in kind.items()}
_TASKS = ("SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CTC", "TDT", "RNNT", "SEQ_TO_SEQ_CAUSAL_LM",
          "CAUSAL_LM", "MASKED_LM", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "AUDIO_CLASSIFICATION",
          "IMAGE_CLASSIFICATION")  # fmt: skip


class TooOld(Exception):
    """This Transformers does not have the family."""


def _class_for(model_type):
    for task in (*(f"FOR_{task}_" for task in _TASKS), ""):
        known = getattr(modeling_auto, f"MODEL_{task}MAPPING_NAMES", {})
        if model_type in known:
            name = known[model_type]
            return getattr(transformers, name[0] if isinstance(name, (list, tuple)) else name)
    raise TooOld(f"Transformers {transformers.__version__} has no model class for {model_type}")


def make(name):
    """The family's tiny model, in evaluation, with the same numbers every time.

    Raises:
        TooOld: this Transformers does not have the family. ImportError: the model needs another package.
    """
    family = FAMILIES[name]
    kind = family.kind or name
    if not (family.build or hasattr(transformers, kind) or kind in CONFIG_MAPPING):
        raise TooOld(f"Transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    if family.build:
        return family.build().eval()
    config = tiny_config(getattr(transformers, family.kind) if family.kind else name, family.config)
    if hasattr(config, "_attn_implementation"):
        config._attn_implementation = "eager"
    cls = getattr(transformers, family.cls) if family.cls else _class_for(name)
    torch.manual_seed(0)
    model = cls(config).eval().float()
    for buffer_name, buffer in model.named_buffers():
        if "embed_sum" in buffer_name:  # a codec's codes, which are zeros
            buffer.normal_()
    return model


def inputs_of(name, model):
    """Inputs of its tiny model."""
    torch.manual_seed(1)
    return FAMILIES[name].inputs(model)
