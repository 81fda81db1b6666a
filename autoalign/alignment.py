"""The result of aligning: a plan that can be explained, reported, saved, inverted and turned into rules."""

from __future__ import annotations

import os
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from autoalign.errors import InputError
from autoalign.plan.matches import Plan, inverted

if TYPE_CHECKING:
    import networkx as nx

    from autoalign.checkpoints.checkpoint import Side
    from autoalign.reports.choices import Choice, Option
    from autoalign.reports.explain import Explanation
    from autoalign.rules.rules import Rules


class Alignment(Plan):
    """What is loaded into each target key, from where, and what is not.

    Two are equal if all that was decided is, and the keys, shapes, dtypes and ties of both sides, whatever their
    tensors; ``save`` and ``read``, ``pickle`` and ``copy`` preserve equality. Iterating gives ``missing_keys`` and
    ``unexpected_keys``, so that ``missing, unexpected = autoalign.load(...)`` works as it does with torch's
    ``load_state_dict``. Instances are made by ``align`` and ``load``.
    """

    @classmethod
    def of(cls, plan: Plan) -> Alignment:
        """Return a plan as an alignment."""
        return cls(**{item.name: getattr(plan, item.name) for item in fields(plan)})

    def inverse(self) -> Alignment:
        """Return the reverse alignment, to save the target back in the source's own names and layout.

        Its ``state_dict`` reads the target, and what was loaded and not changed since comes back bit for bit, in the
        target's dtype. Source tensors of which the target holds nothing, or only a part, are among its
        ``missing_keys``, and so are those whose values were adapted.

        >>> import torch, autoalign
        >>> checkpoint = {f"{name}.weight": torch.rand(2, 4) for name in "qkv"}
        >>> alignment = autoalign.align(checkpoint, {"qkv.weight": torch.empty(6, 4)})
        >>> print(*(f"{match.target} = {match.operation}" for match in alignment.inverse().matches), sep="; ")
        q.weight = split(dim 0, 0:2); k.weight = split(dim 0, 2:4); v.weight = split(dim 0, 4:6)
        """
        return inverted(self)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        r"""What is ambiguous, as choices that a person can make: one for each undecided move, in the target's order.

        A move concerns layers that could be exchanged, a list that may be in another order, or tensors whose layout is
        open, in all blocks at once. Each target key that is ambiguous is in one choice. Its options are the proposal
        and all else that leaves alone what is loaded, each with the ``rules`` that make it.

        >>> import torch, autoalign
        >>> def norms(*names):
        ...     return {f"h.{i}.{name}.weight": torch.ones(4) for i in range(3) for name in names}
        >>> (choice,) = autoalign.align(norms("a", "b"), norms("one", "two")).choices
        >>> for option in choice.options:
        ...     print(*option.rules)
        ('^h\\.(\\d+)\\.a\\.', 'h.\\1.one.') ('^h\\.(\\d+)\\.b\\.', 'h.\\1.two.')
        ('^h\\.(\\d+)\\.b\\.', 'h.\\1.one.') ('^h\\.(\\d+)\\.a\\.', 'h.\\1.two.')
        """
        from autoalign.reports.choices import choices_of

        return choices_of(self)

    def decided(self, *options: Option) -> Alignment:
        """Return the alignment with some of its choices decided, for ``load(model, checkpoint, alignment=...)``.

        It decides what rules cannot say, such as a layout, and leaves all else as it is. Options are those of
        ``choices``, one of each at most.

        Raises:
            InputError: What an option fills is not ambiguous.
        """
        made = {match.target: match for option in options for match in option.matches}
        if unknown := made.keys() - {match.target for match in self.ambiguous}:
            raise InputError(
                f"{min(unknown)!r} is not ambiguous. Nothing was decided. Give options of choices of this alignment."
            )
        return self.revised(made.values())

    def explain(self, key: str) -> Explanation:
        r"""Explain why a key of either side is filled from what it is, or is not, and what would change it.

        ``print`` it, or read its fields: the cues of a match with their weights, its rivals, warnings, and the options
        (a line of ``rules=``, ``exclude=``, ``adapt=``, ``min_confidence=``) that would change it. A key that both
        sides have is taken as the target's.

        >>> import torch, autoalign
        >>> alignment = autoalign.align({"fc.bias": torch.ones(2)}, {"head.bias": torch.zeros(2)}, exclude="fc")
        >>> print(alignment.explain("head.bias"))
        head.bias (target): missing
          [2] float32 is not filled and keeps its values
          why: the source tensors of this shape are excluded
          why: The source has no tensors to match.
          to change it: exclude='head.bias', if it is to be trained anew

        Raises:
            InputError: Neither side has the key; close ones are named.
        """
        from autoalign.reports.explain import explain

        return explain(self, key)

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
        from autoalign.rules.induce import induced

        return induced(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the alignment as plain data, as JSON has it; ``save`` and the command line write the same.

        ``source`` and ``target`` have the ``tensors`` of each side, as key, shape and dtype, and the keys that are
        ``tied``. ``matches`` and ``ambiguous`` have a ``target`` and its ``sources``; where there is no ``operation``,
        it is a copy. ``mismatched`` has pairs of a key of the target and one of the source.

        >>> import torch, autoalign
        >>> autoalign.align({"a": torch.ones(2)}, {"b": torch.zeros(2)}, rules={"a": "b"}).to_dict()["matches"]
        [{'target': 'b', 'sources': ['a'], 'confidence': 1.0, 'evidence': {'rule': 1.0}}]
        """
        from autoalign.reports.serialization import alignment_to_plain

        return alignment_to_plain(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the alignment to a JSON file, for ``read``; a file that is there is replaced as a whole.

        Raises:
            OutputError: The file cannot be written there.
        """
        from autoalign.reports.serialization import save

        save(self, path)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Alignment:
        """Read an alignment that was saved.

        It holds no tensors yet: give it to ``load(model, checkpoint, alignment=...)``, or to ``applied_to``.

        Raises:
            InputError: The file is not a saved alignment, or one of another version.
        """
        from autoalign.reports.serialization import read

        return cls.of(read(path))

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
        from autoalign.reports.serialization import applied

        return applied(self, source, target, container=container)

    def raise_if_incomplete(self) -> None:
        """Raise unless every target key is matched and every source key is used.

        As ``assert_consumed`` of TensorFlow's restore status. Excluded keys count as missing and unexpected.

        Raises:
            IncompatibleTensorsError: Lists every missing, mismatched, ambiguous and unexpected key, with both shapes.
        """
        if self.missing_keys or self.unexpected_keys:
            from autoalign.reports.text import incomplete_error

            raise incomplete_error(self)

    def raise_if_missing(self) -> None:
        """Raise unless every target key is matched, as TensorFlow's ``assert_existing_objects_matched``.

        Raises:
            IncompatibleTensorsError: Lists every missing, mismatched and ambiguous key, with both shapes.
        """
        if self.missing_keys:
            from autoalign.reports.text import incomplete_error

            raise incomplete_error(self, unexpected=False)

    def raise_if_unexpected(self) -> None:
        """Raise unless every source key is used.

        Raises:
            IncompatibleTensorsError: Lists every unexpected key, with its shape and that of what comes near.
        """
        if self.unexpected_keys:
            from autoalign.reports.text import incomplete_error

            raise incomplete_error(self, missing=False)

    def raise_if_nothing_matched(self) -> None:
        """Raise if no target key is matched, as TensorFlow's ``assert_nontrivial_match``.

        Raises:
            NothingLoadedError: Lists the first keys of both sides, with their shapes.
        """
        if not self.matches:
            from autoalign.reports.text import nothing_error

            raise nothing_error(self)

    def raise_if_ambiguous(self) -> None:
        """Raise if a target key has proposals that were not loaded because none is clearly right.

        Raises:
            AmbiguousAlignmentError: Lists every ambiguous key with its proposals.
        """
        if self.ambiguous:
            from autoalign.reports.text import ambiguous_error

            raise ambiguous_error(self)

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write the report as one HTML file: both module trees, the links between them, the evidence of each match.

        The file needs nothing but itself and a browser. It is replaced as a whole, or left as it was.

        Args:
            path: Of the file.
            title: Above the report; by default the file's name or the model's class of each side, where they are known.

        Raises:
            InputError: The file cannot be written there.
        """
        from autoalign.reports.html import write

        write(self, path, title=title)

    def render(self, *, width: int = 100, limit: int | None = 40) -> str:
        """Write the report as plain text: totals, what is matched how, and what is not and why.

        Rows of repeated blocks and of siblings are folded if all else in them agrees; the lowest of their confidences
        is shown. The same alignment always gives the same text. ``print(alignment)`` uses the default width and limit.

        >>> import torch, autoalign
        >>> alignment = autoalign.align({"a.bias": torch.ones(2)}, {"b.bias": torch.ones(2)}, rules={"^a": "b"})
        >>> print(alignment.render(width=60))
        1 of 1 target tensors are filled from 1 of 1 source tensors.
                     tensors       elements
        matched            1              2  100.0 % of the target
        <BLANKLINE>
        Matched: source -> target, tensors x shape, lowest
          confidence, operation
          a.bias -> b.bias  [2]  1.00  copy

        Args:
            width: Characters of a line; a key that is longer is shortened in its middle.
            limit: Lines to aim at; sections that are too long for it are cut, and say so. None writes every row.

        Raises:
            InputError: The width or the limit is not a positive number.
        """
        from autoalign.reports.text import render_text

        if not isinstance(width, int) or width < 1:
            raise InputError(f"width={width!r} is not a positive number of characters. Nothing was written.")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise InputError(f"limit={limit!r} is not a positive number of lines, or None. Nothing was written.")
        return render_text(self, width=width, limit=limit)

    def to_networkx(self, *, proposals: bool = False) -> nx.DiGraph:
        """Return the graph of what corresponds: the module trees of both sides, with an edge for each match.

        Nodes are named ``"source:tensor:KEY"``, ``"source:module:PATH"`` and the same for ``target``; the path of each
        root is empty. All have ``side``, ``kind``, ``path`` (of a tensor, its key), ``elements`` and ``status``. The
        status of a tensor is ``used`` or ``unexpected`` in the source, and that of ``alignment.status`` in the target;
        that of a module is what all tensors in it have, or ``mixed``. Tensors have ``shape`` and ``dtype`` as well, and
        modules ``tensors``, the number of tensors in them.

        Edges have a ``relation``. ``contains`` leads from a module to what it holds, and ``fills`` from a source tensor
        to the target tensor that is made of it, with ``operation``, ``confidence`` and ``inputs``, its place among the
        operation's inputs. So what a source module is used for is among its descendants, and what a target tensor is
        made of among its ancestors. All attributes are texts and numbers, so that ``networkx.write_graphml`` and
        ``networkx.node_link_data`` take the graph as it is.

        >>> import networkx, torch, autoalign
        >>> checkpoint = {f"attn.{name}.weight": torch.rand(2, 4) for name in "qkv"}
        >>> graph = autoalign.align(checkpoint, {"block.qkv.weight": torch.empty(6, 4)}).to_networkx()
        >>> graph.edges["source:tensor:attn.k.weight", "target:tensor:block.qkv.weight"]["operation"]
        'concatenate(dim 0)'
        >>> sorted(node for node in networkx.descendants(graph, "source:module:attn.k"))
        ['source:tensor:attn.k.weight', 'target:tensor:block.qkv.weight']

        Args:
            proposals: True to add edges for what is ``ambiguous``, and so not loaded; their relation is ``proposed``.
        """
        from autoalign.reports.serialization import correspondence_graph

        return correspondence_graph(self, proposals=proposals)

    def _repr_html_(self) -> str:
        """Write what a notebook shows: the picture of ``to_html`` in a frame, and the report."""
        from autoalign.reports.html import notebook_html

        return notebook_html(self)

    def __str__(self) -> str:
        return self.render()
