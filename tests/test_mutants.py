"""The run of mutants: a mutant is put into the functions of a process, and the tests that reach it are chosen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.mutants import FINGERPRINTS, Mutant, Reach, chosen, in_processes, outcome, put_in

MODULE = """
from __future__ import annotations

class Scale:
    def by(self, value, factor=2, *, offset=0):
        return [item * factor + offset for item in value]

    @classmethod
    def name(cls):
        return "a" + cls.__name__

def half(value):
    return value / 2

taken = half
"""


def mutant(function: str, old: str = "", new: str = "", module: str = "scales_to_mutate") -> Mutant:
    return Mutant(f"{module}.{function}__mutmut_1", module, function, MODULE.replace(old, new) if old else MODULE, ())


def test_a_function_is_what_the_mutant_has_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scales_to_mutate.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import scales_to_mutate as module  # type: ignore[import-not-found]

    scale, taken = module.Scale(), module.taken
    assert (scale.by([3]), scale.name(), taken(3)) == ([6], "aScale", 1.5)
    put_in(mutant("half", "/", "*"))
    assert taken(3) == 6
    put_in(mutant("Scale.by", "factor=2, *, offset=0", "factor=3, *, offset=1"))
    assert scale.by([3]) == [10]
    put_in(mutant("Scale.by", "+ offset", "- offset"))
    assert scale.by([3], offset=1) == [5]
    put_in(mutant("Scale.name", '"a"', '"b"'))
    assert scale.name() == "bScale"
    with pytest.raises(ValueError, match="There is no 'half'"):
        put_in(mutant("half", "half", "double"))


def test_tests_that_reach_a_function_are_run_those_of_its_file_first() -> None:
    module = "autoalign.matching.cues"
    reached = {
        test: Reach(seconds, frozenset({f"{module}.{function}"}))
        for test, seconds, function in [
            ("tests/matching/test_cues.py::slow", 6, "half"),
            ("tests/matching/test_cues.py::quick", 3, "half"),
            ("autoalign/matching/cues.py::example", 4, "half"),
            ("tests/matching/test_cues.py::of_another", 1, "double"),
            ("tests/matching/test_names.py::slow", 20, "half"),
            ("tests/matching/test_names.py::slower", 21, "half"),
            (f"{FINGERPRINTS}::one", 30, "half"),
            (f"{FINGERPRINTS}::two", 20, "half"),
        ]
    }
    assert chosen(mutant("half", module=module), reached, 8) == [
        "tests/matching/test_cues.py::quick",
        "autoalign/matching/cues.py::example",
        f"{FINGERPRINTS}::two",
        f"{FINGERPRINTS}::one",
        "tests/matching/test_names.py::slow",
    ]
    assert chosen(mutant("triple", module=module), reached, 8) == []


def test_each_job_has_a_process_of_its_own() -> None:
    def stopped() -> int:
        os.kill(os.getpid(), 9)
        return 0

    jobs = [("good", lambda: 0), ("bad", lambda: 1), ("none", lambda: 99), ("endless", stopped), ("odd", lambda: 4)]
    found = {name: outcome(status) for name, status in in_processes(jobs, 2)}
    assert [found[name] for name in ("good", "bad", "none")] == ["survived", "killed", "no test"]
    assert [found[name] for name in ("endless", "odd")] == ["ran too long", "pytest ends with 4"]
