"""Checkpoints: any format as keys, shapes, dtypes and tensors that are read on demand.

In order of use:

* ``checkpoint.py``: ``Checkpoint``, one side of an alignment, made of a module, a mapping, a file, a folder or an
  address (``checkpoint_of``, ``open_checkpoint``); the tree of its modules as a networkx graph.
* ``paths.py``: what is given in place of a path, such as patterns, lists and open files, as local files.
* ``containers.py``: which mappings of a nested file are state dicts, and which of them is meant.
* ``config.py``: the configuration found beside a checkpoint, in it, or at a module.
* ``named_models.py``: models that are named by a text, as ``timm:resnet50(num_classes=10)``, and built.
* ``remote.py``: downloads of ``hf://`` and ``https://`` addresses.
* ``formats/``: a file for each format, with its reading and writing.
* ``stored.py``: what every format returns (``Contents`` with ``StoredTensor`` values) and shares: the budget of what
  reading may cost, the error for a damaged file, numpy's dtypes as torch's.
* ``atomic.py``: files that appear whole or not at all.

Imports ``errors`` and ``plan``; no file here knows of matching or of a model that is filled. A new format is a file in
``formats/`` and a row in ``formats/detection.py``; a new name for a saved state dict is a word in ``containers.py``.
"""
