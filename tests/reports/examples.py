"""Alignments for the tests of pages."""

from __future__ import annotations

import torch

from autoalign.alignment import Alignment
from autoalign.plan.matches import Match
from autoalign.plan.operations import Concatenate, Split
from tests.alignments import mixed, spec

HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">.weight",
    "quotes'\"`.weight",
    "{{data}}.{{css}}",
    "<!--.-->.weight",
    "control\x00\x1b[31m\n.weight",
    "bidi\u202egnp.exe",
    "separators\u2028\u2029.weight",
    "שלום.weight",
    "__proto__.constructor",
    "surrogate\ud800.weight",
    "emoji😀.weight",
    "dots...weight",
    "",
    "long" * 3000,
    ".".join("deep" for _ in range(3000)),
    "&amp;.&lt;",
)


def hostile() -> Alignment:
    """Make an alignment of keys that are markup, controls, or nothing."""
    specs = tuple(spec(key, 2, place + 1) for place, key in enumerate(HOSTILE))
    matches = tuple(Match(key, (key,), evidence={"<b>cue": 0.5}, warnings=("<b>warning</b>",)) for key in HOSTILE[:-2])
    ambiguous = (Match(HOSTILE[-2], (HOSTILE[-2],), confidence=0.4),)
    return Alignment(matches, ambiguous, (), specs, specs, notes=("</style><b>note\u202e</b>",))


def fused(depth: int = 12) -> Alignment:
    """Make an alignment of a transformer whose query, key and value one side has in one tensor."""
    source, target, matches = [spec("embed.tokens", 50, 8)], [spec("wte.weight", 50, 8)], []
    matches.append(Match("wte.weight", ("embed.tokens",), confidence=0.95, evidence={"name": 0.2, "shape": 1.0}))
    for i in range(depth):
        for name, shape in (("weight", (8, 8)), ("bias", (8,))):
            parts = [f"encoder.layers.{i}.attention.{part}_proj.{name}" for part in "qkv"]
            source += [spec(part, *shape) for part in parts]
            target.append(spec(f"blocks.{i}.attn.qkv.{name}", 24, *shape[1:]))
            matches.append(
                Match(target[-1].key, tuple(parts), Concatenate(0), 1.0 - i / 1000, {"name": 0.7, "structure": 0.9})
            )
        for name in ("weight", "bias"):
            source.append(spec(f"encoder.layers.{i}.norm.{name}", 8))
            target.append(spec(f"blocks.{i}.ln.{name}", 8))
            matches.append(Match(target[-1].key, (source[-1].key,)))
    return Alignment(tuple(matches), (), (), tuple(source), tuple(target))


FUSED = fused()

MIXED = mixed(
    (
        Match("patch.weight", ("stem.weight",), confidence=0.65, evidence={"name": 0.1, "shape": 1.0}),
        *(
            Match(f"layers.{i}.ln.{leaf}", (f"blocks.{i}.norm.{leaf}",), confidence=0.995)
            for i in range(3)
            for leaf in ("weight", "bias")
        ),
        *(
            Match(
                f"layers.{i}.{part}.weight",
                (f"blocks.{i}.qk.weight",),
                Split(0, 16 * place, 16),
                confidence=0.85,
                warnings=("the parts are distinguished by their order alone",),
            )
            for i in range(3)
            for place, part in enumerate("qk")
        ),
    ),
    (
        spec("stem.weight", 16, 3, 4, 4),
        *(spec(f"blocks.{i}.norm.{leaf}", 16) for i in range(3) for leaf in ("weight", "bias")),
        *(spec(f"blocks.{i}.qk.weight", 32, 16, dtype=torch.float16) for i in range(3)),
    ),
    (
        spec("patch.weight", 16, 3, 4, 4),
        *(spec(f"layers.{i}.ln.{leaf}", 16) for i in range(3) for leaf in ("weight", "bias")),
        *(spec(f"layers.{i}.{part}.weight", 16, 16) for i in range(3) for part in "qk"),
    ),
)


def many(count: int) -> Alignment:
    """Make an alignment of layers with experts, of ``count`` matches or a few less."""
    source, target, matches = [], [], []
    for i in range(count // 50):
        for k in range(25):
            for own, other in (("w1", "up"), ("w2", "down")):
                source.append(spec(f"model.layers.{i}.feed_forward.experts.{k}.{own}.weight", 64, 32))
                target.append(spec(f"decoder.blocks.{i}.moe.experts.{k}.{other}_proj.weight", 64, 32))
                evidence = {"name": (i % 7) / 7, "order": k / 25}
                matches.append(Match(target[-1].key, (source[-1].key,), confidence=0.9 + k / 250, evidence=evidence))
    return Alignment(tuple(matches), (), (), tuple(source), tuple(target))


def unlike(count: int) -> Alignment:
    """Make an alignment of layers that all differ, so that nothing is folded."""
    source = tuple(spec(f"model.part{i}x.{i * 7919 % 1000}.weight", 8, i % 97 + 1) for i in range(count))
    target = tuple(spec(f"net.{i // 50}.unit{i}y.kernel", 8, i % 97 + 1) for i in range(count))
    matches = tuple(Match(other.key, (own.key,), confidence=0.9) for own, other in zip(source, target, strict=True))
    return Alignment(matches, (), (), source, target)
