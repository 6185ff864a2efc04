"""SSVD-O for PyTorch: a drop-in SSVDOLinear with hand-written gradients, for what LoRA is used for."""

from .accumulation import gradient_accumulation
from .adapter import Adapter
from .budget import suggest_budget
from .checkpoint import load_ssvdo, save_ssvdo
from .config import SSVDOConfig
from .diagnostics import diagnose, orthogonality, trainable_summary
from .fingerprint import BaseMismatchError, CheckpointError
from .linear import SSVDOLinear
from .lora import Lora, save_lora, to_lora
from .merging import merge_ssvdo, remove_ssvdo, unmerge_ssvdo
from .model import apply_ssvdo, group_layers, refactorize_ssvdo, set_scale
from .monitor import DiagnosticsMonitor, ForgettingMonitor

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "BaseMismatchError",
    "CheckpointError",
    "DiagnosticsMonitor",
    "ForgettingMonitor",
    "Lora",
    "SSVDOConfig",
    "SSVDOLinear",
    "apply_ssvdo",
    "diagnose",
    "gradient_accumulation",
    "group_layers",
    "load_ssvdo",
    "merge_ssvdo",
    "orthogonality",
    "refactorize_ssvdo",
    "remove_ssvdo",
    "save_lora",
    "save_ssvdo",
    "set_scale",
    "suggest_budget",
    "to_lora",
    "trainable_summary",
    "unmerge_ssvdo",
]
