"""Settings that every test shares."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# A machine that is busy with other tests is slow now and then, which says nothing about the code.
_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("ci", _patient, derandomize=True)
settings.register_profile("long", _patient, max_examples=3000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Models that are not in the cache are looked for nowhere else, but by tests that say so.
os.environ["HF_HUB_OFFLINE"] = "1"

# Started in the background, tests ignore Ctrl-C, and so would the programs that they send it to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
