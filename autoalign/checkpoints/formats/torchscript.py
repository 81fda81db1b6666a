"""TorchScript archives: the tensors of a program that was saved along with its code, none of which is run.

The archive holds a pickle of its modules, of classes that only its own code defines. Each of them is read as a stub
with what was saved for it, and its tensors are the state dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autoalign.checkpoints.formats.records import Stub, module_tensors, read_zipped
from autoalign.checkpoints.stored import Contents, reading


def is_torchscript(names: Sequence[str]) -> bool:
    """Return True if torch would take a zip file with these members for a TorchScript archive."""
    return any(name.lower().endswith("/constants.pkl") for name in names)  # torch finds records in any case


def open_torchscript(file: Path) -> Contents:
    """Read which tensors the modules of a TorchScript archive hold, without running or compiling its code.

    Raises:
        CheckpointError: The archive is damaged, or holds modules with a state of their own making, as quantised ones.
    """
    with reading(file, "a TorchScript archive"):
        module, places = read_zipped(file)
        if not (isinstance(module, Stub) and _is_own(module)):
            raise ValueError(f"there is a {type(module).__name__} where a module should be")
        return Contents(
            {key: places.tensor(view) for key, view in module_tensors(module, _is_own)}, "TorchScript archive"
        )


def _is_own(value: object) -> bool:
    """Return True for a stub of a class that the code of the archive defines."""
    return isinstance(value, Stub) and value.path.startswith("__torch__.")
