"""Adapter files under bad conditions: killed writers, full disks, read-only folders, hostile content."""

import copy
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thorough import examples, times
from torch import nn

from benchmarks.memory import Meter
from ssvdo_kernels import (
    BaseMismatchError,
    CheckpointError,
    SSVDOConfig,
    apply_ssvdo,
    load_ssvdo,
    save_ssvdo,
)
from ssvdo_kernels.cli import main as cli

CONFIG = SSVDOConfig(inner_ratio=0.5, outer_rank=2, target_modules=("0", "2"))


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))


def adapted(value):
    model = apply_ssvdo(base(), CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(value)
    return model


def value_in(folder):
    (value,) = {v for p in load_ssvdo(base(), folder).parameters() if p.requires_grad for v in p.flatten().tolist()}
    return value


WRITER = """
import sys, torch
sys.path[:0] = {here!r}
from test_files import adapted, save_ssvdo
models = [adapted(v) for v in (0.25, 0.5)]
print("ready", flush=True)
while True:
    for model in models:
        save_ssvdo(model, sys.argv[1])
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    save_ssvdo(adapted(0.25), tmp_path)
    script = textwrap.dedent(WRITER).format(here=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    for trial in range(times(4, 200)):
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        try:
            child.wait(random.Random(trial).uniform(0.002, 0.08))
            pytest.fail("the writer ended by itself")
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        assert value_in(tmp_path) in (0.25, 0.5)
        json.loads((tmp_path / "ssvdo_config.json").read_text())
        assert cli(["inspect", str(tmp_path)]) == 0


def test_a_full_disk_leaves_the_old_files(tmp_path):
    save_ssvdo(adapted(0.25), tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = len(before["ssvdo_model.safetensors"])
    for limit in (0, 100, whole // 2, whole - 1):  # bytes a file may have: the write fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError):
                save_ssvdo(adapted(0.5), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before, limit


def test_written_files_have_the_user_s_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        save_ssvdo(adapted(0.25), tmp_path)
    finally:
        os.umask(old)
    assert {f.name: oct(f.stat().st_mode & 0o777) for f in tmp_path.iterdir()} == {
        "ssvdo_model.safetensors": "0o640", "ssvdo_config.json": "0o640"}  # fmt: skip


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_step_leaves_the_old_files(tmp_path, monkeypatch, failing):
    save_ssvdo(adapted(0.25), tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        save_ssvdo(adapted(0.5), tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["ssvdo_config.json", "ssvdo_model.safetensors"])
def test_a_folder_in_a_file_s_place_leaves_the_old_files(tmp_path, name):
    save_ssvdo(adapted(0.25), tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    with pytest.raises(IsADirectoryError, match=f"{name} is a folder"):
        save_ssvdo(adapted(0.5), tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before
    with pytest.raises(NotADirectoryError, match="is no folder"):
        save_ssvdo(adapted(0.5), tmp_path / next(iter(before)) / "below")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [True, False])
def test_all_files_take_their_places_or_none(tmp_path, monkeypatch, error, links, old):
    """Also where the file system has no hard links."""
    if old:
        save_ssvdo(adapted(0.25), tmp_path)
    before, real, done = {f.name: f.read_bytes() for f in tmp_path.iterdir()}, os.replace, []

    def failing(*paths):
        done.append(paths)
        if len(done) == 2:
            raise error
        return real(*paths)

    def unknown(*_, **__):
        raise OSError("not supported")

    monkeypatch.setattr(os, "replace", failing)
    if not links:
        monkeypatch.setattr(os, "link", unknown)
    with pytest.raises(error):
        save_ssvdo(adapted(0.5), tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    monkeypatch.setattr(os, "replace", real)
    save_ssvdo(adapted(0.5), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ssvdo_config.json", "ssvdo_model.safetensors"]
    assert value_in(tmp_path) == 0.5


def test_a_read_only_folder_is_an_error_and_stays_as_it_is():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        save_ssvdo(adapted(0.25), folder)
        before = {f.name: f.read_bytes() for f in folder.iterdir()}
        model = adapted(0.5)
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        own = os.geteuid()
        try:
            if own == 0:  # root may write anywhere
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                save_ssvdo(model, folder)
        finally:
            os.seteuid(own)
            folder.chmod(0o755)
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of small adapters, without and with the basis."""
    found = []
    for own in (False, True):
        folder = save_ssvdo(adapted(0.25), tmp_path_factory.mktemp("adapter"), include_basis=own)
        found.append((folder / "ssvdo_model.safetensors").read_bytes())
    return found


def attempt(path):
    """Loads and inspects; only our own errors may come, and a failed load changes nothing."""
    model = base()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    try:
        load_ssvdo(model, path)
    except (CheckpointError, BaseMismatchError, ValueError) as error:
        assert str(path) in str(error) or "weight" in str(error), error
        assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base().named_modules()}
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    code = cli(["inspect", str(path)])
    assert code in (0, 1, 2)


