from __future__ import annotations

import json

import torch

from autoalign import align
from autoalign.reports.serialization import as_dict


def test_all_is_plain_data() -> None:
    source = {"qkv.weight": torch.ones(6, 2), "fc.weight": torch.ones(5, 2), "old": torch.ones(7)}
    target = {
        **{f"{name}.weight": torch.empty(2, 2) for name in "qkv"},
        "fc.weight": torch.empty(4, 2),
        "new": torch.empty(9),
    }
    alignment = align(source, target, rules=[("fc.weight", "fc.weight")], exclude="new", adapt="head")
    found = json.loads(json.dumps(as_dict(alignment)))
    assert [match["target"] for match in found["matches"]] == [match.target for match in alignment.matches]
    assert found["tensors"] == {"source": 3, "target": 5}
    assert found["missing_keys"] == alignment.missing_keys
    assert found["unexpected_keys"] == alignment.unexpected_keys
    assert found["excluded"] == ["new"]
    by_target = {match["target"]: match for match in found["matches"] + found["ambiguous"]}
    assert by_target["q.weight"]["sources"] == ["qkv.weight"]
    assert by_target["q.weight"]["operation"] == "split(dim 0, 0:2)"
    assert by_target["fc.weight"]["adapted"] is True
    assert found["coverage"] == alignment.coverage
