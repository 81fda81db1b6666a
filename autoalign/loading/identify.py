"""Which network a nameless checkpoint is of: ``autoalign.identify``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch

from autoalign.checkpoints.checkpoint import Checkpoint, Side, checkpoint_of
from autoalign.checkpoints.containers import name_words
from autoalign.errors import listed
from autoalign.matching.architectures import (
    Architecture,
    Fingerprint,
    Index,
    Likeness,
    essential,
    fingerprint,
    index,
    likenesses,
    numeric,
    of_equal_blocks,
    shapes_by_name,
)
from autoalign.matching.names import words
from autoalign.plan.keys import LEVELS, stem
from autoalign.plan.operations import Shape
from autoalign.plan.quantised import as_values
from autoalign.plan.specs import TensorSpec
from autoalign.reports.rows import escaped

MIN_SCORE_NEAR = 0.6  # share of the tensors that are common, from which an architecture is called near
_MIN_TENSORS = 8  # of a network that is no coincidence
_MIN_SHARE_OF_PART = 0.2  # of all tensors
_MIN_SCORE_OF_PART = 0.95  # of one module of a checkpoint, to be named in its place
_MAX_PARTS = 12
_MAX_VALUES_READ = 64  # small tensors that are read to see if a network was trained
_ROLES = {  # words of names, and what it means if a tensor is of another shape
    "pos": "another table of positions",
    "patch": "another patch size or other channels",
    "tok": "another vocabulary",
    "mlp": "another MLP ratio",
}
_WRAPPERS = {
    "module": "DDP or DataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_forward_module": "Fabric",
}


@dataclass(frozen=True, slots=True)
class KnownArchitecture:
    """One or several architectures of equal shapes that a checkpoint may be of."""

    architectures: tuple[str, ...]  # library and name, the best first: "timm:resnet18"
    target: str  # the first as the command line takes it: "timm:resnet18(num_classes=10)"
    common: int  # tensors with a counterpart of the same shape
    tensors: int  # of the checkpoint, or of the part that was looked at
    total: int  # of the architecture, without a head that the checkpoint does not have
    names: float  # share of the names, without their numbers, that it has in common with the first
    classes: int | None  # of the checkpoint's head
    roles: tuple[str, ...]  # what is different, such as "another MLP ratio", where names tell
    differences: tuple[str, ...]  # the same by name and shape; none if it is this architecture
    load_with: str  # Python code

    @property
    def label(self) -> str:
        """The names with their libraries, those that several have once: ``resnet18 of torchvision and timm``."""
        libraries: dict[str, list[str]] = {}
        for known in self.architectures:
            library, _, name = known.partition(":")
            libraries.setdefault(name, []).append(library)
        names: dict[str, list[str]] = {}
        for name, found in libraries.items():
            names.setdefault(" and ".join(filter(None, (", ".join(found[:-1]), found[-1]))), []).append(name)
        return listed([f"{listed(own)} of {library}" for library, own in names.items()])


@dataclass(frozen=True, slots=True)
class Identification:
    """What a checkpoint is. ``print`` shows it in words, and a notebook as a table."""

    verdict: str  # "known": all shapes are those of an architecture; "near" to one; or "unknown"
    candidates: tuple[KnownArchitecture, ...]  # the best first; not those that are not near
    tensors: int
    elements: int
    width: int  # the most frequent size of a vector
    depth: int  # members of the longest list
    blocks_like: str | None  # an architecture with the same kind of blocks in other sizes, where none is near
    format: str | None  # of the file
    path: str | None
    wrappers: tuple[str, ...]  # such as "DDP or DataParallel", or what is before all names
    part: str  # the module that was identified, where it is not the whole
    copies: tuple[str, ...]  # others of the same shapes inside, such as an average
    trained: str | None  # what shows if it was trained; None if nothing does
    libraries: Mapping[str, str]  # versions that the known architectures are of

    @property
    def best(self) -> KnownArchitecture | None:
        """The first candidate."""
        return self.candidates[0] if self.candidates else None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON has."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        from autoalign.reports.html import short_html

        rows = [
            (escaped(one.label), f"{one.common:,} of {one.tensors:,}", f"{one.names:.0%}") for one in self.candidates
        ]
        title, *lines = self._lines()
        return short_html(title, lines, {"Architecture, shapes, names": rows})

    def _lines(self) -> Iterator[str]:
        facts = [
            f"{self.tensors:,} tensor{'s' if self.tensors != 1 else ''}",
            *([f"{self.format} file"] if self.format else []),
        ]
        facts += [f"wrapped by {' and '.join(map(escaped, self.wrappers))}"] if self.wrappers else []
        what = "EMA" if any("ema" in name_words(copy) for copy in self.copies) else "another copy"
        facts += [f"{what} inside ({listed([*map(escaped, self.copies)])})"] if self.copies else []
        yield f"{', '.join(facts)}."
        size = " and ".join(
            f"{name} {value:,}" for name, value in (("width", self.width), ("depth", self.depth)) if value
        )
        if not self.candidates:
            like = f" Its blocks are built like those of {self.blocks_like}." if self.blocks_like else ""
            yield f"Unknown: it is near no known architecture{f' ({size})' if size else ''}.{like}"
            return
        best = self.candidates[0]
        share = f"{best.common:,} of {best.total:,} shapes, {best.names:.0%} of the names"
        where = f"In {escaped(self.part)}: " if self.part else ""
        if self.verdict == "known":
            head = f", head of {best.classes:,} classes" if best.classes is not None else ""
            trained = f", {self.trained}" if self.trained else ""
            yield f"{where or 'It is '}{escaped(best.label)} ({share}){head}{trained}."
        else:
            roles = f", with {' and '.join(best.roles)}" if best.roles else ""
            size = size if where else size.capitalize()
            yield f"{where}{size}: no published size; nearest is {escaped(best.label)}{roles} ({share}):"
            yield from (f"  {escaped(difference)}" for difference in best.differences)
        yield f"Load it with: {escaped(best.load_with)}"


def identify(checkpoint: Side, *, container: str | None = None, limit: int = 3) -> Identification:
    """Find out which known architecture a checkpoint is of.

    The shapes of its tensors are compared with those of all architectures of torchvision, timm and mmpretrain, and of
    the families of transformers at their default and published sizes, whatever they are called and in whatever order
    they are. Names decide between equals. Of the data only some small tensors are read, which show if it was trained.

    >>> import torch
    >>> widths = [(64, 3, 7, 7), (64,), (10, 64)]
    >>> print(identify({f"layer{n}": torch.empty(shape) for n, shape in enumerate(widths)}))
    3 tensors.
    Unknown: it is near no known architecture (width 64).

    Args:
        checkpoint: A path, a mapping of tensors, a module, or an open ``Checkpoint``.
        container: Which of several state dicts in it to look at, as in ``open_checkpoint``.
        limit: How many candidates to return at most.

    Raises:
        InputError: The checkpoint is of a kind that cannot be used.
        CheckpointError: The file cannot be read.
    """
    given = checkpoint_of(checkpoint, container=container)
    known = index()
    part, specs, own, found, copies = _best_part(given, known, limit)
    near = [one for one in found if one.score >= MIN_SCORE_NEAR] if own.shapes.total() >= _MIN_TENSORS else []
    like = None if near else of_equal_blocks(own, known)
    is_exact = bool(near) and near[0].is_exact
    prefix = near[0].prefix if near else _plain_wrapper(given.specs)
    return Identification(
        verdict="known" if is_exact else "near" if near else "unknown",
        candidates=tuple(_candidate(one, specs, known, given.path) for one in near),
        tensors=len(given.specs),
        elements=sum(spec.numel for spec in given.specs),
        width=own.width,
        depth=own.depth,
        blocks_like=str(like) if like else None,
        format=given.format,
        path=given.path,
        wrappers=tuple(
            _WRAPPERS.get(name, name) for name in prefix.split(".") if name in _WRAPPERS or (name and not part)
        ),
        part=part.rstrip("."),
        copies=copies,
        trained=_trained(given, specs),
        libraries=known.versions,
    )


def _plain_wrapper(specs: Sequence[TensorSpec]) -> str:
    """Return what wrappers of known names have put before all keys."""
    prefix = ""
    while name := next(
        (name for name in _WRAPPERS if all(spec.key.startswith(f"{prefix}{name}.") for spec in specs)), ""
    ):
        prefix += f"{name}."
    return prefix


_Part = tuple[str, list[TensorSpec], Fingerprint, list[Likeness], tuple[str, ...]]


def _best_part(given: Checkpoint, known: Index, limit: int) -> _Part:
    """Look at the whole, and where that is no known architecture at its large modules; return what is nearest."""
    copies = tuple(name or "the top level" for name in given.copies)
    specs = list(as_values(given.specs, given.quantised, {}, given, given.config).specs)
    own = fingerprint(specs)
    whole: _Part = "", specs, own, likenesses(specs, own, known, limit), copies
    if whole[3] and whole[3][0].is_exact:
        return whole
    best, seen = whole, dict[frozenset[tuple[tuple[int, ...], int]], list[str]]()
    for module, inner in _modules(specs):
        if best[3] and best[3][0].is_exact and len(inner) != len(best[1]):  # neither better nor a copy
            continue
        part = fingerprint(inner)
        content = frozenset(part.shapes.items())
        same = seen.setdefault(content, [])
        if not any(module.startswith(f"{other}.") for other in same):  # and is no copy of itself
            same.append(module.rstrip("."))
        if same != [module.rstrip(".")]:
            continue
        found = likenesses(inner, part, known, limit)
        if found and found[0].score >= _MIN_SCORE_OF_PART and (not best[3] or found[0].score > best[3][0].score):
            best = module, inner, part, found, ()
    if best is whole:
        return whole
    others = [module for module in seen[frozenset(best[2].shapes.items())] if f"{module}." != best[0]]
    return *best[:4], (*copies, *others)


def _modules(specs: Sequence[TensorSpec]) -> list[tuple[str, list[TensorSpec]]]:
    """List the large modules of a checkpoint, with their tensors, the largest first."""
    below: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        for module in list(accumulate(f"{name}." for name in spec.key.split(".", LEVELS)[:-1]))[:4]:
            below.setdefault(module, []).append(spec)
    least = max(_MIN_SHARE_OF_PART * len(specs), _MIN_TENSORS)
    large = [(module, inner) for module, inner in below.items() if least <= len(inner) < len(specs)]
    return sorted(large, key=lambda item: -len(item[1]))[:_MAX_PARTS]


def _candidate(found: Likeness, specs: Sequence[TensorSpec], known: Index, path: str | None) -> KnownArchitecture:
    best = found.architectures[0]
    changed = {} if found.is_exact else _changed(found, specs, known)
    roles = (
        role
        for name in changed
        for word, role in _ROLES.items()
        if word in {each for part in name.split(".") for each in words(part)}
    )
    uncounted = len(specs) - found.own  # counters and other scalars, which any architecture has beside its norms
    return KnownArchitecture(
        architectures=tuple(map(str, found.architectures)),
        target=_target(best, found.classes),
        common=found.common + uncounted,
        tensors=len(specs),
        total=found.total + uncounted,
        names=found.names,
        classes=found.classes,
        roles=tuple(dict.fromkeys(roles)),
        differences=tuple(_differences(found, specs, changed)),
        load_with=f"autoalign.load({_construction(best, found.classes)}, {repr(path) if path else 'checkpoint'})",
    )


def _target(best: Architecture, classes: int | None) -> str:
    """Write what the command line builds an architecture of."""
    if best.library == "transformers":
        return f"{best.library}:{best.builder}"
    if best.library == "mmpretrain":
        options = "" if classes is None else f", head={{'num_classes': {classes}}}"
        return f"{best.library}:get_model(model={best.builder!r}{options})"
    return f"{best}({options})" if (options := _classes_option(best, classes)) else str(best)


def _classes_option(best: Architecture, classes: int | None) -> str:
    if classes is None:
        return "num_classes=0" if best.library == "timm" and best.heads else ""
    return f"num_classes={classes}"


def _construction(best: Architecture, classes: int | None) -> str:
    """Write the Python code that builds an architecture."""
    if best.library == "transformers":
        kind, _, arguments = best.builder.partition("(")
        return f"transformers.{kind}(transformers.{best.config}({arguments})"
    if best.library == "mmpretrain":
        return _target(best, classes).replace(":", ".", 1)
    make = "timm.create_model" if best.library == "timm" else "torchvision.models.get_model"
    options = repr(best.name), best.builder, _classes_option(best, classes)
    return f"{make}({', '.join(filter(None, options))})"


def _changed(found: Likeness, specs: Sequence[TensorSpec], known: Index) -> dict[str, tuple[Shape, Shape]]:
    """Find the names of an architecture that have one other shape in a network: its own, and the architecture's."""
    own, other = shapes_by_name(numeric(specs), found.prefix), known.shapes_by_name(found.architectures[0])
    changed = {}
    for name in [name for name in own if name in other]:
        mine, theirs = own[name] & found.extra.keys(), other[name] & found.missing.keys()
        if len(mine) == len(theirs) == 1:
            changed[name] = mine.pop(), theirs.pop()
    return changed


