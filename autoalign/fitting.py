r"""Numbers in keys: which function of a source's numbers gives those of its target.

``blocks.7`` becomes ``layers.7`` (as it is), ``stages.0`` was ``layer1`` (an offset), a flat list meets a nested one
(quotient and remainder, or a table where stages are uneven). What is fitted is exact on all that was seen, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from autoalign.indices import shifted

Rows = Mapping[tuple[int, ...], int]  # numbers of a source up to some place, the same for all -> number of its target

_SEEN = 3  # distinct numbers from which on more than an offset is believed
_LARGEST = 64  # quotient or table worth trying


def function_of(pairs: Iterable[tuple[tuple[int, ...], int]]) -> dict[tuple[int, ...], int] | None:
    """Collect which number follows from which, or None where it does not always."""
    table: dict[tuple[int, ...], int] = {}
    return table if all(table.setdefault(numbers, value) == value for numbers, value in pairs) else None


def fitted(rows: Rows) -> tuple[int, str] | None:
    r"""Find the simplest arithmetic that gives each number of the target from the last numbers of the source.

    >>> fitted({(1,): 0, (2,): 1, (3,): 2})
    (1, '\\1 - 1')
    >>> fitted({(0,): 0, (1,): 0, (2,): 1, (3,): 1, (4,): 2})
    (2, '\\1 // 2')
    >>> fitted({(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3, (1, 2): 4, (2, 0): 5})
    (4, '(0, 2, 5)[\\1] + \\2')
    >>> fitted({(0,): 3, (1,): 3}) is None
    True

    Returns:
        How simple it is (0 is the simplest) and the arithmetic, or None; a number that does not vary has none.
    """
    if len(set(rows.values())) < 2:
        return None
    place = len(next(iter(rows)))
    own = function_of((numbers[-1:], value) for numbers, value in rows.items())
    if own and (found := next(_of_one({number: value for (number,), value in own.items()}, f"\\{place}"), None)):
        return found
    both = function_of((numbers[-2:], value) for numbers, value in rows.items()) if place > 1 else None
    return next(_of_two(both, f"\\{place - 1}", f"\\{place}"), None) if both and len(both) >= _SEEN else None


def _of_one(pairs: Mapping[int, int], name: str) -> Iterator[tuple[int, str]]:
    distances = {value - number for number, value in pairs.items()}
    if len(distances) == 1:
        (distance,) = distances
        yield int(distance != 0), shifted(name, distance)
    if len(pairs) < _SEEN:
        return
    first, last = min(pairs), max(pairs)
    for unit in range(2, min(last - first + 1, _LARGEST) + 1):
        for offset in sorted(range(1 - unit, unit), key=abs):
            base = f"({shifted(name, offset)})" if offset else name
            quotients = {value - (number + offset) // unit for number, value in pairs.items()}
            if len(quotients) == 1:
                yield 2, shifted(f"{base} // {unit}", quotients.pop())
            remainders = {value - (number + offset) % unit for number, value in pairs.items()}
            if len(remainders) == 1:
                yield 2, shifted(f"{base} % {unit}", remainders.pop())
    slope, rest = divmod(pairs[last] - pairs[first], last - first)
    if not rest and slope > 1:
        starts = {value - slope * number for number, value in pairs.items()}
        if len(starts) == 1:
            yield 2, shifted(f"{slope}*{name}", starts.pop())
    if last - first + 1 == len(pairs):
        yield 5, f"({', '.join(str(pairs[number]) for number in range(first, last + 1))})[{shifted(name, -first)}]"


def _of_two(pairs: Mapping[tuple[int, ...], int], outer: str, inner: str) -> Iterator[tuple[int, str]]:
    bases: dict[int, set[int]] = {}
    for (number, member), value in pairs.items():
        bases.setdefault(number, set()).add(value - member)
    if any(len(base) > 1 for base in bases.values()) or len(bases) < 2:
        return
    starts = {number: base.pop() for number, base in bases.items()}
    first, last = min(starts), max(starts)
    slope, rest = divmod(starts[last] - starts[first], last - first)
    if not rest and slope > 0 and all(start == starts[first] + slope * (n - first) for n, start in starts.items()):
        yield 3, shifted(f"{slope}*{outer} + {inner}", starts[first] - slope * first)
    elif last - first + 1 == len(starts):
        table: Sequence[int] = [starts[number] for number in range(first, last + 1)]
        yield 4, f"({', '.join(map(str, table))})[{shifted(outer, -first)}] + {inner}"
