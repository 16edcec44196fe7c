"""One JupyterLab and one Chromium for the tests of this folder.

Where there is no Chromium they skip; with LLMLAB_BROWSER=required, as CI sets it, they fail instead. Pictures go to the
folder that LLMLAB_SCREENSHOTS names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect, sync_playwright

from browser.lab_page import LabPage
from browser.lab_server import LabServer

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
MISSING = "" if CHROMIUM else "no Chromium here (apt-get install chromium)"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING and os.environ.get("LLMLAB_BROWSER") != "required":
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason=f"browser test: {MISSING}"))


def need_chromium() -> None:
    """Fails in one line where there is none."""
    if MISSING:
        pytest.fail(f"LLMLAB_BROWSER=required, and {MISSING}", pytrace=False)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    need_chromium()
    server = LabServer(tmp_path_factory.mktemp("lab"))
    server.wait()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("LLMLAB_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Not for the session: while playwright is open its event loop counts as running in this thread, and other files' tests
# (nbmake's) run loops of their own.
@pytest.fixture(scope="package")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=CHROMIUM,
            headless=True,
            viewport={"width": 1400, "height": 1400},
            permissions=["clipboard-read", "clipboard-write"],
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            ],
        )
        context.set_default_timeout(60_000)
        expect.set_options(timeout=30_000)  # ms; a busy machine is slow, and a wrong page stays wrong
        yield context
        context.close()


@pytest.fixture(scope="module")
def lab(chromium: BrowserContext, server: LabServer, pictures: Path) -> Iterator[LabPage]:
    """A page for the tests of one file."""
    page = chromium.new_page()
    yield LabPage(page, server, pictures)
    page.close()


@pytest.fixture(autouse=True)
def nothing_went_wrong(request: pytest.FixtureRequest) -> Iterator[None]:
    """No error in the browser's console and no request to another host, in any test that has a page."""
    yield
    if "lab" in request.fixturenames:
        assert request.getfixturevalue("lab").complaints() == []
