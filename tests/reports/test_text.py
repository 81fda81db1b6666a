"""Reports as text and Markdown, and the errors that are raised where all was wanted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import autoalign
from autoalign import align
from autoalign.alignment import Alignment
from autoalign.errors import AmbiguousAlignmentError, IncompatibleTensorsError, InputError, NothingLoadedError
from autoalign.plan.matches import Candidate, Match
from autoalign.plan.operations import Reshape, Transpose
from autoalign.plan.specs import TensorSpec
from autoalign.reports.text import SCREEN, render_markdown
from tests.alignments import MIXED, spec


def copies(source: tuple[TensorSpec, ...], target: tuple[TensorSpec, ...]) -> Alignment:
    """Make the alignment that fills each target from the source in the same place."""
    matches = tuple(Match(other.key, (own.key,)) for own, other in zip(source, target, strict=True))
    return Alignment(matches, (), (), source, target)


def blocks(depth: int) -> Alignment:
    """Make an alignment of a transformer's blocks under two names."""
    source, target = [], []
    for i in range(depth):
        source += [spec(f"blocks.{i}.norm1.weight", 8), spec(f"blocks.{i}.norm1.bias", 8)]
        target += [spec(f"encoder.layer.{i}.ln.weight", 8), spec(f"encoder.layer.{i}.ln.bias", 8)]
        source.append(spec(f"blocks.{i}.attn.proj.weight", 8, 8))
        target.append(spec(f"encoder.layer.{i}.attention.output.dense.weight", 8, 8))
    return copies(tuple(source), tuple(target))


def test_every_section_of_a_mixed_alignment() -> None:
    assert (
        MIXED.render(limit=60)
        == """\
11 of 16 target tensors are filled from 14 of 19 source tensors.
             tensors            elements
matched           11               2,480   86.7 % of the target
mismatched         2                 170    5.9 % of the target
ambiguous          1                 112    3.9 % of the target
missing            2                  97    3.3 % of the target
unexpected         5              17,225   87.4 % of the source
excluded, of the missing and unexpected: 1
Note: The container 'ema' was taken.

Matched: source -> target, tensors x shape, lowest confidence, operation
  stem.weight -> patch.weight                    [16, 3, 4, 4]  0.97  copy
  stem.position -> position                      [5, 16]        0.91  reshape[5, 16] of [1, 5, 16]
  blocks.{0...2} -> layers.{1...3}
    norm.{weight,bias} -> ln.{weight,bias}  6 x  [16]           0.97  copy
    q.weight + k.weight
      -> qk.weight                  3 x  [32, 16]       1.00  concatenate(dim 0), float16 to float32
    ! right shape, but rotary layouts differ

Mismatched: the counterpart has another shape
  head.weight  [10, 16] float32  nearest: fc.weight [1000, 16] (dim 0: 1000, needs 10)
  head.bias    [10] float32      nearest: fc.bias [1000]

Ambiguous: proposed, but not loaded; to choose
  twin1.weight -> one.weight  [7, 16]  copy, confidence 0.50
    ! its confidence is below min_confidence, and something else of this shape may fit as well
    as proposed: rules=[("twin1.weight", "one.weight")]
    or: rules=[("twin2.weight", "one.weight")]
    settled by the code of the checkpoint's model, by autoalign.verify(source_model, model, inputs)

Missing: not filled
  extra.weight   [16, 1] float32
      all 6 source tensors of this shape have other counterparts; nearest: twin1.weight [7, 16]
  pooler.weight  [9, 9] float32   excluded

Unexpected: in the source and not used
  twin1.weight  [7, 16] float32     proposed for one.weight
  twin2.weight  [7, 16] float32
      ambiguous: 1 unused target tensor has this shape; nearest: one.weight [7, 16]
  fc.weight     [1000, 16] float32  of another shape than head.weight
  fc.bias       [1000] float32      of another shape than head.bias
  ema.decay     [] float32          no target tensor of this shape; nearest: head.bias [10]"""
    )


@pytest.mark.parametrize("size", [0, -1, "80", 1.5])
def test_a_width_or_limit_that_is_no_positive_number_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=re.escape(f"width={size!r} is not a positive number of characters")):
        MIXED.render(width=size)
    with pytest.raises(InputError, match=re.escape(f"limit={size!r} is not a positive number of lines, or None")):
        MIXED.render(limit=size)


