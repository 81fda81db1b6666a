"""The command line: ``autoalign COMMAND``, also ``python -m autoalign``."""

from autoalign.cli.app import main
from autoalign.cli.options import COMPLETE, ERROR, INCOMPLETE

__all__ = ["COMPLETE", "ERROR", "INCOMPLETE", "main"]
