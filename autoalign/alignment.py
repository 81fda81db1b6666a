"""The result of aligning: an immutable value that says what is loaded from where, what is not, and why."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from autoalign.adaptations import needs_target
from autoalign.errors import AmbiguousAlignmentError, IncompatibleTensorsError, InputError, NothingLoadedError
from autoalign.operations import Copy, Operation
from autoalign.quantised import Members, groups_of, named
from autoalign.specs import TensorSpec, tied_groups

if TYPE_CHECKING:
    from autoalign.checkpoint import Side
    from autoalign.explanation import Explanation
    from autoalign.rules import Rules

Status = Literal["matched", "adapted", "ambiguous", "mismatched", "missing"]
FILLED: frozenset[Status] = frozenset({"matched", "adapted"})


class Caution(str):
    """A note on what could as well be otherwise, which ``load`` and ``convert`` give as a warning too."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to fill a target tensor that was weighed and not taken."""

    sources: tuple[str, ...]
    operation: Operation
    score: float  # on the scale of the chosen match's evidence; comparable within one match only


@dataclass(frozen=True, slots=True)
class Match:
    """One target tensor with the source tensors that fill it."""

    target: str
    sources: tuple[str, ...]  # one key; several for a fused or stacked tensor, in the operation's order
    operation: Operation = field(default_factory=Copy)
    confidence: float = 1.0  # in [0, 1]
    evidence: Mapping[str, float] = field(default_factory=dict, hash=False)  # which cue said what, each in [0, 1]
    alternatives: tuple[Candidate, ...] = ()  # best first
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A target tensor and its counterpart in the source, whose shapes no operation reconciles."""

    key: str
    source_key: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key} {list(self.shape)}  nearest: {self.source_key} {list(self.source_shape)}"


@dataclass(frozen=True, eq=False)
class Alignment:
    """What is loaded into each target key, from where, and what is not.

    Two are equal if all that was decided is, and the keys, shapes, dtypes and ties of both sides, whatever their
    tensors; ``save`` and ``read``, ``pickle`` and ``copy`` give equal ones. Iterating gives ``missing_keys`` and
    ``unexpected_keys``, so that ``missing, unexpected = autoalign.load(...)`` works as it does with torch's
    ``load_state_dict``. Instances are made by ``align`` and ``load``.
    """

    matches: tuple[Match, ...]  # what is loaded, in the target's order
    ambiguous: tuple[Match, ...]  # proposals that are not loaded: unsure, or with an equal rival
    mismatched: tuple[Mismatch, ...]
    source_specs: tuple[TensorSpec, ...]
    target_specs: tuple[TensorSpec, ...]
    excluded: frozenset[str] = frozenset()  # keys of either side that include and exclude left out
    notes: tuple[str, ...] = ()  # statements about the whole, such as the choice of a container
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # the source's, read lazily
    target_tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # as they are now

    @cached_property
    def status(self) -> dict[str, Status]:
        """The one status of every target key, in the target's order."""
        kinds: dict[str, Status] = {spec.key: "missing" for spec in self.target_specs}
        kinds.update((mismatch.key, "mismatched") for mismatch in self.mismatched)
        kinds.update((match.target, "ambiguous") for match in self.ambiguous)
        kinds.update((match.target, "adapted" if match.operation.adapts else "matched") for match in self.matches)
        return kinds

    @property
    def missing_keys(self) -> list[str]:
        """Target keys that get nothing: without a counterpart, excluded, mismatched or ambiguous (see ``status``)."""
        return [key for key, status in self.status.items() if status not in FILLED]

    @cached_property
    def unexpected_keys(self) -> list[str]:
        """Source keys that are used for nothing, in the source's order; a key tied to a used one counts as used."""
        used = {key for match in self.matches for key in match.sources}
        storages = {spec.storage for spec in self.source_specs if spec.key in used and spec.storage is not None}
        return [spec.key for spec in self.source_specs if spec.key not in used and spec.storage not in storages]

    @cached_property
    def quantised(self) -> tuple[Members, Members]:
        """The tensors of the source and of the target that are values only together with others, and these, by key."""
        return groups_of(self.source_specs), groups_of(self.target_specs)

    @property
    def left_out(self) -> list[str]:
        """Say of each scheme how many quantised tensors of the source are used for nothing."""
        return named(self.quantised[0], {key for match in self.matches for key in match.sources} | self.excluded)

    @property
    def mismatched_keys(self) -> list[Mismatch]:
        """Counterparts whose shapes no operation reconciles."""
        return list(self.mismatched)

    @property
    def mapping(self) -> dict[str, str]:
        """Checkpoint key to model key, for the matches that take one whole tensor each and adapt nothing.

        A source key that fills several tied target keys is mapped to the first of them.
        """
        pairs: dict[str, str] = {}
        for match in self.matches:
            if len(match.sources) == 1 and not match.operation.takes_part and not match.operation.adapts:
                pairs.setdefault(match.sources[0], match.target)
        return pairs

    @property
    def coverage(self) -> float:
        """The loaded share of the target's elements, in [0, 1]; 1 for a target without elements."""
        numel = {spec.key: spec.numel for spec in self.target_specs}
        total = sum(numel.values())
        return sum(numel[match.target] for match in self.matches) / total if total else 1.0

    @property
    def coverage_of_tensors(self) -> float:
        """The loaded share of the target's tensors, in [0, 1], whatever their sizes; 1 for a target without tensors."""
        return len(self.matches) / len(self.target_specs) if self.target_specs else 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Read the matched target keys' tensors, in the target's names, shapes and order; dtypes are the source's.

        Tensors may be views of the source's, as those of ``nn.Module.state_dict`` are.
        """
        return {match.target: self.tensor(match) for match in self.matches}

    def tensor(self, match: Match, sources: Sequence[Tensor] | None = None) -> Tensor:
        """Read the tensor of one match, of this alignment's ``matches`` or ``ambiguous``.

        Args:
            match: What is to be read.
            sources: Its sources, if they were read already.

        Raises:
            InputError: It is not a match, or the operation keeps values of the target's own, which has none on the
                meta device.
        """
        if not isinstance(match, Match):
            raise InputError(f"Expected a Match, not {type(match).__name__}. Nothing was read.")
        tensors = [self.tensors[key] for key in match.sources] if sources is None else list(sources)
        if needs_target(match.operation):
            tensors.append(self.target_tensors[match.target])
            if tensors[-1].is_meta and not tensors[0].is_meta:
                raise InputError(
                    f"{match.target} is on the meta device and has no values that '{match.operation}' could keep. "
                    "Nothing was changed. Give a model with values, or leave this kind out of adapt."
                )
        (tensor,) = match.operation.apply(tensors)
        return tensor

    def inverse(self) -> Alignment:
        """Turn the alignment round, to save the target back in the source's own names and layout.

        Its ``state_dict`` reads the target, and what was loaded and not changed since comes back bit for bit, in the
        target's dtype. Source tensors of which the target holds nothing, or only a part, are among its
        ``missing_keys``, and so are those whose values were adapted.

        >>> import torch, autoalign
        >>> checkpoint = {f"{name}.weight": torch.rand(2, 4) for name in "qkv"}
        >>> alignment = autoalign.align(checkpoint, {"qkv.weight": torch.empty(6, 4)})
        >>> print(*(f"{match.target} = {match.operation}" for match in alignment.inverse().matches), sep="; ")
        q.weight = split(dim 0, 0:2); k.weight = split(dim 0, 2:4); v.weight = split(dim 0, 4:6)
        """
        from autoalign.inversion import inverted

        return inverted(self)

    def explain(self, key: str) -> Explanation:
        r"""Tell in a few lines why a key of either side is filled from what it is, or is not, and what would change it.

        ``print`` it, or read its fields: the cues of a match with their weights, its rivals, warnings, and the options
        (a line of ``rules=``, ``exclude=``, ``adapt=``, ``min_confidence=``) that would decide otherwise. A key that
        both sides have is taken for the target's.

        >>> import torch, autoalign
        >>> alignment = autoalign.align({"fc.bias": torch.ones(2)}, {"head.bias": torch.zeros(2)}, exclude="fc")
        >>> print(alignment.explain("head.bias"))
        head.bias (target): missing
          [2] float32 gets nothing, and keeps its values
          why: the source tensors of this shape are excluded
          why: The source holds no tensors.
          to change it: exclude='head.bias', if it is to be trained anew

        Raises:
            InputError: Neither side has the key; close ones are named.
        """
        from autoalign.explanation import explained

        return explained(self, key)

    def rules(self) -> Rules:
        r"""Find the shortest ordered list of renamings and operations that does what the alignment does.

        On this pair it gives exactly this alignment's ``state_dict``, which is checked when it is made. Sizes and
        numbers of layers are left open where they can be, so that rules hold for deeper and wider networks of the kind.

        >>> import torch, autoalign
        >>> checkpoint = {f"layers.{i}.fc.weight": torch.rand(i + 1, 9) for i in range(3)}
        >>> model = {f"blocks.{i}.linear.weight": torch.empty(i + 1, 9) for i in range(3)}
        >>> print(autoalign.align(checkpoint, model).rules())
        ^layers\.(\d+)\.fc\. -> blocks.\1.linear.
        """
        from autoalign.induction import induced

        return induced(self)

    def to_dict(self) -> dict[str, Any]:
        """Give the alignment as plain data that JSON can hold: both sides' keys and shapes, matches, operations, notes.

        >>> import torch, autoalign
        >>> autoalign.align({"a": torch.ones(2)}, {"b": torch.zeros(2)}, rules={"a": "b"}).to_dict()["matches"]
        [{'target': 'b', 'sources': ['a'], 'confidence': 1.0, 'evidence': {'rule': 1.0}}]
        """
        from autoalign.saving import alignment_to_plain

        return alignment_to_plain(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the alignment to a JSON file, for ``read``; a file that is there is replaced as a whole.

        Raises:
            OutputError: The file cannot be written there.
        """
        from autoalign.saving import save

        save(self, path)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Alignment:
        """Read an alignment that was saved.

        It holds no tensors yet: give it to ``load(model, checkpoint, alignment=...)``, or to ``applied_to``.

        Raises:
            InputError: The file is no saved alignment, or one of another version.
        """
        from autoalign.saving import read

        return read(path)

    def applied_to(self, source: Side, target: Side, *, container: str | None = None) -> Alignment:
        """Apply the alignment to a pair of the same keys and shapes, without matching.

        >>> import torch, autoalign
        >>> first, second = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
        >>> autoalign.align(first, {"b.a": torch.ones(2)}).applied_to(second, {"b.a": torch.ones(2)}).state_dict()
        {'b.a': tensor([0., 0.])}

        Args:
            source: The checkpoint, in any of the forms that ``align`` takes.
            target: The model, in any of the same forms.
            container: Which of several state dicts in the checkpoint to use.

        Raises:
            PairMismatchError: Keys or shapes differ from those that the alignment was made for; the text lists them.
        """
        from autoalign.saving import applied

        return applied(self, source, target, container=container)

    def raise_if_incomplete(self) -> None:
        """Raise unless every target key is matched and every source key is used.

        As ``assert_consumed`` of TensorFlow's restore status. Excluded keys count as missing and unexpected.

        Raises:
            IncompatibleTensorsError: Lists every missing, mismatched, ambiguous and unexpected key, with both shapes.
        """
        if self.missing_keys or self.unexpected_keys:
            from autoalign.report import incomplete_message

            raise IncompatibleTensorsError(incomplete_message(self), self)

    def raise_if_missing(self) -> None:
        """Raise unless every target key is matched, as TensorFlow's ``assert_existing_objects_matched``.

        Raises:
            IncompatibleTensorsError: Lists every missing, mismatched and ambiguous key, with both shapes.
        """
        if self.missing_keys:
            from autoalign.report import incomplete_message

            raise IncompatibleTensorsError(incomplete_message(self, unexpected=False), self)

    def raise_if_unexpected(self) -> None:
        """Raise unless every source key is used.

        Raises:
            IncompatibleTensorsError: Lists every unexpected key, with its shape and that of what comes near.
        """
        if self.unexpected_keys:
            from autoalign.report import incomplete_message

            raise IncompatibleTensorsError(incomplete_message(self, missing=False), self)

    def raise_if_nothing_matched(self) -> None:
        """Raise if no target key is matched, as TensorFlow's ``assert_nontrivial_match``.

        Raises:
            NothingLoadedError: Lists the first keys of both sides, with their shapes.
        """
        if not self.matches:
            from autoalign.report import nothing_message

            raise NothingLoadedError(nothing_message(self), self)

    def raise_if_ambiguous(self) -> None:
        """Raise if a target key has proposals that were not loaded because none is clearly right.

        Raises:
            AmbiguousAlignmentError: Lists every ambiguous key with its proposals.
        """
        if self.ambiguous:
            from autoalign.report import ambiguous_message

            raise AmbiguousAlignmentError(ambiguous_message(self), self)

    def to_html(self, path: str | os.PathLike[str], *, title: str = "Alignment report") -> None:
        """Write the report as one HTML file: both module trees, what joins them, and the evidence of each match.

        The file needs nothing but itself and a browser. It is replaced as a whole, or left as it was.

        Args:
            path: Of the file.
            title: Above the report, such as the names of both sides.

        Raises:
            InputError: The file cannot be written there.
        """
        from autoalign.html.document import write

        write(self, path, title=title)

    def render(self, *, width: int = 100, limit: int | None = 40) -> str:
        """Write the report as plain text: totals, what is matched how, and what is not and why.

        Rows of repeated blocks and of siblings are folded where all that is said of them agrees; of their confidences
        the lowest is shown. The same alignment always gives the same text. ``print(alignment)`` shows that of the
        default width and limit.

        >>> import torch, autoalign
        >>> alignment = autoalign.align({"a.bias": torch.ones(2)}, {"b.bias": torch.ones(2)}, rules={"^a": "b"})
        >>> print(alignment.render(width=60))
        1 of 1 target tensors are filled from 1 of 1 source tensors.
                     tensors            elements
        matched            1                   2  100.0 % of the target
        <BLANKLINE>
        Matched: source -> target, tensors x shape, lowest confidence, operation
          a.bias -> b.bias  [2]  1.00  copy

        Args:
            width: Characters of a line; a key that is longer is shortened in its middle.
            limit: Lines to aim at; sections that are too long for it are cut, and say so. None writes every row.

        Raises:
            InputError: The width or the limit is no positive number.
        """
        from autoalign.report import plain_text

        if not isinstance(width, int) or width < 1:
            raise InputError(f"width={width!r} is not a positive number of characters. Nothing was written.")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise InputError(f"limit={limit!r} is not a positive number of lines, or None. Nothing was written.")
        return plain_text(self, width=width, limit=limit)

    def _repr_html_(self) -> str:
        """Write the short form of the report that a notebook shows."""
        from autoalign.html.notebook import notebook_html

        return notebook_html(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Alignment):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Hashable, ...]:
        """Return what two alignments have in common if they are equal: all that ``save`` keeps of them."""
        sides = (
            (tuple((spec.key, spec.shape, spec.dtype) for spec in specs), tied_groups(specs))
            for specs in (self.source_specs, self.target_specs)
        )
        return self.matches, self.ambiguous, self.mismatched, self.excluded, self.notes, *sides

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all that was decided and no tensors, as with ``save``."""
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"tensors": {}, "target_tensors": {}}

    def __copy__(self) -> Alignment:
        return self  # it is immutable

    def __deepcopy__(self, memo: dict[int, Any]) -> Alignment:
        return self  # its tensors are those of both sides

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing_keys, self.unexpected_keys))

    def __repr__(self) -> str:
        adapted = sum(match.operation.adapts for match in self.matches)
        if not self.missing_keys and not self.unexpected_keys and not adapted:
            return "<All keys matched successfully>"
        return (
            f"<Alignment: {len(self.matches) - adapted} of {len(self.target_specs)} target keys matched, "
            + (f"{adapted} adapted, " if adapted else "")
            + f"{len(self.missing_keys)} missing, {len(self.unexpected_keys)} unexpected>"
        )

    def __str__(self) -> str:
        return self.render()
