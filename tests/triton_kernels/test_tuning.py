"""Choosing a configuration: fixed, timed once, remembered in memory and on disk."""

import json
import tempfile
from pathlib import Path

import pytest
from helpers import require_triton

require_triton()
from ssvdo_kernels.triton import tuning
from ssvdo_kernels.triton.configs import CONFIGS

CANDIDATES = CONFIGS["add_product"]["half"]


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_memory", {})
    monkeypatch.setattr(tuning, "_loaded", set())
    monkeypatch.setenv("SSVDO_CACHE", str(tmp_path / "cache"))


def choose(tokens=100, milliseconds=(3.0, 1.0, 2.0), kernel="add_product", precision="half"):
    """The configuration taken and those that were timed."""
    timed = []

    def time(call):
        call()
        return milliseconds[len(timed) - 1]

    return tuning.choose(kernel, precision, tokens, (8, 4), timed.append, device="Some GPU", time=time), timed


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
    assert tuning.choose("add_product", "half", 100, (8, 4), lambda config: None) == CANDIDATES[0]


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
