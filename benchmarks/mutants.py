"""Change one place of the code after another, and count which changes the tests find.

``python -m benchmarks.mutants`` takes the mutants that mutmut makes of the files in ``[tool.mutmut]``: those whose
names begin as ``--of`` says, or ``--sample`` of them by chance. What survives is listed with what was changed. A mutant
is run against tests that reach its function: those of its file first, then the quickest others, of ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STATS = Path("mutants/mutmut-stats.json")
FIRST = "autoalign.plan.operations.x_in_parallel__mutmut_1"  # with any of them, all are made and all tests are timed


def mutmut(*arguments: str, shown: bool = False) -> str:
    """Run mutmut, and return what it prints if that is not shown."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    return subprocess.run(command, check=True, stdout=None if shown else subprocess.PIPE, text=True).stdout or ""


def chosen(function: str, tests: Sequence[str], durations: dict[str, float], seconds: float) -> list[str]:
    """Choose tests of a function: those of its file, then the others, the quickest first, as long as there is time."""
    _, *folders, file, _ = function.split(".")
    own = "/".join(["tests", *folders, f"test_{file}.py"])
    result: list[str] = []
    left = seconds
    for test in sorted(tests, key=lambda test: (not test.startswith(own), durations[test])):
        left -= durations[test]
        if left > 0 or not result:
            result.append(test)
    return result


def limit(seconds: float) -> None:
    """Let mutmut run no more than some tests of a function."""
    stats: dict[str, Any] = json.loads(STATS.read_text(encoding="utf-8"))
    reaching, durations = stats["tests_by_mangled_function_name"], stats["duration_by_test"]
    stats["tests_by_mangled_function_name"] = {
        function: chosen(function, tests, durations, seconds) for function, tests in reaching.items()
    }
    STATS.write_text(json.dumps(stats), encoding="utf-8")


def states() -> dict[str, str]:
    """Return what became of each mutant."""
    lines = (line.strip().rpartition(": ") for line in mutmut("results", "--all", "true").splitlines())
    return {name: state for name, _, state in lines if name}


def main(options: Sequence[str] | None = None) -> None:
    """Run mutants, print what became of those of each file, and list what survived."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--of", nargs="*", default=["autoalign."], help="how names of mutants begin")
    parser.add_argument("--sample", type=int, help="how many of them; else all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10, help="how long the tests of a mutant take at most")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args(options)
    children = ["--max-children", str(given.processes)]
    if not STATS.exists():
        mutmut("run", *children, FIRST, shown=True)
        limit(given.seconds)
    names = sorted(name for name in states() if name.startswith(tuple(given.of)))
    if given.sample:
        names = random.Random(given.seed).sample(names, min(given.sample, len(names)))
    for start in range(0, len(names), 1000):  # as many as a command line holds
        mutmut("run", *children, *names[start : start + 1000], shown=True)
    found = states()
    for file, counts in sorted(_by_file({name: found[name] for name in names}).items()):
        print(f"{file:<40}" + ", ".join(f"{count} {state}" for state, count in counts.most_common()))
    for name in names:
        if found[name] == "survived":
            changed = [line for line in mutmut("show", name).splitlines() if line[:1] in "+-" and line[1:2] not in "+-"]
            print(name, *changed, sep="\n")


def _by_file(found: dict[str, str]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for name, state in found.items():
        for part in (name.rpartition(".")[0], "all"):
            counts.setdefault(part, Counter())[state] += 1
    return counts


if __name__ == "__main__":
    main()
