"""Take the README's picture: ``python -m benchmarks.figures.picture`` writes ``pictures/report-{light,dark}.png``.

It shows the page that ``Alignment.to_html`` writes for transformers' ViT in timm's, with a head of ten classes: query,
key and value become one tensor, the norms stand in another order, and the head is left out. Nothing is downloaded.
Needs chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from transformers import ViTConfig, ViTForImageClassification

import autoalign

FOLDER = Path(__file__).parent / "pictures"
WIDTH, SCALE = 1120, 1.5

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync")


def alignment() -> autoalign.Alignment:
    """Align the two networks, on the meta device."""
    with torch.device("meta"):
        source = ViTForImageClassification(ViTConfig(num_labels=1000))
        target = timm.create_model("vit_base_patch16_224", num_classes=10)
    return autoalign.align(source, target)


def take(folder: Path) -> list[Path]:
    """Write the picture in light and dark; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        alignment().to_html(page, title="transformers ViT → timm vit_base_patch16_224, 10 classes")
        with chromium(Path(scratch) / "profile") as driver:
            for scheme in ("light", "dark"):
                files.append(folder / f"report-{scheme}.png")
                files[-1].write_bytes(_photograph(driver, page, scheme))
    return files


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """Start a headless browser with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def _photograph(driver: webdriver.Chrome, page: Path, scheme: str) -> bytes:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": WIDTH, "height": 400, "deviceScaleFactor": SCALE, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.as_uri())
    height = driver.execute_script("return document.getElementById('canvas').getBoundingClientRect().bottom + 14")
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": int(height)})
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return base64.b64decode(shot["data"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the picture and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures.picture", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write (default: %(default)s)")
    for path in take(parser.parse_args(arguments).folder):
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
