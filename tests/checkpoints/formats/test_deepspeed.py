"""Folders of DeepSpeed's ZeRO, written by hand as it writes them; what it wrote itself is in ``test_written.py``."""

from __future__ import annotations

import enum
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import CheckpointError


class Stage(enum.Enum):  # an object, as DeepSpeed's own is
    TWO = 2


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(7, 13), nn.LayerNorm(13)
        self.head, self.tied, self.frozen = nn.Linear(13, 3), nn.Linear(13, 3, bias=False), nn.Linear(5, 3)
        self.tied.weight = self.head.weight
        self.register_buffer("steps", torch.arange(3.0))


def write_zero(folder: Path, stage: int, ranks: int = 3) -> dict[str, Tensor]:
    """Write what the processes of a run write, and return the whole weights."""
    torch.manual_seed(stage)
    network = Network()
    weights = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    trained = [key for key, _ in network.named_parameters() if not key.startswith("frozen")]
    frozen = ["frozen.weight", "frozen.bias"]
    groups = [[key for key in trained if weights[key].dim() > 1], [key for key in trained if weights[key].dim() < 2]]

    def cut(tensor: Tensor, unit: int = 1) -> list[Tensor]:
        size = -(-tensor.numel() // (ranks * unit)) * unit
        padded = torch.cat([tensor.reshape(-1), tensor.new_zeros(size * ranks - tensor.numel())])
        return [part.clone() for part in torch.split(padded, size)]

    step = folder / "global_step2"
    step.mkdir()
    (folder / "latest").write_text("global_step2")
    low = {key: tensor.bfloat16() if key != "steps" else tensor for key, tensor in weights.items()}
    for rank in range(ranks):
        if stage == 3:
            cuts = [[cut(weights[key])[rank] for key in group] for group in groups]
            flat = {"fp32_flat_groups": [torch.cat(parts) for parts in cuts], "partition_count": ranks}
        else:
            cuts = [cut(torch.cat([weights[key].reshape(-1) for key in group]), unit=2) for group in groups]
            flat = {"single_partition_of_fp32_groups": [parts[rank] for parts in cuts], "partition_count": [ranks] * 2}
        saved: dict[str, object] = {"optimizer_state_dict": flat | {"zero_stage": stage, "kind": Stage.TWO}}
        torch.save(saved, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if rank and stage < 3:
            continue
        module = {key: low[key] if stage < 3 or key == "steps" else low[key].new_empty(0) for key in low}
        model = {
            "module": module,
            "buffer_names": ["steps"],
            "param_shapes": [{key: weights[key].shape for key in group} for group in groups],
            "frozen_param_shapes": {key: weights[key].shape for key in frozen},
            "frozen_param_fragments": {key: low[key] if stage < 3 else cut(low[key])[rank] for key in frozen},
            "shared_params": {"tied.weight": "head.weight"},
            "ds_version": "0.19.8",
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(model, step / name)
    return {key: low[key] if key in frozen else tensor for key, tensor in weights.items()}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_weights_are_put_together_in_float32(tmp_path: Path, stage: int, ranks: int) -> None:
    weights = write_zero(tmp_path, stage, ranks)
    for folder in (tmp_path, tmp_path / "global_step2"):
        checkpoint = open_checkpoint(folder)
        assert list(checkpoint) == list(weights)
        assert all(torch.equal(checkpoint[key], tensor) for key, tensor in weights.items())
        assert [checkpoint.spec(key).dtype for key in weights] == [tensor.dtype for tensor in weights.values()]
        assert f"from {ranks} parts of DeepSpeed's ZeRO" in checkpoint.notes[0]
        assert len(checkpoint.opened) == ranks + (ranks if stage == 3 else 1)
    model = Network()
    assert not any(autoalign.load(model, tmp_path))
    assert torch.equal(model.first.weight, weights["first.weight"])


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    write_zero(tmp_path, 3)
    step = tmp_path / "global_step2"
    with pytest.raises(CheckpointError, match=r"a part of a checkpoint of DeepSpeed's ZeRO.* Name their folder, or"):
        open_checkpoint(step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    part = step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = part.read_bytes()
    part.unlink()
    with pytest.raises(CheckpointError, match=r"2 of the 3 parts of the optimizer are in .* Complete the download"):
        open_checkpoint(tmp_path)
    torch.save({"optimizer_state_dict": {"fp32_flat_groups": [torch.ones(3)]}}, part)
    with pytest.raises(CheckpointError, match=r"its groups have .* elements fewer than its parameters"):
        open_checkpoint(tmp_path)
    part.write_bytes(content)
    part.with_name("zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"also split by tensor parallelism.*zero_to_fp32\.py .* merged"):
        open_checkpoint(tmp_path)
    for path in step.glob("*model_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"without its files of model states.*zero_to_fp32\.py"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["..", "../elsewhere", "global_step9", "", "x" * 300])
def test_a_name_of_a_step_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_zero(folder, 1)
    (folder / "global_step2").rename(tmp_path / "elsewhere")
    (folder / "latest").write_text(name)
    with pytest.raises(CheckpointError, match="None of its own is a checkpoint"):
        open_checkpoint(folder)
