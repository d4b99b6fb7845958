"""What every test can count on: nothing is fetched from the Hugging Face hub, and hypothesis is told how long it may take."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported, so before any test module is

from hypothesis import settings

from octavo.runtime.start import prepare_environment

prepare_environment()  # the engine processes that tests start then share compiled kernels with this one

# Time limits are off because shared machines stall; print_blob gives the line that replays a failure.
settings.register_profile("default_run", max_examples=50, deadline=None, print_blob=True)
settings.register_profile("long_run", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default_run"))
