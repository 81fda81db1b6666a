"""Numpy's arrays as torch's tensors: which dtypes both have, and how the one becomes the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def torch_dtype(dtype: np.dtype) -> torch.dtype | None:
    """Look up torch's counterpart of a numpy dtype, of any byte order; None where torch has none.

    The types that ``ml_dtypes`` adds to numpy, such as bfloat16, have their counterparts too.

    >>> torch_dtype(np.dtype(">f4")), torch_dtype(np.dtype("U3"))
    (torch.float32, None)
    """
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype) or found.itemsize != dtype.itemsize:
        return None
    return found if dtype.kind in "biufc" or found.is_floating_point else None


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Make a tensor over the memory of an array; it is copied only where torch cannot take it over.

    >>> as_tensor(np.array([0x3F80], dtype=np.uint16), torch.bfloat16)
    tensor([1.], dtype=torch.bfloat16)

    Args:
        array: Of any layout and byte order.
        dtype: As from ``torch_dtype``, or another of the same size, in which the array's bytes are then read.
    """
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch refuses negative strides and warns of arrays that cannot be written to
    array = np.require(array, requirements=("C", "W"))
    if array.dtype.kind not in "biufc":  # what numpy holds without knowing it
        array = array.view(f"u{array.dtype.itemsize}")
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)
