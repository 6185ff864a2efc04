"""SSVD-O in other libraries' own ways of adapting a model: `peft` and `espnet`."""
