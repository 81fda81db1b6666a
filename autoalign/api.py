"""``align``, ``load`` and ``convert``: signatures and documentation. The work is done in the folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Side
from autoalign.checkpoints.named_models import code_of
from autoalign.matching.layouts import OTHERWISE
from autoalign.matching.match import Decide, match_tensors
from autoalign.plan.matches import Plan
from autoalign.plan.options import Adapt, AlignOptions, NoOptions, PatternLike, RuleLike, check_options

if TYPE_CHECKING:
    from autoalign.loading.convert import Format
    from autoalign.loading.fill import Progress

_SURE = 0.9  # confidence in matches of which the code of both sides is not asked
_SIMILAR = 0.6  # similarity of names by which the target's code is not asked either


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
    dequantise: bool = True,
    merge_adapter: bool = False,
    example_inputs: object = None,
    source_model: nn.Module | str | None = None,
    **unknown: Unpack[NoOptions],
) -> Alignment:
    """Align the tensors of a checkpoint with those of a model, whatever they are called.

    Neither side is changed and no tensor data is read. The same input always gives the same result.

    >>> import torch
    >>> alignment = align({"fc.weight": torch.ones(3, 2)}, {"module.fc.weight": torch.zeros(3, 2)})
    >>> alignment.mapping
    {'fc.weight': 'module.fc.weight'}

    Args:
        source: The checkpoint: a module, a mapping of tensors, a ``Checkpoint``, or what ``open_checkpoint`` takes.
        target: The model, in any of the same forms.
        rules: What is known beforehand, checkpoint -> model: ``{regex: replacement}``, or pairs of keys or of a regex
            and its replacement. Rules override inference and guide the rest.
        include: Patterns; only keys that match one of them take part. See ``exclude``.
        exclude: Patterns; keys of either side that match one of them take no part. A plain word or dotted path
            matches keys that contain it as whole components, anywhere: ``"fc"`` matches ``net.fc.weight`` and not
            ``mlp.fc1.weight``. ``"re:..."`` is a regular expression that is searched for in the key, and so is a
            compiled one. The notes say how many tensors each matched on each side.
        adapt: Changes of values to allow where a counterpart has another shape, none by default. A tensor that is
            filled in this way has the status "adapted", a warning that says how, and is not in ``mapping``. One or
            more of: ``"head"``, the first rows of a classifier; ``"vocab"``, those of embeddings and of output layers
            (rows that only the target has keep its own values); ``"pos_embed"``, position embeddings interpolated,
            bicubically with antialiasing on the grid of an image and linearly in a sequence; ``"rel_pos"``, tables of
            relative positions interpolated for another window; ``"in_channels"``, the input channels of the first
            convolution summed into one, or repeated and rescaled. Grids and windows are read from a module on either
            side; without one they are assumed to be square, and nothing is adapted where they cannot be.
        min_confidence: Matches below it, in [0, 1], are listed as ambiguous and not loaded.
        container: Which of several state dicts in the checkpoint to use, such as ``"ema"``.
        dequantise: Fill plain tensors from quantised ones, whose values are computed in float32: the operation
            ``dequantise``, of the codes with their scales. A model that is quantised by the same scheme gets them as
            they are. With False, and where a scheme is not known, they are left out, with a note.
        merge_adapter: Add the LoRA in the checkpoint to the weights that it changes, W + scale * B @ A: those that
            stand beside it in the checkpoint, else the model's, to which each load adds it again. Otherwise tensors of
            adapters fill those of adapters alone.
        example_inputs: What to call a module with, as ``execution_order`` takes it: the order in which a call uses the
            tensors then stands for that in which they are registered. Each side that is a module is called once and
            left as it was. With ``source_model`` they are what both are called with, where that works.
        source_model: The code that the checkpoint belongs to: a module, which may be on the meta device, or a text that
            names one, ``"timm:NAME"``, ``"torchvision:NAME"``, ``"transformers:PATH"`` or ``"package.module:factory"``;
            or ``"auto"``, for what the configuration beside the checkpoint describes, if transformers or timm has it:
            no code beside it runs. Where the target is a module too, what both compute is compared, as ``dataflow``
            shows it: what keys leave open is decided where it can be, and matches that it contradicts are listed as
            ambiguous. What stays open, such as a layout, is decided by calls of copies of both on random values, where
            they agree further in one way than in any other. All that is so anyway where both sides are modules, and
            keys leave anything open or nothing but order tells which tensor it is. Where the code of one side alone is
            at hand, layers whose names tell nothing are told by what it does with them (a query, a gate, a shortcut).
            Of the target's alone, what is out of order by its code or by shapes is ambiguous then, and notes say how
            much depends on open layouts, where ``example_inputs`` are given.
        **unknown: Refused, with the most similar option that there is.

    Returns:
        The alignment. Each target key has exactly one status.

    Raises:
        InputError: A side or an option is of a kind that cannot be used.
        PatternError: A rule or pattern is malformed, matches nothing, or joins tensors of incompatible shapes.
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
        dequantise=dequantise,
        merge_adapter=merge_adapter,
        **_resolved({"example_inputs": example_inputs, "source_model": source_model}, source),
    )
    return Alignment.of(plan)


