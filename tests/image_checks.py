"""The image, built as `make docker-build` builds it and run as another user: the API plays, the
dashboard's page is there.

Not collected by `make check`, since it needs root, debootstrap, buildah and a Debian mirror:
`make image-check` and .ci/run call it. The base is a Debian of our own, so that no registry of
images is asked; the Dockerfile is the same.
"""

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import mido
import psutil
import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tools"))

import image  # noqa: E402

BASE, IMAGE, USER = "localhost/musicgen-base:bookworm", "localhost/musicgen:check", "10001"
PATIENCE = 120  # seconds for anything that may be slow on a busy machine
STRAIGHT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def missing() -> str:
    "What this machine lacks for building the image; empty if nothing."
    if os.geteuid():
        return "root"
    return ", ".join(name for name in ("buildah", "debootstrap") if not shutil.which(name))


@pytest.fixture(scope="session")
def env(tmp_path_factory):
    "buildah's environment, with a storage of its own: nothing of this machine is used or left."
    if what := missing():
        pytest.fail(
            f"the image cannot be built here without {what} "
            "(Debian: apt-get install buildah debootstrap)"
        )
    folder = tmp_path_factory.mktemp("storage")
    settings = folder / "storage.conf"
    settings.write_text(
        f'[storage]\ndriver = ""\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n', "utf-8"
    )
    before = dict(os.environ)
    os.environ["CONTAINERS_STORAGE_CONF"] = str(settings)
    try:
        env = image.environment("buildah")
    finally:
        os.environ.clear()
        os.environ.update(before)
    print(f"buildah's storage: {env['STORAGE_DRIVER']}")
    yield env
    shutil.rmtree(folder)


def call(*words, env: dict, seconds: int = 900) -> str:
    "What a program prints; it has to succeed."
    done = subprocess.run(
        [str(word) for word in words],
        env=env,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def container(env):
    "A container of the image; the base and the image are built first."
    call(sys.executable, "tools/image.py", "base", "bookworm", BASE, env=env)
    call(
        sys.executable,
        "tools/image.py",
        "build",
        "buildah",
        "play",
        IMAGE,
        "--pull-never",
        "--build-arg",
        f"BASE={BASE}",
        env=env,
    )
    name = call("buildah", "from", "--pull-never", IMAGE, env=env)
    yield name
    call("buildah", "rm", name, env=env)


def inside(container: str, env: dict, *words: str) -> str:
    "What a command in the container prints."
    return call("buildah", "run", "--user", USER, container, "--", *words, env=env)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def config(container: str, env: dict) -> dict:
    "What the image says of itself: its command, its variables, its health check."
    return json.loads(call("buildah", "inspect", "--type", "container", container, env=env))[
        "Docker"
    ]["config"]


@contextmanager
def running(container: str, env: dict, command: list[str], address: str, **variables: str):
    "A program in the container that answers at `address`; at the end it has to end on SIGTERM."
    options = [word for name, text in variables.items() for word in ("--env", f"{name}={text}")]
    process = subprocess.Popen(
        ["buildah", "run", "--user", USER, *options, container, "--", *command],
        env=env,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    alive: list = []
    try:
        end = time.monotonic() + PATIENCE
        while True:
            if process.poll() is not None:
                pytest.fail(f"{command} ended:\n{process.communicate()[0]}")
            try:
                STRAIGHT.open(address, timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert time.monotonic() < end, f"{command} does not answer"
            time.sleep(0.2)
        yield
    finally:
        # buildah's own processes, then the program, whose user is the image's, then its children
        family = psutil.Process(process.pid).children(recursive=True)
        program = next((p for p in family if p.uids().real == int(USER)), None)
        if program:
            program.terminate()
        _, alive = psutil.wait_procs(family, timeout=60)
        for child in alive:
            child.kill()
        process.communicate(timeout=30)
    assert not alive, f"these did not end on SIGTERM: {alive}"


def answer(address: str, body: dict | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with STRAIGHT.open(
        urllib.request.Request(address, data, {"content-type": "application/json"}),
        timeout=PATIENCE,
    ) as got:
        assert got.status == 200
        return got.read()


def test_the_user_can_write_nothing_but_scratch(container, env):
    "What the user of the image can write to: only folders for scratch files."
    scratch = ("/proc", "/sys", "/dev", "/tmp", "/var/tmp", "/run/lock")
    skipped = " -o ".join(f"-path {path}" for path in scratch)
    search = f"find / -xdev \\( {skipped} \\) -prune -o ! -type l -writable -print"
    assert inside(container, env, "id", "-u") == USER
    assert inside(container, env, "sh", "-c", f"{search} 2>/dev/null || true") == ""


def test_it_holds_no_torch_no_pip_and_no_setting_of_this_machine(container, env):
    names = json.loads(
        inside(
            container,
            env,
            "python",
            "-c",
            "import json, importlib.metadata as m; "
            "print(json.dumps([d.metadata['Name'].lower() for d in m.distributions()]))",
        )
    )
    assert "musicgen" in names and "torch" not in names and "pip" not in names
    assert (
        inside(
            container, env, "sh", "-c", "cat /etc/pip.conf 2>/dev/null; ls /build 2>/dev/null; true"
        )
        == ""
    )
    assert not [line for line in config(container, env)["Env"] if line.startswith("PIP_")]


def test_the_api(container, env):
    "The image's own command: healthy by the image's own check; a request gives a MIDI file."
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with running(
        container,
        env,
        config(container, env)["Cmd"],
        address + "/health",
        MUSICGEN_API_PORT=str(port),
    ):
        assert json.loads(answer(address + "/health"))["ready"] is True
        check = json.loads(call("buildah", "inspect", "--type", "image", IMAGE, env=env))["Docker"][
            "config"
        ]["Healthcheck"]["Test"]
        assert check[0] == "CMD"
        inside(container, env, *[word.replace(":8000", f":{port}") for word in check[1:]])
        midi = answer(address + "/generate", dict(instruments=["Flute", "Cello"], bars=4, seed=3))
        assert len(mido.MidiFile(file=io.BytesIO(midi)).tracks) == 3


def test_the_dashboard(container, env):
    "The command that compose.yaml gives: the page has its widgets, and nothing failed on the way."
    service = yaml.safe_load((REPO / "compose.yaml").read_text("utf-8"))["services"]["dashboard"]
    port = free_port()
    command = [word.replace("port=8080", f"port={port}") for word in service["command"]]
    assert str(port) in " ".join(command)
    address = f"http://127.0.0.1:{port}"
    with running(container, env, command, address + "/voila/templates/base/static/voila.js"):
        page = answer(address).decode()
    assert "<title>MusicGen</title>" in page and "widget-view" in page and "Traceback" not in page


def test_the_shell_command(container, env, tmp_path):
    "The same request gives the same bytes in the image and here."
    words = ["generate", "--instruments", "Flute,Cello", "--bars", "4", "--seed", "3", "-o"]
    digest = "import hashlib; print(hashlib.sha256(open('/tmp/duo.mid', 'rb').read()).hexdigest())"
    inside(container, env, "musicgen", *words, "/tmp/duo.mid")
    there = inside(container, env, "python", "-c", digest)
    call(
        Path(sys.executable).with_name("musicgen"),
        *words,
        tmp_path / "duo.mid",
        env=dict(env, MUSICGEN_ROOT=str(tmp_path)),
    )
    assert hashlib.sha256((tmp_path / "duo.mid").read_bytes()).hexdigest() == there
