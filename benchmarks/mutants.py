"""Change one place of the code after another, and count which changes the tests find: ``python -m benchmarks.mutants``.

The changes are those of mutmut. Each is put into the function that it changes, in a process of its own, and run against
tests that reach this function, until one fails: first those of its file, then the fingerprints of gold cases, then all
others; of the first and the last kind those that take the least time, as much as ``--seconds``. What survives is listed
with what was changed. Which test reaches what is found out by the first run, and kept in ``build/reached.json``.

    python -m benchmarks.mutants --of autoalign.matching --sample 300 --seed 1
    python -m benchmarks.mutants --of autoalign.plan.operations
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

SOURCES = ("autoalign/matching", "autoalign/plan", "autoalign/loading/transaction.py")
TESTS = (*SOURCES, "tests/matching", "tests/plan", "tests/loading/test_transaction.py")  # also examples of docstrings
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "--ignore=tests/matching/test_pairs.py")  # whole networks: too long
FINGERPRINTS = "tests/matching/test_fingerprints.py"
REACHED = Path("build/reached.json")
MEMORY = 4 << 30  # bytes that a process of a mutant may take, more than there are
STATES = {0: "survived", 1: "killed", 98: "not put in", 99: "no test"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file with one change."""

    name: str  # as mutmut names it
    module: str
    function: str  # with its class
    text: str  # of the file
    changes: tuple[str, ...]  # the lines that differ


@dataclass(frozen=True, slots=True)
class Reach:
    """What a test reaches."""

    seconds: float  # of processor time
    functions: frozenset[str]


def mutants(of: Sequence[str], sample: int | None, seed: int) -> list[Mutant]:
    """Make the mutants whose names begin so, or some of them by chance, in the order of their names."""
    from mutmut.mutation.file_mutation import create_mutations, deep_replace, group_by_top_level_node

    found: dict[str, tuple[Any, Any, Any, Any]] = {}
    for path in [file for source in SOURCES for file in sorted(Path(source).glob("*.py")) or [Path(source)]]:
        name = ".".join(path.with_suffix("").parts)
        if not any(name.startswith(start) or start.startswith(name) for start in of):
            continue
        tree, mutations, *_ = create_mutations(str(path), path.read_text(encoding="utf-8"))
        owners = {part: node for node in tree.body for part in (node, *getattr(node.body, "body", ()))}
        for function, changes in group_by_top_level_node(mutations).items():
            if hasattr(function, "params"):
                owner = owners[function]
                start = "x_" if owner is function else f"xǁ{owner.name.value}ǁ"
                for number, change in enumerate(changes, 1):
                    found[f"{name}.{start}{function.name.value}__mutmut_{number}"] = (
                        path,
                        tree,
                        (owner, function),
                        change,
                    )
    names = sorted(name for name in found if name.startswith(tuple(of)))
    if sample:
        names = sorted(random.Random(seed).sample(names, min(sample, len(names))))
    result = []
    for name in names:
        path, tree, (owner, function), change = found[name]
        new = deep_replace(function, change.original_node, change.mutated_node)
        if owner is not function:
            new = owner.with_changes(body=_with_member(owner.body, function, new))
        text = _with_member(tree, owner, new).code
        before = path.read_text(encoding="utf-8").splitlines()
        lines = difflib.unified_diff(before, text.splitlines(), lineterm="", n=0)
        changed = tuple(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))
        qualified = function.name.value if owner is function else f"{owner.name.value}.{function.name.value}"
        result.append(Mutant(name, name.rpartition(".")[0], qualified, text, changed))
    return result


def put_in(mutant: Mutant) -> None:
    """Let the function of this process be what the mutant has for it.

    Raises:
        ValueError: The mutant takes other variables of what it stands in.
    """
    module = importlib.import_module(mutant.module)
    owner: Any = module
    *classes, name = mutant.function.split(".")
    for part in classes:
        owner = vars(owner)[part]
    function: FunctionType = getattr(vars(owner)[name], "__func__", vars(owner)[name])
    tree = ast.parse(mutant.text)
    function.__code__ = _code(compile(tree, str(module.__file__), "exec", dont_inherit=True), mutant.function)
    node: Any = tree
    for part in (*classes, name):
        node = next(item for item in node.body if getattr(item, "name", None) == part)

    def value(default: ast.expr) -> Any:
        return eval(compile(ast.Expression(default), "default", "eval"), vars(module))

    function.__defaults__ = tuple(map(value, node.args.defaults)) or None
    given = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    function.__kwdefaults__ = {one.arg: value(default) for one, default in given if default is not None} or None


def chosen(mutant: Mutant, reached: Mapping[str, Reach], seconds: float) -> list[str]:
    """Choose tests of a mutant, in the order in which they are run."""
    function = f"{mutant.module}.{mutant.function}"
    _, *folders, file = mutant.module.split(".")
    own = "/".join(["tests", *folders, f"test_{file}.py"]), f"{mutant.module.replace('.', '/')}.py::"
    reaching = sorted((reach.seconds, test) for test, reach in reached.items() if function in reach.functions)
    kinds: tuple[list[str], list[str], list[str]] = [], [], []
    left = [seconds, float("inf"), seconds]
    for took, test in reaching:
        kind = 0 if test.startswith(own) else 1 if test.startswith(FINGERPRINTS) else 2
        left[kind] -= took
        if left[kind] > 0 or not kinds[kind]:
            kinds[kind].append(test)
    return [test for kind in kinds for test in kind]


