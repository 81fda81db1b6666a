"""Fit the weights of the matcher's cues: ``python -m benchmarks.fit [--write]``.

The examples are all moves that the matcher considers on the gold cases, in both orders of their keys, on perturbations
and on changed architectures: before and after it made the better ones. Of each it is known whether what is or the move
gives more right tensors. A logistic regression gives the weights. Another one gives those of what two networks have in
common, of gold cases, which are related, and of sides of cases of unlike families, which are not.

``--leave-out`` scores every gold case with weights that were fitted without the cases of its libraries, and prints a
line for each library: a figure for code that the fit has not seen. The words and the rules of the matcher have seen it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import autoalign
from autoalign.matching import candidates, cues, pipeline, relation
from autoalign.matching.candidates import paired_parts
from autoalign.matching.confidence import WEIGHTS_FILE
from autoalign.matching.layers import slots_of
from autoalign.matching.state import State
from autoalign.plan.specs import TensorSpec
from benchmarks.cases import perturbations
from benchmarks.cases.architectures import every_architecture, is_fitted, named_architecture
from benchmarks.cases.changes import changed
from benchmarks.cases.gold import index as gold_index
from benchmarks.cases.gold import names, read
from benchmarks.cases.gold.expressions import source_keys
from benchmarks.gold import Score, report, scored

SEED = 4242  # of the perturbations and of the unrelated pairs; figures are measured with others
RELATED_ODDS = 9.0  # people mostly align what is related
_MAX_TENSORS = 1200  # of a case's target, to save time
_MAX_UNRELATED_TENSORS = 700  # the same for what is unrelated
_CHANGES = ("renamed", "reordered", "numbered", "half renamed")  # of architectures
_RIDGE = 1e-4
_CASE_EXPONENT = 0.75  # a case with n moves counts as n ** 0.25: they are no independent witnesses

_Truth = Mapping[str, frozenset[str]]  # of each target key that counts: the source keys that it is made of

CUES, RELATION = "cues", "relation"  # what there are weights of
_Weights = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Example:
    """One move, in one case; or one pair of networks."""

    case: str
    libraries: frozenset[str]
    values: Mapping[str, float]  # of the cues of a move, or of what two networks have in common
    is_right: bool  # what is gives more right tensors than the move; or the networks are related
    of: str = CUES


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print and, if asked to, write the weights or score what was left out."""
    options = _parser().parse_args(arguments)
    counts = options.perturbations, options.changed, options.unrelated
    examples = list(collected(options.only, *counts, processes=options.processes))
    weights = fitted(examples)
    print(json.dumps(weights, indent=1))
    for of in weights:
        right = [one.is_right for one in examples if one.of == of]
        print(f"{of}: {len(right)} examples, {sum(right)} of them right")
    if options.write:
        text = json.dumps({"made by": "python -m benchmarks.fit --write", **weights}, indent=1) + "\n"
        (Path(autoalign.__file__).parent / "matching" / WEIGHTS_FILE).write_text(text, encoding="utf-8")
    if options.leave_out:
        chosen = names(options.only)
        known = weights_without(examples, chosen)
        for is_sorted in (False, True):
            print(f"\nkeys of the sources {'sorted' if is_sorted else 'in the order of registration'}")
            scores = left_out(known, chosen, with_sorted_keys=is_sorted, processes=options.processes)
            print("\n".join(report(list(scores), by_library=True)))
    return 0


