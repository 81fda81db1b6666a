"""An alignment as a person or a program reads it: text, Markdown, HTML, JSON, graphs, and why a key is left.

In order of use:

* ``rows``: rows of keys, folded where they differ in numbers or last names alone, and laid out in a width.
* ``choices``: what is ambiguous, as questions with their answers.
* ``text``: totals, sections and error messages as plain text and Markdown; why a key is left, and what comes nearest.
* ``changes``: how far corresponding tensors of two checkpoints are apart, folded by blocks.
* ``explain``: one key explained, with what would change the decision.
* ``module_tree``: the folded module tree that ``inspect`` prints and the page draws; prefixes and copies.
* ``html``: the page, whose scripts and style are in ``page/``, and what notebooks show: of alignments the page as a
  picture, of other results a few lines.
* ``serialization``: the one JSON form: ``to_dict``, ``save``, ``read`` and ``--format json``; applied to another pair;
  both module trees and the matches between them as a networkx graph.

It imports ``errors``, ``plan``, ``checkpoints`` and ``matching``. A new section of a report is a row function of
``text.rows_of``, and is then in the text, the Markdown and the notebook; a new format is a file.
"""
