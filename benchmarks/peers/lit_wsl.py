"""lit-wsl's WeightMapper: scores of shape, name and hierarchy. It needs lightning, so it is no part of ``bench``."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout

from torch import Tensor


def match(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Ask for the mapping with the defaults, buffers included; there is no execution order without models."""
    from lit_wsl.mapper.weight_mapper import WeightMapper

    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            mapper = WeightMapper(source_params=dict(source), target_params=dict(target), buffer_matching_mode="strict")
            mapping = mapper.suggest_mapping(validate_outputs=False).get_mapping()
    finally:
        logging.disable(level)
    return {other: own for own, other in mapping.items()}
