"""The conductor: papermill runs the stage notebooks that `pipeline.yaml` names, in order; doit's
ledger knows which of them are up to date.

A stage depends on its parameters, its input files, the code of its notebook and the code of the
rooms that it imports, directly or not. Prose, comments, docstrings and outputs do not count.
"""
import argparse
import ast
import glob
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from doit.dependency import DatabaseException, Dependency, SqliteDB
from doit.task import Task
from filelock import FileLock, Timeout

from musicgen.core import folder_mark

HERE = Path(__file__).resolve().parent
KEYS = dict(notebook=str, inputs=list, outputs=list, watches=str, parameters=dict, timeout=(int, float))
KINDS = dict(int=int, float=(int, float), str=str, list=list, dict=dict)
ASKED = ("root", "midi")  # parameters that come from the command line


class Refused(Exception):
    "One sentence, before anything has run."


class Failed(Exception):
    "One sentence: how a stage ended."


def check(fine, told: str):
    if not fine: raise Refused(told)


# ---- the score sheet ------------------------------------------------------------------------

@dataclass
class Stage:
    "One stage of `pipeline.yaml`."
    name: str
    notebook: Path
    inputs: list      # paths or patterns, under the root or beside `pipeline.yaml`
    outputs: list     # paths under the root
    parameters: dict
    timeout: float    # seconds, for the whole stage
    watches: str      # an output that maps folders outside the root to their marks; "" = none


def read_stages(config: Path) -> list[Stage]:
    "The stages in running order; whatever can be seen to be wrong without running is refused."
    check(config.is_file(), f"there is no {config}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try: sheet = yaml.load(config.read_text("utf-8"), loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{config.name} is not YAML: {' '.join(str(error).split())}") from None
    entries = sheet["stages"] if isinstance(sheet, dict) and list(sheet) == ["stages"] else None
    check(isinstance(entries, dict), f"{config.name} must hold one mapping, `stages`, and no more")
    return [read_stage(config.parent, str(name), entry) for name, entry in entries.items()]


def read_stage(folder: Path, name: str, entry: dict) -> Stage:
    "One stage, its keys and its parameters checked against its notebook."
    check(isinstance(entry, dict), f"stage {name} must be a mapping of {', '.join(KEYS)}")
    for key, value in entry.items():
        check(key in KEYS, f"stage {name}: unknown key {key!r}; known are {', '.join(KEYS)}")
        check(isinstance(value, KEYS[key]) and not isinstance(value, bool),
              f"stage {name}: {key} is {value!r}, which is of the wrong type")
    for key in ("notebook", "outputs", "timeout"):
        check(entry.get(key), f"stage {name} has no {key}")
    check(entry["timeout"] > 0, f"stage {name}: timeout {entry['timeout']} is not above 0")
    stage = Stage(name, folder / entry["notebook"], entry.get("inputs", []), entry["outputs"],
                  entry.get("parameters", {}), entry["timeout"], entry.get("watches", ""))
    check(not stage.watches or stage.watches in stage.outputs,
          f"stage {name} watches {stage.watches}, which it does not make")
    for path in stage.inputs + stage.outputs:
        check(isinstance(path, str), f"stage {name}: {path!r} is not a path")
    check(stage.notebook.is_file(), f"stage {name}: there is no notebook {entry['notebook']}")
    wanted = parameters_of(stage.notebook)
    check("root" in wanted, f"stage {name}: {stage.notebook.name} has no parameter root")
    for key in wanted:
        check(key in ASKED or key in stage.parameters,
              f"stage {name}: parameter {key} is missing; {stage.notebook.name} asks for it")
    for key, value in stage.parameters.items():
        check(key not in ASKED, f"stage {name}: {key} is given with --{key}, not here")
        check(key in wanted, f"stage {name}: parameter {key} is stray; "
                             f"{stage.notebook.name} asks for {', '.join(wanted)}")
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" * (wanted[key] == "float")
        check(fits(value, wanted[key]),
              f"stage {name}: {key} is {value!r}, where {wanted[key]} is wanted{hint}")
    return stage


