"""Monitors of a training loop."""

import csv
import warnings

import pytest
import torch
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, save_ssvdo
from ssvdo_kernels.monitor import DiagnosticsMonitor, ForgettingMonitor


def small(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8))
    return apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules=("0", "2"), **options))


def mse(model, batch):
    return (model(batch) - batch).square().mean()


def train(model, steps, after):
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        mse(model, torch.ones(4, 8)).backward()
        optimiser.step()
        after()


def test_diagnostics_are_taken_every_so_many_steps_and_written(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("old")
    model = small()
    monitor = DiagnosticsMonitor(model, every=3, csv_path=path)
    seen = []
    train(model, 7, lambda: seen.append(monitor.step()))
    assert [i + 1 for i, reports in enumerate(seen) if reports is not None] == [3, 6]
    assert [step for step, _ in monitor.history] == [3, 6]
    rows = list(csv.DictReader(path.open()))
    assert [(r["step"], r["name"]) for r in rows] == [("3", "0"), ("3", "2"), ("6", "0"), ("6", "2")]
    assert float(rows[2]["drift"]) == monitor.history[1][1][0].drift > float(rows[0]["drift"]) > 0


def test_forgetting_is_the_growth_of_the_same_batches_loss():
    model = small(path="factored")  # left alone, the planner takes another form in the end, which rounds otherwise
    batches = [torch.randn(4, 8) for _ in range(2)]
    monitor = ForgettingMonitor(model, iter(batches), mse)
    with torch.no_grad():
        assert monitor.before == pytest.approx(sum(float(mse(model, b)) for b in batches) / 2)
    assert monitor.measure().increase == 0
    train(model, 20, lambda: None)
    found = monitor.measure(20)
    with torch.no_grad():
        now = sum(float(mse(model, b)) for b in batches) / 2
    assert found.now == pytest.approx(now) and found.increase == found.now - found.before != 0
    assert [f.step for f in monitor.history] == [0, 20]


def test_measuring_leaves_modes_and_gradients_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
    model.train()
    model[2].eval()
    before = model[2].running_mean.clone()
    monitor = ForgettingMonitor(model, [torch.randn(4, 8)], mse)
    assert monitor.measure().increase == 0  # dropout was off
    assert [m.training for m in model] == [True, True, False] and model.training
    assert torch.equal(model[2].running_mean, before) and model[0].weight.grad is None


def test_modes_come_back_after_an_error():
    model = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError):
        ForgettingMonitor(model, [torch.ones(1, 3)], mse)
    assert model.training


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "3"])
def test_bad_intervals_are_refused(every):
    with pytest.raises(ValueError, match=r"every=.*an integer >= 1"):
        DiagnosticsMonitor(small(), every=every)


def test_bad_batches_and_losses_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        ForgettingMonitor(small(), [], mse)
    for bad in (torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises(ValueError, match="one finite number"):
            ForgettingMonitor(small(), [torch.ones(1, 8)], lambda model, batch, bad=bad: bad)


def test_adapters_that_learn_nothing_are_said_by_the_monitor_and_at_save(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc1": nn.Linear(8, 24), "fc2": nn.Linear(24, 8), "spare": nn.Linear(8, 24)})
    apply_ssvdo(model, SSVDOConfig(outer_rank=2, target_modules=("fc1", "fc2", "spare")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_ssvdo(model, tmp_path)  # nothing has been trained yet
    monitor = DiagnosticsMonitor(model, every=1)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        model["fc2"](model["fc1"](torch.randn(3, 8))).square().sum().backward()
        optimiser.step()
    with pytest.warns(UserWarning, match="1 of 3 adapters have learnt nothing.*: spare"):
        monitor.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step()  # said once
    with pytest.warns(UserWarning, match="1 of 3 adapters have learnt nothing.*: spare"):
        save_ssvdo(model, tmp_path)
