"""README's lines are run as they stand: a line that nobody here knows how to run fails."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from musicgen.core import Layout
from musicgen.music.midi import read_midi

PLAIN = (
    "make ",
    "python3 -m venv",
    ".venv/bin/",
    "jupyter lab",
    "voila ",
    "uvicorn ",
    "python run_pipeline.py --",
)
"Lines that the other tests or CI run: installing, the whole pipeline, the servers that stay."


def blocks(readme: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def lines(repo) -> list[str]:
    found = [
        line for block in blocks(repo / "README.md", "sh") for line in block.splitlines() if line
    ]
    assert len(found) > 12
    return [re.sub(r"\s+#.*", "", line) for line in found]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A root with a model of random weights, and the environment of a shell that stands beside it."
    import torch

    from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig, save_model

    root = tmp_path_factory.mktemp("my model")
    torch.manual_seed(0)
    save_model(MusicLSTM(MusicLSTMConfig(hidden=32, head=16)), Layout(root).model)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return root, dict(os.environ, MUSICGEN_ROOT=str(root), HOME=str(root), PATH=path)


def run(line: str, where: Path, env: dict) -> str:
    done = subprocess.run(
        line, shell=True, cwd=where, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_line_is_known(lines):
    known = ("musicgen ", "curl ", "MUSICGEN_ROOT=~/my-model musicgen ")
    assert [line for line in lines if not line.startswith(known + PLAIN)] == []


def test_the_shell_lines(lines, home, tmp_path):
    root, env = home
    ours = [line for line in lines if line.startswith("musicgen ")]
    assert len(ours) >= 5
    for line in ours:
        run(line, tmp_path, env)
    made = {p.name: read_midi(p) for p in tmp_path.glob("*.mid")}
    assert len(made["quartet.mid"].bar_lines()) == 17 and len(made["quartet.mid"].parts) == 4
    assert (tmp_path / "quartet.mid").read_bytes() == (tmp_path / "again.mid").read_bytes()
    assert sum(name.startswith("band") for name in made) == 4


def test_the_line_for_another_root(lines, home, tmp_path):
    root, env = home
    line = next(line for line in lines if line.startswith("MUSICGEN_ROOT="))
    run(line.replace("~/my-model", shlex.quote(str(root))), tmp_path, env)
    assert len(read_midi(tmp_path / "mine.mid").bar_lines()) == 17


def test_the_python_lines(repo, home, tmp_path):
    root, env = home
    (code,) = blocks(repo / "README.md", "python")
    run(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}", tmp_path, env)
    assert len(read_midi(tmp_path / "duo.mid").parts) == 2


@pytest.fixture
def server(home):
    "The API as README starts it, on a port of its own."
    root, env = home
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "musicgen.serve:app", "--port", str(port)]
    process = subprocess.Popen(
        command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail("the API did not start")
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_curl_lines(lines, server, home, tmp_path):
    root, env = home
    ours = [line for line in lines if line.startswith("curl ")]
    assert len(ours) == 3
    said = [run(line.replace(":8000", f":{server}"), tmp_path, env) for line in ours]
    assert json.loads(said[0])["ready"] is True
    assert any(i["name"] == "Violin" for i in json.loads(said[1]))
    assert len(read_midi(tmp_path / "duo.mid").bar_lines()) == 9


def test_links_and_pictures_are_there(repo):
    text = (repo / "README.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 20 and [link for link in links if not (repo / link).exists()] == []


def test_the_map_shows_every_room(repo):
    text = (repo / "README.md").read_text("utf-8")
    rooms = sorted(p.name for p in (repo / "nbs").glob("[0-9][0-9]_*.ipynb"))
    assert rooms and [name for name in rooms if f"nbs/{name}" not in text] == []
