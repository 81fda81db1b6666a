r"""Rules in the forms by which other libraries convert checkpoints: regex renamings, and objects of transformers.

A rule takes a key once; in those lists, every pattern is applied to what the patterns before it have made of a key.
Where a new name might match a later pattern, it begins with a mark until the end, which no pattern begins with. What is
dropped has no renaming: later patterns exclude it.

mmengine's ``revise_keys`` are applied by ``re.sub``. transformers' ``key_mapping`` makes a ``WeightRenaming`` of each
item, which knows ``\1`` only: a rule with more captures becomes a renaming for each text that changes, and the key
begins with another mark meanwhile. transformers 5 also has ``WeightConverter``, of which at most one takes a key, after
all renamings and by a text that occurs in it. So a rule with an operation becomes both: renamings give its tensors the
target's name with a placeholder for its last words, and a converter joins or splits what has the placeholder. Weights
that are dequantised or combined are converted by ``conversion_ops.Apply``, which needs this package where they load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, product, zip_longest
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from autoalign.errors import DependencyError, RulesError
from autoalign.plan.dequantise import Dequantise, schemes_of
from autoalign.plan.operations import Concatenate, Grouped, Operation, Permute, Split, Stack, Transpose, steps_of
from autoalign.plan.parametrised import Combine
from autoalign.rules.rule import Rule, equal_parts, groups_of, literal, tokens_of
from autoalign.rules.size_free import Sized

if TYPE_CHECKING:
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

Renaming = tuple[str, str]  # pattern, replacement
_DONE, _PENDING = "=", "~"  # marks; regexes take both literally
_GROUP = re.compile(r"(?<!\\)\((?!\?)((?:[^()\\]|\\.)*)\)")  # a capture without groups in it
_SPECIAL = re.compile(r"(?<!\\)[()\[{.*+?|$^]|\\[A-Za-z0-9]")
_MAX_CHOICES = 64  # of the words of a pattern, before it is assumed to match anything
_LIST = r"(?P<n>\d+)"
_CASTABLE = frozenset(  # schemes whose codes and scales are numbers, not bits
    {"LLM.int8", *(f"{kind} {reach}" for kind in ("FP8", "INT8") for reach in ("by tensor", "by row", "in blocks"))}
)
_HINT = "Nothing was exported. Install it with: pip install 'transformers>=5.6'"


class _InexpressibleError(Exception):
    """A rule that a form cannot express."""


class _Step(NamedTuple):
    """One rule on its way to renamings."""

    source: str  # pattern
    target: str | None  # replacement; None: the tensor is dropped


def revise_keys(rules: Sequence[Rule]) -> list[Renaming]:
    """Write rules as renamings that ``re.sub`` applies in order; see ``Rules.to_revise_keys``."""
    return _in_order(_steps_for(rules, "revise_keys"), _at_once)


def key_mapping(rules: Sequence[Rule]) -> dict[str, str]:
    """Write rules as renamings of transformers; see ``Rules.to_key_mapping``."""
    steps = _steps_for(rules, "key_mapping")
    try:
        return dict(_in_order(steps, _one_by_one))
    except _InexpressibleError as error:
        raise RulesError(f"{error}, which key_mapping cannot express. Nothing was exported. Use to_python.") from None


def _steps_for(rules: Sequence[Rule], form: str) -> list[_Step]:
    """List the steps of rules that only rename, or raise a RulesError that names the others."""
    refused = [rule for rule in rules if not rule.renames or rule.has_arithmetic]
    if refused:
        listed = "\n".join(f"  {rule}" for rule in refused)
        raise RulesError(
            f"{len(refused)} of {len(rules)} rules do more than rename, which {form} cannot express. Nothing was "
            f"exported. Use to_python, to_transformers, or apply.\n{listed}"
        )
    return list(map(_step_of, rules))


def _step_of(rule: Rule) -> _Step:
    return _Step(rule.sources[0], rule.targets[0] if rule.targets else None)


def _in_order(steps: Sequence[_Step], write: Callable[[_Step, str], list[Renaming]]) -> list[Renaming]:
    """Write steps as renamings to be applied one after another, so that each key is taken by one step alone."""
    taken, given = zip(*map(_beginnings, steps), strict=True) if steps else ((), ())
    kept = [place for place, step in enumerate(steps) if step.target is not None]
    marked = [p for p in kept if any(later > p and _may_meet(given[p], taken[later]) for later in kept)]
    result: list[Renaming] = []
    for place in kept:
        passed = [
            re.sub(r"(?<!\\)\((?!\?)", "(?:", drop.source.removeprefix("^"))
            for earlier, drop in enumerate(steps[:place])
            if drop.target is None and _may_meet(taken[earlier], taken[place])
        ]
        if "" in taken[place] and any(earlier < place for earlier in marked):
            passed.append(_DONE)
        avoided = f"(?!{'|'.join(passed)})" if passed else ""
        source = f"^{avoided}{steps[place].source.removeprefix('^')}"
        result += write(_Step(source, steps[place].target), _DONE if place in marked else "")
    return [*result, (f"^{_DONE}", "")] if marked else result


def _at_once(step: _Step, mark: str) -> list[Renaming]:
    """Write a step as one renaming for ``re.sub``."""
    parts = []
    for token in tokens_of(step.target or ""):
        groups = groups_of(token)
        parts.append(f"\\g<{groups[0]}>" if groups else str(token).replace("\\", r"\\"))
    return [(step.source, mark + re.sub(r"\\g<(\d)>(?!\d)", r"\\\1", "".join(parts)))]


def _one_by_one(step: _Step, mark: str) -> list[Renaming]:
    r"""Write a step as renamings with one capture each.

    >>> print(*_one_by_one(_Step(r"^layer(\d+)\.(\d+)\.bn\.", r"stages.\1.blocks.\2.norm."), ""), sep="\n")
    ('^layer(\\d+)\\.(?=\\d+\\.bn\\.)', '~stages.\\1.blocks.')
    ('^~(stages\\.\\d+\\.blocks\\.\\d+)\\.bn\\.', '\\1.norm.')
    >>> _one_by_one(_Step(r"^stages\.(\d+)\.blocks\.(\d+)\.", r"s.\1.blocks.\2."), "")
    [('^stages\\.(\\d+\\.blocks\\.\\d+)\\.', 's.\\1.')]
    """
    avoided, own, groups = _taken_apart(step.source)
    other = _texts_of(step.target or "", len(groups))
    if r"\1" in step.source or any(set(text) & set("()\\^") for text in other) or (groups and other[-1][:1].isdigit()):
        raise _InexpressibleError(f"The rule '{step.source} -> {step.target}' has a name with special characters")
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
        kept = _uncaptured(groups[start:stop], [re.escape(text) for text in other[start + 1 : stop]])
        rest = _uncaptured(groups[stop:], own[stop + 1 :]) + end if stop < last else ""
        ahead = f"(?={rest})" if rest else ""
        sign, tail = (mark, own[stop] + end) if stop == last else (_PENDING, own[stop])
        done += re.escape(other[start]) + kept
        if result:
            result.append((f"^{_PENDING}({done}){tail}{ahead}", f"{sign}\\1{other[stop]}"))
        else:
            result.append((f"^{avoided}{own[0]}({kept}){tail}{ahead}", f"{sign}{other[0]}\\1{other[stop]}"))
        start = stop
    return result


def _uncaptured(groups: Sequence[str], texts: Sequence[str]) -> str:
    """Write groups, none of which captures, with the texts between and after them."""
    parts = []
    for place, group in enumerate(groups):
        parts.append(f"(?:{group})" if "|" in group else group)
        parts.append(texts[place] if place < len(texts) else "")
    return "".join(parts)


def _taken_apart(source: str) -> tuple[str, list[str], list[str]]:
    """Split a pattern: what it excludes, the texts around its captures, and the patterns of those."""
    body = source.removeprefix("^")
    avoided = ""
    if body.startswith("(?!"):
        brackets = list(re.finditer(r"(?<!\\)[()]", body))
        depths = accumulate(1 if found[0] == "(" else -1 for found in brackets)
        end = next((found.end() for found, depth in zip(brackets, depths, strict=True) if not depth), 0)
        avoided, body = body[:end], body[end:]
    parts = _GROUP.split(body)
    if any(re.search(r"(?<!\\)[()|]", text) for text in parts[0::2]):
        raise _InexpressibleError(f"The pattern {source!r} is not made of text and plain groups")
    return avoided, parts[0::2], parts[1::2]


def _texts_of(target: str, count: int) -> list[str]:
    """Split a replacement into the texts around its references, which must be to all captures in order."""
    texts, numbers = [""], []
    for token in tokens_of(target):
        if isinstance(token, str):
            texts[-1] += token
        else:
            numbers.append(groups_of(token)[0])
            texts.append("")
    if numbers != list(range(1, count + 1)):
        raise _InexpressibleError(f"The replacement {target!r} does not refer to all captures in order")
    return texts


def _may_meet(first: Collection[str], second: Collection[str]) -> bool:
    """True if some key may begin in both ways; a key that ends there ends with a line break."""
    return any(one.startswith(other) or other.startswith(one) for one in first for other in second)


def _beginnings(step: _Step) -> tuple[frozenset[str], frozenset[str]]:
    """List how the keys begin that a step takes, and those that it makes: # for numbers, empty where that is open."""
    taken = given = frozenset({""})
    with suppress(_InexpressibleError):
        _, texts, groups = _taken_apart(step.source)
        end = "\n" if texts[-1].endswith("$") else ""
        texts[-1] = texts[-1].removesuffix("$") + end
        if not any(map(_SPECIAL.search, texts)):
            taken = _filled([re.sub(r"\\(.)", r"\1", text) for text in texts], groups)
        others = _texts_of(step.target or "", len(groups))
        given = _filled([*others[:-1], others[-1] + end], groups)
    return taken, given