def load(
    model: nn.Module,
    checkpoint: Side,
    *,
    strict: bool = False,
    assign: bool = False,
    progress: Progress | bool | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    alignment: Alignment | None = None,
    verify: object = None,
    **align_options: Unpack[AlignOptions],
) -> Alignment:
    """Load every tensor of a checkpoint that can be aligned with the model, whatever it is called.

    Values are copied into the model's own tensors, whose dtype and device stay. Where the model or a part of it has
    loading code of its own, such as hooks, they go through torch's ``load_state_dict``, so that hooks, versions of
    modules and extra states work as they do there. It is all or nothing: if this raises, the model holds what it held
    before. Two things cannot be taken back, while values are copied into a model without loading code: a Ctrl-C, which
    takes effect when the copy is complete; and what another process writes to the file, which is an error, after which
    the model holds old and new values if more than 4 MiB are loaded. A file should be replaced by another, and never be
    written to. Loads in several threads into one model, or into models that share modules or tensors, are carried out
    one after the other.

    On Linux, the file of a path is read and not used by way of its mapping, so that a file that is cut meanwhile is an
    error too. It ends the process, as whatever is mapped may, where the mapping is used: with ``assign=True``, for more
    than 4 MiB into a model with loading code of its own, for an open ``Checkpoint``, and on other systems. A write that
    began before the file was opened, and a write by way of a mapping, are not noticed.

    A model with sharded tensors (FSDP2, tensor parallelism) is loaded on all its ranks at once, each of which reads
    what it holds; the first of them alone warns and logs. If it fails on one rank, it fails on all, and so it does
    where a sample shows that they have opened checkpoints of other values. All of a small tensor is compared, and of a
    larger one up to 16 rows of 64 numbers, spread evenly: files that differ in nothing but a few rows may pass.

    >>> model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> load(model, {"module.fc.weight": other.weight, "module.fc.bias": other.bias})
    <All keys matched successfully>
    >>> bool((model.weight == other.weight).all())
    True

    Args:
        model: The module to fill. Tensors of lazy modules get the shapes that those of their names have in the
            checkpoint.
        checkpoint: A path, a mapping of tensors, a module, or an open ``Checkpoint``.
        strict: Raise unless every key of the model gets a tensor and every tensor of the checkpoint is used.
        assign: Give the model new tensors instead of copying into those it has, as the meta device needs. They have
            the dtype, the ``requires_grad`` and, unless that was meta, the device of the old ones, and tied
            parameters stay tied; an optimizer made before keeps the old ones. A tensor of a mapping may come to be
            shared with the model, as with torch. A tensor of a mapped file (safetensors, torch) is not copied: it is
            read when it is used, and the file must not be overwritten while the model is.
        progress: True to show a bar on stderr; by default if stderr is a terminal and the load takes more than a
            second. Or a function that is called with the number of tensors done and of all; it may raise to cancel
            the load, for which the old values are kept meanwhile.
        dtype: What to convert the model's floating-point tensors to, as ``model.to`` does, before they are filled; such
            as ``torch.bfloat16`` or ``"bfloat16"``.
        device: Where to move the model's tensors, as ``model.to`` does, before they are filled. If the load fails, both
            are undone, for which the old tensors are kept meanwhile.
        alignment: One that was made before for the same keys and shapes, such as from ``Alignment.read``. It is
            applied as it is, and nothing is matched.
        verify: What to call the model with, as the function ``verify`` takes it, which then proves the alignment
            before it is loaded. Where the models would differ, other ways to fill this one are tried, and the one that
            makes them equal is loaded; if there is none, the load raises.
        **align_options: As for ``align``: ``rules``, ``include``, ``exclude``, ``container``, ``min_confidence``,
            ``dequantise``, ``merge_adapter``, ``source_model`` (which ``verify`` needs where the checkpoint is not a
            module: a copy of it is filled with all of the checkpoint), and ``adapt``, by which values are changed where
            a counterpart has another shape.

    Returns:
        The alignment. It unpacks, as in ``missing_keys, unexpected_keys = load(...)``, and ``print`` shows all of it.

    Raises:
        NothingLoadedError: No tensor of the checkpoint could be aligned with the model.
        IncompatibleTensorsError: With ``strict``, some key is missing or unexpected.
        UnequalModelsError: With ``verify``, the models would differ; the text names where they first do.
        AlignmentError: The model changed while it was loaded, or its ranks do not agree.
        InputError: The model or the checkpoint is of a kind that cannot be used, or one of them has no values on meta.
        CheckpointError: The checkpoint's file cannot be read, or was changed meanwhile.
        PairMismatchError: Keys or shapes are not those that ``alignment`` was made for.

    Warns:
        PartialLoadWarning: Keys of the model that ``exclude`` and ``include`` did not leave out keep their values.
        ChoiceWarning: The checkpoint holds copies of the network, and one was chosen without being asked for; or
            different tensors for one that the model ties; or biases for layers that have none; or the scale of LoRA
            that is added is stated nowhere.
        ValueWarning: A tensor of the checkpoint has NaN, or the model's dtype cannot hold its values. Rounding to
            another floating-point type of 16 bits or more is not warned of.
    """
    check_options(load, align_options, "Nothing was loaded.")
    options: dict[str, Any] = {"strict": strict, "assign": assign, "progress": progress}
    options |= {"dtype": dtype, "device": device, "alignment": alignment}
    given = None if alignment is not None else checkpoint
    if verify is not None:
        from autoalign.verification.verify import load_proved

        source_model = align_options["source_model"] = code_of(align_options.get("source_model"), checkpoint)
        if alignment is None:
            align_options.setdefault("example_inputs", verify)
        return load_proved(model, checkpoint, _resolved(align_options, given), verify, source_model, **options)
    from autoalign.loading.load import load_checkpoint

    return load_checkpoint(model, checkpoint, _resolved(align_options, given), **options)


