"""Every backend and form against float64 where numbers are hard; bfloat16 against float32 over a whole training."""

import statistics

import pytest
import torch
from helpers import make_layer
from hypothesis import example, given
from hypothesis import strategies as st
from thorough import examples, times
from torch import nn

from benchmarks.accuracy import DTYPES, RESULTS, Case, backends_for, errors
from ssvdo_kernels import SSVDOConfig, apply_ssvdo
from ssvdo_kernels.config import LayerShape
from ssvdo_kernels.diagnostics import orthogonality
from ssvdo_kernels.factorize import DEPARTURE, compute_dtype, thin_svd, without_inverse
from ssvdo_kernels.ops.complement import inverse_of
from ssvdo_kernels.reference import outer_blocks

EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}


@st.composite
def hard_cases(draw):
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    most = min(m, n, abs(m - n))
    return Case(
        m, n, p=draw(st.sampled_from([0.05, 0.5, 1.0])), l=draw(st.sampled_from([0, most // 2, most])),
        kind=draw(st.sampled_from(["normal", "deficient", "repeated"])),
        scale=draw(st.sampled_from([1e-20, 1e-6, 1.0, 1e6, 1e20])), tau=draw(st.sampled_from([1e-8, 1e-4, 1e-2, 0.5])),
        angle=draw(st.sampled_from([0.0, 1e-3, 0.3, 10.0, 1e3])), seed=draw(st.integers(0, 10**6)),
    )  # fmt: skip


def division(case, dtype):
    """What d inner_scale loses by standing W0 v_i / S_i for u_i: eps S_0 / S_i, S_i the smallest value that is used,
    at most 1 / sqrt(eps) or 32; and the factorisation's own |W0 v_i / S_i - u_i|, which equal singular values raise."""
    weight = case.weight(dtype).double()
    shape = LayerShape.of(case.m, case.n, SSVDOConfig(inner_ratio=case.p, outer_rank=case.l))
    tall = weight.mT if shape.transposed else weight
    u, s, v = thin_svd(tall)
    used = shape.k - max(0, without_inverse(s, shape.width, shape.large, dtype) - (shape.width - shape.k))
    residual = float((tall @ v[:, :used] / s[:used] - u[:, :used]).norm(dim=0).max()) if used else 0.0
    return 4 * residual + (torch.finfo(dtype).eps * float(s[0] / s[used - 1]) if used else 0.0)


def projection(case, dtype):
    """What P loses by standing A V S^-1 for U, to which the dense form has no counterpart: eps S_0 / S_i in the dtype
    of the work, S_i the smallest value whose inverse P takes; V rounded to a half type leaves at
    most DEPARTURE more."""
    if not case.l:
        return 0.0
    shape = LayerShape.of(case.m, case.n, SSVDOConfig(inner_ratio=case.p, outer_rank=case.l))
    weight = case.weight(dtype).double()
    _, s, _ = thin_svd(weight.mT if shape.transposed else weight)
    null = without_inverse(s, shape.width, shape.large, dtype)
    used = s[inverse_of(s, shape.width, null) > 0]
    work = torch.finfo(compute_dtype(dtype)).eps
    return work * float(s[0] / used.min()) + (DEPARTURE if dtype.itemsize == 2 else 0.0) if len(used) else 0.0


@examples(120, 3000)
@given(hard_cases(), st.sampled_from(list(DTYPES)))
@example(Case(40, 4, p=1.0, l=4, kind="normal", scale=1e20, tau=1e-2, angle=0.3, seed=0), "fp32")  # A^T A overflows
def test_hard_cases(case, name):
    """Error <= 8 x the dense form's in the same dtype + 64 eps (half types: 4 eps, as their sums are float32).

    The forms differ from the dense one by a few more products, each rounded by at most sqrt(40) eps of its operands.
    In float64 the dense form is the truth and errs as much (so twice), by its solve with I + K, of condition
    sqrt(1 + |K|^2), too.
    d inner_scale loses `division` more, and where there is an outer part everything loses `projection`.
    """
    dtype = DTYPES[name]
    found = errors(case, dtype, backends_for(dtype))
    floor = (4 if dtype.itemsize == 2 else 64) * EPS[name]
    if name == "fp64":
        floor *= 2 * (1 + case.angle**2) ** 0.5
    lost, projected = division(case, dtype), projection(case, dtype)
    for (result, backend), error in found.items():
        assert result in RESULTS
        bound = 8 * found[result, "dense"] + floor + projected + (lost if result == "d inner_scale" else 0.0)
        assert error <= bound, (result, backend, error, found[result, "dense"])


@examples(200, 5000)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1e-8, 1e-4, 1e-2, 1.0]),
       st.sampled_from([0.0, 1e-3, 1.0, 30.0]), st.integers(0, 10**6))  # fmt: skip
def test_the_outer_blocks_are_orthonormal_to_rounding(c, l, tau, size, seed):  # noqa: E741
    """[C; Q] = [sqrt(tau) I; Z] R^-T: Cholesky-QR departs from orthonormality by about eps times the condition of
    Z^T Z + tau I, (|Z|^2 + tau) / tau; Z is in natural units, 2 sqrt(l tau / c) times a number of size `size`."""
    torch.manual_seed(seed)
    L = 2 * (l * tau / c) ** 0.5 * size * torch.randn(c, l, dtype=torch.float64)
    C, Q = outer_blocks(L, tau)
    departure = float((C.mT @ C + Q.mT @ Q - torch.eye(l)).norm())
    condition = 1 + float(torch.linalg.matrix_norm(L, 2)) ** 2 / tau
    assert departure <= 4 * l * EPS["fp64"] * condition


def trained(seed, half, steps):
    """Final training loss (the last fifth's mean) and the layers' diagnostics, on a task with noisy labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24))
    teacher = nn.Sequential(nn.Linear(24, 96), nn.Tanh(), nn.Linear(96, 8))
    apply_ssvdo(model, SSVDOConfig(inner_ratio=0.5, outer_rank=6, target_modules=("0", "2")))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 24)
        with torch.no_grad():
            labels = torch.distributions.Categorical(logits=3 * teacher(x)).sample()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return statistics.fmean(losses[-steps // 5 :]), orthogonality(model)


def test_bfloat16_training_follows_float32():
    """2,000 steps of bfloat16 end where float32 ends, within the spread of seeds; the bases stay orthonormal."""
    steps, seeds = times(150, 2000), range(times(3, 5))
    single, half = ([trained(seed, h, steps) for seed in seeds] for h in (False, True))
    ends, half_ends = [loss for loss, _ in single], [loss for loss, _ in half]
    start = trained(0, False, 5)[0]
    assert statistics.fmean(ends) < start - 0.2, "nothing was learnt"
    assert abs(statistics.fmean(half_ends) - statistics.fmean(ends)) <= statistics.stdev(ends)
    for _, reports in (*single, *half):
        for report in reports:  # float32 preparation, 6 columns of condition 1 + |L|^2 / tau below 100
            assert report.orthonormality <= 100 * EPS["fp32"], report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_half_weights_are_kept_in_float32(dtype):
    layer = make_layer(24, 8, dtype=dtype, outer_rank=3)
    assert all(p.dtype == torch.float32 for p in layer.adapter.trained)
