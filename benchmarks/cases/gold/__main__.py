"""Add gold cases from JSON files of their form, or print one: ``python -m benchmarks.cases.gold add FILE...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases.gold.files import FOLDER, read_data, text_of, write


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Add or print cases, and return the exit status: 1 if a case contradicts itself or is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.gold", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="check cases, and write them and their lines in the index")
    adding.add_argument("files", nargs="+", type=Path, help="JSON files, one case each")
    commands.add_parser("show", help="print a case, one tensor a line").add_argument("name")
    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            print(text_of(read_data(options.name, folder)), end="")
            return 0
        for path in options.files:
            entry = write(json.loads(path.read_text(encoding="utf-8")), folder)
            print(f"{entry.name}: {entry.gold_tensors} of {entry.target_tensors} target tensors, group {entry.group}")
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