def _filled(texts: Sequence[str], groups: Sequence[str]) -> frozenset[str]:
    choices = [["#"] if group == r"\d+" else group.split("|") for group in groups]
    if prod(map(len, choices)) > _MAX_CHOICES or any(
        _SPECIAL.search(word) for words in choices for word in words if word != "#"
    ):
        return frozenset({""})
    keys = ("".join(map("".join, zip_longest(texts, words, fillvalue=""))) for words in product(*choices))
    return frozenset(re.sub(r"\d+", "#", key) for key in keys)


def conversions(rules: Sequence[Rule]) -> list[WeightRenaming | WeightConverter]:
    """Write rules as objects of transformers; see ``Rules.to_transformers``."""
    try:
        import transformers
        from transformers.core_model_loading import WeightRenaming
    except ImportError as error:
        raise DependencyError(
            "WeightRenaming and WeightConverter are transformers' own, from version 5 on, which is not installed. "
            + _HINT
        ) from error
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 6):
        raise DependencyError(
            f"transformers {transformers.__version__} renames every occurrence of the text that a pattern matches, "
            f"not only the first. {_HINT}"
        )
    steps: list[_Step] = []
    converters: list[WeightConverter] = []
    refused: list[str] = []
    for number, rule in enumerate(rules):
        try:
            if rule.has_arithmetic:
                raise _InexpressibleError("numbers in names are computed")
            if rule.renames:
                own = [_step_of(rule)]
            else:
                own, converter = _converted(rule, number)
                converters.append(converter)
            for step in own:
                _one_by_one(step, "")  # raises an error unless it can be expressed
            steps += own
        except _InexpressibleError as error:
            refused.append(f"  {rule}  ({error})")
    if refused:
        raise RulesError(
            f"{len(refused)} of {len(rules)} rules cannot be expressed as transformers' conversions. Nothing was "
            "exported. Use to_python, or apply.\n" + "\n".join(refused)
        )
    # an end by itself would become a part of the name where transformers reverses a renaming to save a model
    ends = re.compile(r"(?<!\\)\$$")
    renamings = [WeightRenaming(ends.sub("(?=$)", first), second) for first, second in _in_order(steps, _one_by_one)]
    return [*renamings, *converters]


