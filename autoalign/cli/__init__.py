"""The command line: ``autoalign COMMAND``, also ``python -m autoalign``.

In order of use:

* ``terminal``: results on stdout, in colours on a terminal; progress and messages on stderr; exit codes.
* ``arguments``: the decorator ``command``, the types of arguments, the sides that they name and the names of models
  that a shell completes; options in place of arguments in messages.
* ``reports``: what commands show.
* ``commands``: the commands, each a function.
* ``app``: the program: which command is run, what is printed of errors, and what a shell completes. It imports torch
  only to run a command.

It may import everything. A new command is a function in ``commands``::

    @command(exits="exit codes: 0 shown; 2 an error, reported on stderr")
    def count(checkpoint: Checkpoints, container: Container = None, form: Form = "text") -> int:
        \"\"\"Count the tensors of a checkpoint.\"\"\"
        found = checkpoint_of(side_of(checkpoint), container=container)
        if form == "json":
            show_json({"checkpoint": checkpoint, "tensors": len(found)})
        else:
            show(f"{len(found)} tensors")
        return COMPLETE

Its name is the function's, its parameters are arguments and options with the types of ``arguments``, a TypedDict of the
library gives its options (``**options: Unpack[AlignOptions]``), and options that are not given are not passed on. The
first line of the docstring is what the list of commands shows. What needs torch is imported in the function.
"""

from autoalign.cli.app import main
from autoalign.cli.terminal import COMPLETE, ERROR, INCOMPLETE

__all__ = ["COMPLETE", "ERROR", "INCOMPLETE", "main"]
