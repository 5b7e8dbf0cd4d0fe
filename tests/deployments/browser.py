"""A headless Chromium for tests of pages, and what went wrong in a page while a test looked elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, sync_playwright

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
WATCH_POLICY = """
addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective}`));
"""
PATIENCE = 30_000
"""Milliseconds that an action may wait for the page."""


def chromium() -> str:
    """The path of the system's Chromium. Skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine")


@contextmanager
def browsing(profile: Path) -> Iterator[BrowserContext]:
    """A browser that remembers nothing: ``profile`` is a folder that isn't there yet."""
    path = chromium()
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=path, args=QUIET, viewport={"width": 1280, "height": 800}
        )
        context.set_default_timeout(PATIENCE)
        try:
            yield context
        finally:
            context.close()


def watched(context: BrowserContext) -> tuple[Page, list[str]]:
    """A new page, and a list that grows by its console errors, exceptions and violations of its security policy."""
    faults: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type == "error":
            faults.append(f"{message.text} ({message.location['url']})")

    page = context.new_page()
    page.add_init_script(WATCH_POLICY)
    page.on("console", listen)
    page.on("pageerror", lambda error: faults.append(str(error)))
    return page, faults
