"""Reports against dense linear algebra, and the budget."""

import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from ssvdo_kernels import SSVDOConfig, SSVDOLinear, apply_ssvdo, diagnose, orthogonality, reference, trainable_summary
from ssvdo_kernels.diagnostics import complement_departure, layer_report
from ssvdo_kernels.factorize import DEPARTURE, departure
from ssvdo_kernels.info import info


def layer(m=24, n=8, spread=0.3, **options):
    torch.manual_seed(0)
    made = SSVDOLinear.from_linear(nn.Linear(n, m).double(), SSVDOConfig(**{"outer_rank": 3, **options}))
    with torch.no_grad():
        for p in made.adapter.trained:
            p.normal_(0, spread)
    return made


@pytest.mark.parametrize("m, n", [(24, 8), (8, 24)])
def test_report_agrees_with_dense_algebra(m, n):
    made = layer(m, n)
    report = layer_report(made, "x")
    change = made.adapted_weight() - made.weight
    assert report.drift == pytest.approx(float(change.norm() / made.weight.norm()), rel=1e-9)
    adapter, shape = made.adapter, made.adapter.shape
    S = adapter.singular_values[: shape.k]
    assert report.scale_change == pytest.approx(float((adapter.inner_scale.detach().abs() / S).max()), rel=1e-9)
    G = reference.rotation(reference.skew(adapter.inner_rotation.detach(), shape.k))
    angle = float(torch.angle(torch.linalg.eigvals(G)).abs().max())
    assert report.inner_angle == pytest.approx(angle, rel=1e-3)
    U, S, _ = reference.dense_factors(made.weight, shape)
    Z = reference.turned(U, S, adapter.outer.detach() * shape.outer_scale(adapter.config), shape.width)
    sv, tau = torch.linalg.svdvals(Z), adapter.config.tau
    assert report.outer_angle == pytest.approx(float(torch.atan(sv.max() / math.sqrt(tau))), rel=1e-6)
    assert report.cholesky_condition == pytest.approx(float((sv.max() ** 2 + tau) / (sv.min() ** 2 + tau)), rel=1e-6)
    assert report.orthonormality < 1e-12 and report.inner_orthonormality < 1e-12
    assert report.basis == "float64 x1"


def test_departures_are_seen_where_they_exist():
    assert layer_report(layer(outer="additive")).orthonormality > 0.1
    assert layer_report(layer(rotation="first_order")).inner_orthonormality > 0.1
    assert layer_report(layer(outer_rank=0)).outer_angle == 0


def test_the_basis_and_what_its_rounding_costs():
    torch.manual_seed(0)
    made = SSVDOLinear.from_linear(nn.Linear(32, 96).bfloat16(), SSVDOConfig(outer_rank=3))
    assert layer_report(made).basis == "bfloat16 x2"
    own = departure(made.weight, made.adapter.factors, made.adapter.shape)
    assert 0 < complement_departure(made) == own <= DEPARTURE
    inner = layer(outer_rank=0)
    assert layer_report(inner).basis == "float64" and complement_departure(inner) == 0


def test_initial_angle_is_about_init_angle():
    made = SSVDOLinear.from_linear(nn.Linear(64, 1024), SSVDOConfig(outer_rank=1, init_angle=1e-2))
    assert layer_report(made).outer_angle == pytest.approx(1e-2, rel=0.1)


def test_warning_where_cholesky_becomes_unsafe():
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Linear(8, 24)}), SSVDOConfig(outer_rank=3, tau=1e-8, outer_scale=1.0))
    assert len(orthogonality(model)) == 1
    with torch.no_grad():
        model["fc1"].adapter.outer[:, 0] = 1.0
    with pytest.warns(UserWarning, match=r"fc1: the condition number .* \(tau=1e-08\)"):
        orthogonality(model)


def test_table_and_csv(tmp_path):
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Linear(8, 24), "fc2": nn.Linear(24, 8)}), SSVDOConfig(outer_rank=3))
    out = io.StringIO()
    reports = diagnose(model, csv_path=tmp_path / "r.csv", console=Console(file=out, width=200))
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert len(reports) == 2 and len(lines) == 3 and lines[0].startswith("name,orthonormality,")
    assert "fc1" in out.getvalue() and "fc2" in out.getvalue()


def test_budget_of_the_paper():
    model = apply_ssvdo(nn.ModuleDict({"fc1": nn.Linear(1024, 4096)}), SSVDOConfig(inner_ratio=0.5, outer_rank=64))
    out = io.StringIO()
    summary = trainable_summary(model, console=Console(file=out, width=200))
    assert summary.trainable == 327_936 and summary.inner == 131_328 and summary.outer == 196_608
    assert summary.base == 1024 * 4096 + 4096
    assert "327,936 trainable of 4,198,400" in out.getvalue()


def test_info_names_versions_and_backends(monkeypatch):
    lines = info()
    assert lines["torch"] == torch.__version__ and lines["preparation"].split(":")[0] in ("reference", "host")
    if not torch.cuda.is_available():
        assert lines["tokens, float32"].startswith("reference: ")
    assert lines["autotuning"] == "on"
    monkeypatch.setenv("SSVDO_AUTOTUNE", "0")
    assert info()["autotuning"] == "off (SSVDO_AUTOTUNE=0)"
