"""Explanations: why an alignment does with one key what it does, and what would change that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import floor
from typing import Any, Literal

from autoalign.errors import InputError
from autoalign.matching.adapt import adapted
from autoalign.matching.assignment import WEIGHTS
from autoalign.matching.candidates import operation_between
from autoalign.matching.positions import AdaptableSide
from autoalign.matching.scope import pattern_for
from autoalign.plan.matches import Candidate, Match, Mismatch, Plan, Status
from autoalign.plan.options import ADAPTS
from autoalign.plan.specs import TensorSpec
from autoalign.reports.choices import Choice, answers, choices_of
from autoalign.reports.html import short_html
from autoalign.reports.rows import escaped
from autoalign.reports.serialization import choice_to_plain, way_to_plain
from autoalign.reports.text import counterparts, difference, nearest, reason

_MAX_SUGGESTIONS = 3  # keys that an unknown one may have meant
_MIN_SIMILARITY = 50  # of 100, of an unknown key and one that it may have meant
_MAX_SHOWN = 3  # rivals, and other uses
_WITHOUT_PATTERN = "align without that pattern"
_GROUNDS = {"rule": "a rule says so", "choice": "it was chosen", "outputs": "with it both models compute the same"}


@dataclass(frozen=True, slots=True)
class Cue:
    """How much one kind of evidence supports a match."""

    name: str  # name, structure, pattern, order, place, shape; or rule, choice, outputs
    value: float  # in [0, 1]
    weight: float | None  # in the score of matching; None for a cue that decides alone


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an alignment does with one key what it does."""

    key: str
    side: Literal["target", "source"]
    status: Status | Literal["excluded", "used", "unexpected"]
    what: str  # what is done with it, with both sides' shapes
    why: tuple[str, ...] = ()  # a line each
    cues: tuple[Cue, ...] = ()  # the heaviest first
    confidence: float | None = None
    rivals: tuple[Candidate, ...] = ()  # best first
    warnings: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()  # what would change the decision, a line each
    choice: Choice | None = None  # of those of the alignment, where it is ambiguous
    place: int = -1  # of that choice among them

    def __str__(self) -> str:
        lines = [f"{escaped(self.key)} ({self.side}): {self.status}", f"  {self.what}"]
        lines += [f"  why: {line}" for line in self.why]
        lines += [f"  ! {warning}" for warning in self.warnings]
        lines += [f"  to change it: {line}" for line in self.remedies]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cues = [(cue.name, f"{cue.value:.2f}", "" if cue.weight is None else f"{cue.weight:g}") for cue in self.cues]
        tables: dict[str, list[tuple[str, ...]]] = {
            "Why": [(line,) for line in self.why],
            "Cue, value, weight": [*cues],
            "Instead": [(" + ".join(map(escaped, rival.sources)), str(rival.operation)) for rival in self.rivals],
            "To change it": [(line,) for line in self.remedies],
        }
        warnings = [f"⚠ {warning}" for warning in self.warnings]
        return short_html(f"{escaped(self.key)} ({self.side}): {self.status}", [self.what, *warnings], tables)

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as plain data, as JSON has it; a choice has its ``next_actions``."""
        data = {name: getattr(self, name) for name in ("key", "side", "status", "what", "confidence")}
        data |= {name: list(getattr(self, name)) for name in ("why", "warnings", "remedies")}
        data["cues"] = [asdict(cue) for cue in self.cues]
        data["rivals"] = [way_to_plain(rival) | {"score": rival.score} for rival in self.rivals]
        data["choice"] = self.choice and choice_to_plain(self.choice, self.place)
        return data


def explain(alignment: Plan, key: str) -> Explanation:
    """Explain a key of either side; see ``Alignment.explain``."""
    if not isinstance(key, str):
        raise InputError(f"Expected a key, not {type(key).__name__}.")
    if key in alignment.targets:
        return _of_target(alignment, alignment.targets[key])
    if key in alignment.sources:
        return _of_source(alignment, alignment.sources[key])
    from rapidfuzz import process

    known = list(dict.fromkeys((*alignment.targets, *alignment.sources)))
    found = process.extract(key, known, limit=_MAX_SUGGESTIONS, score_cutoff=_MIN_SIMILARITY)
    hint = f" Did you mean {', '.join(repr(other) for other, *_ in found)}?" if found else ""
    raise InputError(f"{key!r} is not a key of the target or of the source.{hint}")


def _of_target(alignment: Plan, spec: TensorSpec) -> Explanation:
    status = alignment.status[spec.key]
    if spec.key in alignment.excluded:
        what = f"{spec.kind} is left out by include or exclude and keeps its values"
        return Explanation(spec.key, "target", "excluded", what, remedies=(_WITHOUT_PATTERN,))
    for match in (*alignment.matches, *alignment.ambiguous):
        if match.target == spec.key:
            return _of_match(alignment, match, status, spec)
    for item in alignment.mismatched:
        if item.key == spec.key:
            shape, own = list(item.shape), list(item.source_shape)
            what = f"{shape} is not filled: its counterpart is {item.source_key} {own}"
            why = [f"no operation makes one shape of the other{difference(item.source_shape, item.shape)}"]
            remedies = [*_adapting(alignment, item), f"{_excluding(spec.key, alignment)}, if it is to be trained anew"]
            return Explanation(spec.key, "target", "mismatched", what, tuple(why), remedies=tuple(remedies))
    others = counterparts(alignment, "source")
    near, remedies = nearest(spec, others), []
    what = f"{spec.kind} is not filled and keeps its values"
    why = [reason(spec, others)]
    if near is not None:
        why.append(f"the most similar name that is not used is {near}{difference(near.shape, spec.shape)}")
        if _fits(near, spec):
            remedies.append(f"rules=[({near.key!r}, {spec.key!r})]")
        else:
            remedies += _adapting(alignment, Mismatch(spec.key, near.key, spec.shape, near.shape))
    if not alignment.matches and alignment.notes:
        why.append(alignment.notes[-1])
    remedies.append(f"{_excluding(spec.key, alignment)}, if it is to be trained anew")
    return Explanation(spec.key, "target", status, what, tuple(why), remedies=tuple(remedies))


def _of_match(alignment: Plan, match: Match, status: Status, spec: TensorSpec) -> Explanation:
    made = " + ".join(str(alignment.sources[key]) for key in dict.fromkeys(match.sources))
    verb = "is proposed but not loaded," if status == "ambiguous" else "is filled"
    what = f"{spec.kind} {verb} from {made} by '{match.operation}'"
    cues = [Cue(name, value, WEIGHTS.get(name)) for name, value in match.evidence.items()]
    cues.sort(key=lambda cue: -(cue.weight or 10.0) * cue.value)
    why = []
    weighed = [cue for cue in cues if cue.weight is not None]
    total = sum(cue.value * WEIGHTS[cue.name] for cue in weighed)
    if weighed:
        terms = ", ".join(f"{cue.name} {cue.value:.2f} x {cue.weight:g}" for cue in weighed)
        most = sum(WEIGHTS[cue.name] for cue in weighed)
        why.append(f"of its cues (value x weight): {terms}; together {total:.2f} of {most:.2f}")
    why += [_GROUNDS.get(cue.name, f"{cue.name}: {cue.value:.2f}") for cue in cues if cue.weight is None]
    rivals = match.alternatives
    scores = [rival.score for rival in rivals if rival.score]
    margin = f", {total - max(scores):+.2f} ahead of the best rival" if scores and total else ""
    why.append(f"its confidence is {match.confidence:.2f}{margin if rivals else ', and it has no rival'}")
    grounds = tuple(cues), match.confidence, rivals, match.warnings
    if status == "ambiguous":
        places = enumerate(choices_of(alignment))
        place, choice = next((place, choice) for place, choice in places if spec.key in choice.targets)
        if len(choice.targets) > 1:
            why.append(f"one choice decides it with {len(choice.targets) - 1:,} others: alignment.choices[{place}]")
        loading = f"min_confidence={floor(100 * match.confidence) / 100:g} or less loads it as proposed"
        remedies = (*answers(choice, place), loading)
        return Explanation(spec.key, "target", status, what, tuple(why), *grounds, remedies, choice, place)
    for rival in rivals[:_MAX_SHOWN]:
        same = rival.sources == match.sources
        other = f"by '{rival.operation}'" if same else f"from {' + '.join(rival.sources)} by '{rival.operation}'"
        score = f", score {rival.score:.2f}" if rival.score else ""
        why.append(f"the next best would be {other}{score}" if not same else f"it might be made {other}{score}")
    if len(rivals) > _MAX_SHOWN:
        why.append(f"there are {len(rivals) - _MAX_SHOWN} more such alternatives")
    remedies = tuple(_remedies(alignment, match))
    return Explanation(spec.key, "target", status, what, tuple(why), *grounds, remedies)


def _remedies(alignment: Plan, match: Match) -> list[str]:
    """List what would change a match that is loaded."""
    others = [rival for rival in match.alternatives if rival.sources != match.sources and len(rival.sources) == 1]
    remedies = [f"rules=[({rival.sources[0]!r}, {match.target!r})] takes the rival" for rival in others[:_MAX_SHOWN]]
    if any(sorted(rival.sources) == sorted(match.sources) for rival in match.alternatives):
        remedies.append(
            "autoalign.verify(source_model, model, inputs) tries the alternatives, where both can be called"
        )
    if match.operation.adapts:
        remedies.append("align without adapt= leaves it missing")
    return [*remedies, f"{_excluding(match.target, alignment)} leaves it out"]


def _adapting(alignment: Plan, mismatch: Mismatch) -> list[str]:
    """List the kinds of ``adapt`` that would fill a key from its counterpart."""
    sides = AdaptableSide(alignment.source_specs), AdaptableSide(alignment.target_specs)
    return [
        f"adapt={kind!r} fills it by '{match.operation}'"
        for kind in ADAPTS
        for match in adapted((), [mismatch], *sides, frozenset({kind}), {})[0]
        if match.target == mismatch.key
    ]


def _of_source(alignment: Plan, spec: TensorSpec) -> Explanation:
    explanation = partial(Explanation, spec.key, "source")
    used = [match for match in alignment.matches if spec.key in match.sources]
    if used:
        fills = [f"{alignment.targets[match.target]} by '{match.operation}'" for match in used]
        see = (f"see explain({used[0].target!r})",)
        what = f"{spec.kind} is used for {_listed(fills)}"
        return explanation("used", what, confidence=used[0].confidence, remedies=see)
    if spec.key in alignment.excluded:
        what = f"{spec.kind} is left out by include or exclude"
        return explanation("excluded", what, remedies=(_WITHOUT_PATTERN,))
    if spec.key not in alignment.unexpected_keys:
        return explanation("used", f"{spec.kind} is tied to a tensor that is used")
    what = f"{spec.kind} is not used"
    proposed = [match for match in alignment.ambiguous if spec.key in match.sources]
    if proposed:
        fills = [str(alignment.targets[match.target]) for match in proposed]
        why = f"it is proposed for {_listed(fills)}, but not loaded"
        see = (f"see explain({proposed[0].target!r})",)
        return explanation("unexpected", what, (why,), confidence=proposed[0].confidence, remedies=see)
    for mismatch in alignment.mismatched:
        if mismatch.source_key == spec.key:
            why = f"its counterpart {mismatch.key} has the shape {list(mismatch.shape)}"
            return explanation("unexpected", what, (why,), remedies=(f"see explain({mismatch.key!r})",))
    others = counterparts(alignment, "target")
    grounds, remedies = [reason(spec, others)], []
    rival = next((m for m in alignment.matches if any(spec.key in other.sources for other in m.alternatives)), None)
    if rival is not None:
        grounds.append(f"{rival.target} would have been its next best use, and got {' + '.join(rival.sources)}")
        remedies.append(f"rules=[({spec.key!r}, {rival.target!r})]")
    elif (near := nearest(spec, others)) is not None:
        grounds.append(f"the most similar name that is not used is {near}")
        if _fits(spec, near):
            remedies.append(f"rules=[({spec.key!r}, {near.key!r})]")
    return explanation("unexpected", what, tuple(grounds), remedies=tuple(remedies))


def _fits(source: TensorSpec, target: TensorSpec) -> bool:
    return any(operation_between(source.shape, target.shape, transposed=way) for way in (False, True))


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_SHOWN} more" if len(items) > _MAX_SHOWN else ""
    return ", ".join(items[:_MAX_SHOWN]) + more


def _excluding(key: str, alignment: Plan) -> str:
    """Write the option that leaves out one key of the target, and the source's of the same name."""
    others = {*alignment.sources, *alignment.targets} - {key}
    pattern = pattern_for(key, "$", others)
    raw = "\\" in pattern and pattern.isprintable() and "'" not in pattern
    return f"exclude=r'{pattern}'" if raw else f"exclude={pattern!r}"
