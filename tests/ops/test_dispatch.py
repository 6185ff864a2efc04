"""Which backend serves the token path, and the reason it gives."""

import pytest
import torch
from helpers import make_layer

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.ops import dispatch
from ssvdo_kernels.ops.dispatch import token_path

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


@pytest.mark.parametrize("version, works", [("3.4.9", False), ("3.5.0", True), ("3.10.0+git1", True), ("4.0", True)])
def test_old_triton(monkeypatch, version, works):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    dispatch.without_triton.cache_clear()
    try:
        assert dispatch.without_triton() == ("" if works else f"Triton {version} is older than 3.5")
    finally:
        dispatch.without_triton.cache_clear()
