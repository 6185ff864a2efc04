"""The CUDA code compiles for every architecture without warnings and spills."""

import re
import shutil

import pytest

from benchmarks import cuda_table


@pytest.mark.parametrize("arch", cuda_table.ARCHS)
def test_no_spills(arch):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    results = cuda_table.compile_for([arch])
    assert len(results) == 26 and all(r.arch == arch for r in results)
    assert [r for r in results if r.spill_bytes] == []
    rows = re.findall(r"^\| (\w+Kernel) \| (fp[^|]+) \|", cuda_table.PAGE.read_text(), re.M)
    assert set(rows) == {(r.kernel, r.types) for r in results}


def test_a_report_is_read():
    name = "_ZN5ssvdo6device10run_kernelINS0_13ProductKernelIfNS_7Float16ELb1ELb0EEEfEEvT_"
    log = f"""ptxas info    : Compiling entry function '{name}' for 'sm_80'
ptxas info    : Function properties for _ZN5
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 98 registers, used 1 barriers"""
    assert cuda_table.parse(log) == [cuda_table.Compiled("ProductKernel", "fp32, fp16", "80", 98, 16)]
    two = [cuda_table.Compiled("K", "fp32", "80", registers, 0) for registers in (98, 96)]
    assert "| K | fp32 | 98 |" in cuda_table.markdown(two)
    with pytest.raises(ValueError, match="cannot read"):
        cuda_table.parse("Compiling entry function 'foo' for 'sm_80'")
