"""Proofs: whether ``verify`` ever calls a wrong load equal or a right one unequal, over many architectures.

Each network is loaded from another of its kind, with the initial values of its library or with values like trained
ones. A wrong load exchanges two tensors of equal shape, transposes a square matrix, interleaves the rows of a tensor or
shifts the blocks of a list by one; it is judged as a load of unknown origin, or with the alignment that made it. Only
tensors that the call uses take part: what becomes of the others, no call shows. Right loads are those of the library,
half of them computed in another memory format, and so with other rounding; and of one library into another.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import timm
import torch
import torchvision
from torch import Tensor, nn

import autoalign
from autoalign.alignment import Alignment
from autoalign.plan.matches import Match
from autoalign.plan.operations import Reshape, Transpose, chain
from autoalign.verification.compare import owners
from autoalign.verification.differences import relative_difference
from autoalign.verification.run import flat_tensors, preserved, record
from autoalign.verification.verify import Verification
from benchmarks.accuracy.localisation import randomise
from tests.pairs import TIMM_TRANSFORMERS, TORCHVISION_TIMM

Values = Literal["default", "trained-like"]
Way = Literal["exchanged", "transposed", "interleaved", "shifted"]
WAYS: tuple[Way, ...] = get_args(Way)

_NAMES = {
    "torchvision": """
        convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5 mobilenet_v2
        mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5
        squeezenet1_1 swin_t swin_v2_t
    """,
    "timm": """
        cait_xxs24_224 convnext_atto convnextv2_atto crossvit_9_240 deit_tiny_distilled_patch16_224 dla46_c
        edgenext_xx_small efficientformer_l1 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fastvit_t8 fbnetc_100
        ghostnet_100 gmixer_12_224 hardcorenas_a hrnet_w18_small lcnet_050 levit_128s mixer_s32_224 mobileone_s0
        mobilevit_xxs pit_ti_224 poolformer_s12 pvt_v2_b0 repghostnet_050 repvgg_a0 resmlp_12_224 resnetv2_50
        selecsls42 swiftformer_xs test_byobnet test_nfnet tinynet_e vit_tiny_patch16_224 xcit_nano_12_p16_224
    """,
}
ARCHITECTURES = tuple(f"{library}.{name}" for library, names in _NAMES.items() for name in names.split())


@dataclass(slots=True)
class Tally:
    """What came of the loads of one kind."""

    loads: int = 0
    called_equal: int = 0
    named: int = 0  # wrong ones of which a module that holds a changed tensor is named first
    covered: float = 0.0  # sum of the coverage of right loads
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Add the counts of others."""
        self.loads, self.called_equal = self.loads + other.loads, self.called_equal + other.called_equal
        self.named, self.seconds = self.named + other.named, self.seconds + other.seconds
        self.covered += other.covered


def built(name: str) -> nn.Module:
    """Build a network with the initial values of its library."""
    library, _, model = name.partition(".")
    options = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}  # which take seconds
    made: nn.Module = (
        timm.create_model(model) if library == "timm" else torchvision.models.get_model(model, weights=None, **options)
    )
    return made.eval()


def images_for(model: nn.Module) -> Tensor:
    """Make the smallest images that a network takes, of structure at a large and a small scale."""
    generator = torch.Generator().manual_seed(0)
    for size in (64, 96, 128, 224, 240, 256):
        images = nn.functional.interpolate(torch.randn(1, 3, 4, 4, generator=generator), size, mode="bicubic")
        images += 0.5 * torch.randn(images.shape, generator=generator)
        try:
            with torch.inference_mode():
                model(images)
        except (RuntimeError, AssertionError, ValueError):
            continue
        return images
    raise RuntimeError("The network takes no images of these sizes.")


def spoilt(alignment: Alignment, used: Sequence[str], way: Way, rng: random.Random) -> tuple[Alignment, list[str]]:
    """Spoil an alignment in one way.

    Args:
        alignment: That of two equal networks.
        used: The target's keys that a call uses, in their order.
        way: How.
        rng: Chooses where.

    Returns:
        The alignment, and the keys that it fills with other values; none where the network has no place for it.
    """
    values = {m.target: alignment.tensor(m) for m in alignment.matches if m.target in set(used)}
    matches = {match.target: match for match in alignment.matches}
    options = list(_options(matches, values, way, rng))
    changed = rng.choice(options) if options else {}
    filled = tuple(changed.get(match.target, match) for match in alignment.matches)
    found = replace(alignment, matches=filled)
    return found, [key for key in used if key in changed]


