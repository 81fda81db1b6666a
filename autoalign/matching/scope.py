"""What takes part: rules, include and exclude; and the module of one side that alone holds the other side.

A checkpoint may hold more networks than the one that is wanted (a whole diffusion pipeline, a model beside its moving
average), and a model may be more than its checkpoint (a detector around a backbone). What is matched outside the
right module is matched by coincidence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autoalign.checkpoints.containers import COPY_WORDS, name_words
from autoalign.errors import InputError, PatternError, did_you_mean
from autoalign.matching.layers import Part, squeeze, units_of
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import MOMENTUM_PAIR
from autoalign.plan.keys import TimeLimit, common_module, compiled, components
from autoalign.plan.matches import Caution
from autoalign.plan.operations import Shape
from autoalign.plan.options import PatternLike, RuleLike

if TYPE_CHECKING:
    import regex

_REGEX_PREFIX = "re:"
_REGEX_CHARACTERS = frozenset("^$*+?[]()|\\")  # which a plain pattern does not hold
_UNDONE = "Nothing was aligned."
_MAX_NAMES = 10_000  # of components that a misspelt one is compared with
_MAX_RENAMED_LENGTH = 100_000  # characters
_MIN_LAYERS_FOR_SCOPE = 4  # of the other side, so that a scope is no coincidence
_MIN_SHARE_OF_COPY = 0.8  # of the usable layers that each of several copies must hold
_AVERAGES = frozenset({"average", "ema", "shadow"})
_MAX_SHARE_OF_SCOPE = 0.8  # of its side's layers; what leaves out less is no scope


def checked_rules(rules: RuleLike) -> list[tuple[str, str]]:
    """Return rules as pairs.

    Raises:
        InputError: They are no pairs of strings.
    """
    given: object = rules.items() if isinstance(rules, Mapping) else rules
    pairs: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if not all(
        isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(p, str) for p in pair) for pair in pairs
    ):
        raise InputError(f"rules must be a mapping of regex to replacement or pairs of keys. {_UNDONE}")
    return [(first, second) for first, second in pairs]


def pinned_pairs(rules: RuleLike, source: Sequence[str], target: Sequence[str]) -> dict[str, str]:
    r"""Return the pairs that the rules fix: target key -> source key.

    A rule is a pair of keys, or a regex with its replacement. These are applied to a source key by ``re.sub``, one
    after another, until it is one of the target's; those that follow begin with the source key again, which may fill
    several. A key that never becomes one of them fixes nothing.

    >>> pinned_pairs({r"^old\.": "new."}, ["old.a", "b"], ["new.a", "b"])
    {'new.a': 'old.a'}

    Raises:
        PatternError: A rule is malformed, names keys that do not exist, or fixes one key twice.
    """
    pairs = checked_rules(rules)
    own, other = set(source), set(target)
    pins: dict[str, str] = {}
    renamings: list[tuple[regex.Pattern[str], str, str]] = []
    for first, second in pairs:
        if first in own and second in other:
            _pin(pins, first, second)
        elif first in own:
            raise PatternError(f"The rules fill {second!r}, which is not a key of the model. {_UNDONE}")
        else:
            renamings.append((_compiled(first), first, second))
    limit = TimeLimit(len(source), _UNDONE)
    used: set[int] = set()
    fixed: set[int] = set()
    taken = set(pins.values())
    for key in source:
        if key in taken:
            continue
        renamed, trail, is_fixed = key, [], False
        for number, (pattern, text, replacement) in enumerate(renamings):
            renamed, count = limit.subn(pattern, replacement, renamed)
            if len(renamed) > max(_MAX_RENAMED_LENGTH, len(key)):
                raise PatternError(f"The rule {text!r} -> {replacement!r} makes keys longer without end. {_UNDONE}")
            if not count:
                continue
            trail.append(number)
            if renamed in other:
                pins.setdefault(renamed, key)
                fixed.update(trail)
                renamed, trail, is_fixed = key, [], True  # the rules that follow may fill another key from it
        used.update(trail if not is_fixed else ())
    used |= fixed
    for number, (_, text, replacement) in enumerate(renamings):
        if number in used - fixed:
            raise PatternError(f"The rule {text!r} -> {replacement!r} produces no key of the model. {_UNDONE}")
        if number not in used:
            raise PatternError(
                f"The rule {text!r} -> {replacement!r} matches no checkpoint key. {_UNDONE} "
                "Rules go from checkpoint key to model key; check the spelling or leave the rule out."
            )
    return pins


def _pin(pins: dict[str, str], source: str, target: str) -> None:
    if pins.setdefault(target, source) != source:
        raise PatternError(
            f"The rules fill {target!r} from {pins[target]!r} and {source!r}. Nothing was aligned; keep one of them."
        )


@dataclass(frozen=True, slots=True)
class _Selector:
    """One pattern of ``include`` or ``exclude``."""

    text: str  # as it was given
    framed: str  # of a plain pattern, see _framed; empty for a regex
    regex: regex.Pattern[str] | None

    def chosen(self, keys: Mapping[str, str], limit: TimeLimit) -> set[str]:
        """Return the keys that it matches; they are given with their framed forms."""
        if self.regex is None:
            return {key for key, framed in keys.items() if self.framed in framed}
        return {key for key in keys if limit.search(self.regex, key)}


def excluded_keys(
    include: PatternLike, exclude: PatternLike, source: Sequence[str], target: Sequence[str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """List the keys that take no part: those that ``exclude`` matches, and those that ``include`` leaves out.

    A plain word or dotted path matches the keys that hold it as whole components, wherever they stand; ``re:`` before
    a regular expression, or a compiled one, those in which it is found. A pattern of ``include`` chooses among the
    target's keys, or among the source's if it matches no target key.

    Returns:
        The keys, and a note for each pattern on what it matched on each side.

    >>> excluded_keys(None, "fc", ["fc.weight", "mlp.fc1.weight"], ["net.fc.weight", "head"])[1]
    ("exclude='fc' took 1 target and 1 source tensor.",)
    """
    unwanted, wanted = _selectors(exclude, "exclude"), _selectors(include, "include")
    if not unwanted and not wanted:
        return frozenset(), ()
    sides = [{key: _framed(key) for key in side} for side in (target, source)]
    limit = TimeLimit(len(source) + len(target), _UNDONE)
    out: set[str] = set()
    notes: list[str] = []
    for selector in unwanted:
        taken = [selector.chosen(side, limit) for side in sides]
        out.update(*taken)
        if any(taken):
            plural = "s" if len(taken[1]) != 1 else ""
            took = f"{len(taken[0]):,} target and {len(taken[1]):,} source tensor{plural}"
            notes.append(f"exclude={selector.text!r} took {took}.")
        else:
            notes.append(Caution(f"exclude={selector.text!r} matches no key of either side.{_meant(selector, sides)}"))
    kept: list[set[str]] = [set(), set()]
    for selector in wanted:
        taken = [selector.chosen(side, limit) for side in sides]
        chosen = 0 if taken[0] else 1
        if not taken[chosen]:
            meant = _meant(selector, sides)
            raise PatternError(f"include={selector.text!r} matches no key of either side. {_UNDONE}{meant}")
        kept[chosen] |= taken[chosen]
        name = ("target", "source")[chosen]
        notes.append(f"include={selector.text!r} took {len(taken[chosen]):,} of {len(sides[chosen]):,} {name} tensors.")
    for side, chosen_keys in zip(sides, kept, strict=True):
        if chosen_keys:
            out.update(side.keys() - chosen_keys)
    return frozenset(out), tuple(notes)


def pattern_for(path: str, end: str, others: Iterable[str]) -> str:
    r"""Return a pattern that matches a path and none of the others: a plain one, or a regex with the given end.

    >>> pattern_for("teacher", "[.]", ["student"]), pattern_for("fc.bias", "$", ["net.fc.bias"])
    ('teacher', 're:^fc\\.bias$')
    """
    plain = not _is_regex_like(path) and "/" not in path and ":" not in path and all(path.split("."))
    if plain and not any(_framed(path) in _framed(other) for other in others):
        return path
    return f"{_REGEX_PREFIX}^{re.escape(path)}{end}"


def _meant(selector: _Selector, sides: Iterable[Iterable[str]]) -> str:
    """Return the question whether a component of the keys was meant by a plain pattern that matches none of them."""
    names = dict.fromkeys(name for side in sides for key in side for name in components(key))
    return did_you_mean(selector.text, names) if selector.regex is None and len(names) < _MAX_NAMES else ""


def _selectors(given: PatternLike, option: str) -> list[_Selector]:
    if given is None:
        return []
    if isinstance(given, str | re.Pattern):
        given = [given]
    if not isinstance(given, Iterable):
        raise InputError(f"{option} takes words or regexes, not {type(given).__name__}. {_UNDONE}")
    return list(dict.fromkeys(_selector(pattern, option) for pattern in given))


def _selector(pattern: object, option: str) -> _Selector:
    if isinstance(pattern, re.Pattern):
        return _Selector(f"re:{pattern.pattern}", "", _compiled(pattern))
    if not isinstance(pattern, str):
        raise InputError(f"{option} takes words or regexes, and one of them is a {type(pattern).__name__}. {_UNDONE}")
    if pattern.startswith(_REGEX_PREFIX):
        return _Selector(pattern, "", _compiled(pattern.removeprefix(_REGEX_PREFIX)))
    if _is_regex_like(pattern) or not pattern.strip("."):
        raise PatternError(
            f"{option}={pattern!r} is not a name of a module or tensor. {_UNDONE} A plain pattern, such as "
            f"'fc' or 'layer4.0', means whole components of a key; write {_REGEX_PREFIX + pattern!r} for a regular "
            "expression."
        )
    return _Selector(pattern, _framed(pattern.strip(".")), None)


def _framed(key: str) -> str:
    """Write a key so that a search for text finds whole components only."""
    return f".{'.'.join(components(key))}."


def _is_regex_like(text: str) -> bool:
    return not _REGEX_CHARACTERS.isdisjoint(text)


def _compiled(pattern: str | re.Pattern[str]) -> regex.Pattern[str]:
    try:
        return compiled(pattern)
    except (InputError, PatternError) as error:
        raise type(error)(f"{error} {_UNDONE}") from error


@dataclass(frozen=True, slots=True)
class Scope:
    """The module to match, and the modules that are copies of it under other names."""

    path: Path = ()  # what lies outside is left out
    taken: Path = ()  # the copy that is used
    copies: tuple[Path, ...] = ()  # the others, which are left out
    is_decided: bool = True  # by evidence for this copy and against the others
    is_named: bool = True  # by a rule, or by a name that the other side has too


def scope_of(parts: Sequence[Part], others: Sequence[Part], pinned: Sequence[Path] = ()) -> Scope:
    """Find the smallest module that holds as many layers of the other side's shapes as the whole side does.

    Of several copies one is taken as a whole, never mixed: the one with a pinned tensor, else the one whose name occurs
    in the names of the other side's outermost modules, else the one that is not a moving average.
    """
    units = units_of(parts)
    wanted = Counter(shapes for unit in units_of(others) if (shapes := _shapes(unit.parts, others)))
    usable = (Counter(_shapes(unit.parts, parts) for unit in units) & wanted).total()
    if not _MIN_LAYERS_FOR_SCOPE <= usable < len(units):
        return Scope()
    least, most = _MIN_SHARE_OF_COPY * usable, _MAX_SHARE_OF_SCOPE * len(units)
    sizes = Counter(unit.path[:depth] for unit in units for depth in range(1, len(unit.path)))
    if not any(least <= size < most for size in sizes.values()):
        return Scope()
    tree = units.ancestry
    held: list[Counter[_Shapes]] = [Counter() for _ in tree.nodes]
    for unit, above in zip(units, tree.ancestors, strict=True):
        shapes = _shapes(unit.parts, parts)
        for module in above[above >= 0]:
            held[module][shapes] += 1
    inner = [module for module in range(1, len(held)) if held[module].total() < most]
    enough = [module for module in inner if (held[module] & wanted).total() >= least]
    copies: dict[frozenset[Path], list[Path]] = {}  # by the names below
    layers = [unit.path for unit in units if any(parts[index].shape for _, index in unit.parts)]  # no mere counters
    for path in (tree.nodes[module] for module in enough):
        names = frozenset(layer[len(path) :] for layer in layers if layer[: len(path)] == path)
        copies.setdefault(names, []).append(path)
    for paths in copies.values():  # outer modules come before inner ones
        if len(paths) > 1:
            best = _best_copy(paths, _words(common_module([part.path for part in others])), pinned)
            rest = scope_of(within(parts, best), others, pinned)  # other networks may stand beside the copies
            return replace(best, path=rest.path) if not rest.copies else best
    whole = [module for module in enough if (held[module] & wanted).total() == usable]
    size = min((held[module].total() for module in whole), default=0)
    smallest = [tree.nodes[module] for module in whole if held[module].total() == size]
    # Several different networks of the same shapes: their names must decide.
    return Scope(smallest[0], smallest[0]) if len(smallest) == 1 else Scope()


def _best_copy(paths: Sequence[Path], called: frozenset[str], pinned: Sequence[Path]) -> Scope:
    def rank(path: Path) -> tuple[bool, bool, bool]:
        own, rivals = _words(path), _words([name for rival in paths if rival != path for name in rival])
        own, rivals = own - rivals, rivals - own
        is_average = not COPY_WORDS.isdisjoint(_words(path)) or (own, rivals) == MOMENTUM_PAIR
        return not any(name[: len(path)] == path for name in pinned), not own & called, is_average

    ranks = {path: rank(path) for path in paths}
    first, second, *rest = sorted(paths, key=ranks.__getitem__)
    is_named = ranks[first][:2] < ranks[second][:2]
    return Scope((), first, (second, *rest), ranks[first] < ranks[second], is_named)


def name_of_averages(paths: Sequence[Path]) -> str:
    """Return the name under which tensors hold their moving averages, as in TensorFlow's checkpoints; else "".

    >>> name_of_averages([("conv", "weights"), ("conv", "weights", "ExponentialMovingAverage")])
    'ExponentialMovingAverage'
    """
    names = [name for name in {path[-1] for path in paths} if not _AVERAGES.isdisjoint(name_words(name))]
    known = set(paths) if names else set()
    return next((path[-1] for path in paths if path[-1] in names and path[:-1] in known), "")


def with_averages(parts: Sequence[Part]) -> Sequence[Part]:
    """Exchange the names of tensors and of the moving averages that they hold: these are what is evaluated."""
    paths = {part.path for part in parts}
    name = name_of_averages([part.path for part in parts])
    averaged = {path[:-1] for path in paths if path[-1] == name and path[:-1] in paths} if name else set()

    def exchanged(path: Path) -> Path:
        if path in averaged:
            return (*path, name)
        return path[:-1] if path[-1] == name and path[:-1] in averaged else path

    return [replace(part, path=exchanged(part.path)) for part in parts] if averaged else parts


def within(parts: Sequence[Part], scope: Scope) -> list[Part]:
    """List the parts in scope."""

    def is_below(part: Part, path: Path) -> bool:
        return part.path[: len(path)] == path

    return [
        part for part in parts if is_below(part, scope.path) and not any(is_below(part, copy) for copy in scope.copies)
    ]


_Shapes = tuple[tuple[str, Shape], ...]


def _shapes(members: Sequence[tuple[str, int]], parts: Sequence[Part]) -> _Shapes:
    return tuple((values, squeeze(parts[index].shape)) for values, index in members if values in ("weight", "other"))


def _words(names: Iterable[str]) -> frozenset[str]:
    return frozenset(word for name in names for word in name_words(name))
