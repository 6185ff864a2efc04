"""Builds the compiled core where there is a compiler; metadata stands in pyproject.toml.

SSVDO_BUILD=0 leaves it out; SSVDO_BUILD=1 makes a failed build an error instead of a pure-Python install.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-g0", *(["-DSSVDO_X86"] if X86 else [])]
FLAGS += os.environ.get("SSVDO_CXXFLAGS", "").split()
ISA_FLAGS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"]}
SOURCES = ["csrc/bindings.cpp", "csrc/cpu/host.cpp", "csrc/cpu/plain.cpp"]
SOURCES += ["csrc/cpu/avx2.cpp", "csrc/cpu/avx512.cpp"] if X86 else []


class Build(build_ext):
    """Each instruction set's file gets its own flags; OpenMP where the compiler has it."""

    def build_extensions(self):
        compiler = self.compiler
        compile_one, openmp = compiler._compile, self.has_openmp()

        def with_flags(obj, src, ext, cc_args, extra, pp_opts):
            extra = extra + ISA_FLAGS.get(Path(src).stem, []) + (["-fopenmp"] if openmp else [])
            return compile_one(obj, src, ext, cc_args, extra, pp_opts)

        compiler._compile = with_flags
        for ext in self.extensions:
            ext.extra_link_args += ["-fopenmp"] if openmp else []
        super().build_extensions()

    def has_openmp(self):
        source = Path(self.build_temp) / "openmp.cpp"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*self.compiler.compiler_cxx[:1], "-fopenmp", str(source), "-o", str(source.with_suffix(".out"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def run(self):
        try:
            super().run()
        except Exception as error:
            if os.environ.get("SSVDO_BUILD") == "1":
                raise
            print(f"ssvdo_kernels: the compiled core was not built ({error}); the package runs on PyTorch alone. "
                  "SSVDO_BUILD=1 makes this an error.", file=sys.stderr)


def extensions():
    if os.environ.get("SSVDO_BUILD") == "0":
        return []
    try:
        import pybind11
    except ImportError:
        if os.environ.get("SSVDO_BUILD") == "1":
            raise
        print("ssvdo_kernels: pybind11 is not installed, so the compiled core is left out", file=sys.stderr)
        return []
    depends = [str(p) for p in Path("csrc").rglob("*.h")]
    return [Extension("ssvdo_kernels._C", SOURCES, [pybind11.get_include()], extra_compile_args=FLAGS, depends=depends,
                      language="c++", optional=False)]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
