"""How much the tests of trust try: HYPOTHESIS_PROFILE=nightly for the long form, by hand; CI runs the short one."""

import os

from hypothesis import HealthCheck, settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def times(ci, nightly):
    """How often a test repeats."""
    return nightly if NIGHTLY else ci


def examples(ci, nightly):
    """Hypothesis' settings for so many cases."""
    return settings(max_examples=times(ci, nightly), deadline=None, derandomize=not NIGHTLY, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip
