"""How setup.py asks the compiler for OpenMP, and what it makes and writes down where a part cannot be built."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="setuptools is not installed")
SETUP = Path(__file__).parents[1] / "setup.py"
CODE = """
import runpy, sys, setuptools
setuptools.setup = lambda **options: None
build = runpy.run_path(sys.argv[1])["Build"](setuptools.Distribution())
from distutils.ccompiler import new_compiler
from distutils.sysconfig import customize_compiler
build.compiler, build.build_temp = new_compiler(), sys.argv[2]
customize_compiler(build.compiler)
print(build.has_openmp())
"""


def openmp(folder, **variables):
    """What `has_openmp` gives in a process of its own, and what it says; the process as it ended."""
    if not shutil.which("g++") or not SETUP.is_file():
        pytest.skip("no g++, or no sources")
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "SSVDO_BUILD": "", "SSVDO_CXXFLAGS": ""}
    for name, script in (("ccache", 'exec "$@"'), ("lacking", 'case "$*" in *openmp*) exit 1;; esac; exec g++ "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return subprocess.run([sys.executable, "-c", CODE, str(SETUP), str(folder / "temp")], cwd=folder,
                          capture_output=True, text=True, env=os.environ | own | variables)  # fmt: skip


@pytest.mark.parametrize("command", ["g++", "env g++", "ccache g++", "ccache g++ -O1"])
def test_a_compiler_may_be_several_words(tmp_path, command):
    done = openmp(tmp_path, CXX=command)
    assert done.stdout == "True\n" and "without OpenMP" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["lacking", "ccache lacking", "ccache no-such-compiler"])
def test_a_compiler_without_openmp_is_said_aloud(tmp_path, command):
    done = openmp(tmp_path, CXX=command)
    assert done.stdout == "False\n" and "is built without OpenMP and will use one thread (" in done.stderr
    strict = openmp(tmp_path, CXX=command, SSVDO_BUILD="1")
    assert strict.returncode == 1 and "CompileError" in strict.stderr


@pytest.fixture
def sources(tmp_path):
    """The package's sources; setup.py is run there by `python -c CODE`."""
    if not SETUP.is_file():
        pytest.skip("no sources")
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SETUP.with_name(name), tmp_path)
    for name in ("csrc", "ssvdo_kernels"):
        shutil.copytree(SETUP.with_name(name), tmp_path / name, ignore=ignored)
    return tmp_path


@pytest.mark.parametrize("before, variables, said", [
    ("sys.modules['pybind11'] = None", {}, "pybind11 was not installed"), ("", {"SSVDO_BUILD": "0"}, "SSVDO_BUILD=0"),
    ("", {"CC": "false", "CXX": "false"}, "false ended with 1, in the build")])  # fmt: skip
def test_a_wheel_without_the_core_is_for_every_platform_and_says_why(sources, before, variables, said):
    code = f"import sys; {before}\nsys.argv = ['setup.py', '-q', 'bdist_wheel']\nexec(open('setup.py').read())"
    own = {"SSVDO_BUILD": "", "SSVDO_CUDA_ARCHS": "none"} | variables
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True, env=os.environ | own)
    (wheel,) = (sources / "dist").iterdir()
    assert wheel.name == "ssvdo_kernels-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert json.loads(archive.read("ssvdo_kernels/_build.json"))["core"] == said
        assert b"Root-Is-Purelib: true" in archive.read("ssvdo_kernels-0.1.0.dist-info/WHEEL")
        assert "ssvdo_kernels/cli.py" in archive.namelist() and not any(".data/" in n for n in archive.namelist())


@pytest.mark.parametrize("said", ["Command '['/usr/bin/g++', '-c', 'a.cpp']' returned non-zero exit status 2.",
                                  "command '/usr/bin/g++' failed with exit code 2"])  # fmt: skip
def test_a_command_that_failed_is_said_by_its_name_alone(said):
    """In the words of subprocess, and of setuptools, whose newer versions pass the former on."""
    if not SETUP.is_file():
        pytest.skip("no sources")
    code = "import runpy, sys, setuptools\nsetuptools.setup = lambda **options: None\n" + (
        "print(runpy.run_path(sys.argv[1])['short'](sys.argv[2]))")
    done = subprocess.run([sys.executable, "-c", code, str(SETUP), said], capture_output=True, text=True, check=True)
    assert done.stdout == "g++ ended with 2, in the build\n"


@pytest.mark.parametrize("nvcc, said", [("exit 3", "nvcc ended with 3, in the build"), (None, "No such file")])
def test_why_the_cuda_part_is_left_out_is_written_down(tmp_path, nvcc, said):
    (tmp_path / "bin").mkdir()
    if nvcc:
        (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    code = CODE[: CODE.index("from distutils")] + (
        "build.build_temp = '.'\nbuild.add_cuda(setuptools.Extension('x', []))\n"
        "print(type(build).add_cuda.__globals__['LEFT_OUT']['cuda'])")
    own = {"CUDA_HOME": str(tmp_path), "SSVDO_BUILD": "", "SSVDO_CUDA_ARCHS": ""}
    done = subprocess.run([sys.executable, "-c", code, str(SETUP)], capture_output=True, text=True, check=True,
                          env=os.environ | own)  # fmt: skip
    assert said in done.stdout and "the CUDA part was not built" in done.stderr


def test_the_source_archive_holds_what_its_make_targets_need_and_no_recordings(tmp_path):
    root = SETUP.parent
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    done = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    kept = {f for f in done.stdout.splitlines() if not f.startswith(("examples/asr/speech/", ".ci/", ".git"))}
    code = f"import sys; sys.argv = ['setup.py', '-q', 'sdist', '-d', {str(tmp_path)!r}]\nexec(open('setup.py').read())"
    shutil.copytree(root, tmp_path / "own", ignore=lambda at, names: [
        n for n in names if n.startswith((".", "build")) or n.endswith((".egg-info", "speech"))])  # fmt: skip
    (tmp_path / "own" / "examples" / "asr" / "speech").mkdir()
    (tmp_path / "own" / "examples" / "asr" / "speech" / "one.flac").touch()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "own", check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert kept <= held, sorted(kept - held)
    assert not any(name.endswith((".flac", ".wav", ".so")) for name in held)
