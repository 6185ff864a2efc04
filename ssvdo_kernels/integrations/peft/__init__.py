"""SSVD-O as a method of Hugging Face PEFT: after `import ssvdo_kernels.integrations.peft`,

    model = peft.get_peft_model(model, peft.SSVDOConfig(target_modules=["fc1", "fc2"]))

and `save_pretrained`, `PeftModel.from_pretrained`, `set_adapter`, `merge_and_unload` and their like work as for any
other method. docs/peft.md lists what was tried. The factors of W0 are not saved: they are computed again from the base
weights.
"""

import peft
from peft import helpers
from peft.tuners.lora import LoraLayer
from peft.utils import register_peft_method

from .config import SSVDOConfig
from .hotswap import hotswap_adapter
from .layer import Linear
from .model import SSVDOModel
from .tuner import TunerLayer

if "SSVDO" not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="ssvdo", config_cls=SSVDOConfig, model_cls=SSVDOModel, prefix="ssvdo_")
    peft.SSVDOConfig, peft.SSVDOModel = SSVDOConfig, SSVDOModel

helpers.LoraLayer = (LoraLayer, TunerLayer)  # the kinds of layer that `rescale_adapter_scale` looks for

__all__ = ["Linear", "SSVDOConfig", "SSVDOModel", "hotswap_adapter"]
