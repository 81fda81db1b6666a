"""Rules as the objects by which transformers 5 converts checkpoints while it loads them.

There, renamings come first and may know one capture; then one ``WeightConverter`` at most takes a key, by a text that
occurs in it. So a rule with an operation becomes both: renamings give its tensors the target's name with a placeholder
in the place of its last words, and a converter joins or splits what has the placeholder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from autoalign.errors import DependencyError, RulesError
from autoalign.plan.operations import Concatenate, Grouped, Operation, Permute, Split, Stack, Transpose, steps_of
from autoalign.rules.export_renamings import CannotSayError, Step, in_order, one_by_one
from autoalign.rules.rule import Rule, equal_parts, literal, tokens_of
from autoalign.rules.size_free import Sized

if TYPE_CHECKING:
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

_LIST = r"(?P<n>\d+)"
_HINT = "Nothing was exported. Install it with: pip install 'transformers>=5.6'"


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
            f"transformers {transformers.__version__} renames each place where the text that a pattern matches occurs, "
            f"not the first. {_HINT}"
        )
    steps: list[Step] = []
    converters: list[WeightConverter] = []
    refused: list[str] = []
    for number, rule in enumerate(rules):
        try:
            if rule.has_arithmetic:
                raise CannotSayError("numbers in names are computed")
            if rule.renames:
                own = [Step.of(rule)]
            else:
                own, converter = _converted(rule, number)
                converters.append(converter)
            for step in own:
                one_by_one(step, "")  # which tells whether it can be said
            steps += own
        except CannotSayError as error:
            refused.append(f"  {rule}  ({error})")
    if refused:
        raise RulesError(
            f"{len(refused)} of {len(rules)} rules are more than transformers' conversions can say. Nothing was "
            "exported. Use to_python, or apply.\n" + "\n".join(refused)
        )
    renamings = [WeightRenaming(*renaming) for renaming in in_order(steps, one_by_one)]
    return [*renamings, *converters]


def _converted(rule: Rule, number: int) -> tuple[list[Step], WeightConverter]:
    """Write a rule with an operation: renamings to placeholders, and what converts those."""
    from transformers.core_model_loading import WeightConverter

    fronts, words = zip(*map(_parted, rule.targets), strict=True)
    if len(set(fronts)) > 1 or not all(words) or len(set(words)) < len(words):
        raise CannotSayError("its targets differ in more than their last words")
    placeholders = [f"~{number}_{place}~" for place in range(len(rule.sources))]
    steps = [
        Step(source.replace(_LIST, r"\d+"), fronts[0] + placeholder)
        for source, placeholder in zip(rule.sources, placeholders, strict=True)
    ]
    return steps, WeightConverter(placeholders, list(words), operations=list(_operations(rule)))


def _parted(target: str) -> tuple[str, str]:
    """Part a replacement after its last reference, or after its first word if it has none."""
    tokens = tokens_of(target)
    if isinstance(tokens[-1], str) and len(tokens) > 1:
        words = tokens[-1]
        return target[: len(target) - len(literal(words))], words
    return ("", str(tokens[0])) if isinstance(tokens[0], str) else (target, "")


def _operations(rule: Rule) -> Iterator[ConversionOps]:
    """Write the operations of a rule as transformers'."""
    from transformers import core_model_loading as theirs

    operations = [operation for _, operation in rule.fills]
    if len(rule.sources) > 1 or _LIST in rule.sources[0]:
        if len(operations) > 1:
            raise CannotSayError("several tensors make several")
        yield from _joining(steps_of(operations[0]), _LIST in rule.sources[0], len(rule.sources))
        return
    if len(operations) == 1:
        for step in steps_of(operations[0]):
            yield theirs.Transpose(*_turn(step))
        return
    steps = [steps_of(operation) for operation in operations]
    shared = steps[0][:-1]
    if any(own[:-1] != shared for own in steps):
        raise CannotSayError("its parts are laid out in different ways")
    for step in shared:
        yield theirs.Transpose(*_turn(step))
    last = [own[-1] for own in steps]
    if parts := equal_parts(last):
        yield theirs.Chunk(parts.dim)
        return
    dim = _uneven(last)
    if not hasattr(theirs, "Split"):
        raise CannotSayError("its parts differ in size, which transformers splits from version 5.20 on")
    yield theirs.Split(dim)


def _joining(steps: Sequence[Operation], listed: bool, count: int) -> Iterator[ConversionOps]:
    """Write what joins tensors; transformers takes those of one pattern after another, and a list's as a stack."""
    from transformers import core_model_loading as theirs

    match list(steps):
        case [Concatenate(dim)] if not listed or count == 1:
            yield theirs.Concatenate(dim)
        case [Transpose(), Concatenate(dim)] if not listed:  # the other way around, since a turn takes one tensor
            yield theirs.Concatenate(1 - dim)
            yield theirs.Transpose(0, 1)
        case [Concatenate(dim), *turns] if not listed:
            yield theirs.Concatenate(dim)
            for step in turns:
                yield theirs.Transpose(*_turn(step))
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
            raise CannotSayError("what joins its tensors has no counterpart")


def _turn(step: Operation) -> tuple[int, int]:
    """Give the two dimensions that a step exchanges."""
    if isinstance(step, Transpose):
        return 0, 1
    if isinstance(step, Permute):
        moved = [place for place, dim in enumerate(step.dims) if place != dim]
        if len(moved) == 2:
            return moved[0], moved[1]
    raise CannotSayError(f"'{step}' has no counterpart")


def _uneven(operations: Sequence[Operation]) -> int:
    """Give the dimension that is split into parts, one after another, of the sizes that the model has."""
    end = 0
    dims = set()
    for operation in operations:
        if not isinstance(operation, Sized) or not isinstance(operation.operation, Split):
            raise CannotSayError(f"'{operation}' has no counterpart")
        split = operation.operation
        dims.add(split.dim)
        if split.start != end or len(dims) > 1:
            raise CannotSayError("its parts do not follow one another")
        end += split.length
        size = operation.shapes[0][split.dim]
    if end != size:
        raise CannotSayError("its parts are not all of a tensor")
    return dims.pop()
