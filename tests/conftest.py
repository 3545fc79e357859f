"""What several tests share: the repository, a copy of it, a browser."""

import os
import shutil
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ALONE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--mute-audio",
    "--disable-component-update",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="session")
def repo() -> Path:
    "The folder of this repository."
    return REPO


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    "No setting of the person who runs the tests leaks into them."
    kept = ("MUSICGEN_BROWSER_REQUIRED", "MUSICGEN_SHARED")
    ours = [n for n in os.environ if n.startswith("MUSICGEN_") and n not in kept]
    for name in ours:
        monkeypatch.delenv(name)
    monkeypatch.delenv("IN_TEST", raising=False)


@pytest.fixture(scope="session")
def chromium() -> str:
    "The path of a Chromium; without one the test is skipped, and in CI it fails."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    told = "no chromium on this machine (Debian and Ubuntu: apt-get install chromium)"
    if os.environ.get("CI") or os.environ.get("MUSICGEN_BROWSER_REQUIRED"):
        pytest.fail(told)
    pytest.skip(told)


@pytest.fixture(scope="module")
def browser(chromium):
    "A Chromium that can reach this machine and no other."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ALONE)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screens(repo) -> Path:
    "Where the screenshots go: produced, and worth a look."
    folder = repo / "artifacts" / "screens"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
