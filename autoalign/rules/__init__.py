"""Rules: a plan as the shortest ordered list of renamings and operations, which holds for a whole family of networks.

Rules convert a state dict without any matching, and are exported to other libraries. This folder imports ``errors`` and
``plan``. In order of use:

* ``size_free``: operations without absolute sizes, which hold for networks of any width
* ``rule``: ``Rule``, its checks, and the matches that it makes of the keys it takes; the new names, with references to
  captures and arithmetic on numbers, and how that is fitted
* ``rules``: ``Rules``, the list: ``apply``, ``plan``, JSON, and the verbs that export
* ``generalise``: from the matches of single tensors to rules for all keys that are alike but for their numbers
* ``induce``: from those to the shortest list, checked against the plan
* ``export_python``: rules as the source of a function, with those of ``plan`` that it calls
* ``renaming_pairs``: the options of a choice as pairs for ``rules=`` of ``align``
* ``conversion_ops``: operations as transformers' own, where it has none for them
* ``export_renamings``: rules as mmengine's ``revise_keys``, and transformers' ``key_mapping`` and conversions

A new operation needs cases in ``size_free`` if it has sizes, and in ``export_python``. A new export is a file, and a
method of ``Rules``.
"""
