"""Gold cases: real pairs of checkpoint and model, with the truth for every target tensor. README.md describes them.

``files`` reads and writes them, ``case`` judges matches by them, ``expressions`` is the form of a truth.
"""

from benchmarks.cases.gold.case import GoldCase
from benchmarks.cases.gold.files import Entry, cases, index, names, read

__all__ = ["Entry", "GoldCase", "cases", "index", "names", "read"]
