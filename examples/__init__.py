"""Examples that run from the repository root with `python -m examples...`."""