def convert(
    checkpoint: Side,
    target: Side | None,
    output_path: str | os.PathLike[str],
    *,
    format: Format = "safetensors",  # noqa: A002, the field's own word
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "50GB",
    metadata: Mapping[str, str] | None = None,
    strict: bool = False,
    overwrite: bool = False,
    unwrap: bool = False,
    progress: Progress | None = None,
    **align_options: Unpack[AlignOptions],
) -> Alignment:
    """Rewrite a checkpoint in the target's names, shapes and layout, or in its own.

    Tensors are read, changed and written one by one, so that little more than the largest of them is in memory; what
    a file format maps into memory is not counted. All that ``align`` matches is written: each key of the target has a
    tensor of its own, those that are tied in the target too, so that the file loads without code that ties them. The
    output appears when it is complete. If this raises, or is interrupted, there is nothing new and nothing changed. If
    the process is killed, the folder opens as what was there before or as all of the new output, and what was left in
    it is removed by the next call that writes there.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "fc.safetensors")
    ...     alignment = convert({"module.fc.weight": torch.ones(3, 2)}, {"head.weight": torch.empty(3, 2)}, path)
    ...     print(alignment.mapping, sorted(file.name for file in Path(folder).iterdir()))
    {'module.fc.weight': 'head.weight'} ['fc.safetensors']

    Args:
        checkpoint: The source: a path, a mapping of tensors, a module, or an open ``Checkpoint``.
        target: What to write it for, in any of the same forms. Its values are not needed; it may be on ``meta``. None
            for a copy under its own names, of all tensors of the container that is taken as they are.
        output_path: A file, ``NAME.safetensors``, or else a folder, in which the file is ``model.safetensors``.
        format: ``"safetensors"``, or ``"dcp"`` for a folder of ``torch.distributed.checkpoint``, which must be new or
            empty, and has neither a limit of size nor metadata.
        dtype: What floating-point tensors are converted to, such as ``torch.float16`` or ``"bfloat16"``; by default all
            keep the dtype that they have in the checkpoint, and dequantised ones are float32.
        max_shard_size: Bytes of data in a file, or a text such as ``"5GB"`` or ``"4GiB"``. What is larger is written
            as ``NAME-00001-of-00002.safetensors`` and so on, with the index ``NAME.safetensors.index.json``; a tensor
            that is larger has a file of its own. Shards that replace an output have a mark in their names, such as
            ``NAME-0123abcd-00001-of-00002.safetensors``, so that an index never leads to shards of another output.
        metadata: Entries for the file's metadata, beside and before those of the source's. ``format`` is always ``pt``.
        strict: Raise unless every key of the target gets a tensor and every tensor of the checkpoint is used.
        overwrite: Replace an output that is there, with its index and shards.
        unwrap: Without a target, take the modules of wrappers out of the names: those of torch, such as ``module`` and
            ``_orig_mod``, and outer ones that all tensors are in.
        progress: Called with the number of tensors written and of all, while they are written.
        **align_options: As for ``align``: ``rules``, ``include``, ``exclude``, ``container``, ``min_confidence``,
            ``dequantise``, ``merge_adapter``, ``source_model``, and ``adapt``; without a target no others than
            ``include``, ``exclude`` and ``container``.

    Returns:
        The alignment; its ``matches`` are what was written.

    Raises:
        NothingLoadedError: No tensor of the checkpoint could be aligned with the target.
        IncompatibleTensorsError: With ``strict``, some key is missing or unexpected.
        OutputError: The output is there already, or cannot be written.
        InputError: An argument cannot be used, the checkpoint has no values, or safetensors does not hold its dtypes.
        CheckpointError: The checkpoint's file cannot be read.

    Warns:
        ChoiceWarning: As of ``load``.
        PartialLoadWarning: Keys of the target that ``exclude`` and ``include`` did not leave out are not in the output.
    """
    check_options(convert, align_options, "Nothing was written.")
    from autoalign.loading.convert import convert_checkpoint

    return convert_checkpoint(
        checkpoint,
        target,
        output_path,
        _resolved(align_options, None if target is None else checkpoint),
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        metadata=metadata,
        strict=strict,
        overwrite=overwrite,
        unwrap=unwrap,
        progress=progress,
    )


