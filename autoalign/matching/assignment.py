"""Assignment: one joint optimisation over all candidate pairs, finished by an exact assignment.

Graduated assignment (Gold and Rangarajan, "A graduated assignment algorithm for graph matching", 1996) on the module
trees, with evidence pooled over repeated structure as in similarity flooding (Melnik et al., 2002). Pairs of units are
softly assigned; assigned pairs vote for the correspondence of their ancestors, for their name templates and for
their neighbours; the votes are fed back and the assignment is sharpened. Departures from the paper: one-to-one
constraints are kept by one symmetric normalisation a step, votes for ancestors are relative to the strongest rival,
and a pair's own vote does not count for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoalign.matching.candidates import Candidates
from autoalign.matching.features import Floats, Ints, SideFeatures, name_scores

WEIGHTS = {"name": 1.0, "structure": 2.0, "pattern": 1.4, "order": 0.4, "place": 0.4, "shape": 0.6}
_MAX_STEPS = 10
_FIRST_SHARPNESS, _SHARPENING_FACTOR = 2.0, 1.4  # of the first soft assignment, and what each step multiplies it by
_CONVERGED_BELOW = 0.002  # the largest change of a soft assignment at which the steps end
_RANK_DECAY = 0.7  # ranks that differ by n agree to exp(-_RANK_DECAY * n)
_RANK_SHARE = 0.3  # how much of a vote hangs on the rank within the voting ancestors
_UNORDERED_DECAY_SHARE = 0.3  # of the decay where one side's keys are sorted, so that the order of modules tells little
_MIN_LIST_AGREEMENT = 0.1  # what remains of a vote between blocks of quite different places
_UNMATCHED_SCORE = 2.0  # of a unit without a partner
_SINGLE_TEMPLATE_SCORE = 0.3  # the pattern score of a template that occurs once
_MAX_SCORED_AT_ONCE = 2**15  # pairs times templates; numpy is fastest on small arrays
_MAX_IDS_PER_CELL = 8  # above it, ids are numbered anew without gaps
_MAX_DENSE_CELLS = 2**22  # of a table of gains; above it, the exact assignment is sought in a sparse one


@dataclass(frozen=True, slots=True)
class Assignment:
    """The outcome of matching, as parallel arrays over the chosen pairs of units."""

    source: Ints
    target: Ints
    score: Floats
    margin: Floats  # what the best rival would cost the whole assignment; the score where there is no rival
    runner_up: Ints  # the best other source unit for the target unit; -1 where there is none
    names: Floats  # how alike the names of all units are: [source units, target units]
    cues: dict[str, Floats]  # name, structure, pattern, order, place, shape: the terms of the score before weighing


def match_units(source: SideFeatures, target: SideFeatures, candidates: Candidates) -> Assignment:
    """Assign source units to target units so that the total evidence is largest; deterministic."""
    rows, columns = candidates.source, candidates.target
    if not len(rows):
        none = np.zeros(0, dtype=np.float32)
        return Assignment(rows, columns, none, none, rows, none, dict.fromkeys(WEIGHTS, none))
    names = name_scores(source.paths, target.paths)
    listed = (source.length[rows] == target.length[columns]) & (source.length[rows] > 1)
    cues = {
        "name": names[rows, columns],
        "shape": candidates.fit,
        "place": np.asarray(listed & (source.place[rows] == target.place[columns]), dtype=np.float32),
        "structure": np.zeros(len(rows), dtype=np.float32),
        "pattern": np.zeros(len(rows), dtype=np.float32),
        "order": np.zeros(len(rows), dtype=np.float32),
    }
    structure = _StructureVotes(source, target, rows, columns)
    width = max(_MAX_SCORED_AT_ONCE // len(rows), 1)
    patterns = [
        _PatternVotes(source.templates[k : k + width], target.templates[k : k + width], rows, columns)
        for k in range(0, len(source.templates), width)
    ]
    neighbours = _neighbour_pairs(source, target, rows, columns)
    padded = np.zeros(len(rows) + 1)  # the last stands for what has no neighbour
    shape = (len(source.paths), len(target.paths))
    known = [cues[name] * WEIGHTS[name] for name in ("name", "place", "shape")]
    score = np.asarray(np.sum([*known, 0.5 * structure.root_agreement], axis=0), dtype=np.float32)
    sharpness = _FIRST_SHARPNESS
    softmax = _Softmax(rows, columns)
    soft = softmax(score, sharpness)
    for _ in range(_MAX_STEPS):
        cues["structure"] = structure.scores(soft)
        row_mass = np.bincount(rows, soft, shape[0]).astype(np.float32)
        column_mass = np.bincount(columns, soft, shape[1]).astype(np.float32)
        pooled = np.concatenate([votes.scores(soft, row_mass, column_mass) for votes in patterns])
        cues["pattern"] = pooled.sum(axis=0) / len(pooled)
        padded[:-1] = soft
        cues["order"] = padded[neighbours].sum(axis=0) / 2 * candidates.adjacent
        total = np.zeros(len(rows))
        for name, weight in WEIGHTS.items():
            total += cues[name] * weight
        score = total.astype(np.float32)
        sharpness *= _SHARPENING_FACTOR
        before, soft = soft, softmax(score, sharpness)
        if np.abs(soft - before).max() < _CONVERGED_BELOW:
            break
    chosen = _exact_assignment(score, rows, columns, shape)
    margin, runner_up = _rivals(score, chosen, rows, columns, shape)
    return Assignment(
        rows[chosen],
        columns[chosen],
        score[chosen].astype(np.float32),
        margin,
        runner_up,
        names,
        {name: np.asarray(cue[chosen], dtype=np.float32) for name, cue in cues.items()},
    )


class _StructureVotes:
    """Votes of assigned pairs for the correspondence of their ancestors, and what they say of each pair.

    The arrays over ancestors are [source depth, target depth, pairs], so that numpy runs along the pairs.
    """

    def __init__(self, source: SideFeatures, target: SideFeatures, rows: Ints, columns: Ints) -> None:
        own, other = source.ancestry, target.ancestry
        self.shape = (own.node_count, other.node_count)
        above, above_other = own.ancestors.T[:, None, rows], other.ancestors.T[None, :, columns]
        valid = (above >= 0) & (above_other >= 0)
        dump = self.shape[0] * self.shape[1]  # where the padding votes
        self.pairs = np.ascontiguousarray(np.where(valid, above.astype(np.int64) * self.shape[1] + above_other, dump))
        self.depths = (above >= 0).sum(axis=0)[0], (above_other >= 0).sum(axis=1)[0]
        distance = np.abs(source.rank.T[:, None, rows] - target.rank.T[None, :, columns])
        agreement = np.exp(np.float32(-_RANK_DECAY) * distance.astype(np.float32))
        agreement *= np.where(source.count.T[:, None, rows] == target.count.T[None, :, columns], 1.0, 0.7)
        agreement = ((1 - _RANK_SHARE) + _RANK_SHARE * agreement) * valid
        self.agreement = np.ascontiguousarray(agreement, dtype=np.float32)
        self.root_agreement = self.agreement[self.depths[0] - 1, self.depths[1] - 1, np.arange(len(rows))]
        sizes = []
        for ancestors, units, count in (
            (own.ancestors, rows, own.node_count),
            (other.ancestors, columns, other.node_count),
        ):
            nodes = ancestors[np.unique(units)]
            sizes.append(np.maximum(np.bincount(nodes[nodes >= 0], minlength=count), 1))
        voted = np.arange(dump)
        if dump > self.pairs.size:  # most pairs of modules get no votes
            voted = np.unique(self.pairs)
            self.pairs = np.searchsorted(voted, self.pairs)
            voted = voted[voted < dump]
        self.modules = np.divmod(voted, self.shape[1])
        rows, columns = self.modules
        self.prior = _module_agreement(source, target, rows, columns) / np.sqrt(sizes[0][rows] * sizes[1][columns])

    def scores(self, soft: Floats) -> Floats:
        spread = np.broadcast_to(soft, self.pairs.shape)
        votes = np.bincount(self.pairs.ravel(), spread.ravel(), len(self.prior) + 1)[:-1] * self.prior
        strongest = [np.zeros(count) for count in self.shape]
        for most, modules in zip(strongest, self.modules, strict=True):
            np.maximum.at(most, modules, votes)
        rivals = [most[modules] + 1e-9 for most, modules in zip(strongest, self.modules, strict=True)]
        relative = np.zeros(len(votes) + 1, dtype=np.float32)  # the last is for the padding
        relative[:-1] = votes / np.sqrt(rivals[0] * rivals[1])
        weighed = relative.take(self.pairs) * self.agreement
        upward = weighed.max(axis=1).sum(axis=0) / self.depths[0]
        downward = weighed.max(axis=0).sum(axis=0) / self.depths[1]
        return np.asarray((upward + downward) / 2, dtype=np.float32)


def _module_agreement(source: SideFeatures, target: SideFeatures, rows: Ints, columns: Ints) -> Floats:
    """Compute how well the places of two modules among their like agree, for pairs of modules."""
    decay = _RANK_DECAY * (1.0 if source.ordered and target.ordered else _UNORDERED_DECAY_SHARE)
    by_content = 0.9 * np.exp(-decay * np.abs(source.module_rank[rows] - target.module_rank[columns]))
    places = source.list_rank[rows], target.list_rank[columns]
    listed = (places[0] >= 0) & (places[1] >= 0)
    by_number = np.where(listed, np.exp(-_RANK_DECAY * np.abs(places[0] - places[1])), 0.0)
    several = (source.module_size[rows] > 1) & (target.module_size[columns] > 1)
    agreement = np.where(
        several, _MIN_LIST_AGREEMENT + (1 - _MIN_LIST_AGREEMENT) * np.maximum(by_content, by_number), 1.0
    )
    return agreement.astype(np.float32)


class _PatternVotes:
    """Votes of assigned pairs for the correspondence of their name templates: [templates, pairs]."""

    def __init__(self, source: Ints, target: Ints, rows: Ints, columns: Ints) -> None:
        self.rows, self.columns = rows, columns
        own, other = source[:, rows], target[:, columns]
        self.ids = [_apart(own), _apart(other), _apart(own * (other.max(axis=1, keepdims=True) + 1) + other)]

    def scores(self, soft: Floats, row_mass: Floats, column_mass: Floats) -> Floats:
        """Score each pair by what the other pairs of its templates do; rare templates say little."""
        spread = np.concatenate([soft] * len(self.ids[0]))
        own, other, together = (np.bincount(ids.ravel(), spread).take(ids) for ids in self.ids)
        pooled = np.sqrt(np.maximum(own - row_mass[self.rows], 0) * np.maximum(other - column_mass[self.columns], 0))
        trust = pooled / (pooled + 0.3)
        share = np.minimum(np.maximum((together - soft) / (pooled + 1e-9), 0), 1)
        return np.asarray(trust * share + (1 - trust) * _SINGLE_TEMPLATE_SCORE, dtype=np.float32)


def _apart(ids: Ints) -> Ints:
    """Number what is in each row anew, so that no two rows have a number in common; without large gaps."""
    sizes = ids.max(axis=1) + 1
    apart = ids + (np.cumsum(sizes) - sizes)[:, None]
    if sizes.sum() > _MAX_IDS_PER_CELL * ids.size:
        apart = np.unique(apart, return_inverse=True)[1].reshape(ids.shape)
    return np.asarray(apart)


def _neighbour_pairs(source: SideFeatures, target: SideFeatures, rows: Ints, columns: Ints) -> Ints:
    """Find, for each pair, the pairs of both units' predecessors and of both units' successors: [2, pairs]."""
    width = len(target.paths)
    code = rows * width + columns
    by_code = np.argsort(code, kind="stable")
    found = []
    for own, other in ((source.previous, target.previous), (source.next, target.next)):
        wanted = np.where((own[rows] >= 0) & (other[columns] >= 0), own[rows] * width + other[columns], -1)
        place = np.minimum(np.searchsorted(code[by_code], wanted), len(code) - 1)
        found.append(np.where(code[by_code][place] == wanted, by_code[place], len(code)))
    return np.asarray(found)


class _Softmax:
    """Turns scores into soft assignments: the geometric mean of both sides' softmax."""

    def __init__(self, rows: Ints, columns: Ints) -> None:
        self.sides = []
        for index in (rows, columns):
            order = np.argsort(index, kind="stable")
            starts = np.flatnonzero(np.diff(index[order], prepend=-1))
            place = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(order)))
            back = np.empty_like(place)
            back[order] = place  # of each pair: its unit, among those that have pairs
            self.sides.append((order, starts, back))

    def __call__(self, score: Floats, sharpness: float) -> Floats:
        result = np.ones(len(score))
        for order, starts, unit in self.sides:
            best = np.maximum.reduceat(score[order], starts)
            weight = np.exp(sharpness * (score - best[unit]))
            result *= weight / np.bincount(unit, weight)[unit]
        return np.asarray(np.sqrt(result), dtype=np.float32)


