"""Checkpoint formats, a file each: ``is_...`` by content and never by name, ``open_...`` and, for some, a writer.

* ``detection.py``: which format a file is of, the shards of an index, the model's file in a folder.
* ``safetensors.py`` (reads and writes), ``torch_pickle.py`` (``torch.save``), ``torchscript.py``, ``distributed.py``
  (``torch.distributed.checkpoint``; reads and writes), ``deepspeed.py`` (ZeRO), ``megatron.py`` (files of layers, parts
  of tensor parallelism), ``npz.py`` (numpy), ``msgpack.py`` (Flax), ``gguf.py``,
  ``hdf5.py`` (Keras), ``archives.py`` (zip and tar files of any of these).
* ``unpickler.py``: what reading a pickle would cost, refused before it is read if that is more than its size
  justifies, and the restricted unpickler with an allow list.

A reader returns ``Contents`` without reading tensor data where that is possible, runs no code of a file, reads within
a ``Budget``, and raises a ``CheckpointError`` for whatever is damaged (``stored.reading``).
"""
