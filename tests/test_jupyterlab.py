"""A headless Chromium opens every notebook of the project in JupyterLab and runs three of them."""

import json
import shutil
import time
from pathlib import Path

import pytest
from servers import PATIENCE, environment, free_port, running

REPO = Path(__file__).resolve().parent.parent
EXECUTED = (
    "tutorials/01_your_first_piece.ipynb",
    "tutorials/05_how_the_model_works.ipynb",
    "music/[0-9][0-9]_score.ipynb",
)
OPEN = """async path => {
    const app = window.jupyterapp
    const panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'})
    await panel.context.ready; await panel.revealed
    const until = performance.now() + 20000
    const title = () => panel.node.querySelector('.jp-RenderedMarkdown h1')
    while (!title() && performance.now() < until) await new Promise(done => setTimeout(done, 20))
    const view = {cells: panel.content.widgets.length, title: title()?.textContent,
                  rendered: panel.node.querySelectorAll('.jp-Cell').length,
                  dialogs: [...document.querySelectorAll('.jp-Dialog')].map(node => node.innerText)}
    panel.dispose()
    return view
}"""
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget
    return {cells: panel.content.model.toJSON().cells,
            idle: panel.sessionContext.session?.kernel?.status === 'idle'}
}"""


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory) -> Path:
    "A copy of the notebooks, so that the project does not change."
    place = tmp_path_factory.mktemp("a project") / "nbs"
    return shutil.copytree(REPO / "nbs", place, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))


@pytest.fixture(scope="module")
def lab(notebooks, tmp_path_factory):
    "The address of a JupyterLab that serves the copy, with settings and kernels of its own."
    place = tmp_path_factory.mktemp("jupyter lab")
    port = free_port()
    # neither our settings nor the variable of notebook tests may reach the kernels
    env = {
        name: value
        for name, value in environment(place, JUPYTER_PREFER_ENV_PATH="1").items()
        if not name.startswith("MUSICGEN_") and name != "IN_TEST"
    }
    command = [
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
        f"--ServerApp.root_dir={notebooks}",
    ]
    with running(command, port, place, env, place / "lab.log", "/api") as address:
        yield address


@pytest.fixture(scope="module")
def page(browser, lab):
    "A page in an empty JupyterLab."
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.set_default_timeout(PATIENCE * 1000)
    return page


def test_every_notebook_opens(page, lab, notebooks):
    "Each is rendered with its title and all of its cells, without a dialog. No kernel is started."
    page.goto(f"{lab}/lab?reset", wait_until="commit")
    page.wait_for_function("window.jupyterapp?.restored.then(() => true)")
    page.evaluate(
        "() => { window.jupyterapp.serviceManager.sessions.startNew = () => new Promise(() => {}) }"
    )
    paths = sorted(notebooks.rglob("*.ipynb"))
    assert len(paths) > 30
    for path in paths:
        view = page.evaluate(OPEN, path.relative_to(notebooks).as_posix())
        cells = json.loads(path.read_text("utf-8"))["cells"]
        title = (
            next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
            .splitlines()[0]
            .lstrip("# ")
        )
        assert not view["dialogs"], (path, view)
        assert view["cells"] == len(cells) and view["rendered"], (path, view)
        assert (view["title"] or "").rstrip("¶") == title, (path, view)


@pytest.mark.parametrize("name", EXECUTED, ids=["first_piece", "how_it_works", "score"])
def test_a_notebook_runs_to_its_end(page, lab, notebooks, screens, name):
    "Run All executes every code cell in order, without an error."
    [file] = notebooks.glob(name)
    path = file.relative_to(notebooks).as_posix()
    page.goto(f"{lab}/lab/tree/{path}?reset", wait_until="commit")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("| Idle").wait_for()  # the kernel has started
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_role("menuitem", name="Clear Outputs of All Cells", exact=True).click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    end, finished = time.monotonic() + PATIENCE, False
    while not finished and time.monotonic() < end:
        time.sleep(0.5)
        state = page.evaluate(STATE)
        code = [
            cell
            for cell in state["cells"]
            if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
        ]
        errors = [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
        finished = bool(errors) or state["idle"] and all(cell["execution_count"] for cell in code)
    page.screenshot(path=screens / f"jupyterlab-{file.stem}.png")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    assert not errors, errors
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell["outputs"]]
    assert len(outputs) > 5
    assert not page.locator(".jp-Dialog").count()
    pictures = sum("image/png" in out.get("data", {}) for out in outputs)
    assert pictures > 3 or "tutorials" not in path, "a tutorial has pictures"
