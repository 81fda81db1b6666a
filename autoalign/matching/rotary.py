"""Rotary layouts: which rows of a query or key head are rotated together, as names, shapes and configs show it.

Some code rotates each row of the first half of a head with one of the second half, other code each row with its
neighbour (Su et al., 2021). The shapes are the same, and so may be all names; weights of one are turned into those of
the other by a permutation of each head's rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autoalign.checkpoints.checkpoint import Checkpoint
from autoalign.checkpoints.config import ROTARY_SETTINGS, Config
from autoalign.matching.names import role_words, words
from autoalign.matching.paths import Path
from autoalign.matching.vocabulary import (
    GGUF_HALVES,
    GGUF_PAIRS,
    HUGGING_FACE_STYLE,
    KERNELS,
    META_CONFIG,
    META_STYLE,
    PAIRED_TYPES,
)
from autoalign.plan.keys import components, numbers, stem, template
from autoalign.plan.operations import Shape
from autoalign.plan.specs import TensorSpec

Layout = Literal["halves", "pairs"]

ROTATED = frozenset({"q", "k", "qkv"})
_ROLES = ROTATED | {"v", "kv"}
_ROTARY = frozenset({"rotary", "rope", "rot"})  # words of names, and these pairs of them
_FREQUENCIES = frozenset({"inv", "freq"})
_PAIRED_TYPES, _GGUF_PAIRS, _GGUF_HALVES = (
    frozenset(names.split()) for names in (PAIRED_TYPES, GGUF_PAIRS, GGUF_HALVES)
)
_PARTIAL = ("partial_rotary_factor", "rotary_pct", "rotary_percentage")  # the share of a head that is rotated
_MIN_SHARED_NORMS = 0.5  # share of the names of norms that code of one origin has in common


@dataclass(frozen=True, slots=True)
class Tower:
    """A list of blocks."""

    rotated: bool  # whether its queries and keys are likely to be rotated
    positions: bool  # whether a table of positions belongs to it
    norms: frozenset[Path]  # names of its norms


@dataclass(frozen=True, slots=True)
class Projection:
    """A tensor of queries, of keys, or of both."""

    name: Path  # of it and the module around it, without numbers
    tower: Tower


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a side shows of how its queries and keys are rotated."""

    projections: Mapping[int, Projection]  # by the place among the side's tensors
    layout: Layout | None = None  # None where neither a config nor a header tells
    published: bool = False  # whether that implies halves in the code of this network that Hugging Face publishes
    partial: bool = False  # whether the config says that a part of each head is rotated
    hugging_face: bool = False  # whether the names are those of Hugging Face's code


def rotation_of(specs: Sequence[TensorSpec], config: Mapping[str, object]) -> Rotation:
    """Read off a side's names, shapes and config where it rotates queries and keys, and how."""
    paths = [components(spec.key) for spec in specs]
    return replace(_convention(paths, config), projections=_projections(specs, paths))


def rotary_settling(sides: tuple[Checkpoint, Checkpoint], *, sized: bool) -> str:
    """Write what settles all queries and keys whose layout is open: a setting for each side where it is not known.

    With ``sized``, the size of the heads is known.
    """
    known = layouts_of(*(_convention([components(spec.key) for spec in side.specs], side.config) for side in sides))
    lines = []
    for name, side, layout in zip(("checkpoint", "model"), sides, known, strict=True):
        settings: Config = {} if layout else {ROTARY_SETTINGS[0]: False}
        if not sized and name == "model":
            settings["head_dim"] = 64
        if settings and side.module is not None:
            lines.append("; ".join(f"{name}.{setting} = {value}" for setting, value in settings.items()))
        elif settings:
            lines.append(f"{{'model': {name}, 'config': {settings}}} for the {name}")
    return (
        "To settle queries and keys, say whether neighbouring rows are rotated together (True: Meta's code, GGUF's "
        f"llama) or the halves of each head (False: Hugging Face's Llama), as in {' and '.join(lines)}."
        if lines
        else ""
    )


