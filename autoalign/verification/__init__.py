"""Verification: call both models, compare what their modules compute, and find where and why they first differ.

In order of use, from the bottom up:

* ``differences``: how far two tensors are apart, as a share of the size of what was wanted.
* ``run``: calls a model and leaves it, and every source of chance, as they were; records its modules; order of use.
* ``example_inputs``: what a module may be called with, guessed from its settings, names and layers.
* ``dataflow``: the graph of a call on tensors without data: which tensors and operations feed which.
* ``compare``: which modules belong together, what they compute, and the first that differs.
* ``causes``: why it differs: weights, settings of modules, other functions, or rounding.
* ``session``: two models, one call of the source, and calls of the target with other values in place of its own;
  values on which every layer passes its signal on; of which tensors a change would have been noticed.
* ``search``: other ways to fill the target, tried until the outputs are equal.
* ``refinement``: which tensors correspond by both graphs, coloured together (Weisfeiler and Leman).
* ``probe``: what keys and graphs leave open, decided by calls of both networks on random values.
* ``roles``: what the target's code alone tells: what it does with its tensors, and whether order is to be believed.
* ``decisions``: an alignment with what graphs and calls decide.
* ``verify``: the verdict, with the first divergence and what had to be filled otherwise.

It may import all that ``loading`` may, and ``loading.transaction``. A new kind of cause goes to ``causes``; a new way
in which alignments go wrong is one more generator of options in ``search``.
"""
