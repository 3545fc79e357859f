"""The pipeline runner on a made-up pipeline of three tiny notebooks: order, staleness, bad ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

FIRST = """from pathlib import Path
here = Path(root)
here.joinpath("out").mkdir(exist_ok=True)
words = sorted(p.stem for p in Path(midi).glob("*.mid")) if midi else []
data = here if (here / "data").is_dir() else Path.cwd()
total = sum(map(int, (data / "data/numbers.txt").read_text().split())) * times + len(words)
(here / "out/first.txt").write_text(str(total))
print("first: 1/1, 0 s left")"""
SECOND = """from pathlib import Path
from musicgen.little import twice
here = Path(root)
(here / "out/second.txt").write_text(str(twice((here / "out/first.txt").read_text())))"""
THIRD = """from pathlib import Path
here = Path(root)
(here / "out/third.txt").write_text((here / "data/words.txt").read_text())
(here / "out/page.txt").write_text((here / "out/second.txt").read_text())"""


def notebook(path, parameters, run, prose="What this stage does."):
    "Write a notebook: prose, a lesson that prints, the parameters, the run."

    def code(source, **metadata):
        return dict(
            cell_type="code",
            id=f"c{len(source)}",
            source=source,
            metadata=metadata,
            outputs=[],
            execution_count=None,
        )

    cells = [
        dict(cell_type="markdown", id="prose", source=prose, metadata={}),
        code("print('a lesson')"),
        code(parameters, tags=["parameters"]),
        code(run),
    ]
    kernel = dict(name="python3", display_name="python3", language="python")
    whole = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(whole))


class Little:
    "A pipeline of three stages in a folder, and what it takes to run it."

    def __init__(self, folder, repo):
        self.folder, self.repo = folder, repo
        for name in ("nbs", "data", "musicgen"):
            (folder / name).mkdir(parents=True)
        (folder / "data/numbers.txt").write_text("1 2 3")
        (folder / "data/words.txt").write_text("la la")
        self.room("little", "from .deep import two\ndef twice(text): return two() * int(text)\n")
        self.room("deep", "def two():\n    'Two.'\n    return 2\n")
        self.room("aside", "def unused(): return 0\n")
        self.write("01_first", FIRST, 'root:str = ""\nmidi:str = ""\ntimes:int = 1  # factor')
        self.write("02_second", SECOND)
        self.write("03_third", THIRD)
        self.stages = dict(
            first=dict(
                notebook="nbs/01_first.ipynb",
                inputs=["data/numbers.txt"],
                outputs=["out/first.txt"],
                parameters=dict(times=2),
                timeout=60,
            ),
            second=dict(
                notebook="nbs/02_second.ipynb",
                inputs=["out/first.txt"],
                outputs=["out/second.txt"],
                timeout=60,
            ),
            third=dict(
                notebook="nbs/03_third.ipynb",
                inputs=["out/second.txt", "data/w*.txt"],
                outputs=["out/third.txt", "out/page.txt"],
                timeout=60,
            ),
        )

    def room(self, name, source):
        (self.folder / f"musicgen/{name}.py").write_text(source)

    def write(self, name, run, parameters='root:str = ""', **more):
        notebook(self.folder / f"nbs/{name}.ipynb", parameters, run, **more)

    def command(self, *words):
        sheet = self.folder / "pipeline.yaml"
        sheet.write_text(yaml.safe_dump(dict(stages=self.stages), sort_keys=False))
        return [sys.executable, str(self.repo / "run_pipeline.py"), "--config", str(sheet), *words]

    def start(self, *words):
        return subprocess.Popen(
            self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *words, status=0):
        "What the pipeline runner says; its exit status must be the one given."
        process = self.start(*words)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == status, said
        assert "Traceback" not in said
        return said

    def ran(self, *words):
        "The names of the stages that a run of the pipeline runner ran."
        return re.findall(r"\] (\w+): done", self.run(*words))

    def refusal(self, *words):
        "The one sentence of a run that is refused; nothing has run."
        said = self.run(*words, status=2)
        assert said.count("\n") == 1 and said.startswith("run_pipeline.py: "), said
        return said.removeprefix("run_pipeline.py: ").strip()

    def report(self, name):
        return self.folder / f"artifacts/runs/{name}.ipynb"


@pytest.fixture
def little(tmp_path, repo):
    return Little(tmp_path / "a {little} road", repo)


@pytest.fixture(scope="module")
def done(tmp_path_factory, repo):
    "A pipeline that has run once, for the tests that look at what makes it stale."
    little = Little(tmp_path_factory.mktemp("done") / "it is done", repo)
    little.said = little.run()
    return little


def test_runs_in_order_and_shows_its_progress(done):
    assert re.findall(r"\] (\w+): done in", done.said) == ["first", "second", "third"]
    assert "first: 1/1, 0 s left" in done.said and "a lesson" not in done.said
    assert (done.folder / "out/page.txt").read_text() == "24"
    page = json.loads(done.report("01_first").read_text())
    assert "times = 2" in "".join("".join(c["source"]) for c in page["cells"])
    assert sorted(p.name for p in done.report("").parent.glob("*.ipynb")) == [
        "01_first.ipynb",
        "02_second.ipynb",
        "03_third.ipynb",
    ]


def test_nothing_to_do_runs_nothing_and_is_quick(done):
    done.ran()
    start = time.monotonic()
    said = done.run()
    assert "nothing to do" in said and said.count("up to date") == 4
    assert time.monotonic() - start < 5, "a run without work must not load papermill"
    assert "stale" not in done.run("--list")


def test_a_stage_reruns_when_what_it_is_made_of_changes(done):
    done.ran()
    done.stages["first"]["parameters"]["times"] = 3
    assert "stale: parameter times changed" in done.run("--list")
    assert done.ran() == ["first", "second", "third"]
    (done.folder / "data/numbers.txt").write_text("3 2 1")  # another file, the same outcome
    assert done.ran() == ["first"]
    (done.folder / "data/words.txt").write_text("lo lo")
    assert done.ran() == ["third"]
    (done.folder / "data/wide.txt").write_text("a file more")
    assert done.ran() == ["third"]
    done.room("deep", "def two():\n    return 1 + 1\n")  # two rooms below the stage
    assert "stale: module musicgen.deep changed" in done.run("--list")
    assert done.ran("second") == ["second"]
    done.write("03_third", THIRD + "\nprint(3)")
    assert done.ran() == ["third"]
    (done.folder / "out/third.txt").unlink()
    assert done.ran() == ["third"]


def test_prose_comments_and_outputs_do_not_count(done):
    done.ran()
    deep = (done.folder / "musicgen/deep.py").read_text()
    done.room("deep", deep.replace("two():", "two():  # a comment\n    'Prose.'"))
    done.room("aside", "def unused(): return 1\n")
    page = json.loads((done.folder / "nbs/02_second.ipynb").read_text())
    page["cells"][0]["source"] = "Other prose."
    page["cells"][1]["outputs"] = [dict(output_type="stream", name="stdout", text="a lesson")]
    (done.folder / "nbs/02_second.ipynb").write_text(json.dumps(page))
    assert done.ran() == []


def test_a_folder_that_a_stage_read_is_watched(little, tmp_path):
    "A stage may name folders outside the root, with their marks: it is stale when one has changed."
    from musicgen.core import folder_digest

    folder, marks = tmp_path / "my music", little.folder / "data/marks.json"
    folder.mkdir()
    (folder / "a.mid").write_bytes(b"1")
    little.write(
        "01_first",
        FIRST + "\n(here / 'out/marks.json').write_text(Path('data/marks.json').read_text())",
        'root:str = ""\nmidi:str = ""\ntimes:int = 1',
    )
    little.stages["first"]["outputs"].append("out/marks.json")
    little.stages["first"]["watches"] = "out/marks.json"
    for change in (
        lambda: None,
        lambda: (folder / "b.mid").write_bytes(b"2"),
        lambda: (folder / "b.mid").unlink(),
    ):
        change()
        assert f"stale: {folder} changed" in little.run("--list") or not marks.exists()
        marks.write_text(json.dumps({str(folder): folder_digest(folder)}))
        assert "first" in little.ran() and little.ran() == []
    little.stages["first"]["watches"] = "out/third.txt"
    assert "which it does not make" in little.refusal()


def test_a_named_stage_runs_with_what_it_needs_and_no_more(little):
    assert little.ran("second") == ["first", "second"]
    assert little.ran("first") == []


def test_another_root_and_own_files(little, tmp_path):
    songs = tmp_path / "my songs"
    songs.mkdir()
    assert "--midi needs --root" in little.refusal("--midi", str(songs))
    root = tmp_path / "my root"
    assert "holds no .mid" in little.refusal("--midi", str(songs), "--root", str(root))
    for name in "abc":
        (songs / f"{name}.mid").write_bytes(b"MThd")
    assert little.ran("first", "--midi", str(songs), "--root", str(root)) == ["first"]
    assert (root / "out/first.txt").read_text() == "15"
    assert not (little.folder / "out").exists()
    assert little.ran("first", "--root", str(root)) == []  # a root remembers its files
    (songs / "d.mid").write_bytes(b"MThd")
    (little.folder / "data/numbers.txt").write_text("1 1")
    assert little.ran("first", "--root", str(root)) == ["first"]
    assert (root / "out/first.txt").read_text() == "8"


@pytest.mark.parametrize(
    "where, key, value, told",
    [
        ("first", "parameters", dict(times=2, tines=3), "parameter tines is stray"),
        ("first", "parameters", {}, "parameter times is missing"),
        ("first", "parameters", dict(times="2"), "times is '2', where int is wanted"),
        ("first", "parameters", dict(times=True), "times is True, where int is wanted"),
        ("first", "parameters", dict(times=2, root="x"), "root is given with --root"),
        ("second", "inputs", ["data/nobody.txt"], "no stage makes data/nobody.txt"),
        ("second", "inputs", ["out/third.txt"], "reads out/third.txt before it is made"),
        ("second", "outputs", ["out/first.txt"], "which an earlier stage makes"),
        ("second", "notebook", "nbs/09_none.ipynb", "there is no notebook nbs/09_none.ipynb"),
        ("second", "timeout", None, "timeout"),
        ("second", "timeout", -1, "not above 0"),
        ("second", "speed", 3, "unknown key 'speed'"),
    ],
)
def test_a_wrong_sheet_is_refused_before_anything_runs(little, where, key, value, told):
    little.stages[where][key] = value
    assert told in little.refusal()
    assert not little.report("01_first").exists()


def test_other_refusals(little):
    told = little.refusal("fourth")
    assert "there is no stage fourth; the stages are first, second, third" in told
    del little.stages["second"]["timeout"]
    assert "stage second has no timeout" in little.refusal()
    command = little.command()
    (little.folder / "pipeline.yaml").write_text("stages: [first: {")
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 2 and "is not YAML" in told.stderr and told.stderr.count("\n") == 1


def test_bad_ends_are_told_kept_apart_and_mended(little):
    "A refusal, no output, a dead kernel, a time-out: each fails, and the next run goes on there."
    refuse = "class Rejection(ValueError): pass\nraise Rejection('three files are too few')"
    little.write("02_second", refuse)
    said = little.run(status=1)
    assert "second failed: three files are too few\n" in said and "third" not in said
    assert little.report("02_second.failed").exists() and not little.report("02_second").exists()
    little.write("02_second", "1 / 0")
    assert "ZeroDivisionError: division by zero" in little.run(status=1)
    little.write("02_second", "pass")
    assert "without making out/second.txt" in little.run(status=1)
    little.write("02_second", "import os; os._exit(1)")
    assert "its kernel died" in little.run(status=1)
    little.write("02_second", "import time; time.sleep(60)")
    little.stages["second"]["timeout"] = 4
    assert "ran past its time-out of 4 s" in little.run(status=1)
    little.write("02_second", SECOND)
    little.stages["second"]["timeout"] = 60
    assert little.ran() == ["second", "third"]
    assert not list(little.report("").parent.glob("*.failed.ipynb"))


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.1)


def gone(pid):
    "Whether a process has ended (a zombie has)."
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_killed_in_the_middle(little):
    "SIGTERM and kill -9 leave no kernel, no lock, nothing that looks done; two runs exclude."
    slow = "import os, time\n(here / 'out/pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    little.write("02_second", SECOND + "\n" + slow)
    pid = little.folder / "out/pid"
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = little.start()
        wait_for(pid)
        assert "another run is at work" in little.refusal()
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode not in (0, None)
        kernel = int(pid.read_text())
        end = time.monotonic() + 20
        while not gone(kernel) and time.monotonic() < end:
            time.sleep(0.2)
        assert gone(kernel), "the kernel outlived the pipeline runner"
        assert not little.report("02_second").exists()
        pid.unlink()
    little.write("02_second", SECOND)
    assert little.ran() == ["second", "third"]
    assert [p.name for p in little.report("").parent.glob("02*")] == ["02_second.ipynb"]


def test_a_damaged_ledger_means_that_nothing_is_known(little):
    assert little.ran("first") == ["first"]
    (little.folder / "artifacts/runs/.doit.db").write_bytes(os.urandom(4096))
    assert little.ran("first") == ["first"]
