"""The commands of the README are run as they are; a command of an unknown kind fails."""

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

TESTED_ELSEWHERE = (
    "make ",
    "python3 -m venv",
    ".venv/bin/",
    "voila ",
    "uvicorn ",
    "python run_pipeline.py --",
)
"Commands that other tests or CI run: installation, the whole pipeline, servers."


def blocks(readme: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def lines(repo) -> list[str]:
    commands = [
        line for block in blocks(repo / "README.md", "sh") for line in block.splitlines() if line
    ]
    assert len(commands) > 12
    return [re.sub(r"\s+#.*", "", line) for line in commands]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A root with an untrained model, and the environment of a shell whose home it is."
    import torch

    from musicgen.model.files import save_model
    from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig

    root = tmp_path_factory.mktemp("my model")
    torch.manual_seed(0)
    save_model(MusicLSTM(MusicLSTMConfig(hidden=32, head=16)), Layout(root).model)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return root, dict(os.environ, MUSICGEN_ROOT=str(root), HOME=str(root), PATH=path)


def run(line: str, where: Path, env: dict) -> str:
    "The output of a shell command."
    process = subprocess.run(
        line, shell=True, cwd=where, env=env, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, f"{line}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def test_every_line_is_known(lines):
    known = ("musicgen ", "curl ", "MUSICGEN_ROOT=~/my-model musicgen ")
    assert [line for line in lines if not line.startswith(known + TESTED_ELSEWHERE)] == []


def test_the_shell_lines(lines, home, tmp_path):
    root, env = home
    commands = [line for line in lines if line.startswith("musicgen ")]
    assert len(commands) >= 5
    for line in commands:
        run(line, tmp_path, env)
    scores = {p.name: read_midi(p) for p in tmp_path.glob("*.mid")}
    assert len(scores["quartet.mid"].bar_lines()) == 17 and len(scores["quartet.mid"].parts) == 4
    assert (tmp_path / "quartet.mid").read_bytes() == (tmp_path / "again.mid").read_bytes()
    assert sum(name.startswith("band") for name in scores) == 4


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
    "The port of an API that is started as in the README."
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
    commands = [line for line in lines if line.startswith("curl ")]
    assert len(commands) == 3
    answers = [run(line.replace(":8000", f":{server}"), tmp_path, env) for line in commands]
    assert json.loads(answers[0])["ready"] is True
    assert any(i["name"] == "Violin" for i in json.loads(answers[1]))
    assert len(read_midi(tmp_path / "duo.mid").bar_lines()) == 9


def test_links_and_pictures_are_there(repo):
    text = (repo / "README.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 20 and [link for link in links if not (repo / link).exists()] == []
