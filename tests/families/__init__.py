"""Tiny models of the families of Transformers, and what adapters do on each: `nox -s families`."""
