"""The features of layers before matching: words and templates of names, ranks, neighbours, equal names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, starmap
from math import prod

import numpy as np
from numpy.typing import NDArray

from autoalign.matching.layers import Ancestry, cut_apart
from autoalign.matching.names import is_its_norm, shared_with_companions, similar_words, word_similarity, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import ROLES
from autoalign.plan.keys import numbers, stem, template

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

# How many numbers of a name a template keeps, counted from its end, and how many of its last components; 0 for all.
# A number may be a repetition (to be replaced) or a role (to be kept); several readings vote together.
TEMPLATES = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 2), (1, 3))
_MAX_NUMBERS_KEPT = 2
_MAX_COMPANIONS = 4  # layers of one number: more are no convolution with its norm

_NUMBER = re.compile(r"\d+")
_NORM_OFFSET = 1.0  # added to the norm of two names, so that names of common words alone say little
_DECAY_PER_LEVEL = 0.7  # of the weight of a word, for each level that it stands above the tensor
_MAX_TABLE_CELLS = 2**21  # of words or names, made at once
_MIN_SHARE_OF_CHILDREN = 0.5  # of two modules of one name that must have common names
_MIN_SHARE_THAT_FITS = 0.9  # of namesakes below different prefixes that must be of reconcilable shapes
_MIN_SHARE_OF_NAMESAKES = 0.5  # of the smaller side's layers, before shared names are believed


@dataclass(frozen=True)
class SideFeatures:
    """What the names and the order of one side show, as arrays."""

    paths: tuple[Path, ...]
    ancestry: Ancestry
    ordered: bool  # siblings stand in the order of registration, not in that of the alphabet
    # Within each ancestor, among the units of the same class that stand equally deep below it:
    rank: NDArray[np.int32]  # [units, depth]: how many come before
    count: NDArray[np.int32]  # [units, depth]: how many there are
    module_size: Ints  # [modules]: units below
    module_rank: Ints  # [modules]: how many modules with the same shapes below come before
    list_rank: Ints  # [modules]: place in the list of siblings that differ in a number; -1 outside lists
    previous: Ints  # [units]: the unit before, within the same numbered block; -1 for the first
    next: Ints  # [units]: the unit after, within the same numbered block; -1 for the last
    place: Ints  # [units]: place in the innermost list of equal modules; -1 outside lists
    length: Ints  # [units]: of that list
    templates: Ints  # [TEMPLATES, units]: id of the unit's template
    places_in_order: tuple[int, ...]  # of the units, where lists are in the order of their numbers
    roles: tuple[frozenset[str], ...]  # of the units: words for a query, a key or a value in their own names

    @cached_property
    def companions(self) -> dict[int, list[int]]:
        """For each unit, those beside it of its number or its name but for the type of layer, or a module's only other.

        As ``norms.2`` and ``convs.2``, or ``pw_conv`` and ``pw_bn``. In order, other norms have the convolution before.
        """
        groups: dict[tuple[Path, tuple[object, ...]], list[int]] = {}
        for unit, path in enumerate(self.paths):
            for key in ((path[:-1], ()), *shared_with_companions(path)):
                groups.setdefault(key, []).append(unit)
        beside: dict[int, set[int]] = {}
        for group in (of for (_, shared), of in groups.items() if 1 < len(of) <= (_MAX_COMPANIONS if shared else 2)):
            for unit in group:
                beside.setdefault(unit, set()).update(group)
        for unit, before in enumerate(self.previous.tolist()) if self.ordered else ():
            if before >= 0 and unit not in beside and is_its_norm(self.paths[unit], self.paths[before]):
                for each in (before, unit):
                    beside.setdefault(each, set()).update((before, unit))
        return {unit: sorted(group - {unit}) for unit, group in beside.items()}

    def precedes(self, first: int, second: int, *, by_number: bool) -> bool | None:
        """Return whether a unit comes before another, by registration; None if it is not known.

        The numbers of members of a list tell it first, where they are all of its names, or ``by_number``.
        """
        own, other = (names[-1] for names in cut_apart(self.paths[first], self.paths[second]) or (("",), ("",)))
        is_list = by_number or (self.ordered and own.isdecimal())
        if is_list and numbers(own) and stem(own) == stem(other):
            return numbers(own) < numbers(other)
        return bool(self.ancestry.order[first] < self.ancestry.order[second]) if self.ordered else None

    @cached_property
    def inside(self) -> dict[Path, list[int]]:
        """The units directly in each module."""
        inside: dict[Path, list[int]] = {}
        for unit, path in enumerate(self.paths):
            inside.setdefault(path[:-1], []).append(unit)
        return inside

    @cached_property
    def contents(self) -> dict[Path, int]:
        """For each module, what is equal where the same layers are below it."""
        below: dict[Path, list[Path]] = {}
        for path in self.paths:
            for depth in range(len(path)):
                below.setdefault(path[:depth], []).append(path[depth:])
        return {module: hash(frozenset(names)) for module, names in below.items()}


def side_features(
    paths: Sequence[Path], ancestry: Ancestry, classes: Ints, class_count: int, *, ordered: bool
) -> SideFeatures:
    """Compute the features of one side."""
    rank, count = _ranks(ancestry, classes, class_count)
    size, module_rank = _modules(ancestry, classes, class_count)
    previous, following = _neighbours(ancestry)
    return SideFeatures(
        tuple(paths),
        ancestry,
        ordered,
        rank,
        count,
        size,
        module_rank,
        _list_ranks(ancestry.nodes),
        previous,
        following,
        *_places(paths, classes),
        _template_ids(paths),
        _places_in_order(paths, ancestry.in_order.tolist()),
        tuple([ROLES.intersection(words(path[-1])) for path in paths]),
    )


def is_alphabetical(keys: Sequence[str]) -> bool:
    """True if keys are sorted, as text or by their numbers, as in many files; then their order is no evidence.

    >>> is_alphabetical(["fc.bias", "fc.weight"]), is_alphabetical(["fc.weight", "fc.bias"])
    (True, False)
    """
    natural = (_NUMBER.sub(lambda number: number[0].zfill(8), key) for key in keys)
    return list(keys) == sorted(keys) or all(key <= following for key, following in pairwise(natural))


def name_scores(source: Sequence[Path], target: Sequence[Path]) -> Floats:
    """Compute the similarity of names between two sides: [source units, target units], at most about 1.

    It is the cosine of the words of two names under the similarity of words; each word is weighted by its rarity on its
    side and by how close to the tensor it stands. Rival words (query against key) count against a pair.
    """
    own, other = _word_weights(source), _word_weights(target)
    if not own.words or not other.words:
        return np.zeros((len(source), len(target)), dtype=np.float32)
    if max(len(own.words) * len(other.words), *map(prod, (own.shape, other.shape))) > _MAX_TABLE_CELLS:
        return _sparse_scores(own, other)
    first, second = own.table(), other.table()
    scores = first @ word_similarity(own.words, other.words) @ second.T
    norms = np.outer(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1))
    return np.asarray(scores / (norms + _NORM_OFFSET), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _WordWeights:
    """The weight of each word in each name of one side: the entries of a table [names, words] that are not zero."""

    words: Sequence[str]
    shape: tuple[int, int]
    places: tuple[Ints, Ints]
    values: Floats

    def table(self) -> Floats:
        table = np.zeros(self.shape, dtype=np.float32)
        table[self.places] = self.values
        return table


def _word_weights(paths: Sequence[Path]) -> _WordWeights:
    """Weigh the words of one side's names."""
    columns: dict[str, int] = {}
    weights: dict[tuple[int, int], float] = {}
    for row, path in enumerate(paths):
        weight = _DECAY_PER_LEVEL ** (len(path) - 1)
        for component in path:  # the last is the nearest; of a word that occurs twice the nearer counts
            for word in words(component):
                weights[row, columns.setdefault(word, len(columns))] = weight
            weight /= _DECAY_PER_LEVEL
    rows, places = np.asarray(list(weights), dtype=np.int64).reshape(-1, 2).T
    rarity = np.log((len(paths) + 1) / np.maximum(np.bincount(places, minlength=len(columns)), 1)) + 0.1
    values = np.asarray(list(weights.values()), dtype=np.float32) * rarity[places]
    return _WordWeights(list(columns), (len(paths), len(columns)), (rows, places), values.astype(np.float32))


