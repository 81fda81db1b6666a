"""The matching of two sides of any kind, with the options of ``align``, as a ``Plan``."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from autoalign.checkpoints.checkpoint import Checkpoint, Side, checkpoint_of
from autoalign.checkpoints.containers import name_words
from autoalign.errors import InputError, PatternError
from autoalign.matching.adapt import adapted, checked_adapt
from autoalign.matching.adapters import AdapterScope
from autoalign.matching.architectures import resemblances
from autoalign.matching.assembly import SideParts, with_doubts, with_stranded_biases, with_ties, without_aliases
from autoalign.matching.candidates import operation_between
from autoalign.matching.confidence import AMBIGUOUS, INFERRED
from autoalign.matching.layouts import ROTARY
from autoalign.matching.pipeline import Result, match_sides
from autoalign.matching.positions import AdaptableSide
from autoalign.matching.relation import UNLIKE
from autoalign.matching.repeats import (
    MAX_PAIRS_OF_ALL,
    Specs,
    extended,
    is_settled,
    less_sure,
    pair_count,
    runs_of,
    with_same_names,
)
from autoalign.matching.rotary import rotary_settling
from autoalign.matching.scope import checked_rules, excluded_keys, pinned_pairs
from autoalign.matching.stacks import restacked, unstacked, whole_mismatches
from autoalign.plan.dequantise import is_dequantised
from autoalign.plan.keys import common_module, components, split_key
from autoalign.plan.matches import Caution, Match, Plan
from autoalign.plan.operations import Copy
from autoalign.plan.options import Adapt, PatternLike, RuleLike
from autoalign.plan.parametrised import Parametrised, parametrised, undotted
from autoalign.plan.quantised import ADVICE, Members, Values, as_values, can_fill, describe_schemes, hidden_keys

_IN_PART = "the model computes this weight of several tensors, and the checkpoint has nothing for the others"
_LISTED = "The checkpoint lists parameters without names: they were paired with those of the model in its order."

OrderOfUse = Callable[[nn.Module], Sequence[str]]
Decide = Callable[[Plan, float], Plan]


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause cyclic garbage collection, which would visit hundreds of thousands of values again and again.

    None of the values made here refers to itself, so nothing is left behind. The collector's setting is restored.

    >>> with collection_paused():
    ...     gc.isenabled()
    False
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what was made counts as old at once, without a visit
            gc.freeze()
            gc.unfreeze()
        gc.enable()


@collection_paused()
def match_tensors(
    source: Side,
    target: Side,
    *,
    rules: RuleLike = (),
    include: PatternLike = None,
    exclude: PatternLike = None,
    adapt: Adapt | Iterable[Adapt] = (),
    min_confidence: float = 0.5,
    container: str | None = None,
    dequantise: bool = True,
    merge_adapter: bool = False,
    order_of_use: OrderOfUse | None = None,
    decide: Decide | None = None,
) -> Plan:
    """Match the tensors of two sides; see ``autoalign.align`` for the options.

    ``order_of_use`` lists the keys of a module in the order in which a call uses them first; ``decide`` is given the
    plan and ``min_confidence``, and returns it with what other evidence decides.
    """
    if not isinstance(min_confidence, int | float) or not 0 <= min_confidence <= 1:
        raise InputError(f"min_confidence must lie in [0, 1], not {min_confidence!r}. Nothing was aligned.")
    allowed = checked_adapt(adapt)
    other = checkpoint_of(target)
    own = _with_named_copy(checkpoint_of(source, container=container), other)
    out, selection_notes = excluded_keys(include, exclude, list(own), list(other))
    sides: tuple[Specs, Specs] = (
        tuple(spec for spec in own.specs if spec.key not in out) if out else own.specs,
        tuple(spec for spec in other.specs if spec.key not in out) if out else other.specs,
    )
    if order_of_use is not None:
        if own.module is other.module is None:
            raise InputError("example_inputs need a module on at least one side. Nothing was aligned.")
        sides = _in_order_of_use(own, sides[0], order_of_use), _in_order_of_use(other, sides[1], order_of_use)
    rules = checked_rules(rules)
    pins = pinned_pairs(rules, [spec.key for spec in sides[0]], [spec.key for spec in sides[1]])
    combined = _combined(*sides, own.specs, pins.values())
    adapters = AdapterScope.of(*sides, own.config, merge=merge_adapter)
    combined += adapters.combined
    pins = {**adapters.pins(sides[1]), **pins}
    coded = own.quantised if dequantise else {}
    values = as_values(sides[0], coded, other.quantised, own, own.config, combined)
    if own.quantised or other.quantised or combined:
        values = values if dequantise else replace(values, members=own.quantised)
        codes = values.members, other.quantised
        pins = _without_codes(pins, rules, values, own.quantised, other.quantised)
        hidden = hidden_keys(*codes), hidden_keys(*reversed(codes))
        sides = (
            tuple(spec for spec in values.specs if spec.key not in hidden[0]),
            tuple(spec for spec in sides[1] if spec.key not in hidden[1]),
        )
    sides = adapters.within(*sides)
    same = None if pins else with_same_names(*sides)
    found: Result
    if listed := None if pins else _as_listed(*sides, other.module):
        found = listed, [], (_LISTED,)
    else:
        found = (same, [], ()) if same else _by_distinct(*sides, (own.config, other.config), pins)
    matches, mismatched, notes = found
    if allowed and (matches or pins):
        given = (own, values.specs), (other, other.specs)
        views = [AdaptableSide(specs, side.module, side.config) for side, specs in given]
        changed, unable = adapted(matches, mismatched, views[0], views[1], allowed, pins)
        taken = {match.target for match in changed}
        matches = with_ties(*sides, [*(match for match in matches if match.target not in taken), *changed])
        taken = {match.target for match in matches}
        mismatched = [mismatch for mismatch in mismatched if mismatch.key not in taken]
        notes = (*notes, *unable)
    _check_rules(rules, *sides, matches)
    if len(matches) < len(sides[1]):
        matches = with_stranded_biases(matches, *sides)
        matches = _with_whole_weights(matches, parametrised(sides[1]))
    if own.quantised or other.quantised or combined:
        matches = _without_misused_codes(matches, values.members, other.quantised)
        codes = values.members, other.quantised
        mismatched = [item for item in mismatched if item.source_key not in codes[0] and item.key not in codes[1]]
        if own.quantised and not matches:  # that is why, whatever else was found
            notes = ()
        matches = [_of_members(match, values) for match in matches]
        notes = (*notes, *_notes_of_combined(combined, matches))
        mismatched = [replace(item, source_key=values.codes_of(item.source_key)) for item in mismatched]
        notes = (*notes, *_notes_of_codes(own, other, matches, out, dequantise=dequantise))
    matches = adapters.checked(matches)
    untouched = adapters.untouched(sides[1], matches)
    out |= untouched
    notes = (*notes, *adapters.notes(matches, len(untouched)))
    if not own.is_decided:
        matches = [replace(match, confidence=min(match.confidence, AMBIGUOUS)) for match in matches]
    order = {spec.key: index for index, spec in enumerate(other.specs)}
    chosen = sorted(matches, key=lambda match: order[match.target])
    sure = {match.target for match in chosen if match.confidence >= min_confidence}
    notes = (*notes, *_notes_of_folded_norms(*sides, [m for m in matches if m.target in sure]))
    if UNLIKE in notes:
        notes = (*notes, *resemblances(own.specs, other.specs))
    rotated = [match for match in chosen if match.target not in sure and ROTARY in match.warnings]
    if rotated and (settling := rotary_settling((own, other), sized=all(len(m.alternatives) < 3 for m in rotated))):
        notes = (*notes, settling)
    plan = Plan(
        matches=tuple(match for match in chosen if match.target in sure),
        ambiguous=tuple(match for match in chosen if match.target not in sure),
        mismatched=tuple(sorted(mismatched, key=lambda mismatch: order[mismatch.key])),
        source_specs=own.all_specs,
        target_specs=other.specs,
        excluded=out,
        notes=(*own.notes, *selection_notes, *notes),
        tensors=own,
        target_tensors=other,
    )
    return plan if decide is None else decide(plan, min_confidence)


def _combined(source: Specs, target: Specs, beside: Specs, pinned: Collection[str]) -> list[Parametrised]:
    """List what is a plain weight of the target, which knows none such: parametrised ones, and those without dots."""
    found = parametrised(source)
    known = {each.scheme for each in parametrised(target)} if found else ()
    found += undotted(source, beside, target)
    return [each for each in found if each.scheme not in known and not {spec.key for spec in each.specs} & set(pinned)]


def _with_whole_weights(matches: Sequence[Match], computed: Iterable[Parametrised]) -> list[Match]:
    """Doubt what fills the main tensor of a weight that the model computes of several, if the others stay empty.

    As a plain weight in the ``weight_v`` of weight norm, whose ``weight_g`` gets nothing. Tensors of the same name do.
    """
    filled = {match.target for match in matches}
    parts = {of.codes.key for of in computed if filled.isdisjoint(spec.key for spec in of.specs[1:])}

    def is_doubted(match: Match) -> bool:
        names = {split_key(key)[1] for key in match.sources}
        return match.target in parts and split_key(match.target)[1] not in names and "rule" not in match.evidence

    return with_doubts(matches, _IN_PART, is_doubted)


def _notes_of_combined(combined: Sequence[Parametrised], matches: Sequence[Match]) -> list[str]:
    used = {key for match in matches for key in match.sources}
    counts = Counter(each.scheme for each in combined if each.codes.key in used and each.scheme != "LoRA")
    renamed = next((each for each in combined if not each.scheme), None)
    return [
        f"Combined: {count} weights, from what {scheme} computes them of."
        if scheme or renamed is None
        else f"{count} names without dots were read with them: {renamed.codes.key} as {renamed.key_of_values}."
        for scheme, count in counts.items()
    ]


def _notes_of_folded_norms(source: Specs, target: Specs, matches: Sequence[Match]) -> list[Caution]:
    """Return a note if one side has batch norms folded into its convolutions, which the other has not."""
    filled, used = {match.target for match in matches}, {key for match in matches for key in match.sources}
    into_folded = (
        "convolutions of the model have biases that the checkpoint lacks, and {} batch norms of that are unused, such "
        "as {}: the model has folded them into those, whose weights here are those from before. Fold them first, as by "
        "torch.nn.utils.fuse_conv_bn_weights."
    )
    from_folded = (
        "convolutions of the checkpoint have biases that the model lacks, and {} batch norms of that get nothing, such "
        "as {}: the checkpoint has folded them into those, whose weights fit no norms any more. Load one from before, "
        "or fold the model's first, as by torch.nn.utils.fuse_conv_bn_eval."
    )
    ways = (target, filled, source, used, into_folded), (source, used, target, filled, from_folded)
    for folded, done, whole, live, text in ways:
        lost = [spec for spec in folded if spec.key not in done and split_key(spec.key)[1] == "bias"]
        if not lost:
            continue
        kernels = {split_key(spec.key)[0] for spec in folded if len(spec.shape) > 2 and spec.key in done}
        lost = [spec for spec in lost if split_key(spec.key)[0] in kernels]
        modules = {split_key(key)[0] for key in live}
        norms = [spec for spec in whole if spec.key.endswith("running_var") and split_key(spec.key)[0] not in modules]
        if lost and not Counter(spec.shape for spec in lost) - Counter(spec.shape for spec in norms):
            return [Caution(f"{len(lost)} {text.format(len(norms), split_key(norms[0].key)[0])}")]
    return []


def _as_listed(source: Specs, target: Specs, module: nn.Module | None) -> list[Match] | None:
    """Match parameters that were saved as a list to those of a module, if they have the same shapes in its order."""
    if module is None or [spec.key for spec in source] != [str(place) for place in range(len(source))]:
        return None
    known = {spec.key for spec in target}
    held = [(key, each) for key, each in module.named_parameters() if key in known]
    for wanted in (held, [(key, each) for key, each in held if each.requires_grad]):
        if wanted and [tuple(each.shape) for _, each in wanted] == [spec.shape for spec in source]:
            pairs = zip(wanted, source, strict=True)
            evidence = {"order": 1.0}
            found = [Match(key, (spec.key,), Copy(), INFERRED, evidence) for (key, _), spec in pairs]
            return with_ties(source, target, found)
    return None


def _without_codes(
    pins: Mapping[str, str], rules: Sequence[tuple[str, str]], values: Values, own: Members, other: Members
) -> dict[str, str]:
    """Return pinned pairs with values in place of their codes, without those that would take codes for values.

    Raises:
        PatternError: A rule names such a pair.
    """
    known, of_codes = {spec.key for spec in values.specs}, values.keys_of_codes
    kept = {}
    for key, source in pins.items():
        taken = of_codes.get(source, source)
        if taken in known and can_fill((taken,), key, Copy(), values.members, other):
            kept[key] = taken
        elif [source, key] in map(list, rules):
            coded = source if source in own else key
            scheme = (own if coded == source else other)[coded].group.scheme
            raise PatternError(
                f"The rules fill {key!r} from {source!r}, but {coded!r} is quantised as {scheme} and its elements are "
                "codes, not values. Nothing was aligned; leave the rule out, or dequantise first."
            )
    return kept


def _of_members(match: Match, values: Values) -> Match:
    """Return a match of values as one of the tensors that they are computed from."""
    sources, operation = values.from_members(match.sources, match.operation)
    rivals = []
    for rival in match.alternatives:
        own, step = values.from_members(rival.sources, rival.operation)
        rivals.append(replace(rival, sources=own, operation=step))
    return replace(match, sources=sources, operation=operation, alternatives=tuple(rivals))


def _notes_of_codes(
    own: Checkpoint, other: Checkpoint, matches: Sequence[Match], excluded: Collection[str], *, dequantise: bool
) -> list[str]:
    """Return notes on what is left out because it is quantised; checkpoints have notes on what torch itself packs."""
    packed = {spec.key for spec in (*own.left_out, *other.left_out)}
    used = {key for match in matches for key in match.sources}
    filled = {match.target for match in matches}
    read = {key for match in matches if is_dequantised(match.operation) for key in match.sources}
    advice = ADVICE if dequantise else f"{ADVICE} Without dequantise=False, the values of known schemes are loaded."
    return [
        *(f"Dequantised to float32: {what}." for what in describe_schemes(own.quantised, own.quantised.keys() - read)),
        *(
            f"Left out: {what}. Their elements are codes, not values. {advice}"
            for what in describe_schemes(own.quantised, used | packed | set(excluded))
        ),
        *(
            f"Not filled: {what} of the model. They can only be copied from the same scheme, with their companions."
            for what in describe_schemes(other.quantised, filled | packed | set(excluded))
        ),
    ]


def _with_named_copy(source: Checkpoint, target: Checkpoint) -> Checkpoint:
    """Return the copy whose name the target has, or all of them if the target has a part for each."""
    paths = (source.container, *source.copies)
    if len(paths) == 1 or not target:
        return source
    keys = [components(key) for key in target]
    shared = common_module(keys)
    parents, names = {path.rpartition(".")[0] for path in paths}, {path.rpartition(".")[2] for path in paths}
    if len(parents) == 1 and names <= {name for key in keys for name in key[len(shared) :][:1]}:
        return checkpoint_of(source, container=parents.pop())
    module = [] if target.module is None else [type(target.module).__name__]
    called = frozenset(word for name in (*module, *shared) for word in name_words(name))
    counts = Counter(word for path in paths for word in name_words(path))
    meant = [path for path in paths if any(counts[word] == 1 for word in name_words(path) & called)]
    if len(meant) != 1:
        return source
    taken = checkpoint_of(source, container=meant[0])
    note = f"The container {meant[0]!r} was taken because the target has its name."
    return replace(taken, notes=(*taken.notes, note))


def _in_order_of_use(side: Checkpoint, specs: Specs, order_of_use: OrderOfUse) -> Specs:
    """Sort the specs of a module by the order in which a call uses them."""
    if side.module is None:
        return specs
    place = {key: place for place, key in enumerate(order_of_use(side.module))}
    return sorted(specs, key=lambda spec: place.get(spec.key, len(place)))


def _by_distinct(
    source: Specs, target: Specs, configs: tuple[Mapping[str, object], Mapping[str, object]], pins: Mapping[str, str]
) -> Result:
    """Match two sides, tensors that have several keys by one of them where that is enough."""
    own, other = without_aliases(source, target, {*pins, *pins.values()})
    matches, mismatched, notes = _by_slices(own, other, configs, pins)
    return (matches if len(other) == len(target) else with_ties(source, target, matches)), mismatched, notes


def _by_slices(
    source: Specs, target: Specs, configs: tuple[Mapping[str, object], Mapping[str, object]], pins: Mapping[str, str]
) -> Result:
    """Match two sides, stacked tensors that the other side lists by their slices."""
    (own, known), (other, wanted) = unstacked(source, target, pins.values()), unstacked(target, source, pins)
    if not known and not wanted:
        return _by_repeats(source, target, configs, pins)
    same = None if pins else with_same_names(own, other)
    matches, mismatched, notes = (same, [], ()) if same else _by_repeats(own, other, configs, pins)
    whole = whole_mismatches(mismatched, known, wanted, (source, target))
    return restacked(matches, known, wanted, target), whole, notes


def _by_repeats(
    source: Specs, target: Specs, configs: tuple[Mapping[str, object], Mapping[str, object]], pins: Mapping[str, str]
) -> Result:
    """Match two sides, long lists of equal blocks by their first members; all of them where these leave others open."""
    runs = runs_of(source, pinned=pins.values()), runs_of(target, pinned=pins)
    if spans := runs[0].spans | runs[1].spans:  # members are then paired by number, not by place
        runs = runs_of(source, spans, pins.values()), runs_of(target, spans, pins)
    own = SideParts.of(runs[0].kept, configs[0], runs[0].counts, runs[1].kept)
    other = SideParts.of(runs[1].kept, configs[1], runs[1].counts, runs[0].kept)
    matches, mismatched, notes = match_sides(own, other, pins)
    if runs[0].run_of or runs[1].run_of:
        matches, mismatched = extended(matches, mismatched, *runs)
        if not is_settled(*runs, matches):
            if pair_count(source, target) <= MAX_PAIRS_OF_ALL:
                own = SideParts.of(source, configs[0], others=target)
                return match_sides(own, SideParts.of(target, configs[1], others=source), pins)
            matches = less_sure(runs[1], matches)
        matches = with_ties(source, target, matches)
    return matches, mismatched, notes


def _check_rules(rules: Sequence[tuple[str, str]], source: Specs, target: Specs, matches: Sequence[Match]) -> None:
    """Refuse a rule that names two tensors of irreconcilable shapes, unless one is made of the other all the same."""
    if not rules:
        return
    made = {(key, match.target) for match in matches for key in match.sources}
    shapes = {spec.key: spec.shape for spec in source}, {spec.key: spec.shape for spec in target}
    for first, second in rules:
        shape, wanted = shapes[0].get(first), shapes[1].get(second)
        if not (shape is None or wanted is None or (first, second) in made) and not any(
            operation_between(shape, wanted, transposed=way) for way in (False, True)
        ):
            raise PatternError(
                f"The rules fill {second!r} {list(wanted)} from {first!r} {list(shape)}, and no operation reconciles "
                "these shapes. Nothing was aligned; correct the rule or leave it out."
            )


def _without_misused_codes(matches: Iterable[Match], own: Members, other: Members) -> list[Match]:
    """Leave out matches that take codes of quantised tensors for values, or fill them without their companions.

    The matches of one group are as sure as the least sure of them.
    """
    kept = []
    for match in matches:
        if not can_fill(match.sources, match.target, match.operation, own, other):
            continue
        rivals = tuple(
            rival for rival in match.alternatives if can_fill(rival.sources, match.target, rival.operation, own, other)
        )
        kept.append(match if rivals == match.alternatives else replace(match, alternatives=rivals))
    groups: dict[str, list[Match]] = defaultdict(list)
    for match in kept:
        if match.target in other:
            groups[other[match.target].group.codes.key].append(match)
    sureness: dict[str, float] = {}
    for codes, members in groups.items():
        group = other[codes].group
        needed = {spec.key for spec in (group.codes, *group.companions) if other[spec.key].is_needed}
        origins = {own[match.sources[0]].group.codes.key for match in members}
        if len(origins) == 1 and needed <= {match.target for match in members}:
            sureness[codes] = min(match.confidence for match in members)
    result = []
    for match in kept:
        if match.target not in other:
            result.append(match)
        elif (sure := sureness.get(other[match.target].group.codes.key)) is not None:
            result.append(match if sure == match.confidence else replace(match, confidence=sure))
    return result