def _options(
    matches: dict[str, Match], values: dict[str, Tensor], way: Way, rng: random.Random
) -> Iterator[dict[str, Match]]:
    def from_other(key: str, other: str) -> Match:
        return replace(matches[key], sources=matches[other].sources, operation=matches[other].operation)

    def rearranged(key: str, *steps: Reshape | Transpose) -> Match:
        return replace(matches[key], operation=chain(matches[key].operation, *steps))

    keys = list(values)
    if way == "exchanged":
        groups: dict[tuple[int, ...], list[str]] = {}
        for key in keys:
            groups.setdefault(tuple(values[key].shape), []).append(key)
        wide = [group for group in groups.values() if len(group) > 1]
        for _ in range(50 if wide else 0):
            one, other = rng.sample(rng.choices(wide, [len(group) for group in wide])[0], 2)
            if not torch.equal(values[one], values[other]):
                yield {one: from_other(one, other), other: from_other(other, one)}
    for key in keys if way == "transposed" else []:
        if (
            values[key].dim() == 2
            and values[key].shape == values[key].T.shape
            and bool((values[key] != values[key].T).any())
        ):
            yield {key: rearranged(key, Transpose())}
    for key in keys if way == "interleaved" else []:
        shape = tuple(values[key].shape)
        if len(shape) > 1 and shape[0] > 2 and shape[0] % 2 == 0 and bool((values[key][:1] != values[key][1:]).any()):
            halves = Reshape((2, shape[0] // 2, *shape[1:]))
            yield {key: rearranged(key, halves, Transpose(), Reshape(shape))}
    if way == "shifted":
        yield from _moved_blocks(keys, values, from_other)


def _moved_blocks(
    keys: Sequence[str], values: dict[str, Tensor], from_other: Callable[[str, str], Match]
) -> Iterator[dict[str, Match]]:
    lists: dict[tuple[str, str], dict[int, str]] = {}
    for key in keys:
        parts = key.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                lists.setdefault((".".join(parts[:place]), ".".join(parts[place + 1 :])), {})[int(part)] = key
    blocks: dict[tuple[str, int], dict[str, Match]] = {}
    for (prefix, _), members in lists.items():
        for number, key in members.items():
            other = members.get(number + 1)
            if other and values[other].shape == values[key].shape and not torch.equal(values[other], values[key]):
                blocks.setdefault((prefix, number), {}).update(
                    {key: from_other(key, other), other: from_other(other, key)}
                )
    yield from blocks.values()


def wrong_loads(name: str, values: Values, count: int, seed: int = 0) -> dict[Way, Tally]:
    """Load a network wrongly again and again, and count what ``verify`` says of it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        source, target = built(name), built(name)
    if values == "trained-like":
        source = randomise(source, 1)
    images, rng = images_for(source), random.Random(f"{name} {values} {seed}")
    right = autoalign.align(source, target)
    with preserved(target):
        recording = record(target, images, ())
    first_use = recording.first_use
    used = sorted((key for key in first_use if not key.endswith("num_batches_tracked")), key=lambda k: first_use[k])
    owner = owners(target, used, {call.module for call in recording.calls})
    found = {way: Tally() for way in WAYS}
    for number in range(count):
        way = WAYS[number % len(WAYS)]
        wrong, changed = spoilt(right, used, way, rng)
        if not changed:
            way = "exchanged"
            wrong, changed = spoilt(right, used, way, rng)
        if not changed or (way == "shifted" and _is_symmetric(source, target, wrong, images)):
            continue
        autoalign.load(target, source, alignment=wrong)
        begin = time.perf_counter()
        with_it = number % 8 >= 4  # the alignment that made the load
        verification = autoalign.verify(source, target, images, alignment=wrong if with_it else None, trials=0)
        found[way].add(_judged(verification, name, values, changed, owner[changed[0]][0], time.perf_counter() - begin))
    return found


def _is_symmetric(source: nn.Module, target: nn.Module, alignment: Alignment, images: Tensor) -> bool:
    """Return True if blocks that were exchanged are branches of one sum, which is no wrong load."""
    model = randomise(deepcopy(source), 9)
    autoalign.load(target, model, alignment=alignment)
    with torch.inference_mode():
        outputs, others = (flat_tensors(one(images)) for one in (model, target))
    return all((relative_difference(others[name], outputs[name]) or 0.0) < 1e-3 for name in outputs)


def _judged(
    verification: Verification, name: str, values: Values, changed: Sequence[str], module: str, seconds: float
) -> Tally:
    divergence = verification.first_divergence
    is_named = divergence is not None and (divergence.target_module == module or changed[0] in divergence.keys)
    if verification.equal or not is_named:
        print(f"{name}, {values}: {', '.join(changed[:2])}: {verification}", file=sys.stderr)
    return Tally(1, verification.equal, is_named, seconds=seconds)


def right_loads(name: str, values: Values, count: int, seed: int = 0) -> Tally:
    """Load a network rightly again and again, and count what ``verify`` says of it."""
    found = Tally()
    for number in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(1000 * seed + number)
            source, target = built(name), built(name)
        if values == "trained-like":
            source = randomise(source, number)
        images = images_for(source)
        autoalign.load(target, source)
        if number % 2:
            target = target.to(memory_format=torch.channels_last)
        found.add(_judged_right(source, target, images, f"{name}, {values}"))
    return found


def _judged_right(source: nn.Module, target: nn.Module, images: Tensor, name: str) -> Tally:
    begin = time.perf_counter()
    verification = autoalign.verify(source, target, images)
    seconds = time.perf_counter() - begin
    if not verification.equal:
        print(f"{name}: {verification}", file=sys.stderr)
    return Tally(1, verification.equal, 0, verification.coverage, seconds)


def right_loads_across_libraries(count: int) -> Tally:
    """Load networks of one library into those of another, with values like trained ones."""
    found = Tally()
    for pair in (*TORCHVISION_TIMM, *TIMM_TRANSFORMERS)[:count]:
        source, target = randomise(pair.source(), 1), pair.target().eval()
        autoalign.load(target, source)
        generator = torch.Generator().manual_seed(0)
        found.add(
            _judged_right(
                source, target, torch.randn(1, 3, pair.image_size, pair.image_size, generator=generator), pair.name
            )
        )
    return found


def judged(name: str, wrong: int, right: int, seed: int) -> tuple[dict[tuple[Way, Values], Tally], dict[Values, Tally]]:
    """Load an architecture wrongly and rightly, so often with values of each kind, and count what ``verify`` says."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    every = {values: wrong_loads(name, values, wrong, seed) for values in get_args(Values)}
    return (
        {(way, values): tally for values, ways in every.items() for way, tally in ways.items()},
        {values: right_loads(name, values, right, seed) for values in get_args(Values)},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table, and on stderr what was judged wrongly; the exit status is 1 if anything was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.proofs", description=__doc__)
    parser.add_argument("--architectures", type=int, default=len(ARCHITECTURES), help="how many (default: all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose names contain one of these")
    parser.add_argument(
        "--wrong", type=int, default=10, help="wrong loads of each, for each kind of values (default: 10)"
    )
    parser.add_argument(
        "--right", type=int, default=10, help="right loads of each, for each kind of values (default: 10)"
    )
    parser.add_argument("--pairs", type=int, default=0, help="right loads from one library into another (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (default: 0)")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    options = parser.parse_args(arguments)
    wrong = {(way, values): Tally() for way in WAYS for values in get_args(Values)}
    right = {values: Tally() for values in get_args(Values)}
    names = [n for n in ARCHITECTURES if not options.only or any(part in n for part in options.only)]
    job = partial(judged, wrong=options.wrong, right=options.right, seed=options.seed)
    for name, (bad, good) in _mapped(job, names[: options.architectures], options.processes):
        for kind, tally in bad.items():
            wrong[kind].add(tally)
        for values, tally in good.items():
            right[values].add(tally)
        print(f"{name}: {sum(t.loads for t in (*wrong.values(), *right.values()))} loads so far", file=sys.stderr)
    across = right_loads_across_libraries(options.pairs)
    print("\n".join(table(wrong, right, across)))
    false_proofs = sum(tally.called_equal for tally in wrong.values())
    denied = sum(tally.loads - tally.called_equal for tally in (*right.values(), across))
    return 0 if false_proofs + denied == 0 else 1


def _mapped(job: Callable[[str], Any], names: Sequence[str], processes: int) -> Iterator[tuple[str, Any]]:
    """Yield each name with what a job returns of it, in several processes if wanted."""
    if processes == 1:
        yield from ((name, job(name)) for name in names)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from zip(names, pool.map(job, names), strict=True)


def table(wrong: dict[tuple[Way, Values], Tally], right: dict[Values, Tally], across: Tally) -> Iterator[str]:
    """Write a line for each kind of load, and for all wrong and all right ones."""
    yield "| load | values | loads | called equal | first wrong module named | tensors covered | seconds a load |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    all_wrong, all_right = Tally(), Tally()
    for (way, values), tally in wrong.items():
        all_wrong.add(tally)
        yield _line(way, values, tally, is_wrong=True)
    yield _line("all wrong", "", all_wrong, is_wrong=True)
    for values, tally in right.items():
        all_right.add(tally)
        yield _line("right", values, tally, is_wrong=False)
    all_right.add(across)
    yield _line("right, of another library", "trained-like", across, is_wrong=False)
    yield _line("all right", "", all_right, is_wrong=False)


def _line(load: str, values: str, tally: Tally, *, is_wrong: bool) -> str:
    count = max(tally.loads, 1)
    figures = (f"{tally.named / count:.1%}", "") if is_wrong else ("", f"{tally.covered / count:.1%}")
    return (
        f"| {load} | {values} | {tally.loads:,} | {tally.called_equal:,} | {' | '.join(figures)} "
        f"| {tally.seconds / count:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
