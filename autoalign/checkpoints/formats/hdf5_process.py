"""Lists what is in an HDF5 file, or writes one array of it to stdout: a program of its own, run by ``hdf5.py``.

The HDF5 library does not end on some damaged files, and crashes on others. It imports nothing of the package.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

MAX_MEMBERS, MAX_DEPTH = 2**18, 64
_PART = Path(__file__).parents[1] / "part.py"  # which needs nothing of the package either


def listed(group: Any, left: list[int], depth: int = 0) -> dict[str, Any]:
    """List a group: its members by name, and the texts of its attributes; links are not followed."""
    import h5py

    found: dict[str, Any] = {}
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        left[0] -= 1
        if left[0] < 0 or depth > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_MEMBERS:,} members, or more than {MAX_DEPTH} in each other")
        child = group[name]
        found[name] = listed(child, left, depth + 1) if isinstance(child, h5py.Group) else array_of(child)
    return {"members": found, "texts": {name: texts(group.attrs[name]) for name in group.attrs if name in NAMES}}


NAMES = ("name", "layer_names", "weight_names")


def texts(value: Any) -> Any:
    """Return an attribute as a text or a list of them."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return str(value)
    return [texts(item) for item in value]


def array_of(dataset: Any) -> dict[str, Any]:
    """Describe an array: where its values stand, if they are in the file as they are."""
    is_inside = not (dataset.external or dataset.is_virtual)
    return {
        "shape": None if dataset.shape is None else list(dataset.shape),
        "dtype": dataset.dtype.str,
        "offset": dataset.id.get_offset() if is_inside and dataset.chunks is None else None,
        "stored": dataset.id.get_storage_size() if is_inside else 0,
    }


def main(file: str, start: str, size: str, *path: str) -> None:
    """Write the list, or the values of the array at a path, of a part of a file."""
    import h5py

    with Path(file).open("rb", 0) as whole:
        given: Any = file
        if int(start) or int(size) != whole.seek(0, io.SEEK_END):
            given = run_path(str(_PART))["Part"](whole, int(start), int(size))
        with h5py.File(given, "r") as source:
            if path:
                sys.stdout.buffer.write(source[path[0]][()].tobytes())
            else:
                json.dump(listed(source, [MAX_MEMBERS]), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
