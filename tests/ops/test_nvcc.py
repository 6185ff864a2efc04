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
    assert len(results) == 14 and all(r.arch == arch for r in results)
    assert [r for r in results if r.spill_bytes] == []
    rows = re.findall(r"^\| (\w+Kernel[^|]*) \| (fp[^|]+) \|", cuda_table.PAGE.read_text(), re.M)
    assert set(rows) == {(r.kernel, r.types) for r in results}


def test_a_report_is_read():
    log = """ptxas info    : Compiling entry function '_ZN5ssvdo6device10run_kernelINS0_{}EEvT_' for 'sm_80'
ptxas info    : Function properties for _ZN5
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 98 registers, used 1 barriers"""
    for name, kernel in (("12FactorKernelIdEE", "FactorKernel"),
                         ("11OuterKernelIdNS0_13OuterBackwardEEE", "OuterKernel, backward")):  # fmt: skip
        found = cuda_table.parse(log.format(name))
        assert found == [cuda_table.Compiled(kernel, "fp64", "80", 98, 16)]
        assert f"| {kernel} | fp64 | 98 |" in cuda_table.markdown(found)
    with pytest.raises(ValueError, match="cannot read"):
        cuda_table.parse("Compiling entry function 'foo' for 'sm_80'")
