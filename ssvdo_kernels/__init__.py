"""SSVD-O for PyTorch: a drop-in SSVDOLinear that trains as fast as LoRA."""

from .config import SSVDOConfig
from .linear import SSVDOLinear, gradient_accumulation

__version__ = "0.1.0"
__all__ = ["SSVDOConfig", "SSVDOLinear", "gradient_accumulation"]
