"""A headless Chromium drives the dashboard and a notebook in JupyterLab, as a person would."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import pytest

from musicgen.core import Layout
from musicgen.score import DRUMS, read_midi

PATIENCE = 180  # seconds for anything that may be slow on a busy machine
SLOW = PATIENCE * 1000  # the same for the browser, in its unit
ALONE = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--mute-audio",
         "--disable-component-update", "--no-first-run", "--disable-dev-shm-usage",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@pytest.fixture(scope="module")
def browser(chromium):
    "A Chromium that can reach this machine and no other."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ALONE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "A page that remembers whom it asked for anything."
    context = browser.new_context(viewport=dict(width=1280, height=900), accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(SLOW)
    page.asked = set()
    page.on("request", lambda request: page.asked.add(urlsplit(request.url)._replace(query="")))
    yield page
    context.close()


@pytest.fixture
def screens(repo) -> Path:
    "Where the screenshots go: produced, and worth a look."
    folder = repo / "artifacts" / "screens"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home: Path, **more: str) -> dict[str, str]:
    "That of a person whose Jupyter folders lie in `home`, so that nothing of ours is touched."
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
               "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    return {**os.environ, **{name: str(home / name.lower()) for name in folders}, **more}


@contextmanager
def running(command: list[str], port: int, cwd: Path, env: dict[str, str], log: Path):
    "The address of a server, once it answers; at the end it is gone, and its kernels with it."
    with open(log, "wb") as out:
        server = psutil.Popen([sys.executable, *command], cwd=cwd, env=env, stdout=out,
                              stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while not answers(address):
            told = log.read_text(errors="replace")
            assert server.poll() is None, f"{command[1]} ended:\n{told}"
            assert time.monotonic() < end, f"{command[1]} does not answer:\n{told}"
            time.sleep(0.2)
        yield address
    finally:
        family = [server, *server.children(recursive=True)] if server.is_running() else [server]
        server.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left: process.kill()
        psutil.wait_procs(left, timeout=5)


def answers(address: str) -> bool:
    "Whether there is a server; a static file, because a page would start a kernel."
    try: urlopen(address + "/voila/static/nothing", timeout=5).close()
    except URLError as error: return hasattr(error, "code")
    except OSError: return False
    return True


def make_model(root: Path) -> Path:
    "A model that has learnt nothing, and all the same plays what it is asked."
    import torch
    from musicgen.model import MusicLSTM, MusicLSTMConfig, save_model
    torch.manual_seed(0)
    layout = Layout(root)
    save_model(MusicLSTM(MusicLSTMConfig(hidden=48, head=24, sources=("lesson",))), layout.model)
    return layout.weights


def slide(page, name: str, value: int):
    "Types a value beside a slider."
    slider = page.locator(".widget-slider").filter(has_text=re.compile(f"^{name}"))
    readout = slider.locator(".widget-readout")
    readout.fill(str(value))
    readout.press("Enter")


def chips(page) -> list[str]:
    return [text.removesuffix("×").strip() for text in page.locator(".mg-chip").all_inner_texts()]


def generated(page, cards: int):
    "The newest take, when there are so many on the page."
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function(f"document.querySelectorAll('.mg-card').length == {cards}")
    return page.locator(".mg-card").first


def test_the_dashboard(page, repo, tmp_path, screens):
    "Choose, generate, see, hear, download; be refused in a sentence; go on; all on this machine."
    port = free_port()
    env = environment(tmp_path, MUSICGEN_PATHS_MODEL=str(make_model(tmp_path / "a root")))
    command = ["-m", "voila", "dashboards/generate.ipynb", "--no-browser", f"--port={port}"]
    with running(command, port, repo, env, tmp_path / "voila.log") as address:
        page.goto(address, wait_until="commit")
        page.get_by_role("heading", name="MusicGen", exact=True).wait_for()
        page.get_by_role("button", name="Generate").wait_for()
        assert page.title() == "MusicGen"

        page.get_by_role("button", name="String quartet").click()
        page.get_by_role("button", name="Cello", exact=False).wait_for()
        search = page.get_by_label("Add an instrument")
        search.fill("drums")
        search.press("Enter")
        page.locator(".mg-chip", has_text="Drums").wait_for()
        assert chips(page) == ["Violin", "Violin", "Viola", "Cello", "Drums"]
        slide(page, "Bars", 3)
        page.get_by_label("Metre").select_option("3/4")

        card = generated(page, 1)
        roll = card.locator("img.mg-light")
        roll.wait_for()
        assert roll.evaluate("image => image.decode().then(() => image.naturalWidth)") > 400
        sound = card.locator("audio")
        sound.evaluate("a => a.readyState || new Promise(done => a.onloadedmetadata = done)")
        assert sound.evaluate("a => a.duration") > 3 * 3 * 60 / 96  # three bars and their ring
        link = card.get_by_role("link", name="Download MIDI")
        with page.expect_download() as waiting: link.click()
        download = waiting.value
        name = r"violin-viola-cello-and-1-more-3-bars-seed-\d+\.mid"
        assert re.fullmatch(name, download.suggested_filename)
        score = read_midi(Path(download.path()).read_bytes())
        assert len(score.bar_lines()) - 1 == 3 and score.metre == (3, 4)
        assert [part.program for part in score.parts] == [40, 40, 41, 42, DRUMS]

        search.fill("Voilin")
        search.press("Enter")
        page.get_by_role("alert").filter(has_text="did you mean Violin").wait_for()
        for _ in range(5):
            left = page.locator(".mg-chip").count()
            page.locator(".mg-chip").first.click()
            page.wait_for_function(f"document.querySelectorAll('.mg-chip').length == {left - 1}")
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("alert").filter(has_text="0 parts").wait_for()

        page.get_by_role("button", name="Rock band").click()
        page.locator(".mg-chip", has_text="Drums").wait_for()
        generated(page, 2)
        assert "Traceback" not in page.locator("body").inner_text()
        for scheme in ("light", "dark"):
            for name, size in dict(desktop=(1280, 900), phone=(390, 844)).items():
                page.emulate_media(color_scheme=scheme)
                page.set_viewport_size(dict(width=size[0], height=size[1]))
                assert page.locator(f".mg-card img.mg-{scheme}").first.is_visible()
                assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
                page.screenshot(path=screens / f"dashboard-{name}-{scheme}.png", full_page=True)
    hosts = {url.hostname for url in page.asked if url.scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}


def test_a_notebook_in_jupyterlab(page, repo, tmp_path, screens):
    "Run All, from a copy: every cell runs, and none ends in an error."
    port, folder = free_port(), tmp_path / "notebooks"
    folder.mkdir()
    copy = Path(shutil.copy(repo / "nbs" / "02_score.ipynb", folder))
    notebook = json.loads(copy.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = []
    copy.write_text(json.dumps(notebook), "utf-8")
    command = ["-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}", "--allow-root",
               "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1",
               "--IdentityProvider.token=listen", f"--ServerApp.root_dir={folder}"]
    env = environment(tmp_path)
    with running(command, port, folder, env, tmp_path / "lab.log") as address:
        page.goto(f"{address}/lab/tree/{copy.name}?token=listen&reset", wait_until="commit")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.get_by_text("| Idle").wait_for()  # before it there is a notebook, but no kernel yet
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try: ran = run_to_the_end(page, copy)
        finally: page.screenshot(path=screens / "jupyterlab.png")
    outputs = [output for cell in ran for output in cell["outputs"]]
    errors = [output for output in outputs if output["output_type"] == "error"]
    assert not errors, errors
    assert len(outputs) > 5 and all(cell["execution_count"] for cell in ran)


def run_to_the_end(page, path: Path) -> list[dict]:
    "The code cells of a saved notebook, when each has run or one has failed."
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        page.keyboard.press("Control+s")
        time.sleep(1)
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code" and cell["source"]]
        failed = any(out["output_type"] == "error" for cell in code for out in cell["outputs"])
        if failed or all(cell["execution_count"] for cell in code): return code
    raise AssertionError(f"{sum(not cell['execution_count'] for cell in code)} cells have not run")