def _sparse_scores(source: _WordWeights, target: _WordWeights) -> Floats:
    """Compute the similarity of names where most pairs have no word in common."""
    from scipy.sparse import csr_array

    first, second = (csr_array((side.values, side.places), shape=side.shape) for side in (source, target))
    alike = similar_words(source.words, target.words)
    places = np.asarray(list(alike), dtype=np.int64).reshape(-1, 2).T
    values = np.asarray(list(alike.values()), dtype=np.float32)
    similar = first @ csr_array((values, tuple(places)), shape=(source.shape[1], target.shape[1]))
    norms = [np.sqrt(side.multiply(side).sum(axis=1)) for side in (first, second)]
    scores = np.empty((source.shape[0], target.shape[0]), dtype=np.float32)
    step = max(_MAX_TABLE_CELLS // len(scores.T), 1)
    for rows in (slice(start, start + step) for start in range(0, len(scores), step)):
        scores[rows] = (similar[rows] @ second.T).toarray() / (np.outer(norms[0][rows], norms[1]) + _NORM_OFFSET)
    return scores


def _places_in_order(paths: Sequence[Path], in_order: Sequence[int]) -> tuple[int, ...]:
    """Rank units by registration, and members of a list that was registered in another order by their numbers."""
    first: dict[Path, int] = {}
    lists: dict[Path, list[tuple[int, ...]]] = {}
    for unit in in_order:
        path = paths[unit]
        for depth, name in enumerate(path):
            if (member := path[: depth + 1]) not in first:
                first[member] = len(first)
                lists.setdefault((*path[:depth], stem(name)), []).append(numbers(name))
    disordered = {of for of, members in lists.items() if members != sorted(members)}
    start: dict[Path, int] = {}

    def key(path: Path) -> tuple[tuple[int, tuple[int, ...]], ...]:
        found = []
        for depth, name in enumerate(path):
            of = (*path[:depth], stem(name))
            place = first[path[: depth + 1]]
            found.append((start.setdefault(of, place), numbers(name)) if of in disordered else (place, ()))
        return tuple(found)

    places = [0] * len(paths)
    for rank, unit in enumerate(sorted(range(len(paths)), key=lambda unit: key(paths[unit]))):
        places[unit] = rank
    return tuple(places)


def _template_ids(paths: Sequence[Path]) -> Ints:
    readings = list(map(_readings, paths))
    found = []
    for kept, last in TEMPLATES:
        ids: dict[Path, int] = {}
        found.append([ids.setdefault(written[kept][-last:], len(ids)) for written in readings])
    return np.asarray(found, dtype=np.int64)


def _readings(path: Path) -> list[Path]:
    """Return a name with none of its numbers, with the last one, and with the last two.

    >>> _readings(("layer", "3", "0", "conv1"))
    [('layer', '#', '#', 'conv#'), ('layer', '#', '#', 'conv1'), ('layer', '#', '0', 'conv1')]
    """
    written = [*template(path)]
    readings = [tuple(written)]
    for place in range(len(path) - 1, -1, -1):
        for others in range(len(numbers(path[place])) - 1, -1, -1):
            written[place] = _NUMBER.sub("#", path[place], others) if others else path[place]
            readings.append(tuple(written))
            if len(readings) > _MAX_NUMBERS_KEPT:
                return readings
    return readings + readings[-1:] * (_MAX_NUMBERS_KEPT + 1 - len(readings))


def _ranks(ancestry: Ancestry, classes: Ints, class_count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    above = ancestry.ancestors[ancestry.in_order].T.astype(np.int64)  # [depth, leaves]
    depths = np.arange(len(above))[:, None] * (ancestry.node_count + 1)
    groups = ((depths + above) * class_count + classes[ancestry.in_order]).ravel()
    by_group = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[by_group], prepend=groups.min(initial=0) - 1))
    lengths = np.diff(starts, append=len(groups))
    rank, count = np.empty((2, len(groups)), dtype=np.int32)
    rank[by_group] = np.arange(len(groups)) - np.repeat(starts, lengths)
    count[by_group] = np.repeat(lengths, lengths)
    back = ancestry.order
    return rank.reshape(above.shape).T[back], count.reshape(above.shape).T[back]