def _converted(rule: Rule, number: int) -> tuple[list[_Step], WeightConverter]:
    """Write a rule with an operation: renamings to placeholders, and what converts those."""
    from transformers.core_model_loading import WeightConverter

    fronts, words = zip(*map(_parted, rule.targets), strict=True)
    if len(set(fronts)) > 1 or not all(words) or len(set(words)) < len(words):
        raise _InexpressibleError("its targets differ in more than their last words")
    placeholders = [f"~{number}_{place}~" for place in range(len(rule.sources))]
    steps = [
        _Step(source.replace(_LIST, r"\d+"), fronts[0] + placeholder)
        for source, placeholder in zip(rule.sources, placeholders, strict=True)
    ]
    return steps, WeightConverter(placeholders, list(words), operations=list(_operations(rule)))


def _parted(target: str) -> tuple[str, str]:
    """Split a replacement after its last reference, or after its first word if it has none."""
    tokens = tokens_of(target)
    if isinstance(tokens[-1], str) and len(tokens) > 1:
        words = tokens[-1]
        return target[: len(target) - len(literal(words))], words
    return ("", str(tokens[0])) if isinstance(tokens[0], str) else (target, "")


def _operations(rule: Rule) -> Iterator[ConversionOps]:
    """Write the operations of a rule as transformers'."""
    from transformers import core_model_loading as theirs

    operations = [operation for _, operation in rule.fills]
    if any(map(_computes, operations)):
        yield _applied(rule)
        return
    if len(rule.sources) > 1 or _LIST in rule.sources[0]:
        if len(operations) > 1:
            raise _InexpressibleError("several tensors make several")
        yield from _joining(steps_of(operations[0]), _LIST in rule.sources[0], len(rule.sources))
        return
    if len(operations) == 1:
        yield from (theirs.Transpose(*_turn(step)) for step in steps_of(operations[0]))
        return
    steps = [steps_of(operation) for operation in operations]
    shared = steps[0][:-1]
    if any(own[:-1] != shared for own in steps):
        raise _InexpressibleError("its parts are laid out in different ways")
    yield from (theirs.Transpose(*_turn(step)) for step in shared)
    last = [own[-1] for own in steps]
    if parts := equal_parts(last):
        yield theirs.Chunk(parts.dim)
        return
    dim = _uneven(last)
    if not hasattr(theirs, "Split"):
        raise _InexpressibleError("its parts differ in size, which transformers splits from version 5.20 on")
    yield theirs.Split(dim)


