"""Benchmarks: SSVD-O beside a frozen nn.Linear (the floor) and its peers, interleaved in one run."""

from ssvdo_kernels.console import print_anything

print_anything()  # every command here