def test_the_report_says_how_to_get_every_row() -> None:
    report = blocks(12).render(limit=1)
    assert "print(alignment.render(limit=None))" in report
    assert str(MIXED) == MIXED.render() == MIXED.render(width=100, limit=SCREEN)


def test_totals_are_sums_over_the_alignment() -> None:
    status, numel = MIXED.status, {spec.key: spec.numel for spec in MIXED.target_specs}
    for kind in ("matched", "mismatched", "ambiguous", "missing"):
        keys = [key for key in status if status[key] == kind]
        assert totals(MIXED.render())[kind] == (len(keys), sum(numel[key] for key in keys))
    unexpected = [spec.numel for spec in MIXED.source_specs if spec.key in MIXED.unexpected_keys]
    assert totals(MIXED.render())["unexpected"] == (len(unexpected), sum(unexpected))


def totals(report: str) -> dict[str, tuple[int, int]]:
    """Read the table of totals: tensors and elements of each kind."""
    rows = re.findall(r"^(\w+) +([\d,]+) +([\d,]+) +[<\d]", report, re.MULTILINE)
    return {kind: (int(tensors.replace(",", "")), int(elements.replace(",", ""))) for kind, tensors, elements in rows}


def tensors_in_rows(report: str) -> int:
    """Add up the tensors of all rows of a whole report: as many as before the 'x', else one for each shape."""
    body = report[report.index("\n\n") :]
    return sum(int((count or "1").replace(",", "")) for count in re.findall(r"(?:([\d,]+) x)?  \[[\d, ]*\]", body))


@pytest.mark.parametrize("depth", [1, 2, 12, 200])
def test_the_rows_hold_as_many_tensors_as_the_totals(depth: int) -> None:
    report = blocks(depth).render(limit=None)
    assert tensors_in_rows(report) == 3 * depth == totals(report)["matched"][0]


def test_blocks_fold_under_a_heading_that_shows_the_index_on_both_sides() -> None:
    assert blocks(12).render().splitlines()[5:] == [
        "  blocks.{0...11} -> encoder.layer.{0...11}",
        "    norm1.{weight,bias} -> ln.{weight,bias}            24 x  [8]     1.00  copy",
        "    attn.proj.weight -> attention.output.dense.weight  12 x  [8, 8]  1.00  copy",
    ]


def test_a_heading_takes_only_the_start_of_keys() -> None:
    names = ("0.10.weight", "0.20.0.weight")
    alignment = copies(
        tuple(spec(name, i + 1) for i, name in enumerate(names)),
        tuple(spec(f"net.{name}", i + 1) for i, name in enumerate(names)),
    )
    assert alignment.render().splitlines()[5:] == [
        "  0 -> net.0",
        "    10.weight    [1]  1.00  copy",
        "    20.0.weight  [2]  1.00  copy",
    ]


def test_rows_fold_only_where_every_field_agrees() -> None:
    alignment = blocks(6)
    differing = {
        "encoder.layer.1.ln.weight": Match(
            "encoder.layer.1.ln.weight", ("blocks.1.norm1.weight",), warnings=("doubt",)
        ),
        "encoder.layer.2.ln.weight": Match("encoder.layer.2.ln.weight", ("blocks.2.norm1.weight",), Reshape((8,))),
        "encoder.layer.3.ln.weight": Match("encoder.layer.3.ln.weight", ("blocks.3.norm1.weight",), confidence=0.6),
    }
    report = replace(alignment, matches=tuple(differing.get(m.target, m) for m in alignment.matches)).render()
    assert "blocks.1.norm1.weight -> encoder.layer.1.ln.weight" in report
    assert "blocks.2.norm1.weight -> encoder.layer.2.ln.weight" in report
    assert re.search(r"blocks\.\{0,3\.\.\.5\}.norm1.weight -> .* 4 x  \[8\] +0\.60  copy", report)
    assert re.search("copy\n    ! doubt\n", report)


def test_a_key_of_both_sides_is_written_once() -> None:
    assert copies((spec("fc.weight", 2),), (spec("fc.weight", 2),)).render().splitlines()[-1] == (
        "  fc.weight  [2]  1.00  copy"
    )


def test_a_part_is_never_called_all() -> None:
    source = (spec("large", 10**6), spec("small", 1))
    partial = Alignment((Match("large", ("large",)),), (), (), source, source)
    assert "1,000,000   99.9 % of the target" in partial.render()
    assert "1  < 0.1 % of the target" in partial.render()