def _modules(ancestry: Ancestry, classes: Ints, class_count: int) -> tuple[Ints, Ints]:
    """Count the units below each module, and rank modules among those with the same classes of units below."""
    codes = np.random.default_rng(0).integers(1, 2**62, class_count, dtype=np.int64)  # sums tell multisets apart
    content = np.zeros(ancestry.node_count, dtype=np.int64)
    unit, depth = np.nonzero(ancestry.ancestors >= 0)
    module = ancestry.ancestors[unit, depth]
    np.add.at(content, module, codes[classes[unit]])
    seen: Counter[int] = Counter()
    rank = np.zeros(ancestry.node_count, dtype=np.int64)
    for place, below in enumerate(content.tolist()):  # modules are numbered in natural order
        rank[place] = seen[below]
        seen[below] += 1
    return np.bincount(module, minlength=ancestry.node_count), rank


def _list_ranks(nodes: Sequence[Path]) -> Ints:
    """Rank each module, in natural order, among the siblings that differ from it in a number."""
    lists: dict[tuple[Path, str, Path], list[int]] = {}
    for module, path in enumerate(nodes):
        for place in range(len(path) - 1, -1, -1):
            if numbers(path[place]):
                lists.setdefault((path[:place], stem(path[place]), path[place + 1 :]), []).append(module)
                break
    ranks = np.full(len(nodes), -1, dtype=np.int64)
    for members in lists.values():
        if len(members) > 1:
            ranks[members] = np.arange(len(members))
    return ranks


