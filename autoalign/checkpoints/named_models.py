"""Models that a text, such as ``timm:resnet50(num_classes=10)``, or a configuration names, and that are built."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from inspect import signature
from threading import get_ident
from typing import Any

from torch import nn

from autoalign.checkpoints.checkpoint import Side, checkpoint_of
from autoalign.checkpoints.formats.detection import meant_by
from autoalign.checkpoints.remote import is_remote
from autoalign.errors import AutoAlignError, DependencyError, InputError, did_you_mean, most_similar

_SPEC = re.compile(r"([A-Za-z_][\w.]*):(.+?)(\(.*\))?", re.DOTALL)

_Make = Callable[[], object]


def build(text: str, *, values: bool, or_path: bool = False) -> nn.Module | Mapping[str, object]:
    """Build what is named; without ``values``, its parameters are on the meta device, if its code can do without.

    ``or_path`` is for messages: a path would do as well.
    """
    if is_remote(text):
        hint = f" Did you mean 'transformers:{text.removeprefix('hf://')}'?" if text.startswith("hf://") else ""
        raise InputError(f"{text!r} is a checkpoint, not a model such as timm:resnet50. Nothing was done.{hint}")
    found = _SPEC.fullmatch(text)
    if not found:
        hints = meant_by(text), _meant_library(text)
        hint = hints[0] or hints[1] if or_path else hints[1] or hints[0].replace("hf://", "transformers:")
        raise InputError(
            f"{text!r} is not {'a file or folder, and not ' if or_path else ''}the name of a model, such as "
            f"timm:resnet50 or package.module:factory. Nothing was done.{hint}"
        )
    library, name, arguments = found[1], found[2], found[3] or "()"
    positional, named = _arguments(arguments, text)
    with _as_our_errors(repr(text), partial(_meant_model, library, name)):
        if library in _MAKERS and positional:
            raise TypeError("its arguments have to be named")
        make = _MAKERS[library](name, named) if library in _MAKERS else _factory(library, name, positional, named)
        made = make() if values else _make_on_meta(make)
    if not isinstance(made, nn.Module | Mapping):
        raise InputError(f"{text!r} gives a {type(made).__name__}, not an nn.Module or a state dict. Nothing was done.")
    return made


def build_described(config: Mapping[str, object]) -> nn.Module:
    """Build what a configuration describes as ``build`` does without values; no code but of transformers or timm runs.

    Raises:
        InputError: It does not name a network of transformers or timm, or not one that can be built.
    """
    kind, name = config.get("model_type"), config.get("architecture")  # of transformers, and of timm
    made: object = None
    with _as_our_errors(f"What the configuration describes ({kind or name})"):
        if isinstance(kind, str) and kind in (transformers := _library("transformers")).CONFIG_MAPPING:
            settings = transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
            known = (getattr(transformers, str(each), None) for each in settings.architectures or ())
            own = next((each for each in known if isinstance(each, type) and issubclass(each, nn.Module)), None)
            made = _make_on_meta(partial(own, settings) if own else _of_class(transformers.AutoModel, settings))
        elif isinstance(name, str) and (timm := _library("timm")).is_model(name):
            options = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
            more = config.get("model_args")
            made = _make_on_meta(
                partial(timm.create_model, name, **options, **(more if isinstance(more, dict) else {}))
            )
    if not isinstance(made, nn.Module):
        raise InputError(
            "source_model='auto' needs a configuration beside the checkpoint that names a network of transformers or "
            "timm. Nothing was done. Give the code itself, or its name, such as 'timm:resnet50'."
        )
    return made


def code_of(source_model: nn.Module | str | None, source: Side | None) -> nn.Module | None:
    """Return the code of a checkpoint, with parameters on the meta device where a text names or describes it."""
    made: object = source_model
    if source_model == "auto":
        made = (
            source
            if isinstance(source, nn.Module)
            else build_described({} if source is None else checkpoint_of(source).config)
        )
    elif isinstance(source_model, str):
        made = build(source_model, values=False)
    if made is not None and not isinstance(made, nn.Module):
        raise InputError(
            "source_model= takes an nn.Module, or a text that names one, such as 'timm:resnet50', not "
            f"{type(made).__name__}. Nothing was done."
        )
    return made


@contextmanager
def _as_our_errors(what: str, meant: Callable[[], str] = str) -> Iterator[None]:
    try:
        yield
    except AutoAlignError:
        raise
    except Exception as error:  # any, since the code is not ours
        raise InputError.by_others(f"{what} could not be built", error, f"Nothing was done.{meant()}") from error


def _meant_model(library: str, name: str) -> str:
    """Return the question which library or model was meant, if there is none of its name."""
    if library not in _MAKERS:
        near = most_similar(library, _MAKERS)
        return f" Did you mean '{near}:{name}'?" if near else ""
    names = names_in(library)
    near = "" if name in names else most_similar(name, names)
    return f" Did you mean '{library}:{near}'?" if near else ""


def _meant_library(name: str) -> str:
    """Return the question whether a model of a library was meant, if one has it."""
    libraries = ("transformers",) if name[:1].isupper() else ("timm", "torchvision")  # whose models are classes, or not
    for library in libraries if name.isidentifier() else ():
        with suppress(DependencyError):
            if name in names_in(library):
                return f" Did you mean '{library}:{name}'?"
    return ""


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
        with _parameters_on_meta():
            return make()
    except Exception:  # code that computes with parameters fails there, and is run once more
        return make()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters onto the meta device as this thread registers them; what modules compute has its values."""
    register, thread = nn.Module.register_parameter, get_ident()

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if type(param) is nn.Parameter and not param.is_meta and get_ident() == thread:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _torchvision(name: str, options: Mapping[str, Any]) -> _Make:
    builder = _library("torchvision").models.get_model_builder(name)
    downloads = {"weights", "weights_backbone"} & signature(builder).parameters.keys()
    return partial(builder, **{**dict.fromkeys(downloads), **options})


