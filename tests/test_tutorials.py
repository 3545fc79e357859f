"""Tutorials: what they import, what they store, and where their links lead."""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "tutorials"
TUTORIALS = [
    "01_your_first_piece",
    "02_your_own_midis",
    "03_fine_tune",
    "04_call_the_api",
    "05_how_the_model_works",
]
PUBLIC = {"musicgen", "core", "generation", "music", "train", "evaluation", "evaluate"}
INSIDE = PUBLIC | {"model"}  # for the pictures of the model
LIMIT = 100_000  # bytes of a whole notebook

each = pytest.mark.parametrize("name", TUTORIALS)


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))


def code(book: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def test_the_list_is_complete():
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == TUTORIALS


@each
def test_a_tutorial_uses_what_users_use(name):
    "It exports nothing, and imports public names, of the model library only in the pictures of the model."
    book = read(name)
    assert (
        book["metadata"]["kernelspec"]["name"] == "python3"
        and book["cells"][0]["cell_type"] == "markdown"
    )
    assert re.match(r"# \S.*\n\n> \S", "".join(book["cells"][0]["source"])), (
        "a title, and a promise"
    )
    allowed = INSIDE if name == TUTORIALS[-1] else PUBLIC
    for source in code(book):
        assert "#|" not in source, source
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("musicgen"):
                continue
            assert node.module.removeprefix("musicgen.").split(".")[0] in allowed, source
            assert not [alias.name for alias in node.names if alias.name[0] in "_*"], source


@each
def test_its_outputs_are_small_and_belong_to_nobody(name):
    "Pictures, no sound, no error, no path of the machine on which it ran."
    text = (FOLDER / f"{name}.ipynb").read_text("utf-8")
    assert len(text.encode()) < LIMIT, f"{name} has {len(text.encode()):,} bytes, above {LIMIT:,}"
    outputs = [
        out
        for cell in read(name)["cells"]
        if cell["cell_type"] == "code"
        for out in cell["outputs"]
    ]
    assert outputs and not [out for out in outputs if out["output_type"] == "error"]
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert "image/png" in kinds and not [
        kind for kind in kinds if kind.startswith(("audio/", "application/"))
    ]
    told = "".join(
        json.dumps(
            {
                kind: shown
                for kind, shown in out.get("data", {}).items()
                if not kind.startswith("image/")
            }
        )
        + "".join(out.get("text", ""))
        for out in outputs
    )
    assert "data:audio" not in told and "data:audio" not in text
    assert not re.search(
        r"(?<![\w.~:/])/(?:tmp|home|root|work|var|usr|opt|Users|private|mnt)/", told
    ), "a path of this machine"
    assert " at 0x" not in told and "Traceback" not in told


@each
def test_its_pictures_are_talked_about(name):
    "No more than three code cells in a row without a word between them, and asserts that can fail."
    cells = read(name)["cells"]
    row = longest = 0
    for cell in cells:
        row = row + 1 if cell["cell_type"] == "code" else 0
        longest = max(longest, row)
    assert longest <= 3 and sum(source.count("assert ") for source in code(read(name))) >= 4


@each
def test_its_links_lead_somewhere(name):
    prose = "\n".join(
        "".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "markdown"
    )
    links = [
        target.split("#")[0]
        for target in re.findall(r"\]\(([^)]+)\)", prose)
        if not target.startswith("http")
    ]
    assert links and all((FOLDER / target).is_file() for target in links), links
