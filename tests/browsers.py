"""A headless Chromium, for tests of pages."""

from collections.abc import Iterator
from contextlib import contextmanager

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def launched(path: str) -> Iterator[Browser]:
    """The browser of that path, until the end of the block."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def grave_faults(page: Page) -> list[tuple[str, str]]:
    """What axe finds that keeps people out: each fault with an element that has it."""
    found = Axe().run(page).response["violations"]
    grave = [of for of in found if of["impact"] in ("serious", "critical")]
    return [(of["id"], of["nodes"][0]["html"]) for of in grave]
