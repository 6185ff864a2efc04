"""The host core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (tests/csrc/sanitize.cpp)."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = {"plain": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"]} if X86 else {"plain": []}


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_clean(sanitizer, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    common = ["g++", "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread",
              "-DSSVDO_STD_THREADS", *(["-DSSVDO_X86"] if X86 else [])]  # fmt: skip
    sources = {**{f"csrc/cpu/{isa}.cpp": flags for isa, flags in FLAGS.items()}, "csrc/cpu/host.cpp": [],
               "tests/csrc/sanitize.cpp": []}  # fmt: skip
    objects = []
    for source, flags in sources.items():
        objects.append(tmp_path / f"{Path(source).stem}.o")
        command = [*common, *flags, "-c", source, "-o", objects[-1]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    program = tmp_path / "sanitize"
    linked = subprocess.run([*common, *objects, "-o", program], capture_output=True, text=True)
    if "cannot find" in linked.stderr:
        pytest.skip(f"the compiler has no runtime for {sanitizer}")
    assert linked.returncode == 0, linked.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(": ok\n"), done.stdout + done.stderr[-3000:]
