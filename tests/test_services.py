"""The services as a user starts them: up, both doors, killed and back, behind a proxy, down, and nothing left."""

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from musicgen.app.services import Service, _family, down, up
from musicgen.core import Layout, Rejection
from musicgen.music.midi import read_midi

PATIENCE = 120  # seconds for anything that may be slow on a busy machine


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def soon(what, told: str):
    "What `what()` gives as soon as it gives something."
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end, told
        time.sleep(0.1)
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def ask(address: str, body: dict | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        assert answer.status == 200
        return answer.read()


class House:
    "A clone whose ports are free, on a machine without a Docker engine."

    def __init__(self, repo: Path, folder: Path):
        self.root, self.home = folder / "a house", folder / "home"
        self.tools, (self.api, self.dashboard) = folder / "tools", free_ports(2)
        for path in (self.root, self.home, self.tools):
            path.mkdir()
        for name in (
            "Makefile",
            "settings.ini",
            "pipeline.yaml",
            "pyproject.toml",
            "constraints.txt",
            "compose.yaml",
        ):
            shutil.copy(repo / name, self.root)
        shutil.copytree(repo / "dashboards", self.root / "dashboards")
        told = json.loads((repo / "voila.json").read_text("utf-8"))
        told["Voila"]["port"] = self.dashboard
        (self.root / "voila.json").write_text(json.dumps(told), "utf-8")
        self.docker("exit 1")
        python = self.root / ".venv" / "bin" / "python"  # as `make` would have made it
        python.parent.mkdir(parents=True)
        self.script(python, f'exec {shlex.quote(sys.executable)} "$@"')
        for name in ("made", "play-ready"):
            (self.root / ".venv" / name).touch()
        plain = {
            name: text for name, text in os.environ.items() if not name.startswith("MUSICGEN_")
        }
        self.env = dict(
            plain,
            HOME=str(self.home),
            PYTHONPATH=str(repo),
            PYTHONDONTWRITEBYTECODE="1",
            PATH=f"{self.tools}{os.pathsep}{os.environ['PATH']}",
            MUSICGEN_API_PORT=str(self.api),
        )

    def script(self, path: Path, text: str):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def docker(self, text: str):
        self.script(self.tools / "docker", text)

    def make(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["make", *words],
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )

    def process(self, word: str) -> psutil.Process | None:
        return next((p for p in _family(Layout(self.root)) if word in " ".join(p.cmdline())), None)


@pytest.fixture
def house(repo, tmp_path):
    made = House(repo, tmp_path)
    yield made
    down(Layout(made.root))


@pytest.fixture(scope="module")
def opened(repo, tmp_path_factory):
    "A house whose services are up, for those who only ask."
    made = House(repo, tmp_path_factory.mktemp("opened"))
    try:
        done = made.make("up")
        assert done.returncode == 0, done.stdout + done.stderr
        yield made
    finally:
        down(Layout(made.root))


def test_up_and_down(house):
    "Up, by two hands at once; both doors; the API is killed and comes back; down; no process and no file is left."
    before = files(house.root)
    with ThreadPoolExecutor(2) as hands:
        both = list(hands.map(lambda _: house.make("up"), range(2)))
    done, again = sorted(both, key=lambda done: "up already" in done.stdout)
    assert done.returncode == again.returncode == 0, done.stdout + done.stderr + again.stderr
    assert "are up, supervised" in done.stdout and "were up already" in again.stdout
    assert "No Docker engine answers" in done.stdout and "never built" in done.stdout
    api, page = f"http://127.0.0.1:{house.api}", f"http://127.0.0.1:{house.dashboard}"
    assert (
        api in done.stdout
        and page in done.stdout
        and "make down" in done.stdout
        and "But" not in done.stdout
    )

    told = json.loads(ask(api + "/health"))
    assert told["ready"] is True
    score = read_midi(ask(api + "/generate", dict(instruments=["Flute", "Cello"], bars=2, seed=3)))
    assert len(score.parts) == 2 and len(score.bar_lines()) == 3

    html = ask(page).decode()
    assert "<title>MusicGen</title>" in html and "widget-view" in html and "Traceback" not in html
    kernel = house.process("ipykernel_launcher")
    assert kernel and kernel.environ()["MUSICGEN_DASHBOARD_API"] == api

    first = house.process("musicgen.serve")
    first.kill()
    second = soon(
        lambda: (p := house.process("musicgen.serve")) != first and p, "the API does not come back"
    )
    assert second.pid != first.pid
    soon(lambda: answers(api + "/health"), "the API is back, and does not answer")
    assert house.process("voila ").is_running(), "the dashboard has not noticed"

    family = _family(Layout(house.root))
    assert len(family) >= 4, "a supervisor, the API, the dashboard, a kernel"
    done = house.make("down")
    assert done.returncode == 0 and "down" in done.stdout, done.stdout + done.stderr
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not answers(api + "/health") and not answers(page + "/voila/static/nothing")
    assert files(house.root) == before
    assert not [name for name in files(house.home) if "kernel" in name], "connections of kernels"
    assert "No service was up" in house.make("down").stdout


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_a_port_that_is_taken(house):
    "One sentence that names the port; nothing was started."
    with socket.create_server(("127.0.0.1", house.dashboard)):
        done = house.make("up")
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("musicgen:")]
    assert done.returncode and f"port {house.dashboard} " in told and "voila.json" in told
    assert _family(Layout(house.root)) == []


