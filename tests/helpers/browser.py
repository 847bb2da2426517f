"""A browser for pages, where there is one."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

NO_BROWSER = "no browser found: the review page was not tested in one"
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (
    *("--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)


@contextmanager
def open_browser():
    """Chromium of the system or of Playwright; skips where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip(f"{NO_BROWSER} (pip install playwright)")
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, _NAMES)), None) or playwright.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip(f"{NO_BROWSER} (playwright install chromium)")
        browser = playwright.chromium.launch(executable_path=path, args=list(_QUIET))
        yield browser
        browser.close()
