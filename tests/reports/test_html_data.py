from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import autoalign
from autoalign.alignment import Alignment
from autoalign.plan.matches import Candidate, Match, Mismatch
from autoalign.plan.operations import Concatenate, Copy
from autoalign.reports.html import page_data
from autoalign.reports.rows import escaped
from tests.alignments import spec
from tests.reports.examples import FUSED, HOSTILE, MIXED, hostile, many


def keys(side: dict[str, Any], names: list[str]) -> list[str]:
    """Write the keys of a side from its page data, in the order of its tensors."""
    path: list[str] = []
    found = []
    for name, depth in zip(side["name"], side["depth"], strict=True):
        place = depth if depth >= 0 else -1 - depth
        path[place:] = [names[name]]
        if depth < 0:
            found.append(".".join(path))
    return found


def read_back(data: dict[str, Any]) -> list[tuple[str, str, tuple[str, ...], str, float]]:
    source, target = (keys(data[side], data["names"]) for side in ("source", "target"))
    links = data["links"]
    return [
        (
            data["statuses"][links["status"][k]],
            target[links["target"][k]],
            tuple(source[of] for of in ([sources] if isinstance(sources, int) else sources)),
            data["operations"][links["operation"][k]][0],
            links["confidence"][k],
        )
        for k, sources in enumerate(links["sources"])
    ]


@pytest.mark.parametrize("alignment", [MIXED, FUSED, hostile()], ids=["mixed", "fused", "hostile"])
def test_the_data_hold_the_alignment(alignment: Alignment) -> None:
    data = json.loads(json.dumps(page_data(alignment)))
    found = [("adapted" if m.operation.adapts else "matched", m) for m in alignment.matches]
    found += [("ambiguous", match) for match in alignment.ambiguous]
    expected = [
        (
            status,
            escaped(match.target),
            tuple(map(escaped, match.sources)),
            str(match.operation),
            round(match.confidence, 4),
        )
        for status, match in found
    ]
    expected += [("mismatched", escaped(m.key), (escaped(m.source_key),), "copy", 1.0) for m in alignment.mismatched]
    assert read_back(data) == expected
    for side, specs in (("source", alignment.source_specs), ("target", alignment.target_specs)):
        said = {
            key: (tuple(data["shapes"][shape]), data["dtypes"][dtype])
            for key, shape, dtype in zip(
                keys(data[side], data["names"]), data[side]["shape"], data[side]["dtype"], strict=True
            )
        }
        assert said == {escaped(spec.key): (spec.shape, str(spec.dtype).removeprefix("torch.")) for spec in specs}


def test_what_is_left_has_its_reason_and_its_nearest_counterpart() -> None:
    data = page_data(MIXED)
    target, source = (keys(data[side], data["names"]) for side in ("target", "source"))
    left = {target[row[0]]: data["texts"][row[1]] for row in data["target"]["left"]}
    reason = "all 6 source tensors of this shape have other counterparts"
    assert left == {"extra.weight": reason, "pooler.weight": "excluded"}
    unused = {source[row[0]]: row for row in data["source"]["left"]}
    assert sorted(unused) == sorted(MIXED.unexpected_keys)
    assert data["texts"][unused["fc.weight"][1]].startswith("ambiguous: ") or len(unused["fc.weight"]) >= 2


def test_the_nearest_counterpart_says_how_its_shape_differs() -> None:
    source, target = {"head.weight": torch.empty(1000, 8)}, {"body": torch.empty(3), "head.weights": torch.empty(10, 8)}
    alignment = replace(autoalign.align(source | {"body": torch.empty(3)}, target), mismatched=())
    data = page_data(alignment)
    ((place, _, near, text),) = data["target"]["left"]
    assert keys(data["target"], data["names"])[place] == "head.weights"
    assert keys(data["source"], data["names"])[near] == "head.weight"
    assert data["texts"][text] == "dim 0: 1000, needs 10"


def test_evidence_alternatives_and_warnings() -> None:
    match = Match(
        "t", ("s",), Copy(), 0.7, {"name": 0.12345}, (Candidate(("r", "s"), Concatenate(0), 0.0),), ("look <here>",)
    )
    data = page_data(Alignment((match,), (), (), (spec("s", 3), spec("r", 3)), (spec("t", 3),)))
    links = data["links"]
    assert data["evidence"][links["evidence"][0]] == {"name": 0.123}
    assert [data["texts"][text] for text in links["warnings"][0]] == ["look <here>"]
    ((sources, operation),) = links["alternatives"][0]
    assert [keys(data["source"], data["names"])[place] for place in sources] == ["r", "s"]
    assert data["operations"][operation] == ["concatenate(dim 0)", "concatenate"]


def test_repeated_blocks_are_runs_on_both_sides() -> None:
    data = page_data(FUSED)
    assert [length for _, length in data["source"]["runs"]] == [12]
    assert [length for _, length in data["target"]["runs"]] == [12]


def test_tied_tensors_that_are_used_are_not_left() -> None:
    weight = torch.rand(4, 3)
    alignment = autoalign.align({"a.weight": weight, "b.weight": weight}, {"a.weight": torch.empty(4, 3)})
    assert page_data(alignment)["source"]["left"] == []


def test_the_size_grows_with_the_tensors_and_not_with_their_names() -> None:
    small, large = (len(json.dumps(page_data(many(count)), separators=(",", ":"))) for count in (500, 5000))
    assert large < 11 * small
    assert large < 80 * 5000  # bytes a match


def test_data_of_an_empty_alignment() -> None:
    data = page_data(Alignment((), (), (), (), ()))
    assert data["links"]["target"] == []
    assert data["source"]["name"] == []


def test_mismatched_tensors_are_joined() -> None:
    alignment = replace(MIXED, mismatched=(Mismatch("head.weight", "fc.weight", (10, 16), (1000, 16)),))
    assert ("mismatched", "head.weight", ("fc.weight",), "copy", 1.0) in read_back(page_data(alignment))


def test_hostile_keys_stay_different() -> None:
    found = keys(page_data(hostile())["target"], page_data(hostile())["names"])
    assert len(set(found)) == len(HOSTILE)
    assert all(key.isprintable() for key in found)