def _resolved(options: AlignOptions, source: Side | None) -> dict[str, Any]:
    """Return the options with functions that call modules in place of what they are called with."""
    given: dict[str, Any] = {**options}
    inputs = given.pop("example_inputs", None)
    if (decide := _decide(given.pop("source_model", None), source, inputs)) is not None:
        given["decide"] = decide
    if inputs is not None:
        from autoalign.verification.run import execution_order

        given["order_of_use"] = partial(execution_order, example_inputs=inputs)
    return given


def _decide(source_model: nn.Module | str | None, source: Side | None, example_inputs: object) -> Decide | None:
    """Return what asks the code of both sides: that which is given, or that at hand where keys leave choices open."""
    if (model := code_of(source_model, source)) is not None:
        from autoalign.verification.decisions import decided_by_code

        return partial(decided_by_code, model, example_inputs)
    own = source if isinstance(source, nn.Module) else None
    return None if source is None else partial(_decided_if_open, own, example_inputs)


def _decided_if_open(source: nn.Module | None, example_inputs: object, plan: Plan, min_confidence: float) -> Plan:
    """Ask the code at hand where keys leave anything open, or nothing but order tells which tensor it is."""
    target = getattr(plan.target_tensors, "module", None)
    names = [match.evidence.get("name", 1.0) for match in plan.matches if source is None or match.confidence < _SURE]
    is_open = not all(names) or (source is None and min(names, default=1.0) < _SIMILAR)
    may_differ = any(not OTHERWISE.isdisjoint(match.warnings) for match in plan.matches)
    is_open |= (bool(plan.ambiguous) or may_differ) and (source is not None or example_inputs is not None)
    if not is_open:
        return plan
    if source is not None:
        from autoalign.verification.decisions import decided_by_code

        return decided_by_code(source, example_inputs, plan, min_confidence, is_asked=False)
    if not isinstance(target, nn.Module):
        return plan
    from autoalign.verification.probe import with_prices
    from autoalign.verification.roles import decided_by_target

    plan = decided_by_target(plan, target, example_inputs)
    return plan if example_inputs is None else with_prices(plan, target, example_inputs)
