"""The matching pipeline: the stages from the tensors of two sides to matches and mismatches, in order.

Consistent renamings need no search. Otherwise: pairs that rules fix, scope, fused tensors, candidates and features,
the joint optimisation, moves, confidence, parameters that are left over, assembly, mismatches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from autoalign.matching.assembly import (
    Found,
    SideParts,
    assembled,
    mismatched_units,
    operation_on_whole,
    unmatched_parameter_pairs,
    with_ties,
)
from autoalign.matching.assignment import match_units
from autoalign.matching.candidates import candidates, kinds_of, operation_between, paired_parts, transposed_parts
from autoalign.matching.confidence import (
    AMBIGUOUS,
    INFERRED,
    PROVEN,
    calibrated,
    coherence,
    confidence_of,
    shape_only_pairs,
    special_units,
    unused_duplicates,
)
from autoalign.matching.conventions import with_literal_norms
from autoalign.matching.cues import cap_of, settled
from autoalign.matching.features import namesakes, share_of, side_features
from autoalign.matching.fusion import split_both
from autoalign.matching.layers import Part, Unit, counts_of, under_one_root, units_of
from autoalign.matching.list_order import REVERSIBLE, reversible_lists
from autoalign.matching.names import kind, words
from autoalign.matching.relation import describe_unlike, equal_layers, relation
from autoalign.matching.repeats import is_renamed
from autoalign.matching.scope import Scope, name_of_averages, pattern_for, scope_of, within
from autoalign.matching.vocabulary import EMBEDDING_WORDS, KNOWN, NO_VOCABULARY, RIVAL_OUTPUTS, RIVAL_PAIRS, ROLES
from autoalign.plan.keys import components
from autoalign.plan.matches import Caution, Match, Mismatch
from autoalign.plan.operations import Copy, Operation, Transpose

_MIN_SHARE_OF_NAMESAKES = 0.9  # of the smaller side's layers, for a layer of another name to be another layer
_MIN_PROBABILITY_TO_LOAD = 0.7  # that the sides are related; in benchmarks.accuracy.unlike it is 0.67 at most
_MIN_SHARE_TO_RELATE = 0.5  # of them that are matched; then the sides are related, however the rest is spread
_MIN_SIMILARITY_AMONG_NAMESAKES = 0.3  # of names, where another name is another layer
_MIN_SIMILARITY_ALONE = 0.6  # of names, for a bias without its weight, and where not all pairs were compared
_PERHAPS_UNRELATED = "right shape, but source and target may be different architectures: too many layers are unlike"
CROWDED = "right shape, but so many layers have it that only those at about the same place were compared"
ONLY_SHAPES = "right shape, but no other evidence: most of the modules around it have no counterparts"
_TABLES = EMBEDDING_WORDS | NO_VOCABULARY  # words for matrices of which rows are taken
_BARE = frozenset({"W", "w"})  # what code calls a matrix that it multiplies with itself
_ALIKE = {"structure": 1.0, "order": 1.0, "shape": 1.0}


_Leaves = tuple[str, str]  # own names of two tensors
Result = tuple[list[Match], list[Mismatch], tuple[str, ...]]  # matches, counterparts of other shapes, and notes


def match_sides(source: SideParts, target: SideParts, pins: Mapping[str, str]) -> Result:
    """Match two sides; pinned pairs are taken as they are and vote for the rest."""
    if not pins and is_renamed(source.parts, target.parts):
        renamed = {
            place: Found(place, Copy(), _capped(PROVEN, source, target, *both), _ALIKE, None)
            for place, both in enumerate(zip(source.parts, target.parts, strict=True))
        }
        return with_ties(source.specs, target.specs, assembled(source, target, renamed)), [], ()
    pinned, refused = _pinned(source, target, pins) if pins else ([], [])
    read = with_literal_norms(source.parts, target.parts), with_literal_norms(target.parts, source.parts)
    sides = source, target = _with(source, read[0]), _with(target, read[1])
    taken = set(pins.values())
    fixed = (
        [part for part in source.parts if source.key(part) in taken],
        [part for part in target.parts if target.key(part) in pins],
    )
    scope = scope_of(source.parts, target.parts, [part.path for part in fixed[0]])
    kept = source.parts.changed(within(source.parts, scope))
    other_scope = scope_of(target.parts, kept, [part.path for part in fixed[1]])
    rest = (
        kept.changed([part for part in kept if source.key(part) not in taken]),
        target.parts.changed([part for part in within(target.parts, other_scope) if target.key(part) not in pins]),
    )
    source, target = (
        _with_held(replace(side, parts=own.changed(pieces), fusions=tuple(fusions)), held)
        for side, own, (pieces, fusions), held in zip(sides, rest, split_both(*rest), fixed, strict=True)
    )
    found, mismatched = match_parts(source, target, pins, (sides[0].parts, sides[1].parts))
    if found is None:
        empty = [name for name, side in (("source", source), ("target", target)) if not side.parts]
        has = "have" if len(empty) > 1 else "has"
        told = f"The {' and the '.join(empty)} {has} no tensors to match." if empty else describe_unlike(*sides)
        return [], mismatched, (told,)
    matches = assembled(source, target, found)
    if not (scope.is_decided and other_scope.is_decided):
        matches = [replace(match, confidence=min(match.confidence, AMBIGUOUS)) for match in matches]
    matches = with_ties(source.specs, target.specs, [*pinned, *matches])
    notes = (*_copies_note("source", scope), *_copies_note("target", other_scope), *_averages_note(source))
    named = []
    if len({match.target for match in matches}) < len(target.specs):
        source, target = (
            _with(side, within(side.parts, replace(around, path=())))
            for side, around in zip(sides, (scope, other_scope), strict=True)
        )
        own, other = units_of(source.parts), units_of(target.parts)
        named = _mismatches(source, target, own, other, namesakes(own.paths, other.paths))
    return matches, _without_matched(matches, mismatched, named, refused), notes


def _with_held(side: SideParts, held: Sequence[Part]) -> SideParts:
    """Put what rules fix among the parts of a side, where its tensors stand: their order is evidence."""
    parts = [*side.parts, *held]
    order = sorted(range(len(parts)), key=lambda index: parts[index].tensor)
    place = {index: place for place, index in enumerate(order)}
    fusions = [
        replace(
            fusion,
            parts=tuple([place[part] for part in fusion.parts]),
            absent=frozenset([place[part] for part in fusion.absent]),
        )
        for fusion in side.fusions
    ]
    return replace(_with(side, [parts[index] for index in order]), fusions=tuple(fusions)) if held else side


def _with(side: SideParts, parts: Sequence[Part]) -> SideParts:
    return replace(side, parts=side.parts.changed(parts))


def _without_matched(
    matches: Sequence[Match], found: Sequence[Mismatch], named: Sequence[Mismatch], refused: Sequence[Mismatch]
) -> list[Mismatch]:
    """Join the mismatches of unmatched keys found by features, by names, and by rules; the last are the surest."""
    done = {match.target for match in matches}
    used = {key for match in matches for key in match.sources}
    known = {item.key: item for item in named if item.source_key not in used}
    claimed = {item.source_key: item.key for item in known.values()}
    found = [item for item in found if claimed.get(item.source_key, item.key) == item.key]
    left = {item.key: item for item in found} | known | {item.key: item for item in refused}
    return [item for key, item in left.items() if key not in done]


def _copies_note(side: str, scope: Scope) -> tuple[str, ...]:
    if not scope.copies:
        return ()
    used, *others = names = [".".join(path) for path in (scope.taken, *scope.copies)]
    ways = []
    for name in names[:2]:
        patterns = tuple(pattern_for(other, "[.]", [name]) for other in names if other != name)
        ways.append(f"exclude={patterns if len(patterns) > 1 else patterns[0]!r} to take {name!r}")
    note = (
        f"The {side} holds {len(names)} copies of what the other side has; {used!r} "
        f"{'was taken' if scope.is_decided else 'is proposed and nothing was loaded'}, not "
        f"{', '.join(map(repr, others))}. To choose: {', or '.join(ways)}."
    )
    return (note if scope.is_named else Caution(note),)


def _averages_note(source: SideParts) -> tuple[str, ...]:
    name = name_of_averages([tuple(components(spec.key)) for spec in source.specs])
    if not name:
        return ()
    note = f"The source holds tensors and their moving averages; these were taken. For the others: exclude={name!r}."
    return (Caution(note),)


def _pinned(source: SideParts, target: SideParts, pins: Mapping[str, str]) -> tuple[list[Match], list[Mismatch]]:
    """Return the matches that rules fix; pairs whose shapes no operation reconciles are mismatches."""
    operation_of = operations_of_rules(source, target)
    shapes = [{spec.key: spec.shape for spec in side.specs} for side in (source, target)]
    matches, mismatched = [], []
    for other, own in pins.items():
        if (operation := operation_of(own, other)) is None:
            mismatched.append(Mismatch(other, own, shapes[1][other], shapes[0][own]))
        else:
            matches.append(Match(other, (own,), operation, evidence={"rule": 1.0}))
    return matches, mismatched


def operations_of_rules(source: SideParts, target: SideParts) -> Callable[[str, str], Operation | None]:
    """Return what gives the operation of a rule, from a source key to a target key; None where their shapes differ."""
    transposed = transposed_parts(source.parts, target.parts)
    place_of = {source.key(part): index for index, part in enumerate(source.parts)}
    part_of = {target.key(part): part for part in target.parts}

    def operation_of(own: str, other: str) -> Operation | None:
        place, wanted = place_of[own], part_of[other]
        part, shape = source.parts[place], target.specs[wanted.tensor].shape
        for way in (place in transposed, place not in transposed):
            if operation := operation_between(part.shape, wanted.shape, transposed=way):
                return operation_on_whole(own, part, operation, wanted, shape)
        return operation_between(source.specs[part.tensor].shape, shape)

    return operation_of


def match_parts(
    source: SideParts,
    target: SideParts,
    pins: Mapping[str, str],
    whole: tuple[Sequence[Part], Sequence[Part]],
) -> tuple[dict[int, Found] | None, list[Mismatch]]:
    """Match the parts of two sides; None if the sides are not related and nothing is pinned."""
    named = source.parts, target.parts
    source, target = (
        _with(side, under_one_root(side.parts, other.parts)) for side, other in ((source, target), (target, source))
    )
    own, other = units_of(source.parts), units_of(target.parts)
    kinds = kinds_of(own, source.parts, other, target.parts)
    counts = counts_of(own, source.parts), counts_of(other, target.parts)
    same = namesakes(own.paths, other.paths, counts, lambda i, j: kinds.fit(i, j) > 0)
    fixed = _pinned_units(source, target, own, other, pins)
    held = {i for i, _ in fixed}, {j for _, j in fixed}
    fixed += [(i, j) for i, j in same if i not in held[0] and j not in held[1]]
    pairs = candidates(kinds, own, other, fixed)
    sides = [
        side_features(units.paths, units.ancestry, classes, kinds.class_count, ordered=ordered)
        for units, classes, ordered in (
            (own, kinds.source_class, source.ordered),
            (other, kinds.target_class, target.ordered),
        )
    ]
    known_units = {j for _, j in fixed}
    outcome = settled(
        match_units(sides[0], sides[1], pairs),
        sides[0],
        sides[1],
        kinds.flat,
        kinds.exact,
        kinds.entries,
        fixed=held[1],
    )
    assignment = outcome.assignment
    confidence = confidence_of(assignment)
    confidence = calibrated(confidence * np.minimum(2 * coherence(assignment, own, other, confidence), 1))
    confidence = np.minimum(confidence, outcome.caps)
    special = special_units(other, target.parts)
    by_name = share_of(same, counts) >= _MIN_SHARE_OF_NAMESAKES
    if by_name:  # where names are shared, another name is another layer
        is_known = np.isin(assignment.target, [j for _, j in fixed])
        is_known |= assignment.cues["name"] >= _MIN_SIMILARITY_AMONG_NAMESAKES
        confidence = np.where(is_known | np.isin(assignment.target, special), confidence, AMBIGUOUS * confidence)
        chosen = set(assignment.target.tolist())
        by_name = share_of([(i, j) for i, j in same if j in chosen], counts) >= _MIN_SHARE_TO_RELATE
    by_name |= share_of(equal_layers(same, (own, source.parts), (other, target.parts)), counts) >= _MIN_SHARE_TO_RELATE
    units = (own, named[0]), (other, named[1])
    ordered = source.ordered and target.ordered
    related = 1.0 if pins or by_name else relation(assignment, confidence, *units, whole, ordered=ordered)
    if related < 0.5:
        return None, _mismatches(source, target, own, other, same)
    most = max(cap_of(related), INFERRED) if related >= _MIN_PROBABILITY_TO_LOAD else AMBIGUOUS
    lists = reversible_lists(assignment, (own, source.parts), (other, target.parts))
    has_duplicate = unused_duplicates(assignment, (own, source.parts))
    only_shapes = set(shape_only_pairs(assignment, (own, source.parts), (other, target.parts), known_units))
    pinned = set(pins.values())
    cues = {name: np.clip(cue, 0, 1).tolist() for name, cue in assignment.cues.items()}
    chosen_pairs = list(zip(assignment.source.tolist(), assignment.target.tolist(), strict=True))
    parts_of = [paired_parts(own[i], other[j]) for i, j in chosen_pairs]
    matched_parts = ((source.parts[a], target.parts[b]) for a, b in chain.from_iterable(parts_of))
    as_is = _leaves_as_is(matched_parts, source.parts, target.parts)
    found: dict[int, Found] = {}
    for place, ((i, j), parts) in enumerate(zip(chosen_pairs, parts_of, strict=True)):
        evidence = {name: round(cue[place], 3) for name, cue in cues.items()}
        has_name = evidence["name"] >= _MIN_SIMILARITY_ALONE
        runner_up = lists.reverse.get(place, int(assignment.runner_up[place]))
        rivals = {b: a for a, b in paired_parts(own[runner_up], other[j])} if runner_up >= 0 else {}
        kept, needed = set(own[i].kinds), set(other[j].kinds)
        is_stranded = kept & needed == {"bias"} and "weight" in kept ^ needed
        is_stranded &= j not in special or not has_name
        is_crowded = j not in known_units and (kinds.source[i], kinds.target[j]) in pairs.crowded
        is_crowded &= (i, j) not in pairs.same_numbers and not has_name
        is_contradicted = _are_rivals(own[i], other[j]) or _is_added(own[i], other[j])
        is_ambiguous = has_duplicate[place] or is_stranded or is_contradicted or is_crowded or place in only_shapes
        cap = AMBIGUOUS if is_ambiguous else INFERRED if place in lists.by_order else 1.0
        cap = min(cap, most)
        doubt = REVERSIBLE if place in lists.reverse else outcome.doubts.get(place)
        doubt = doubt or (CROWDED if is_crowded else ONLY_SHAPES if place in only_shapes else None)
        doubt = doubt or (_PERHAPS_UNRELATED if most == AMBIGUOUS else None)
        for a, b in parts:
            piece, wanted = source.parts[a], target.parts[b]
            is_turned = a in kinds.transposed or _is_bare_square(piece, wanted, as_is)
            operation = _operation(piece, wanted, transposed=is_turned)
            if operation is None or source.key(piece) in pinned or target.key(wanted) in pins:
                continue
            if piece.numeric == wanted.numeric:
                sureness = _capped(min(float(confidence[place]), cap), source, target, piece, wanted, as_is)
                found[b] = Found(a, operation, sureness, evidence, rivals.get(b), doubt)
    matched = {b: piece.source for b, piece in found.items()}
    for b, a in unmatched_parameter_pairs(source.parts, target.parts, matched).items():
        piece, wanted = source.parts[a], target.parts[b]
        operation = _operation(piece, wanted, transposed=_is_bare_square(piece, wanted, as_is))
        if operation and target.key(wanted) not in pins and source.key(piece) not in pinned:
            found[b] = Found(a, operation, INFERRED, {"structure": 1.0, "shape": 1.0}, None)
    partners = {j: i for i, j in chosen_pairs}
    left = mismatched_units((own, source.parts, sides[0]), (other, target.parts, sides[1]), partners)
    return found, _mismatches(source, target, own, other, (*left, *((i, j) for j, i in partners.items())))


def _are_rivals(own: Unit, other: Unit) -> bool:
    """True if the names of two layers exclude each other.

    One may be in the head for masks and the other in that for boxes; two bare parameters may be tokens of two kinds.
    """
    names = set(words(own.path[-1])), set(words(other.path[-1]))
    are_bare = own.kinds == other.kinds == ("other",)
    return _exclude(_path_words(own), _path_words(other), RIVAL_OUTPUTS) or (are_bare and _exclude(*names, RIVAL_PAIRS))


def _is_added(own: Unit, other: Unit) -> bool:
    """True if the name of one of two projections to queries, keys or values marks it as an additional one.

    Then it has a word without a known meaning that the path of the other lacks, as in ``to_k_ip`` beside ``to_k``.
    """
    names = set(words(own.path[-1])), set(words(other.path[-1]))
    if ROLES.isdisjoint(names[0] & names[1]):
        return False
    added = (names[0] - _path_words(other)) | (names[1] - _path_words(own))
    return any(len(word) > 1 and word not in KNOWN for word in added)


def _path_words(unit: Unit) -> set[str]:
    return {word for name in unit.path for word in words(name)}


def _exclude(own: set[str], other: set[str], rivals: Collection[tuple[str, str]]) -> bool:
    """True if a word of one side only excludes one of the other side only."""
    return any((a, b) in rivals for a in own - other for b in other - own)


def _capped(
    confidence: float, source: SideParts, target: SideParts, own: Part, other: Part, as_is: Collection[_Leaves] = ()
) -> float:
    """Cap the confidence in a match of tensors whose kind or layout is inferred."""
    by_order = own.by_order or other.by_order
    has_name = not by_order or components(source.key(own))[-1] == components(target.key(other))[-1]
    return confidence if has_name and not _is_bare_square(own, other, as_is) else min(confidence, INFERRED)


def _operation(source: Part, target: Part, *, transposed: bool) -> Operation | None:
    """Return the operation on a matched part; a bare matrix may be that of a layer, transposed."""
    bare = (kind(source.path[-1])[0] == "other") != (kind(target.path[-1])[0] == "other")
    operation = operation_between(source.shape, target.shape, transposed=transposed)
    return operation or (operation_between(source.shape, target.shape, transposed=True) if bare else None)


def _is_bare_square(source: Part, target: Part, as_is: Collection[_Leaves] = ()) -> bool:
    """True for a square matrix that one side multiplies with, ``x @ projection``, and the other holds in a layer.

    Such a one of another shape is always the transposed weight of the layer, except for embeddings. Where those of
    the same names are held ``as_is``, it is too.
    """
    kinds = {"other" if part.path[-1] in _BARE else kind(part.path[-1])[0] for part in (source, target)}
    if kinds != {"other", "weight"} or len(set(source.shape)) > 1 or len(source.shape) != 2:
        return False
    if (source.path[-1], target.path[-1]) in as_is:
        return False
    told = [{word for name in part.path[-2:] for word in words(name)} for part in (source, target)]
    return all("proj" in each for each in told) or all(map(_TABLES.isdisjoint, told))


def _leaves_as_is(pairs: Iterable[tuple[Part, Part]], source: Sequence[Part], target: Sequence[Part]) -> set[_Leaves]:
    """Return the names of matched matrices that fit as they are alone, and of those that are held as other layers are.

    An unknown name is that of a layer's weight where it is alone in its module, as ``q_proj.kern``.
    """
    held = [Counter(part.path[:depth] for part in side for depth in range(len(part.path))) for side in (source, target)]
    as_is, turned, alone = set[_Leaves](), set[_Leaves](), set[_Leaves]()
    votes = 0  # of all layers, by how both sides store them
    for both in pairs:
        own, other = both
        leaves = own.path[-1], other.path[-1]
        if len(own.shape) == 2 and len(set(own.shape)) == 2 and own.shape in (other.shape, other.shape[::-1]):
            (as_is if own.shape == other.shape else turned).add(leaves)
            are_viewed = [isinstance(part.view, Transpose) for part in both]
            votes += 1 if (own.shape == other.shape) == (are_viewed[0] == are_viewed[1]) else -1
        for part, of in zip(both, held, strict=True):
            if any(part.path[:-1]) and of[part.path[:-1]] == 1 and kind(part.path[-1])[0] == "other":
                alone.add(leaves)
    return as_is | (alone - turned if votes > 0 else set())


def _pinned_units(
    source: SideParts, target: SideParts, own: Sequence[Unit], other: Sequence[Unit], pins: Mapping[str, str]
) -> list[tuple[int, int]]:
    """List the pairs of units with pinned tensors, each unit once."""
    holder = {source.key(source.parts[part]): index for index, unit in enumerate(own) for _, part in unit.parts}
    pairs: dict[int, int] = {}
    for index, unit in enumerate(other):
        for _, part in unit.parts:
            pin = pins.get(target.key(target.parts[part]))
            if pin is not None and index not in pairs.values():
                pairs.setdefault(holder[pin], index)
    return list(pairs.items())


def _mismatches(
    source: SideParts, target: SideParts, own: Sequence[Unit], other: Sequence[Unit], pairs: Iterable[tuple[int, int]]
) -> list[Mismatch]:
    """List the tensors of corresponding layers whose shapes no operation reconciles."""
    left = [(source.parts[a], target.parts[b]) for i, j in pairs for a, b in paired_parts(own[i], other[j])]
    return [
        Mismatch(target.key(b), source.key(a), target.specs[b.tensor].shape, source.specs[a.tensor].shape)
        for a, b in left
        if not (operation_between(a.shape, b.shape) or operation_between(a.shape, b.shape, transposed=True))
    ]
