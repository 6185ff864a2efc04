"""How setup.py asks the compiler for OpenMP."""

import os
import shutil
import subprocess
import sys
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
