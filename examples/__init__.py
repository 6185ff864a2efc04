"""Examples that run from the repository root with `python -m examples...`."""

from ssvdo_kernels.console import print_anything

print_anything()  # every command here
