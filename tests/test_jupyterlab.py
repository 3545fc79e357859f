"""A headless Chromium opens every notebook of the project in JupyterLab, and runs three of them, as a reader would."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest

REPO = Path(__file__).resolve().parent.parent
THREE = ("tutorials/01_your_first_piece.ipynb", "tutorials/05_how_the_model_works.ipynb", "[0-9][0-9]_score.ipynb")
PATIENCE = 180   # seconds for anything that may be slow on a busy machine
ALONE = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--mute-audio",
         "--disable-component-update", "--no-first-run", "--disable-dev-shm-usage",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
OPEN = """async path => {
    const app = window.jupyterapp, panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'})
    await panel.context.ready; await panel.revealed
    const until = performance.now() + 20000, title = () => panel.node.querySelector('.jp-RenderedMarkdown h1')
    while (!title() && performance.now() < until) await new Promise(done => setTimeout(done, 20))
    const seen = {cells: panel.content.widgets.length, title: title()?.textContent,
                  drawn: panel.node.querySelectorAll('.jp-Cell').length,
                  dialogs: [...document.querySelectorAll('.jp-Dialog')].map(node => node.innerText)}
    panel.dispose()
    return seen
}"""
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget
    return {cells: panel.content.model.toJSON().cells, idle: panel.sessionContext.session?.kernel?.status === 'idle'}
}"""


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory) -> Path:
    "A copy of the notebooks, so that nothing in the project changes."
    place = tmp_path_factory.mktemp("a project") / "nbs"
    return shutil.copytree(REPO / "nbs", place, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))


@pytest.fixture(scope="module")
def lab(notebooks, tmp_path_factory):
    "The address of a JupyterLab over the copy; its settings and its kernels are its own."
    place = tmp_path_factory.mktemp("jupyter lab")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
               "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    # no setting of ours, and nothing that a test of notebooks has left behind, reaches the kernels
    env = {k: v for k, v in os.environ.items() if not k.startswith("MUSICGEN_") and k != "IN_TEST"}
    env |= {name: str(place / name.lower()) for name in folders} | {"JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1",
               "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={notebooks}"]
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    log = place / "lab.log"
    with open(log, "wb") as out:
        server = psutil.Popen(command, cwd=place, env=env, stdin=subprocess.DEVNULL, stdout=out,
                              stderr=subprocess.STDOUT)
    try:
        while not answers(address + "/api"):
            told = log.read_text(errors="replace")
            assert server.poll() is None and time.monotonic() < end, told
            time.sleep(0.2)
        yield address
    finally:
        family = [server, *server.children(recursive=True)] if server.is_running() else [server]
        server.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left: process.kill()
        psutil.wait_procs(left, timeout=5)


def answers(address: str) -> bool:
    try: urlopen(address, timeout=5).close()
    except URLError as error: return hasattr(error, "code")
    except OSError: return False
    return True


@pytest.fixture(scope="module")
def page(chromium, lab):
    "A page of a browser that can reach this machine and no other, in an empty JupyterLab."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ALONE)
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(PATIENCE * 1000)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def screens() -> Path:
    "Where the screenshots go: produced, and worth a look."
    folder = REPO / "artifacts" / "screens"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_every_notebook_opens(page, lab, notebooks):
    "Each is drawn, with its title and all of its cells, and nothing is complained of. No kernel is started for it."
    page.goto(f"{lab}/lab?reset", wait_until="commit")
    page.wait_for_function("window.jupyterapp?.restored.then(() => true)")
    page.evaluate("() => { window.jupyterapp.serviceManager.sessions.startNew = () => new Promise(() => {}) }")
    paths = sorted(notebooks.rglob("*.ipynb"))
    assert len(paths) > 30
    for path in paths:
        seen = page.evaluate(OPEN, path.relative_to(notebooks).as_posix())
        cells = json.loads(path.read_text("utf-8"))["cells"]
        title = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown").splitlines()[0].lstrip("# ")
        assert not seen["dialogs"], (path, seen)
        assert seen["cells"] == len(cells) and seen["drawn"], (path, seen)
        assert (seen["title"] or "").rstrip("¶") == title, (path, seen)


@pytest.mark.parametrize("name", THREE, ids=["first_piece", "how_it_works", "score"])
def test_a_notebook_runs_to_its_end(page, lab, notebooks, screens, name):
    "Run All: every code cell has run, in order, and none has ended in an error."
    [found] = notebooks.glob(name)
    path = found.relative_to(notebooks).as_posix()
    page.goto(f"{lab}/lab/tree/{path}?reset", wait_until="commit")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("| Idle").wait_for()   # before it there is a notebook, but no kernel yet
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_role("menuitem", name="Clear Outputs of All Cells", exact=True).click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    end, ran = time.monotonic() + PATIENCE, False
    while not ran and time.monotonic() < end:
        time.sleep(0.5)
        state = page.evaluate(STATE)
        code = [cell for cell in state["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
        errors = [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
        ran = bool(errors) or state["idle"] and all(cell["execution_count"] for cell in code)
    page.screenshot(path=screens / f"jupyterlab-{found.stem}.png")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    assert not errors, errors
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell["outputs"]]
    assert len(outputs) > 5
    assert not page.locator(".jp-Dialog").count()
    pictures = sum("image/png" in out.get("data", {}) for out in outputs)
    assert pictures > 3 or "tutorials" not in path, "a tutorial is read with its pictures"