def code_cells(notebook: Path) -> list[dict]:
    "The code cells of a notebook, the source of each as one text."
    try: cells = json.loads(notebook.read_text("utf-8"))["cells"]
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{notebook} is not a notebook") from None
    return [c | {"source": "".join(c["source"])} for c in cells if c["cell_type"] == "code"]


def is_parameters(cell: dict) -> bool: return "parameters" in cell["metadata"].get("tags", [])


def parameters_of(notebook: Path) -> dict[str, str]:
    "Name -> type of what the `parameters` cell assigns: papermill's inspection at no cost."
    found = {}
    for cell in filter(is_parameters, code_cells(notebook)):
        for node in ast.parse(cell["source"]).body:
            if isinstance(node, ast.AnnAssign):
                found[node.target.id] = ast.unparse(node.annotation)
            elif isinstance(node, ast.Assign):
                found[node.targets[0].id] = type(ast.literal_eval(node.value)).__name__
    return found


def fits(value, kind: str) -> bool:
    "Whether a value from YAML is of a kind like `int`, `list[float]` or `dict[str, float]`."
    base, _, inner = kind.replace(" ", "").partition("[")
    if isinstance(value, bool): return base == "bool"
    if not isinstance(value, KINDS.get(base, ())): return False
    parts = value.values() if base == "dict" else value if base == "list" else ()
    return not inner or all(fits(v, inner[:-1].split(",", base == "dict")[-1]) for v in parts)


# ---- what a stage is made of ----------------------------------------------------------------

@cache
def understood(source: str) -> tuple[str, frozenset]:
    "What `meaning` and `rooms_in` say of a piece of code, from one walk over it."
    try: tree = ast.parse(source)
    except SyntaxError: return source, frozenset()
    names = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None: node.body = node.body[1:]
        elif isinstance(node, ast.Import): names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["musicgen"] * bool(node.level) + [node.module] * bool(node.module)
            names += [".".join([*start, alias.name]) for alias in node.names]
    rooms = frozenset(n.split(".")[1] for n in names if n.startswith("musicgen."))
    return ast.dump(tree), rooms


def meaning(source: str) -> str:
    "Code without comments, layout and docstrings; what is not plain Python stays as it is."
    return understood(source)[0]


def rooms_in(source: str) -> set[str]:
    "The rooms that code imports: `from musicgen.x import`, `import musicgen.x`, `from .x import`."
    return set(understood(source)[1])


def digest(text: str) -> str: return hashlib.md5(text.encode()).hexdigest()


def midi_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".mid", ".midi"))


