"""Plans as values: which target tensor is made of which source tensors, and by which operation.

Nothing here reads a file or searches for a match. This folder imports ``errors`` alone; every other one builds on it.
In order of use:

* ``keys``: the syntax of keys, their components, numbers, stems and order
* ``specs``: ``TensorSpec``, the name, shape, dtype and ties of a tensor
* ``operations``: copies, reshapes, splits, concatenations and their compositions, each with its inverse (``trace``)
* ``adaptations``: the operations that change values, for ``adapt=``
* ``regions``: any part of an operation's result, computed from no more of its sources than it needs
* ``serialization``: the one JSON form of operations, checked field by field
* ``patterns``: regular expressions with a time limit
* ``quantised``: groups of tensors that are values only together, such as integer codes and their scales
* ``matches``: ``Match``, and ``Plan`` with its statuses, missing and unexpected keys
* ``inversion``: the plan from the target back to the source

A new operation is a class in ``operations`` (or ``adaptations``), which registers itself for JSON; ``regions``
evaluates it as a whole unless it has a case there. A new scheme of quantisation needs at most words in the tables of
``quantised``.
"""