def test_a_program_that_only_dies(tmp_path):
    "It is not waited for for ever; what it said last is in the refusal, and its log stays."
    layout, (port,) = Layout(tmp_path / "100% o'dd #1 ;x"), free_ports(1)
    broken = Service(
        "toy", [sys.executable, "-c", "raise SystemExit('no strings')"], "127.0.0.1", port, "/"
    )
    with pytest.raises(Rejection, match="does not answer .* ends: no strings"):
        up(layout, [broken], 3)
    assert _family(layout) == []
    assert "no strings" in (layout.root / "artifacts/services/toy.log").read_text()


@pytest.mark.parametrize(
    "engine, note",
    [
        ("exit 1", "No Docker engine"),
        ('test "$1" = info', "without its compose plugin"),
        ('test "$1" != image && { test "$2" = ls || exit 0; }', "was never built"),
    ],
)
def test_make_up_says_why_not_docker(house, engine, note):
    "A docker that is not there, that is old, that has no image: two processes, and the reason."
    house.docker(engine)
    house.script(house.root / ".venv" / "bin" / "python", 'echo "called: $*"')
    done = house.make("up")
    assert (
        done.returncode == 0
        and note in done.stdout
        and "called: -m musicgen.app.services up" in done.stdout
    )


def test_make_with_docker(house):
    "Where there is an engine and an image, make speaks to docker compose and starts nothing itself."
    log, state = house.root.parent / "asked", house.root.parent / "contained"
    house.docker(
        f"echo \"$*\" >> '{log}'; case \"$2\" in up) touch '{state}';; down) rm '{state}';; "
        f"ls) test -e '{state}' && echo musicgen;; esac; exit 0"
    )
    house.script(house.root / ".venv" / "bin" / "python", 'echo "called: $*"')
    assert "called:" not in house.make("up").stdout
    assert house.make("docker-build").returncode == 0
    assert "called: -m musicgen.app.services down" in house.make("down").stdout
    asked = log.read_text()
    assert "compose up --detach --wait\n" in asked and "compose down\n" in asked
    assert re.search(r"^build .*--target play .*--tag musicgen:local", asked, re.MULTILINE)


# --- Docker's files, read


@pytest.fixture(scope="module")
def compose(repo) -> dict:
    return yaml.safe_load((repo / "compose.yaml").read_text("utf-8"))["services"]


def test_compose(compose, repo):
    "Both are locked up, both are asked how they are, and only this machine can reach them."
    assert set(compose) == {"api", "dashboard"}
    for name, service in compose.items():
        assert (
            service["read_only"] is True
            and service["init"] is True
            and service["cap_drop"] == ["ALL"]
        )
        assert service["user"].split(":")[0] not in ("0", "root")
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert [t.split(":")[0] for t in service["tmpfs"]] == ["/tmp"]
        (mount,) = service["volumes"]
        assert (
            mount["read_only"] is True
            and mount["source"] == "./artifacts"
            and mount["type"] == "bind"
        )
        assert service["image"] == "musicgen:local" and service["pull_policy"] == "never"
        port = dict(api=8000, dashboard=8080)[name]
        assert re.fullmatch(
            rf"127\.0\.0\.1:\$\{{MUSICGEN_\w+_PORT:-{port}\}}:{port}", *service["ports"]
        )
    dashboard = compose["dashboard"]
    assert dashboard["environment"] == {"MUSICGEN_DASHBOARD_API": "http://api:8000"}
    assert dashboard["depends_on"] == {"api": {"condition": "service_healthy"}}
    assert (
        "--Voila.ip=0.0.0.0" in dashboard["command"] and (repo / dashboard["command"][1]).exists()
    )


def stages(repo: Path) -> dict[str, list[tuple[str, str]]]:
    "The Dockerfile as (instruction, rest) by stage."
    text = re.sub(
        r"\\\n\s*",
        "",
        "\n".join(
            line
            for line in (repo / "Dockerfile").read_text().splitlines()
            if not line.lstrip().startswith("#")
        ),
    )
    found, now = {}, []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(None, 1)
        if word == "FROM":
            now = found.setdefault(rest.split(" AS ")[1], [])
        now.append((word, rest))
    return found


