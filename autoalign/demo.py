"""A demonstration: torchvision's RegNet from a file into timm's, whose keys have other names and another order."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoalign.alignment import Alignment
from autoalign.errors import DependencyError
from autoalign.loading import load

SOURCE = "torchvision.models.regnet_y_400mf"
TARGET = "timm.create_model('regnety_004')"
TOLERANCE = 1e-3  # of the largest relative difference of two outputs that are called equal


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What came of the demonstration."""

    alignment: Alignment
    difference: float  # of the outputs of source and target, relative to the source's largest output

    @property
    def equal(self) -> bool:
        """Whether every tensor was loaded and both models compute the same."""
        return not self.alignment.missing_keys and self.difference <= TOLERANCE


def demonstrate(seed: int = 0) -> Demonstration:
    """Save a randomly initialised model of one library, load it into another library's, and compare what they compute.

    Nothing is downloaded. The global random state is left as it was.

    Raises:
        DependencyError: timm or torchvision is not installed.
    """
    try:
        import timm
        import torchvision
        from safetensors.torch import save_file
    except ImportError as error:
        raise DependencyError(
            f"The demonstration needs timm and torchvision, and {error.name} is not installed. "
            "Nothing was loaded. Install them with: pip install timm torchvision"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = randomise_norms(torchvision.models.regnet_y_400mf(weights=None)).eval()
        target = timm.create_model("regnety_004").eval()
        images = torch.randn(2, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "regnet_y_400mf.safetensors"
        save_file(source.state_dict(), path)
        alignment = load(target, path)
    with torch.inference_mode():
        wanted, got = source(images), target(images)
    return Demonstration(alignment, float((got - wanted).abs().max() / wanted.abs().max()))


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every BatchNorm values of its own, in place: as initialised they are all alike, and none could be misplaced.

    >>> norm = nn.BatchNorm2d(4)
    >>> len(set(randomise_norms(norm).running_var.tolist()))
    4
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    statistic.add_(torch.rand_like(statistic), alpha=0.5)
    return model
