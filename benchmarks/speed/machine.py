"""What the figures were measured with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    *("torch", "numpy", "scipy", "rapidfuzz", "safetensors", "torchvision", "timm", "transformers"),
    *("weightbridge", "torch_liberator", "lit-wsl"),
)


def machine() -> dict[str, object]:
    """Name the versions and the machine, without what would tell whose it is."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "packages": {package: _version(package) for package in PACKAGES},
    }


def machine_line() -> str:
    """Write it as a line."""
    facts = machine()
    packages = facts.pop("packages")
    assert isinstance(packages, dict)
    versions = ", ".join(f"{package} {number}" for package, number in packages.items() if number)
    absent = [package for package, number in packages.items() if not number]
    line = f"Python {facts['python']}, {versions}; {facts['system']}, {facts['cpus']} CPUs, "
    line += f"{facts['torch threads']} threads of torch."
    return line + (f" Not installed: {', '.join(absent)}." if absent else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
