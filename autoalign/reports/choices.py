"""Choices: what is ambiguous, as questions that a person can answer, with their answers.

A choice is one undecided move: layers that could be exchanged, in every block at once, a list that may be in another
order, tensors of one layout. All of it follows from the ambiguous matches of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any, NamedTuple

from autoalign.checkpoints.config import ROTARY_SETTINGS
from autoalign.matching.assembly import SideParts
from autoalign.matching.features import is_alphabetical
from autoalign.matching.layouts import BY_HEAD, ROTARY
from autoalign.matching.pipeline import operations_of_rules
from autoalign.plan.keys import components, template
from autoalign.plan.matches import Match, Plan
from autoalign.plan.operations import Operation
from autoalign.plan.specs import TensorSpec, tied_groups
from autoalign.reports.rows import printable
from autoalign.rules.renaming_pairs import Pair, Renamer

_MAX_OPTIONS = 32
_MAX_PAIRS = 4  # of an option that are shown
_MAX_WARNINGS = 2
_CHOSEN = {"choice": 1.0}  # the evidence of what an option fills
_CLOSE = "its confidence is below min_confidence, and something else of this shape may fit as well"
_WEAK = "its confidence is below min_confidence, though nothing that is left over fits better"
_ORDER_OF_SOURCE = (
    "the order of registration, which sorted keys have lost: align the model that was saved, or its torch file"
)
_ORDER_OF_TARGET = "the order of registration, which the target's sorted keys have lost: align the model itself"
_HEAD_SIZE = "the size of a head, in a config of the checkpoint or the model"
_CALL = "autoalign.verify(source, model, inputs)"
_CODE = "the code of the checkpoint's model, by autoalign.verify(source_model, model, inputs)"


@dataclass(frozen=True, slots=True)
class Option:
    """One answer to a choice: what would fill its targets.

    ``rules``, given to ``align`` or ``load``, make it. They name tensors and no operations: where an option takes the
    same tensors in another layout, or joins or splits some, they are empty. ``Alignment.decided`` makes every option.
    """

    matches: tuple[Match, ...]  # in the order of the choice's targets
    rules: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One undecided move, with the ways to decide it."""

    targets: tuple[str, ...]  # the keys that it concerns, in the target's order
    why: tuple[str, ...]  # why it is undecided
    options: tuple[Option, ...]  # the proposal first
    confidence: float  # in the proposal, the lowest
    settled_by: tuple[str, ...] = ()  # what would decide it without a person


def choices_of(plan: Plan) -> tuple[Choice, ...]:
    """Group the ambiguous matches of a plan into choices, once; see ``Alignment.choices``."""
    known = vars(plan)
    if "choices" not in known:
        known["choices"] = tuple(_choices(plan)) if plan.ambiguous else ()
    choices: tuple[Choice, ...] = known["choices"]
    return choices


def to_paste(choice: Choice, place: int, number: int) -> str:
    """Write the Python that makes an option of the choice at a place: an argument of ``align``, or a call."""
    option, name = choice.options[number], f"alignment.choices[{place}].options[{number}]"
    if not option.rules:
        return f"alignment.decided({name})"
    if len(option.rules) > _MAX_PAIRS:
        return f"rules={name}.rules"
    return f"rules=[{', '.join(f'({_literal(a)}, {_literal(b)})' for a, b in option.rules)}]"


def answers(choice: Choice, place: int, *, for_shell: bool = False) -> list[str]:
    """Write how to decide a choice, a line for each way; ``place`` is its place among the choices.

    With ``for_shell``, rules are written as options of the command line, else as Python.
    """
    name = f"alignment.choices[{place}].options"
    python = "in Python " if for_shell else ""
    lines, others = [], []
    for number, option in enumerate(choice.options):
        label = "or" if number else "as proposed"
        if option.rules and len(option.rules) <= _MAX_PAIRS:
            pairs = " ".join(f"--rule {quote(f'{a}={b}')}" for a, b in option.rules)
            lines.append(f"{label}: {pairs if for_shell else to_paste(choice, place, number)}")
        elif option.rules:
            where = "of --rule, which --format json has" if for_shell else f"in rules={name}[{number}].rules"
            lines.append(f"{label}: {len(option.rules)} pairs {where}")
        elif number:
            others.append(number)
        else:
            lines.append(f"{label}: {python}alignment.decided({name}[0])")
    if len(others) == 1:
        proposal, option = choice.options[0], choice.options[others[0]]
        pairs_of = zip(proposal.matches, option.matches, strict=True)
        first = next(new for old, new in pairs_of if (old.sources, old.operation) != (new.sources, new.operation))
        lines.append(
            f"or by '{first.operation}' of {' + '.join(first.sources)}: {python}alignment.decided({name}[{others[0]}])"
        )
    elif others:
        lines.append(
            f"or one of {len(others)} other layouts: {python}alignment.decided({name}[{others[0]}]), to [{others[-1]}]"
        )
    return [*map(printable, lines), *settling(choice)]


def settling(choice: Choice) -> list[str]:
    """Write what would settle a choice without a person, a line each."""
    return [printable(t if t.startswith("To settle") else f"settled by {t}") for t in choice.settled_by]


