"""Builds the compiled core where there is a compiler, its CUDA part where there is nvcc; metadata: pyproject.toml.

    SSVDO_BUILD=0       leaves it out; =1: what cannot be built is an error, not a smaller install
    SSVDO_CUDA_ARCHS    for which GPUs, e.g. "80,90a"; "none": no CUDA part. Default: those of ARCHS that nvcc knows
    SSVDO_CXXFLAGS      more flags for the host compiler, which CC and CXX name ("ccache g++" is fine)

What is left out, and why, is written to ssvdo_kernels/_build.json, for `python -m ssvdo_kernels.info`. A wheel without
the core is tagged for every platform.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-g0", *(["-DSSVDO_X86"] if X86 else [])]
FLAGS += shlex.split(os.environ.get("SSVDO_CXXFLAGS", ""))
ISA_FLAGS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"]}
SOURCES = ["csrc/bindings.cpp", "csrc/cpu/host.cpp", "csrc/cpu/plain.cpp"]
SOURCES += ["csrc/cuda/bindings.cpp", "csrc/cuda/emulate.cpp"]
SOURCES += ["csrc/cpu/avx2.cpp", "csrc/cpu/avx512.cpp"] if X86 else []
ARCHS = ("80", "86", "89", "90a", "100", "120")
STRICT = os.environ.get("SSVDO_BUILD") == "1"
LEFT_OUT = {"core": "", "cuda": ""}  # part -> why; "": it is there


def say(text):
    print(f"ssvdo_kernels: {text}. SSVDO_BUILD=1 makes this an error.", file=sys.stderr)


def short(error):
    """One line; of a command that failed its name alone."""
    line = str(error)
    for failed in (r"Command '\['([^']+)'.*\]' returned non-zero exit status (\d+)\.",
                   r"command '([^']+)' failed with exit code (\d+)"):
        line = re.sub(failed, lambda m: f"{Path(m[1]).name} ended with {m[2]}", line)
    return f"{line.splitlines()[0] if line else type(error).__name__}, in the build"


def record(folder):
    """Writes LEFT_OUT into the package below `folder`."""
    target = Path(folder) / "ssvdo_kernels" / "_build.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(LEFT_OUT) + "\n", encoding="utf-8")


class Cuda:
    """nvcc, what it builds for, and the static runtime."""

    def __init__(self):
        home = os.environ.get("CUDA_HOME")
        self.nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
        asked = os.environ.get("SSVDO_CUDA_ARCHS", "")
        self.archs = []
        if asked == "none" or not self.nvcc:
            LEFT_OUT["cuda"] = "SSVDO_CUDA_ARCHS=none" if asked == "none" else "no nvcc was found"
        else:
            known = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
            known = {line.removeprefix("compute_") for line in known.split()}
            self.archs = asked.split(",") if asked else [a for a in ARCHS if a.rstrip("a") in known]

    def compile(self, source, target):
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        portable = [a for a in self.archs if a.isdigit()]
        codes += [f"-gencode=arch=compute_{portable[-1]},code=compute_{portable[-1]}"] if portable else []
        command = [self.nvcc, "-std=c++17", "-O3", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes,
                   f"-DSSVDO_ARCHITECTURES={' '.join(self.archs)}", "-c", source, "-o", str(target)]  # fmt: skip
        noted, newest = target.with_suffix(".command"), max(p.stat().st_mtime for p in Path("csrc").rglob("*.*"))
        if noted.exists() and noted.stat().st_mtime > newest and noted.read_text() == str(command):
            return
        subprocess.run(command, check=True)
        noted.write_text(str(command))

    def runtime(self):
        """libcudart_static.a of this nvcc, which says itself where its toolkit is."""
        said = subprocess.run([self.nvcc, "--dryrun", "-c", "csrc/cuda/device.cu"], capture_output=True, text=True,
                              check=True).stderr  # fmt: skip
        root = Path(re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)[1]).resolve()
        found = [*root.glob("lib*/libcudart_static.a"), *root.glob("targets/*/lib/libcudart_static.a")]
        if not found:
            raise FileNotFoundError(f"no libcudart_static.a below {root}")
        return str(found[0])


class Build(build_ext):
    """Each instruction set's file gets its own flags; OpenMP where the compiler has it; CUDA where there is nvcc."""

    def build_extensions(self):
        compiler = self.compiler
        compile_one, openmp = compiler._compile, self.has_openmp()

        def with_flags(obj, src, ext, cc_args, extra, pp_opts):
            extra = extra + ISA_FLAGS.get(Path(src).stem, []) + (["-fopenmp"] if openmp else [])
            return compile_one(obj, src, ext, cc_args, extra, pp_opts)

        compiler._compile = with_flags
        for ext in self.extensions:
            ext.extra_link_args += ["-fopenmp"] if openmp else []
            self.add_cuda(ext)
        super().build_extensions()

    def add_cuda(self, ext):
        try:
            cuda = Cuda()
            if cuda.archs:
                target = Path(self.build_temp) / "device.o"
                runtime = cuda.runtime()
                cuda.compile("csrc/cuda/device.cu", target)
                ext.extra_objects += [str(target), runtime]
                ext.libraries += ["rt", "dl", "pthread"]
                ext.define_macros.append(("SSVDO_CUDA", "1"))
        except (OSError, subprocess.CalledProcessError) as error:
            if STRICT:
                raise
            LEFT_OUT["cuda"] = short(error)
            say(f"the CUDA part was not built ({error})")

    def has_openmp(self):
        """Asks what will build the extension, in the same way: its command may have several words."""
        source = Path(self.build_temp) / "openmp.cpp"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        try:
            made = self.compiler.compile([str(source)], self.build_temp, extra_postargs=["-fopenmp"])
            self.compiler.link_shared_object(made, f"{source}.so", extra_postargs=["-fopenmp"], target_lang="c++")
        except (CompileError, LinkError) as error:
            if STRICT:
                raise
            say(f"the compiled core is built without OpenMP and will use one thread ({error})")
            return False
        return True

    def run(self):
        try:
            super().run()
        except Exception as error:
            if STRICT:
                raise
            LEFT_OUT["core"] = short(error)
            say(f"the compiled core was not built ({error}); the package runs on PyTorch alone")
        record("." if self.inplace or self.editable_mode else self.build_lib)


class Python(build_py):
    """Says what is left out where no extension is built, which would say it."""

    def run(self):
        super().run()
        if not self.distribution.has_ext_modules():
            record("." if self.editable_mode else self.build_lib)


class Wheel(bdist_wheel):
    """Without the compiled core, it is for every platform."""

    def run(self):
        self.run_command("build")
        if LEFT_OUT["core"]:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


def extensions():
    if os.environ.get("SSVDO_BUILD") == "0":
        LEFT_OUT["core"] = "SSVDO_BUILD=0"
        return []
    try:
        import pybind11
    except ImportError:
        if STRICT:
            raise
        LEFT_OUT["core"] = "pybind11 was not installed"
        say("pybind11 is not installed, so the compiled core is left out")
        return []
    depends = ["setup.py"]
    depends += [str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".cu")]
    return [Extension("ssvdo_kernels._C", SOURCES, [pybind11.get_include()], extra_compile_args=FLAGS, depends=depends,
                      language="c++", optional=False)]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "build_py": Python, "bdist_wheel": Wheel})
