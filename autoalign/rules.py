r"""Rules: an ordered list of regex renamings and operations, which turns a state dict into another without matching.

The first rule whose pattern matches the beginning of a key takes the key, once; what a pattern leaves over of a key is
kept at the end of the new one. A key that no rule takes keeps its name. See ``autoalign.indices`` for replacements.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autoalign import serial
from autoalign.errors import InputError, PatternError, RulesError
from autoalign.expressions import TimeLimit, compiled
from autoalign.indices import SLICE, Arithmetic, expand, number_of, tokens_of
from autoalign.matches import Match
from autoalign.operations import Copy, InsertZeros, Operation, Shape, chain, output_shapes, steps_of
from autoalign.quantised import ADVICE, groups_of
from autoalign.relative import Pick, Portion, at, exact, slice_count
from autoalign.specs import specs_of

if TYPE_CHECKING:
    import regex
    from transformers.core_model_loading import WeightConverter, WeightRenaming

VERSION = 1
_SHOWN = 5  # problems that an error lists
_MOST_ZEROS = 16  # times the elements of all sources
_SHOWN_TEXT = 200  # characters of what was wrong
_WIDTH = 70  # of the patterns' column, before it is given up
_TRIED = 0.1  # seconds for each pattern where all together take too long
_UNDONE = "Nothing was converted."
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(|^\(\?[a-zA-Z]+\)")


@dataclass(frozen=True, slots=True)
class Rule:
    r"""What becomes of the keys that some patterns match.

    >>> print(Rule((r"^layers\.(\d+)\.attn\.",), (r"encoder.blocks.\1.attention.",)))
    ^layers\.(\d+)\.attn\. -> encoder.blocks.\1.attention.
    """

    sources: tuple[str, ...]  # patterns; several for tensors that are joined, (?P<n>\d+) for a list that is joined
    targets: tuple[str, ...] = ()  # replacements; several for a tensor that is split; none: the tensor is dropped
    operations: tuple[Operation, ...] = ()  # for each target; none: copies
    tied: bool = False  # whether the targets are one tensor of the model, so that filling the first is enough

    def operation(self, place: int) -> Operation:
        """What fills a target."""
        return self.operations[place] if self.operations else Copy()

    @property
    def fills(self) -> list[tuple[str, Operation]]:
        """Each target with the operation that fills it."""
        return [(target, self.operation(place)) for place, target in enumerate(self.targets)]

    @property
    def renames(self) -> bool:
        """Whether the rule does no more than give a tensor a new name, or drop it."""
        return (
            len(self.sources) == 1 and (len(self.targets) < 2 or self.tied) and not any(map(_changes, self.operations))
        )

    @property
    def has_arithmetic(self) -> bool:
        """Whether a new name holds a number that is computed."""
        tokens = (token for target in self.targets for token in tokens_of(target))
        return any(isinstance(token, Arithmetic) and not token.is_plain for token in tokens)

    def __str__(self) -> str:
        return " -> ".join(self.sides)

    @property
    def sides(self) -> tuple[str, str]:
        """The two sides as a person reads them."""
        sources = _braced(self.sources)
        if not self.targets:
            return sources, "(dropped)"
        operations = [operation for _, operation in self.fills]
        if len(set(operations)) == 1:
            note = f"   {operations[0]}" if _changes(operations[0]) else "   (tied)" if self.tied else ""
            return sources, (_braced(self.targets) or '""') + note
        if parts := equal_parts(operations):
            return sources, f"{_braced(self.targets)}   {len(operations)} equal parts (dim {parts.dim})"
        return sources, ", ".join(
            f"{target} = {operation}" if _changes(operation) else target for target, operation in self.fills
        )


@dataclass(frozen=True)
class Rules:
    r"""An ordered list of rules. Made by ``Alignment.rules``, read from JSON, or written by hand.

    >>> import torch
    >>> rules = Rules((Rule((r"^fc\.",)), Rule((r"^layer(\d+)\.",), (r"stages.{\1 - 1}.",))))
    >>> print(rules)
    ^fc\.         -> (dropped)
    ^layer(\d+)\. -> stages.{\1 - 1}.
    >>> list(rules.apply({"layer1.weight": torch.ones(2), "fc.weight": torch.ones(2), "stem": torch.ones(1)}))
    ['stages.0.weight', 'stem']
    """

    rules: tuple[Rule, ...]
    notes: tuple[str, ...] = ()  # what the rules leave out of the alignment that they were made from

    def __post_init__(self) -> None:
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise InputError(f"Rules are a tuple of Rule, and not this {type(self.rules).__name__}.")
        for rule in self.rules:
            _check(rule)

    def __len__(self) -> int:
        return len(self.rules)

    @cached_property
    def _patterns(self) -> dict[int, tuple[Rule, int, regex.Pattern[str]]]:
        """Each pattern with its rule and its place there, by the number of the group after it in ``_any``."""
        found, group = {}, 0
        for rule in self.rules:
            for place, source in enumerate(rule.sources):
                pattern = compiled(source)
                group += pattern.groups + 1
                found[group] = rule, place, pattern
        return found

    @cached_property
    def _any(self) -> regex.Pattern[str]:
        """All patterns as one: the last group that takes part in a match tells which of them matched."""
        sources = (source for rule in self.rules for source in rule.sources)
        return compiled("|".join(f"(?:{source.replace(f'(?P<{SLICE}>', '(')})()" for source in sources))

    def _taken(self, key: str, limit: TimeLimit) -> tuple[Rule, int, regex.Pattern[str]] | None:
        """Tell which pattern of which rule takes a key."""
        if not self.rules:
            return None
        try:
            match = limit.match(self._any, key)
        except PatternError:
            for _, _, pattern in self._patterns.values():
                TimeLimit(0, _UNDONE, seconds=_TRIED).match(pattern, key)  # names the one that takes long
            raise
        return None if match is None else self._patterns[match.lastindex or 0]

    def rule_of(self, key: str) -> Rule | None:
        r"""Tell which rule takes a key; None for a key that keeps its name.

        >>> print(Rules((Rule((r"^old\.",), ("new.",)),)).rule_of("old.weight"))
        ^old\. -> new.
        """
        if not isinstance(key, str):
            raise InputError(f"Expected a key, not {type(key).__name__}.")
        taken = self._taken(key, TimeLimit(1, _UNDONE))
        return None if taken is None else taken[0]

    def plan(self, shapes: Mapping[str, Shape]) -> list[Match]:
        r"""Say what becomes of tensors of the given shapes.

        >>> rules = Rules((Rule((r"^q\.", r"^k\."), ("qk.",), (__import__("autoalign").operations.Concatenate(0),)),))
        >>> [(match.target, match.sources, str(match.operation)) for match in rules.plan({"q.b": (2,), "k.b": (2,)})]
        [('qk.b', ('q.b', 'k.b'), 'concatenate(dim 0)')]

        Returns:
            For each tensor that results its name, its sources, and the operation in absolute sizes.

        Raises:
            RulesError: The rules do not hold here: a part is missing, a size does not fit, two tensors get one name.
        """
        if not isinstance(shapes, Mapping) or not all(isinstance(key, str) for key in shapes):
            raise InputError(f"Expected a mapping of keys to shapes, not {type(shapes).__name__}. {_UNDONE}")
        matches, problems = self.attempt(shapes)
        if problems:
            texts = list(dict.fromkeys(problems.values()))
            more = [f"... and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
            listed = "\n  ".join([*texts[:_SHOWN], *more])
            raise RulesError(f"The rules do not hold for this state dict. Nothing was converted.\n  {listed}")
        return matches

    def attempt(self, shapes: Mapping[str, Shape]) -> tuple[list[Match], dict[str, str]]:
        """Do as ``plan`` does, and give the keys that nothing is made of, with the reasons, instead of raising."""
        found: dict[tuple[int, tuple[str | None, ...], str], _Instance] = {}
        planned: list[Match | tuple[Rule, _Instance]] = []
        problems: dict[str, str] = {}
        limit = TimeLimit(len(shapes), _UNDONE)
        for key in shapes:
            taken = self._taken(key, limit)
            if taken is None:
                planned.append(Match(key, (key,)))
                continue
            rule, place, pattern = taken
            if not rule.targets:
                continue
            match = limit.match(pattern, key)
            assert match is not None
            captured, member = list(match.groups()), -1
            if SLICE in pattern.groupindex:
                try:
                    member = number_of(captured[pattern.groupindex[SLICE] - 1] or "")
                except InputError as error:
                    problems[key] = f"{key}: {error} ({rule})"
                    continue
                captured[pattern.groupindex[SLICE] - 1] = None
            identity = id(rule), tuple(captured), key[match.end() :]
            if identity not in found:
                found[identity] = _Instance(identity[1], identity[2], [{} for _ in rule.sources])
                planned.append((rule, found[identity]))
            found[identity].keys[place][member] = key
        matches: dict[str, Match] = {}
        for item in planned:
            if isinstance(item, Match):
                made = [item]
            else:
                rule, instance = item
                try:
                    made = _made(rule, instance, shapes)
                except (InputError, IndexError, RuntimeError, ValueError) as error:  # what torch says of a wrong rank
                    keys = [key for of in instance.keys for key in of.values()]
                    problems.update(dict.fromkeys(keys, f"{', '.join(keys)}: {error} ({rule})"))
                    continue
            for each in made:
                first = matches.setdefault(each.target, each)
                if first is not each:
                    text = f"{each.target} is filled from {', '.join(first.sources)} and {', '.join(each.sources)}"
                    problems.update(dict.fromkeys((*first.sources, *each.sources), text))
        return list(matches.values()), problems

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Rename and convert a state dict, without any matching; the given one is not changed.

        >>> import torch
        >>> Rules((Rule((r"^module\.",), ("",)),)).apply({"module.bias": torch.ones(1)})
        {'bias': tensor([1.])}

        Args:
            state_dict: Tensors by key, with values or on the meta device.

        Returns:
            The new tensors, in the order in which their sources stand; they may be views of the given ones.

        Raises:
            RulesError: The rules do not hold for this state dict.
        """
        if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
            raise InputError(f"Expected a mapping of keys to tensors, not {type(state_dict).__name__}. {_UNDONE}")
        specs = getattr(state_dict, "specs", None) or specs_of(state_dict)
        codes = groups_of(specs)
        result = {}
        for match in self.plan({spec.key: spec.shape for spec in specs}):
            if match.operation != Copy() and (coded := [codes[key] for key in match.sources if key in codes]):
                raise RulesError(
                    f"{coded[0].spec} is quantised as {coded[0].group.scheme}: its elements are codes, not values, and "
                    f"{match.operation} would mix them up. Nothing was converted. {ADVICE}"
                )
            tensors = [state_dict[key] for key in match.sources]
            try:
                (result[match.target],) = match.operation.apply(tensors)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:  # what torch says of dtypes and devices
                made = f"{match.target} = {match.operation} of {', '.join(match.sources)}"
                raise RulesError(
                    f"The rules do not hold for this state dict. Nothing was converted.\n  {made}: {error}"
                ) from error
        return result

    def to_json(self) -> str:
        """Write the rules as JSON, for ``from_json``."""
        rules: list[dict[str, Any]] = []
        for rule in self.rules:
            data: dict[str, Any] = {"sources": list(rule.sources), "targets": list(rule.targets)}
            if rule.operations:
                data["operations"] = [serial.to_plain(operation) for operation in rule.operations]
            rules.append(data | ({"tied": True} if rule.tied else {}))
        return json.dumps({"version": VERSION, "rules": rules, "notes": list(self.notes)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Rules:
        """Read rules from JSON.

        >>> rules = Rules((Rule(("^a",), ("b",)),))
        >>> Rules.from_json(rules.to_json()) == rules
        True

        Raises:
            InputError: The text is not JSON of rules, has another version, or a field is not of its type and range.
            PatternError: A pattern or a replacement is malformed.
        """
        try:
            data = serial.parsed(text)
            version = serial.integer(data["version"])
            if version != VERSION:
                raise InputError(
                    f"These rules have version {version}; this autoalign reads {VERSION}. Nothing was read."
                )
            return cls(tuple(map(_rule_from_plain, serial.items(data["rules"]))), serial.texts(data["notes"]))
        except InputError:
            raise
        except PatternError as error:
            raise PatternError(f"{error} Nothing was read.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            shown = str(error)[:_SHOWN_TEXT]
            raise InputError(f"This is not JSON of autoalign's rules: {shown}. Nothing was read.") from error

    def to_key_mapping(self) -> dict[str, str]:
        """Export as the ``key_mapping`` of transformers' ``from_pretrained``, which ``align`` takes as ``rules`` too.

        It renames only: dropped tensors keep a name that the model does not have, or the one they have. Of the
        versions 5 it is for 5.6 and later: earlier ones rename each place where the text that a pattern matches occurs.

        Raises:
            RulesError: Some rules do more than rename; they are named.
        """
        from autoalign.exports.renaming import key_mapping

        return key_mapping(self.rules)

    def to_revise_keys(self) -> list[tuple[str, str]]:
        """Export as the ``revise_keys`` of mmengine: patterns and replacements, which ``re.sub`` applies one by one.

        Raises:
            RulesError: Some rules do more than rename; they are named.
        """
        from autoalign.exports.renaming import revise_keys

        return revise_keys(self.rules)

    def to_transformers(self) -> list[WeightRenaming | WeightConverter]:
        """Export as ``WeightRenaming`` and ``WeightConverter`` objects of transformers 5.6 and later.

        Raises:
            RulesError: Some rules are more than those can say; they are named.
            DependencyError: transformers 5.6 or later is not installed.
        """
        from autoalign.exports.transformers import conversions

        return conversions(self.rules)

    def to_python(self, name: str = "checkpoint_filter_fn") -> str:
        """Export as the source of a function ``name(state_dict, model)``, which needs torch and not this package.

        Raises:
            RulesError: Some rules hold operations that have no short form in Python; they are named.
            InputError: The name is no identifier.
        """
        from autoalign.exports.python import source_of

        return source_of(self.rules, name)

    def __str__(self) -> str:
        sides = [rule.sides for rule in self.rules]
        width = min(max((len(first) for first, _ in sides), default=0), _WIDTH)
        return "\n".join([*(f"{first:<{width}} -> {rest}" for first, rest in sides), *self.notes])


@dataclass(frozen=True, slots=True)
class _Instance:
    """The keys that one rule takes together."""

    captured: tuple[str | None, ...]
    rest: str  # of the keys, beyond the patterns
    keys: list[dict[int, str]]  # for each pattern the keys by their places in a list; -1 outside of lists


def _made(rule: Rule, instance: _Instance, shapes: Mapping[str, Shape]) -> list[Match]:
    lacking = [source for source, keys in zip(rule.sources, instance.keys, strict=True) if not keys]
    if lacking:
        raise InputError(f"there is no {', '.join(lacking)} beside it")
    members = sorted(instance.keys[0])
    if any(sorted(keys) != members for keys in instance.keys) or members not in ([-1], list(range(len(members)))):
        raise InputError("the members of a list are not complete")
    sources = tuple(keys[member] for member in members for keys in instance.keys)
    result = []
    for target, operation in rule.fills:
        picked = sources
        first, *rest = steps_of(operation) or (operation,)
        if isinstance(first, Pick):
            picked, operation = tuple(sources[p] for p in first.places), chain(*rest)
        own = [shapes[key] for key in picked]
        count = slice_count(operation, own)
        for index in [None] if count is None else range(count):
            sliced = operation if index is None else at(operation, index)
            name = expand(target, instance.captured, index) + instance.rest
            result.append(Match(name, picked, _tried(exact(sliced, own), tuple(own))))
    return result


@lru_cache(maxsize=4096)
def _tried(operation: Operation, shapes: tuple[Shape, ...]) -> Operation:
    """Give an operation back if it takes tensors of these shapes and makes one of them; else torch says why not."""
    if not _changes(operation) and len(shapes) == 1:
        return operation
    if _zeros(operation) > _MOST_ZEROS * sum(map(prod, shapes)):
        raise InputError(f"'{operation}' makes many times more zeros than there are elements")
    if not operation.adapts and len(output_shapes(operation, shapes)) != 1:
        raise InputError(f"'{operation}' does not make one tensor of {len(shapes)}")
    return operation


def _zeros(operation: Operation) -> int:
    """Count the elements that an operation makes of nothing."""
    own = prod(operation.shape) if isinstance(operation, InsertZeros) else 0
    return own + sum(map(_zeros, operation.parts))


def equal_parts(operations: Sequence[Operation]) -> Portion | None:
    """Give the first of operations that take all equal parts of a tensor, in order; else None."""
    first = operations[0]
    if not isinstance(first, Portion):
        return None
    parts = [Portion(first.dim, place, 1, len(operations)) for place in range(len(operations))]
    return first if list(operations) == parts else None


def _braced(texts: Sequence[str]) -> str:
    """Write several texts as one, with what differs in braces.

    >>> _braced(["a.q.w", "a.k.w"])
    'a.{q, k}.w'
    """
    if len(texts) < 2:
        return "".join(texts)
    start = _shared(texts)
    end = min(_shared([text[::-1] for text in texts]), min(map(len, texts)) - start)
    middles = [text[start : len(text) - end] for text in texts]
    return f"{texts[0][:start]}{{{', '.join(middles)}}}{texts[0][len(texts[0]) - end :]}"


def _shared(texts: Sequence[str]) -> int:
    """Count the characters with which all texts begin."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))


def _changes(operation: Operation) -> bool:
    return not isinstance(operation, Copy)


def _check(rule: Rule) -> None:
    named = f"The rule {rule.sources!r} -> {rule.targets!r}"[:_SHOWN_TEXT]
    if not all(isinstance(part, tuple) for part in (rule.sources, rule.targets, rule.operations)) or not all(
        isinstance(pattern, str) for pattern in (*rule.sources, *rule.targets)
    ):
        raise PatternError(f"{named} must have tuples of patterns, of replacements and of operations.")
    if not rule.sources or (rule.operations and len(rule.operations) != len(rule.targets)):
        raise PatternError(f"{named} needs a pattern, and as many operations as targets or none.")
    for operation in rule.operations:
        try:
            serial.check_operation(operation)
        except TypeError as error:
            raise PatternError(f"{named} has an operation that is malformed: {error}.") from error
    groups = set()
    for source in rule.sources:
        pattern = compiled(source)
        if set(pattern.groupindex) - {SLICE} or _REFERENCE.search(source.replace(r"\\", "")):
            raise PatternError(
                f"{source!r} has named groups, references or flags, which the patterns of rules cannot have."
            )
        groups.add(pattern.groups)
    for target in rule.targets:
        used = {
            group
            for token in tokens_of(target)
            for group in ((token,) if isinstance(token, int) else token.groups if isinstance(token, Arithmetic) else ())
        }
        if len(groups) > 1 or max(used, default=0) > max(groups):
            raise PatternError(f"The replacement {target!r} refers to what {', '.join(rule.sources)} does not capture.")


def _rule_from_plain(data: Mapping[str, Any]) -> Rule:
    tied = data.get("tied", False)
    if not isinstance(tied, bool):
        raise TypeError("tied is neither true nor false")
    operations = tuple(map(serial.from_plain, serial.items(data.get("operations", []))))
    return Rule(serial.texts(data["sources"]), serial.texts(data["targets"]), operations, tied=tied)