class Run:
    "The stages of one sheet over one root."

    def __init__(self, config: Path, root: Path, midi: Path | None):
        self.home, self.root, self.runs = config.parent, root, root / "artifacts/runs"
        self.stages, self.makers = read_stages(config), {}
        for stage in self.stages:
            for name in stage.outputs:
                check(name not in self.makers, f"stage {stage.name} makes {name}, which an earlier "
                                               "stage makes")
                self.makers[name] = stage
        self.remembered = self.runs / ".midi"  # whose files this root was made of
        if not midi and self.remembered.is_file():
            midi = Path(self.remembered.read_text("utf-8"))
        self.midi = midi
        check(not midi or midi.is_dir(), f"there is no folder {midi}")
        check(not midi or midi_files(midi), f"{midi} holds no .mid or .midi file")
        for number, stage in enumerate(self.stages):
            for name in stage.inputs:
                check(name in self.makers or self.files(name),
                      f"stage {stage.name}: no stage makes {name} and there is no such file")
                check(self.makers.get(name) not in self.stages[number:],
                      f"stage {stage.name} reads {name} before it is made")

    def files(self, name: str) -> list[Path]:
        "The files of an input: what a stage makes, else the root's own, else those by the sheet."
        if name in self.makers: return [self.root / name]
        for folder in (self.root, self.home):
            if found := sorted(glob.glob(name, root_dir=folder)): return [folder / f for f in found]
        return []

    def needed(self, names: list[str]) -> list[Stage]:
        "The named stages and all that they stand on, in order; every stage when none is named."
        known, wanted = {stage.name: stage for stage in self.stages}, set()
        for name in names:
            check(name in known, f"there is no stage {name}; the stages are {', '.join(known)}")
        todo = list(names or known)
        while todo:
            wanted.add(name := todo.pop())
            todo += [self.makers[i].name for i in known[name].inputs if i in self.makers]
        return [stage for stage in self.stages if stage.name in wanted]

    def recipe(self, stage: Stage) -> dict[str, str]:
        "What a stage is made of, besides its input files: name -> value or digest."
        cells = [c["source"] for c in code_cells(stage.notebook) if not is_parameters(c)]
        made_of = {f"parameter {key}": json.dumps(v) for key, v in stage.parameters.items()}
        made_of[f"notebook {stage.notebook.name}"] = digest("\n".join(map(meaning, cells)))
        if self.midi and "midi" in parameters_of(stage.notebook):
            stats = [(str(p), p.stat()) for p in midi_files(self.midi)]
            made_of[f"folder {self.midi}"] = digest(
                repr([(p, s.st_size, s.st_mtime_ns) for p, s in stats]))
        todo = set().union(*map(rooms_in, cells))
        while todo:
            room = todo.pop()
            file = self.home / f"musicgen/{room}.py"
            if not file.is_file(): file = HERE / f"musicgen/{room}.py"
            if f"room {room}" in made_of or not file.is_file(): continue
            source = file.read_text("utf-8")
            made_of[f"room {room}"] = digest(meaning(source))
            todo |= rooms_in(source)
        return made_of

    def page(self, stage: Stage, ending: str = ".ipynb") -> Path:
        return self.runs / f"{stage.notebook.stem}{ending}"

    def task(self, stage: Stage) -> Task:
        "The stage as doit sees it. Its page is a target, so a stage killed half-way is never done."
        made_of = self.recipe(stage)
        inputs = [str(f) for name in stage.inputs for f in self.files(name)]
        targets = [str(self.root / name) for name in stage.outputs] + [str(self.page(stage))]
        task = Task(stage.name, None, inputs, targets,
                    uptodate=[lambda task, values: values == made_of])
        task.values = made_of
        return task

    @contextmanager
    def ledger(self):
        "doit's record of what is done, written when the block ends."
        file = self.runs / ".doit.db"
        try: book = Dependency(SqliteDB, str(file))
        except DatabaseException:  # damaged: then nothing is known to be done
            file.unlink()
            book = Dependency(SqliteDB, str(file))
        try: yield book
        finally: book.close()

    def stale(self, stage: Stage) -> str:
        "Why the stage must run, in a few words; empty when it is up to date."
        task = self.task(stage)
        gone = [Path(file).name for file in sorted(task.file_dep) if not os.path.exists(file)]
        with self.ledger() as book:
            before, now = book.get_values(stage.name), task.values
            if not before: return "not done yet"
            if gone: return f"{gone[0]} is missing"
            status = book.get_status(task, None, get_log=True)
        if status.status == "up-to-date": return self.moved(stage)
        changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        changed += [Path(file).name for reason, files in status.reasons.items()
                    if reason.endswith("file_dep") for file in files]
        if changed: return f"{changed[0]} changed"
        return f"{Path(status.reasons['missing_target'][0]).name} is missing"

    def moved(self, stage: Stage) -> str:
        "Which of the folders that a stage read has changed since; empty when none has."
        if not stage.watches: return ""
        marks = json.loads((self.root / stage.watches).read_text("utf-8"))
        changed = (folder for folder, mark in marks.items() if folder_mark(folder) != mark)
        return next((f"{folder} changed" for folder in changed), "")

    # ---- running ----------------------------------------------------------------------------

    def perform(self, stage: Stage):
        "Run one stage: its page becomes `NN_stage.ipynb`, or `NN_stage.failed.ipynb`."
        os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this Python, not another's
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see 19_model: torch must not spin
        import papermill  # takes seconds: only when something runs
        page, running, failed, log = pages = [
            self.page(stage, f"{e}") for e in (".ipynb", ".running.ipynb", ".failed.ipynb", ".log")]
        for path in pages: path.unlink(missing_ok=True)
        task, window, deadline = self.task(stage), Window(), time.monotonic() + stage.timeout
        with self.ledger() as book: book.remove_success(task)
        given = stage.parameters | {"root": str(self.root)}
        if "midi" in parameters_of(stage.notebook): given["midi"] = str(self.midi or "")
        before = written(task)
        try:
            with kernel_log(log):
                papermill.execute_notebook(
                    job(stage.notebook), braced(running), given, kernel_name="python3",
                    cwd=str(self.home), progress_bar=False, iopub_timeout=60, stdout_file=window,
                    on_cell_start=window.at_cell,
                    timeout_func=lambda cell: max(0.1, deadline - time.monotonic()))
            for name in stage.outputs:
                if not (self.root / name).is_file(): raise Failed(f"it ended without making {name}")
            if written(task) != before: raise Failed("an input file changed while it ran")
            os.replace(running, page)
            log.unlink()
        except Exception as error:
            raise Failed(f"{stage.name} failed: {sentence(error, stage)}\n"
                         f"  its page: {failed}") from error
        finally:
            if running.exists(): os.replace(running, failed)
        with self.ledger() as book: book.save_success(task)

    def go(self, stages: list[Stage]):
        "Run what is stale, in order, and say so."
        told = self.remembered.read_text("utf-8") if self.remembered.is_file() else ""
        if self.midi and told != str(self.midi): self.remembered.write_text(str(self.midi), "utf-8")
        ran, began = 0, time.monotonic()
        for number, stage in enumerate(stages, 1):
            head, start = f"[{number}/{len(stages)}] {stage.name}", time.monotonic()
            why = self.stale(stage)
            print(f"{head}: {why or 'up to date'}", flush=True)
            if not why: continue
            self.perform(stage)
            print(f"{head}: done in {time.monotonic() - start:.1f} s", flush=True)
            ran += 1
        print(f"{ran} of {len(stages)} stages ran in {time.monotonic() - began:.0f} s" if ran
              else "nothing to do: every stage is up to date")

    def listing(self) -> str:
        "The stages, their state and their notebooks, as a table."
        stale, rows = {}, [("stage", "state", "notebook")]
        for stage in self.stages:
            below = [self.makers[i].name for i in stage.inputs if i in self.makers]
            why = self.stale(stage) or next((f"{n} is stale" for n in below if stale[n]), "")
            stale[stage.name] = why
            rows.append((stage.name, f"stale: {why}" if why else "up to date", stage.notebook.name))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def closing(self) -> str:
        "What there is now, and what to do with it."
        made = dict(model="artifacts/models/music_lstm.pt", report="artifacts/reports/index.html",
                    music="artifacts/reports/samples", pages="artifacts/runs")
        lines = [f"{word + ':':11}{self.root / path}" for word, path in made.items()
                 if (self.root / path).exists()]
        here = "" if self.root == HERE else f"MUSICGEN_ROOT={str(self.root)!r} "
        return "\n".join([*lines, f"dashboard: {here}make play",
                          f"shell:     {here}.venv/bin/musicgen generate "
                          '--instruments "Violin,Cello" --bars 16 --seed 7 -o out.mid'])


