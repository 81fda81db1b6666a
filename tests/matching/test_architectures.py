"""Fingerprints and the index of known architectures."""

from __future__ import annotations

import time

import pytest
import timm
import torch

from autoalign.matching import architectures
from autoalign.matching.architectures import (
    INDEX_FILE,
    fingerprint,
    index,
    likenesses,
    of_equal_blocks,
    resemblances,
)
from autoalign.plan.specs import TensorSpec, specs_of


def specs(name: str, **options: object) -> tuple[TensorSpec, ...]:
    with torch.device("meta"):
        return specs_of(timm.create_model(name, **options).state_dict())


def test_the_index_is_small_and_knows_its_versions() -> None:
    assert INDEX_FILE.stat().st_size < 3_000_000
    assert index().versions.keys() == {"torchvision", "timm", "transformers", "mmpretrain"}
    assert len(index()) > 2_200


def test_order_and_widths_of_blocks_do_not_count() -> None:
    given = specs("vit_tiny_patch16_224")
    own = fingerprint(given)
    assert own == fingerprint(given[::-1])
    assert (own.width, own.depth) == (192, 12)
    wider = fingerprint(specs("vit_tiny_patch16_224", embed_dim=240, depth=9))
    assert own.shapes.keys().isdisjoint(wider.shapes.keys() - {(1000,)})
    assert own.blocks.keys() == wider.blocks.keys()
    assert of_equal_blocks(wider, index()) is not None


def test_a_look_up_is_quick() -> None:
    given = specs("resnet50", num_classes=3)
    own = fingerprint(given)
    likenesses(given, own, index())
    since = time.process_time()
    found = likenesses(given, fingerprint(given), index())[0]
    assert time.process_time() - since < 0.1
    assert (found.classes, found.score) == (3, 1.0)
    assert "timm:resnet50" in map(str, found.architectures)


def test_a_network_is_not_looked_up_for_a_message_where_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    given = specs("resnet34")
    assert resemblances(given, ()) == ["The source looks like torchvision's resnet34 (182 of 182 shapes)."]
    monkeypatch.setattr(architectures, "_MAX_TENSORS_TO_MENTION", 100)
    assert resemblances(given, ()) == []