def _exact_assignment(score: Floats, rows: Ints, columns: Ints, shape: tuple[int, int]) -> NDArray[np.intp]:
    """Choose the pairs with the largest total score, each unit at most once, component by component."""
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = shape[0] + shape[1]
    graph = coo_array((np.ones(len(rows)), (rows, columns + shape[0])), shape=(size, size))
    count, component = connected_components(graph, directed=False)
    of = component[rows]
    sizes, heights = (np.bincount(units, minlength=count) for units in (component, component[: shape[0]]))
    place = np.empty(size, dtype=np.int64)  # of each unit in its component, where those of the source come first
    place[np.argsort(component, kind="stable")] = np.arange(size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = [np.flatnonzero(sizes[of] == 2)]  # pairs without rivals
    rest = np.flatnonzero(sizes[of] > 2)
    rest = rest[np.argsort(of[rest], kind="stable")]
    for members in np.split(rest, np.flatnonzero(np.diff(of[rest])) + 1) if len(rest) else ():
        height = heights[of[members[0]]]
        width = sizes[of[members[0]]] - height
        cells = place[rows[members]], place[columns[members] + shape[0]] - height
        gain = np.maximum(score[members] - _UNMATCHED_SCORE, 0)
        if height * width > _MAX_DENSE_CELLS:
            chosen.append(members[_sparse_assignment(gain, *cells, (height, width))])
            continue
        table, pair = np.zeros((height, width)), np.full((height, width), -1)
        table[cells], pair[cells] = gain, members
        picked = pair[linear_sum_assignment(table, maximize=True)]
        chosen.append(picked[picked >= 0])
    everything = np.concatenate(chosen)
    everything = everything[score[everything] > _UNMATCHED_SCORE]
    return np.asarray(everything[np.argsort(columns[everything], kind="stable")], dtype=np.intp)


def _sparse_assignment(gain: Floats, rows: Ints, columns: Ints, shape: tuple[int, int]) -> Ints:
    """Choose pairs with the largest total gain where few of all are given; each row may stay alone and gain nothing."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    height, width = shape
    cost = float(gain.max()) + 1 - gain.astype(np.float64)  # costs of zero would count as no pairs
    alone = np.arange(height)
    table = csr_array(
        (
            np.append(cost, np.full(height, float(gain.max()) + 1)),
            (np.append(rows, alone).astype(np.int32), np.append(columns, width + alone).astype(np.int32)),  # scipy 1.11
        ),
        shape=(height, width + height),
    )
    matched = np.full(height, -1)
    own, other = min_weight_full_bipartite_matching(table)
    matched[own] = other
    return np.flatnonzero(matched[rows] == columns)


def _rivals(
    score: Floats, chosen: NDArray[np.intp], rows: Ints, columns: Ints, shape: tuple[int, int]
) -> tuple[Floats, Ints]:
    """Measure what each chosen pair would lose to its best rival, and find that rival.

    To take a rival pair, two chosen pairs must exchange their units; what is lost by the best such exchange is the
    margin. A unit that is left alone counts as a pair of score ``_UNMATCHED_SCORE``.
    """
    pair_of_row, pair_of_column = np.full(shape[0], -1), np.full(shape[1], -1)
    pair_of_row[rows[chosen]] = chosen
    pair_of_column[columns[chosen]] = chosen
    rest = np.ones(len(score), dtype=bool)
    rest[chosen] = False
    rivals = np.flatnonzero(rest)
    first, second = pair_of_row[rows[rivals]], pair_of_column[columns[rivals]]  # the pairs that would break up
    known = np.append(score, _UNMATCHED_SCORE)  # index -1: alone
    code = rows * shape[1] + columns
    by_code = np.argsort(code, kind="stable")
    wanted = np.where((first >= 0) & (second >= 0), rows[second] * shape[1] + columns[first], -1)
    place = np.minimum(np.searchsorted(code[by_code], wanted), len(code) - 1)
    crossed = np.where(code[by_code][place] == wanted, by_code[place], -1)
    loss = (
        known[first]
        + known[second]
        - score[rivals]
        - np.where((first >= 0) & (second >= 0), known[crossed], _UNMATCHED_SCORE)
    )
    margin = np.append(score, 0.0)
    for broken in (first, second):
        np.minimum.at(margin, broken, np.where(broken >= 0, loss, np.inf))
    runner_up = np.full(shape[1], -1, dtype=np.int64)
    descending = np.argsort(-loss, kind="stable")
    runner_up[columns[rivals][descending]] = rows[rivals][descending]  # the last, cheapest one stays
    return np.asarray(margin[chosen], dtype=np.float32), runner_up[columns[chosen]]


def with_pairs(assignment: Assignment, source: Ints, target: Ints) -> Assignment:
    """Replace the pairs of all places; the source that one had is its next best."""
    rival = np.where(source != assignment.source, assignment.source, assignment.runner_up)
    cues = {**assignment.cues, "name": assignment.names[source, target]}
    return replace(assignment, source=source, target=target, runner_up=rival, cues=cues)