def outcome(code: int) -> str:
    """Say what became of a mutant whose process ended so."""
    return STATES.get(code, "ran too long" if code < 0 else f"pytest ends with {code}")


def in_processes(jobs: Iterable[tuple[str, Callable[[], int]]], processes: int) -> Iterator[tuple[str, int]]:
    """Run each job in a process that begins as a copy of this one, and yield its exit status as it ends."""
    running: dict[int, str] = {}
    for name, job in jobs:
        if len(running) == processes:
            yield _ended(running)
        sys.stdout.flush()
        if pid := os.fork():
            running[pid] = name
        else:
            status = 2
            try:
                silence = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(silence, stream)
                status = job()
            finally:
                os._exit(status)
    while running:
        yield _ended(running)


def reach_of_tests(processes: int) -> dict[str, Reach]:
    """Find out which functions each test reaches, and how long it takes; what is known of a file of tests is kept."""
    import pytest

    class Collected:
        ids: list[str]

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.ids = [item.nodeid for item in session.items]

    collected = Collected()
    pytest.main([*OPTIONS, "--collect-only", "-qqq", *TESTS], plugins=[collected])  # imports all that tests import
    files: dict[str, list[str]] = {}
    for test in collected.ids:
        files.setdefault(test.partition("::")[0], []).append(test)
    known = json.loads(REACHED.read_text(encoding="utf-8")) if REACHED.exists() else {}
    digests = {
        file: hashlib.sha256(Path(file).read_bytes() + "".join(tests).encode()).hexdigest()
        for file, tests in files.items()
    }
    REACHED.parent.mkdir(exist_ok=True)
    missing = [file for file in files if file.endswith(".py") and known.get(file, {}).get("digest") != digests[file]]
    for file, status in in_processes(((file, partial(_record, file)) for file in missing), processes):
        print(f"{file}: {'all tests pass' if status == 0 else f'pytest ends with {status}'}", flush=True)
        part = _part(file)
        known[file] = {"digest": digests[file], "tests": json.loads(part.read_text(encoding="utf-8"))}
        part.unlink()
        REACHED.write_text(json.dumps(known), encoding="utf-8")
    return {
        test: Reach(seconds, frozenset(functions))
        for file in files
        for test, (seconds, functions) in known[file]["tests"].items()
    }


def main(options: Sequence[str] | None = None) -> None:
    """Run mutants, print what became of those of each file, and list what survived."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", nargs="*", default=["autoalign."], help="how names of mutants begin")
    parser.add_argument("--sample", type=int, help="how many of them; else all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10, help="how long tests of each kind take at most")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args(options)
    os.environ["OMP_NUM_THREADS"] = "1"
    reached = reach_of_tests(given.processes)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # which keeps the trees of the files
        taken = {mutant.name: mutant for mutant in pool.submit(mutants, given.of, given.sample, given.seed).result()}
    jobs = ((name, partial(_run, mutant, reached, given.seconds)) for name, mutant in taken.items())
    counts: dict[str, Counter[str]] = {}
    for name, status in in_processes(jobs, given.processes):
        state = outcome(status)
        for part in (taken[name].module, "all"):
            counts.setdefault(part, Counter())[state] += 1
        print(name, state, *(taken[name].changes if state != "killed" else ()), sep="\n  ", flush=True)
    for file, states in sorted(counts.items()):
        print(f"{file:<40}" + ", ".join(f"{count} {state}" for state, count in states.most_common()))


def _run(mutant: Mutant, reached: Mapping[str, Reach], seconds: float) -> int:
    import pytest

    if not (tests := chosen(mutant, reached, seconds)):
        return 99
    try:
        put_in(mutant)
    except ValueError:
        return 98
    limit = int(30 + 3 * sum(reached[test].seconds for test in tests))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    signal.alarm(20 * limit)
    return int(pytest.main([*OPTIONS, *tests]))


def _record(file: str) -> int:
    import pytest

    found: dict[str, tuple[float, list[str]]] = {}
    root = str(Path.cwd()) + "/"

    class Recorder:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
            seen: set[CodeType] = set()

            def trace(frame: FrameType, _event: str, _argument: Any) -> None:
                seen.add(frame.f_code)

            start = time.process_time()
            threading.settrace(trace)
            sys.settrace(trace)
            try:
                return (yield)
            finally:
                sys.settrace(None)
                threading.settrace(None)
                names = {
                    ".".join(Path(code.co_filename.removeprefix(root)).with_suffix("").parts)
                    + f".{code.co_qualname.partition('.<locals>')[0]}"
                    for code in seen
                    if code.co_filename.startswith(f"{root}autoalign/")
                }
                found[item.nodeid] = time.process_time() - start, sorted(names)

    status = int(pytest.main([*OPTIONS, file], plugins=[Recorder()]))
    _part(file).write_text(json.dumps(found), encoding="utf-8")
    return status


def _part(file: str) -> Path:
    return REACHED.with_name(f"reached-{file.replace('/', '-')}.json")


def _ended(running: dict[int, str]) -> tuple[str, int]:
    pid, status = os.wait()
    return running.pop(pid), os.waitstatus_to_exitcode(status)


def _with_member(node: Any, old: Any, new: Any) -> Any:
    return node.with_changes(body=[new if member is old else member for member in node.body])


def _code(code: CodeType, name: str) -> CodeType:
    found = _found(code, name)
    if found is None:
        raise ValueError(f"There is no {name!r}.")
    return found


def _found(code: CodeType, name: str) -> CodeType | None:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_qualname == name:
                return inner
            if (found := _found(inner, name)) is not None:
                return found
    return None


if __name__ == "__main__":
    main()