def _neighbours(ancestry: Ancestry) -> tuple[Ints, Ints]:
    """Find the units just before and after each unit, where they belong to the same innermost numbered block."""
    numbered = np.asarray([not path or bool(numbers(path[-1])) for path in ancestry.nodes])
    in_block = (ancestry.ancestors >= 0) & numbered[np.maximum(ancestry.ancestors, 0)]
    block = ancestry.ancestors[np.arange(len(in_block)), in_block.argmax(axis=1)]
    in_order = ancestry.in_order
    together = block[in_order[1:]] == block[in_order[:-1]]
    previous, following = np.full(len(block), -1, dtype=np.int64), np.full(len(block), -1, dtype=np.int64)
    previous[in_order[1:][together]] = in_order[:-1][together]
    following[in_order[:-1][together]] = in_order[1:][together]
    return previous, following


def _places(paths: Sequence[Path], classes: Ints) -> tuple[Ints, Ints]:
    """Find the place of each unit in the innermost list of equal modules around it, and the length of that list."""
    content: dict[Path, list[tuple[Path, int]]] = {}
    for path, of in zip(paths, classes.tolist(), strict=True):
        for depth, name in enumerate(path, start=1):
            if numbers(name):
                content.setdefault(path[:depth], []).append((path[depth:], of))
    lists: dict[tuple[Path, str, frozenset[tuple[Path, int]]], list[Path]] = {}
    for member, below in content.items():
        lists.setdefault((member[:-1], stem(member[-1]), frozenset(below)), []).append(member)
    ranks: dict[Path, tuple[int, int]] = {}
    for members in lists.values():
        members.sort(key=lambda member: numbers(member[-1]))
        ranks.update((member, (rank, len(members))) for rank, member in enumerate(members) if len(members) > 1)
    place, length = np.full(len(paths), -1, dtype=np.int64), np.zeros(len(paths), dtype=np.int64)
    for index, path in enumerate(paths):
        for depth in range(len(path), 0, -1):
            if numbers(path[depth - 1]) and path[:depth] in ranks:
                place[index], length[index] = ranks[path[:depth]]
                break
    return place, length


def namesakes(
    source: Sequence[Path],
    target: Sequence[Path],
    counts: tuple[Ints, Ints] | None = None,
    fits: Callable[[int, int], bool] | None = None,
) -> list[tuple[int, int]]:
    """Pair the layers of equal name up to one prefix on either side, if most of one side has them.

    A name is believed only where the modules around it have most children in common, lists of another length aside:
    ``layers.0`` beside ``proj_in`` and ``proj_out`` need not be the ``layers.0`` of a module that has neither.
    The name of a module that is its parent's only child, as in a wrapper, does not count.

    >>> namesakes([("a", "module", "0"), ("b", "module")], [("a", "0"), ("b",), ("head",)])
    [(0, 0), (1, 1)]

    Args:
        source: The layers of the source.
        target: Those of the target.
        counts: How many layers each of them stands for; by default one.
        fits: True for two layers whose shapes can be reconciled; where a prefix was removed, those of most namesakes
            must be.
    """
    each = counts or (np.ones(len(source), dtype=np.int64), np.ones(len(target), dtype=np.int64))
    source, target = _unwrapped(source), _unwrapped(target)
    smaller = each[int(each[1].sum() < each[0].sum())]
    least = int(np.searchsorted(np.cumsum(np.sort(smaller)[::-1]), _MIN_SHARE_OF_NAMESAKES * smaller.sum())) + 1
    prefixes = _prefixes(source, target, least)
    if prefixes is None:
        return []
    own, other = prefixes
    place = {path[len(own) :]: index for index, path in enumerate(source) if path[: len(own)] == own}
    pairs = [
        (place[path[len(other) :]], index)
        for index, path in enumerate(target)
        if path[: len(other)] == other and path[len(other) :] in place
    ]
    if share_of(pairs, each) < _MIN_SHARE_OF_NAMESAKES:
        return []
    if fits and own != other and sum(fits(*pair) for pair in pairs) < _MIN_SHARE_THAT_FITS * len(pairs):
        return []
    children = _children(source, own), _children(target, other)
    trusted: dict[Path, bool] = {(): True}

    def trust(path: Path) -> bool:
        if path not in trusted:
            own, other = ({stem(name) for name in known.get(path, ())} for known in children)
            trusted[path] = trust(path[:-1]) and len(own & other) >= _MIN_SHARE_OF_CHILDREN * len(own | other)
        return trusted[path]

    shifted = _shifted(source, own, target, other)

    def renumbered(path: Path) -> bool:
        return any((path[:depth], stem(path[depth])) in shifted for depth in range(len(path)))

    found = [(i, j) for i, j in pairs if trust(source[i][len(own) : -1])]
    found = [(i, j) for i, j in found if not renumbered(source[i][len(own) :])] if shifted else found
    return _without_moved(found, source, fits) if fits else found


