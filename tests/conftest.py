"""What holds for every test: the same examples in every run, others where they are asked for."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A run that met other examples each time would now and then fail for what nobody has just changed.
# METERING_TEST_RANDOM=1 looks for what is not known yet.
# How long an example takes says how busy the machine is, and nothing else.
timeless = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("the same", timeless, derandomize=True)
settings.register_profile("random", timeless, print_blob=True)
settings.load_profile("random" if os.environ.get("METERING_TEST_RANDOM") else "the same")