def next_actions(choice: Choice, place: int) -> list[dict[str, Any]]:
    """Return what a program may do to decide a choice: to take one of the options, the proposal first, or to verify.

    Rules are given as arguments of the command line, which are pairs of keys after ``--rule``.
    """
    options = f"alignment.choices[{place}].options"
    actions: list[dict[str, Any]] = []
    for number, option in enumerate(choice.options):
        arguments = [part for first, second in option.rules for part in ("--rule", f"{first}={second}")]
        actions.append({"do": "decide", "option": number, "call": f"alignment.decided({options}[{number}])"})
        actions[-1] |= {"arguments": arguments} if arguments else {}
    command = ["autoalign", "verify", "SOURCE", "TARGET", "--checkpoint", "CKPT", "--input", "SHAPE"]
    return [*actions, {"do": "verify", "call": _CALL.replace("source", "source_model"), "command": command}]


def reasons(choice: Choice) -> tuple[str, ...]:
    """Shorten the reasons of a choice to a few."""
    more = len(choice.why) - _MAX_WARNINGS
    return (*choice.why[:_MAX_WARNINGS], *([f"and {more} more of this kind"] if more > 0 else []))


def _literal(text: str) -> str:
    """Write a text as Python, raw if it has backslashes."""
    if not text.isprintable() or '"' in text or text.endswith("\\"):
        return repr(text)
    return f'r"{text}"' if "\\" in text else f'"{text}"'


class _Way(NamedTuple):
    """What may fill a target."""

    sources: tuple[str, ...]
    operation: Operation


class _Exchange(NamedTuple):
    """What else may fill a target, which its present owner, if there is one, would give away."""

    place: int  # of the match
    way: _Way
    owner: int | None


class _Rivals(NamedTuple):
    """How one ambiguous match could be otherwise without a change of what is loaded."""

    layouts: list[_Way]  # of the same sources
    exchanges: list[_Exchange]


def _choices(plan: Plan) -> Iterator[Choice]:
    option = _option_of(plan)
    groups = {key: keys for keys in tied_groups(plan.target_specs) for key in keys}
    copies: dict[tuple[str, ...], list[Match]] = {}  # of tied targets, which are filled as one
    for match in plan.ambiguous:
        copies.setdefault(groups.get(match.target, (match.target,)), []).append(match)
    matches = [of[0] for of in copies.values()]
    tied = {of[0].target: [match.target for match in of] for of in copies.values()}
    rivals = _rivals(plan, matches)
    for places in _groups(matches, rivals):
        options = [
            option({matches[place].target: ways.get(place) or _proposed(matches[place]) for place in places}, tied)
            for ways in _ways(places, matches, rivals, plan.sources)
        ]
        warnings = dict.fromkeys(warning for place in places for warning in matches[place].warnings)
        is_close = any(rivals[place].exchanges for place in places)
        yield Choice(
            tuple(match.target for match in options[0].matches),
            tuple(warnings) or ((_CLOSE if is_close else _WEAK),),
            tuple(options),
            min(matches[place].confidence for place in places),
            tuple(_settling(plan, warnings, by_order=is_close)),
        )


def _proposed(match: Match) -> _Way:
    return _Way(match.sources, match.operation)


def _rivals(plan: Plan, matches: Sequence[Match]) -> list[_Rivals]:
    """Find, for each match, its other layouts, and what else may fill it without taking what is loaded."""
    first_of = {key: keys[0] for keys in tied_groups(plan.source_specs) for key in keys}

    def tensors(sources: Iterable[str]) -> tuple[str, ...]:
        return tuple([first_of.get(key, key) for key in sources])

    loaded = {key for match in plan.matches for key in tensors(match.sources)}
    owners: dict[str, set[int]] = {}
    for place, match in enumerate(matches):
        for key in tensors(match.sources):
            owners.setdefault(key, set()).add(place)
    result = []
    for place, match in enumerate(matches):
        rivals = _Rivals([], [])
        proposal = _Way(tensors(match.sources), match.operation)
        for way in dict.fromkeys(_Way(tensors(other.sources), other.operation) for other in match.alternatives):
            of = set[int]().union(*(owners.get(key, ()) for key in way.sources))
            if set(way.sources) == set(proposal.sources):
                rivals.layouts.extend([way] if way != proposal else [])
            elif loaded.isdisjoint(way.sources) and (
                not of or (len(of) == 1 and place not in of and tensors(matches[min(of)].sources) == way.sources)
            ):
                rivals.exchanges.append(_Exchange(place, way, min(of, default=None)))
        result.append(rivals)
    return result


def _groups(matches: Sequence[Match], rivals: Sequence[_Rivals]) -> list[list[int]]:
    """Group matches that are decided together, by their places: exchanges, and what is alike in all blocks."""
    import networkx as nx

    first: dict[Hashable, int] = {}
    together: nx.Graph[int] = nx.Graph()
    together.add_nodes_from(range(len(matches)))
    for place, match in enumerate(matches):
        together.add_edges_from(
            (first.setdefault(sign, place), place) for sign in _signs(match, rivals[place], matches)
        )
        owners = (exchange.owner for exchange in rivals[place].exchanges)
        together.add_edges_from((owner, place) for owner in owners if owner is not None)
    return list(map(sorted, nx.connected_components(together)))


