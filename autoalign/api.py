"""The functions of the package: each checks what it is given and hands it to the folder that does the work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

from autoalign.adaptations import Adapt
from autoalign.align_options import NoOptions, check_options
from autoalign.aligning import match_tensors
from autoalign.alignment import Alignment
from autoalign.checkpoint import Side
from autoalign.patterns import PatternLike, RuleLike


def align(
    source: Side,
    target: Side,
    *,
    rules: RuleLike = (),
    include: PatternLike = None,
    exclude: PatternLike = None,
    adapt: Adapt | Iterable[Adapt] = (),
    min_confidence: float = 0.5,
    container: str | None = None,
    example_inputs: object = None,
    **unknown: Unpack[NoOptions],
) -> Alignment:
    """Align the tensors of a checkpoint with those of a model, whatever they are called.

    Neither side is changed and no tensor data is read. The same input always gives the same result.

    >>> import torch
    >>> alignment = align({"fc.weight": torch.ones(3, 2)}, {"module.fc.weight": torch.zeros(3, 2)})
    >>> alignment.mapping
    {'fc.weight': 'module.fc.weight'}

    Args:
        source: The checkpoint: an ``nn.Module``, a mapping of names to tensors, a path, or an open ``Checkpoint``.
        target: The model, in any of the same forms.
        rules: What is known beforehand, checkpoint -> model: ``{regex: replacement}``, or pairs of keys or of a regex
            and its replacement. Rules win over inference and steer the rest.
        include: Patterns; only the keys that one of them takes take part. See ``exclude``.
        exclude: Patterns; the keys of either side that one of them takes take no part. A plain word or dotted path
            takes the keys that hold it as whole components, wherever they stand: ``"fc"`` takes ``net.fc.weight`` and
            leaves ``mlp.fc1.weight`` alone. ``"re:..."`` is a regular expression that is searched for in the key, and
            so is a compiled one. The notes say how many tensors each took on each side.
        adapt: Changes of values to allow where a counterpart has another shape, none by default. What is so filled has
            the status "adapted", a warning that says how, and no place in ``mapping``. One or more of: ``"head"``,
            the first rows of a classifier; ``"vocab"``, those of embeddings and of output layers (rows that only the
            target has keep its own values); ``"pos_embed"``, position embeddings interpolated, bicubically with
            antialiasing on the grid of an image and linearly in a sequence; ``"rel_pos"``, tables of relative
            positions interpolated for another window; ``"in_channels"``, the input channels of the first convolution
            summed into one, or repeated and rescaled. A module on either side tells grids and windows that a state
            dict does not; without one they are taken to be square, and nothing is adapted where they cannot be.
        min_confidence: Matches below it, in [0, 1], are listed as ambiguous and not loaded.
        container: Which of several state dicts in the checkpoint to use, such as ``"ema"``.
        example_inputs: What to call a module with, as ``execution_order`` takes it: the order in which a call uses the
            tensors then stands for that in which they are registered. Each side that is a module is called once and
            left as it was.
        **unknown: There are none; a name that is none of these is refused, with the nearest that is.

    Returns:
        The alignment. Each target key has exactly one status.

    Raises:
        InputError: A side or an option is of a kind that cannot be used.
        PatternError: A rule or pattern is malformed, matches nothing, or joins tensors of irreconcilable shapes.
        CheckpointError: A file cannot be read.
    """
    check_options(align, unknown, "Nothing was aligned.")
    plan = match_tensors(
        source,
        target,
        rules=rules,
        include=include,
        exclude=exclude,
        adapt=adapt,
        min_confidence=min_confidence,
        container=container,
        example_inputs=example_inputs,
    )
    return Alignment.of(plan)
