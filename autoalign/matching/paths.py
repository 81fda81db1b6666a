"""Paths: the modules and the tensor that a key names, where it is flat, counts layers or has endings too.

A path is as torch would nest the modules: names that hold the whole tree are taken apart at their numbers, layers that
are counted by their types are steps of one list, and collections and endings are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from string import ascii_lowercase

from autoalign.matching.names import kind, words
from autoalign.matching.vocabulary import COLLECTIONS, LAYER_TYPES
from autoalign.plan.keys import common_module, common_prefix, components, numbers, stem
from autoalign.plan.operations import Shape

Path = tuple[str, ...]

MAX_NAMED_SIBLINGS = 3  # siblings that differ in a number and are no list of blocks
_LEAF = re.compile(r"(.+?)_((?:moving|running)_[a-z]+|num_batches_tracked|[^_]+)")  # in "stage1_unit1_bn1_moving_mean"
_GLUED = re.compile(r"(?<=[^_])(?:weight|bias|running_(?:mean|var)|num_batches_tracked)$")
_PIECES = re.compile(rf"{_GLUED.pattern}|\d+|\D+?(?=\d|$|{_GLUED.pattern})")
_MAX_SHARE_OF_LEAVES = 0.2  # of distinct names of tensors among all tensors; a norm has five tensors
_LETTERED = re.compile(r"(.*\d)(([a-z])\3*)")  # the letter, or more than one of it, as in "conv1aa"
_INIT = "~"  # that modules of Haiku were made in ``__init__``
_TYPED = re.compile(r"(.+?)_?(\d+)")  # in "conv2d_4"
_RECURRENT = re.compile(r"((?:weight|bias)_(?:ih|hh|hr)_l)(\d+)(?:_(reverse))?")
_JOINT = re.compile(r"_(?=\d)|(?<=\d)_|(?<=\d[a-z])_")  # in "features_5_conv_2" and "block2a_expand"


def paths_of(keys: Sequence[str], shapes: Sequence[Shape]) -> list[Path]:
    """Return the path of each key.

    A layer's statistics that stand in a collection of their own, as those of Flax do, are taken back to the layer, and
    the names of a flat list of layers are taken apart at their numbers.

    >>> paths_of(["conv2_block1_bn/gamma:0"], [(8,)])
    [('conv2', 'block1', 'bn', 'gamma')]
    """
    whole = [components(key) for key in keys]
    paths = [tuple([name for name in path if name != _INIT]) for path in whole]
    paths = paths if len(set(paths)) == len(set(whole)) else list(whole)
    paths = _with_leaves(_without_endings(paths))
    if len(tops := {path[0] for path in paths if len(path) > 1}) > 1 and tops <= COLLECTIONS:
        paths = [path[1:] if len(path) > 1 else path for path in paths]
    top = len(top_module(paths))
    is_flat = not any(numbers(name) for path in paths for name in path[top + 1 : -1])
    paths = _counted(paths)
    if is_flat:  # the module tree is in one name
        apart = [(*path[:top], *_JOINT.split(path[top]), *path[top + 1 :]) for path in paths]
        modules = {path[:depth] for path in apart for depth in range(len(path))}
        is_flat = not modules.intersection(apart)  # no tensor is a module
        paths = apart if is_flat else paths
    return _with_recurrent_layers(_with_numbers_for_letters(_in_steps(paths, shapes, top, is_flat=is_flat)))


def _with_recurrent_layers(paths: list[Path]) -> list[Path]:
    """Read the layers and directions that torch's recurrent modules have in the names of their tensors as modules.

    >>> _with_recurrent_layers([("rnn", "weight_ih_l0"), ("rnn", "weight_ih_l1"), ("rnn", "weight_ih_l1_reverse")])[1:]
    [('rnn', 'forward', '1', 'weight_ih_l0'), ('rnn', 'reverse', '1', 'weight_ih_l0')]
    """
    layers = {path: found for path in paths if (found := _RECURRENT.fullmatch(path[-1]))}
    counted = {path[:-1] for path, found in layers.items() if found[2] != "0"}
    directed = {path[:-1] for path, found in layers.items() if found[3]}
    return [
        (
            *path[:-1],
            *((layers[path][3] or "forward",) if path[:-1] in directed else ()),
            *((layers[path][2],) if path[:-1] in counted else ()),
            f"{layers[path][1]}0",
        )
        if path in layers
        else path
        for path in paths
    ]


def top_module(paths: Sequence[Path]) -> Path:
    """Return the module that everything is in; the one around it if everything is of one layer."""
    shared = common_module(paths)
    is_layer = all(len(path) == len(shared) + 1 for path in paths)
    return shared[:-1] if is_layer else shared


def _counted(paths: list[Path]) -> list[Path]:
    """Count a name as the first of those with a number after it, as Haiku and Keras name what they make.

    >>> _counted([("linear", "w"), ("linear_1", "w")])
    [('linear_0', 'w'), ('linear_1', 'w')]
    """
    modules = {path[:depth] for path in paths for depth in range(1, len(path))}
    ways = {path: [(*path[:-1], f"{path[-1]}_{number}") for number in (0, 1)] for path in modules}
    first = {path: zeroth[-1] for path, (zeroth, other) in ways.items() if other in modules and zeroth not in modules}
    if not first:
        return paths
    return [tuple(first.get(path[: k + 1], name) for k, name in enumerate(path)) for path in paths]


def _in_steps(paths: list[Path], shapes: Sequence[Shape], top: int, *, is_flat: bool) -> list[Path]:
    """Read lists with the same numbers as one list of steps, each with one member of all.

    They are lists of layers named by their types that have the same widths, as TensorFlow and Keras count the layers of
    each type, or lists in one flat name of which members of one number follow one another.

    >>> names = [f"{name}_{k}" for k in range(4) for name in ("conv2d", "batch_norm")]
    >>> _in_steps([(name, "w") for name in names], [(8,)] * 8, 0, is_flat=False)[:2]
    [('0', 'conv2d', 'w'), ('0', 'batch_norm', 'w')]
    """
    inner = {path[:depth] for path in paths for depth in range(len(path) - 1)}

    def member(path: Path) -> tuple[Path, str, str, Path] | None:
        """Split a path around the name of a list and the number in it."""
        if is_flat:
            is_one = len(path) > top + 2 and path[top + 1].isdecimal()
            return (path[:top], path[top], path[top + 1], path[top + 2 :]) if is_one else None
        found = _TYPED.fullmatch(path[-2]) if len(path) > 1 and path[:-1] not in inner else None
        return (path[:-2], found[1], found[2], path[-1:]) if found else None

    sizes: dict[tuple[Path, str], dict[str, set[int]]] = {}  # list -> number -> sizes of its tensors
    places: dict[tuple[Path, str], dict[str, int]] = {}
    for place, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        if found := member(path):
            sizes.setdefault(found[:2], {}).setdefault(found[2], set()).update(shape)
            places.setdefault(found[:2], {}).setdefault(found[2], place)
    long = {of: members for of, members in sizes.items() if len(members) > MAX_NAMED_SIBLINGS}
    steps: set[tuple[Path, str]] = set()
    for (first, own), (second, other) in combinations(long.items(), 2):
        if first[0] != second[0] or own.keys() != other.keys():
            continue
        of_types = LAYER_TYPES.issuperset((*words(first[1]), *words(second[1])))
        line = sorted((place, int(number)) for of in (first, second) for number, place in places[of].items())
        in_turn = [number for _, number in line]
        if all(own[number] & other[number] for number in own) if of_types else is_flat and in_turn == sorted(in_turn):
            steps |= {first, second}
    if not steps:
        return paths
    return [
        (*found[0], found[2], found[1], *found[3]) if (found := member(path)) and found[:2] in steps else path
        for path in paths
    ]


def _with_numbers_for_letters(paths: list[Path]) -> list[Path]:
    """Read letters after a number as those of a list's members, as in ``block2a`` and ``block2b``.

    >>> _with_numbers_for_letters([("res2a", "w"), ("res2b", "w"), ("res3a", "w"), ("fc6a", "w")])
    [('res2', '0', 'w'), ('res2', '1', 'w'), ('res3', '0', 'w'), ('fc6a', 'w')]
    """
    lists: dict[tuple[Path, str], set[tuple[str, str]]] = {}
    for path in paths:
        for depth, name in enumerate(path):
            if found := _LETTERED.fullmatch(name):
                lists.setdefault((path[:depth], stem(found[1])), set()).add((found[1], found[2]))
    read = set[tuple[Path, str]]()
    for of, members in lists.items():
        letters = {letter for _, letter in members}
        are_counted = letters == set(ascii_lowercase[: len(letters)])  # unlike q, k and v
        read |= {of} if are_counted and len(members) > len({name for name, _ in members}) else set()

    def names(path: Path) -> Iterator[str]:
        for depth, name in enumerate(path):
            found = _LETTERED.fullmatch(name) if read else None
            if found and (path[:depth], stem(found[1])) in read:
                yield from (found[1], str(ord(found[2]) - ord("a")))
            else:
                yield name

    apart = [tuple(names(path)) for path in paths]
    return paths if {path[:depth] for path in apart for depth in range(len(path))}.intersection(apart) else apart


def _without_endings(paths: list[Path]) -> list[Path]:
    """Leave out what follows the names of the tensors: as in TensorFlow's ``bias/.ATTRIBUTES/VARIABLE_VALUE``.

    Most end with it, and have names before it that say what values they are.

    >>> _without_endings([("fc", "w", "ema"), ("fc", "b", "ema"), ("fc", "u")])
    [('fc', 'w'), ('fc', 'b'), ('fc', 'u')]
    """
    last, _ = Counter(path[-1] for path in paths).most_common(1)[0] if paths else ("weight", 0)
    named = [path for path in paths if path[-1] == last]
    ending = common_prefix([path[::-1] for path in named])[::-1] if kind(last)[0] == "other" else ()
    if not ending or min(map(len, named)) == len(ending):
        return paths
    shorter = [path[: -len(ending)] if path[-1] == last else path for path in paths]
    known = sum(kind(path[-len(ending) - 1])[0] != "other" for path in named)
    modules = {path[:depth] for path in shorter for depth in range(len(path))}
    is_one = 2 * known > len(paths) and len(set(shorter)) == len(paths) and modules.isdisjoint(shorter)
    return shorter if is_one else paths


def _with_leaves(paths: list[Path]) -> list[Path]:
    """Split names of layers and of their tensors where all are joined, as in ``arg:bn1_gamma``.

    They are few beside the layers, and most say what they are.
    """
    if len({path[:-1] for path in paths}) != 1:
        return paths
    *above, _ = paths[0]
    names = [name.partition(":")[2] if name.partition(":")[0] in COLLECTIONS else name for *_, name in paths]
    if 2 * sum(bool(_GLUED.search(name)) for name in names) > len(names):
        return [(*above, *path) for path in _pulled_apart(names)]
    found = [match.groups() if (match := _LEAF.fullmatch(name)) else (name,) for name in names]
    are_known = [len(name) > 1 and kind(name[-1])[0] != "other" for name in found]
    if 2 * sum(are_known) < len(paths) or len({name[-1] for name in found}) > len(paths) * _MAX_SHARE_OF_LEAVES:
        return [(*above, name) for name in names]
    return [(*above, *name) for name in found]


def _pulled_apart(names: Sequence[str]) -> Iterator[Path]:
    """Yield the paths of names whose dots were left out, as ``blocks00conv1weight``.

    Numbers of which one begins with zero are those of a module and of one of its children.

    >>> list(_pulled_apart(["blocks00conv1weight", "blocks110bias", "decay"]))
    [('blocks', '0', '0', 'conv', '1', 'weight'), ('blocks', '11', '0', 'bias'), ('decay',)]
    """
    pieces = [_PIECES.findall(name) for name in names]
    pairs = {text for of in pieces for text, number in pairwise(of) if number[0] == "0" != number}
    for of in pieces:
        path = of[:1]
        for text, piece in pairwise(of):
            path += [piece[:-1], piece[-1]] if text in pairs and piece[:-1].isdigit() else [piece]
        yield tuple(path)


def shared_depth(first: Path, second: Path) -> int:
    """Return how many modules two layers are both in."""
    depth = 0
    for own, other in zip(first, second, strict=False):
        if own != other:
            break
        depth += 1
    return depth
