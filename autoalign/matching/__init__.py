"""Matching: two sides, as keys, shapes and dtypes, become a ``Plan``; no tensor data is read.

A side is a tree of modules whose leaves are layers. Layers of both sides are assigned to each other by graduated
assignment (Gold and Rangarajan, "A graduated assignment algorithm for graph matching", IEEE PAMI 18, 1996), with votes
pooled over repeated structure as in similarity flooding (Melnik et al., ICDE 2002); ``assignment`` tells where it
departs from the papers. The files, in order of use (each imports only what stands before it, and ``errors``, ``plan``
and ``checkpoints``):

- ``vocabulary``, ``names``: every table of words; the words, the kind of values and the similarity of names
- ``paths``, ``layers``, ``conventions``: the modules in a key; parts, units (layers) and the tree of modules; a side as
  torch names it and lays it out
- ``candidates``, ``features``: pairs of layers that an operation reconciles; what speaks for a pair before matching
- ``scope``, ``fusion``: what takes part; fused tensors split as the other side holds them
- ``assignment``: the joint optimisation, exact at its end
- ``confidence``: from score and margin to a calibrated probability
- ``list_order``, ``state``, ``moves``, ``cues``: whether there is one order, and lists that may run in reverse; what
  fills what; what could be exchanged as well; what speaks for and against it
- ``rotary``, ``composition``, ``layouts``, ``assembly``: rows and columns in an order that no shape shows; parts put
  back together to tensors
- ``relation``: are two networks related; of unlike ones, what differs
- ``stacks``: tensors that hold what the other side lists, matched by their slices
- ``repeats``, ``pipeline``: what needs no search; the stages in order
- ``architectures``: fingerprints of networks, and the index of those of many libraries, which are looked up in it
- ``positions``, ``adapt``, ``adapters``, ``match``: matches that change values; from options to a ``Plan``

A new word is a row of ``vocabulary``, a new cue a row of ``cues``, a new kind of move a function of ``moves``; a new
layout belongs to ``conventions`` or ``layouts``. A special case needs a test that fails without it.

.. include:: limits.md
.. include:: accuracy.md
"""