def job(notebook: Path):
    """The notebook as it runs: its title, the cells that define things, and all from the heading
    before its parameters on. A run neither waits for the lessons nor fails by them."""
    import nbformat
    book = nbformat.read(notebook, 4)
    run = next(k for k, cell in enumerate(book.cells) if is_parameters(cell))
    prose = [k for k, cell in enumerate(book.cells) if cell["cell_type"] == "markdown" and k < run]
    kept = {*prose[:1], *prose[-1:]}
    book.cells = [c for k, c in enumerate(book.cells) if k >= run or k in kept or defines(c)]
    return book


def defines(cell) -> bool:
    "Whether a cell is exported, or does nothing but import and define."
    if cell["cell_type"] != "code": return False
    if any(line.startswith("#| export") for line in cell["source"].splitlines()): return True
    try: body = ast.parse(cell["source"]).body
    except SyntaxError: return False
    return all(isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for n in body)


class Window:
    "The terminal as a running notebook sees it: its Run cells print there, its definitions do not."

    def __init__(self): self.open = False

    def at_cell(self, cell, cell_index):
        self.open |= "injected-parameters" in cell.metadata.get("tags", [])

    def write(self, text: str):
        if self.open: sys.stdout.write(text)

    def flush(self): sys.stdout.flush()


