"""The command line: ``autoalign COMMAND``, also ``python -m autoalign``.

In order of use:

* ``terminal``: results on stdout, in colours on a terminal; progress and messages on stderr; exit codes.
* ``targets``: sides that arguments name; models are built quietly.
* ``inspection``: what ``inspect`` shows.
* ``commands``: all other commands, and the table of them.
* ``app``: the program: the parser with the options of every command, which command is run, and what is printed of
  errors. It imports torch only to run a command.

It may import everything. A new command is a function of ``app``, which adds its parser, and a row of
``commands.COMMANDS``.
"""

from autoalign.cli.app import main
from autoalign.cli.terminal import COMPLETE, ERROR, INCOMPLETE

__all__ = ["COMPLETE", "ERROR", "INCOMPLETE", "main"]
