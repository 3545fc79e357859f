"""The services as a user starts them: up, killed and restarted, behind a proxy, down."""

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

from musicgen.app.services import Service, down, service_processes, up
from musicgen.core import Layout, Rejection
from musicgen.music.midi import read_midi

PATIENCE = 120  # seconds before a test gives up; a busy machine is slow


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def wait_until(condition, message: str):
    "The first true value of `condition()`; fails with the message after `PATIENCE` seconds."
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, message
        time.sleep(0.1)
    return value


def files(folder: Path) -> set[str]:
    "The relative paths of all files."
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def fetch(address: str, body: dict | None = None) -> bytes:
    "The body of the answer to a GET, or to a POST of JSON."
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        assert answer.status == 200
        return answer.read()


class Clone:
    "A clone of the project with free ports, on a machine without a Docker engine."

    def __init__(self, repo: Path, folder: Path):
        self.root, self.home = folder / "a clone", folder / "home"
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
        config = json.loads((repo / "voila.json").read_text("utf-8"))
        config["Voila"]["port"] = self.dashboard
        (self.root / "voila.json").write_text(json.dumps(config), "utf-8")
        self.write_docker("exit 1")
        python = self.root / ".venv" / "bin" / "python"  # as `make` installs it
        python.parent.mkdir(parents=True)
        self.write_script(python, f'exec {shlex.quote(sys.executable)} "$@"')
        for name in ("made", "play-ready"):
            (self.root / ".venv" / name).touch()
        inherited = {
            name: text for name, text in os.environ.items() if not name.startswith("MUSICGEN_")
        }
        self.env = dict(
            inherited,
            HOME=str(self.home),
            PYTHONPATH=str(repo),
            PYTHONDONTWRITEBYTECODE="1",
            PATH=f"{self.tools}{os.pathsep}{os.environ['PATH']}",
            MUSICGEN_API_PORT=str(self.api),
        )

    def write_script(self, path: Path, text: str):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def write_docker(self, text: str):
        self.write_script(self.tools / "docker", text)

    def make(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["make", *arguments],
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )

    def process(self, text: str) -> psutil.Process | None:
        "A service process whose command contains this text."
        processes = service_processes(Layout(self.root))
        return next((p for p in processes if text in " ".join(p.cmdline())), None)


@pytest.fixture
def clone(repo, tmp_path):
    clone = Clone(repo, tmp_path)
    yield clone
    down(Layout(clone.root))


@pytest.fixture(scope="module")
def running_clone(repo, tmp_path_factory):
    "A clone whose services are up, for tests that change nothing."
    clone = Clone(repo, tmp_path_factory.mktemp("running"))
    try:
        run = clone.make("up")
        assert run.returncode == 0, run.stdout + run.stderr
        yield clone
    finally:
        down(Layout(clone.root))


def test_up_and_down(clone):
    """Two `make up` at once; the API and the dashboard answer; the API is killed and restarted;
    `make down` leaves no process and no file."""
    before = files(clone.root)
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: clone.make("up"), range(2)))
    first_up, second_up = sorted(runs, key=lambda run: "up already" in run.stdout)
    for run in runs:
        assert run.returncode == 0, run.stdout + run.stderr
    assert "are up, supervised" in first_up.stdout and "were up already" in second_up.stdout
    assert "No Docker engine answers" in first_up.stdout and "never built" in first_up.stdout
    api, page = f"http://127.0.0.1:{clone.api}", f"http://127.0.0.1:{clone.dashboard}"
    assert api in first_up.stdout and page in first_up.stdout
    assert "make down" in first_up.stdout and "But" not in first_up.stdout

    assert json.loads(fetch(api + "/health"))["ready"] is True
    score = read_midi(
        fetch(api + "/generate", dict(instruments=["Flute", "Cello"], bars=2, seed=3))
    )
    assert len(score.parts) == 2 and len(score.bar_lines()) == 3

    html = fetch(page).decode()
    assert "<title>MusicGen</title>" in html and "widget-view" in html and "Traceback" not in html
    kernel = clone.process("ipykernel_launcher")
    assert kernel and kernel.environ()["MUSICGEN_DASHBOARD_API"] == api

    killed = clone.process("musicgen.serve")
    killed.kill()
    restarted = wait_until(
        lambda: (p := clone.process("musicgen.serve")) != killed and p, "the API is not restarted"
    )
    assert restarted.pid != killed.pid
    wait_until(lambda: answers(api + "/health"), "the restarted API does not answer")
    assert clone.process("voila ").is_running(), "the dashboard has ended"

    processes = service_processes(Layout(clone.root))
    assert len(processes) >= 4, "a supervisor, the API, the dashboard, a kernel"
    run = clone.make("down")
    assert run.returncode == 0 and "down" in run.stdout, run.stdout + run.stderr
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not answers(api + "/health") and not answers(page + "/voila/static/nothing")
    assert files(clone.root) == before
    assert not [name for name in files(clone.home) if "kernel" in name], (
        "connection files of kernels"
    )
    assert "No service was up" in clone.make("down").stdout


