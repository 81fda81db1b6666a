r"""Rules as lists of regex renamings, which others apply one after another to every key.

A rule here takes a key once; in those lists, every pattern that occurs in what a key has become is replaced. Where a
new name might be taken by a later pattern, it begins with a mark until the end, which no pattern begins with. What is
dropped has no renaming: later patterns pass it by.

mmengine's ``revise_keys`` are applied by ``re.sub``. transformers' ``key_mapping`` makes a ``WeightRenaming`` of each
item, which knows ``\1`` only: a rule with more captures becomes a renaming for each text that changes, and the key
begins with another mark meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from math import prod

from autoalign.errors import RulesError
from autoalign.rules.rule import Rule, tokens_of

Renaming = tuple[str, str]  # pattern, replacement
DONE, PENDING = "=", "~"  # marks; regexes take both literally
_GROUP = re.compile(r"(?<!\\)\((?!\?)((?:[^()\\]|\\.)*)\)")  # a capture without groups in it
_MOST = 64  # ways in which the words of a pattern may be chosen, before it is taken to match anything
_SPECIAL = re.compile(r"(?<!\\)[()\[{.*+?|$^]|\\[A-Za-z0-9]")


class CannotSayError(Exception):
    """A renaming is more than a form can say."""


@dataclass(frozen=True, slots=True)
class Step:
    """One rule on its way to renamings."""

    source: str  # pattern
    target: str | None  # replacement; None: the tensor is dropped

    @classmethod
    def of(cls, rule: Rule) -> Step:
        """Take a rule that does no more than rename or drop."""
        return cls(rule.sources[0], rule.targets[0] if rule.targets else None)


def revise_keys(rules: Sequence[Rule]) -> list[Renaming]:
    """Write rules as renamings that ``re.sub`` applies in order; see ``Rules.to_revise_keys``."""
    return in_order(steps_for(rules, "revise_keys"), at_once)


def key_mapping(rules: Sequence[Rule]) -> dict[str, str]:
    """Write rules as renamings of transformers; see ``Rules.to_key_mapping``."""
    steps = steps_for(rules, "key_mapping")
    try:
        return dict(in_order(steps, one_by_one))
    except CannotSayError as error:
        raise RulesError(f"{error}, which key_mapping cannot say. Nothing was exported. Use to_python.") from None


def steps_for(rules: Sequence[Rule], form: str) -> list[Step]:
    """List the steps of rules that do no more than rename.

    Raises:
        RulesError: Some do more; they are named.
    """
    refused = [rule for rule in rules if not rule.renames or rule.has_arithmetic]
    if refused:
        listed = "\n".join(f"  {rule}" for rule in refused)
        raise RulesError(
            f"{len(refused)} of {len(rules)} rules do more than rename, which {form} cannot say. Nothing was exported. "
            f"Use to_python, to_transformers, or apply.\n{listed}"
        )
    return list(map(Step.of, rules))


def in_order(steps: Sequence[Step], write: Callable[[Step, str], list[Renaming]]) -> list[Renaming]:
    """Write steps as renamings to be applied one after another, so that each key is taken by one step alone."""
    taken = [_taken(step.source) for step in steps]
    kept = [place for place, step in enumerate(steps) if step.target is not None]
    given = {place: _given(steps[place]) for place in kept}
    marked = [p for p in kept if any(later > p and _may_meet(given[p], taken[later]) for later in kept)]
    result: list[Renaming] = []
    for place in kept:
        passed = [
            _body(drop.source)
            for earlier, drop in enumerate(steps[:place])
            if drop.target is None and _may_meet(taken[earlier], taken[place])
        ]
        if "" in taken[place] and any(earlier < place for earlier in marked):
            passed.append(DONE)
        avoided = f"(?!{'|'.join(passed)})" if passed else ""
        source = f"^{avoided}{steps[place].source.removeprefix('^')}"
        result += write(Step(source, steps[place].target), DONE if place in marked else "")
    return [*result, (f"^{DONE}", "")] if marked else result


def at_once(step: Step, mark: str) -> list[Renaming]:
    """Write a step as one renaming for ``re.sub``."""
    parts = []
    for token in tokens_of(step.target or ""):
        number = token if isinstance(token, int) else 0 if isinstance(token, str) else token.groups[0]
        parts.append(f"\\g<{number}>" if number else str(token).replace("\\", r"\\"))
    return [(step.source, mark + re.sub(r"\\g<(\d)>(?!\d)", r"\\\1", "".join(parts)))]


def one_by_one(step: Step, mark: str) -> list[Renaming]:
    r"""Write a step as renamings with one capture each.

    >>> print(*one_by_one(Step(r"^layer(\d+)\.(\d+)\.bn\.", r"stages.\1.blocks.\2.norm."), ""), sep="\n")
    ('^layer(\\d+)\\.(?=\\d+\\.bn\\.)', '~stages.\\1.blocks.')
    ('^~(stages\\.\\d+\\.blocks\\.\\d+)\\.bn\\.', '\\1.norm.')
    >>> one_by_one(Step(r"^stages\.(\d+)\.blocks\.(\d+)\.", r"s.\1.blocks.\2."), "")
    [('^stages\\.(\\d+\\.blocks\\.\\d+)\\.', 's.\\1.')]
    """
    avoided, own, groups = _taken_apart(step.source)
    other = _texts_of(step.target or "", len(groups))
    if r"\1" in step.source or any(set(text) & set("()\\^") for text in other) or (groups and other[-1][:1].isdigit()):
        raise CannotSayError(f"The rule '{step.source} -> {step.target}' has a name with special characters")
    end = "$" if own[-1].endswith("$") else ""
    own[-1] = own[-1].removesuffix("$")
    if not groups:
        return [(f"^{avoided}{own[0]}{end}", mark + other[0])]
    last = len(groups)
    changed = [place for place in range(1, last) if own[place] != re.escape(other[place])]
    stops = [*changed, last]
    result: list[Renaming] = []
    start, done = 0, ""
    for stop in stops:
        kept = _joined(groups[start:stop], [re.escape(text) for text in other[start + 1 : stop]])
        rest = _joined(groups[stop:], own[stop + 1 :]) + end if stop < last else ""
        ahead = f"(?={rest})" if rest else ""
        sign, tail = (mark, own[stop] + end) if stop == last else (PENDING, own[stop])
        done += re.escape(other[start]) + kept
        if result:
            result.append((f"^{PENDING}({done}){tail}{ahead}", f"{sign}\\1{other[stop]}"))
        else:
            result.append((f"^{avoided}{own[0]}({kept}){tail}{ahead}", f"{sign}{other[0]}\\1{other[stop]}"))
        start = stop
    return result


def _joined(groups: Sequence[str], texts: Sequence[str]) -> str:
    """Write groups, none of which captures, with the texts between and after them."""
    parts = []
    for place, group in enumerate(groups):
        parts.append(f"(?:{group})" if "|" in group else group)
        parts.append(texts[place] if place < len(texts) else "")
    return "".join(parts)


def _taken_apart(source: str) -> tuple[str, list[str], list[str]]:
    """Take a pattern apart: what it passes by, the texts around its captures, and what those capture."""
    body = source.removeprefix("^")
    avoided = ""
    if body.startswith("(?!"):
        depth = 0
        for place, found in enumerate(re.finditer(r"(?<!\\)[()]", body)):
            depth += 1 if found[0] == "(" else -1
            if place and not depth:
                avoided, body = body[: found.end()], body[found.end() :]
                break
    parts = _GROUP.split(body)
    if any(re.search(r"(?<!\\)[()|]", text) for text in parts[0::2]):
        raise CannotSayError(f"The pattern {source!r} is not made of text and plain groups")
    return avoided, parts[0::2], parts[1::2]


def _texts_of(target: str, count: int) -> list[str]:
    """Take a replacement apart: the texts around its references, which must be to all captures in order."""
    texts, numbers = [""], []
    for token in tokens_of(target):
        if isinstance(token, str):
            texts[-1] += token
        else:
            numbers.append(token if isinstance(token, int) else token.groups[0])
            texts.append("")
    if numbers != list(range(1, count + 1)):
        raise CannotSayError(f"The replacement {target!r} does not take all that is captured in order")
    return texts


def _may_meet(first: Collection[str], second: Collection[str]) -> bool:
    """Tell whether some key may begin in both ways; a key that ends there ends with a line break."""
    return any(one.startswith(other) or other.startswith(one) for one in first for other in second)


def _taken(source: str) -> frozenset[str]:
    """List how the keys begin that a pattern takes, with # for any number; the empty text where that is too hard."""
    try:
        _, texts, groups = _taken_apart(source)
    except CannotSayError:
        return frozenset({""})
    texts = [*texts[:-1], texts[-1].removesuffix("$") + "\n"] if texts[-1].endswith("$") else texts
    plain = [re.sub(r"\\(.)", r"\1", text) for text in texts]
    return _filled(plain, groups) if not any(map(_SPECIAL.search, texts)) else frozenset({""})


def _given(step: Step) -> frozenset[str]:
    """List how the keys begin that a step makes."""
    try:
        _, texts, groups = _taken_apart(step.source)
        others = _texts_of(step.target or "", len(groups))
    except CannotSayError:
        return frozenset({""})
    return _filled([*others[:-1], others[-1] + ("\n" if texts[-1].endswith("$") else "")], groups)


def _filled(texts: Sequence[str], groups: Sequence[str]) -> frozenset[str]:
    choices = [["#"] if group == r"\d+" else group.split("|") for group in groups]
    if prod(map(len, choices)) > _MOST or any(
        _SPECIAL.search(word) for words in choices for word in words if word != "#"
    ):
        return frozenset({""})
    keys = ("".join(map("".join, zip_longest(texts, words, fillvalue=""))) for words in product(*choices))
    return frozenset(re.sub(r"\d+", "#", key) for key in keys)


def _body(source: str) -> str:
    return re.sub(r"(?<!\\)\((?!\?)", "(?:", source.removeprefix("^"))
