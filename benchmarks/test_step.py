"""One layer's forward and backward under pytest-benchmark, to compare a change with what was before it:

    pytest benchmarks --benchmark-autosave
    ...                                                       # the change
    pytest benchmarks --benchmark-compare

The committed tables are those of `python -m benchmarks`, which interleaves the methods.
"""

import pytest
import torch

from ssvdo_kernels import SSVDOLinear

from .bench_layer import EVERY, adapted, make_peers, training_step

METHODS = ("frozen", "LoRA", EVERY)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [128, 1024])
@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_step(benchmark, tmp_path_factory, kind, tokens, method):
    """512 <-> 2048, p = 0.5, l = 64, float32."""
    linear, make = make_peers(kind, 512, 0.5, 64, "cpu", torch.float32)
    cache = tmp_path_factory.getbasetemp() / "factors"
    module = adapted(linear, 0.5, 64, cache) if method == EVERY else make(method)
    x = torch.randn(tokens, linear.in_features, requires_grad=True)
    dy = torch.randn(tokens, linear.out_features)
    benchmark.group = f"{kind}, {tokens} tokens"
    step = training_step(module, x, dy, module.refresh if isinstance(module, SSVDOLinear) else None)
    step()
    benchmark(step)
