"""Code: networks whose keys tell nothing, loaded into their own code, by keys alone and with the code of both sides.

Each network of a sample of timm is traced by torch.fx, and its layers are named and registered at random; the original
is the target. ``python -m benchmarks.accuracy.code [--sample 40]``.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Sequence

import timm
import torch

import autoalign
from tests.pairs import renamed

_MAX_TENSORS = 400


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if any tensor is wrong with the code of both sides."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.code", description=__doc__)
    parser.add_argument("--sample", type=int, default=40, help="networks of timm")
    parser.add_argument("--only", default="", help="part of their names")
    options = parser.parse_args(arguments)
    names = [name for name in timm.list_models() if options.only in name]
    random.Random(1).shuffle(names)
    totals = {"keys": [0, 0, 0], "code": [0, 0, 0]}
    seconds = {"keys": 0.0, "code": 0.0}
    tensors = networks = 0
    for name in names:
        if networks == options.sample:
            break
        try:
            with torch.device("meta"):
                target = timm.create_model(name).eval()
            if len(target.state_dict()) > _MAX_TENSORS:
                continue
            source, key_before = renamed(target)
        except Exception:  # fx does not trace it, or it computes with values when it is built
            continue
        source.default_cfg = target.default_cfg
        networks += 1
        tensors += len(key_before)
        for way, options_of_way in (("keys", {}), ("code", {"source_model": source})):
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = autoalign.align(source.state_dict(), target, **options_of_way)  # type: ignore[arg-type]
            right = sum(key_before[match.sources[0]] == match.target for match in found.matches)
            total = totals[way]
            total[0] += right == len(key_before)
            total[1] += right
            total[2] += len(found.matches) - right
            seconds[way] += time.perf_counter() - start
            if way == "code" and right < len(key_before):
                print(f"  {name}: {right} of {len(key_before)} right, {len(found.matches) - right} wrong", flush=True)
    print("| by | complete | right | wrong | seconds each |\n| --- | ---: | ---: | ---: | ---: |")
    for way, (complete, right, wrong) in totals.items():
        each = seconds[way] / max(networks, 1)
        print(f"| {way} | {complete} of {networks} | {right / max(tensors, 1):.1%} | {wrong} | {each:.1f} |")
    return int(totals["code"][2] > 0)


if __name__ == "__main__":
    sys.exit(main())
