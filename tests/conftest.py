import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before the kernels are imported: then Triton interprets them, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from hypothesis import register_random, settings
except ImportError:  # the GPU suite runs without it
    pass
else:

    class TorchRandom:
        """Torch's generator as one that hypothesis seeds before each example, so that a failure can be repeated."""

        seed = staticmethod(torch.manual_seed)
        getstate = staticmethod(torch.get_rng_state)
        setstate = staticmethod(torch.set_rng_state)

    TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
    register_random(TORCH_RANDOM)
    settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
    settings.register_profile("nightly", max_examples=2000, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
