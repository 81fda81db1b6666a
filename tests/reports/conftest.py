"""A headless browser for the tests of pages; without one they are skipped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from autoalign.alignment import Alignment
from autoalign.loading.diff import Difference

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


class Browser:
    """A page in a browser, and what a person does with it."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver = driver
        self._folder = folder
        self.ready = 0.0  # seconds until the last page could be used

    def open(self, alignment: Alignment | Difference, *, dark: bool = False, width: int = 1300) -> None:
        """Show the report of an alignment or a comparison."""
        self.size(width)
        self.media(dark=dark)
        path = self._folder / "report.html"
        alignment.to_html(path)
        started = time.perf_counter()
        self.driver.get(path.as_uri())
        assert self.run("return document.documentElement.dataset.ready") == "true"
        self.ready = time.perf_counter() - started

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def media(self, *, dark: bool = False, printing: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        media = {"media": "print" if printing else "", "features": [scheme]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        """Read the texts of all elements."""
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        found: list[str] = self.run(script, selector)
        return found

    def text(self, selector: str) -> str:
        (found,) = self.texts(selector)
        return found

    def click(self, selector: str, containing: str = "") -> None:
        """Click the first element whose text contains a text, as a person does: it must be in sight."""
        for node in self.driver.find_elements(By.CSS_SELECTOR, selector):
            if containing in node.text:
                node.click()
                return
        raise AssertionError(f"no {selector} contains {containing!r}: {self.texts(selector)[:20]}")

    def type(self, selector: str, *keys: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)

    def until(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        """Wait for what follows upon an action."""
        end = time.perf_counter() + seconds
        while not condition():
            assert time.perf_counter() < end, "it did not come to pass"
            time.sleep(0.02)

    def search(self, text: str) -> None:
        self.run("const box = document.getElementById('search'); box.value = ''; box.focus()")
        self.type("#search", text, Keys.ENTER)

    def rows(self, side: str) -> list[str]:
        """Read the labels of the rows of a side, from top to bottom."""
        script = """
            const rows = [...document.querySelectorAll(`#${arguments[0]} .row`)].sort((a, b) => a.row.y - b.row.y);
            return rows.map((node) => node.querySelector(".label").textContent)"""
        found: list[str] = self.run(script, side)
        return found

    def complaints(self) -> list[str]:
        """Return the messages of the console since the last time: errors, and what the policy forbade."""
        return [entry["message"] for entry in _log(self.driver, "browser")]

    def requests(self) -> list[str]:
        """Return the addresses requested since the last time, except those that need no network."""
        messages = [json.loads(entry["message"])["message"] for entry in _log(self.driver, "performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:", "chrome:", "chrome-untrusted:", "about:"))]


def _log(driver: webdriver.Chrome, kind: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = driver.get_log(kind)  # type: ignore[no-untyped-call]
    return entries


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not browser or not chromedriver:
        pytest.skip("needs chromium and chromedriver, as of Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield chrome
    chrome.quit()


@pytest.fixture
def browser(driver: webdriver.Chrome, tmp_path: Path) -> Iterator[Browser]:
    """A browser that must have had nothing to complain of, and have asked for nothing, when the test is over."""
    _log(driver, "browser")
    _log(driver, "performance")
    page = Browser(driver, tmp_path)
    yield page
    assert page.complaints() == []
    assert page.requests() == []
