"""Fixtures that several test files share, and the order of the tests."""

import os
import shutil
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
CHROMIUM_ARGUMENTS = [  # no network but this machine
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--mute-audio",
    "--disable-component-update",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


# Test files that take longest first: with two processes, none is left alone with them at the end.
SLOW_FILES = (
    "test_services",
    "test_faults",
    "test_learning",
    "test_browser",
    "test_pipeline",
    "test_runner",
    "test_entry_points",
    "test_load",
    "test_jupyterlab",
    "test_sources",
    "test_features",
    "test_readme",
    "test_promises",
    "test_evaluation",
    "test_style",
)


def pytest_collection_modifyitems(items):
    "Files of `SLOW_FILES` come first and are marked slow; `make check` gives each to one process."
    order = {name: k for k, name in enumerate(SLOW_FILES)}
    for item in items:
        if Path(item.fspath).stem in order:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: order.get(Path(item.fspath).stem, len(order)))


@pytest.fixture(scope="session")
def repo() -> Path:
    "The folder of this repository."
    return REPO


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    "Removes the settings of the user who runs the tests."
    exempt = ("MUSICGEN_BROWSER_REQUIRED", "MUSICGEN_SHARED")
    ours = [n for n in os.environ if n.startswith("MUSICGEN_") and n not in exempt]
    for name in ours:
        monkeypatch.delenv(name)
    monkeypatch.delenv("IN_TEST", raising=False)


@pytest.fixture(scope="session")
def chromium() -> str:
    "The path of a Chromium; without one the test is skipped, and in CI it fails."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if path := next(filter(None, map(shutil.which, names)), None):
        return path
    reason = "no chromium on this machine (Debian and Ubuntu: apt-get install chromium)"
    if os.environ.get("CI") or os.environ.get("MUSICGEN_BROWSER_REQUIRED"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(chromium):
    "A Chromium that can connect to this machine only."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screens(repo) -> Path:
    "The folder of screenshots."
    folder = repo / "artifacts" / "screens"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
