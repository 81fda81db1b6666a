"""The benchmarks: their truths hold, their peers work, and each part runs on a small plan."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import autoalign
from autoalign.plan.specs import TensorSpec
from benchmarks import coverage
from benchmarks.__main__ import SMOKE, main
from benchmarks.accuracy import code, contest_partial, conversions, proofs, reliability
from benchmarks.accuracy.architectures import outcome, table
from benchmarks.accuracy.contest import Attempt, TimeLimitError, attempt_on_keys, tallied, time_limit
from benchmarks.cases import moe, perturbations
from benchmarks.cases.architectures import Architecture, Choice, few_architectures
from benchmarks.cases.changes import CHANGES
from benchmarks.cases.content import shuffled
from benchmarks.cases.module_trees import telling_words, tree_of
from benchmarks.cases.naming import Entry
from benchmarks.cases.perturbations import RECIPES, Case, Recipe, perturbed
from benchmarks.figures import tables
from benchmarks.peers import PEERS, Peer
from benchmarks.speed import baseline, dataflow, scaling, worst_cases
from benchmarks.speed import diff as diff_time
from benchmarks.speed import files as file_loading
from benchmarks.speed import sharded as sharded_loading
from benchmarks.speed.baseline import Figure
from benchmarks.speed.memory import anonymous_bytes

FEW = Choice(few=True)


def small(*keys_and_shapes: tuple[str, tuple[int, ...]]) -> Architecture:
    return Architecture("small", tuple(TensorSpec(key, shape, torch.float32) for key, shape in keys_and_shapes))


@cache
def many_cases() -> tuple[Case, ...]:
    return tuple(
        perturbed(architecture, recipe, Random(f"{architecture.name}:{number}"), str(number))
        for architecture in few_architectures()
        for number, recipe in enumerate(RECIPES)
    )


def test_every_truth_pairs_tensors_of_one_shape_and_dtype_once() -> None:
    count = 0
    for case in many_cases():
        source = {spec.key: spec for spec in case.source}
        assert len(source) == len(case.source)
        assert list(case.truth) == [spec.key for spec in case.target]
        used = [own for own in case.truth.values() if own is not None]
        assert len(set(used)) == len(used)
        for spec in case.target:
            if (own := case.truth[spec.key]) is not None:
                assert (source[own].shape, source[own].dtype) == (spec.shape, spec.dtype)
        assert len(used) >= min(len(case.source), len(case.target)) / 2
        count += 1
    assert count == len(few_architectures()) * len(RECIPES)


def test_only_what_is_dropped_or_inserted_lacks_a_counterpart() -> None:
    for case in many_cases():
        if not case.recipe.drop and not case.recipe.insert:
            assert None not in case.truth.values()
            assert len(case.source) == len(case.target)


def test_the_same_seed_gives_the_same_cases_and_another_seed_others() -> None:
    first, again, other = (list(perturbations.cases(30, seed, FEW)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert perturbations.case(17, 1, FEW) == first[17]


def test_scrambled_names_share_no_word_with_the_original_but_of_the_layers_own() -> None:
    (architecture,) = (one for one in few_architectures() if one.name == "torchvision.resnet18")
    case = perturbed(architecture, Recipe(5, "scrambled"), Random(3), "one")
    names = [{name for spec in side for name in spec.key.split(".")} for side in (case.source, case.target)]
    words = [{name for name in side if not name.isdecimal()} for side in names]
    assert words[0] & words[1] == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_siblings_of_one_form_stay_in_order_where_names_tell_nothing() -> None:
    names = ("query", "key", "value", "norm", "wide")
    shapes = {"norm": (4,), "wide": (8, 4)}
    entries = [
        Entry(("block", name, "weight"), shapes.get(name, (4, 4)), torch.float32, f"block.{name}.weight")
        for name in names
    ]
    orders = {tuple(entry.path[1] for entry in shuffled(entries, Random(seed), names_tell=False)) for seed in range(40)}
    assert len(orders) > 5
    for order in orders:
        assert [name for name in order if name not in shapes] == ["query", "key", "value"]
    free = {tuple(entry.path[1] for entry in shuffled(entries, Random(seed), names_tell=True)) for seed in range(40)}
    assert any([name for name in order if name not in shapes] != ["query", "key", "value"] for order in free)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_checkpoints_of_an_architecture_are_scored(change: str) -> None:
    (architecture,) = (one for one in few_architectures() if one.name == "timm.mixer_s32_224")
    found = outcome(architecture.name, architecture.specs, change, 0)
    known = len(architecture.specs)
    assert not found.error
    assert found.known == {"resized": known - 4, "without last stage": known - 12}.get(change, known)
    assert found.wrong == 0 or change == "anonymous"
    assert change in list(table([found]))[1]


def test_the_words_by_which_twins_differ_are_found() -> None:
    tree = tree_of(
        [
            (("attn", "q_proj", "weight"), (4, 4)),
            (("attn", "k_proj", "weight"), (4, 4)),
            (("mlp", "up", "weight"), (8, 4)),
            (("mlp", "down", "weight"), (4, 8)),
        ]
    )
    assert telling_words(tree) == {"q", "k"}


def test_no_telling_word_loses_its_meaning_where_the_order_is_lost() -> None:
    architecture = small(*((f"{index}.{name}.weight", (4, 4)) for index in range(3) for name in ("left", "right")))
    for seed in range(20):
        case = perturbed(architecture, Recipe(4, "made-up", order="sorted"), Random(seed), str(seed))
        for own, other in case.truth.items():
            assert own.split(".")[1] == str(other).split(".")[1]


def _mappings(name: str) -> dict[str, str]:
    source = {
        f"old.{key}": torch.empty(shape, device="meta")
        for key, shape in {"a.weight": (4, 3), "b.weight": (5, 4)}.items()
    }
    target = {key.removeprefix("old."): tensor for key, tensor in source.items()}
    return PEERS[name].match(source, target)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "exact names"])
def test_every_peer_finds_two_tensors_behind_a_prefix(name: str) -> None:
    if not PEERS[name].is_available:
        pytest.skip(f"{PEERS[name].requires} is not installed")
    assert _mappings(name) == {"a.weight": "old.a.weight", "b.weight": "old.b.weight"}


def test_exact_names_find_nothing_behind_a_prefix() -> None:
    assert _mappings("exact names") == {}


def test_a_call_that_takes_too_long_is_interrupted() -> None:
    def endless() -> None:
        while True:
            pass

    with pytest.raises(TimeLimitError, match=r"more than 0\.05 s"), time_limit(0.05):
        endless()


def test_a_peer_that_raises_has_loaded_nothing_and_the_reason_is_kept() -> None:
    def refuse(*_: object) -> dict[str, str]:
        raise ValueError("cannot tell them apart")

    tensors = {"a": torch.empty(2)}
    attempts = [
        attempt_on_keys(peer, "group", "case", tensors, tensors, [{"a": "a"}])
        for peer in (Peer("refusing", refuse), PEERS["exact names"])
    ]
    refused, found = tallied(attempts)
    assert (refused.right, refused.wrong, refused.raised, refused.perfect) == (0, 0, 1, 0)
    assert refused.reasons == {"ValueError": 1}
    assert (found.right, found.wrong, found.raised, found.perfect) == (1, 0, 0, 1)


def test_a_mixture_of_two_copies_is_wrong() -> None:
    source = {key: torch.empty(2) for key in ("x.a", "x.b", "y.a", "y.b")}
    target = {key: torch.empty(2) for key in "ab"}
    mixed = Peer("mixed", lambda *_: {"a": "x.a", "b": "y.b"})
    attempt = attempt_on_keys(
        mixed, "two copies", "case", source, target, [{key: f"{copy}.{key}" for key in "ab"} for copy in "xy"]
    )
    assert (attempt.right, attempt.wrong, attempt.is_perfect) == (1, 1, False)


def test_partial_cases_pair_tensors_of_one_shape() -> None:
    cases = [case for case in contest_partial.partial_cases() if "resnet18" in case.name]
    assert Counter(case.group for case in cases)["two copies"] == 3
    for case in cases:
        shapes = {spec.key: spec.shape for spec in case.source}
        wanted = {spec.key: spec.shape for spec in case.target}
        for truth in case.truths:
            assert set(truth) == set(wanted)
            assert all(shapes[own] == wanted[key] for key, own in truth.items() if own is not None)


def test_deepseek_v3_has_its_published_number_of_tensors_in_both_namings() -> None:
    size = moe.MoE()
    truth = moe.truth(size, moe.PUBLISHED, moe.INFERENCE)
    source, target = moe.state_dict(size, moe.PUBLISHED), moe.state_dict(size, moe.INFERENCE)
    assert len(source) == len(target) == len(truth) == len(set(truth.values())) == 91_991
    assert all(source[own].shape == target[key].shape for key, own in list(truth.items())[::97])
    assert source["model.layers.3.mlp.experts.255.down_proj.weight_scale_inv"].shape == (56, 16)


def test_the_time_at_one_size_is_measured_with_its_result() -> None:
    point = scaling.measured(PEERS["order in shape"], 1_000, 1)
    assert point.right + point.wrong == point.tensors == len(moe.state_dict(moe.SIZES[1_000], moe.INFERENCE))
    assert len(point.seconds) == 1


@pytest.mark.parametrize("format_", file_loading.FORMATS)
def test_files_load_with_the_right_values_in_every_way(format_: str, tmp_path: Path) -> None:
    file_loading.write(tmp_path, format_, 5_000_000)
    seconds, are_right = file_loading.timed(tmp_path, format_, 5_000_000, 2)
    assert are_right == dict.fromkeys(file_loading.WAYS, True)
    for way in file_loading.WAYS:
        assert len(seconds[way, False]) == (0 if way == "assign" else 2)


def test_a_comparison_is_timed_against_reading_both_files() -> None:
    found = list(diff_time.measure(5_000_000, 1))
    assert [(way, from_disk) for way, from_disk, _ in found] == [
        *(("equal", True), ("equal", False)),
        *(("moved", True), ("moved", False)),
    ]
    assert all(ratio > 0 for *_, ratio in found)


def test_a_wrong_value_in_a_file_is_noticed(tmp_path: Path) -> None:
    file_loading.write(tmp_path, "torch", 5_000_000)
    path = file_loading.path_of(tmp_path, "torch", "apart")
    tensors = torch.load(path)
    tensors["encoder.layer.0.attention.self.query.bias"][3] = -1
    torch.save(tensors, path)
    _, are_right = file_loading.timed(tmp_path, "torch", 5_000_000, 0)
    assert are_right == {"own": True, "renamed": True, "apart": False, "assign": True}


MEASURED = """
import time, torch
from torch import nn
from benchmarks.speed import diff as diff_time
from benchmarks.speed import files as file_loading

