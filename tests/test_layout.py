"""Where things are: notebooks, modules, imports, links, stored outputs, configs.

`python tests/test_layout.py` writes the map of README from the notebooks' promises.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from musicgen import pipeline

REPO = Path(__file__).resolve().parent.parent
LIBRARIES = ("core", "music", "model", "corpus", "generation", "evaluation", "app", "bench")
NOTEBOOKS = sorted((REPO / "nbs").rglob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = [p for p in NOTEBOOKS if ".ipynb_checkpoints" not in p.parts]
TUTORIALS = [p for p in NOTEBOOKS if p.parent.name == "tutorials"]
MODULES = [p for p in NOTEBOOKS if p not in TUTORIALS]
CONFIGS = ("pipeline.yaml", "bench.yaml", "load.yaml", "records.yaml", "ablations.yaml")
STAGES = {
    name: stage
    for config in CONFIGS
    for name, stage in yaml.safe_load((REPO / config).read_text())["stages"].items()
}
LIMIT = 200_000  # bytes of stored outputs in one notebook


def name_of(path: Path) -> str:
    "The notebook's place below nbs, such as music/05_score."
    return str(path.relative_to(REPO / "nbs").with_suffix(""))


def module_of(path: Path) -> str:
    "The module that a notebook exports, from its place: music/05_score is music.score."
    *folder, name = name_of(path).split("/")
    return ".".join([*folder, name[3:]])


NUMBERS = {module_of(p): (module_of(p).split(".")[0], int(p.name[:2])) for p in MODULES}


def cells(path: Path, kind: str = "code") -> list[dict]:
    "The cells of one kind, the source of each as one text."
    found = json.loads(path.read_text("utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in found if c["cell_type"] == kind]


def code(cell: dict) -> str:
    "The cell as plain Python: lines of IPython magic are left out."
    return "".join(line for line in cell["source"].splitlines(True) if line[:1] not in "%!")


def imported(cell: dict) -> set[str]:
    "The modules of ours that a cell imports."
    names = pipeline.parse_code(code(cell))[1]
    found = (pipeline.module_file(name, [REPO]) for name in names)
    return {module.removeprefix("musicgen.") for module, _ in filter(None, found)}


def may_import(importer: str, module: str) -> bool:
    "A library imports itself (lower numbers) and libraries before it; the spine imports libraries."
    (place, number), (other, lower) = NUMBERS[importer], NUMBERS[module]
    if other in LIBRARIES and place not in LIBRARIES:
        return True
    if other not in LIBRARIES or place not in LIBRARIES:
        return other not in LIBRARIES and place not in LIBRARIES and lower < number
    return (LIBRARIES.index(other), lower) < (LIBRARIES.index(place), number)


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@each_module
def test_a_notebook_is_a_module(path):
    "Its place is its module, it opens with a title, and no cell exports the package during a run."
    assert re.fullmatch(r"\d\d_[a-z]+", path.stem)
    exports = [c["source"] for c in cells(path) if "#| default_exp" in c["source"]]
    assert len(exports) == 1
    assert re.search(r"#\| default_exp ([\w.]+)", exports[0])[1] == module_of(path)
    assert cells(path, "markdown")[0]["source"].startswith("# "), "it opens with a title"
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
    assert not any("nbdev_export(" in c["source"] for c in cells(path))


def test_modules_are_unique_and_complete():
    "One notebook a module, one number a notebook in its folder, and no module without a notebook."
    assert len({(p.parent, p.name[:2]) for p in MODULES}) == len(MODULES) == len(NUMBERS)
    assert {p.parent.name for p in MODULES} - {"nbs"} <= set(LIBRARIES)
    files = {p.relative_to(REPO / "musicgen") for p in (REPO / "musicgen").rglob("*.py")}
    modules = {".".join(f.with_suffix("").parts) for f in files if not f.stem.startswith("_")}
    assert modules == {module_of(p) for p in MODULES}


@each_module
def test_imports_point_down(path):
    "In exported cells and in examples."
    for cell in cells(path):
        for module in imported(cell) - {module_of(path)}:
            said = f"{name_of(path)} imports {module}:\n{cell['source']}"
            assert may_import(module_of(path), module), said


# ---- the reading order, and what derives from it ----


def reading_order() -> list[Path]:
    "The notebooks of the book in the order that nbs/index.ipynb states."
    (text,) = [
        c["source"]
        for c in cells(REPO / "nbs/index.ipynb", "markdown")
        if "reading order" in c["source"]
    ]
    return [REPO / "nbs" / link for link in re.findall(r"\]\(([^)]+\.ipynb)\)", text)]


def test_the_reading_order_is_complete():
    assert sorted(reading_order()) == MODULES


@each_module
def test_the_last_cell_leads_to_the_next_notebook(path):
    order = reading_order()
    last = cells(path, "markdown")[-1]["source"]
    links = re.findall(r"\]\(([^)]+\.ipynb)\)", last)
    if path == order[-1]:
        return
    following = order[order.index(path) + 1]
    assert [(path.parent / link).resolve() for link in links[-1:]] == [following], (
        f"{name_of(path)} ends with {links}, and {name_of(following)} comes next"
    )


def promise_of(path: Path) -> str:
    "The one-line promise under a notebook's title."
    (first, *_) = cells(path, "markdown")
    block = re.search(r"^# .+\n\n((?:> .*\n?)+)", first["source"])
    assert block, f"{name_of(path)} has no promise under its title"
    return " ".join(line.removeprefix("> ").strip() for line in block[1].splitlines())


def readme_map() -> str:
    "The table of README: module, notebook, what it is for."
    rows = ["| module | what it is for |", "|---|---|"]
    libraries = {name: k for k, name in enumerate(LIBRARIES[1:], 1)}
    place = lambda path: (libraries.get(module_of(path).split(".")[0], 0), path)
    for path in sorted(MODULES, key=place):
        link = path.relative_to(REPO)
        rows.append(f"| [`{module_of(path)}`]({link}) | {promise_of(path)} |")
    return "\n".join(rows)


MAP = re.compile(r"(<!-- map: .*? -->\n).*?(<!-- end of map -->)", re.DOTALL)


def test_the_map_of_the_readme_is_that_of_the_notebooks():
    text = (REPO / "README.md").read_text("utf-8")
    written = MAP.sub(lambda m: f"{m[1]}{readme_map()}\n{m[2]}", text)
    assert text == written, "run `python tests/test_layout.py`"


def links_of(text: str) -> list[str]:
    "The relative links of Markdown, without anchors; code is left out."
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(<?([^)#>\s]+)[^)]*\)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


PAGES = [
    *NOTEBOOKS,
    REPO / "nbs/index.ipynb",
    *sorted(REPO.glob("*.md")),
    REPO / "musicgen/assets/README.md",
]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_link_leads_somewhere(path):
    if path.suffix == ".ipynb":
        text = "\n\n".join(c["source"] for c in cells(path, "markdown"))
    else:
        text = path.read_text("utf-8")
    broken = [link for link in links_of(text) if not (path.parent / link).exists()]
    assert not broken, f"{path.name} links to {', '.join(broken)}"


@each_notebook
def test_no_number_of_a_notebook_is_written_down(path):
    "A notebook is named by a link; its number may change."
    stems = "|".join(p.stem for p in MODULES)
    for cell in cells(path) + cells(path, "markdown"):
        text = re.sub(r"\]\([^)]*\)", "]", cell["source"])
        hit = re.search(rf"(?<![\w/])({stems})(?!\w)", text)
        assert not hit, f"{name_of(path)} names {hit and hit[0]}:\n{cell['source']}"


@each_module
def test_private_names_stay_in_their_module(path):
    "What two modules need is public in the lower one."
    for cell in cells(path):
        for node in ast.walk(ast.parse(code(cell))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("musicgen"):
                names = [alias.name for alias in node.names if alias.name.startswith("_")]
                names = [name for name in names if name != "__version__"]
                assert not names, f"{name_of(path)} imports {', '.join(names)} of {node.module}"


@each_module
def test_methods_are_attached_with_patch(path):
    "No function is assigned to an attribute of a class in an exported cell."
    for cell in cells(path):
        if "#| export" not in cell["source"]:
            continue
        tree = ast.parse(code(cell))
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in [
                t for x in targets for t in (x.elts if isinstance(x, ast.Tuple) else [x])
            ]:
                attached = (
                    isinstance(target, ast.Attribute) and ast.unparse(target.value)[:1].isupper()
                )
                assert not attached, f"{name_of(path)} attaches {ast.unparse(target)}; use @patch"
            assert "setattr(" not in ast.unparse(node) or isinstance(
                node, ast.FunctionDef | ast.ClassDef
            ), f"{name_of(path)} attaches with setattr; use @patch"


# ---- what notebooks may not do ----


@each_notebook
def test_imports_are_explicit(path):
    "No star import of our own rooms, no relative import, no postponed annotations."
    for cell in cells(path):
        for node in ast.walk(ast.parse(code(cell))):
            if not isinstance(node, ast.ImportFrom):
                continue
            assert node.level == 0 and node.module != "__future__", cell["source"]
            if (node.module or "").startswith("musicgen"):
                assert node.names[0].name != "*"


@each_notebook
def test_no_path_is_relative(path):
    "nbdev runs a notebook in its folder, papermill does not: a path comes from a Layout."
    relative = re.compile(
        r"""(?:open|Path|read_csv|np\.load)\(\s*f?["'](?!/|~|["'])"""
        r"""(?:\.|nbs|data/|artifacts/|tests/)"""
    )
    for cell in cells(path):
        assert not relative.search(cell["source"]), cell["source"]


@each_notebook
def test_outputs_are_small_and_silent(path):
    size = sum(len(json.dumps(c.get("outputs", []))) for c in cells(path))
    assert size < LIMIT, f"{name_of(path)} stores {size:,} bytes of outputs, above {LIMIT:,}"
    kinds = {kind for c in cells(path) for o in c["outputs"] for kind in o.get("data", ())}
    assert not {kind for kind in kinds if kind.startswith("audio/")}
    shown = "".join(json.dumps(o.get("data", {})) for c in cells(path) for o in c["outputs"])
    assert "data:audio" not in shown, "audio is never stored in a notebook"
    errors = [o for c in cells(path) for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, f"{name_of(path)} is stored with an error"


@each_notebook
def test_no_exception_is_swallowed(path):
    for cell in cells(path):
        for node in ast.walk(ast.parse(code(cell))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            assert node.type is not None, f"a bare except:\n{cell['source']}"
            broad = getattr(node.type, "id", "") in ("Exception", "BaseException")
            idle = all(isinstance(step, (ast.Pass, ast.Continue)) for step in node.body)
            assert not (broad and idle), f"a swallowed exception:\n{cell['source']}"


def test_the_config_fits_the_notebooks():
    "Stage = notebook = module, in running order, and its parameters are those of the notebook."
    stages = pipeline.read_stages(REPO / "pipeline.yaml")
    names = ["ingest", "preprocess", "features", "tune", "train", "evaluate", "test"]
    assert [s.name for s in stages] == names
    assert [s.notebook.stem[3:] for s in stages] == names
    assert [s.notebook for s in stages] == sorted(s.notebook for s in stages)


@pytest.mark.parametrize(
    "config",
    ["ship.yaml", "finetune.yaml", "bench.yaml", "load.yaml", "records.yaml", "ablations.yaml"],
)
def test_every_config_is_accepted(config, tmp_path):
    "Each notebook is there, each parameter has its value, nothing is stray."
    for name in ("index.csv", "corpus.npy"):  # what the pipeline would have made
        (tmp_path / "data/processed").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/processed" / name).touch()
    done = subprocess.run(
        [
            sys.executable,
            REPO / "run_pipeline.py",
            "--config",
            REPO / config,
            "--root",
            tmp_path,
            "--list",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if config not in ("ship.yaml", "finetune.yaml"):
        return
    kin = [
        yaml.safe_load((REPO / name).read_text())["stages"] for name in ("pipeline.yaml", config)
    ]
    bare = lambda stages: [
        {k: v for k, v in s.items() if k not in ("parameters", "timeout")} for s in stages.values()
    ]
    assert bare(kin[0]) == bare(kin[1]), "the same stages, notebooks, inputs and outputs"


@pytest.mark.parametrize("name", STAGES)
def test_the_parameters_are_what_papermill_sees(name):
    "The runner's reading of a parameters cell is papermill's own; root comes first, empty."
    from papermill import inspect_notebook

    path = REPO / STAGES[name]["notebook"]
    seen = inspect_notebook(str(path))
    quick = pipeline.parameters_of(path)
    assert {k: v["inferred_type_name"].replace(" ", "") for k, v in seen.items()} == {
        k: v.replace(" ", "") for k, v in quick.items()
    }
    assert next(iter(seen)) == "root" and seen["root"]["default"] == '""'
    for parameter in seen.values():
        assert parameter["help"], f"{parameter['name']} has no help"


@pytest.mark.parametrize("command", ["nbdev_export", "nbdev_clean"])
def test_clean_and_export_change_nothing(command, tmp_path):
    "The modules are what the notebooks export, and the notebooks are clean: byte for byte."
    home = tmp_path / "a copy"
    home.mkdir()
    for name in ("pyproject.toml", "README.md", "settings.ini"):
        shutil.copy(REPO / name, home)
    for name in ("nbs", "musicgen"):
        shutil.copytree(
            REPO / name,
            home / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    before = {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    module = dict(nbdev_export="doclinks", nbdev_clean="clean")[command]
    call = [sys.executable, "-B", "-c", f"from nbdev.{module} import {command}; {command}()"]
    done = subprocess.run(call, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    after = {p: content for p, content in after.items() if "__pycache__" not in p.parts}
    changed = sorted(str(p) for p in before.keys() | after if before.get(p) != after.get(p))
    assert not changed, f"{command} changes {', '.join(changed)}: run it and commit what it writes"


def test_playing_imports_no_torch():
    "The dashboard, the API and the shell command import no library of training."
    modules = ["generation.generate", "serve", "dashboard", "cli"]
    heavy = ["torch", "pandas", "papermill", "music21", "verovio"]
    call = (
        f"import sys\nfor module in {modules}: __import__('musicgen.' + module)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", call], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_top_level_stands():
    for name in (
        "nbs",
        "musicgen",
        "pipeline.yaml",
        "run_pipeline.py",
        "dashboards",
        "data",
        "tests",
        "settings.ini",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        ".ci/run",
        "README.md",
        "LICENSE",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LOG.md",
    ):
        assert (REPO / name).exists(), f"{name} is missing"


def test_the_settings_file_holds_the_built_in_values():
    "settings.ini names every setting, with the value that holds without the file."
    import configparser

    from musicgen.core import SETTINGS, Layout, read_settings

    ini = configparser.ConfigParser(interpolation=None)
    ini.read(REPO / "settings.ini")
    assert {s: set(ini[s]) for s in ini.sections()} == {s: set(k) for s, k in SETTINGS.items()}
    assert read_settings(Layout(REPO)).values == SETTINGS


def test_a_stage_runs_without_its_examples(repo, tmp_path):
    "What a run keeps of a notebook names nothing that only an example defines."
    for name, stage in STAGES.items():
        cells = [
            c.source
            for c in pipeline.runnable(repo / stage["notebook"]).cells
            if c.cell_type == "code"
        ]
        (tmp_path / f"{name}.py").write_text("here = display = None\n" + "\n".join(cells))
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    readme = REPO / "README.md"
    text = MAP.sub(lambda m: f"{m[1]}{readme_map()}\n{m[2]}", readme.read_text("utf-8"))
    readme.write_text(text, "utf-8")