def layouts_of(source: Rotation, target: Rotation) -> tuple[Layout | None, Layout | None]:
    """Return the layouts of two sides; that of Hugging Face's names where the other side shows it."""
    own, other = source.layout, target.layout
    if own is None and source.hugging_face and target.published:
        own = "halves"
    if other is None and target.hugging_face and source.published:
        other = "halves"
    return own, other


def is_same_code(source: Projection, target: Projection, *, hugging_face: bool) -> bool:
    """True if names prove that two tensors are of the same code, or of code that keeps its layout.

    ``hugging_face``: both sides have Hugging Face's names, which fused projections aside are those of vLLM too.
    """
    own, other = source.tower.norms, target.tower.norms
    alike = len(own & other) >= _MIN_SHARED_NORMS * max(min(len(own), len(other)), 1)
    return alike and (hugging_face or source.name == target.name)


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return a config, with that of the language model in it on top."""
    inner = config.get("text_config")
    return {**config, **{str(key): value for key, value in inner.items()}} if isinstance(inner, Mapping) else config


def role_of(path: Path) -> tuple[str, int]:
    """Return the projection of attention that a tensor is of, by the innermost name that says so, and its place.

    >>> role_of(("attn", "in_proj", "query", "weight")), role_of(("mlp", "fc", "weight"))
    (('q', 2), ('', -1))
    """
    for depth in range(len(path) - 1, max(len(path) - 4, -1), -1):
        if found := _ROLES.intersection(words(path[depth])):
            return min(found), depth
    return "", -1


def _convention(paths: Sequence[Path], config: Mapping[str, object]) -> Rotation:
    names = {name for path in paths for name in path}
    hugging_face = names >= HUGGING_FACE_STYLE
    layout, published = _stated(config, names, hugging_face=hugging_face)
    return Rotation({}, layout, published, _is_partial(config), hugging_face)


def _stated(config: Mapping[str, object], names: set[str], *, hugging_face: bool) -> tuple[Layout | None, bool]:
    """Read a layout off a config, and whether it is one of code whose weights Hugging Face publishes as halves.

    What llama.cpp rotates is a fact of its format: ``llama_model_rope_type`` in its ``src/llama-model.cpp`` lists
    architectures of type NORM (pairs of neighbours) and NEOX (halves), and ``undo_permute`` or ``permute`` in its
    converters from Hugging Face's files, in ``conversion/``, reorders the rows for the first.
    """
    for setting in ROTARY_SETTINGS:
        if isinstance(value := text_config(config).get(setting), bool):
            return ("pairs" if value else "halves"), False
    architecture = config.get("general.architecture")
    if isinstance(architecture, str):
        found: Layout | None = (
            "pairs" if architecture in _GGUF_PAIRS else "halves" if architecture in _GGUF_HALVES else None
        )
        return found, found is not None
    kind = text_config(config).get("model_type")
    if (
        hugging_face
        and isinstance(kind, str)
        and not config.keys().isdisjoint(("architectures", "transformers_version"))
    ):
        return ("pairs" if kind.removesuffix("_text") in _PAIRED_TYPES else "halves"), False
    if names >= META_STYLE and config.keys() >= META_CONFIG:
        return "pairs", True
    return None, False


def _is_partial(config: Mapping[str, object]) -> bool:
    known = text_config(config)
    rope = known.get("rope_parameters")
    shares = [of.get(name) for of in (known, rope) if isinstance(of, Mapping) for name in _PARTIAL]
    size = known.get("head_dim")
    return any(isinstance(share, float) and share < 1 for share in shares) or (
        isinstance(rotated := known.get("rotary_dim"), int) and rotated != size
    )


def _projections(specs: Sequence[TensorSpec], paths: Sequence[Path]) -> dict[int, Projection]:
    found: dict[int, tuple[Path, str, Path]] = {}  # place -> module around it, role, name
    inputs: dict[Path, dict[str, int]] = {}  # module -> role -> width of what is projected
    for place, (spec, path) in enumerate(zip(specs, paths, strict=True)):
        role, depth = role_of(path)
        if role not in ROTATED or "lora" in role_words(path) or any("cross" in words(name) for name in path):
            continue
        around = path[:depth]
        name = template((*around[-1:], path[depth]))
        found[place] = around, role, name
        if len(spec.shape) > 1:
            inputs.setdefault(around, {})[role] = spec.shape[0 if path[-1].endswith(KERNELS) else -1]
    convolved = {
        path[:-2] for spec, path in zip(specs, paths, strict=True) if len(spec.shape) == 3 and spec.shape[1] == 1
    }
    attentions = {
        module
        for module, of in inputs.items()
        if ("qkv" in of and module not in convolved) or (len(of) == 2 and len(set(of.values())) == 1)
    }
    if not attentions:
        return {}
    towers = _towers(specs, paths, {tower_path(module) for module in attentions})
    return {
        place: Projection(name, towers[tower_path(around)])
        for place, (around, _, name) in found.items()
        if around in attentions
    }


def tower_path(path: Path) -> Path:
    """Return the list of blocks that holds a module.

    >>> tower_path(("model", "layers", "3", "self_attn")), tower_path(("attn",))
    (('model', 'layers', '#'), ())
    """
    first = next((depth for depth, name in enumerate(path) if numbers(name)), None)
    return () if first is None else (*path[:first], stem(path[first]))


def _towers(specs: Sequence[TensorSpec], paths: Sequence[Path], wanted: set[Path]) -> dict[Path, Tower]:
    named: set[Path] = set()  # towers to which a name of rotation belongs
    positions: set[Path] = set()
    layers: dict[Path, dict[Path, list[Shape]]] = {tower: {} for tower in wanted}  # layer -> shapes of its tensors
    for spec, path in zip(specs, paths, strict=True):
        found = [set(words(name)) for name in path]
        rotary = any(of & _ROTARY or of >= _FREQUENCIES for of in found)
        placed = len(spec.shape) > 1 and any("pos" in of or "rel" in of for of in found)
        if rotary or placed:
            (named if rotary else positions).update(_nearest(path, wanted))
        if not rotary and (tower := tower_path(path[:-1])) in wanted:
            layers[tower].setdefault(path[:-1], []).append(spec.shape)
    return {
        tower: _tower(tower, inside, named=tower in named, positions=tower in positions)
        for tower, inside in layers.items()
    }


def _nearest(path: Path, towers: set[Path]) -> list[Path]:
    """List the towers that a tensor stands nearest to: with which it shares the most of its path."""

    def shared(tower: Path) -> int:
        return next((k for k, (a, b) in enumerate(zip(path, tower, strict=False)) if stem(a) != stem(b)), len(tower))

    most = max(map(shared, towers))
    return [tower for tower in towers if shared(tower) == most]


def _tower(path: Path, layers: Mapping[Path, Sequence[Shape]], *, named: bool, positions: bool) -> Tower:
    norms = {layer: shapes for layer, shapes in layers.items() if all(len(shape) == 1 for shape in shapes)}
    plain = bool(norms) and all(len(shapes) == 1 for shapes in norms.values())  # norms without a bias
    members: dict[Path, Counter[Shape]] = {}
    for layer, shapes in layers.items():
        if not role_of((*layer, ""))[0]:
            member = layer[: max(len(path), 1)]
            members.setdefault(member, Counter()).update(shape[-2:] for shape in shapes if len(shape) > 1)
    gated = any(map(_is_gated, members.values()))
    return Tower(
        rotated=named or (plain and gated and not positions),
        positions=positions and not named,
        norms=frozenset(template(layer[len(path) :]) for layer in norms),
    )


def _is_gated(shapes: Counter[Shape]) -> bool:
    """True if matrices of these shapes hold a layer that is gated: two that widen for each that narrows."""
    return any(
        rows != columns
        and (0 < 2 * shapes[columns, rows] <= count or shapes[2 * columns, rows] or shapes[columns, 2 * rows])
        for (rows, columns), count in shapes.items()
    )
