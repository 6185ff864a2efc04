"""Which backend serves the token path, and the reason it gives."""

import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make_layer

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.ops import dispatch
from ssvdo_kernels.ops.dispatch import token_backend, token_path

PACKAGE = Path(dispatch.__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with Triton and a GPU of compute capability 9.0."""
    monkeypatch.setattr(dispatch, "without_triton", lambda: "")
    monkeypatch.setattr(dispatch, "_capability", lambda index: (9, 0))


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "without_triton", lambda: "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("dtype, tf32, want", [
    (torch.bfloat16, False, "triton"), (torch.float16, False, "triton"), (torch.float32, True, "triton"),
    (torch.float32, False, "reference"), (torch.float64, False, "reference")])  # fmt: skip
def test_auto_on_a_gpu(gpu, dtype, tf32, want):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        backend, reason = token_path("auto", CUDA, dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert backend == want
    assert ("tensor cores" if want == "triton" else "vendor") in reason


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="before torch 2.9")
def test_either_of_the_switches_for_tf32(gpu):
    """In a process of its own, as torch does not forget that both were used."""
    code = ("import torch; from ssvdo_kernels.traffic import tf32; m = torch.backends.cuda.matmul; found = [tf32()]\n"
            "m.allow_tf32 = True; found.append(tf32()); m.fp32_precision = 'ieee'; found.append(tf32())\n"
            "m.fp32_precision = 'tf32'; found.append(tf32()); print(found)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, True, False, True]"


def test_a_forward_asks_once(gpu, monkeypatch):
    dispatch._token_backend.cache_clear()
    assert token_backend("auto", CUDA, torch.bfloat16) == "triton"
    monkeypatch.setattr(dispatch, "token_path", None)
    assert token_backend("auto", CUDA, torch.bfloat16) == "triton"
    assert token_backend("auto", CPU, torch.bfloat16) == token_backend("reference", CUDA, torch.half) == "reference"
    dispatch._token_backend.cache_clear()


def test_old_gpu(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "_capability", lambda index: (7, 5))
    assert token_path("auto", CUDA, torch.float16) == ("reference", "compute capability 7.5 is below 8.0")
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve torch.float16 on cuda:0: .* 7\.5"):
        token_path("triton", CUDA, torch.float16)


def test_other_vendors(gpu, monkeypatch):
    assert "xpu" in token_path("auto", torch.device("xpu"), torch.float16)[1]
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert token_path("auto", CUDA, torch.float16)[0] == "reference"


def test_auto_on_the_cpu(interpreter):
    assert token_path("auto", CPU, torch.float32)[0] == "reference"


def test_what_is_asked_for_is_taken(interpreter):
    assert token_path("triton", CPU, torch.float32)[0] == "triton"
    assert token_path("reference", CPU, torch.float32)[0] == "reference"


@pytest.mark.parametrize("value, on", [("1", True), ("true", True), ("Yes", True), ("on", True), ("0", False),
                                       ("", False), ("off", False), (None, False)])  # fmt: skip
def test_the_interpreter_is_asked_for_as_triton_reads_it(monkeypatch, value, on):
    monkeypatch.delitem(sys.modules, "ssvdo_kernels.triton.kernels", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert dispatch.interpreting() is on


def test_kernels_that_were_loaded_to_be_compiled_are_not_interpreted(monkeypatch):
    monkeypatch.setattr(dispatch, "without_triton", lambda: "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "ssvdo_kernels.triton.kernels", SimpleNamespace(INTERPRETED=False))
    with pytest.raises(RuntimeError, match="set before the first import, would interpret"):
        token_path("triton", CPU, torch.float32)


def test_bfloat16_is_not_interpreted(interpreter):
    with pytest.raises(RuntimeError, match="multiplies bfloat16 wrongly"):
        token_path("triton", CPU, torch.bfloat16)


def test_no_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "without_triton", lambda: "")
    layer = make_layer(12, 4, outer_rank=2, backend="triton")
    with pytest.raises(RuntimeError, match=r"backend='triton' .*allowed here: 'reference', 'auto'"):
        layer(torch.randn(3, 4, dtype=torch.float64))


def test_no_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "without_triton", lambda: "the package triton is not installed")
    assert token_path("auto", CUDA, torch.float16) == ("reference", "the package triton is not installed")


def test_unknown_dtype(gpu):
    assert token_path("auto", CUDA, torch.float8_e4m3fn)[0] == "reference"


@pytest.mark.parametrize("path", ["factored", "core"])
def test_paths_without_kernels(path):
    with pytest.raises(ValueError, match=f"path='{path}' has no Triton kernels"):
        SSVDOConfig(path=path, backend="triton")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda'"):
        SSVDOConfig(backend="cuda")


OWN = f"_C{EXTENSION_SUFFIXES[0]}"


@pytest.mark.parametrize("file, content, said", [
    ("README", b"", "was not built at installation (no C++ compiler or pybind11 then, or SSVDO_BUILD=0)"),
    ("_build.json", b'{"core": "pybind11 was not installed", "cuda": ""}',
     "was not built at installation (pybind11 was not installed)"),
    ("_C.cpython-27m.so", b"", "was not built at installation for this Python, only _C.cpython-27m.so"),
    (OWN, b"\x7fELF", "is there but does not load: "),
    ("_C.py", b"openmp = True", "is there but is of another version (interface 0, needed: ")])  # fmt: skip
def test_why_there_is_no_core(tmp_path, file, content, said):
    """One that is there and of no use gives a warning too, and PyTorch serves."""
    shutil.copytree(PACKAGE, tmp_path / "ssvdo_kernels", ignore=shutil.ignore_patterns("_C*", "_build*", "__pycache__"))
    (tmp_path / "ssvdo_kernels" / file).write_bytes(content)
    code = ("import runpy, sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
            "runpy.run_module('ssvdo_kernels.info', run_name='__main__')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
    assert f"the compiled core {said}" in lines["compiled core"] and said in lines["cuda kernels"]
    assert lines["preparation"].startswith("reference: the compiled core") and said in lines["preparation"]
    assert ("RuntimeWarning" in done.stderr and said in done.stderr) == ("is there" in said)


def test_a_triton_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    dispatch.without_triton.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"triton is there but does not load: libtriton\.so: undefined"):
            token_path("triton", CUDA, torch.float16)
    finally:
        dispatch.without_triton.cache_clear()


@pytest.mark.parametrize("version, works", [("3.4.9", False), ("3.5.0", True), ("3.10.0+git1", True), ("4.0", True)])
def test_old_triton(monkeypatch, version, works):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    dispatch.without_triton.cache_clear()
    try:
        assert dispatch.without_triton() == ("" if works else f"Triton {version} is older than 3.5")
    finally:
        dispatch.without_triton.cache_clear()