def _differences(
    found: Likeness, specs: Sequence[TensorSpec], changed: Mapping[str, tuple[Shape, Shape]]
) -> Iterator[str]:
    """Describe what keeps a network from being an architecture: by name where names agree, else by shape."""
    missing, extra = Counter(found.missing), Counter(found.extra)
    own = {essential(spec.shape): list(spec.shape) for spec in numeric(specs)}
    for name, (mine, theirs) in changed.items():
        shapes = [spec.shape for spec in numeric(specs) if stem(spec.key.removeprefix(found.prefix)) == name]
        shapes = [shape for shape in shapes if essential(shape) == mine]
        times = f" ({len(shapes):,} x)" if len(shapes) > 1 else ""
        yield f"{name} is {list(shapes[0])}, not {_in_order(theirs, shapes[0])}{times}"
        extra[mine] -= len(shapes)
        missing[theirs] -= len(shapes)
    for what, left in (("more", +extra), ("fewer", +missing)):
        if left:
            shown = [
                f"{count:,} of {own.get(shape, list(shape[::-1] if len(shape) > 2 else shape))}"
                for shape, count in left.most_common()
            ]
            yield f"{left.total():,} tensor{'s' if left.total() > 1 else ''} {what}: {listed(shown)}"


def _in_order(sizes: Shape, like: Shape) -> list[int]:
    """Put the sorted sizes of a shape into the order of a similar one.

    >>> _in_order((192, 768), (1, 576, 192)), _in_order((3, 16, 16, 768), (768, 1, 16, 16))
    ([1, 768, 192], [768, 3, 16, 16])
    """
    left, result = list((Counter(sizes) - Counter(like)).elements()), list(like)
    for place in sorted(range(len(like)), key=lambda place: like[place] == 1):
        if left and like[place] not in sizes:
            result[place] = left.pop()
    return [*left, *result]


def _trained(given: Checkpoint, specs: Sequence[TensorSpec]) -> str | None:
    """Return what small tensors show: the counters of BatchNorm, or weights of norms that are not 1 any more."""
    counters = [spec for spec in specs if spec.key.endswith("num_batches_tracked")][:1]
    norms = [
        spec for spec in specs if len(spec.shape) == 1 and spec.key.endswith("weight") and spec.dtype.is_floating_point
    ]
    values = [given[spec.key] for spec in (*counters, *norms[:_MAX_VALUES_READ])]
    if not values or any(value.is_meta for value in values):
        return None
    if counters:
        seen = int(values[0].max())
        return f"trained (BatchNorm has seen {seen:,} batches)" if seen else "not trained (BatchNorm has seen no batch)"
    is_initial = all(bool(torch.all(value == 1)) for value in values)
    return (
        "not trained (the weights of all norms are 1)" if is_initial else "trained (the weights of norms differ from 1)"
    )
