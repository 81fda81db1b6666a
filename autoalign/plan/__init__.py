"""Plans as values: which target tensor is made of which source tensors, and by which operation.

Nothing here reads a file or searches for a match. This folder imports ``errors`` alone; every other one builds on it.
In order of use:

* ``keys``: the syntax of keys, their components, numbers, stems and order; regular expressions with a time limit
* ``specs``: ``TensorSpec``, the name, shape, dtype and ties of a tensor
* ``operations``: copies, reshapes, splits, concatenations and their compositions, each with its inverse (``trace``)
* ``adaptations``: the operations that change values, for ``adapt=``
* ``regions``: what puts the parts of a tensor together, and any region of a result from the least of its sources
* ``serialization``: the one JSON form of operations, checked field by field
* ``dequantise``: the formats of quantised tensors that are known, and the operation that computes their values
* ``parametrised``: weights that are saved as what they are computed from, as weight norm's
* ``adapters``: LoRA and its kin by their names, and the operations that add LoRA to a weight
* ``quantised``: groups of tensors that are values only together, such as integer codes and their scales
* ``options``: the options of ``align``, their types and flags of the command line; without torch
* ``matches``: ``Match``, ``Plan`` with its statuses, missing and unexpected keys, and the inverse of a plan

A new operation is a class in ``operations`` (or ``adaptations``), which registers itself for JSON; ``regions``
evaluates it as a whole unless it has a case there. A new scheme of quantisation is a row and a function of
``dequantise``, and words in the tables of ``quantised``.
"""
