"""Choosing a configuration: fixed, timed once, remembered in memory and on disk."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import require_triton

require_triton()
from triton.runtime.errors import OutOfResources

from ssvdo_kernels.triton import tuning
from ssvdo_kernels.triton.configs import CONFIGS, TWO, candidates

CANDIDATES = CONFIGS["add_product"]["half"]


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_memory", {})
    monkeypatch.setattr(tuning, "_loaded", set())
    monkeypatch.setenv("SSVDO_CACHE", str(tmp_path / "cache"))


def choose(tokens=100, milliseconds=(3.0, 1.0, 2.0), kernel="add_product", precision="half"):
    """The configuration taken and those that were timed. milliseconds: an exception is raised."""
    timed = []

    def time(call):
        call()
        found = milliseconds[len(timed) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    order = tuning.choose(kernel, precision, tokens, (8, 4), timed.append, device="Some GPU", time=time)
    assert sorted(order, key=CONFIGS[kernel][precision].index) == list(CONFIGS[kernel][precision])
    return order[0], timed


def test_what_a_device_has_no_room_for_is_slowest():
    full = OutOfResources(2, 1, "shared memory")
    assert choose(milliseconds=(full, 2.0, full))[0] == CANDIDATES[1]
    assert choose() == (CANDIDATES[1], [])


def test_no_memory_to_time_in_ends_no_training():
    """And the next process may try again."""
    assert choose(milliseconds=(3.0, torch.OutOfMemoryError(), 1.0)) == (CANDIDATES[0], list(CANDIDATES[:2]))
    assert not tuning.cache_file("Some GPU").exists()


def test_what_other_processes_have_written_since_stays():
    choose()
    path = tuning.cache_file("Some GPU")
    path.write_text(json.dumps({**json.loads(path.read_text()), "expand/half/64/1x2x3": 0}))
    choose(tokens=1000)
    assert set(json.loads(path.read_text())) == {"add_product/half/128/8x4", "add_product/half/1024/8x4",
                                                 "expand/half/64/1x2x3"}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which everything takes as long as it is late in the list."""
    times = iter(range(9, 0, -1))
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(tuning.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_do_bench", lambda call: float(next(times)))


def test_a_capture_takes_what_was_timed_before_it(gpu, monkeypatch):
    def asked(tokens):
        return tuning.choose("add_product", "half", tokens, (8, 4), lambda config: None)[0]

    assert asked(100) == CANDIDATES[-1]
    monkeypatch.setattr(tuning.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert asked(100) == CANDIDATES[-1]
    assert asked(1000) == CANDIDATES[0]  # nothing is timed in a capture


def test_deterministic_algorithms_are_not_chosen_by_time(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        assert tuning.choose("add_product", "half", 100, (8, 4), lambda config: None) == CANDIDATES
    finally:
        torch.use_deterministic_algorithms(False)


def test_less_shared_memory():
    """contract's first configurations take more than the 99 KiB of an L40S or RTX 4090."""
    small, large = (candidates("contract", "half", capability) for capability in ("8.9", "8.0"))
    assert 0 < len(small) < len(large) and set(small) < set(large)
    assert all(candidates(kernel, precision, "8.9") for kernel, by in CONFIGS.items() for precision in by)
    assert candidates("contract", "half", "99.0") == small


def test_persistent_kernels_are_hoppers_and_blackwells():
    """Their contraction of 128 rows is of 9.0 alone: for 10.0 it spills, with Triton 3.5 to 3.7."""
    offered = {c: [config for kernel in ("wide_expand", "wide_contract") for config in candidates(kernel, "half", c)]
               for c in ("8.9", "8.0", "9.0", "10.0")}  # fmt: skip
    assert set(offered["8.9"]) == {TWO} and not any(config.persistent for config in offered["8.0"])
    assert sum(config.persistent for config in offered["9.0"]) == 3 > sum(c.persistent for c in offered["10.0"]) == 2
    assert all(candidates(kernel, "half", c)[0] is TWO for kernel in ("wide_expand", "wide_contract") for c in offered)


def test_the_fastest_is_taken_and_remembered_by_power_of_two():
    assert choose(tokens=100) == (CANDIDATES[1], list(CANDIDATES))
    assert choose(tokens=128) == (CANDIDATES[1], [])
    assert choose(tokens=129)[1] == list(CANDIDATES)


def test_remembered_on_disk(monkeypatch):
    choose()
    assert json.loads(tuning.cache_file("Some GPU").read_text()) == {"add_product/half/128/8x4": 1}
    monkeypatch.setattr(tuning, "_memory", {})
    monkeypatch.setattr(tuning, "_loaded", set())
    assert choose() == (CANDIDATES[1], [])


KEY = '"add_product/half/128/8x4"'


@pytest.mark.parametrize("content", ["{", "[1]", f'{{{KEY}: "x"}}', f"{{{KEY}: 99}}"])
def test_a_damaged_file_is_timed_again(content):
    path = tuning.cache_file("Some GPU")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    if "99" in content:
        assert choose()[1] == list(CANDIDATES)
    else:
        with pytest.warns(UserWarning, match="cannot be read"):
            assert choose()[1] == list(CANDIDATES)
    assert json.loads(path.read_text()) == {"add_product/half/128/8x4": 1}


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSVDO_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert choose()[0] == CANDIDATES[1]


def test_fixed_where_there_is_one_or_timing_is_off(monkeypatch):
    assert choose(kernel="expand", precision="fp64") == (CONFIGS["expand"]["fp64"][0], [])
    monkeypatch.setenv("SSVDO_AUTOTUNE", "0")
    assert not tuning.enabled()
    assert tuning.choose("add_product", "half", 100, (8, 4), lambda config: None)[0] == CANDIDATES[0]


@pytest.mark.parametrize("value, on", [("0", False), ("false", False), ("OFF", False), ("no", False), ("", False),
                                       ("1", True), ("true", True)])  # fmt: skip
def test_timing_is_switched_off_in_any_of_the_usual_words(monkeypatch, value, on):
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("SSVDO_AUTOTUNE", value)
    assert tuning.enabled() is on


def homeless(*_):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("value, home, folder", [
    ("/some/where", True, "/some/where"), ("/some/where", False, "/some/where"), ("~/there", True, "{home}/there"),
    ("", True, "{home}/.cache/ssvdo_kernels"), (None, True, "{home}/.cache/ssvdo_kernels"),
    (None, False, "{temporary}/ssvdo_kernels"), ("~/there", False, "{temporary}/ssvdo_kernels")])  # fmt: skip
def test_where_timings_are_kept(monkeypatch, tmp_path, value, home, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("SSVDO_CACHE")
    else:
        monkeypatch.setenv("SSVDO_CACHE", value)
    if not home:
        monkeypatch.setattr(Path, "expanduser", lambda self: homeless() if str(self).startswith("~") else self)
        monkeypatch.setattr(Path, "home", homeless)
    assert tuning.cache_file("Some GPU").parent == Path(folder.format(home=tmp_path, temporary=tempfile.gettempdir()))
