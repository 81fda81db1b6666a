"""Unfinished outputs: what of a folder was left by a process that was killed while it wrote there.

A writer makes a hidden folder, writes into it, and removes it when every file is in its place and those that were
replaced are gone. While it is there, the files beside it may be of two outputs, and an index tells which one counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_STAGING = re.compile(r"\.(?P<stem>.+)\.safetensors(?:\.index\.json)?\.[0-9a-f]{8}\.tmp")
_SHARD = r"(?P<mark>-[0-9a-f]{8})?-\d{5}-of-(?P<count>\d{5})"


def staging_name(name: str, mark: str) -> str:
    """Name the hidden folder of an output.

    >>> staging_name("model.safetensors", "0123abcd")
    '.model.safetensors.0123abcd.tmp'

    Args:
        name: Of the file that is put in its place last.
        mark: Eight hexadecimal digits, which no other output has.
    """
    return f".{name}.{mark}.tmp"


def output_pattern(stem: str) -> str:
    """Return the regular expression of the names of an output's files; shards that replace others have a mark."""
    return rf"{re.escape(stem)}({_SHARD})?\.safetensors(\.index\.json)?"


def unfinished(names: Collection[str], listed: Collection[str]) -> set[str]:
    """Find the files of a folder that were left of outputs and belong to none that is whole.

    >>> new = ["model-0123abcd-00001-of-00002.safetensors"]
    >>> old = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    >>> unfinished([*new, *old, ".model.safetensors.index.json.0123abcd.tmp"], old[:1])
    {'model-0123abcd-00001-of-00002.safetensors'}

    Args:
        names: All in the folder.
        listed: The shards that indices in the folder list.
    """
    left: set[str] = set()
    for stem in {found["stem"] for found in map(_STAGING.fullmatch, names) if found}:
        whole = f"{stem}.safetensors"
        has_index = f"{whole}.index.json" in names
        shard = re.compile(rf"{re.escape(stem)}{_SHARD}\.safetensors", re.ASCII)
        groups: dict[tuple[str | None, str], list[str]] = {}
        for name in set(names) - set(listed):
            if part := shard.fullmatch(name):
                groups.setdefault((part["mark"], part["count"]), []).append(name)
        for (mark, count), parts in groups.items():
            if mark or has_index or whole in names or len(parts) < int(count):
                left.update(parts)
        if has_index and whole in names:  # before the one is removed, or the other
            left.add(whole)
    return left