def _computes(operation: Operation) -> bool:
    """True if an operation does more than to move values."""
    return isinstance(operation, Dequantise | Combine) or any(map(_computes, operation.parts))


def _applied(rule: Rule) -> ConversionOps:
    """Write operations that transformers has none for, on tensors that it has cast to the model's dtype."""
    from transformers.core_model_loading import ConversionOps

    from autoalign.rules.conversion_ops import Apply

    operations = [operation for _, operation in rule.fills]
    if lost := sorted(frozenset().union(*map(schemes_of, operations)) - _CASTABLE):
        raise _InexpressibleError(f"transformers casts what it loads to the model's dtype, which spoils {lost[0]}")
    if any(_LIST in source for source in rule.sources):
        raise _InexpressibleError("a list of quantised or parametrised tensors is joined")
    if len(operations) > 1 and not hasattr(ConversionOps, "supports_many_to_many"):
        raise _InexpressibleError("several tensors make several, which this version of transformers cannot")
    return Apply(operations)


def _joining(steps: Sequence[Operation], listed: bool, count: int) -> Iterator[ConversionOps]:
    """Write the operations that join tensors; transformers stacks those of a list, and orders others by pattern."""
    from transformers import core_model_loading as theirs

    match list(steps):
        case [Transpose(), Concatenate(dim)] if not listed:  # the other way around, since a turn takes one tensor
            yield theirs.Concatenate(1 - dim)
            yield theirs.Transpose(0, 1)
        case [Concatenate(dim), *turns] if not listed or (count == 1 and not turns):
            yield theirs.Concatenate(dim)
            yield from (theirs.Transpose(*_turn(step)) for step in turns)
        case [Stack(dim)] if listed and count == 1:
            yield theirs.MergeModulelist(dim)
        case [Transpose(), Stack(0)] if listed and count == 1:
            yield theirs.MergeModulelist(0)
            yield theirs.Transpose(1, 2)
        case [Grouped(size, Concatenate(dim)), Stack(along)] if listed and size == count:
            yield theirs.MergeModulelist(along)
            yield theirs.Concatenate(dim + (dim >= along))
        case [Transpose(), Grouped(size, Concatenate(dim)), Stack(0)] if listed and size == count:
            yield theirs.MergeModulelist(0)
            yield theirs.Concatenate(2 - dim)
            yield theirs.Transpose(1, 2)
        case _:
            raise _InexpressibleError("what joins its tensors has no counterpart")


def _turn(step: Operation) -> tuple[int, int]:
    """Return the two dimensions that a step exchanges."""
    if isinstance(step, Transpose):
        return 0, 1
    if isinstance(step, Permute):
        moved = [place for place, dim in enumerate(step.dims) if place != dim]
        if len(moved) == 2:
            return moved[0], moved[1]
    raise _InexpressibleError(f"'{step}' has no counterpart")


def _uneven(operations: Sequence[Operation]) -> int:
    """Return the dimension that is split into consecutive parts of the model's sizes."""
    end, dims = 0, set()
    for operation in operations:
        if not isinstance(operation, Sized) or not isinstance(operation.operation, Split):
            raise _InexpressibleError(f"'{operation}' has no counterpart")
        split = operation.operation
        dims.add(split.dim)
        if split.start != end or len(dims) > 1:
            raise _InexpressibleError("its parts do not follow one another")
        end += split.length
        size = operation.shapes[0][split.dim]
    if end != size:
        raise _InexpressibleError("its parts are not all of a tensor")
    return dims.pop()
