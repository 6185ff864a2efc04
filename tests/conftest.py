import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():  # before the kernels are imported: then Triton interprets them, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from hypothesis import settings
except ImportError:  # the GPU suite runs without it
    pass
else:
    settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
    settings.register_profile("nightly", max_examples=2000, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