def answers(address: str) -> bool:
    "Whether a server answers, with whatever status."
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_a_port_that_is_in_use(clone):
    "One sentence names the port, and nothing is started."
    with socket.create_server(("127.0.0.1", clone.dashboard)):
        run = clone.make("up")
    (sentence,) = [line for line in run.stderr.splitlines() if line.startswith("musicgen:")]
    assert run.returncode and f"port {clone.dashboard} " in sentence and "voila.json" in sentence
    assert service_processes(Layout(clone.root)) == []


def test_a_program_that_always_fails(tmp_path):
    "It is given up after some seconds. Its last output is in the rejection, and its log stays."
    layout, (port,) = Layout(tmp_path / "100% o'dd #1 ;x"), free_ports(1)
    broken = Service(
        "toy", [sys.executable, "-c", "raise SystemExit('no strings')"], "127.0.0.1", port, "/"
    )
    with pytest.raises(Rejection, match="does not answer .* ends: no strings"):
        up(layout, [broken], 3)
    assert service_processes(layout) == []
    assert "no strings" in (layout.root / "artifacts/services/toy.log").read_text()


@pytest.mark.parametrize(
    "engine, note",
    [
        ("exit 1", "No Docker engine"),
        ('test "$1" = info', "without its compose plugin"),
        ('test "$1" != image && { test "$2" = ls || exit 0; }', "was never built"),
    ],
)
def test_make_up_says_why_docker_is_not_used(clone, engine, note):
    "No engine, no compose plugin, no image: two processes are started, and the reason is printed."
    clone.write_docker(engine)
    clone.write_script(clone.root / ".venv" / "bin" / "python", 'echo "called: $*"')
    run = clone.make("up")
    assert run.returncode == 0 and note in run.stdout
    assert "called: -m musicgen.app.services up" in run.stdout


def test_make_with_docker(clone):
    "With an engine and an image, make calls docker compose and starts nothing itself."
    log, state = clone.root.parent / "calls", clone.root.parent / "containers"
    clone.write_docker(
        f"echo \"$*\" >> '{log}'; case \"$2\" in up) touch '{state}';; down) rm '{state}';; "
        f"ls) test -e '{state}' && echo musicgen;; esac; exit 0"
    )
    clone.write_script(clone.root / ".venv" / "bin" / "python", 'echo "called: $*"')
    assert "called:" not in clone.make("up").stdout
    assert clone.make("docker-build").returncode == 0
    assert "called: -m musicgen.app.services down" in clone.make("down").stdout
    calls = log.read_text()
    assert "compose up --detach --wait\n" in calls and "compose down\n" in calls
    assert re.search(r"^build .*--target play .*--tag musicgen:local", calls, re.MULTILINE)


# --- the files of Docker


@pytest.fixture(scope="module")
def compose(repo) -> dict:
    return yaml.safe_load((repo / "compose.yaml").read_text("utf-8"))["services"]


def test_compose(compose, repo):
    "Both are restricted, have a health check, and can be reached from this machine only."
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


def docker_stages(repo: Path) -> dict[str, list[tuple[str, str]]]:
    "Stage of the Dockerfile -> its instructions and their arguments."
    text = re.sub(
        r"\\\n\s*",
        "",
        "\n".join(
            line
            for line in (repo / "Dockerfile").read_text().splitlines()
            if not line.lstrip().startswith("#")
        ),
    )
    stages, instructions = {}, []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, arguments = line.split(None, 1)
        if name == "FROM":
            instructions = stages.setdefault(arguments.split(" AS ")[1], [])
        instructions.append((name, arguments))
    return stages


