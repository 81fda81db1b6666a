"""The page in a browser: what a person sees, clicks, types and finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from selenium.webdriver.common.keys import Keys

import autoalign
from autoalign.alignment import Alignment
from autoalign.reports.rows import escaped
from tests.reports.conftest import Browser
from tests.reports.examples import FUSED, HOSTILE, MIXED, fused, hostile, many, unlike


def ribbons(browser: Browser) -> list[list[str]]:
    """Read each ribbon: the labels of the rows that it joins, and its kind."""
    found: list[list[str]] = browser.run(
        """
        const by = {source: new Map(), target: new Map()};
        for (const side of ["source", "target"]) {
          for (const node of document.querySelectorAll(`#${side} .row`)) by[side].set(node.row.index, node.row.label);
        }
        return [...document.querySelectorAll(".ribbon")].map((node) => [
          by.source.get(node.ribbon.source), by.target.get(node.ribbon.target), node.ribbon.kind]).sort()"""
    )
    return found


def test_repeated_blocks_are_one_and_fused_tensors_are_joined(browser: Browser) -> None:
    browser.open(FUSED)
    assert browser.rows("source") == [
        *("embed.tokens", "encoder.layers.{0…11}", "attention", "q_proj", "k_proj", "v_proj", "norm"),
    ]
    assert browser.rows("target") == ["wte.weight", "blocks.{0…11}", "attn.qkv", "ln"]
    assert ribbons(browser) == [
        ["embed.tokens", "wte.weight", "good"],
        ["k_proj", "attn.qkv", "good"],
        ["norm", "ln", "sure"],
        ["q_proj", "attn.qkv", "good"],
        ["v_proj", "attn.qkv", "good"],
    ]
    assert browser.texts(".on-ribbon") == ["concatenate"]
    assert browser.run("return document.querySelectorAll('.joint').length") == 1
    assert browser.text("#shown") == "49 matches"


def test_unfolding_shows_each_block_on_both_sides_and_folding_undoes_it(browser: Browser) -> None:
    browser.open(fused(4))
    folded = browser.rows("source"), browser.rows("target")
    browser.click("#source .times", "4")
    assert browser.rows("target") == [
        *("wte.weight", "blocks"),
        *(label for i in range(4) for label in (str(i), "attn.qkv", "ln")),
    ]
    assert browser.rows("source").count("q_proj") == 4
    assert len(ribbons(browser)) == 1 + 4 * 4
    browser.click("#target .times", "fold")
    assert (browser.rows("source"), browser.rows("target")) == folded


def test_opening_a_module_shows_its_tensors_on_both_sides(browser: Browser) -> None:
    browser.open(FUSED)
    browser.run("document.querySelectorAll('#target .row')[3].querySelector('.twist').click()")
    assert browser.rows("target")[-3:] == ["ln", "weight", "bias"]
    assert browser.rows("source")[-3:] == ["norm", "weight", "bias"]


def test_a_click_shows_the_evidence(browser: Browser) -> None:
    browser.open(MIXED)
    assert not browser.run("return document.getElementById('panel').checkVisibility()")
    browser.click("#target .row", "one.weight")
    panel = browser.text("#panel")
    for said in ("not loaded", "twin1.weight", "[7, 16] float32", "0.50", "To choose"):
        assert said in panel
    assert browser.texts(".choice code") == [
        'rules=[("twin1.weight", "one.weight")]',
        'rules=[("twin2.weight", "one.weight")]',
    ]
    browser.click("#target .row", "patch.weight")
    assert [browser.texts(".cues dt")[0][:4], *browser.texts(".cues .value")] == ["name", "0.10", "1.00"]
    assert "No alternative was close" in browser.text("#panel")
    browser.click("#panel .close")
    assert not browser.run("return document.getElementById('panel').checkVisibility()")


def undecided() -> Alignment:
    """Align two sides whose norms could be exchanged, in all blocks at once, beside layers that are clear."""

    def side(*names: str) -> dict[str, torch.Tensor]:
        keys = [f"h.{i}.{name}.weight" for i in range(3) for name in names]
        return {key: torch.ones(4) for key in keys} | {f"h.{i}.fc.weight": torch.ones(9, 4) for i in range(3)}

    return autoalign.align(dict(sorted(side("a", "b").items())), dict(sorted(side("one", "two").items())))


def test_a_choice_is_pairs_of_crossing_ribbons_with_the_rule_to_copy(browser: Browser) -> None:
    alignment = undecided()
    (choice,) = alignment.choices
    browser.open(alignment)
    browser.click("#target .row", "one")
    pasted = [tuple(eval(text.removeprefix("rules="))) for text in browser.texts(".choice code")]
    assert pasted == [option.rules for option in choice.options]
    drawn = browser.run(
        """
        const slope = (path) => { const y = path.match(/-?[0-9.]+/g).map(Number); return Math.sign(y[7] - y[1]); };
        return [...document.querySelectorAll(".crossing")].map((picture) =>
          [...picture.querySelectorAll("path")].map((path) => slope(path.getAttribute("d"))))"""
    )
    assert drawn == [[0, 0], [-1, 1]]
    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    browser.click(".paste button")
    browser.until(lambda: browser.texts(".paste button")[0] == "Copied" or browser.run("return !!`${getSelection()}`"))


def test_an_ambiguous_row_opens_on_what_is_ambiguous(browser: Browser) -> None:
    browser.open(undecided())
    browser.click("#detail label", "Blocks")
    browser.run(
        "const row = document.querySelector('#target .row'); if (row.row.open) row.querySelector('.twist').click()"
    )
    browser.click("#target .row", "h")
    assert browser.run("return document.querySelectorAll('.groups button').length") == 3
    assert "not loaded" in browser.text("#panel .verdict")
    assert "fc" not in browser.text(".groups [aria-current] .key")


def test_files_and_models_are_named(browser: Browser, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "small.pth")
    browser.open(autoalign.align(tmp_path / "small.pth", torch.nn.Linear(3, 2)))
    assert browser.driver.title == browser.text("h1") == "small.pth → Linear"
    assert browser.texts(".heads span") == ["small.pth", "Linear"]


def test_a_comparison_is_coloured_by_change(browser: Browser) -> None:
    torch.manual_seed(0)
    first = {f"layers.{i}.fc.weight": torch.randn(8, 9) for i in range(4)} | {"head.weight": torch.randn(3, 8)}
    second = {key: value.clone() for key, value in first.items()}
    second["layers.3.fc.weight"] *= 1.03
    second["head.weight"] = torch.randn(3, 8)
    browser.open(autoalign.diff(first, second))
    assert browser.texts(".chip") == ["equal3", "changed1", "by 10 % and more1"]
    assert browser.text("#shown") == "5 compared"
    assert [kind for _, _, kind in ribbons(browser)] == ["poor", "low", "sure"]
    assert browser.texts(".heads h2") == ["First a checkpoint", "Second another"]
    assert "3 %" in browser.texts(".on-ribbon")
    browser.click("#target .row", "layers.3")
    assert browser.text("#panel .change") == "mean 3 %, largest 3 %"
    assert "compared" in browser.text("#panel .verdict")


def test_the_evidence_of_repeats_is_gone_through_one_by_one(browser: Browser) -> None:
    browser.open(MIXED)
    browser.click("#target .row", "q.weight")
    assert "layers.0.q.weight" in browser.text("#panel .target .key")
    assert "1 of 3, confidence 0.85" in browser.text(".steps")
    browser.click(".next")
    browser.click(".next")
    assert browser.text("#panel .target .key") == "layers.2.q.weight"
    assert browser.text("#panel .source .what") == "[32, 16] float16"
    assert browser.text("#panel .operation") == "↓ split(dim 0, 0:16)"
    assert "distinguished by their order" in browser.text("#panel .warning")
    browser.click(".next")
    assert browser.text("#panel .target .key") == "layers.0.q.weight"


def test_a_ribbon_shows_its_own_matches(browser: Browser) -> None:
    browser.open(FUSED)
    browser.run(
        """
        const ribbon = [...document.querySelectorAll(".ribbon")].find(
          (node) => node.ribbon.links.length === 24 && node.ribbon.operations.has("concatenate"));
        ribbon.dispatchEvent(new MouseEvent("click", {bubbles: true}))"""
    )
    assert browser.texts(".groups .key") == ["blocks.{0…11}.attn.qkv.weight", "blocks.{0…11}.attn.qkv.bias"]
    browser.click(".groups button", "bias")
    assert browser.texts("#panel .source .key") == [f"encoder.layers.0.attention.{part}_proj.bias" for part in "qkv"]
    assert "1 of 12, confidence 0.99 to 1.00" in browser.text(".steps")


def test_what_is_missing_unexpected_and_mismatched_is_marked(browser: Browser) -> None:
    browser.open(MIXED)
    marked = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('.row')].filter((node) => node.querySelector('.pill'))"
        ".map((node) => [node.row.label, node.querySelector('.pill').textContent]))"
    )
    assert marked == {
        "twin1.weight": "? ambiguous",
        "one.weight": "? ambiguous",
        "twin2.weight": "unexpected",
        "ema.decay": "unexpected",
        "fc": "≠ shape",
        "head": "≠ shape",
        "extra.weight": "missing",
        "pooler.weight": "missing",
    }
    assert browser.run("return document.querySelectorAll('.loose').length") == 4
    browser.click("#target .row", "head")
    assert "≠ dim 0: 1000, needs 10" in browser.text("#panel .detail")
    browser.click("#target .row", "extra.weight")
    assert "all 6 source tensors of this shape have other counterparts" in browser.text("#panel")
    browser.click("#target .row", "pooler.weight")
    assert "excluded" in browser.text("#panel .reason")


def test_the_chips_are_legend_and_filter(browser: Browser) -> None:
    browser.open(MIXED)
    assert browser.texts(".chip") == [
        "0.99 and more6",
        "low: 0.7 to 0.96",
        "low: below 0.71",
        "ambiguous, not loaded1",
        "mismatched, not loaded2",
        "missing2",
        "unexpected5",
    ]
    browser.click(".chip", "missing")
    assert (browser.rows("source"), browser.rows("target")) == ([], ["extra.weight", "pooler.weight"])
    browser.click(".chip", "ambiguous")
    assert (browser.rows("source"), len(browser.rows("target"))) == (["twin1.weight"], 3)
    assert browser.text("#shown") == "0 of 13 matches, 1 ambiguous, 2 missing, 1 unexpected"
    browser.click("#reset")
    assert browser.text("#shown") == "13 matches"
    browser.click(".chip", "unexpected")
    assert browser.rows("source") == ["twin1.weight", "twin2.weight", "fc", "ema.decay"]


def test_filter_by_operation(browser: Browser) -> None:
    browser.open(MIXED)
    assert browser.texts("#operation option") == ["All operations", "copy (8)", "split (6)"]
    browser.run(
        "const box = document.getElementById('operation'); box.value = 'split'; box.dispatchEvent(new Event('change'))"
    )
    assert browser.rows("source") == ["blocks.{0…2}.qk.weight"]
    assert browser.rows("target") == ["layers.{0…2}", "q.weight", "k.weight"]
    assert browser.texts(".on-ribbon") == ["split"]


@pytest.mark.parametrize(
    ("query", "source", "target"),
    [
        ("LAYERS.1.LN", ["blocks.1.norm"], ["layers.1.ln"]),
        ("blocks.2.qk", ["blocks.2.qk.weight"], ["layers.2", "q.weight", "k.weight"]),
        ("twin2", ["twin2.weight"], []),
        ("absent", [], []),
    ],
)
def test_search_on_both_sides(browser: Browser, query: str, source: list[str], target: list[str]) -> None:
    browser.open(MIXED)
    browser.search(query)
    assert (browser.rows("source"), browser.rows("target")) == (source, target)
    assert browser.run("return document.getElementById('nothing').checkVisibility()") == (not source + target)


def test_the_keyboard_is_enough(browser: Browser) -> None:
    browser.open(FUSED)
    browser.run("document.getElementById('source').focus()")
    active = "return document.activeElement.getAttribute('aria-activedescendant')"

    def label() -> str:
        return str(browser.run(f"return document.getElementById((() => {{{active}}})()).row.label"))

    assert label() == "embed.tokens"
    browser.type("#source", Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert label() == "q_proj"
    browser.type("#source", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert label() == "weight"
    browser.type("#source", Keys.ARROW_LEFT)
    assert label() == "q_proj"
    browser.type("#source", Keys.END)
    assert label() == "norm"
    browser.type("#source", Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "panel"
    assert "blocks.{0…11}.ln.weight" in browser.text(".groups")
    browser.type("#panel", Keys.ESCAPE)
    assert browser.run("return document.activeElement.id") == "source"
    browser.type("#source", Keys.TAB)
    assert browser.run("return document.activeElement.id") == "target"


@pytest.mark.parametrize("focus", ["#target", "#operation", "#fold", "#detail-layers", "#reset", ".chip", "body"])
def test_a_slash_searches_from_every_focus(browser: Browser, focus: str) -> None:
    browser.open(MIXED)
    browser.run("document.getElementById('reset').hidden = false; document.querySelector(arguments[0]).focus()", focus)
    browser.type(focus, "/")
    assert browser.run("return document.activeElement.id") == "search"
    browser.type("#search", "a/b")
    assert browser.run("return document.getElementById('search').value") == "a/b"


def test_what_readers_of_the_screen_hear(browser: Browser) -> None:
    browser.open(MIXED)
    said = browser.run(
        """
        const row = [...document.querySelectorAll("[role=tree] > [role=treeitem]")].find(
          (node) => node.row.label === "one.weight");
        return ["aria-label", "aria-level", "aria-selected"].map((name) => row.getAttribute(name))"""
    )
    assert said == ["one.weight, [7, 16], from twin1.weight, ambiguous", "1", "false"]
    unnamed = browser.run(
        """
        return [...document.querySelectorAll("button, input, select, [role=tree], [role=img]")].filter((node) =>
          !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length)).length"""
    )
    assert unnamed == 0


def test_keys_that_are_markup_break_nothing(browser: Browser) -> None:
    alignment = hostile()
    browser.open(alignment)
    assert browser.driver.title == "Alignment report"
    browser.click("#detail label", "Tensors")
    shown = browser.run("return [...document.querySelectorAll('#target .row')].map((node) => node.row.label)")
    assert escaped(HOSTILE[0]).split(".")[0] in "".join(shown)
    for label in ("quotes", "control", "emoji"):
        browser.search(label)
        assert browser.text("#shown").startswith("1 of")
        browser.click("#target .row:last-child")
        assert label in browser.text("#panel .target .key")
    assert "<b>warning</b>" in browser.text("#panel")
    assert browser.run("return document.querySelectorAll('b, img, #data ~ script').length") == 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out_from_their_ground(browser: Browser, dark: bool) -> None:
    browser.open(MIXED, dark=dark)
    browser.click("#target .row", "patch.weight")
    contrasts = browser.run(
        """
        const light = (color) => {
          const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
          return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const ground = light(getComputedStyle(document.body).backgroundColor);
        const contrast = (color) => {
          const own = light(color);
          return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
        };
        const texts = [...document.querySelectorAll("h1, .lead, .label, .tail, .shape, .pill, .verdict, dt, small")];
        return [ground, Math.min(...texts.map((node) => contrast(getComputedStyle(node).color))),
          Math.min(...[...document.querySelectorAll(".chip .swatch")].map((node) => contrast(
            getComputedStyle(node).getPropertyValue("--kind").trim().replace(/^#(..)(..)(..)$/, (_, ...hex) =>
              hex.slice(0, 3).map((part) => parseInt(part, 16)).join(" ")))))]"""
    )
    ground, text, graphics = contrasts
    assert (ground < 0.1) == dark
    assert text >= 4.5  # as WCAG 2 asks for texts
    assert graphics >= 2.2


@pytest.mark.parametrize("width", [360, 800, 1300])
def test_no_width_needs_scrolling_sideways(browser: Browser, width: int) -> None:
    browser.open(MIXED, width=width)
    browser.click("#source .row", "twin1")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.run("return document.getElementById('ribbons').getBoundingClientRect().width") > 30


def test_a_large_page_is_quick_and_draws_only_what_is_in_sight(browser: Browser) -> None:
    browser.open(unlike(5000))
    assert browser.ready < 5
    browser.click("#detail label", "Tensors")
    nodes = "return document.querySelectorAll('.row, .ribbon').length"
    assert 50 < browser.run(nodes) < 1000
    assert browser.run("return document.getElementById('canvas').offsetHeight") > 100_000
    browser.run("window.scrollTo(0, 60000)")
    browser.until(
        lambda: browser.run("return [...document.querySelectorAll('.row')].some((node) => node.row.y > 59000)")
    )
    assert 50 < browser.run(nodes) < 1000
    browser.search("part4321x")
    assert browser.rows("target") == ["net.86.unit4321y.kernel"]


def test_a_large_page_of_repeats_is_folded(browser: Browser) -> None:
    browser.open(many(5000))
    assert browser.rows("source") == ["model.layers.{0…99}.feed_forward.experts.{0…24}", "w1.weight", "w2.weight"]
    assert browser.rows("target") == ["decoder.blocks.{0…99}.moe.experts.{0…24}", "up_proj.weight", "down_proj.weight"]


def test_printed_it_is_whole_and_light(browser: Browser) -> None:
    browser.open(unlike(200), dark=True)
    browser.click("#detail label", "Tensors")
    browser.media(dark=True, printing=True)
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return document.querySelectorAll('#source .row.tensor').length") == 200
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.run("return document.querySelector('.tools').checkVisibility()")


def test_without_scripts_the_report_is_text(browser: Browser) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        path = browser._folder / "report.html"
        MIXED.to_html(path)
        browser.driver.get(path.as_uri())
        assert "Ambiguous: proposed, but not loaded" in browser.driver.find_element("tag name", "pre").text
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_short_form_in_a_page(browser: Browser) -> None:
    path = browser._folder / "cell.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><link rel=icon href=data:,>{hostile()._repr_html_()}", "utf-8")
    browser.driver.get(path.as_uri())
    assert browser.run("return document.querySelectorAll('script, img, b').length") == 0
    assert browser.run("return document.querySelectorAll('details').length") > 1
