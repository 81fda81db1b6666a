"""``autoalign inspect``: what a checkpoint holds."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoalign.cli.options import COMPLETE, Commands, add_format, command

if TYPE_CHECKING:
    from autoalign.checkpoints.checkpoint import Checkpoint


_LONGEST = 60  # characters of an entry of the metadata


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is said of a checkpoint as a whole."""

    kind: str  # of a file, by its content
    elements: int
    bytes: int
    dtypes: dict[str, int]  # to the number of tensors, the most frequent first
    container: str
    containers: tuple[str, ...]
    prefix: str
    tensors_with_prefix: int
    copies: tuple[str, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "inspect",
        "show what a checkpoint holds",
        "Show the tree of modules of a checkpoint of any format, with repeated blocks folded, and with shapes, dtypes "
        "and sizes; which container of several is taken; and prefixes that a wrapper may have put before the names. No "
        "tensor data is read. A model may be named in place of a checkpoint, as in: autoalign inspect timm:resnet50.",
        epilog="exit codes: 0 shown; 2 an error, said on stderr",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a file, an index, or a folder, of any format; or a model")
    parser.add_argument("--depth", metavar="N", type=int, help="levels of modules to show (default: all)")
    parser.add_argument("--container", metavar="NAME", help="which of several state dicts to show, such as ema")
    add_format(parser, ("text", "json", "markdown"))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import json
    from dataclasses import asdict

    from autoalign.checkpoints.checkpoint import checkpoint_of
    from autoalign.cli.targets import side_of
    from autoalign.cli.terminal import show
    from autoalign.reports.module_tree import render_tree, tree_of
    from autoalign.reports.rows import escaped
    from autoalign.reports.text import code, words

    checkpoint = checkpoint_of(side_of(options.checkpoint), container=options.container)
    facts = _facts_of(checkpoint)
    if options.format == "json":
        listed = [{"key": spec.key, "shape": list(spec.shape), "dtype": spec.dtype_name} for spec in checkpoint.specs]
        show(json.dumps({"checkpoint": options.checkpoint, **asdict(facts), "tensors": listed}, indent=2), plain=True)
        return COMPLETE
    tree = render_tree(tree_of(checkpoint.specs), dtype=next(iter(facts.dtypes), ""), depth=options.depth)
    said = _said(facts)
    if options.format == "markdown":
        lines = [f"{code(escaped(options.checkpoint))}", "", *(f"- {words(line)}" for line in said)]
        show("\n".join([*lines, "", "```text", *tree, "```"]))
    else:
        show("\n".join([escaped(options.checkpoint), *(f"  {line}" for line in said), "", *tree]))
    return COMPLETE


def _facts_of(checkpoint: Checkpoint) -> _Facts:
    from collections import Counter
    from pathlib import Path

    from autoalign.checkpoints.formats.detection import format_of
    from autoalign.plan.quantised import named
    from autoalign.reports.module_tree import copies_of, prefix_of

    path = Path(checkpoint.path) if checkpoint.path else None
    dtypes = Counter(spec.dtype_name for spec in checkpoint.specs)
    prefix, count = prefix_of(checkpoint.specs)
    return _Facts(
        kind="model" if path is None else "folder" if path.is_dir() else format_of(path) or "index of shards",
        elements=sum(spec.numel for spec in checkpoint.specs),
        bytes=sum(spec.numel * spec.dtype.itemsize for spec in checkpoint.specs),
        dtypes=dict(dtypes.most_common()),
        container=checkpoint.container,
        containers=checkpoint.containers,
        prefix=prefix,
        tensors_with_prefix=count,
        copies=copies_of(checkpoint.specs),
        metadata=dict(checkpoint.metadata),
        notes=(*checkpoint.notes, *(f"{what}." for what in named(checkpoint.quantised))),
    )


def _said(facts: _Facts) -> list[str]:
    """Write the facts as lines."""
    from autoalign.reports.module_tree import size_text
    from autoalign.reports.rows import escaped

    count = sum(facts.dtypes.values())
    counted = [f"{times:,} {dtype}" for dtype, times in facts.dtypes.items()] if len(facts.dtypes) > 1 else facts.dtypes
    size = f"{facts.elements:,} elements, {size_text(facts.bytes)}"
    lines = [f"{facts.kind}: {count:,} tensors, {size}, {', '.join(counted)}"]
    if len(facts.containers) > 1 or facts.container:
        names = {name: escaped(name) or "the top level" for name in (facts.container, *facts.containers)}
        taken = names.pop(facts.container)
        lines.append(f"container: {taken}" + (f"; others: {', '.join(names.values())}" if names else ""))
    if facts.prefix:
        which = "all keys" if facts.tensors_with_prefix == count else f"{facts.tensors_with_prefix:,} of {count:,} keys"
        lines.append(f"prefix: {escaped(facts.prefix)} of {which}")
    if facts.copies:
        lines.append(f"copies of one network: {', '.join(map(escaped, facts.copies))}")
    if facts.metadata:
        entries = [f"{escaped(key)}={_shortened(escaped(value))}" for key, value in facts.metadata.items()]
        lines.append(f"metadata: {', '.join(entries)}")
    return lines + [f"Note: {escaped(note)}" for note in facts.notes]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
