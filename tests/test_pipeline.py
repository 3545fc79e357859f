"""The whole pipeline on a small corpus of MIDI files, in a root with a space in its name."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from musicgen.core import Layout
from musicgen.generation.generate import generate
from musicgen.generation.loader import open_model
from musicgen.generation.request import Request
from musicgen.music.midi import read_midi, write_midi
from musicgen.music.score import Part, make_score

SMALL = dict(
    ingest=dict(workers=1),
    preprocess=dict(workers=1),
    tune=dict(
        learning_rates="0.004", batches="4,8", lengths="16", notes=400, judged=200, hidden=16
    ),
    train=dict(notes=1500, rounds=2, hidden=24, head=16),
    evaluate=dict(samples=2, bars=2, requests=2),
    test=dict(
        samples=2,
        bars=2,
        gates=dict(
            parts_exact=1.0, bars_exact=1.0, tempo_exact=1.0, metre_exact=1.0, lint_free=1.0
        ),
    ),
)


def song(seed: int, bars: int = 8):
    "A random melody in small steps, over a random bass."
    random = np.random.default_rng(seed)
    scale = np.array([0, 2, 4, 5, 7, 9, 11])
    steps = 21 + np.cumsum(random.integers(-2, 3, bars * 4))
    notes = [
        (k * 480, 0, int(24 + scale[s % 7] + 12 * (s // 7)), 480, 80 + 10 * (k % 4 == 0))
        for k, s in enumerate(steps)
    ]
    notes += [(b * 1920, 1, int(36 + random.choice(scale)), 1920, 70) for b in range(bars)]
    parts = Part(0, "Right"), Part(32, "Bass")
    return make_score(notes, parts, bpm=int(random.integers(70, 140)))


class Project(NamedTuple):
    "A small corpus, its config, and the roots of two independent runs."

    repo: Path
    config: Path
    songs: Path
    root: Path
    second_root: Path

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    def run(self, *arguments, config: Path | None = None, root: Path | None = None):
        "The finished process of the pipeline runner."
        command = [sys.executable, self.repo / "run_pipeline.py", "--config", config or self.config]
        command += ["--root", root or self.root, *arguments]
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=self.repo, timeout=900
        )


def small_config(repo: Path) -> dict:
    "The config of the repository, with small settings and the absolute paths of the notebooks."
    config = yaml.safe_load((repo / "pipeline.yaml").read_text())
    for name, stage in config["stages"].items():
        stage["notebook"] = str(repo / stage["notebook"])
        stage["parameters"].update(SMALL.get(name, {}))
    return config


def write_config(path: Path, config: dict):
    path.write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture(scope="module")
def project(repo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("the pipeline")
    songs = folder / "my songs"
    songs.mkdir()
    for k in range(14):
        (songs / f"song {k:02}.mid").write_bytes(write_midi(song(k)))
    (songs / "notes.txt").write_text("not music")
    (songs / "broken.mid").write_bytes(b"MThd, and then nothing")
    (folder / "data").mkdir()
    shutil.copy(repo / "data/sources.yaml", folder / "data")
    shutil.copytree(repo / "data/grooves", folder / "data/grooves")
    write_config(folder / "pipeline.yaml", small_config(repo))
    roots = folder / "my root", folder / "another root"
    return Project(repo, folder / "pipeline.yaml", songs, *roots)


@pytest.fixture(scope="module")
def output(project) -> str:
    "The output of the first run; another run, over another root, runs beside it."
    roots = project.root, project.second_root
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda root: project.run("--midi", project.songs, root=root), roots))
    for run in runs:
        assert run.returncode == 0, run.stdout + run.stderr
    return runs[0].stdout


@pytest.fixture(scope="module")
def finished(project, output) -> Project:
    "The project after its runs."
    return project


def test_every_artefact_is_written(finished, output):
    layout = finished.layout
    for path in (
        layout.manifest,
        layout.scan,
        layout.index,
        layout.corpus,
        layout.vocab,
        layout.originality,
        layout.best,
        layout.trials,
        layout.model,
        layout.weights,
        layout.model_originality,
        layout.history,
        layout.evaluation,
        layout.examination,
        layout.page,
    ):
        assert path.is_file(), path
    assert len(list(layout.runs.glob("[0-9][0-9]_*.ipynb"))) == 7
    assert not list(layout.runs.glob("*failed*"))
    assert len(list(layout.samples.glob("*.mid"))) >= 2
    assert "7 of 7 stages ran" in output
    assert str(layout.model) in output and str(layout.page) in output


def test_the_scan_gives_reasons(finished):
    import pandas as pd

    scan = pd.read_csv(finished.layout.scan)
    assert (scan.verdict == "ok").sum() == 14
    assert set(scan.split.dropna()) == {"train", "valid", "test"}
    rejected = scan[scan.verdict == "refused"]
    assert len(rejected) == 1
    assert "broken" in rejected.path.iloc[0] and len(rejected.reason.iloc[0]) > 10


def test_the_model_generates(finished):
    request = Request(instruments=["Piano", "Bass"], bars=4, style="mine")
    take = generate(open_model(finished.layout), request)[0]
    assert len(read_midi(take.midi).bar_lines()) == 5


def test_a_second_run_runs_nothing(finished):
    before = {
        path: path.stat().st_mtime_ns
        for path in finished.root.rglob("*")
        if path.is_file() and path.name not in (".lock", ".doit.db")
    }
    run = finished.run()
    assert run.returncode == 0 and "nothing to do" in run.stdout, run.stdout + run.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_thresholds_are_applied_to_the_measurements(finished):
    "A stricter threshold fails the run without measuring again; the old one passes again."
    examination = finished.layout.examination
    before = json.loads(examination.read_text())
    config = yaml.safe_load(finished.config.read_text())
    config["stages"]["test"]["parameters"]["gates"]["nats_per_note"] = 0.001
    strict = finished.config.with_name("strict.yaml")
    write_config(strict, config)
    run = finished.run(config=strict)
    assert run.returncode == 1 and "nats_per_note" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    assert "[6/7] evaluate: up to date" in run.stdout
    after = json.loads(examination.read_text())
    assert after["passed"] is False and after["measurements"] == before["measurements"]
    run = finished.run()
    assert run.returncode == 0, run.stderr
    assert json.loads(examination.read_text())["passed"] is True


def test_a_changed_file_makes_the_stages_stale(finished):
    path, changed = finished.songs / "song 03.mid", write_midi(song(99))
    original = path.read_bytes()
    path.write_bytes(changed)
    try:
        listing = finished.run("--list").stdout
    finally:
        path.write_bytes(original)
    assert listing.count("stale") >= 7 and "up to date" not in listing, listing


def test_the_same_seed_makes_the_same_bytes(finished):
    first, second = finished.layout, Layout(finished.second_root)
    for name in (
        "scan",
        "corpus",
        "index",
        "vocab",
        "originality",
        "best",
        "weights",
        "history",
        "evaluation",
        "examination",
    ):
        assert getattr(first, name).read_bytes() == getattr(second, name).read_bytes(), name
    names = sorted(path.name for path in first.samples.glob("*.mid"))
    assert names
    for name in names:
        assert (first.samples / name).read_bytes() == (second.samples / name).read_bytes(), name


def test_three_files_are_too_few(project, tmp_path):
    songs = tmp_path / "three"
    songs.mkdir()
    for k in range(3):
        (songs / f"{k}.mid").write_bytes(write_midi(song(k)))
    run = project.run("--midi", songs, root=tmp_path / "root")
    assert run.returncode == 1 and "10" in run.stderr and "3" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr and "validation" in run.stderr
