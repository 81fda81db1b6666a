"""Real architectures against themselves under other names, nesting, order and content: cases whose truth is known.

A case takes the keys and shapes of one architecture for one side, changes a copy of them step by step for the other,
and remembers where every tensor came from. Only metadata is made, and ``cases(count, seed)`` always gives the same.

The truth of each target key is one source key or None, because no step destroys the last evidence that tells two
tensors apart:

* Names may lose their meaning where order is kept, and order where names keep a meaning (their own or a synonym).
  Where both are changed, the words by which siblings of one form differ keep a meaning; and if all words are
  scrambled, siblings of one form stay in order among themselves. (Siblings of one form are subtrees that are equal
  but for names, order, and the lengths of their lists. Any two tensors that shapes and nesting leave open lie in such
  siblings.)
* Sorting the keys, which also puts ``10`` before ``2``, goes with meaningful names only.
* What is dropped from or added to a list of blocks is its end, with all numbers kept. No renumbering goes with it.
* Inserted layers other than blocks have shapes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from torch import Tensor

from autoalign.plan.specs import TensorSpec
from benchmarks.cases.architectures import Architecture, Choice
from benchmarks.cases.content import dropped, inserted, shuffled
from benchmarks.cases.module_trees import path_of, telling_words, tree_of
from benchmarks.cases.naming import Entry, renamed, renumbered, scrambled, with_leaf_names
from benchmarks.cases.nesting import are_paths_of_a_tree, nested, wrapped

Naming = Literal["kept", "synonyms", "made-up", "scrambled", "scrambled, leaves too"]
Order = Literal["kept", "shuffled", "sorted"]

ALL = Choice()
LEVELS = {1: "easy", 2: "moderate", 3: "hard", 4: "severe", 5: "scrambled"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which steps a case goes through."""

    level: int  # of difficulty, a key of LEVELS
    naming: Naming = "kept"
    order: Order = "kept"
    wrap: bool = False  # whether all keys get a prefix
    nesting: int = 0  # how many changes of it
    leaves: bool = False  # whether the layers' own tensors get names of another scheme
    renumber: bool = False
    drop: bool = False
    insert: bool = False

    def __str__(self) -> str:
        parts = {
            f"names {self.naming}": self.naming != "kept",
            "other leaf names": self.leaves,
            self.order: self.order != "kept",
            "wrapped": self.wrap,
            f"nested x{self.nesting}": self.nesting > 0,
            "renumbered": self.renumber,
            "dropped": self.drop,
            "inserted": self.insert,
        }
        return ", ".join(part for part, is_in in parts.items() if is_in) or "unchanged"


RECIPES = (
    Recipe(1, "synonyms"),
    Recipe(1, wrap=True),
    Recipe(1, "synonyms", wrap=True),
    Recipe(1, order="sorted"),
    Recipe(2, "made-up"),
    Recipe(2, nesting=1),
    Recipe(2, "synonyms", nesting=2),
    Recipe(2, "synonyms", leaves=True),
    Recipe(2, "synonyms", order="shuffled"),
    Recipe(3, renumber=True),  # what had a name has another's now
    Recipe(3, "synonyms", order="sorted"),
    Recipe(3, "made-up", nesting=2, renumber=True),
    Recipe(3, "synonyms", order="shuffled", nesting=1),
    Recipe(3, "synonyms", drop=True),
    Recipe(3, "synonyms", insert=True),
    Recipe(3, "made-up", leaves=True),
    Recipe(4, "made-up", order="shuffled", nesting=2),
    Recipe(4, "synonyms", order="sorted", nesting=2, drop=True),
    Recipe(4, "made-up", order="sorted", renumber=True),
    Recipe(4, "made-up", drop=True, insert=True),
    Recipe(4, "made-up", order="shuffled", nesting=1, leaves=True, drop=True),
    Recipe(5, "scrambled"),
    Recipe(5, "scrambled", nesting=2, renumber=True),
    Recipe(5, "scrambled", order="shuffled"),
    Recipe(5, "scrambled", order="shuffled", drop=True),
    Recipe(5, "scrambled, leaves too"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """Two sides and what belongs together."""

    name: str  # unique for a seed
    architecture: str
    recipe: Recipe
    is_target_perturbed: bool  # else the source is
    source: tuple[TensorSpec, ...]
    target: tuple[TensorSpec, ...]
    truth: Mapping[str, str | None]  # for every target key the source key that fills it

    @property
    def level(self) -> int:
        return self.recipe.level


def cases(count: int, seed: int = 0, choice: Choice = ALL) -> Iterator[Case]:
    """Yield the first cases of a seed; all recipes come equally often, and all architectures nearly so.

    Args:
        count: How many.
        seed: Another one gives other cases.
        choice: Of which architectures.
    """
    return (case(index, seed, choice) for index in range(count))


def case(index: int, seed: int = 0, choice: Choice = ALL) -> Case:
    """Make one case, the same for the same arguments whatever was made before."""
    chosen = choice.architectures()
    round_, place = divmod(index, len(chosen))
    order = Random(f"{seed}:{round_}").sample(range(len(chosen)), len(chosen))
    return perturbed(chosen[order[place]], RECIPES[index % len(RECIPES)], Random(f"{seed}:{index}"), f"{seed}-{index}")


def perturbed(architecture: Architecture, recipe: Recipe, random: Random, name: str) -> Case:
    """Perturb one architecture by one recipe."""
    original = [Entry(path_of(spec), spec.shape, spec.dtype, spec.key) for spec in architecture.specs]
    entries = _perturbed(original, recipe, random)
    assert are_paths_of_a_tree([entry.path for entry in entries]), f"{architecture.name}, {recipe}: a key comes twice"
    changed = tuple(TensorSpec(entry.key, entry.shape, entry.dtype) for entry in entries)
    is_target_perturbed = random.random() < 0.5
    origins = {entry.key: entry.origin for entry in entries}
    new_keys = {origin: key for key, origin in origins.items() if origin is not None}
    truth = origins if is_target_perturbed else {spec.key: new_keys.get(spec.key) for spec in architecture.specs}
    sides = (architecture.specs, changed) if is_target_perturbed else (changed, architecture.specs)
    return Case(name, architecture.name, recipe, is_target_perturbed, *sides, truth)


def _perturbed(entries: list[Entry], recipe: Recipe, random: Random) -> list[Entry]:
    telling = telling_words(tree_of((entry.path, entry.shape) for entry in entries))
    is_scrambled = recipe.naming.startswith("scrambled")
    if recipe.drop:
        entries = dropped(entries, random)
    if recipe.insert:
        entries = inserted(entries, random, blocks=not recipe.drop)
    if recipe.order == "shuffled":
        entries = shuffled(entries, random, names_tell=not is_scrambled)
    if recipe.wrap:
        entries = wrapped(entries, random)
    if recipe.nesting:
        entries = nested(entries, random, recipe.nesting)
    if recipe.renumber:
        entries = renumbered(entries, random)
    if is_scrambled:
        entries = scrambled(entries, random, leaves=recipe.naming == "scrambled, leaves too")
    elif recipe.naming != "kept":
        made = 0.8 if recipe.naming == "made-up" else 0.0
        kept = telling if recipe.order != "kept" else frozenset[str]()
        entries = renamed(entries, random, synonyms=0.3 if made else 0.8, made=made, telling=kept)
    if recipe.leaves:
        entries = with_leaf_names(entries, random)
    return sorted(entries, key=lambda entry: entry.key) if recipe.order == "sorted" else entries


def on_meta(specs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
    """Make a state dict of tensors without memory."""
    return {spec.key: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
