"""What transformers converts by hand, found by inference: ``python -m benchmarks.accuracy.conversions [--only TEXT]``.

transformers has a table of renamings and operations for each family whose checkpoints are not in the names of its code,
and reverses it to save a model. Each family is built here with two layers on the meta device and saved so; the tensors
that it saves are aligned with the model. What each of them is made of is known; in which order is not looked at.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping as conversion_table
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

import autoalign
from autoalign.plan.specs import specs_of, tied_groups

_LAYERS = 2
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "depth")
_MOST_TENSORS = 20_000


@dataclass(frozen=True, slots=True)
class Row:
    """What ``align`` makes of one family; counts of tensors of the model."""

    family: str
    known: int  # that the table has a source for
    converted: int  # of them, under other names or by an operation
    right: int
    wrong: int
    ambiguous: int
    error: str = ""

    @property
    def is_found(self) -> bool:
        return self.right == self.known and not self.wrong and not self.error


def families() -> list[str]:
    """List the families that transformers has a table for."""
    return [name for name in conversion_table() if name in transformers.CONFIG_MAPPING]


def saved(model: Any) -> tuple[dict[str, Tensor], dict[str, frozenset[str]]]:
    """Return what a model saves, and the keys that each of its own tensors is saved under."""
    given: dict[int, list[str]] = defaultdict(list)  # of each converter: the model's keys
    origins: dict[int, list[str]] = {}  # of each tensor that is made
    add, convert = WeightConverter.add_tensor, WeightConverter.convert

    def added(self: Any, renamed: str, key: str, *rest: Any, **options: Any) -> Any:
        given[id(self)].append(key)
        return add(self, renamed, key, *rest, **options)

    def converted(self: Any, *rest: Any, **options: Any) -> Any:
        made = convert(self, *rest, **options)
        for value in made.values():
            origins[id(value[0] if isinstance(value, list) else value)] = given[id(self)]
        return made

    own = dict(model.state_dict())
    with mock.patch.multiple(WeightConverter, add_tensor=added, convert=converted):
        tensors: dict[str, Tensor] = revert_weight_conversion(model, own)
    same = {id(tensor): [key] for key, tensor in own.items()}
    truth: dict[str, set[str]] = defaultdict(set)
    for name, tensor in tensors.items():
        for key in origins.get(id(tensor)) or same.get(id(tensor), []):
            truth[key].add(name)
    return tensors, {key: frozenset(names) for key, names in truth.items()}


def row(family: str) -> Row | None:
    """Build a family, and align what it saves with it; None where it cannot be built here or is saved as it is."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModel.from_config(_shortened(transformers.CONFIG_MAPPING[family]()))
            tensors, truth = saved(model)
    except Exception:  # what a constructor raises may be anything
        return None
    converted = sum(names != {key} for key, names in truth.items())
    if not converted or len(tensors) > _MOST_TENSORS:
        return None
    try:
        found = autoalign.align(tensors, dict(model.state_dict()))
    except autoalign.AutoAlignError as error:
        return Row(family, len(truth), converted, 0, 0, 0, type(error).__name__)
    first_of = {key: keys[0] for keys in tied_groups(specs_of(tensors)) for key in keys}  # one tensor under several
    right = sum(
        {first_of.get(key, key) for key in match.sources}
        == {first_of.get(key, key) for key in truth.get(match.target, ())}
        for match in found.matches
    )
    return Row(family, len(truth), converted, right, len(found.matches) - right, len(found.ambiguous))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each family, and their sum."""
    yield "| family | tensors | converted | right | wrong | ambiguous | found |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for one in rows:
        counts = f"{one.known} | {one.converted} | {one.right} | {one.wrong} | {one.ambiguous}"
        yield f"| {one.family} | {counts} | {one.error or ('yes' if one.is_found else 'no')} |"
    known, right, wrong = (sum(getattr(one, of) for one in rows) for of in ("known", "right", "wrong"))
    found = sum(one.is_found for one in rows)
    yield f"{found} of {len(rows)} families; {right} of {known} tensors right, {wrong} wrong"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.conversions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only the families whose name contains this")
    options = parser.parse_args(arguments)
    rows = [one for family in families() if options.only in family and (one := row(family))]
    print("\n".join(table(rows)))
    return 0


def _shortened(config: Any) -> Any:
    """Leave two layers of each list, where the configuration allows it."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        values: Mapping[str, object] = getattr(part, "__dict__", {})
        for name in _COUNTS:
            if isinstance(count := values.get(name), int) and count > _LAYERS:
                setattr(part, name, _LAYERS)
        if isinstance(kinds := values.get("layer_types"), list):
            part.layer_types = kinds[:_LAYERS]
    return config


if __name__ == "__main__":
    sys.exit(main())
