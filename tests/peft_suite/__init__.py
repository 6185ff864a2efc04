"""PEFT's own tests with SSVD-O in their tables: `nox -s peft-suite`."""
