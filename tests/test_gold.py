"""The gold cases: their files agree with their index, matches are judged as they should be, and align finds the truth.

The thresholds are what was measured: whoever loses a tensor finds out, and whoever gains one raises them.
``python -m benchmarks.gold`` scores all cases, the large ones too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoalign
from autoalign.plan.matches import Match
from autoalign.plan.operations import Chain, Copy, Permute, Reshape, Transpose
from benchmarks import gold
from benchmarks.cases.gold import __main__ as command
from benchmarks.cases.gold import files
from benchmarks.cases.gold.case import faults, from_data
from benchmarks.cases.gold.expressions import evaluate, source_keys

SMALL: dict[str, Any] = {
    "name": "here.small->there.small",
    "family": "small",
    "kind": "full",
    "source_factory": "",
    "target_factory": "",
    "verified": {"by": "construction"},
    "tied_source": [["a", "tied"]],
    "dont_care": ["table"],
    "source": [["z", [4, 4], "float32"], ["a", [3, 4], "float32"], ["tied", [3, 4], "float32"]],
    "target": [
        ["square", [4, 4], "float32", {"transpose": "z"}],
        ["copied", [3, 4], "float32", "a"],
        ["again", [3, 4], "float32", "a"],
        ["flat", [12], "float32", {"reshape": "a"}],
        ["mixed", [4, 4], "float32", {"take": {"permute": "z", "dims": [0, 1]}, "indices": [0, 2, 1, 3]}],
        ["absent", [7], "float32", None],
        ["table", [9], "int64", None],
    ],
}


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scores(*, most_tensors: int, with_sorted_keys: bool) -> tuple[gold.Total, str]:
    """Score the smaller cases; also say which are not perfect."""
    chosen = files.names(most_tensors=most_tensors)
    scored = list(gold.scored_cases(chosen, with_sorted_keys=with_sorted_keys))
    assert [one.error for one in scored if one.error] == []
    faulty = [f"{one.name}: {one.right} of {one.gold} right, {len(one.wrong)} wrong" for one in scored]
    return gold.total(scored), "\n".join(line for line, one in zip(faulty, scored, strict=True) if not one.is_perfect)


@pytest.mark.parametrize(
    ("with_sorted_keys", "most_tensors", "sizes", "least", "most"),
    [
        pytest.param(True, 300, (959, 108_488), (698, 103_729, 106_802), (533, 160), id="sorted"),
        pytest.param(False, 170, (684, 52_147), (462, 48_839, 50_828), (478, 145), id="in their own order"),
    ],
)
def test_no_figure_of_the_smaller_cases_gets_worse(
    with_sorted_keys: bool,
    most_tensors: int,
    sizes: tuple[int, int],
    least: tuple[int, int, int],
    most: tuple[int, int],
) -> None:
    total, faulty = scores(most_tensors=most_tensors, with_sorted_keys=with_sorted_keys)
    perfect, right, right_or_named = least
    wrong, sure_wrong = most
    assert (total.cases, total.gold) == sizes
    assert total.perfect >= perfect, faulty
    assert total.right >= right, faulty
    assert total.right + total.named >= right_or_named, faulty
    assert total.wrong <= wrong, faulty
    assert total.sure_wrong <= sure_wrong, faulty


def test_the_index_has_a_line_for_every_file() -> None:
    entries = files.index()
    assert len(entries) == 1428
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert len(list((files.FOLDER / "pairs").iterdir())) == 1428


def test_files_are_what_the_index_says_and_do_not_contradict_themselves() -> None:
    for entry in files.index():
        if max(entry.source_tensors, entry.target_tensors) <= 100 or entry.group == "layout":
            data = files.read_data(entry.name)
            assert files.entry_of(data) == entry
            assert list(faults(data)) == []


def test_a_source_is_given_in_its_own_order_or_in_that_of_the_alphabet() -> None:
    assert list(from_data(SMALL).source) == ["z", "a", "tied"]
    assert list(from_data(SMALL, with_sorted_keys=True).source) == ["a", "tied", "z"]


def test_what_is_one_tensor_is_given_as_one() -> None:
    case = from_data(SMALL)
    assert case.source["a"] is case.source["tied"]
    assert case.target["copied"] is case.target["again"]
    assert (case.gold_count, case.group, case.libraries) == (5, "layout", frozenset({"here", "there"}))
    assert "table" not in case.expressions


@pytest.mark.parametrize(
    ("key", "source", "operation", "is_right"),
    [
        ("copied", "a", Copy(), True),
        ("copied", "tied", Copy(), True),
        ("copied", "z", Copy(), False),
        ("flat", "a", Reshape((12,)), True),
        ("flat", "a", Chain((Transpose(), Reshape((12,)))), False),
        ("square", "z", Permute((1, 0)), True),
        ("square", "z", Copy(), False),
        ("mixed", "z", Copy(), False),
        ("absent", "a", Copy(), False),
    ],
)
def test_a_match_is_judged_by_its_elements(key: str, source: str, operation: Any, is_right: bool) -> None:
    match = Match(key, (source,), operation, 1.0, {})
    assert from_data(SMALL).is_right(key, match) is is_right


def test_a_key_is_judged_in_the_shape_of_the_target() -> None:
    case = from_data(SMALL)
    assert case.is_right_key("flat", "tied")
    assert not case.is_right_key("square", "z")
    assert not case.is_right_key("flat", "z")


def test_what_is_too_large_for_values_is_judged_by_the_keys_it_reads() -> None:
    large = SMALL | {"source": [["z", [4, 4], "float32"], ["a", [3, 4], "float32"], ["wide", [2**31], "float32"]]}
    case = from_data(large | {"tied_source": []})
    assert case.is_right_key("mixed", "z")
    assert not case.is_right_key("copied", "z")


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("a", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"reshape": "a"}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"transpose": "a"}, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ({"permute": "a", "dims": [1, 0]}, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ({"cat": ["a", {"zeros": "a"}], "dim": 1}, [[0, 1, 0, 0], [2, 3, 0, 0], [4, 5, 0, 0], [6, 7, 0, 0]]),
        (
            {"stack": [{"split": "a", "start": 1, "length": 1}, {"chunk": "a", "of": 4, "index": 3}]},
            [[[2, 3]], [[6, 7]]],
        ),
        ({"take": "a", "dim": 0, "indices": [3, 0]}, [[6, 7], [0, 1]]),
    ],
)
def test_expressions_are_computed(expression: Any, wanted: Any) -> None:
    tensors = {"a": torch.arange(8).reshape(4, 2)}
    assert evaluate(expression, tensors.__getitem__, (2, 4)).tolist() == wanted
    assert set(source_keys(expression)) == {"a"}


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (["new", [4, 4], "float32", "nowhere"], "'new' is made of 'nowhere', which is not a source key"),
        (["new", [4], "float32", "z"], r"'new' has the shape \(4,\), its expression \(4, 4\)"),
        (["new", [4], "float32", {"fold": "z"}], "'new' cannot be computed: .* has 0 operations"),
        (["new", [3], "float32", {"reshape": "z"}], "'new' cannot be computed: shape"),
        (["square", [4, 4], "float32", "z"], "target key 'square' occurs 2 times"),
    ],
)
def test_a_case_that_contradicts_itself_is_not_written(entry: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"small contradicts itself. Nothing was written.\n{fault}"):
        files.write(SMALL | {"target": [*SMALL["target"], entry]}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_case_is_added_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    paths[0].write_text(json.dumps(SMALL))
    paths[1].write_text(json.dumps(SMALL | {"name": "a.first->there.small"}))
    assert command.main(["add", *map(str, paths)], tmp_path) == 0
    assert "here.small->there.small: 5 of 7 target tensors, group layout" in capsys.readouterr().out
    assert files.names(folder=tmp_path) == ["a.first->there.small", "here.small->there.small"]
    assert files.index(tmp_path)[1] == files.entry_of(SMALL)
    assert command.main(["show", "here.small->there.small"], tmp_path) == 0
    assert json.loads(capsys.readouterr().out) == SMALL
    assert command.main(["show", "nothing"], tmp_path) == 1


def test_the_command_scores_cases_and_lists_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scores.json"
    assert gold.main(["--only", "hf.bert-encoder->", "--kin", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "ok hf.bert-encoder->torch.nn.TransformerEncoder" in printed
    assert "all        cases    1  perfect    1 (100.0%)  right     48/48 " in printed
    assert sum(line.startswith(("hf ", "torch ")) for line in printed.splitlines()) == 2
    (stored,) = json.loads(path.read_text())
    path.write_text(json.dumps([stored | {"right": 47}]))
    assert gold.main(["--only", "hf.bert-encoder->", "--sorted", "--against", str(path)]) == 0
    assert (
        "BETTER: hf.bert-encoder->torch.nn.TransformerEncoder: right 47 -> 48, wrong 0 -> 0" in capsys.readouterr().out
    )
    assert gold.main(["--only", "no such case"]) == 2


def test_a_case_that_got_worse_or_raises_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps([{"name": "allenai.olmo->hf.olmo", "right": 99, "wrong": []}]))
    assert gold.main(["--only", "allenai.olmo->", "--verbose", "--against", str(path)]) == 1

    def broken(*_: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(autoalign, "align", broken)
    (score,) = gold.scored_cases(files.names("allenai.olmo->"))
    assert (score.error, score.right, score.is_perfect) == ("RuntimeError: out of order", 0, False)
    assert gold.main(["--only", "allenai.olmo->"]) == 1
