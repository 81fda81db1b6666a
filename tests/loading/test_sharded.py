"""Sharded models: each of these tests starts processes, whose work is in ``sharded_ranks``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save

from autoalign import align
from autoalign.api import load
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import InputError
from autoalign.loading.mapped import MappedFiles
from autoalign.loading.sharded import digests, ranks_of
from tests.loading import sharded_ranks as ranks


def state_dict() -> dict[str, Tensor]:
    return ranks.other_names(ranks.filled().state_dict())


@pytest.fixture
def file(tmp_path: Path) -> str:
    save_file(state_dict(), tmp_path / "renamed.safetensors")
    return str(tmp_path / "renamed.safetensors")


@pytest.fixture
def paths(tmp_path: Path, file: str) -> dict[str, str]:
    """Write the same checkpoint as one file, as two with an index, and as a distributed one."""
    tensors = list(state_dict().items())
    (tmp_path / "shards").mkdir()
    listed: dict[str, str] = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(part), tmp_path / "shards" / name)
        listed |= dict.fromkeys(dict(part), name)
    index: Any = {"metadata": {}, "weight_map": listed}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    save(dict(tensors), checkpoint_id=tmp_path / "distributed", no_dist=True)
    return {"file": file, "shards": str(tmp_path / "shards"), "distributed": str(tmp_path / "distributed")}


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_two_ranks(tmp_path: Path, paths: dict[str, str]) -> None:
    """Starting processes takes longer than what they do, so that they do it one after the other."""
    works: list[Any] = [(ranks.loads_from, (paths, "fsdp")), (ranks.loads_from, (paths, "tensor parallel"))]
    works += [
        (work, (paths["file"],)) for work in (ranks.reads_its_part, ranks.reports_once, ranks.adapts, ranks.dequantises)
    ]
    works += [(work, (paths["file"],)) for work in (ranks.keeps_no_old_values, ranks.loads_sharded_tensors)]
    works += [(work, (paths["file"],)) for work in (ranks.fails_together, ranks.meets_an_unsharded_rank)]
    works += [(ranks.meets_a_cut_file, (paths["file"],))]
    ranks.run(2, works, tmp_path)
    model = ranks.filled(1)
    with pytest.raises(InputError, match=r"is a part of a tensor that is spread over 2 processes"):
        load(model, f"{paths['file']}-0.pt")
    ranks.assert_loaded(model, ranks.filled(1))


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_four_ranks(tmp_path: Path, paths: dict[str, str]) -> None:
    works = [(ranks.loads_from, (paths, sharding)) for sharding in ("fsdp", "both")]
    ranks.run(4, [*works, (ranks.reads_its_part, (paths["file"],))], tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_a_mesh_of_cuda_devices(tmp_path: Path, file: str) -> None:
    ranks.run(2, [(ranks.on_cuda, (file,))], tmp_path)


def test_digests_tell_files_apart_whose_tensors_are_read_as_a_whole(tmp_path: Path) -> None:
    arrays = {f"layer{number}.weight": np.zeros((number + 2, 5)) for number in range(20)}
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "file.npz", allow_pickle=False, **arrays)
        source = open_checkpoint(tmp_path / name / "file.npz")
        assert not source.is_resident
        target = {key: torch.zeros(spec.shape) for key, spec in zip(source, source.specs, strict=True)}
        found.append(digests(source, align(source, target), MappedFiles(frozenset())))
        arrays["layer19.weight"][3, 3] = 1.0  # of the largest
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_a_plain_model_has_no_ranks() -> None:
    assert ranks_of(nn.Linear(2, 2)) is None
    with pytest.raises(InputError, match=r"Expected an nn.Module"):
        load({}, {})  # type: ignore[arg-type]
