"""A Trainer of Lightning that fits, resumes and loads, with weights under other names."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autoalign
from autoalign import DependencyError, PartialLoadWarning
from autoalign.integrations import lightning

if lightning.Callback is object:
    pytest.skip("Lightning is not installed", allow_module_level=True)
L: Any = sys.modules[lightning.Callback.__module__.partition(".")[0]]
L = getattr(L, "pytorch", L)

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(L.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2), next=nn.Conv2d(2, 4, 1))
        )
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(images).mean((2, 3)))
        return out

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.0)


class Renamed(Plain):
    """Takes what ``Plain`` saves, though it calls everything otherwise."""

    def __init__(self) -> None:
        super().__init__()
        del self.backbone
        self.features = nn.ModuleList([nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1)])
        self.classifier = self.head
        del self.head

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classifier(nn.Sequential(*self.features)(images).mean((2, 3)))
        return out

    on_load_checkpoint = lightning.on_load_checkpoint


def data() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.rand(4, 1, 5, 5), torch.tensor([0, 1, 2, 0])), batch_size=2)


def trainer(folder: Path, epochs: int = 1, **options: Any) -> Any:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Plain, Path]:
    model, run = Plain(), trainer(tmp_path)
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    return model, tmp_path / "plain.ckpt"


def test_a_callback_fills_the_module_when_a_fit_begins(saved: tuple[Plain, Path], tmp_path: Path) -> None:
    given, path = saved
    model, callback = Renamed(), lightning.AlignedWeights(path)
    trainer(tmp_path, callbacks=[callback]).fit(model, data())
    assert torch.equal(model.classifier.weight, given.head.weight)
    assert callback.alignment is not None
    assert callback.alignment.missing_keys == []


def test_a_callback_may_fill_a_part_and_says_what_it_does_not(saved: tuple[Plain, Path], tmp_path: Path) -> None:
    given, path = saved
    model, callback = Renamed(), lightning.AlignedWeights(path, submodule="features", exclude="head")
    trainer(tmp_path, callbacks=[callback]).fit(model, data())
    assert torch.equal(model.state_dict()["features.0.weight"], given.state_dict()["backbone.conv.weight"])
    model = Renamed()
    model.classifier = nn.Linear(4, 7)
    with pytest.warns(PartialLoadWarning, match="2 keep their values: classifier.weight, classifier.bias"):
        trainer(tmp_path, callbacks=[lightning.AlignedWeights(path)]).fit(model, data())


def test_a_module_takes_checkpoints_of_other_code(saved: tuple[Plain, Path], tmp_path: Path) -> None:
    given, path = saved
    assert torch.equal(Renamed.load_from_checkpoint(path).classifier.weight, given.head.weight)
    resumed, before = Renamed(), lightning.AlignedWeights(Plain())
    run = trainer(tmp_path, epochs=2, callbacks=[before])
    run.fit(resumed, data(), ckpt_path=path, weights_only=False)
    assert torch.equal(resumed.classifier.weight, given.head.weight)
    assert run.current_epoch == 2
    assert before.alignment is not None


def test_without_lightning_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning, "Callback", object)
    with pytest.raises(DependencyError, match="pip install lightning"):
        lightning.AlignedWeights("weights.pth")


def test_the_hook_is_the_same_as_a_load(saved: tuple[Plain, Path]) -> None:
    given, path = saved
    model = Renamed()
    autoalign.load(model, path)
    assert torch.equal(model.classifier.bias, given.head.bias)
