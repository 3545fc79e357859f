"""Installs MusicGen on the Pythons of two Debians, plays one request and runs the fast tests there.

    python tools/pythons.py [--suites bookworm,trixie] [--without-tests] [--keep]

`make pythons` calls it. The suite that this machine runs is tried here, with /usr/bin/python3;
another one in a folder of its own (debootstrap, chroot), which has nothing but its Python, make and
certificates. Needs root, debootstrap, git and a Debian mirror (DEBIAN_MIRROR names another one).
TORCH_INDEX names the package index that torch is taken from first; without it pip's ordinary torch
comes, several gigabytes where no file of the CPU build is at hand.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import image
import pip_settings

TAKE = [
    "generate",
    "--instruments",
    "Violin,Violin,Viola,Cello",
    "--bars",
    "8",
    "--tempo",
    "96",
    "--seed",
    "7",
]
"The request that every Python plays."


@dataclass
class System:
    "A Debian in which commands are run: this machine, or a root folder that is entered by chroot."

    suite: str
    work: Path  # the folder of the clone, seen from here
    root: Path | None  # None: this machine
    mounts: list[tuple[Path, str]]

    def run(self, command: str) -> float:
        "Runs a shell's command in the clone, with no variable of ours; gives the seconds it took."
        inside = self.work if self.root is None else Path("/") / self.work.relative_to(self.root)
        kept = [
            f"{name}={os.environ[name]}"
            for name in os.environ
            if name.lower().endswith("_proxy")
            or name == "TORCH_INDEX"
            or self.root is None
            and name.startswith("PIP_")
        ]
        words = [
            "env",
            "-i",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            f"HOME={inside.parent}",
            *kept,
            "sh",
            "-ec",
            f"cd {shlex.quote(str(inside))}; {command}",
        ]
        if self.root is not None:
            # In a mount namespace of its own, so that nothing stays mounted, whatever happens.
            lines = [
                f"mount --rbind /{name} {shlex.quote(str(self.root / name))}"
                for name in ("proc", "sys", "dev")
            ]
            for here, there in self.mounts:
                place = self.root / there.lstrip("/")
                if here.is_dir():
                    place.mkdir(parents=True, exist_ok=True)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.touch()
                lines.append(f"mount --bind {shlex.quote(str(here))} {shlex.quote(str(place))}")
            lines.append(shlex.join(["exec", "chroot", str(self.root), *words]))
            words = [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-ec",
                "\n".join(lines),
            ]
        start = time.monotonic()
        done = subprocess.run(words)
        if done.returncode:
            raise SystemExit(f"On Debian {self.suite} this failed: {command}")
        return time.monotonic() - start


def codename() -> str:
    "The suite that this machine runs, such as bookworm; empty where it is no Debian."
    file = Path("/etc/os-release")
    lines = (
        dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
        if file.exists()
        else {}
    )
    return lines.get("VERSION_CODENAME", "").strip('"') if lines.get("ID") == "debian" else ""


def prepare(suite: str, folder: Path) -> tuple[System, float]:
    "The Debian `suite` with a clone of the last commit, and the seconds that its making took."
    start = time.monotonic()
    own = (
        codename() == suite
        and not subprocess.run(
            ["/usr/bin/python3", "-c", "import venv, ensurepip"], capture_output=True
        ).returncode
    )
    root = None if own else folder / suite
    if root is None:
        work, places = folder / suite / "clone", []
    else:
        image.debian(suite, root, "make")
        work, places = root / "srv/clone", pip_settings.mounts(folder)
    work.parent.mkdir(parents=True, exist_ok=True)
    image.call("git", "clone", "--quiet", image.ROOT, work)
    return System(suite, work, root, places), time.monotonic() - start


def try_one(suite: str, folder: Path, tests: bool) -> str:
    "Everything on one Debian; gives the SHA-256 of the take."
    print(f"--- Debian {suite}", flush=True)
    system, seconds = prepare(suite, folder)
    where = "this machine" if system.root is None else f"a folder of its own, {seconds:.0f} s"
    print(f"{suite}: in {where}", flush=True)
    system.run("/usr/bin/python3 --version")
    make = "make PYTHON=/usr/bin/python3"
    print(
        f"{suite}: what make play installs: {system.run(f'{make} .venv/play-ready'):.0f} s",
        flush=True,
    )
    seconds = system.run(f".venv/bin/musicgen {shlex.join(TAKE)} -o take.mid")
    digest = hashlib.sha256((system.work / "take.mid").read_bytes()).hexdigest()
    print(f"{suite}: a take: {seconds:.1f} s, sha256 {digest}", flush=True)
    if tests:
        if "TORCH_INDEX" in os.environ:
            install = "pip install -q -c constraints.txt --index-url"
            system.run(f'.venv/bin/python -m {install} "$TORCH_INDEX" torch')
        print(
            f"{suite}: what make run installs: {system.run(f'{make} .venv/run-ready'):.0f} s",
            flush=True,
        )
        print(
            f"{suite}: what the tests need: {system.run(f'{make} .venv/check-ready'):.0f} s",
            flush=True,
        )
        print(f"{suite}: make quick: {system.run(f'{make} quick'):.0f} s", flush=True)
    return digest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", default="bookworm,trixie", help="Debian's suites, with commas")
    parser.add_argument("--without-tests", action="store_true", help="only install and play")
    parser.add_argument("--keep", action="store_true", help="leave the folders where they are")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="musicgen-pythons-"))
    try:
        digests = {
            suite: try_one(suite, folder, not asked.without_tests)
            for suite in asked.suites.split(",")
        }
    finally:
        if asked.keep:
            print(f"left in {folder}")
        else:
            shutil.rmtree(folder)
    if len(set(digests.values())) > 1:
        raise SystemExit(f"the Pythons do not play the same bytes: {digests}")
    print(f"make pythons: the same bytes on {', '.join(digests)}")


if __name__ == "__main__":
    main()
