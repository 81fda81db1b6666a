"""Adapters in a match: they fill those of the other side, or are added to the weights that they change, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autoalign.plan.adapters import (
    Adapters,
    AddTo,
    LowRank,
    adapters_of,
    alpha_of,
    merged_layers,
    of_kind,
    renamed_layers,
    shortened,
)
from autoalign.plan.matches import Caution, Match
from autoalign.plan.operations import output_shapes
from autoalign.plan.parametrised import Parametrised
from autoalign.plan.specs import TensorSpec

_ADDED = "what the adapter changes was added to the model's own weight"

Specs = Sequence[TensorSpec]


@dataclass(frozen=True, slots=True)
class AdapterScope:
    """What takes part of the adapters of both sides, and what becomes of their matches."""

    own: Adapters
    other: Adapters
    combined: tuple[Parametrised, ...]  # what takes the place of tensors of the source
    is_merged: bool
    others: frozenset[str]  # keys of the target that may be filled; all where it is empty
    unscaled: frozenset[str] = frozenset()  # layers of LoRA whose alpha is stated nowhere

    @classmethod
    def of(cls, source: Specs, target: Specs, config: Mapping[str, object], *, merge: bool) -> AdapterScope:
        """Find the adapters of both sides; ``config`` is the source's."""
        own, other = adapters_of(source), adapters_of(target)
        combined: list[Parametrised] = []
        if merge:
            combined = merged_layers(own, target, config, source)
        elif own.layers and other.layers:
            combined = renamed_layers(own, other, target)
        kind = frozenset[str]() if not own.alone or other.alone else of_kind(target, own.alone) or frozenset({""})
        unscaled = {layer for layer, parts in own.layers.items() if "alpha" not in parts and merge}
        unscaled = {layer for layer in unscaled if alpha_of(layer, config) is None}
        return cls(own, other, tuple(combined), merge, kind, frozenset(unscaled))

    @property
    def added(self) -> list[Parametrised]:
        """What is added to weights of the target, and not to those beside it."""
        return [
            each for each in self.combined if isinstance(step := each.operation, LowRank) and "base" not in step.roles
        ]

    def within(self, source: Specs, target: Specs) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Return the tensors of both sides that take part."""
        are_alike = bool(self.own.layers and self.other.layers) and not self.is_merged
        hidden = frozenset() if are_alike else self.own.keys | self.other.keys
        pinned = set(self.pins(target).values())
        if pinned:  # what the model has none of the names of belongs to another one
            lost = {each.key_of_values for each in self.added if each.codes.key not in pinned}
            source = [spec for spec in source if spec.key not in lost]
        others = [spec for spec in target if not self.others or spec.key in self.others]
        return tuple(spec for spec in source if spec.key not in hidden), tuple(
            spec for spec in others if spec.key not in hidden
        )

    def checked(self, matches: Iterable[Match]) -> list[Match]:
        """Return the matches without those of adapters with other tensors, with the changes added to the weights."""
        if not self.own.keys | self.other.keys:
            return list(matches)
        changes = {spec.key for each in self.added for spec in each.specs}
        roles = self.own.roles, self.other.roles
        kept = []
        for match in matches:
            if changes.isdisjoint(match.sources):
                own = {roles[0].get(key, "") for key in match.sources}
                if self.is_merged or own == {roles[1].get(match.target, "")}:
                    kept.append(match)
            elif changes.issuperset(match.sources):
                rivals = tuple(
                    replace(rival, operation=AddTo(rival.operation))
                    for rival in match.alternatives
                    if changes.issuperset(rival.sources)
                )
                step, warnings = AddTo(match.operation), (*match.warnings, _ADDED)
                kept.append(replace(match, operation=step, alternatives=rivals, warnings=warnings))
        return kept

    def untouched(self, target: Specs, matches: Sequence[Match]) -> frozenset[str]:
        """List the keys of a model to which an adapter is added that this does not change."""
        filled = {match.target for match in matches}
        is_added = any(isinstance(match.operation, AddTo) for match in matches)
        return frozenset(spec.key for spec in target) - filled if is_added else frozenset()

    def pins(self, target: Specs) -> dict[str, str]:
        """Pair the layers of an adapter with the weights of their names, but for the names of what holds them all."""
        shapes = {spec.key: spec.shape for spec in target}
        found = {}
        for each in self.added:
            (shape,) = output_shapes(each.operation, [spec.shape for spec in each.specs])
            ends = shortened(each.key_of_values)
            found[each.codes.key] = next((end for end in ends if shapes.get(end) == shape), "")
        keys = [key for key in found.values() if key]
        return {key: codes for codes, key in found.items() if key} if len(keys) == len({*keys}) else {}

    def notes(self, matches: Iterable[Match], untouched: int) -> list[str]:
        """List what became of the adapters."""
        used = {key for match in matches for key in match.sources}
        notes = []
        if self.others == {""}:
            notes.append(
                f"The checkpoint is {self.own.alone} alone, of which the model has none: nothing was matched, since "
                "these are no weights of the network that they are added to."
            )
        if not (self.is_merged or self.other.keys) and self.own.layers:
            notes.append(
                f"{len(self.own.layers)} layers are given as LoRA matrices, which are changes to a network's weights "
                "and no weights: they are not loaded. merge_adapter=True adds them to the weights that they change: "
                "those beside them in the checkpoint, else the model's, which has to hold the network's own by then."
            )
        layers = {layer: parts for layer, parts in self.own.layers.items() if parts["down"].key in used}
        if self.is_merged and layers:
            rest = f"; {untouched} other tensors of the model stay as they are" if untouched else ""
            notes.append(f"Added: {len(layers)} layers of LoRA, each to the weight that it changes{rest}.")
            if unscaled := self.unscaled & layers.keys():
                notes.append(
                    Caution(
                        f"Nothing states the alpha of {len(unscaled)} layers of LoRA: it was taken to be their rank, "
                        "so that the scale is 1, as for files of diffusers. If it is another, have PEFT's "
                        f"adapter_config.json beside the file, or add tensors such as '{min(unscaled)}.alpha'."
                    )
                )
        elif layers and any("alpha" in parts for parts in layers.values()):
            notes.append(
                "The scale of LoRA, alpha / rank, is in tensors 'alpha' of the checkpoint, for which the model has "
                "none: set its own to that."
            )
        unfit = len(self.own.layers) - len(self.combined)
        if self.is_merged and unfit:
            notes.append(
                f"Not added: {unfit} layers of LoRA, whose weights beside them are quantised or of other shapes."
            )
        kinds = Counter(self.own.others.values())
        named = [f"{count} layers of {kind}" for kind, count in kinds.items()]
        named += [f"{self.own.lost} tensors of LoRA whose layers are not whole"] if self.own.lost else []
        if named and (self.is_merged or not self.other.keys):
            advice = " LoRA alone can be added: merge others with the library that made them." if kinds else ""
            notes.append(f"Not {'added' if self.is_merged else 'loaded'}: {', '.join(named)}.{advice}")
        return notes
