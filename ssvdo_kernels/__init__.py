"""SSVD-O for PyTorch: a drop-in SSVDOLinear that trains as fast as LoRA."""

from .checkpoint import BaseMismatchError, CheckpointError, load_ssvdo, save_ssvdo
from .config import SSVDOConfig
from .diagnostics import diagnose, orthogonality, trainable_summary
from .linear import SSVDOLinear, gradient_accumulation
from .model import apply_ssvdo, group_layers, merge_ssvdo, remove_ssvdo, unmerge_ssvdo

__version__ = "0.1.0"
__all__ = [
    "BaseMismatchError",
    "CheckpointError",
    "SSVDOConfig",
    "SSVDOLinear",
    "apply_ssvdo",
    "diagnose",
    "gradient_accumulation",
    "group_layers",
    "load_ssvdo",
    "merge_ssvdo",
    "orthogonality",
    "remove_ssvdo",
    "save_ssvdo",
    "trainable_summary",
    "unmerge_ssvdo",
]
