"""weightbridge: partition refinement over two prefix trees."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout

import numpy as np
from torch import Tensor


def match(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Match all of both sides, and where that is refused, let both sides have tensors that are left over.

    It takes numpy arrays and returns arrays, so each source array holds its own number everywhere, without memory.

    Raises:
        ValueError: A group of tensors stays ambiguous; weightbridge then returns nothing.
    """
    from weightbridge import adapt

    keys = list(source)
    arrays = {
        key: np.broadcast_to(np.float64(number), tuple(tensor.shape))
        for number, (key, tensor) in enumerate(source.items())
    }
    wanted = {key: np.broadcast_to(np.float64(-1), tuple(tensor.shape)) for key, tensor in target.items()}
    with redirect_stdout(io.StringIO()):  # it prints what it could not pair
        try:
            adapted = adapt(arrays, wanted)
        except ValueError:
            adapted = adapt(arrays, wanted, ignore_unmatched_inputs=True, ignore_unmatched_outputs=True)
    numbers = {key: int(array.reshape(-1)[0]) for key, array in adapted.items() if array.size}
    return {key: keys[number] for key, number in numbers.items() if number >= 0}