def test_dockerfile(repo):
    "The last stage has no torch, is not root, checks its health without curl, copies real files."
    stages = docker_stages(repo)
    assert list(stages) == ["build", "train", "play"]
    play = stages["play"]
    arguments = dict(play)
    assert arguments["USER"] == "10001:10001" and arguments["EXPOSE"] == "8000 8080"
    assert "torch" not in str(play + stages["build"]) and "TORCH_INDEX" in str(stages["train"])
    check = json.loads(arguments["HEALTHCHECK"].split("CMD ", 1)[1])
    assert check[0] == "python" and "curl" not in str(stages)
    compile(check[2], "check", "exec")
    assert json.loads(arguments["CMD"])[0] == "python"
    environment = " ".join(text for instruction, text in play if instruction == "ENV")
    assert "HOME=/tmp" in environment and "MUSICGEN_API_HOST=0.0.0.0" in environment
    included = [
        line.lstrip("!")
        for line in (repo / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = {
        name
        for instructions in stages.values()
        for instruction, text in instructions
        if instruction == "COPY" and "--from" not in text
        for name in text.split()[:-1]
    }
    assert copied == set(included) and all((repo / name).exists() for name in copied)


def test_the_health_checks(running_clone, compose, repo):
    "The health checks of Docker succeed while a service is up, and fail where there is none."
    checks = {
        running_clone.api: json.loads(
            dict(docker_stages(repo)["play"])["HEALTHCHECK"].split("CMD ", 1)[1]
        )[2],
        running_clone.dashboard: compose["dashboard"]["healthcheck"]["test"][3],
    }

    def is_healthy(code: str, port: int) -> bool:
        code = re.sub(r":80[08]0/", f":{port}/", code)
        return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

    (unused,) = free_ports(1)
    for port, code in checks.items():
        assert is_healthy(code, port) and not is_healthy(code, unused)


# --- the README's chapter about services


def blocks(repo: Path, kind: str) -> list[str]:
    "The code blocks of the README in one language."
    return re.findall(rf"```{kind}\n(.*?)```", (repo / "README.md").read_text("utf-8"), re.DOTALL)


async def handshake(address: str, name: str, kernel: str) -> bool:
    "Whether a browser that knows the host by `name` gets its websocket."
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    url = f"{address.replace('http', 'ws')}/api/kernels/{kernel}/channels"
    connection = await websocket_connect(
        HTTPRequest(url, headers={"Host": name, "Origin": f"http://{name}"})
    )
    connection.close()
    return True


def fetch_by_name(address: str, name: str, path: str, data: bytes | None = None) -> bytes:
    "The body of the answer to a request with `name` as its host."
    headers = {"Host": name, "content-type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(address + path, data, headers), timeout=PATIENCE
    ) as answer:
        return answer.read()


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_behind_a_proxy(running_clone, repo, tmp_path, proxy):
    "The config in the README: the page, its websocket, a take, and a body that is too big."
    if not (tool := shutil.which(proxy) or shutil.which(proxy, path="/usr/sbin")):
        pytest.skip(f"{proxy} is not installed")
    (text,) = blocks(repo, proxy)
    (port,) = free_ports(1)
    for port_in_readme, actual in {8000: running_clone.api, 8080: running_clone.dashboard}.items():
        text = text.replace(f"127.0.0.1:{port_in_readme}", f"127.0.0.1:{actual}")
    config = tmp_path / "proxy.conf"
    if proxy == "nginx":
        names = ("proxy", "client_body", "fastcgi", "uwsgi", "scgi")
        folders = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in names)
        text = text.replace("listen 80;", f"listen 127.0.0.1:{port};")
        config.write_text(
            f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; {folders}\n{text}}}\n"
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
    env = dict(running_clone.env, XDG_DATA_HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path))
    running = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: answers(address), f"{proxy} does not answer")
        html = fetch_by_name(address, page, "/").decode()
        kernel = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", html)[0]
        assert "<title>MusicGen</title>" in html and asyncio.run(handshake(address, page, kernel))
        body = json.dumps(dict(bars=1, seed=1)).encode()
        assert read_midi(fetch_by_name(address, api, "/generate", body)).parts
        with pytest.raises(urllib.error.HTTPError) as error:
            fetch_by_name(address, api, "/generate", b" " * 1_100_000)
        assert error.value.code == 413
    finally:
        running.terminate()
        running.wait(30)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_units(repo, tmp_path):
    "systemd accepts the three files of the README without a message."
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
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    messages = [line for line in (run.stdout + run.stderr).splitlines() if "musicgen" in line]
    assert not messages, "\n".join(messages)
