"""What is promised to those who install: pins fit the lowest Python, and cover what is brought."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("train", "dev")
"What `make check` installs beside the base: of these every distribution is here, and can be asked."

CUDA = ("nvidia-", "cuda-", "triton")
"What torch's ordinary build for Linux brings for graphics cards: torch itself names the versions."


@pytest.fixture(scope="module")
def project(repo) -> dict:
    return tomllib.loads((repo / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def pins(repo) -> dict:
    "constraints.txt as {name: version}."
    found = {}
    for line in (repo / "constraints.txt").read_text("utf-8").splitlines():
        if not (line := line.split("#")[0].strip()):
            continue
        match = re.fullmatch(r"([\w.-]+)==(\S+)", line)
        assert match, f"{line}: a line of constraints.txt is NAME==VERSION"
        name = canonicalize_name(match[1])
        assert name not in found, f"constraints.txt names {name} twice"
        found[name] = match[2]
    assert len(found) > 100
    return found


def lowest(project: dict) -> Version:
    "The lowest Python that pyproject.toml admits: `>=3.11` is 3.11.0."
    bounds = [
        part.version for part in SpecifierSet(project["requires-python"]) if part.operator == ">="
    ]
    assert len(bounds) == 1
    parts = Version(bounds[0]).release
    return Version(".".join(map(str, (parts + (0, 0))[:3])))


def brought(project: dict) -> set[str]:
    "What the base and the extras bring here, and what that needs in its turn, by name."
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    waiting, seen = [(Requirement(line), "") for line in lines], set()
    while waiting:
        need, extra = waiting.pop()
        key = canonicalize_name(need.name), frozenset(need.extras)
        if key in seen or key[0].startswith(CUDA):
            continue
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        seen.add(key)
        for line in distribution(need.name).requires or []:
            waiting += [(Requirement(line), extra) for extra in ("", *need.extras)]
    return {name for name, _ in seen}


def test_every_pin_installs_on_the_lowest_python(project, pins):
    "`requires-python` is a promise: no pinned version may want a later Python."
    low, asked, late = lowest(project), 0, {}
    for name, version in pins.items():
        try:
            metadata = distribution(name)
        except PackageNotFoundError:
            continue  # of [bench], or of another Python: `make pythons` asks the index for these
        if Version(metadata.version).public != Version(version).public:
            continue  # moved in constraints.txt, not installed yet
        asked += 1
        wanted = (metadata.metadata.get_all("Requires-Python") or [""])[0]
        if not SpecifierSet(wanted).contains(low):
            late[name] = wanted
    assert late == {}, f"these pins do not install on Python {low}"
    assert asked > 150, (
        f"only {asked} of {len(pins)} pins are installed here: run `make .venv/check-ready`"
    )


def test_everything_that_is_installed_has_its_pin(project, pins):
    "Without a pin the next installation may bring another version."
    needs = brought(project)
    assert len(needs) > 100 and sorted(needs - set(pins) - {"setuptools", "pip"}) == []


def test_every_dependency_admits_its_pin(project, pins):
    "pyproject.toml says what is allowed, constraints.txt what is installed."
    lines = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    needs = [Requirement(line) for line in lines]
    outside = [
        str(need)
        for need in needs
        if (pin := pins.get(canonicalize_name(need.name))) and not need.specifier.contains(pin)
    ]
    assert outside == []


def test_no_file_names_a_package_index_or_a_path_of_a_machine(repo):
    "Which index is asked is a setting of the machine: of pip, of npm, of Debian's apt."
    words = re.compile(
        r"--(?:extra-)?index-url[ =]+http|find-links[ =]+\S*/"
        r"|https?://\S*(?:pypi\.|pythonhosted|/simple\b|/whl\b|registry\.npmjs)"
    )
    names = [
        "Dockerfile",
        "Makefile",
        "compose.yaml",
        "constraints.txt",
        "pyproject.toml",
        ".ci/run",
        *[str(path.relative_to(repo)) for path in sorted((repo / "tools").glob("*.py"))],
    ]
    assert [name for name in names if words.search((Path(repo) / name).read_text("utf-8"))] == []
