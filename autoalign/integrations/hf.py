"""transformers: ``from_pretrained`` of weights under any names, and conversions in its registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from autoalign.alignment import Alignment
from autoalign.checkpoints.checkpoint import Checkpoint, Side, checkpoint_of
from autoalign.errors import AlignmentError, DependencyError, InputError, listed
from autoalign.integrations.state_dicts import aligned_state_dict, taken_from
from autoalign.rules.rules import Rules


def from_pretrained(
    model_class: Any,
    checkpoint: Side,
    *,
    config: Any = None,
    strict: bool = False,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """Load a model of transformers as its ``from_pretrained`` does, from weights under any names and in any layout.

    What is missing in the checkpoint gets transformers' initial values, with a warning.

    Args:
        model_class: Such as ``BertModel`` or ``AutoModelForCausalLM``.
        checkpoint: As ``autoalign.load`` takes it.
        config: Of the model: an object of transformers, or what ``from_pretrained`` of its class takes; by default the
            ``config.json`` beside the checkpoint.
        strict: Raise unless every key of the model gets a tensor and every tensor of the checkpoint is used.
        output_loading_info: Return the model, and what transformers reports with the ``"alignment"`` added.
        **options: Those of ``align``; all others are transformers' own, such as ``dtype``, ``device_map``,
            ``attn_implementation`` and ``quantization_config``.

    Returns:
        The model, ready for inference as transformers returns it.

    Raises:
        InputError: There is no configuration, or one of another model.
        NothingLoadedError: No tensor of the checkpoint could be aligned with the model.
        IncompatibleTensorsError: With ``strict``, some key is missing or unexpected.
        AlignmentError: transformers did not load all that it was given.
        DependencyError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise DependencyError.of("transformers", "Nothing was loaded.", "'autoalign[transformers]'") from error
    align_options = taken_from(options)
    source = checkpoint_of(checkpoint, container=align_options.get("container"))
    if not isinstance(config, transformers.PreTrainedConfig):
        config_class = getattr(model_class, "config_class", None) or transformers.AutoConfig
        config = _config_beside(source, config_class) if config is None else config_class.from_pretrained(config)
    with torch.device("meta"):
        model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    fate = "get initial values"
    tensors, alignment = aligned_state_dict(model, source, strict=strict, fate=fate, **align_options)
    if isinstance(checkpoint, str | os.PathLike) and Path(checkpoint, "generation_config.json").is_file():
        options.setdefault("generation_config", transformers.GenerationConfig.from_pretrained(checkpoint))
    made, info = type(model).from_pretrained(
        None, config=config, state_dict=dict(tensors), output_loading_info=True, **options
    )
    if lost := [key for key in tensors if key in info["missing_keys"]]:
        raise AlignmentError(
            f"transformers has conversions of its own for {type(model).__name__}, by which {len(lost)} tensors were "
            f"lost: {listed(lost)}. No model was returned. Build one, and call autoalign.load(model, checkpoint).",
            alignment,
        )
    return (made, {**info, "alignment": alignment}) if output_loading_info else made


def register(model_class: type | str, conversion: Alignment | Rules, *, overwrite: bool = False) -> list[Any]:
    """Register the conversions of an alignment, by which transformers' own ``from_pretrained`` loads such checkpoints.

    They take the place of what transformers has for the class, in this process. A model that is loaded so is saved by
    ``save_pretrained`` under the checkpoint's names, as with all conversions of transformers.

    Args:
        model_class: The class, or its name, or a ``model_type``.
        conversion: Of a checkpoint of the kind to a model of the class.
        overwrite: Replace conversions that were registered for it before.

    Returns:
        The ``WeightRenaming`` and ``WeightConverter`` objects.

    Raises:
        RulesError: Some rules cannot be expressed so; they are named.
        InputError: Some were registered before.
        DependencyError: transformers 5.6 or later is not installed.
    """
    rules = conversion.rules() if isinstance(conversion, Alignment) else conversion
    conversions: list[Any] = rules.to_transformers()
    from transformers import conversion_mapping

    name = model_class if isinstance(model_class, str) else model_class.__name__
    try:
        conversion_mapping.register_checkpoint_conversion_mapping(name, conversions, overwrite=overwrite)
    except ValueError as error:
        raise InputError(f"{error} Nothing was registered.") from error
    return conversions


def _config_beside(source: Checkpoint, config_class: Any) -> Any:
    """Return the configuration beside a checkpoint, which is to be one of the class's own kind."""
    given, wanted = source.config.get("model_type"), getattr(config_class, "model_type", "")
    if not isinstance(given, str):
        raise InputError(
            f"There is no config.json of transformers beside {source!r}. Nothing was loaded. Pass config=, an object "
            "or the folder of one."
        )
    if wanted and given != wanted:
        raise InputError(
            f"The config.json beside {source!r} is of a {given!r}, and not of a {wanted!r}. Nothing was loaded. Pass "
            "config=, or take the class that it is of."
        )
    settings = {key: value for key, value in source.config.items() if key != "model_type"}
    return config_class.from_dict(settings) if wanted else config_class.for_model(given, **settings)
