"""This machine's settings of pip, as one file and the files and folders that it names.

For an image or a chroot, where pip would not find them. The project itself names no package index
and no path of a machine.
"""

import ast
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

PLACE = "/etc/pip.conf"
"Where every pip on Linux reads the settings of its machine, inside an environment too."

CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
"Variables by which a machine names its own certificates to pip, if pip's own setting does not."


def listed(python: str = sys.executable) -> dict[tuple[str, str], str]:
    "What `pip config list` says, by (section, name); variables override every section, as in pip."
    command = [python, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    settings, variables = {}, {}
    for line in done.stdout.splitlines():
        key, value = line.split("=", 1)
        section, name = key.split(".", 1)
        if name == "config-file":
            continue  # pip has read it: what it sets is listed by itself
        if section == ":env:":
            variables[name] = ast.literal_eval(value)
        else:
            settings[section, name] = ast.literal_eval(value)
    settings = {key: value for key, value in settings.items() if key[1] not in variables}
    settings |= {("global", name): value for name, value in variables.items()}
    bundle = next((os.environ[name] for name in CERTIFICATES if os.environ.get(name)), None)
    if bundle and not any(name == "cert" for _, name in settings):
        settings["global", "cert"] = bundle
    return settings


def written(settings: dict[tuple[str, str], str]) -> str:
    "The settings as the text of a pip.conf."
    lines = []
    for section in sorted({section for section, _ in settings}):
        lines.append(f"[{section}]")
        for (where, name), value in sorted(settings.items()):
            if where == section:
                lines.append(f"{name} = " + "\n    ".join(value.split("\n")))
    return "\n".join(lines) + "\n"


def named(settings: dict[tuple[str, str], str]) -> list[Path]:
    "The files and folders of this machine that the settings name, by path or by a file: address."
    paths: list[Path] = []
    for (_, name), value in settings.items():
        for word in value.split():
            if word.startswith("file:"):
                word = urllib.request.url2pathname(urllib.parse.urlsplit(word).path)
            path = Path(word)
            if not path.is_absolute() or not path.exists():
                continue
            # the pages of an index lead to files beside it
            if name.endswith("index-url") and len(path.parts) > 2:
                path = path.parent
            # of two folders of which one holds the other, the outer one is enough
            if any(path.is_relative_to(outer) for outer in paths):
                continue
            paths = [inner for inner in paths if not inner.is_relative_to(path)] + [path]
    return paths


def mounts(folder: Path, python: str = sys.executable) -> list[tuple[Path, str]]:
    "What has to be seen elsewhere, as (path here, path there); writes the settings into `folder`."
    settings = listed(python)
    if not settings:
        return []
    file = folder / "pip.conf"
    file.write_text(written(settings), "utf-8")
    return [(file, PLACE)] + [(path, str(path)) for path in named(settings)]
