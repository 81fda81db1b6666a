"""Matches, the plan that they make up, which every stage takes and returns, and the plan's inverse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import floor
from typing import Any, Literal, Self, TypeVar

from torch import Tensor

from autoalign.errors import InputError, NotInvertibleError
from autoalign.plan.adaptations import needs_target
from autoalign.plan.keys import components
from autoalign.plan.operations import Copy, Operation, Shape, chain, in_parallel
from autoalign.plan.quantised import Members, describe_schemes, groups_of
from autoalign.plan.regions import joined, place_of
from autoalign.plan.specs import TensorSpec, tied_groups

Status = Literal["matched", "adapted", "ambiguous", "mismatched", "missing"]
_MAX_LISTED = 6  # modules whose tensors are not covered
FILLED: frozenset[Status] = frozenset({"matched", "adapted"})


class Caution(str):
    """A note on a choice that could have been another, of which ``load`` and ``convert`` also warn."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to fill a target tensor that was considered and not chosen."""

    sources: tuple[str, ...]
    operation: Operation
    score: float  # on the scale of the chosen match's evidence; comparable within one match only


@dataclass(frozen=True, slots=True)
class Match:
    """One target tensor with the source tensors that fill it."""

    target: str
    sources: tuple[str, ...]  # one key; several for a fused or stacked tensor, in the operation's order
    operation: Operation = field(default_factory=Copy)
    confidence: float = 1.0  # in [0, 1]
    evidence: Mapping[str, float] = field(default_factory=dict, hash=False)  # by cue, each in [0, 1]
    alternatives: tuple[Candidate, ...] = ()  # best first
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A target tensor and its counterpart in the source, whose shapes no operation reconciles."""

    key: str
    source_key: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key} {list(self.shape)}  nearest: {self.source_key} {list(self.source_shape)}"


@dataclass(frozen=True, slots=True)
class Verified:
    """What ``verify`` found of a plan."""

    equal: bool
    max_difference: float  # of the outputs, as in ``Verification``
    coverage: float = 0.0  # share of the tensors of which a change would have been noticed
    uncovered: tuple[str, ...] = ()  # the target's keys of the others

    def describe(self, keys: Iterable[str]) -> str:
        """Write it as a text, where ``keys`` are all those that are filled.

        >>> Verified(True, 0.0, 0.5, ("aux.weight", "aux.bias")).describe(["fc.weight", "aux.weight", "aux.bias"])
        'equal; 50.0 % of the tensors are covered; not covered: aux (2)'
        """
        if not self.coverage:
            return f"NOT equal; the outputs differ by {self.max_difference:.1e}"
        paths = [components(key) for key in {*keys} - {*self.uncovered}]
        shared = {path[:depth] for path in paths for depth in range(len(path))}
        names: Counter[str] = Counter()
        for path in map(components, self.uncovered):
            depths = range(1, len(path) + 1)
            names[".".join(next((path[:depth] for depth in depths if path[:depth] not in shared), path))] += 1
        listed = [f"{name} ({count})" if count > 1 else name for name, count in names.most_common(_MAX_LISTED)]
        more = [f"and {len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
        parts = ["equal" if self.equal else "NOT proven equal"]
        parts.append(f"{floor(1000 * self.coverage) / 10:.1f} % of the tensors are covered")
        return "; ".join([*parts, f"not covered: {', '.join([*listed, *more])}"] if names else parts)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is loaded into each target key, from where, and what is not.

    Iterating yields ``missing_keys`` and ``unexpected_keys``. Two plans are equal if all decisions are, whatever their
    tensors.
    """

    matches: tuple[Match, ...]  # what is loaded, in the target's order
    ambiguous: tuple[Match, ...]  # proposals that are not loaded: unsure, or with an equal rival
    mismatched: tuple[Mismatch, ...]
    source_specs: tuple[TensorSpec, ...]
    target_specs: tuple[TensorSpec, ...]
    excluded: frozenset[str] = frozenset()  # keys of either side that include and exclude left out
    notes: tuple[str, ...] = ()  # on the whole, such as the choice of a container
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # the source's, read lazily
    target_tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # as they are now
    verified: Verified | None = None  # None until `verify` returns it, and again where it is changed

    @cached_property
    def sources(self) -> dict[str, TensorSpec]:
        """The source's tensors by key."""
        return {spec.key: spec for spec in self.source_specs}

    @cached_property
    def targets(self) -> dict[str, TensorSpec]:
        """The target's tensors by key."""
        return {spec.key: spec for spec in self.target_specs}

    @cached_property
    def status(self) -> dict[str, Status]:
        """The one status of every target key, in the target's order."""
        kinds: dict[str, Status] = {spec.key: "missing" for spec in self.target_specs}
        kinds.update((mismatch.key, "mismatched") for mismatch in self.mismatched)
        kinds.update((match.target, "ambiguous") for match in self.ambiguous)
        kinds.update((match.target, "adapted" if match.operation.adapts else "matched") for match in self.matches)
        return kinds

    @property
    def missing_keys(self) -> list[str]:
        """Target keys that are not filled: without a counterpart, excluded, mismatched or ambiguous (``status``)."""
        return [key for key, status in self.status.items() if status not in FILLED]

    @cached_property
    def unexpected_keys(self) -> list[str]:
        """Source keys that are not used, in the source's order; a key tied to a used one counts as used."""
        used = {key for match in self.matches for key in match.sources}
        storages = {spec.storage for spec in self.source_specs if spec.key in used and spec.storage is not None}
        return [spec.key for spec in self.source_specs if spec.key not in used and spec.storage not in storages]

    @cached_property
    def quantised(self) -> tuple[Members, Members]:
        """The quantised tensors of the source and of the target with their companions, by key."""
        return groups_of(self.source_specs), groups_of(self.target_specs)

    @property
    def unused_schemes(self) -> list[str]:
        """A line for each scheme of quantised tensors in the source, with the number of those that are not used."""
        return describe_schemes(
            self.quantised[0], {key for match in self.matches for key in match.sources} | self.excluded
        )

    @property
    def mismatched_keys(self) -> list[Mismatch]:
        """Counterparts whose shapes no operation reconciles."""
        return list(self.mismatched)

    @property
    def mapping(self) -> dict[str, str]:
        """Checkpoint key to model key, for the matches that use one whole tensor each without adapting it.

        A source key that fills several tied target keys is mapped to the first of them.
        """
        pairs: dict[str, str] = {}
        for match in self.matches:
            if len(match.sources) == 1 and not match.operation.takes_part and not match.operation.adapts:
                pairs.setdefault(match.sources[0], match.target)
        return pairs

    @property
    def coverage(self) -> float:
        """The loaded share of the target's elements, in [0, 1]; 1 for a target without elements."""
        total = sum(spec.numel for spec in self.target_specs)
        return sum(self.targets[match.target].numel for match in self.matches) / total if total else 1.0

    def revised(self, matches: Iterable[Match], ambiguous: Iterable[Match] = (), notes: Iterable[str] = ()) -> Self:
        """Return the plan with matches and proposals in place of what it has for their targets, and with more notes."""
        made = [tuple(matches), tuple(ambiguous)]
        changed = {match.target for of in made for match in of}
        place = {key: number for number, key in enumerate(self.targets)}

        def merged(own: Sequence[Match], new: Sequence[Match]) -> tuple[Match, ...]:
            kept = (match for match in own if match.target not in changed)
            return tuple(sorted((*kept, *new), key=lambda match: place[match.target]))

        return replace(
            self,
            matches=merged(self.matches, made[0]),
            ambiguous=merged(self.ambiguous, made[1]),
            mismatched=tuple(mismatch for mismatch in self.mismatched if mismatch.key not in changed),
            notes=(*self.notes, *notes),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Read the matched target keys' tensors, in the target's names, shapes and order; dtypes are the source's.

        Tensors may be views of the source's, as those of ``nn.Module.state_dict`` are.
        """
        return {match.target: self.tensor(match) for match in self.matches}

    def tensor(self, match: Match, sources: Sequence[Tensor] | None = None) -> Tensor:
        """Read the tensor of one match, of this alignment's ``matches`` or ``ambiguous``.

        Args:
            match: To be read.
            sources: Its source tensors, if they were read already.

        Raises:
            InputError: It is not a match, or the operation keeps values of a target that is on the meta device.
        """
        if not isinstance(match, Match):
            raise InputError(f"Expected a Match, not {type(match).__name__}. Nothing was read.")
        tensors = [self.tensors[key] for key in match.sources] if sources is None else list(sources)
        if needs_target(match.operation):
            tensors.append(self.target_tensors[match.target])
            if tensors[-1].is_meta and not tensors[0].is_meta:
                raise InputError(
                    f"{match.target} is on the meta device and has no values that '{match.operation}' could keep. "
                    "Nothing was changed. Give a model with values, or leave this kind out of adapt=."
                )
        (tensor,) = match.operation.apply(tensors)
        return tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Hashable, ...]:
        """Return all that was decided, by which plans are compared."""
        sides = (
            (tuple((spec.key, spec.shape, spec.dtype) for spec in specs), tied_groups(specs))
            for specs in (self.source_specs, self.target_specs)
        )
        return self.matches, self.ambiguous, self.mismatched, self.excluded, self.notes, *sides

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without tensors, as ``save`` does."""
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"tensors": {}, "target_tensors": {}}

    def __copy__(self) -> Self:
        return self  # it is immutable

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it refers to the tensors of both sides, which are not its own

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing_keys, self.unexpected_keys))

    def __repr__(self) -> str:
        adapted = sum(match.operation.adapts for match in self.matches)
        if not self.missing_keys and not self.unexpected_keys and not adapted:
            return "<All keys matched successfully>"
        return (
            f"<{type(self).__name__}: {len(self.matches) - adapted} of {len(self.target_specs)} target keys matched, "
            + (f"{adapted} adapted, " if adapted else "")
            + f"{len(self.missing_keys)} missing, {len(self.unexpected_keys)} unexpected>"
        )


