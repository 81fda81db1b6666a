"""The files of the gold cases: one compressed JSON file a case in ``pairs``, and ``index.csv`` with a line for each."""

from __future__ import annotations

import csv
import hashlib
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.cases.gold.case import GoldCase, elements, faults, from_data, group_of

FOLDER = Path(__file__).parent
_SUFFIX = ".json.xz"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the index."""

    name: str
    family: str
    group: str
    source_tensors: int
    target_tensors: int
    gold_tensors: int  # of the target that the source has something for
    elements: int  # of all tensors of both sides
    digest: str  # of the file's text, so that a change of a compressed file shows in the index


def index(folder: Path = FOLDER) -> list[Entry]:
    """Read the index, which is in the order of names."""
    with (folder / "index.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows)  # the names of the columns
        return [
            Entry(name, family, group, int(source), int(target), int(gold), int(elements), digest)
            for name, family, group, source, target, gold, elements, digest in rows
        ]


def names(only: str = "", *, most_tensors: int | None = None, folder: Path = FOLDER) -> list[str]:
    """List the cases in the order of their names.

    Args:
        only: A text that the names contain.
        most_tensors: Leave out the cases of which a side has more.
        folder: Where they are.
    """
    return [
        entry.name
        for entry in index(folder)
        if only in entry.name
        and (most_tensors is None or max(entry.source_tensors, entry.target_tensors) <= most_tensors)
    ]


def read(name: str, *, with_sorted_keys: bool = False) -> GoldCase:
    """Read a case, with the source's keys in their own order or in the alphabet's, as safetensors files have them."""
    return from_data(read_data(name), with_sorted_keys=with_sorted_keys)


def cases(only: str = "", *, with_sorted_keys: bool = False) -> Iterator[GoldCase]:
    """Read the cases whose name contains a text, one after another."""
    return (read(name, with_sorted_keys=with_sorted_keys) for name in names(only))


def read_data(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Read the content of a case's file.

    Raises:
        FileNotFoundError: There is no case of this name.
    """
    data: dict[str, Any] = json.loads(lzma.decompress(_path(name, folder).read_bytes()))
    return data


def write(data: Mapping[str, Any], folder: Path = FOLDER) -> Entry:
    """Write a case's file and its line in the index; a case of the same name is replaced.

    Raises:
        ValueError: The case contradicts itself. Nothing was written.
    """
    if found := list(faults(data)):
        raise ValueError(f"{data['name']} contradicts itself. Nothing was written.\n" + "\n".join(found[:10]))
    path = _path(data["name"], folder)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lzma.compress(text_of(data).encode()))
    entry = entry_of(data)
    entries = [other for other in index(folder) if other.name != entry.name] if (folder / "index.csv").exists() else []
    with (folder / "index.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [item.name for item in fields(Entry)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(one) for one in sorted([*entries, entry], key=lambda one: one.name))
    return entry


def entry_of(data: Mapping[str, Any]) -> Entry:
    """Make the index line of a case."""
    return Entry(
        data["name"],
        data["family"],
        group_of(data),
        len(data["source"]),
        len(data["target"]),
        from_data(data).gold_count,
        elements(data),
        hashlib.sha256(text_of(data).encode()).hexdigest()[:16],
    )


def text_of(data: Mapping[str, Any]) -> str:
    """Write a case as JSON with one tensor a line, the form that is compressed."""
    lines = [f" {json.dumps(key)}: {_text(value)}" for key, value in data.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _text(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(entry, list) for entry in value):
        return "[\n" + ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value) + "\n ]"
    return json.dumps(value, ensure_ascii=False)


def _path(name: str, folder: Path) -> Path:
    return folder / "pairs" / (re.sub(r"[^A-Za-z0-9_.+-]", "_", name.replace("->", "--")) + _SUFFIX)
