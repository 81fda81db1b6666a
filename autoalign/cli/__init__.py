"""The command line: ``autoalign COMMAND``, also ``python -m autoalign``.

In order of use:

* ``options``: the parser with the options of every command, and the exit codes.
* ``terminal``: results on stdout, in colours on a terminal; progress and messages on stderr.
* ``app``: the program: which command is run, and what is printed of errors. Up to here torch is not imported.
* ``targets``: models that are named as arguments, as ``timm:resnet50(num_classes=10)``.
* ``demo``: the models and the comparison of ``autoalign demo``.
* ``inspection``: ``inspect`` and ``diff``, which only look at checkpoints.
* ``commands``: all other commands, and the table of all of them.

It may import everything. A new command is a function of ``options``, which adds its parser, and a row of
``commands.COMMANDS``.
"""

from autoalign.cli.app import main
from autoalign.cli.options import COMPLETE, ERROR, INCOMPLETE

__all__ = ["COMPLETE", "ERROR", "INCOMPLETE", "main"]