PlanT = TypeVar("PlanT", bound=Plan)
_Part = tuple[Operation, Match, Operation]  # takes it out of the source tensor; of what; takes it out of the target's


def inverted(plan: PlanT) -> PlanT:
    """Return the plan from the target to the source; see ``Alignment.inverse``."""
    parts: dict[str, dict[Operation, _Part]] = {}
    changed: list[str] = []
    for match in plan.matches:
        if match.operation.adapts:
            changed.append(match.target)
            continue
        try:
            traces = match.operation.trace([plan.sources[key].shape for key in match.sources])
        except NotInvertibleError:
            changed.append(match.target)
            continue
        for key, trace in zip(match.sources, traces, strict=True):
            parts.setdefault(key, {}).setdefault(trace.view, (trace.view, match, trace.restore))
    first_of = {spec.storage: spec.key for spec in reversed(plan.source_specs) if spec.key in parts}
    restored = []
    for spec in plan.source_specs:
        tied = first_of.get(spec.storage, "") if spec.storage is not None else ""
        known = parts.get(spec.key) or parts.get(tied) or {}
        restored.append(_restored(spec.key, spec.shape, list(known.values())))
    names = ", ".join(changed[:3])
    notes = (f"{len(changed)} tensors were adapted and cannot be restored: {names}.",) if changed else ()
    return replace(
        plan,
        matches=tuple(match for match in restored if match is not None),
        ambiguous=(),
        mismatched=(),
        source_specs=plan.target_specs,
        target_specs=plan.source_specs,
        notes=notes,
        verified=None,
        tensors=plan.target_tensors,
        target_tensors=plan.tensors,
    )


def _restored(key: str, shape: Shape, parts: Sequence[_Part]) -> Match | None:
    """Put a source tensor together from its parts; None where some of them went nowhere."""
    ordered = sorted(parts, key=lambda part: place_of(part[0]))
    join = joined(shape, [view for view, _, _ in ordered]) if ordered else None
    if join is None:
        return None
    matches = [match for _, match, _ in ordered]
    return Match(
        target=key,
        sources=tuple(match.target for match in matches),
        operation=chain(in_parallel([restore for _, _, restore in ordered]), join),
        confidence=min(match.confidence for match in matches),
        evidence=matches[0].evidence,
        warnings=tuple(dict.fromkeys(warning for match in matches for warning in match.warnings)),
    )
