from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes test at once, each with one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background; some tests interrupt a process
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine may be slow at any moment; what a property costs is measured in benchmarks/.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=5_000)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_gold.py")  # the longest first: no process waits for another
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def registry() -> Iterator[None]:
    """Take what a test registers out of transformers' conversions again."""
    from transformers import conversion_mapping

    known = set(conversion_mapping.USER_REGISTERED_MAPPINGS)
    yield
    for name in conversion_mapping.USER_REGISTERED_MAPPINGS - known:
        (conversion_mapping._checkpoint_conversion_mapping_cache or {}).pop(name, None)
    conversion_mapping.USER_REGISTERED_MAPPINGS &= known
