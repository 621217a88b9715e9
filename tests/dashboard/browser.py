"""A headless Chromium, driven by selenium, where both are installed.

Run as a program, it says what is missing.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_DRIVERS = ("chromedriver", "chromium-driver")


def why_missing() -> str | None:
    """What is missing to drive a browser, and how to get it; None if nothing is."""
    missing = [
        names[0] for names in (_BROWSERS, _DRIVERS) if not any(shutil.which(name) for name in names)
    ]
    if not missing:
        return None
    return (
        f"no {' and no '.join(missing)} here; on Debian: apt-get install chromium chromium-driver"
    )


@contextlib.contextmanager
def chromium(
    *, width: int = 1400, height: int = 900, scale: float = 1
) -> Iterator[webdriver.Chrome]:
    """A browser without a window, of that many CSS pixels; `scale` device pixels to each."""
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, _BROWSERS)))
    for argument in (
        "headless=new",
        "no-sandbox",  # root has none, as in CI's containers
        "disable-dev-shm-usage",
        "disable-gpu",
        "hide-scrollbars",
        "force-color-profile=srgb",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = next(filter(None, map(shutil.which, _DRIVERS)))
    browser = webdriver.Chrome(options, Service(driver))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.set_script_timeout(600)
        browser.set_page_load_timeout(600)
        yield browser
    finally:
        browser.quit()


if __name__ == "__main__":
    sys.exit(why_missing())
