"""Rules: an ordered list of regex renamings and operations that converts a state dict without matching.

The first rule whose pattern matches the beginning of a key takes the key, once; what follows the pattern in a key is
kept at the end of the new one. A key that no rule takes keeps its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

from autoalign.errors import InputError, PatternError, RulesError
from autoalign.plan.dequantise import is_dequantised
from autoalign.plan.keys import TimeLimit, compiled
from autoalign.plan.matches import Match
from autoalign.plan.operations import Copy, Shape
from autoalign.plan.quantised import ADVICE, groups_of
from autoalign.plan.serialization import integer, items, parsed, texts
from autoalign.plan.specs import specs_of
from autoalign.rules.rule import (
    SLICE,
    KeyGroup,
    Rule,
    check_rule,
    matches_of,
    number_of,
    rule_from_plain,
    rule_to_plain,
)

if TYPE_CHECKING:
    import regex
    from transformers.core_model_loading import WeightConverter, WeightRenaming

VERSION = 1
_MAX_PROBLEMS = 5  # that an error lists
_MAX_SHOWN = 200  # characters of what is not JSON of rules
_MAX_WIDTH = 70  # of the patterns' column, before it is given up
_SECONDS_PER_PATTERN = 0.1  # to find the one that takes long
_UNDONE = "Nothing was converted."


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
            check_rule(rule)

    def __len__(self) -> int:
        return len(self.rules)

    @cached_property
    def _patterns(self) -> dict[int, tuple[Rule, int, regex.Pattern[str]]]:
        """Each pattern with its rule and place there, by the number of the group after it in ``_any``."""
        found, group = {}, 0
        for rule in self.rules:
            for place, source in enumerate(rule.sources):
                pattern = compiled(source)
                group += pattern.groups + 1
                found[group] = rule, place, pattern
        return found

    @cached_property
    def _any(self) -> regex.Pattern[str]:
        """All patterns as one: the last group of a match identifies the pattern that matched."""
        sources = (source for rule in self.rules for source in rule.sources)
        return compiled("|".join(f"(?:{source.replace(f'(?P<{SLICE}>', '(')})()" for source in sources))

    def _taken(self, key: str, limit: TimeLimit) -> tuple[Rule, int, regex.Pattern[str]] | None:
        """Find the pattern that takes a key."""
        if not self.rules:
            return None
        try:
            match = limit.match(self._any, key)
        except PatternError:
            for _, _, pattern in self._patterns.values():
                TimeLimit(0, _UNDONE, seconds=_SECONDS_PER_PATTERN).match(pattern, key)  # names the one that takes long
            raise
        return None if match is None else self._patterns[match.lastindex or 0]

    def rule_of(self, key: str) -> Rule | None:
        r"""Find the rule that takes a key; None for a key that keeps its name.

        >>> print(Rules((Rule((r"^old\.",), ("new.",)),)).rule_of("old.weight"))
        ^old\. -> new.
        """
        if not isinstance(key, str):
            raise InputError(f"Expected a key, not {type(key).__name__}.")
        taken = self._taken(key, TimeLimit(1, _UNDONE))
        return None if taken is None else taken[0]

    def plan(self, shapes: Mapping[str, Shape]) -> list[Match]:
        r"""Compute what becomes of tensors of the given shapes.

        >>> from autoalign.plan.operations import Concatenate
        >>> rules = Rules((Rule((r"^q\.", r"^k\."), ("qk.",), (Concatenate(0),)),))
        >>> [(match.target, match.sources, str(match.operation)) for match in rules.plan({"q.b": (2,), "k.b": (2,)})]
        [('qk.b', ('q.b', 'k.b'), 'concatenate(dim 0)')]

        Returns:
            A match for each resulting tensor, whose operation has absolute sizes.

        Raises:
            RulesError: The rules do not hold here: a part is missing, a size does not fit, two tensors get one name.
        """
        if not isinstance(shapes, Mapping) or not all(isinstance(key, str) for key in shapes):
            raise InputError(f"Expected a mapping of keys to shapes, not {type(shapes).__name__}. {_UNDONE}")
        matches, problems = self.attempt(shapes)
        if problems:
            lines = list(dict.fromkeys(problems.values()))
            more = [f"... and {len(lines) - _MAX_PROBLEMS} more"] if len(lines) > _MAX_PROBLEMS else []
            listed = "\n  ".join([*lines[:_MAX_PROBLEMS], *more])
            raise RulesError(f"The rules do not hold for this state dict. Nothing was converted.\n  {listed}")
        return matches

    def attempt(self, shapes: Mapping[str, Shape]) -> tuple[list[Match], dict[str, str]]:
        """Do as ``plan`` does, but return the problems by key instead of raising."""
        groups: dict[tuple[int, tuple[str | None, ...], str], KeyGroup] = {}
        planned: list[Match | tuple[Rule, KeyGroup]] = []
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
                slot = pattern.groupindex[SLICE] - 1
                try:
                    member = number_of(captured[slot] or "")
                except InputError as error:
                    problems[key] = f"{key}: {error} ({rule})"
                    continue
                captured[slot] = None
            identity = id(rule), tuple(captured), key[match.end() :]
            if identity not in groups:
                groups[identity] = KeyGroup(*identity[1:], [{} for _ in rule.sources])
                planned.append((rule, groups[identity]))
            groups[identity].keys[place][member] = key
        matches: dict[str, Match] = {}
        for item in planned:
            if isinstance(item, Match):
                made = [item]
            else:
                rule, group = item
                try:
                    made = matches_of(rule, group, shapes)
                except (InputError, IndexError, RuntimeError, ValueError) as error:  # torch's, about a wrong rank
                    keys = [key for of in group.keys for key in of.values()]
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
            coded = [codes[key] for key in match.sources if key in codes]
            if is_dequantised(match.operation) and not coded:
                raise RulesError(
                    f"{', '.join(match.sources)} are not quantised, which '{match.operation}' is for. Nothing was "
                    "converted. Align this pair itself."
                )
            if coded and match.operation != Copy() and not is_dequantised(match.operation):
                raise RulesError(
                    f"{coded[0].spec} is quantised as {coded[0].group.scheme}: its elements are codes, not values, and "
                    f"{match.operation} would mix them up. Nothing was converted. {ADVICE}"
                )
            tensors = [state_dict[key] for key in match.sources]
            try:
                (result[match.target],) = match.operation.apply(tensors)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:  # torch's, about dtypes and devices
                made = f"{match.target} = {match.operation} of {', '.join(match.sources)}"
                raise RulesError(
                    f"The rules do not hold for this state dict. Nothing was converted.\n  {made}: {error}"
                ) from error
        return result

    def to_json(self) -> str:
        """Write the rules as JSON, for ``from_json``."""
        return json.dumps(
            {"version": VERSION, "rules": list(map(rule_to_plain, self.rules)), "notes": list(self.notes)}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> Rules:
        """Read rules from JSON.

        >>> rules = Rules((Rule(("^a",), ("b",)),))
        >>> Rules.from_json(rules.to_json()) == rules
        True

        Raises:
            InputError: The text is not JSON of rules, has another version, or a field has a wrong type or range.
            PatternError: A pattern or a replacement is malformed.
        """
        try:
            data = parsed(text)
            version = integer(data["version"])
            if version != VERSION:
                raise InputError(
                    f"These rules have version {version}; this autoalign reads {VERSION}. Nothing was read."
                )
            return cls(tuple(map(rule_from_plain, items(data["rules"]))), texts(data["notes"]))
        except InputError:
            raise
        except PatternError as error:
            raise PatternError(f"{error} Nothing was read.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            shown = str(error)[:_MAX_SHOWN]
            raise InputError(f"This is not JSON of autoalign's rules: {shown}. Nothing was read.") from error

    def to_key_mapping(self) -> dict[str, str]:
        """Export as the ``key_mapping`` of transformers' ``from_pretrained``; ``align`` accepts it as ``rules``.

        It only renames: dropped tensors keep their names, or get one that the model does not have. Of the versions 5 it
        is for 5.6 and later: earlier ones rename every occurrence of the text that a pattern matches.

        Raises:
            RulesError: Some rules do more than rename; they are named.
        """
        from autoalign.rules.export_renamings import key_mapping

        return key_mapping(self.rules)

    def to_revise_keys(self) -> list[tuple[str, str]]:
        """Export as the ``revise_keys`` of mmengine: patterns and replacements, which ``re.sub`` applies one by one.

        Raises:
            RulesError: Some rules do more than rename; they are named.
        """
        from autoalign.rules.export_renamings import revise_keys

        return revise_keys(self.rules)

    def to_transformers(self) -> list[WeightRenaming | WeightConverter]:
        """Export as ``WeightRenaming`` and ``WeightConverter`` objects of transformers 5.6 and later.

        Weights are dequantised from codes and scales as transformers gives them, in the model's dtype: those of FP8 and
        int8. What packs several codes in a number would be spoiled and is refused.

        Raises:
            RulesError: Some rules cannot be expressed so; they are named.
            DependencyError: transformers 5.6 or later is not installed.
        """
        from autoalign.rules.export_renamings import conversions

        return conversions(self.rules)

    def to_python(self, name: str = "checkpoint_filter_fn") -> str:
        """Export as the source of a function ``name(state_dict, model)``, which needs torch and not this package.

        Raises:
            RulesError: Some rules hold operations that have no short form in Python; they are named.
            InputError: The name is not an identifier.
        """
        from autoalign.rules.export_python import source_of

        return source_of(self.rules, name)

    def __str__(self) -> str:
        sides = [rule.sides for rule in self.rules]
        width = min(max((len(first) for first, _ in sides), default=0), _MAX_WIDTH)
        lines = [f"{first:<{width}} -> {rest}" for first, rest in sides] or ["No rules: every key stays as it is."]
        return "\n".join([*lines, *self.notes])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'><code>{escape(first)}</code></td>"
            f"<td style='text-align:left'><code>→ {escape(rest)}</code></td></tr>"
            for first, rest in (rule.sides for rule in self.rules)
        )
        notes = "".join(f"<div>{escape(note)}</div>" for note in self.notes)
        count = f"{len(self.rules):,} rule{'s' if len(self.rules) != 1 else ''}"
        return f"<div><strong>{count}</strong><table><tbody>{rows}</tbody></table>{notes}</div>"