@contextmanager
def kernel_log(path: Path):
    "What the kernel's process says outside its notebook (a crash, its shutdown) goes to a file."
    terminal = os.dup(2)
    with open(path, "wb") as log: os.dup2(log.fileno(), 2)
    try: yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def written(task: Task) -> dict[str, int]:
    return {file: os.stat(file).st_mtime_ns for file in task.file_dep}


def braced(path: Path) -> str:
    "A path as papermill wants it, which fills in what stands in braces."
    return str(path).replace("{", "{{").replace("}", "}}")


def sentence(error: Exception, stage: Stage) -> str:
    "What went wrong, on one line. A refusal is a sentence already; other errors keep their name."
    kind = type(error).__name__
    if kind == "CellTimeoutError": return f"it ran past its time-out of {stage.timeout:g} s"
    if kind == "DeadKernelError": return "its kernel died (killed, or out of memory)"
    if kind == "Failed": return str(error)
    name, text = getattr(error, "ename", kind), str(getattr(error, "evalue", error)).strip()
    last = text.splitlines()[-1] if text else "no message"
    return f"{name}: {last}" if name.endswith(("Error", "Exception", "Exit", "Interrupt")) else last


def stop(number, frame): raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the pipeline: every stage, or the named ones "
                                                 "and whatever stale stages they stand on.")
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help="a stage of the sheet")
    add("--config", type=Path, metavar="FILE", default=HERE / "pipeline.yaml", help="the sheet")
    add("--root", type=Path, metavar="DIR", help="where data/ and artifacts/ go (default: here)")
    add("--midi", type=Path, metavar="FOLDER", help="train on your own MIDI files; needs --root")
    add("--list", action="store_true", help="say what is stale, and why; run nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    config = args.config.expanduser().resolve()
    root = args.root.expanduser().resolve() if args.root else config.parent
    try:
        check(args.root or not args.midi, "--midi needs --root: your files get their own folder")
        run = Run(config, root, args.midi and args.midi.expanduser().resolve())
        stages = run.needed(args.stages)
        run.runs.mkdir(parents=True, exist_ok=True)
        if args.list: print(run.listing()); return 0
        with FileLock(run.runs / ".lock", timeout=0): run.go(stages)
        print(run.closing())
        return 0
    except Timeout: told, status = f"another run is at work in {root}", 2
    except Refused as refusal: told, status = str(refusal), 2
    except Failed as failure: told, status = str(failure), 1
    except KeyboardInterrupt: told, status = "stopped", 130
    print(f"run_pipeline.py: {told}", file=sys.stderr)
    return status


if __name__ == "__main__": sys.exit(main())
