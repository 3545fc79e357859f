"""Servers that tests start and stop, each with folders of its own."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

PATIENCE = 180  # seconds before a test gives up; a busy machine is slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home: Path, **more: str) -> dict[str, str]:
    "Environment variables with all Jupyter folders in `home`; those of the user are not used."
    folders = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "IPYTHONDIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
    )
    return {**os.environ, **{name: str(home / name.lower()) for name in folders}, **more}


@contextmanager
def running(command: list[str], port: int, cwd: Path, env: dict[str, str], log: Path, path: str):
    "The address of a server, once it answers at `path`; at the end it and its kernels are stopped."
    with open(log, "wb") as out:
        server = psutil.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=env,
            stdout=out,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while not answers(address + path):
            output = log.read_text(errors="replace")
            assert server.poll() is None, f"{command[1]} ended:\n{output}"
            assert time.monotonic() < end, f"{command[1]} does not answer:\n{output}"
            time.sleep(0.2)
        yield address
    finally:
        family = [server, *server.children(recursive=True)] if server.is_running() else [server]
        server.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)


def answers(address: str) -> bool:
    "Whether a server answers, with whatever status."
    try:
        urlopen(address, timeout=5).close()
    except URLError as error:
        return hasattr(error, "code")
    except OSError:
        return False
    return True
