"""Builds the image where there is no Docker engine, and a base where no images can be pulled.

    python tools/image.py build ENGINE TARGET NAME [OPTION ...]
    python tools/image.py base SUITE NAME

`build` reads the Dockerfile; ENGINE is podman or buildah; `make docker-build` calls it. pip finds
this machine's settings while it builds, and they are not in the image. `base` makes an image of a
Debian with its own Python, by debootstrap and buildah, as root.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pip_settings

ROOT = Path(__file__).resolve().parent.parent


def call(*words, **more) -> str:
    "Runs a program that must succeed; gives what it printed."
    return subprocess.run(
        [str(word) for word in words], check=True, text=True, stdout=subprocess.PIPE, **more
    ).stdout.strip()


def environment(engine: str) -> dict[str, str]:
    """As root, buildah needs no daemon: a chroot isolates the build, and layers are overlaid where
    the kernel can do it, else copied. What the environment sets already stays."""
    if engine != "buildah" or os.geteuid():
        return dict(os.environ)
    plain = dict(BUILDAH_ISOLATION="chroot") | os.environ
    if "STORAGE_DRIVER" in plain:
        return plain
    overlay = plain | dict(STORAGE_DRIVER="overlay")
    possible = subprocess.run(["buildah", "info"], env=overlay, capture_output=True).returncode == 0
    return overlay if possible else plain | dict(STORAGE_DRIVER="vfs")


def build(engine: str, target: str, name: str, *options: str):
    "One target of the Dockerfile, as the image `name`."
    with tempfile.TemporaryDirectory() as folder:
        command = [
            engine,
            "build",
            "--format",
            "docker",
            "--target",
            target,
            "--tag",
            name,
            *options,
        ]
        if engine == "buildah":
            command += ["--network", "host"]
        for here, there in pip_settings.mounts(Path(folder)):
            command += ["--volume", f"{here}:{there}:ro"]
        subprocess.run([*command, str(ROOT)], check=True, env=environment(engine))


def debian(suite: str, root: Path, *packages: str):
    "A Debian of its own in the folder `root`: the least that works, its Python, the packages."
    if not shutil.which("debootstrap"):
        raise SystemExit("debootstrap is not installed (Debian: apt-get install debootstrap)")
    if os.geteuid():
        raise SystemExit("debootstrap needs root")
    wanted = ",".join(["python3", "python3-venv", "ca-certificates", *packages])
    command = ["debootstrap", "--variant=minbase", f"--include={wanted}", suite, str(root)]
    if mirror := os.environ.get("DEBIAN_MIRROR"):
        command.append(mirror)
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"debootstrap {suite} failed:\n{done.stdout[-3000:]}")


def base(suite: str, name: str):
    "A Debian with its own Python as the image `name`: `--build-arg BASE=name` builds on it."
    env = environment("buildah")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        debian(suite, root)
        shutil.rmtree(root / "var/cache/apt/archives")
        container = call("buildah", "from", "scratch", env=env)
        try:
            call("buildah", "copy", "--quiet", container, root, "/", env=env)
            call("buildah", "config", "--cmd", "python3", container, env=env)
            call("buildah", "commit", "--quiet", container, name, env=env)
        finally:
            call("buildah", "rm", container, env=env)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", engine, target, name, *options]:
            build(engine, target, name, *options)
        case ["base", suite, name]:
            base(suite, name)
        case _:
            raise SystemExit(__doc__)
