"""Replacing: a text file that is there as a whole, or as it was."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that it is never there in part: under another name first, then renamed.

    A file that is there is replaced and gives the new one its permissions.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
