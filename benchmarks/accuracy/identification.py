"""How often ``identify`` is right: ``python -m benchmarks.accuracy.identification [--every N] [--held-out]``.

All networks that the index is made of are given to it with a head of another number of classes and a prefix: as they
are, with their keys sorted, with all names replaced, and with all of that and without counters. That is a figure in
sample, since it is the index's own networks; it is right where the true name is in the first group of equal shapes.
With ``--held-out``, each group is left out of the index when it is looked for, and what is nearest should be of the
same module of its library. Networks written by hand, which the index does not have, should be unknown.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import timm
import torch

import autoalign
from autoalign.loading.identify import MIN_SCORE_NEAR
from autoalign.matching.architectures import fingerprint, index, likenesses
from autoalign.plan.keys import NUMBER
from autoalign.plan.specs import TensorSpec, specs_of
from benchmarks.cases.handwritten import handwritten
from benchmarks.index import CLASSES, LIBRARIES, Built, built

PREFIXES = ("module.", "model.", "_orig_mod.module.", "net.backbone.", "student.")
WAYS = ("prefix and head", "sorted", "renamed", "renamed, sorted, no counters")


def disguised(network: Built, way: str, seed: int) -> tuple[TensorSpec, ...]:
    """Return the tensors of a network in another form, with another number of classes and a prefix.

    >>> import torch
    >>> network = Built("timm", "tiny", (), (TensorSpec("fc.weight", (CLASSES, 8), torch.float32),))
    >>> disguised(network, WAYS[0], seed=0)[0].key, disguised(network, WAYS[2], seed=0)[0].shape[1]
    ('module.fc.weight', 8)
    """
    chance = random.Random(f"{seed}:{network.name}")
    classes, prefix = chance.randint(2, 300), chance.choice(PREFIXES)
    specs = [replace(spec, key=prefix + spec.key, shape=_resized(spec.shape, classes)) for spec in network.specs]
    if "no counters" in way:
        specs = [spec for spec in specs if not spec.key.endswith("num_batches_tracked")]
    if "renamed" in way:
        known: dict[str, str] = {}
        specs = [
            replace(spec, key=".".join(_renamed(name, known, chance) for name in spec.key.split("."))) for spec in specs
        ]
    return tuple(sorted(specs, key=lambda spec: spec.key) if "sorted" in way else specs)


def _resized(shape: Sequence[int], classes: int) -> tuple[int, ...]:
    return tuple(size // CLASSES * classes if size % CLASSES == 0 else size for size in shape)


def _renamed(name: str, known: dict[str, str], chance: random.Random) -> str:
    """Replace a name, but for the numbers of lists."""
    if NUMBER.fullmatch(name):
        return name
    if name not in known:
        known[name] = "".join(chance.choices("bcdfghklmnprstvz", k=5)) + str(len(known)) + "x"
    return known[name]


def is_named(network: Built, specs: Sequence[TensorSpec]) -> bool:
    """True if the true name is in the first group."""
    found = likenesses(specs, fingerprint(specs), index(), 1)
    return bool(found) and f"{network.library}:{network.name}" in map(str, found[0].architectures)


def in_sample(networks: Sequence[Built]) -> Iterator[str]:
    """Look for all networks in all ways."""
    listed = {str(each) for group in index().architectures for each in group}  # defaults may be a published size
    for way in WAYS:
        for library in LIBRARIES:
            own = [one for one in networks if one.library == library and f"{library}:{one.name}" in listed]
            missed = [network.name for network in own if not is_named(network, disguised(network, way, 7))]
            yield f"{library}, {way}: {len(own) - len(missed):,} of {len(own):,} named first; not {missed[:6]}"


def held_out(networks: Sequence[Built]) -> Iterator[str]:
    """Look for all networks of timm without their groups, and count what is nearest."""
    known, near, unknown, right = index(), 0, 0, 0
    groups = {str(each): each.group for group in known.architectures for each in group}
    modules = timm.models._registry._model_to_module
    totals = known.totals
    for network in (network for network in networks if network.library == "timm"):
        specs = disguised(network, WAYS[2], 7)
        hidden = np.where(np.arange(len(totals)) == groups[f"timm:{network.name}"], 10**9, totals)
        with patch.object(known, "totals", hidden):
            found = likenesses(specs, fingerprint(specs), known, 1)
        if not found or found[0].score < MIN_SCORE_NEAR:
            unknown += 1
            continue
        names = [each.name for each in found[0].architectures if each.library == "timm"]
        near += 1
        right += any(modules[name] == modules[network.name] for name in names)
    yield f"held out of the index: {near:,} near, {unknown:,} unknown; of those near, {right:,} of the same timm module"


def by_hand() -> Iterator[str]:
    """Look for networks that are not in the index."""
    verdicts = Counter[str]()
    for style, model in handwritten():
        found = autoalign.identify(on_meta(specs_of(model.state_dict())))
        verdicts[found.verdict] += 1
        if found.verdict != "unknown":
            best = found.candidates[0]
            yield f"  {style} is {found.verdict}: {best.architectures[0]}, {best.common} of {best.tensors}"
    yield f"networks written by hand: {dict(verdicts)}"


def on_meta(specs: Sequence[TensorSpec]) -> dict[str, object]:
    """Return tensors without memory that have these keys, shapes and dtypes."""
    return {spec.key: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}


def look_up_times(networks: Sequence[Built]) -> Iterator[str]:
    """Time ``identify`` on keys and shapes in memory, when the index has been read, in seconds of a core."""
    times = []
    for network in networks:
        checkpoint = on_meta(disguised(network, WAYS[0], 7))
        since = time.process_time()
        autoalign.identify(checkpoint)
        times.append((time.process_time() - since, network.name, len(network.specs)))
    times.sort()
    median, high = (1e3 * times[int(share * len(times))][0] for share in (0.5, 0.99))
    yield f"identify: {median:.0f} ms in the median, {high:.0f} ms at 99 %; slowest {times[-3:]}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth network (default: all)")
    parser.add_argument("--held-out", action="store_true", help="also without the network in the index")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    networks = list(built())[:: options.every]
    for lines in (
        in_sample(networks),
        by_hand(),
        held_out(networks) if options.held_out else (),
        look_up_times(networks[::10]),
    ):
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