@examples(300, 100_000)
@given(st.data())
def test_damaged_files_are_our_own_errors(saved, data):
    content = bytearray(data.draw(st.sampled_from(saved)))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(("flip", "cut", "insert", "length")))
        at = data.draw(st.integers(0, max(0, min(len(content), 6000) - 1)))
        if kind == "flip" and content:
            content[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ssvdo_model.safetensors"
        path.write_bytes(bytes(content))
        attempt(path)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=True), st.text(max_size=8),
    st.sampled_from(["torch.float32", "torch.nn", "torch.int8", "float", "", "__class__", "../etc/passwd", "cayley"]))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
                                                                                            max_size=3), max_leaves=6)


def places(node, path=()):
    """Every place in a JSON tree."""
    yield path
    if isinstance(node, dict):
        for key in node:
            yield from places(node[key], (*path, key))


@examples(300, 100_000)
@given(st.data())
def test_hostile_headers_are_our_own_errors(saved, data):
    content = data.draw(st.sampled_from(saved))
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["ssvdo"])
    for _ in range(data.draw(st.integers(1, 3))):
        tree = data.draw(st.sampled_from([header, header, outer]))
        *path, last = data.draw(st.sampled_from([p for p in places(tree) if p]))
        spot = tree
        for key in path:
            spot = spot[key]
        if data.draw(st.booleans()):
            spot[last] = data.draw(values)
        else:
            spot[data.draw(st.text(max_size=6))] = spot.pop(last)
        if not isinstance(outer.get("__metadata__"), dict):
            break
    if isinstance(outer.get("__metadata__"), dict) and "ssvdo" in outer["__metadata__"]:
        outer["__metadata__"]["ssvdo"] = json.dumps(header)
    text = json.dumps(outer).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ssvdo_model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        attempt(path)


def test_deeply_nested_metadata_is_our_own_error(tmp_path, saved):
    content = saved[0]
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    outer["__metadata__"]["ssvdo"] = "[" * 200_000
    text = json.dumps(outer).encode()
    path = tmp_path / "ssvdo_model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    attempt(path)


@examples(300, 200_000)
@given(st.dictionaries(st.sampled_from([*SSVDOConfig().to_dict(), "unknown"]), values, max_size=4))
def test_the_config_parser_gives_a_config_or_a_value_error(found):
    try:
        config = SSVDOConfig.from_dict(copy.deepcopy(found))
    except ValueError:
        return
    assert SSVDOConfig.from_dict(config.to_dict()) == config


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux tells it")
def test_memory_is_bounded_by_the_file(tmp_path, saved):
    """A header that claims terabytes is refused without allocating them."""
    content = saved[0]
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["ssvdo"])
    for layer in header["layers"].values():
        layer["out_features"] = layer["in_features"] = 2**40
        layer["config"]["inner_ratio"] = 1.0
    outer["__metadata__"]["ssvdo"] = json.dumps(header)
    text = json.dumps(outer).encode()
    path = tmp_path / "ssvdo_model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    meter = Meter(torch.device("cpu"))
    with pytest.raises(CheckpointError):
        load_ssvdo(base(), path)
    assert meter.mebibytes() < 50