@pytest.mark.parametrize("width", [60, 100, 140])
def test_a_screen_is_enough_for_any_number_of_kinds(width: int) -> None:
    source = tuple(spec(f"{chr(97 + i % 26) * 30}{i // 26}x.weight", i + 1) for i in range(500))
    target = tuple(spec(f"{chr(97 + i % 26) * 20}{i // 26}y.weight", i + 1) for i in range(500))
    whole = copies(source, target)
    half = replace(whole, matches=whole.matches[::2])
    for alignment in (whole, half, replace(half, matches=())):
        report = alignment.render(width=width)
        lines = report.splitlines()
        assert len(lines) <= SCREEN
        assert max(map(len, lines)) <= width or width < 80
        sections = report.split("\n\n")[1:]
        for section in sections:  # what is cut is counted
            kept = tensors_in_rows(f"\n\n{section}")
            (left,) = re.findall(r"rows, of ([\d,]+) tensors", section)
            assert kept + int(left) in {500, 250}
        assert tensors_in_rows(alignment.render(width=width, limit=None)) == sum(
            count for kind, (count, _) in totals(report).items()
        )


def test_a_long_key_is_shortened_in_its_middle() -> None:
    key = f"{'a.' * 60}weight"
    lines = copies((spec(key, 2),), (spec(f"x.{key}", 2),)).render(width=80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    source, target, facts = lines[-3:]
    assert re.fullmatch(r"  a\.a\..*….*a\.weight", source)
    assert re.fullmatch(r"    -> x\.a\..*….*a\.weight", target)
    assert facts == "      [2]  1.00  copy"


def test_control_characters_are_escaped_everywhere() -> None:
    key = "we\night\x1b[31m\u202e"
    alignment = Alignment((), (), (), (spec(key, 2),), (spec(f"{key}.x", 2),), notes=(f"note {key}",))
    with pytest.raises(IncompatibleTensorsError, match=r"we\\night\\x1b\[31m\\u202e") as caught:
        alignment.raise_if_incomplete()
    assert all(line.isprintable() for line in f"{caught.value}\n{caught.value.details}".splitlines())
    assert all(line.isprintable() for line in alignment.render().splitlines())
    assert r"we\night\x1b[31m\u202e.x  [2] float32" in alignment.render()


def reasons(alignment: Alignment) -> str:
    return alignment.render(width=300)


@pytest.mark.parametrize(
    ("source", "matched", "excluded", "why"),
    [
        ([spec("s", 3)], {}, [], "no source tensor of this shape"),
        ([spec("s", 4, 1)], {"a": "s"}, [], "the only source tensor of this shape, s, is used for a"),
        ([spec("s", 4), spec("t", 4)], {"a": "s", "b": "t"}, [], "all 2 source tensors of this shape have other"),
        (
            [spec("s", 4), spec("t", 4)],
            {"a": "s"},
            [],
            "ambiguous: 1 unused source tensor has this shape",
        ),
        ([spec("s", 4)], {}, ["s"], "the source tensors of this shape are excluded"),
        ([spec("s", 4)], {}, ["lost"], "excluded"),
    ],
)
def test_the_reason_why_a_key_is_missing(
    source: list[TensorSpec], matched: dict[str, str], excluded: list[str], why: str
) -> None:
    target = (*(spec(key, 4) for key in matched), spec("lost", 4))
    matches = tuple(Match(key, (own,)) for key, own in matched.items())
    report = reasons(Alignment(matches, (), (), tuple(source), target, frozenset(excluded)))
    assert re.search(rf"^  lost  +\[4\] float32  {re.escape(why)}", report, re.MULTILINE)


def test_the_nearest_counterpart_is_of_the_same_block() -> None:
    source = tuple(spec(f"model.layers.{i}.mlp.{name}.weight", 4) for i in range(3) for name in ("gate", "up"))
    report = reasons(Alignment((), (), (), source, (spec("layers.2.mlp.gate_proj.weight", 5),)))
    assert "no source tensor of this shape; nearest: model.layers.2.mlp.gate.weight [4]" in report


def test_no_nearest_counterpart_where_no_name_is_alike() -> None:
    assert "nearest" not in reasons(Alignment((), (), (), (spec("zzz", 4),), (spec("head.weight", 5),)))


def test_a_scale_of_experts_takes_a_row_for_each_kind() -> None:
    names = [f"layers.{i}.experts.{j}.{leaf}" for i in range(20) for j in range(64) for leaf in ("gate", "up", "down")]
    source = tuple(spec(f"model.{name}", 4, 4) for name in names)
    report = copies(source, tuple(spec(name, 4, 4) for name in names)).render()
    assert report.splitlines()[5:] == [
        "  model.layers.{0...19}.experts.{0...63}.{gate,up,down}",
        "    -> layers.{0...19}.experts.{0...63}.{gate,up,down}  3,840 x  [4, 4]  1.00  copy",
    ]


def test_the_message_of_an_incomplete_alignment() -> None:
    source = (spec("body.weight", 4), spec("fc.weight", 1000, 512), spec("fc.bias", 1000))
    target = (spec("body.weight", 4), spec("head.weight", 10, 512), spec("head.bias", 10))
    alignment = Alignment((Match("body.weight", ("body.weight",)),), (), (), source, target)
    with pytest.raises(IncompatibleTensorsError, match="compatible source") as caught:
        alignment.raise_if_incomplete()
    assert str(caught.value).splitlines() == [
        "2 of 3 target tensors have no compatible source: head.weight, head.bias. "
        "2 of 3 source tensors are not used: fc.weight, fc.bias.",
        "Pass rules= to name counterparts, if there are any. error.details lists all.",
    ]
    assert (
        caught.value.details
        == """\
2 of 3 target tensors have no compatible source:
  head.weight  [10, 512] float32  no source tensor of this shape; nearest: fc.weight [1000, 512] (dim 0: 1000, needs 10)
  head.bias    [10] float32       no source tensor of this shape; nearest: fc.bias [1000]
2 of 3 source tensors are not used:
  fc.weight  [1000, 512] float32  no target tensor of this shape; nearest: head.weight [10, 512]
  fc.bias    [1000] float32       no target tensor of this shape; nearest: head.bias [10]"""
    )
    assert caught.value.alignment is alignment


def test_the_message_of_an_ambiguous_alignment() -> None:
    with pytest.raises(AmbiguousAlignmentError, match=r"no clear source: one.weight. They are not loaded.") as caught:
        MIXED.raise_if_ambiguous()
    assert str(caught.value).splitlines()[1].startswith("Pass rules of what you choose, or load with the alignment")
    assert (
        caught.value.details
        == """\
1 of 16 target tensors has no clear source:
  twin1.weight -> one.weight  [7, 16]  copy of [7, 16], confidence 0.50
    ! its confidence is below min_confidence, and something else of this shape may fit as well
    as proposed: rules=[("twin1.weight", "one.weight")]
    or: rules=[("twin2.weight", "one.weight")]
    settled by the code of the checkpoint's model, by autoalign.verify(source_model, model, inputs)"""
    )


def test_an_unsure_match_without_a_rival_is_below_min_confidence() -> None:
    unsure = Match("a", ("b",), confidence=0.31)
    report = Alignment((), (unsure,), (), (spec("b", 2),), (spec("a", 2),)).render()
    assert (
        "  b -> a  [2]  copy, confidence 0.31\n    ! its confidence is below min_confidence, though nothing" in report
    )


def test_an_empty_alignment() -> None:
    assert Alignment((), (), (), (), ()).render() == (
        "0 of 0 target tensors are filled from 0 of 0 source tensors.\n"
        "             tensors            elements\n"
        "matched            0                   0        - of the target"
    )


def test_another_operation_on_the_same_source_is_named() -> None:
    unsure = Match(
        "a", ("b",), confidence=0.45, alternatives=(Candidate(("b",), Transpose(), 0.0),), warnings=("doubt",)
    )
    report = Alignment((), (unsure,), (), (spec("b", 2, 2),), (spec("a", 2, 2),)).render()
    assert "  b -> a  [2, 2]  copy, confidence 0.45\n    ! doubt\n" in report
    assert "    or by 'transpose' of b: alignment.decided(alignment.choices[0].options[1])\n" in report


def test_more_notes_than_a_report_has_lines_are_cut() -> None:
    notes = tuple(f"exclude='unknown{number}' matches no key of either side." for number in range(40))
    assert notes[0] in replace(MIXED, notes=notes).render()  # raised an IndexError


KEYS = st.dictionaries(st.text("ab`|\n\\_*<.", min_size=1, max_size=6), st.integers(1, 3), min_size=1, max_size=5)


@given(KEYS, KEYS)
def test_tables_have_whole_rows_whatever_the_keys(one: dict[str, int], other: dict[str, int]) -> None:
    sides = ({key: torch.empty(size, device="meta") for key, size in side.items()} for side in (one, other))
    width = 0
    for line in render_markdown(align(*sides)).split("\n"):
        if line.startswith("| keys |"):
            width = line.count("|")
        if line.startswith("|"):
            assert line.replace(r"\|", "").count("|") == width


PARTLY = Alignment(
    (Match("a.weight", ("x.weight",)),),
    (),
    (),
    (spec("x.weight", 3), spec("y", 7)),
    (spec("a.weight", 3), spec("b", 9)),
)
WHOLE = Alignment((Match("a", ("x",)),), (), (), (spec("x", 3),), (spec("a", 3),))


def test_coverage_is_by_elements() -> None:
    assert (PARTLY.coverage, WHOLE.coverage, Alignment((), (), (), (), ()).coverage) == (3 / 12, 1, 1)


def test_nothing_is_raised_where_all_is_matched() -> None:
    WHOLE.raise_if_missing()
    WHOLE.raise_if_unexpected()
    WHOLE.raise_if_incomplete()
    WHOLE.raise_if_ambiguous()
    WHOLE.raise_if_nothing_matched()


def test_missing_keys_are_raised_with_both_shapes() -> None:
    with pytest.raises(IncompatibleTensorsError, match="5 of 16 target tensors have no compatible source") as caught:
        MIXED.raise_if_missing()
    text = caught.value.details
    assert re.search(r"head\.weight +\[10, 16\] float32 +nearest: fc\.weight \[1000, 16\]", text)
    assert re.search(r"twin1\.weight -> one\.weight +\[7, 16\] +copy of \[7, 16\], confidence 0\.50", text)
    assert "source tensors are not used" not in text
    assert caught.value.alignment is MIXED


def test_unexpected_keys_are_raised_with_both_shapes() -> None:
    with pytest.raises(IncompatibleTensorsError, match="5 of 19 source tensors are not used") as caught:
        MIXED.raise_if_unexpected()
    text = caught.value.details
    assert re.search(r"twin1\.weight +\[7, 16\] float32 +proposed for one\.weight \[7, 16\]", text)
    assert re.search(r"fc\.weight +\[1000, 16\] float32 +of another shape than head\.weight \[10, 16\]", text)
    assert "compatible source" not in text


def test_only_the_side_that_lacks_something_raises() -> None:
    extra = Alignment((Match("a", ("x",)),), (), (), (spec("x", 3), spec("y", 4)), (spec("a", 3),))
    extra.raise_if_missing()
    with pytest.raises(IncompatibleTensorsError, match="1 of 2 source tensors is not used"):
        extra.raise_if_unexpected()
    lacking = Alignment((Match("a", ("x",)),), (), (), (spec("x", 3),), (spec("a", 3), spec("b", 4)))
    lacking.raise_if_unexpected()
    with pytest.raises(IncompatibleTensorsError, match="1 of 2 target tensors has no compatible source"):
        lacking.raise_if_missing()


def test_a_fused_proposal_is_raised_with_the_shapes_of_its_sources() -> None:
    source = {f"net.{name}.weight": torch.ones(size, 8) for name, size in (("gate_proj", 6), ("up_proj", 6))}
    alignment = autoalign.align(source, {"net.net.0.proj.weight": torch.ones(12, 8)}, min_confidence=1.0)
    with pytest.raises(AmbiguousAlignmentError, match=r"1 of 1 target tensors has no clear source") as caught:
        alignment.raise_if_ambiguous()
    assert "concatenate(dim 0) of [6, 8]" in caught.value.details


def test_nothing_matched_is_raised_with_the_first_keys_of_both_sides() -> None:
    alignment = autoalign.align({"conv.weight": torch.ones(9, 2, 3, 3)}, {"fc.weight": torch.ones(4, 5)})
    with pytest.raises(NothingLoadedError, match="None of 1 target tensors has a source") as caught:
        alignment.raise_if_nothing_matched()
    text = caught.value.details
    assert re.search(r"The first of the 1 target tensors:\n  fc\.weight +\[4, 5\] float32\n", text)
    assert re.search(r"The first of the 1 source tensors:\n  conv\.weight +\[9, 2, 3, 3\] float32$", text)
    assert caught.value.alignment is alignment