def wasteful(_):
    taken = torch.ones(50_000_000 // 4)  # gone when this returns
    time.sleep(0.2)
    assert taken.any()

print(*(file_loading.peak_memory(way, nn.Linear(2, 2)) for way in (lambda _: None, wasteful)))
"""


@pytest.mark.skipif(anonymous_bytes() is None, reason="the platform does not tell a process's anonymous memory")
def test_memory_that_a_load_takes_for_a_while_is_measured() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, cwd=root)
    little, much = map(int, done.stdout.split())
    assert little < 10_000_000
    assert much > 45_000_000
    assert not file_loading.Load("torch", "renamed", 10**9, 2**20, (), (), 66 * 2**20, True).is_within_memory_budget


@pytest.mark.parametrize("case", sorted(worst_cases.CASES.keys() - worst_cases.OPTIONS.keys()))
def test_of_worst_cases_a_share_is_measured(case: str) -> None:
    point = worst_cases.measured(case, 3)
    assert point.matched + point.ambiguous > 0
    assert point.is_within_budget
    assert not replace(point, cpu_seconds=10.1).is_within_budget
    assert not replace(point, peak_bytes=10**9 + 1).is_within_budget
    assert list(tables.worst_cases_table([point]))[-1].startswith(f"| {case} | 3 | ")


def test_each_rank_of_a_sharded_model_is_measured() -> None:
    loads = list(sharded_loading.measure(3_000_000, ("safetensors",), ("apart",)))
    assert [load.rank for load in loads] == [0, 1]
    assert all(load.is_right and load.is_within_budget for load in loads)
    assert all(load.held_bytes < 0.51 * load.file_bytes for load in loads)
    assert all(load.held_bytes <= load.read_bytes for load in loads if load.read_bytes is not None)
    allowed = loads[0].held_bytes + loads[0].largest_bytes + sharded_loading.READ_BUDGET
    assert not replace(loads[0], read_bytes=allowed + 1).is_within_budget
    assert not replace(loads[0], memory_bytes=2**27).is_within_budget
    assert sum(line.startswith("| safetensors | the same, query, key") for line in tables.sharded_table(loads)) == 2


def test_ratios_of_loads_are_of_their_medians_and_only_large_files_give_figures() -> None:
    own = file_loading.Load("torch", "own", 2 * 10**9, 2**20, (1.0, 2.0, 9.0), (1.0,), 0, True)
    ours = file_loading.Load("torch", "renamed", 2 * 10**9, 2**20, (3.0, 1.0, 4.0), (1.5,), 0, True)
    figures = dict(baseline.figures(loads=[own, ours]))
    assert {name.rsplit(" ", 1)[1]: figure.value for name, figure in figures.items()} == {"disk": 1.5, "memory": 1.5}
    assert not dict(baseline.figures(loads=[replace(load, file_bytes=10**7) for load in (own, ours)]))


def test_confidences_are_binned_and_laid_out_as_arrays(tmp_path: Path) -> None:
    judged = list(reliability.judged_cases(12, choice=FEW))
    count = sum(len(case.matches) for case in judged)
    binned = reliability.bins(
        [match.confidence for case in judged for match in case.matches],
        [match.is_right for case in judged for match in case.matches],
    )
    assert sum(one.count for one in binned) == count > 300
    reliability.write(judged, tmp_path)
    with np.load(tmp_path / "matches.npz") as arrays:
        assert arrays["cues"].shape == (count, len(arrays["cue_names"]))
        assert arrays["is_right"].mean() > 0.8
        first = judged[int(arrays["case"][0])]
        assert arrays["target"][0] == first.matches[0].target
    assert (tmp_path / "reliability.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "cases.json").read_text())) == 12


def test_an_error_of_align_is_a_case_without_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(autoalign, "align", broken)
    (judged,) = reliability.judged_cases(1, choice=FEW)
    assert judged.error == "RuntimeError: out of order"
    assert judged.matches == ()


def test_figures_are_compared_within_the_tolerance_and_in_their_direction(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baseline.store({"time": Figure(2.0), "right": Figure(0.99, is_share=True)}, path)
    assert baseline.worse({"time": Figure(2.9), "right": Figure(0.988, is_share=True), "new": Figure(9)}, path) == []
    worse = baseline.worse({"time": Figure(3.9), "right": Figure(0.90, is_share=True)}, path)
    assert worse == ["time: 3.9, stored 2", "right: 0.9, stored 0.99"]


def test_the_stored_baseline_names_the_figures_of_the_smoke_plan() -> None:
    stored = json.loads(baseline.FILE.read_text(encoding="utf-8"))
    assert {name.split(",")[0] for name in stored} >= {"align over load_state_dict", "right"}
    assert SMOKE.perturbed >= len(RECIPES)


def test_the_command_writes_tables_figures_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matchers = ["autoalign", "order in shape", "exact names"]
    status = main(["--smoke", "--only", "perturbed", "partial", "--out", str(tmp_path), "--matchers", *matchers])
    assert status == 0
    assert "| perturbed, 1 easy |" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    easy = next(
        one for one in figures["accuracy"] if one["peer"] == "autoalign" and one["group"] == "perturbed, 1 easy"
    )
    assert easy["right"] == easy["gold"] > 0
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert "autoalign" in (tmp_path / "figures.md").read_text()


def test_wrong_loads_are_not_called_equal_and_right_ones_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert proofs.main(["--only", "timm.test", "--wrong", "8", "--right", "2", "--pairs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (wrong,) = (line for line in lines if line.startswith("| all wrong |"))
    assert wrong.startswith("| all wrong |  | 32 | 0 | 100.0% |")
    (right,) = (line for line in lines if line.startswith("| all right |"))
    assert right.startswith("| all right |  | 9 | 9 |  | 100.0% |")


@pytest.mark.parametrize("way", proofs.WAYS)
def test_a_load_is_spoilt_where_the_network_has_a_place_for_it(way: proofs.Way) -> None:
    source = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    alignment = autoalign.align(source, nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    used = list(source.state_dict())
    wrong, changed = proofs.spoilt(alignment, used, way, Random(0))
    own, other = alignment.state_dict(), wrong.state_dict()
    assert changed == [key for key in used if not torch.equal(own[key], other[key])] != []
    assert proofs.spoilt(autoalign.align(nn.Linear(3, 2), nn.Linear(3, 2)), ["weight"], way, Random(0))[1] == []


def test_an_attempt_is_perfect_if_all_is_found_and_nothing_is_wrong() -> None:
    assert Attempt("peer", "group", "case", 3, 3, 0, 0.1).is_perfect
    assert not Attempt("peer", "group", "case", 3, 3, 1, 0.1).is_perfect
    assert not Attempt("peer", "group", "case", 3, 0, 0, 0.1, error="ValueError").is_perfect
    assert Attempt("peer", "unrelated", "case", 0, 0, 0, 0.1, error="ValueError").is_perfect


def test_code_tells_what_keys_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert code.main(["--only", "gated, the gate last -> separate|post-norm blocks -> reg|gated blocks"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    keys, _, both, *renamed = (line for line in lines if not line.startswith(("| by", "| ---")))
    assert keys.startswith("| keys | 0 of 2 |")
    assert both.startswith("| both | 2 of 2 | 91 | 0 | 0 |")
    assert [line.split(" | ")[1] for line in renamed] == ["0 of 1", "1 of 1", "1 of 1"]


def test_the_share_of_networks_that_can_be_traced_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert dataflow.main(["--only", "timm", "--sample", "2"]) == 0
    assert capsys.readouterr().out.startswith("timm: 2 of 2 traced; ")


def test_what_transformers_converts_by_hand_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert conversions.main(["--only", "mixtral"]) == 0
    assert "1 of 1 families; 20 of 20 tensors right, 0 wrong" in capsys.readouterr().out
    assert not replace(conversions.Row("a", 3, 1, 3, 0, 0), wrong=1).is_found


def test_coverage_is_counted_by_folder_and_says_what_is_missing() -> None:
    def reached(*missing: int) -> dict[str, Any]:
        lines = {1, 2, 3, 4} - {*missing}
        branches = [] if missing else [[2, 3]]
        return {"executed_lines": [*lines], "missing_lines": [*missing], "executed_branches": branches} | {
            "missing_branches": [[2, 3]] if missing else []
        }

    files = {
        "autoalign/api.py": reached(),
        "autoalign/rules/rule.py": reached(3),
        "autoalign/rules/rules.py": reached(),
    }
    lines, is_enough = coverage.table(files)
    assert not is_enough
    assert lines[0] == "autoalign                86.67 % of 15 lines and branches"
    assert lines[-3:] == [
        "autoalign/rules          80.00 % of 10 lines and branches",
        "  fewer than 100 %",
        "  autoalign/rules/rule.py: 3, 2->3",
    ]
    assert coverage.table(files | {"autoalign/rules/rule.py": reached()})[1]