def _without_moved(
    pairs: Sequence[tuple[int, int]], source: Sequence[Path], fits: Callable[[int, int], bool]
) -> list[tuple[int, int]]:
    """Leave out layers that moved to another module of a list, as a downsampling from the end of each stage.

    No layer of such a name fits its namesake, and some fit that of another.
    """
    alike: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for i, j in pairs:
        alike[template(source[i])].append((i, j))
    unfit = {name for name, same in alike.items() if not any(starmap(fits, same)) and any("#" in own for own in name)}
    if not unfit:
        return list(pairs)
    members: dict[Path, list[int]] = defaultdict(list)
    for i, path in enumerate(source):
        members[template(path)].append(i)
    moved = {name for name in unfit if any(fits(i, j) for i in members[name] for _, j in alike[name])}
    return [pair for name, same in alike.items() if name not in moved for pair in same]


def _shifted(source: Sequence[Path], own: Path, target: Sequence[Path], other: Path) -> set[tuple[Path, str]]:
    """Find the lists whose numbers start elsewhere on the other side, so that equal numbers mean nothing."""
    lists: tuple[dict[tuple[Path, str], set[tuple[int, ...]]], ...] = ({}, {})
    for known, paths, prefix in zip(lists, (source, target), (own, other), strict=True):
        for path in paths:
            for depth in range(len(prefix), len(path)):
                if place := numbers(path[depth]):
                    known.setdefault((path[len(prefix) : depth], stem(path[depth])), set()).add(place)
    return {
        name
        for name, places in lists[0].items()
        if len(places) > 1
        and (there := lists[1].get(name, places)) != places
        and min(there) != min(places)
        and not (there <= places or places <= there)
    }


def share_of(pairs: Sequence[tuple[int, int]], counts: tuple[Ints, Ints]) -> float:
    """Return the share of the smaller side's layers that is paired; each counts as the number that it stands for."""
    side = int(counts[1].sum() < counts[0].sum())
    return sum(int(counts[side][pair[side]]) for pair in pairs) / max(int(counts[side].sum()), 1)


def _unwrapped(paths: Sequence[Path]) -> Sequence[Path]:
    """Leave out the names of modules that are only children, unless they are numbered or hold tensors."""
    children = _children(paths, ())
    alone = {path for path, names in children.items() if len(names) == 1 and not numbers(*names)}.difference(paths)
    if not alone:
        return paths
    return [tuple(name for depth, name in enumerate(path) if path[:depth] not in alone) or path for path in paths]


def _prefixes(source: Sequence[Path], target: Sequence[Path], least: int) -> tuple[Path, Path] | None:
    """Find the prefixes of at least so many names whose removal leaves the most in common; the first of equals."""
    often = [
        {prefix for prefix, count in below.items() if count >= least}
        for below in (Counter(path[:cut] for path in side for cut in range(len(path))) for side in (source, target))
    ]
    above: dict[Path, list[Path]] = defaultdict(list)
    for path in source:
        for cut in range(len(path)):
            above[path[cut:]] += [path[:cut]] if path[:cut] in often[0] else []
    votes = Counter[tuple[Path, Path]]()
    for path in target:
        cut = next((cut for cut in range(len(path)) if path[cut:] in above), 0)
        if path[:cut] in often[1]:
            votes.update((prefix, path[:cut]) for prefix in above.get(path[cut:], ()))
    return votes.most_common(1)[0][0] if votes else None


def _children(paths: Sequence[Path], prefix: Path) -> dict[Path, set[str]]:
    children: dict[Path, set[str]] = defaultdict(set)
    for path in paths:
        if path[: len(prefix)] == prefix:
            short = path[len(prefix) :]
            for depth, name in enumerate(short):
                children[short[:depth]].add(name)
    return children
