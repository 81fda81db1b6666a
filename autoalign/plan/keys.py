"""The syntax of keys: components, numbers, stems, common prefixes and natural order."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import TypeVar

LEVELS = 64  # components that are told apart in a key
# A longer number, or one with a leading zero, is text: it could not be written back from its value.
NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})([^0-9]*)", re.DOTALL)  # a name with one; its last
_OUTPUT = re.compile(r":\d+$")  # of a TensorFlow variable, as in "kernel:0"
_DIGITS = re.compile(r"\d{1,18}")

_KeyT = TypeVar("_KeyT", str, tuple[str, ...])


def natural(key: str) -> list[tuple[int, str]]:
    """Split a key for sorting, so that ``layers.10`` comes after ``layers.9``, however long numbers are.

    >>> sorted(["layers.10", "layers.9", "layers.a"], key=natural)
    ['layers.9', 'layers.10', 'layers.a']
    """
    parts = re.split(r"([0-9]+)", key)
    parts[1::2] = [number.lstrip("0") for number in parts[1::2]]
    return [(len(part), part) if place % 2 else (-1, part) for place, part in enumerate(parts)]


def components(key: str) -> tuple[str, ...]:
    """Split a key into the names of its nested modules and its tensor.

    >>> components("encoder.layer.0.attn.qkv.weight")
    ('encoder', 'layer', '0', 'attn', 'qkv', 'weight')

    Of a key of more than ``LEVELS`` components the first ones are left together as one.
    """
    return tuple((_OUTPUT.sub("", key) if ":" in key else key).replace("/", ".").rsplit(".", LEVELS - 1))


def split_key(key: str) -> tuple[str, str]:
    """Split a key, or the name of a module, into that of the module around it and its own.

    >>> split_key("encoder.layer.0"), split_key("weight")
    (('encoder.layer', '0'), ('', 'weight'))
    """
    module, _, name = key.rpartition(".")
    if "/" in name:
        inner, _, name = name.rpartition("/")
        module = f"{module}.{inner}" if module else inner
    return module, name


@lru_cache(maxsize=65536)
def numbers(component: str) -> tuple[int, ...]:
    """List the numbers in a component.

    >>> numbers("block1-0"), numbers("conv")
    ((1, 0), ())
    """
    return tuple(int(digits) for digits in _DIGITS.findall(component))


@lru_cache(maxsize=65536)
def stem(component: str) -> str:
    """Replace every number of a component, or of a key, by ``#``.

    >>> stem("layer12")
    'layer#'
    """
    return _DIGITS.sub("#", component)


def common_prefix(names: Iterable[_KeyT]) -> _KeyT:
    """Return what all names begin with, of which there is at least one: texts, or keys split into components.

    >>> common_prefix(["blocks.0.fc1", "blocks.0.fc2"]), common_prefix([("layer", "0"), ("layer", "1")])
    ('blocks.0.fc', ('layer',))
    """
    known = list(names)
    first, last = min(known), max(known)  # what these have in common, all have
    for place, (own, other) in enumerate(zip(first, last, strict=False)):
        if own != other:
            return first[:place]
    return first


def template(path: Iterable[str]) -> tuple[str, ...]:
    """Replace every number of a path by ``#``.

    >>> template(("layer", "3", "conv1"))
    ('layer', '#', 'conv#')
    """
    return tuple(map(stem, path))


def common_module(paths: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the path of the innermost module that holds all of these tensors.

    >>> common_module([("net", "0", "weight"), ("net", "0", "bias"), ("net", "norm")])
    ('net',)
    """
    return common_prefix(path[:-1] for path in paths) if paths else ()
