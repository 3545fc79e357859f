"""The pipeline runner on a pipeline of three tiny notebooks: order, staleness, failures."""

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
from musicgen.tiny import twice
here = Path(root)
(here / "out/second.txt").write_text(str(twice((here / "out/first.txt").read_text())))"""
THIRD = """from pathlib import Path
here = Path(root)
(here / "out/third.txt").write_text((here / "data/words.txt").read_text())
(here / "out/page.txt").write_text((here / "out/second.txt").read_text())"""


def notebook(path, parameters, run, prose="What this stage does."):
    "Writes a notebook: prose, an example that prints, the parameters, the run."

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
        code("print('an example')"),
        code(parameters, tags=["parameters"]),
        code(run),
    ]
    kernel = dict(name="python3", display_name="python3", language="python")
    book = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(book))


class TinyPipeline:
    "A pipeline of three stages in a folder, and methods that change and run it."

    def __init__(self, folder, repo):
        self.folder, self.repo = folder, repo
        for name in ("nbs", "data", "musicgen"):
            (folder / name).mkdir(parents=True)
        (folder / "data/numbers.txt").write_text("1 2 3")
        (folder / "data/words.txt").write_text("la la")
        self.module("__init__", "")
        self.module("tiny", "from .deep import two\ndef twice(text): return two() * int(text)\n")
        self.module("deep", "def two():\n    'Two.'\n    return 2\n")
        self.module("aside", "def unused(): return 0\n")
        self.write_stage("01_first", FIRST, 'root:str = ""\nmidi:str = ""\ntimes:int = 1  # factor')
        self.write_stage("02_second", SECOND)
        self.write_stage("03_third", THIRD)
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

    def module(self, name, source):
        (self.folder / f"musicgen/{name}.py").write_text(source)

    def write_stage(self, name, run, parameters='root:str = ""', **more):
        notebook(self.folder / f"nbs/{name}.ipynb", parameters, run, **more)

    def command(self, *arguments):
        config = self.folder / "pipeline.yaml"
        config.write_text(yaml.safe_dump(dict(stages=self.stages), sort_keys=False))
        return [
            sys.executable,
            str(self.repo / "run_pipeline.py"),
            "--config",
            str(config),
            *arguments,
        ]

    def start(self, *arguments):
        return subprocess.Popen(
            self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments, status=0):
        "The output of the pipeline runner; its exit status must be the one given."
        process = self.start(*arguments)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == status, output
        assert "Traceback" not in output
        return output

    def stages_run(self, *arguments):
        "The names of the stages that the pipeline runner has run."
        return re.findall(r"\] (\w+): done", self.run(*arguments))

    def rejection(self, *arguments):
        "The sentence of a run that is rejected before any stage runs."
        output = self.run(*arguments, status=2)
        assert output.count("\n") == 1 and output.startswith("run_pipeline.py: "), output
        return output.removeprefix("run_pipeline.py: ").strip()

    def report(self, name):
        return self.folder / f"artifacts/runs/{name}.ipynb"


@pytest.fixture
def pipeline(tmp_path, repo):
    return TinyPipeline(tmp_path / "a {tiny} pipeline", repo)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, repo):
    "A pipeline that has run once, for the tests of staleness; `output` is that of its run."
    pipeline = TinyPipeline(tmp_path_factory.mktemp("finished") / "my pipeline", repo)
    pipeline.output = pipeline.run()
    return pipeline


def test_runs_in_order_and_shows_its_progress(finished):
    assert re.findall(r"\] (\w+): done in", finished.output) == ["first", "second", "third"]
    assert "first: 1/1, 0 s left" in finished.output and "an example" not in finished.output
    assert (finished.folder / "out/page.txt").read_text() == "24"
    page = json.loads(finished.report("01_first").read_text())
    assert "times = 2" in "".join("".join(c["source"]) for c in page["cells"])
    assert sorted(p.name for p in finished.report("").parent.glob("*.ipynb")) == [
        "01_first.ipynb",
        "02_second.ipynb",
        "03_third.ipynb",
    ]


IMPORTED = """import sys
from pathlib import Path
from musicgen.pipeline import main
status = main(home=Path(sys.argv.pop(1)))
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(status)"""


def test_a_run_without_work_runs_nothing_and_does_not_import_papermill(finished):
    finished.run()
    output = finished.run()
    assert "nothing to do" in output and output.count("up to date") == 4
    assert "stale" not in finished.run("--list")
    python, _, *arguments = finished.command()
    command = [python, "-c", IMPORTED, str(finished.repo), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and "nothing to do" in process.stdout, process.stderr
    modules = set(process.stderr.splitlines()[-1].split())
    assert "musicgen" in modules
    assert not modules & {"papermill", "nbclient", "jupyter_client", "torch"}


def test_a_stage_reruns_when_its_inputs_parameters_or_code_change(finished):
    finished.stages_run()
    finished.stages["first"]["parameters"]["times"] = 3
    assert "stale: parameter times changed" in finished.run("--list")
    assert finished.stages_run() == ["first", "second", "third"]
    (finished.folder / "data/numbers.txt").write_text("3 2 1")  # another file, the same output
    assert finished.stages_run() == ["first"]
    (finished.folder / "data/words.txt").write_text("lo lo")
    assert finished.stages_run() == ["third"]
    (finished.folder / "data/wide.txt").write_text("a file more")
    assert finished.stages_run() == ["third"]
    finished.module(
        "deep", "def two():\n    return 1 + 1\n"
    )  # imported by a module that the stage imports
    assert "stale: module musicgen.deep changed" in finished.run("--list")
    assert finished.stages_run("second") == ["second"]
    finished.write_stage("03_third", THIRD + "\nprint(3)")
    assert finished.stages_run() == ["third"]
    (finished.folder / "out/third.txt").unlink()
    assert finished.stages_run() == ["third"]


def test_prose_comments_and_outputs_do_not_make_a_stage_stale(finished):
    finished.stages_run()
    deep = (finished.folder / "musicgen/deep.py").read_text()
    finished.module("deep", deep.replace("two():", "two():  # a comment\n    'Prose.'"))
    finished.module("aside", "def unused(): return 1\n")
    page = json.loads((finished.folder / "nbs/02_second.ipynb").read_text())
    page["cells"][0]["source"] = "Other prose."
    page["cells"][1]["outputs"] = [dict(output_type="stream", name="stdout", text="an example")]
    (finished.folder / "nbs/02_second.ipynb").write_text(json.dumps(page))
    assert finished.stages_run() == []


def test_a_folder_that_a_stage_has_read_is_watched(pipeline, tmp_path):
    "A stage may list folders outside the root and their digests: it is stale when one has changed."
    from musicgen.core import folder_digest

    folder, marks = tmp_path / "my music", pipeline.folder / "data/marks.json"
    folder.mkdir()
    (folder / "a.mid").write_bytes(b"1")
    pipeline.write_stage(
        "01_first",
        FIRST + "\n(here / 'out/marks.json').write_text(Path('data/marks.json').read_text())",
        'root:str = ""\nmidi:str = ""\ntimes:int = 1',
    )
    pipeline.stages["first"]["outputs"].append("out/marks.json")
    pipeline.stages["first"]["watches"] = "out/marks.json"
    for change in (
        lambda: None,
        lambda: (folder / "b.mid").write_bytes(b"2"),
        lambda: (folder / "b.mid").unlink(),
    ):
        change()
        assert f"stale: {folder} changed" in pipeline.run("--list") or not marks.exists()
        marks.write_text(json.dumps({str(folder): folder_digest(folder)}))
        assert "first" in pipeline.stages_run() and pipeline.stages_run() == []
    pipeline.stages["first"]["watches"] = "out/third.txt"
    assert "which it does not make" in pipeline.rejection()


def test_a_named_stage_runs_with_the_stages_that_it_needs(pipeline):
    assert pipeline.stages_run("second") == ["first", "second"]
    assert pipeline.stages_run("first") == []


def test_another_root_and_a_folder_of_midi_files(pipeline, tmp_path):
    songs = tmp_path / "my songs"
    songs.mkdir()
    assert "--midi needs --root" in pipeline.rejection("--midi", str(songs))
    root = tmp_path / "my root"
    assert "holds no .mid" in pipeline.rejection("--midi", str(songs), "--root", str(root))
    for name in "abc":
        (songs / f"{name}.mid").write_bytes(b"MThd")
    assert pipeline.stages_run("first", "--midi", str(songs), "--root", str(root)) == ["first"]
    assert (root / "out/first.txt").read_text() == "15"
    assert not (pipeline.folder / "out").exists()
    assert pipeline.stages_run("first", "--root", str(root)) == []  # a root remembers its files
    (songs / "d.mid").write_bytes(b"MThd")
    (pipeline.folder / "data/numbers.txt").write_text("1 1")
    assert pipeline.stages_run("first", "--root", str(root)) == ["first"]
    assert (root / "out/first.txt").read_text() == "8"


@pytest.mark.parametrize(
    "stage, key, value, message",
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
def test_a_wrong_config_is_rejected_before_anything_runs(pipeline, stage, key, value, message):
    pipeline.stages[stage][key] = value
    assert message in pipeline.rejection()
    assert not pipeline.report("01_first").exists()


def test_other_rejections(pipeline):
    sentence = pipeline.rejection("fourth")
    assert "there is no stage fourth; the stages are first, second, third" in sentence
    del pipeline.stages["second"]["timeout"]
    assert "stage second has no timeout" in pipeline.rejection()
    command = pipeline.command()
    (pipeline.folder / "pipeline.yaml").write_text("stages: [first: {")
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "is not YAML" in process.stderr


def test_failures_are_reported_and_the_next_run_continues(pipeline):
    "A rejection, a missing output, a dead kernel, a time-out; then the stage runs and succeeds."
    reject = "class Rejection(ValueError): pass\nraise Rejection('three files are too few')"
    pipeline.write_stage("02_second", reject)
    output = pipeline.run(status=1)
    assert "second failed: three files are too few\n" in output and "third" not in output
    assert (
        pipeline.report("02_second.failed").exists() and not pipeline.report("02_second").exists()
    )
    pipeline.write_stage("02_second", "1 / 0")
    assert "ZeroDivisionError: division by zero" in pipeline.run(status=1)
    pipeline.write_stage("02_second", "pass")
    assert "without making out/second.txt" in pipeline.run(status=1)
    pipeline.write_stage("02_second", "import os; os._exit(1)")
    assert "its kernel died" in pipeline.run(status=1)
    pipeline.write_stage("02_second", "import time; time.sleep(60)")
    pipeline.stages["second"]["timeout"] = 4
    assert "ran past its time-out of 4 s" in pipeline.run(status=1)
    pipeline.write_stage("02_second", SECOND)
    pipeline.stages["second"]["timeout"] = 60
    assert pipeline.stages_run() == ["second", "third"]
    assert not list(pipeline.report("").parent.glob("*.failed.ipynb"))


def wait_for(path, seconds=60):
    "Waits until a file exists."
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.1)


def has_ended(pid):
    "Whether a process has ended; a zombie has."
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_run(pipeline):
    """SIGTERM and SIGKILL leave no kernel, no lock and no finished stage. A second run at the
    same time is rejected."""
    slow = "import os, time\n(here / 'out/pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    pipeline.write_stage("02_second", SECOND + "\n" + slow)
    pid = pipeline.folder / "out/pid"
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = pipeline.start()
        wait_for(pid)
        assert "another run is at work" in pipeline.rejection()
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode not in (0, None)
        kernel = int(pid.read_text())
        end = time.monotonic() + 20
        while not has_ended(kernel) and time.monotonic() < end:
            time.sleep(0.2)
        assert has_ended(kernel), "the kernel outlived the pipeline runner"
        assert not pipeline.report("02_second").exists()
        pid.unlink()
    pipeline.write_stage("02_second", SECOND)
    assert pipeline.stages_run() == ["second", "third"]
    assert [p.name for p in pipeline.report("").parent.glob("02*")] == ["02_second.ipynb"]


def test_with_a_damaged_record_every_stage_runs(pipeline):
    assert pipeline.stages_run("first") == ["first"]
    (pipeline.folder / "artifacts/runs/.doit.db").write_bytes(os.urandom(4096))
    assert pipeline.stages_run("first") == ["first"]
