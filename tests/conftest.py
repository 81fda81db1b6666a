from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import settings

# A shared machine may be slow at any moment; what a property costs is measured in benchmarks/.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