def fitted(examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Fit the weights: the most probable ones, by a logistic regression for each kind of examples.

    Raises:
        ValueError: There are no examples.

    >>> more = [Example("a", frozenset("a"), {"bias": 1.0, "names": 1.0}, True)] * 9
    >>> fitted([*more, Example("b", frozenset("b"), {"bias": 1.0, "names": -1.0}, False)])["cues"]["names"] > 0
    True
    """
    if not examples:
        raise ValueError("There are no examples to fit the weights to.")
    found = {}
    for of in sorted({one.of for one in examples}):
        chosen = [one for one in examples if one.of == of]
        found[of] = _regression(chosen, _shares(chosen))
    return found


def _shares(examples: Sequence[Example]) -> list[float]:
    """Return what each example counts."""
    if examples[0].of == RELATION:
        counts = Counter(one.is_right for one in examples)
        return [(RELATED_ODDS if one.is_right else 1.0) / counts[one.is_right] for one in examples]
    cases = Counter(one.case for one in examples)
    return [cases[one.case] ** -_CASE_EXPONENT for one in examples]


def _regression(examples: Sequence[Example], shares: Sequence[float]) -> dict[str, float]:
    names = list(examples[0].values)
    share = torch.tensor(shares, dtype=torch.float64)
    values = torch.tensor([[one.values[name] for name in names] for one in examples], dtype=torch.float64)
    wanted = torch.tensor([one.is_right for one in examples], dtype=torch.float64)
    weights = torch.zeros(values.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = values @ weights
        total = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, share, reduction="sum")
        result = total / share.sum() + _RIDGE * weights.square().mean()
        result.backward()  # type: ignore[no-untyped-call]
        return result

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return dict(zip(names, [round(value, 3) for value in weights.tolist()], strict=True))


def collected(only: str, perturbed: int, altered: int, unrelated: int, *, processes: int) -> Iterator[Example]:
    """List the moves of the gold cases whose names contain a text, in both orders, and of some that were made.

    And what two networks have in common: of these, which are related, and of some pairs that are not.
    """
    jobs: list[Callable[[], list[Example]]] = [
        partial(_of_gold, name, with_sorted_keys=is_sorted) for name in names(only) for is_sorted in (False, True)
    ]
    jobs += [partial(_of_perturbation, index) for index in range(perturbed)]
    jobs += [partial(_of_changed, index) for index in range(altered)]
    jobs += [partial(_of_unrelated, index) for index in range(unrelated)]
    with _pool(processes) as pool:
        for found in pool.map(_called, jobs, chunksize=4):
            yield from found


def weights_without(examples: Sequence[Example], chosen: Iterable[str]) -> dict[frozenset[str], _Weights]:
    """Fit weights without the cases that have a library in common with a gold case, for the libraries of each."""
    return {
        libraries: fitted([one for one in examples if libraries.isdisjoint(one.libraries)])
        for libraries in sorted({_libraries(name) for name in chosen}, key=sorted)
    }


def left_out(
    known: Mapping[frozenset[str], _Weights], chosen: Iterable[str], *, with_sorted_keys: bool, processes: int
) -> Iterator[Score]:
    """Score gold cases, each with weights that have not seen its libraries."""
    jobs = [partial(_scored, name, known[_libraries(name)], with_sorted_keys=with_sorted_keys) for name in chosen]
    with _pool(processes) as pool:
        yield from pool.map(_called, jobs)


def _libraries(name: str) -> frozenset[str]:
    return frozenset(side.split(".")[0] for side in name.split("->"))


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def _called(job: Callable[[], Any]) -> Any:
    torch.set_num_threads(1)  # there is nothing to share between threads that wait for one another
    return job()


def _scored(name: str, weights: _Weights, *, with_sorted_keys: bool) -> Score:
    def read_weights(of: str) -> Mapping[str, float]:
        return weights[of]

    with patch.object(cues, "fitted_weights", read_weights), patch.object(relation, "fitted_weights", read_weights):
        return scored(read(name, with_sorted_keys=with_sorted_keys))


def _of_gold(name: str, *, with_sorted_keys: bool) -> list[Example]:
    case = read(name, with_sorted_keys=with_sorted_keys)
    if len(case.target) > _MAX_TENSORS:
        return []
    first = dict(case.first_of)
    truth = {
        key: frozenset(first.get(source, source) for source in source_keys(expression)) if expression else frozenset()
        for key, expression in case.expressions.items()
    }
    found = _examples(case.source, case.target, truth, first)
    return [Example(f"{name} {with_sorted_keys}", _libraries(name), *one) for one in found]


def _of_perturbation(index: int) -> list[Example]:
    case = perturbations.case(index, SEED)
    truth = {key: frozenset([source] if source else []) for key, source in case.truth.items()}
    found = _examples(perturbations.on_meta(case.source), perturbations.on_meta(case.target), truth, {})
    return [Example(case.name, frozenset([case.name]), *one) for one in found]


def _of_changed(index: int) -> list[Example]:
    """Align one of the architectures that take part in fits to itself, changed so that names or order tell little."""
    chosen = random.Random(f"{SEED} {index}")
    name, change = chosen.choice([name for name in every_architecture() if is_fitted(name)]), chosen.choice(_CHANGES)
    architecture = named_architecture(name)
    if architecture is None or len(architecture.specs) > _MAX_TENSORS:
        return []
    entries = changed(architecture.specs, change, chosen)
    truth = {entry.origin: frozenset([entry.key]) for entry in entries if entry.origin is not None}
    source = tuple(TensorSpec(entry.key, entry.shape, entry.dtype) for entry in entries)
    sides = perturbations.on_meta(source), perturbations.on_meta(architecture.specs)
    return [Example(f"{name} {change}", frozenset([name]), *one) for one in _examples(*sides, truth, {})]


def _of_unrelated(index: int) -> list[Example]:
    """Align a side of one case with a side of another, of an unlike family."""
    chosen = random.Random(f"{SEED} {index}")
    entries = [entry for entry in gold_index() if entry.target_tensors <= _MAX_UNRELATED_TENSORS]
    first, second = chosen.sample(entries, 2)
    if first.family == second.family:
        return []
    cases = read(first.name), read(second.name)
    own, other = (chosen.choice((case.source, case.target)) for case in cases)
    found = _examples(own, other, None, {})
    libraries = _libraries(first.name) | _libraries(second.name)
    return [Example(f"{first.name} {second.name}", libraries, *one) for one in found]


def _examples(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], truth: _Truth | None, first_of: Mapping[str, str]
) -> list[tuple[Mapping[str, float], bool, str]]:
    """Align two sides; list the cues of each move that was considered, and whether what is was right.

    And what both have in common. Without a truth they have nothing to do with one another.
    """
    sides: list[Any] = []
    units: list[Any] = []
    result: list[tuple[Mapping[str, float], bool, str]] = []

    def match_parts(*arguments: Any) -> Any:
        sides[:] = arguments[:2]
        return match_all(*arguments)

    def kinds_of(*arguments: Any) -> Any:
        units[:] = arguments
        return all_kinds(*arguments)

    def right(own: int, other: int, truth: _Truth) -> tuple[int, frozenset[tuple[str, str]]]:
        """Count the right tensors of a pair of units, and list what it pairs."""
        (own_units, own_parts, other_units, other_parts), (own_side, other_side) = units, sides
        pairs = [
            (own_side.key(own_parts[a]), other_side.key(other_parts[b]))
            for a, b in paired_parts(own_units[own], other_units[other])
        ]
        pairs = [(first_of.get(a, a), b) for a, b in pairs if b in truth]
        return sum(a in truth[b] for a, b in pairs), frozenset(pairs)

    def settled(
        assignment: Any, own: Any, other: Any, kinds: Any, shapes: Any, entries: Any, fixed: Collection[int] = ()
    ) -> Any:
        outcome = settle(assignment, own, other, kinds, shapes, entries, fixed)
        slots = slots_of(own.paths), slots_of(other.paths)
        if truth is None:
            return outcome
        for stage in (assignment, outcome.assignment):
            for move in cues.moves_of(State(stage, own, other, kinds, shapes, entries, slots)):
                before, after = ([right(*pair, truth) for pair in way] for way in (move.before, move.after))
                gain = sum(a[0] - b[0] for a, b in zip(before, after, strict=True) if a[1] != b[1])
                if gain and not {unit for _, unit in move.before} & set(fixed):
                    values = {"bias": 1.0, **{name: round(float(value), 4) for name, value in move.cues.items()}}
                    result.append((values, gain > 0, CUES))
        return outcome

    def common_ground(*arguments: Any, **options: Any) -> Any:
        found = measure(*arguments, **options)
        result.append((found, truth is not None, RELATION))
        return found

    match_all, all_kinds, settle = pipeline.match_parts, candidates.kinds_of, cues.settled
    measure = relation.common_ground
    with (
        patch.multiple(pipeline, match_parts=match_parts, kinds_of=kinds_of, settled=settled),
        patch.object(relation, "common_ground", common_ground),
    ):
        autoalign.align(source, target)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name contains this")
    parser.add_argument("--perturbations", type=int, default=150, metavar="N", help="how many")
    parser.add_argument("--changed", type=int, default=150, metavar="N", help="how many changed architectures")
    parser.add_argument("--unrelated", type=int, default=1500, metavar="N", help="how many pairs")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--write", action="store_true", help="write the weights into the package")
    parser.add_argument(
        "--leave-out", action="store_true", help="score every library with weights that have not seen it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