def _signs(match: Match, rivals: _Rivals, matches: Sequence[Match]) -> Iterator[Hashable]:
    """Yield what matches of one move have in common: a doubt of layout, the modules that differ, or templates."""
    path = components(match.target)
    if rivals.layouts:
        yield match.warnings or template(path), len(rivals.layouts)
        return
    for exchange in rivals.exchanges:
        if exchange.owner is None:
            yield (
                match.warnings,
                *(template(components(key)[:-1]) for key in (match.target, *match.sources, *exchange.way.sources)),
            )
        else:
            yield _parting(path, components(matches[exchange.owner].target))
    if not rivals.exchanges:
        yield match.warnings, template(path[:-1]), template(components(match.sources[0])[:-1])


def _parting(first: Sequence[str], second: Sequence[str]) -> Hashable:
    """Return the template of what two paths have in common, and the two names at which they part."""
    for depth, names in enumerate(zip(first, second, strict=False)):
        if names[0] != names[1]:
            return template(first[:depth]), frozenset(names)
    return tuple(first), tuple(second)


def _ways(
    places: Sequence[int], matches: Sequence[Match], rivals: Sequence[_Rivals], sources: Mapping[str, TensorSpec]
) -> list[dict[int, _Way]]:
    """List the ways to decide a group: for each what fills the matches that are not as proposed; the first is empty."""
    result: list[dict[int, _Way]] = [{}]
    turns = range(max(len(rivals[place].layouts) for place in places))
    result += [{p: rivals[p].layouts[turn] for p in places if turn < len(rivals[p].layouts)} for turn in turns]
    left = [exchange for place in places for exchange in rivals[place].exchanges]
    while left and len(result) < _MAX_OPTIONS:
        ways: dict[int, _Way] = {}
        for place, way, _ in left:
            ways.setdefault(place, way)
        used = [ways.get(place) or _proposed(matches[place]) for place in places]
        if len(set(used)) < len(used):  # two would take the same
            ways = _exchanged(left, matches, sources)
        left = [exchange for exchange in left if ways.get(exchange.place) != exchange.way]
        if not ways:
            break
        result.append(ways)
    return result


def _exchanged(
    exchanges: Iterable[_Exchange], matches: Sequence[Match], sources: Mapping[str, TensorSpec]
) -> dict[int, _Way]:
    """Make as many of some exchanges as can be made together: each match takes part in one."""
    ways: dict[int, _Way] = {}
    for place, way, owner in exchanges:
        if place in ways or owner in ways or any(way.sources == other.sources for other in ways.values()):
            continue
        if owner is not None:
            given = matches[place].sources
            if [sources[key].shape for key in given] != [sources[key].shape for key in way.sources]:
                continue
            ways[owner] = _Way(given, matches[owner].operation)
        ways[place] = way
    return ways


def _option_of(plan: Plan) -> Callable[[Mapping[str, _Way], Mapping[str, Sequence[str]]], Option]:
    """Return a function that makes an option of what fills some targets, each of which may be tied to others."""
    own, other = (
        [spec for spec in side if spec.key not in plan.excluded] for side in (plan.source_specs, plan.target_specs)
    )
    operation_of = operations_of_rules(SideParts.of(own, {}), SideParts.of(other, {}))
    loaded = {match.target: match for match in plan.matches}
    order = {spec.key: place for place, spec in enumerate(plan.target_specs)}

    def may_name(source: str, target: str) -> bool:
        """True if a rule for these keys makes what is loaded anyway."""
        match = loaded.get(target)
        return match is not None and match.sources == (source,) and match.operation == operation_of(source, target)

    renamer = Renamer((spec.key for spec in own), (spec.key for spec in other), may_name)

    def option(ways: Mapping[str, _Way], tied: Mapping[str, Sequence[str]]) -> Option:
        named = {
            way.sources[0]: target
            for target, way in ways.items()
            if len(way.sources) == 1 and operation_of(way.sources[0], target) == way.operation
        }
        rules = renamer.pairs(named) if len(named) == len(ways) else ()
        matches = [Match(key, *way, evidence=_CHOSEN) for target, way in ways.items() for key in tied[target]]
        return Option(tuple(sorted(matches, key=lambda match: order[match.target])), rules)

    return option


def _settling(plan: Plan, warnings: Collection[str], *, by_order: bool) -> Iterator[str]:
    """Yield what would settle a choice without a person."""
    if by_order and is_alphabetical([*plan.sources]):
        yield _ORDER_OF_SOURCE
    if by_order and is_alphabetical([*plan.targets]):
        yield _ORDER_OF_TARGET
    if ROTARY in warnings:
        yield from (note for note in plan.notes if ROTARY_SETTINGS[0] in note)
    if BY_HEAD in warnings:
        yield _HEAD_SIZE
    at_hand = [getattr(side, "module", None) for side in (plan.tensors, plan.target_tensors)]
    yield _CODE if None in at_hand else _CALL
