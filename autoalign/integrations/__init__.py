"""Integrations: the places where other libraries load models, with autoalign in them.

A file for each library that needs one; ``import autoalign`` imports none of them. The work is that of ``align`` and
``load``, and so are warnings and refusals.

* ``state_dicts``: what is loaded as a state dict, for code that loads one itself; what the others are made of.
* ``hf``: ``from_pretrained`` of transformers, which is also ``autoalign.hf``; conversions in its registry.
* ``timm``, ``lightning``, ``accelerate``, ``diffusers``, ``torchtitan``: as their names say.

It may import everything but ``cli``. A new library is a file here, a section of the guide, and a test that runs it.

.. include:: guide.md
"""

from autoalign.integrations import hf as hf
