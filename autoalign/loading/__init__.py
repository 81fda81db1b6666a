"""Loading: the only part of the package that moves tensor data, into a model or into a new file.

In order of use, from the bottom up:

* ``mapped``: reads the values of memory-mapped tensors from their files, so that a file which is cut ends no process.
* ``values``: NaN in a checkpoint, what a cast to the model's dtype would lose.
* ``transaction``: a model as it was if anything fails, and a lock on it; which copies cannot fail.
* ``fill``: reads the sources, copies them in place (on threads where that is faster), or makes new tensors of them;
  the progress bar.
* ``prepare``: what is decided and said before data moves, for ``load`` and ``convert`` alike: what comes from where,
  lazy modules, conflicts, BatchNorm counters, extra states, versions; warnings.
* ``sharded``: how the processes of a sharded model agree, and which parts each of them reads.
* ``load`` and ``convert``: fill a model, all or nothing; write a checkpoint anew, tensor by tensor.
* ``identify``: which known architecture a checkpoint is of, in words, and whether it was trained.
* ``diff``: compares the values of two checkpoints, whatever their tensors are called.

It may import ``errors``, ``plan``, ``checkpoints``, ``rules``, ``matching``, ``reports`` and ``alignment``. A new check
of values is one of ``Findings``; new state of modules beside tensors goes to ``prepare``; a new output format is
written by a function of ``checkpoints.formats`` and named in ``convert``.

.. include:: guide.md
"""
