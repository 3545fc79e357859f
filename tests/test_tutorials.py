"""Tutorials: their imports, their stored outputs, and their links."""

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
INTERNAL = PUBLIC | {"model"}  # for the tutorial about the model
LIMIT = 100_000  # bytes of a whole notebook

each = pytest.mark.parametrize("name", TUTORIALS)


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))


def code(book: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def test_the_list_is_complete():
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == TUTORIALS


@each
def test_a_tutorial_imports_public_names_only(name):
    "It exports nothing. Only the tutorial about the model imports from the model library."
    book = read(name)
    assert (
        book["metadata"]["kernelspec"]["name"] == "python3"
        and book["cells"][0]["cell_type"] == "markdown"
    )
    assert re.match(r"# \S.*\n\n> \S", "".join(book["cells"][0]["source"])), (
        "a title, and a sentence that says what the tutorial shows"
    )
    allowed = INTERNAL if name == TUTORIALS[-1] else PUBLIC
    for source in code(book):
        assert "#|" not in source, source
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("musicgen"):
                continue
            assert node.module.removeprefix("musicgen.").split(".")[0] in allowed, source
            assert not [alias.name for alias in node.names if alias.name[0] in "_*"], source


@each
def test_its_outputs_are_small_and_contain_no_local_paths(name):
    "Pictures; no audio, no error, no path of the machine on which it ran."
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
    shown = "".join(
        json.dumps(
            {
                kind: data
                for kind, data in out.get("data", {}).items()
                if not kind.startswith("image/")
            }
        )
        + "".join(out.get("text", ""))
        for out in outputs
    )
    assert "data:audio" not in shown and "data:audio" not in text
    assert not re.search(
        r"(?<![\w.~:/])/(?:tmp|home|root|work|var|usr|opt|Users|private|mnt)/", shown
    ), "a path of this machine"
    assert " at 0x" not in shown and "Traceback" not in shown


@each
def test_its_code_is_explained(name):
    "At most three code cells in a row without prose between them, and at least four asserts."
    run = longest = 0
    for cell in read(name)["cells"]:
        run = run + 1 if cell["cell_type"] == "code" else 0
        longest = max(longest, run)
    assert longest <= 3 and sum(source.count("assert ") for source in code(read(name))) >= 4


@each
def test_its_links_lead_to_files(name):
    "Links are relative, and their text has no number of a notebook."
    prose = "\n".join(
        "".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "markdown"
    )
    links = [
        target.split("#")[0]
        for target in re.findall(r"\]\(([^)]+)\)", prose)
        if not target.startswith("http")
    ]
    assert links and all((FOLDER / target).is_file() for target in links), links
    texts = [text for text in re.findall(r"\[([^]]+)\]\(", prose) if re.search(r"\b\d\d_", text)]
    assert not texts, texts


@pytest.mark.parametrize("name, following", list(zip(TUTORIALS, [*TUTORIALS[1:], "../index"])))
def test_it_ends_with_a_link_to_the_next_tutorial(name, following):
    last = read(name)["cells"][-1]
    assert last["cell_type"] == "markdown" and f"]({following}.ipynb)" in "".join(last["source"])
