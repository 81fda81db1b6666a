"""Moves: other assignments that shapes allow as well as the one that was found.

A score measures a pair against its rivals one at a time. Where two modules have the same shapes below them, all of
their layers could change places at once, and where they stand in every block, in every block at once: then structure
and pooled evidence would say the same as before. A move is such a change: modules that exchange what fills them,
members of a list in another order, parts of blocks that are matched across, layers that are filled from beside what
fills their companions or most of their block, an unused module or layer instead of a used one.
Each kind is found by a function of ``FINDERS``; ``cues`` judges them all alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations, pairwise, product

from autoalign.matching.features import Ints
from autoalign.matching.grids import filled_by_axes
from autoalign.matching.layers import block_around, cut_apart, steps_inside
from autoalign.matching.paths import Path
from autoalign.matching.state import MIN_TRUST_IN_ORDER, Exchange, State, counterparts, paired
from autoalign.plan.keys import common_module, common_prefix, numbers, stem, template

_MAX_UNPAIRED_SHARE = 0.5  # of the layers of two modules: those that have no counterpart in the other
_MAX_UNPAIRED_SHARE_OF_BRANCHES = 0.9  # the same for layers of the same names in members of one list
_MAX_LIST_COMPARED = 6  # members of a list that are all compared: they may be branches rather than blocks
_MAX_SIBLINGS_COMPARED = 12  # siblings of unlike content that are compared; of twice as many, neighbours only
_MIN_LAYERS_OF_BLOCK = 3  # of which most are filled from one module
_MIN_SHARE_OF_BLOCK = 0.6  # of these layers
_MIN_LAYERS_OF_UNUSED = 3  # of a module
_MAX_VACANT = 40  # pairs of a used and an unused layer of one shape in a block that are compared


def exchanges_of(state: State) -> list[Exchange]:
    """Find all exchanges that shapes allow."""
    found = [one for find in FINDERS for one in find(state)]
    return found + list(_elsewhere(state, {unit for one in found for _, unit in one.before}))


def _swapped(state: State) -> Iterator[Exchange]:
    """Find pairs of target modules that share most shapes below, and of layers of one block that have the same."""
    below, alike, paths = state.below, state.alike, state.target.paths
    layers: dict[tuple[Path, int], list[Path]] = {}
    for unit in state.own_of:
        layers.setdefault((block_around(paths[unit]), alike[unit]), []).append(paths[unit])
    siblings: dict[Path, list[Path]] = {}
    for module in below:
        siblings.setdefault(module[:-1], []).append(module)
    kinds = {module: {alike[unit] for unit in units} for module, units in below.items()}
    unit_at = {paths[unit]: unit for unit in state.own_of}

    def content(module: Path) -> object:
        return tuple(sorted([alike[unit] for unit in below[module]]))

    for modules in siblings.values():
        for first, second in _compared(modules, content) if len(modules) > 1 else ():
            if kinds[first].isdisjoint(kinds[second]):
                continue
            pairs, rest = counterparts(state, first, second)
            if len(rest) > _MAX_UNPAIRED_SHARE * (len(rest) + 2 * len(pairs)):
                named = [(a, b) for a, b in pairs if paths[a][len(first) :] == paths[b][len(second) :]]
                rest += [unit for pair in pairs if pair not in named for unit in pair]
                pairs = named if stem(first[-1]) == stem(second[-1]) else []
            if pairs and len(rest) <= _MAX_UNPAIRED_SHARE_OF_BRANCHES * (len(rest) + 2 * len(pairs)):
                yield from _exchanged(state, (first, second), pairs, rest)
    for within in layers.values():
        for first, second in _compared(within, len) if len(within) > 1 else ():
            if first[:-1] != second[:-1]:  # siblings were compared already
                yield from _exchanged_alone(state, unit_at[first], unit_at[second])


def _elsewhere(state: State, compared: set[int]) -> Iterator[Exchange]:
    """Find layers of one shape that were not compared with any other, and stand in an order that is not to be believed.

    Or in another one than those that fill them; then with the layer that has what would be theirs in order.
    """
    own, rank = state.own_of, state.source.places_in_order
    by_number = not (state.source.ordered and state.target.ordered)
    for units in state.in_order:
        for first, second in pairwise(units):
            for one in () if compared.issuperset((first, second)) else _exchanged_alone(state, first, second):
                if state.trust_in_order(one, of_list=False) < MIN_TRUST_IN_ORDER:
                    yield one
        for unit, holder in zip(units, sorted(units, key=lambda unit: rank[own[unit]]), strict=True):
            if unit != holder and unit not in compared:
                ways = (
                    state.source.precedes(own[unit], own[holder], by_number=by_number),
                    state.target.precedes(unit, holder, by_number=by_number),
                )
                if None not in ways and ways[0] != ways[1]:
                    yield from _exchanged_alone(state, unit, holder)


def _exchanged_alone(state: State, first: int, second: int) -> Iterator[Exchange]:
    """Yield the exchange of two layers, with the modules of the same shapes that they are in, and nothing around."""
    modules = state.target.paths[first], state.target.paths[second]
    while all(around := (modules[0][:-1], modules[1][:-1])) and around[0] != around[1]:
        pairs, rest = counterparts(state, *around)
        if rest or len(pairs) != len(state.below[around[0]]):
            break
        modules = around
    tops = cut_apart(*modules) or modules
    pairs, _ = counterparts(state, *modules)
    moved = {unit for pair in pairs for unit in pair}
    rest = [unit for top in tops for unit in state.below[top] if unit not in moved]
    yield from _exchanged(state, modules, pairs, rest, tops[0])


def _exchanged(
    state: State,
    modules: tuple[Path, Path],
    pairs: Sequence[tuple[int, int]],
    rest: Sequence[int],
    top: Path | None = None,
) -> Iterator[Exchange]:
    """Yield the exchanges of the sources of pairs of target units, one for each pair of modules that these are in."""
    by_ends: dict[tuple[Path, Path], list[tuple[int, int]]] = {}  # some may be exchanged and others not
    top = top or modules[0]
    for a, b in pairs:
        ends = cut_apart(state.end(a), state.end(b))
        if ends is not None:
            by_ends.setdefault(ends, []).append((a, b))
    for ends, chosen in by_ends.items():
        anchors = 0
        for unit in rest:
            inside = steps_inside(state.end(unit), ends)
            anchors += (inside[0] - inside[1]) * (1 if state.target.paths[unit][: len(top)] == top else -1)
        own = state.own_of
        yield Exchange(
            modules,
            ends,
            (1, 0),
            tuple([(own[unit], unit) for pair in chosen for unit in pair]),
            tuple([(own[other], unit) for a, b in chosen for unit, other in ((a, b), (b, a))]),
            tuple([(2 * place, 2 * place + 1) for place in range(len(chosen))]),
            anchors=anchors,
        )


def _straightened(state: State) -> Iterator[Exchange]:
    """Find layers of two blocks that are filled across, so that an exchange leaves both more of one piece."""
    spread: dict[tuple[Path, Path], list[Path]] = {}  # names around, and what all that fills a block is in
    for block, units in state.below.items():
        if len(units) > 1:
            ends = [state.end(unit) for unit in units]
            end = common_module(ends)
            if max(map(len, ends)) > len(end) + 1:
                spread.setdefault((template(block[:-1]), end), []).append(block)
    for (_, end), modules in spread.items():
        for first, second in combinations(modules, 2) if len(modules) <= _MAX_SIBLINGS_COMPARED else pairwise(modules):
            yield from _crossed(state, first, second, len(end))


def _crossed(state: State, first: Path, second: Path, depth: int) -> Iterator[Exchange]:
    fills: list[dict[str, list[int]]] = [{}, {}]
    for of, module in zip(fills, (first, second), strict=True):
        for unit in state.below[module]:
            of.setdefault(state.end(unit)[depth], []).append(unit)
    shared = [name for name in fills[0] if name in fills[1]]
    for x, y in combinations(shared, 2):
        around = state.end(fills[0][x][0])[:depth]
        is_alike = len({name.isdecimal() for name in (first[-1], second[-1], x, y)}) == 1
        for own, other in ((x, y), (y, x)):  # the first block would be of ``own``, the second of ``other``
            pairs = paired(state, fills[0][other], fills[1][own], len(first), len(second))
            if not (is_alike or all(state.end(a)[depth + 1 :] == state.end(b)[depth + 1 :] for a, b in pairs)):
                continue  # the target might be a list of blocks, and the source one list for each of their parts
            if not pairs:
                continue
            moved = {unit for pair in pairs for unit in pair}
            rest = [unit for of in fills for name in (x, y) for unit in of[name] if unit not in moved]
            ends = (*around, other), (*around, own)
            anchors = 0
            for unit in rest:
                sign = 1 if state.target.paths[unit][: len(first)] == first else -1
                anchors += sign * (1 if state.end(unit)[depth] == other else -1)
            if anchors < 0:
                yield Exchange(
                    (first, second),
                    ends,
                    (1, 0),
                    tuple([(state.own_of[unit], unit) for pair in pairs for unit in pair]),
                    tuple([(state.own_of[b], a) for p, q in pairs for a, b in ((p, q), (q, p))]),
                    tuple([(2 * place, 2 * place + 1) for place in range(len(pairs))]),
                    True,
                    anchors,
                )


def _compared(modules: Sequence[Path], content: Callable[[Path], object]) -> Iterable[tuple[Path, Path]]:
    """List the siblings that may be swapped; of many those of one content, of a list also those that follow."""
    is_list = all(numbers(module[-1]) for module in modules) and len({stem(module[-1]) for module in modules}) == 1
    if len(modules) <= (_MAX_LIST_COMPARED if is_list else _MAX_SIBLINGS_COMPARED):
        return combinations(modules, 2)
    line = sorted(modules, key=lambda module: numbers(module[-1])) if is_list else modules
    most = _MAX_LIST_COMPARED if is_list else 2 * _MAX_SIBLINGS_COMPARED
    by_content: dict[object, list[Path]] = {}
    for module in line:
        by_content.setdefault(content(module), []).append(module)
    alike = (pairwise(of) if len(of) > most else combinations(of, 2) for of in by_content.values())
    return dict.fromkeys(chain(chain.from_iterable(alike), pairwise(line) if is_list else ()))


def _reordered(state: State) -> Iterator[Exchange]:
    """Find lists of equal members that could be filled in order, in reverse, or by their numbers."""
    lists: dict[tuple[Path, str], dict[Path, list[int]]] = {}
    for module, units in state.below.items():
        if numbers(module[-1]):
            lists.setdefault((module[:-1], stem(module[-1])), {})[module] = units
    for members in lists.values():
        if len(members) < 3:
            continue
        alike: dict[object, list[tuple[Path, Path]]] = {}
        for module, units in members.items():
            ends = [state.end(unit) for unit in units]
            end = ends[0] if state.target.paths[units[0]] == module else common_module(ends)
            content = frozenset(
                [
                    (state.target.paths[u][len(module) :], path[len(end) :], state.alike[u])
                    for u, path in zip(units, ends, strict=True)
                ]
            )
            alike.setdefault((template(end), content), []).append((module, end))
        for same in alike.values():
            if len(same) > 2:
                yield from _permuted(state, sorted(same, key=lambda pair: numbers(pair[0][-1])))


def _permuted(state: State, members: Sequence[tuple[Path, Path]]) -> Iterator[Exchange]:
    modules, ends = zip(*members, strict=True)
    places = [tuple([number for name in end for number in numbers(name)]) for end in ends]
    depths = (depth for depth in range(1, len(ends[0])) if len({end[:depth] for end in ends}) == len(ends))
    depth = next(depths, len(ends[0]))  # so far they differ
    rising = sorted(range(len(places)), key=places.__getitem__)
    by_number = {numbers(end[depth - 1]): place for place, end in enumerate(ends) if len(end) >= depth}
    ways = [rising, rising[::-1]]
    if len(by_number) == len(ends) and by_number.keys() == {numbers(module[-1]) for module in modules}:
        ways.append([by_number[numbers(module[-1])] for module in modules])
    rows = [sorted(state.below[module], key=lambda unit: state.end(unit)[len(end) :]) for module, end in members]
    own, seen = state.own_of, [list(range(len(places)))]
    for way in ways:
        if way in seen:
            continue
        seen.append(way)
        moved = [place for place, new in enumerate(way) if new != place]
        before = [(own[unit], unit) for place in moved for unit in rows[place]]
        after = [
            (own[given], unit) for place in moved for unit, given in zip(rows[place], rows[way[place]], strict=True)
        ]
        width = len(rows[0])
        yield Exchange(
            tuple([modules[place] for place in moved]),
            tuple([ends[place][:depth] for place in moved]),
            tuple([moved.index(way[place]) for place in moved]),
            tuple(before),
            tuple(after),
            tuple([(k * width, (k + 1) * width) for k in range(len(moved) - 1)]),
        )


def _sequenced(state: State) -> Iterator[Exchange]:
    """Find layers in the members of one list that could be filled in the order of the other side."""
    found: dict[tuple[bool, Path, str, tuple[int, ...]], list[list[int]]] = {}
    own = state.own_of
    for (is_target, parent, name, _), sequence in state.sequences.items():
        alike: dict[int, list[int]] = {}
        for unit in sequence:
            alike.setdefault(state.alike[unit], []).append(unit)
        for units in alike.values():
            run = [state.source.places_in_order[own[unit]] for unit in units]
            if run not in (in_order := sorted(run), in_order[::-1]) and len(set(run)) == len(run):
                way = tuple(sorted(range(len(run)), key=run.__getitem__))
                found.setdefault((is_target, parent, name, way), []).append(units)
    for (*_, way), rows in found.items():
        moved = [place for place, new in enumerate(way) if new != place]
        ends = [[state.end(units[place]) for units in rows] for place in moved]
        places = [[state.target.paths[units[place]] for units in rows] for place in moved]
        yield Exchange(
            _tops(places),
            _tops(ends),
            tuple([moved.index(way[place]) for place in moved]),
            tuple([(own[units[place]], units[place]) for place in moved for units in rows]),
            tuple([(own[units[way[place]]], units[place]) for place in moved for units in rows]),
            tuple([(k * len(rows), (k + 1) * len(rows)) for k in range(len(moved) - 1)]),
        )


def _lined_up(state: State) -> Iterator[Exchange]:
    """Find layers of one shape, wherever they are, that could be filled in the order of registration.

    Layers of one name in every block are then filled by ones of no more names than before.
    """
    own, rank = state.own_of, state.source.places_in_order

    def ways(pairs: Iterable[tuple[int, int]]) -> int:
        return len({(state.slots[0][own], state.slots[1][other]) for own, other in pairs})

    for units in state.in_order if state.source.ordered and state.target.ordered else ():
        ends = sorted([own[unit] for unit in units], key=rank.__getitem__)
        for one in _filled_anew(state, dict(zip(units, ends, strict=True))) if len(units) > 2 else ():
            if ways(one.after) <= ways(one.before):
                yield one


def _regridded(state: State) -> Iterator[Exchange]:
    """Find lists of lists that are filled across, although they could be filled axis by axis."""
    for takes in filled_by_axes(state):
        yield from _filled_anew(state, takes)


def _accompanied(state: State) -> Iterator[Exchange]:
    """Find layers, of one list or alone, that could be filled from beside what fills their companions.

    Or by what has companions that fill what is beside them.
    """
    lists: dict[tuple[Path, Path], list[int]] = {}
    for unit in state.own_of:
        path = state.target.paths[unit]
        around = next((depth for depth in reversed(range(len(path))) if numbers(path[depth])), len(path))
        lists.setdefault((path[:around], template(path)), []).append(unit)
    for units in lists.values():
        yield from _filled_anew(state, {unit: state.beside_companions(unit, of_target=True) for unit in units})
        ends = {state.beside_companions(state.own_of[unit], of_target=False): state.own_of[unit] for unit in units}
        yield from _filled_anew(state, {unit: own for unit, own in ends.items() if unit in state.own_of})


def _strayed(state: State) -> Iterator[Exchange]:
    """Find layers of a block that are filled from outside what fills most of it, where that has as many left for them.

    Where that is so in several blocks, what one gives up may be what the next one lacks.
    """
    own, kinds, paths = state.own_of, state.kinds[0], state.source.paths
    ends: dict[Path, list[int]] = {}
    for unit in sorted(range(len(paths)), key=state.source.places_in_order.__getitem__):
        for depth in range(1, len(paths[unit])):
            ends.setdefault(paths[unit][:depth], []).append(unit)
    together: dict[int, int | None] = {}
    for block, units in state.below.items():
        if len(units) < _MIN_LAYERS_OF_BLOCK or not numbers(block[-1]):
            continue
        counts = Counter([end[:depth] for end in map(state.end, units) for depth in range(1, len(end))])
        least = _MIN_SHARE_OF_BLOCK * len(units)
        most = [(len(end), end) for end, count in counts.items() if least <= count < len(units) and any(end)]
        if not most:
            continue
        _, end = max(most)
        taken = {own[unit] for unit in units}
        strayed: dict[int, list[int]] = {}
        for unit in sorted(units, key=state.target.places_in_order.__getitem__):
            if state.end(unit)[: len(end)] != end:
                strayed.setdefault(kinds[own[unit]], []).append(unit)
        takes: dict[int, int | None] = {}
        for kind, like in strayed.items():
            left = [each for each in ends[end] if kinds[each] == kind and each not in taken]
            takes |= zip(like, left, strict=True) if len(left) == len(like) else ()
        yield from _filled_anew(state, takes)
        together |= takes
    yield from _filled_anew(state, together)


def _filled_anew(state: State, fills: Mapping[int, int | None]) -> Iterator[Exchange]:
    """Yield the exchange in which target units take given sources; who had these takes what is given up for them."""
    own, other = state.own_of, state.other_of
    takes = {unit: new for unit, new in fills.items() if new is not None and new != own[unit]}
    free = [own[unit] for unit in takes if own[unit] not in takes.values()]
    for new in list(takes.values()):
        if new in other and other[new] not in takes:
            swap = next((end for end in free if state.kinds[0][end] == state.kinds[0][new]), None)
            if swap is None:
                return
            takes[other[new]] = swap
            free.remove(swap)
    ends = list(dict.fromkeys([*(own[unit] for unit in takes), *takes.values()]))
    if len(takes) > 1 and len(set(takes.values())) == len(takes):
        yield Exchange(
            tuple([state.target.paths[unit] for unit in takes]),
            tuple([state.source.paths[end] for end in ends]),
            tuple([ends.index(new) for new in takes.values()]),
            tuple([(own[unit], unit) for unit in takes]),
            tuple([(new, unit) for unit, new in takes.items()]),
            tuple([(place, place + 1) for place in range(len(takes) - 1)]),
        )


def _tops(groups: Sequence[Sequence[Path]]) -> tuple[Path, ...]:
    """Return the modules that hold some groups of layers, cut where they are told apart."""
    modules = [common_prefix(paths) for paths in groups]
    depth = len(common_prefix(modules)) + 1
    return tuple([module[:depth] for module in modules])


def _unused(state: State) -> Iterator[Exchange]:
    """Find modules with an unused sibling of identical names and shapes, on either side."""
    matched = set(state.own_of.values()), set(state.own_of)
    for is_target, side in enumerate((state.source, state.target)):
        for taken, units, unused, free in _unused_siblings(side.paths, state.kinds[is_target], matched[is_target]):
            yield _instead(state, (taken, unused), units, free, is_target=bool(is_target))


def _vacant(state: State) -> Iterator[Exchange]:
    """Find layers with an unused one of their shape in the same block; how their lists are filled speaks for them."""
    found: list[Exchange] = []
    for is_target, side in enumerate((state.source, state.target)):
        kinds, filled = state.kinds[is_target], set(state.own_of) if is_target else set(state.own_of.values())
        wanted = {int(kinds[unit]) for unit in range(len(side.paths)) if unit not in filled}
        blocks: dict[tuple[Path, int], tuple[list[int], list[int]]] = {}
        for unit, kind in enumerate(kinds.tolist()) if wanted else ():
            if kind in wanted:
                of = blocks.setdefault((block_around(side.paths[unit]), kind), ([], []))
                of[unit in filled].append(unit)
        for free, used in blocks.values():
            for unit, new in product(used, free) if len(used) * len(free) <= _MAX_VACANT else ():
                ways = side.paths[unit], side.paths[new]
                found.append(_instead(state, ways, [unit], [new], is_target=bool(is_target)))
    lists = Counter((template(state.target.paths[j]), template(state.end(j))) for j in (state.own_of if found else ()))
    for one in found:
        was, would = (
            (template(state.target.paths[other]), template(state.source.paths[own]))
            for ((own, other),) in (one.before, one.after)
        )
        yield replace(one, anchors=lists[was] - 1 - lists[would] if was != would else 0)


def _instead(
    state: State, ways: tuple[Path, Path], units: Sequence[int], free: Sequence[int], *, is_target: bool
) -> Exchange:
    """Return the exchange of what is used for what is not, on one side, with what these units correspond to."""
    fills, side = (state.own_of, state.source) if is_target else (state.other_of, state.target)
    others = [fills[unit] for unit in units]
    paths = [side.paths[unit] for unit in others]
    end = common_module(paths) if len(paths) > 1 else paths[0]
    before, after = (
        tuple(zip(others, way, strict=True) if is_target else zip(way, others, strict=True)) for way in (units, free)
    )
    modules, ends = (ways, (end,)) if is_target else ((end,), ways)
    return Exchange(modules, ends, (-1,) if is_target else (1,), before, after)


def _unused_siblings(
    paths: Sequence[Path], kinds: Ints, matched: set[int]
) -> Iterator[tuple[Path, list[int], Path, list[int]]]:
    if len(paths) - len(matched) < _MIN_LAYERS_OF_UNUSED:
        return
    below: dict[Path, list[int]] = {}
    for unit, path in enumerate(paths):
        for depth in range(1, len(path)):
            below.setdefault(path[:depth], []).append(unit)
    siblings: dict[Path, tuple[list[Path], list[Path]]] = {}
    for module, units in below.items():
        if len(units) >= _MIN_LAYERS_OF_UNUSED and len({unit in matched for unit in units}) == 1:
            siblings.setdefault(module[:-1], ([], []))[units[0] in matched].append(module)
    content = {
        module: {paths[unit][len(module) :]: int(kinds[unit]) for unit in below[module]}
        for of in siblings.values()
        if all(of)
        for module in chain(*of)
    }
    for unused, taken in siblings.values():
        for first, second in product(taken, unused):
            is_numbered = numbers(first[-1]) and stem(first[-1]) == stem(second[-1])
            if not is_numbered and content[first] == content[second]:
                rows = [sorted(below[module], key=lambda unit: paths[unit]) for module in (first, second)]
                yield first, rows[0], second, rows[1]


FINDERS = (
    _swapped,
    _straightened,
    _reordered,
    _sequenced,
    _lined_up,
    _regridded,
    _accompanied,
    _strayed,
    _unused,
    _vacant,
)