def test_dockerfile(repo):
    "The last stage plays: no torch, not root, a health check without curl; what it copies is there."
    found = stages(repo)
    assert list(found) == ["build", "train", "play"]
    play = found["play"]
    words = dict(play)
    assert words["USER"] == "10001:10001" and words["EXPOSE"] == "8000 8080"
    assert "torch" not in str(play + found["build"]) and "download.pytorch.org/whl/cpu" in str(
        found["train"]
    )
    check = json.loads(words["HEALTHCHECK"].split("CMD ", 1)[1])
    assert check[0] == "python" and "curl" not in str(found)
    compile(check[2], "check", "exec")
    assert json.loads(words["CMD"])[0] == "python"
    environment = " ".join(rest for word, rest in play if word == "ENV")
    assert "HOME=/tmp" in environment and "MUSICGEN_API_HOST=0.0.0.0" in environment
    let = [
        line.lstrip("!")
        for line in (repo / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = {
        name
        for stage in found.values()
        for word, rest in stage
        if word == "COPY" and "--from" not in rest
        for name in rest.split()[:-1]
    }
    assert copied == set(let) and all((repo / name).exists() for name in copied)


def test_the_health_checks(opened, compose, repo):
    "The sentences in which Docker asks: yes while a service is up, no where there is none."
    checks = {
        opened.api: json.loads(dict(stages(repo)["play"])["HEALTHCHECK"].split("CMD ", 1)[1])[2],
        opened.dashboard: compose["dashboard"]["healthcheck"]["test"][3],
    }

    def well(code: str, port: int) -> bool:
        code = re.sub(r":80[08]0/", f":{port}/", code)
        return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

    (nobody,) = free_ports(1)
    for port, code in checks.items():
        assert well(code, port) and not well(code, nobody)


# --- README's chapter


def blocks(repo: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (repo / "README.md").read_text("utf-8"), re.DOTALL)


async def handshake(address: str, name: str, kernel: str) -> bool:
    "Whether a browser that came by `name` gets its websocket."
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    url = f"{address.replace('http', 'ws')}/api/kernels/{kernel}/channels"
    line = await websocket_connect(
        HTTPRequest(url, headers={"Host": name, "Origin": f"http://{name}"})
    )
    line.close()
    return True


def by_name(address: str, name: str, path: str, data: bytes | None = None) -> bytes:
    headers = {"Host": name, "content-type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(address + path, data, headers), timeout=PATIENCE
    ) as answer:
        return answer.read()


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_behind_a_proxy(opened, repo, tmp_path, proxy):
    "README's own lines: the page, its websocket, music, and a body that is too big."
    if not (tool := shutil.which(proxy) or shutil.which(proxy, path="/usr/sbin")):
        pytest.skip(f"no {proxy} here")
    (text,) = blocks(repo, proxy)
    (port,) = free_ports(1)
    for was, now in {8000: opened.api, 8080: opened.dashboard}.items():
        text = text.replace(f"127.0.0.1:{was}", f"127.0.0.1:{now}")
    config = tmp_path / "proxy.conf"
    if proxy == "nginx":
        kinds = ("proxy", "client_body", "fastcgi", "uwsgi", "scgi")
        places = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
        text = text.replace("listen 80;", f"listen 127.0.0.1:{port};")
        config.write_text(
            f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; {places}\n{text}}}\n"
        )
        command = [tool, "-p", str(tmp_path), "-c", str(config)]
    else:
        text = re.sub(
            r"^(\S*music\.example\.org) ", rf"http://\1:{port} ", text, flags=re.MULTILINE
        )
        config.write_text("{\n\tadmin off\n}\n" + text)
        command = [tool, "run", "--config", str(config), "--adapter", "caddyfile"]
    address, page, api = (
        f"http://127.0.0.1:{port}",
        f"music.example.org:{port}",
        f"api.music.example.org:{port}",
    )
    env = dict(opened.env, XDG_DATA_HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path))
    running = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        soon(lambda: answers(address), f"{proxy} does not answer")
        html = by_name(address, page, "/").decode()
        kernel = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", html)[0]
        assert "<title>MusicGen</title>" in html and asyncio.run(handshake(address, page, kernel))
        asked = json.dumps(dict(bars=1, seed=1)).encode()
        assert read_midi(by_name(address, api, "/generate", asked)).parts
        with pytest.raises(urllib.error.HTTPError) as error:
            by_name(address, api, "/generate", b" " * 1_100_000)
        assert error.value.code == 413
    finally:
        running.terminate()
        running.wait(30)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_the_units(repo, tmp_path):
    "systemd finds nothing to say about README's three files."
    common, *units = blocks(repo, "ini")
    names = [
        "musicgen-.service.d/common.conf",
        "musicgen-api.service",
        "musicgen-dashboard.service",
    ]
    text = (repo / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in text for name in names)
    clone = tmp_path / "clone"
    for name, unit in zip(names, [common, *units], strict=True):
        path = tmp_path / "units" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(unit.replace("/opt/musicgen", str(clone)))
    for name in ("python", "voila"):
        program = clone / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    env = dict(os.environ, SYSTEMD_UNIT_PATH=f"{tmp_path}/units:")
    command = [
        "systemd-analyze",
        "verify",
        "--man=no",
        *(f"{tmp_path}/units/{name}" for name in names[1:]),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "musicgen" in line]
    assert not said, "\n".join(said)
