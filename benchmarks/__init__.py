"""Benchmarks: SSVD-O beside a frozen nn.Linear (the floor) and its peers, interleaved in one run."""