def _transformers(name: str, options: Mapping[str, Any]) -> _Make:
    transformers = _library("transformers")
    class_name, at, path = name.partition("@")
    own: Any = getattr(transformers, class_name, None) if class_name.isidentifier() else None
    is_path = not at and (not class_name[0].isupper() or os.path.exists(class_name))  # noqa: PTH110
    if not isinstance(own, type) and not is_path:
        hint = did_you_mean(class_name, names_in("transformers"))
        raise InputError(f"transformers has no class {class_name!r}. Nothing was done.{hint}")
    if isinstance(own, type) and not at:
        config = own.config_class(**options)  # type: ignore[attr-defined]
        return lambda: own(config)
    config, unused = transformers.AutoConfig.from_pretrained(
        path or name, return_unused_kwargs=True, trust_remote_code=False, **options
    )
    if unused:
        raise TypeError(f"the configuration has no {', '.join(unused)}")
    return _of_class(own or transformers.AutoModel, config)


def _of_class(kind: Any, config: object) -> _Make:
    """Return what makes a model of a class of transformers, which may be one that chooses the class."""
    if hasattr(kind, "from_config"):
        return partial(kind.from_config, config, trust_remote_code=False)
    return partial(kind, config)


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
        raise DependencyError.of(name, "Nothing was done.") from error


_MAKERS: dict[str, Callable[[str, Mapping[str, Any]], _Make]] = {
    "timm": lambda name, options: partial(_library("timm").create_model, name, **options),
    "torchvision": _torchvision,
    "transformers": _transformers,
}
LIBRARIES = tuple(_MAKERS)


def names_in(library: str) -> list[str]:
    """List the names of a library's models, as ``build`` takes them; of transformers, the classes."""
    imported = _library(library)
    if library == "transformers":
        return [name for name in dir(imported) if "For" in name or name.endswith("Model")]
    listed: list[str] = (imported if library == "timm" else imported.models).list_models()
    return listed
