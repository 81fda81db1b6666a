"""Models that a text names, such as ``timm:resnet50(num_classes=10)``, which are built."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import nn

from autoalign.errors import AutoAlignError, DependencyError, InputError

_SPEC = re.compile(r"([A-Za-z_][\w.]*):(.+?)(\(.*\))?", re.DOTALL)

_Make = Callable[[], object]


def build(text: str, *, values: bool) -> nn.Module | Mapping[str, object]:
    """Build what is named, on the meta device if no values are asked for and its code needs none."""
    found = _SPEC.fullmatch(text)
    if not found:
        raise InputError(
            f"{text!r} is not a file or folder, and not the name of a model, such as timm:resnet50 or "
            "package.module:factory. Nothing was done."
        )
    library, name, arguments = found[1], found[2], found[3] or "()"
    positional, named = _arguments(arguments, text)
    try:
        if library in _MAKERS and positional:
            raise TypeError("its arguments have to be named")
        make = _MAKERS[library](name, named) if library in _MAKERS else _factory(library, name, positional, named)
        made = make() if values else _make_on_meta(make)
    except AutoAlignError:
        raise
    except Exception as error:  # any, since the code is not ours
        raise InputError(
            f"{text!r} could not be built: {type(error).__name__}: {str(error).rstrip('.') or 'without a message'}. "
            "Nothing was done."
        ) from error
    if not isinstance(made, nn.Module | Mapping):
        raise InputError(f"{text!r} gives a {type(made).__name__}, not an nn.Module or a state dict. Nothing was done.")
    return made


def _arguments(text: str, spec: str) -> tuple[list[Any], dict[str, Any]]:
    """Read arguments as they are written in a call; only literals are, and nothing is evaluated."""
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not a call")
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        if len(named) != len(call.keywords):
            raise ValueError("** is not allowed")
        return [ast.literal_eval(argument) for argument in call.args], named
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(
            f"The arguments {text} of {spec!r} are not valid: only numbers, strings, lists and other literals are, "
            "as in timm:resnet50(num_classes=10). Nothing was done."
        ) from error


def _make_on_meta(make: _Make) -> object:
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # code that computes with values fails there, and is run once more
        return make()


def _torchvision(name: str, options: Mapping[str, Any]) -> _Make:
    builder = _library("torchvision").models.get_model_builder(name)
    downloads = {"weights", "weights_backbone"} & signature(builder).parameters.keys()
    return partial(builder, **{**dict.fromkeys(downloads), **options})


def _transformers(name: str, options: Mapping[str, Any]) -> _Make:
    transformers = _library("transformers")
    class_name, at, path = name.partition("@")
    own: Any = getattr(transformers, class_name, None) if class_name.isidentifier() else None
    if at and not isinstance(own, type):
        raise InputError(f"transformers has no class {class_name!r}. Nothing was done.")
    if isinstance(own, type) and not at:
        config = own.config_class(**options)  # type: ignore[attr-defined]
        return lambda: own(config)
    config, unused = transformers.AutoConfig.from_pretrained(path or name, return_unused_kwargs=True, **options)
    if unused:
        raise TypeError(f"the configuration has no {', '.join(unused)}")
    kind = own or transformers.AutoModel
    return lambda: kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _factory(module_name: str, name: str, positional: Sequence[Any], named: Mapping[str, Any]) -> _Make:
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109, as Python itself puts it there
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    made: Any = import_module(module_name)
    for part in name.split("."):
        made = getattr(made, part)
    if isinstance(made, nn.Module | Mapping) and not (positional or named):
        return lambda: made
    return lambda: made(*positional, **named)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        if error.name != name:  # it is installed, but something that it needs is not
            raise
        raise DependencyError(
            f"{name} is not installed. Nothing was done. Install it with: pip install {name}"
        ) from error


_MAKERS: dict[str, Callable[[str, Mapping[str, Any]], _Make]] = {
    "timm": lambda name, options: partial(_library("timm").create_model, name, **options),
    "torchvision": _torchvision,
    "transformers": _transformers,
}
