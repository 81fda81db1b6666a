"""A demonstration: torchvision's RegNet from a file into timm's, whose keys have other names and another order."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment
from autoalign.api import load
from autoalign.errors import DependencyError

SOURCE = "torchvision.models.regnet_y_400mf"
TARGET = "timm.create_model('regnety_004')"
TOLERANCE = 1e-3  # of the largest relative difference of two outputs that are called equal


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The result of the demonstration."""

    alignment: Alignment
    difference: float  # of the outputs of source and target, relative to the source's largest output

    @property
    def equal(self) -> bool:
        """True if every tensor was loaded and both models compute the same."""
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
        # Noise of large and small scale: in mere pixel noise, all images are alike once they are averaged.
        images = nn.functional.interpolate(torch.randn(4, 3, 7, 7), 224, mode="bicubic") + torch.randn(4, 3, 224, 224)
        source = randomise_norms(torchvision.models.regnet_y_400mf(weights=None), images)
        target = timm.create_model("regnety_004").eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "regnet_y_400mf.safetensors"
        save_file(source.state_dict(), path)
        alignment = load(target, path)
    with torch.inference_mode():
        wanted, got = source(images), target(images)
    return Demonstration(alignment, float((got - wanted).abs().max() / wanted.abs().max()))


def randomise_norms(model: nn.Module, images: Tensor) -> nn.Module:
    """Randomise the gains and biases of every BatchNorm, and give it the statistics of images, in place.

    As they are initialised they are all alike, so that a misplaced one would not show, and a deep network's output
    would hardly depend on its input.

    Returns:
        The model, in evaluation mode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0  # the statistics of the next batch are all that counts
    with torch.no_grad():
        model.train()(images)
    return model.eval()
