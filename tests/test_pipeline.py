"""The whole road on a small corpus of one's own, in a root with a space in its name."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml

from musicgen.core import Layout
from musicgen.generation.generate import generate, open_model
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
    "A melody that walks, over a bass that does not."
    rng = np.random.default_rng(seed)
    scale = np.array([0, 2, 4, 5, 7, 9, 11])
    steps = 21 + np.cumsum(rng.integers(-2, 3, bars * 4))
    notes = [
        (k * 480, 0, int(24 + scale[s % 7] + 12 * (s // 7)), 480, 80 + 10 * (k % 4 == 0))
        for k, s in enumerate(steps)
    ]
    notes += [(b * 1920, 1, int(36 + rng.choice(scale)), 1920, 70) for b in range(bars)]
    return make_score(notes, (Part(0, "Right"), Part(32, "Bass")), bpm=int(rng.integers(70, 140)))


@pytest.fixture(scope="module")
def road(repo, tmp_path_factory):
    "A folder of songs, a small score sheet, the root of a finished run over them, and beside it another's."
    place = tmp_path_factory.mktemp("the road")
    songs = place / "my songs"
    songs.mkdir()
    for k in range(14):
        (songs / f"song {k:02}.mid").write_bytes(write_midi(song(k)))
    (songs / "notes.txt").write_text("not music")
    (songs / "broken.mid").write_bytes(b"MThd, and then nothing")
    sheet = yaml.safe_load((repo / "pipeline.yaml").read_text())
    for name, stage in sheet["stages"].items():
        stage["notebook"] = str(repo / stage["notebook"])
        stage["parameters"].update(SMALL.get(name, {}))
        if "gates" in SMALL.get(name, {}):
            stage["parameters"]["gates"] = SMALL[name]["gates"]
    (place / "data").mkdir()
    shutil.copy(repo / "data/sources.yaml", place / "data")
    shutil.copytree(repo / "data/grooves", place / "data/grooves")
    config = place / "pipeline.yaml"
    config.write_text(yaml.safe_dump(sheet, sort_keys=False))
    root, twin = (
        place / "my root",
        place / "another root",
    )  # side by side: neither knows of the other
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(lambda r: conduct(repo, config, r, "--midi", songs), (root, twin)))
    for run in done:
        assert run.returncode == 0, run.stdout + run.stderr
    return repo, config, root, songs, done[0].stdout


def conduct(repo, config, root, *more):
    command = [sys.executable, repo / "run_pipeline.py", "--config", config, "--root", root, *more]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=repo, timeout=900
    )


def test_everything_is_made(road):
    repo, config, root, songs, said = road
    here = Layout(root)
    for path in (
        here.manifest,
        here.scan,
        here.index,
        here.corpus,
        here.vocab,
        here.originality,
        here.best,
        here.trials,
        here.model,
        here.weights,
        here.model_originality,
        here.history,
        here.evaluation,
        here.examination,
        here.page,
    ):
        assert path.is_file(), path
    assert len(list(here.runs.glob("[0-9][0-9]_*.ipynb"))) == 7 and not list(
        here.runs.glob("*failed*")
    )
    assert len(list(here.samples.glob("*.mid"))) >= 2
    assert "7 of 7 stages ran" in said and str(here.model) in said and str(here.page) in said


def test_the_scan_says_why(road):
    import pandas as pd

    scan = pd.read_csv(Layout(road[2]).scan)
    assert (scan.verdict == "ok").sum() == 14 and set(scan.split.dropna()) == {
        "train",
        "valid",
        "test",
    }
    refused = scan[scan.verdict == "refused"]
    assert (
        len(refused) == 1 and "broken" in refused.path.iloc[0] and len(refused.reason.iloc[0]) > 10
    )


def test_it_plays(road):
    take = generate(
        open_model(Layout(road[2])), Request(instruments=["Piano", "Bass"], bars=4, style="mine")
    )[0]
    assert len(read_midi(take.midi).bar_lines()) == 5


def test_again_runs_nothing(road):
    repo, config, root, songs, _ = road
    before = {
        p: p.stat().st_mtime_ns
        for p in root.rglob("*")
        if p.is_file() and p.name not in (".lock", ".doit.db")
    }
    done = conduct(repo, config, root)
    assert done.returncode == 0 and "nothing to do" in done.stdout, done.stdout + done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_gates_are_applied_to_what_was_measured(road, tmp_path):
    repo, config, root, songs, _ = road
    kept = json.loads(Layout(root).examination.read_text())
    sheet = yaml.safe_load(config.read_text())
    sheet["stages"]["test"]["parameters"]["gates"]["nats_per_note"] = 0.001
    strict = config.with_name("strict.yaml")
    strict.write_text(yaml.safe_dump(sheet, sort_keys=False))
    done = conduct(repo, strict, root)
    assert (
        done.returncode == 1 and "nats_per_note" in done.stderr and "Traceback" not in done.stderr
    ), done.stderr
    assert "[6/7] evaluate: up to date" in done.stdout
    now = json.loads(Layout(root).examination.read_text())
    assert now["passed"] is False and now["measurements"] == kept["measurements"]
    done = conduct(repo, config, root)
    assert (
        done.returncode == 0 and json.loads(Layout(root).examination.read_text())["passed"] is True
    ), done.stderr


def test_one_note_changed_is_seen(road):
    repo, config, root, songs, _ = road
    path, other = songs / "song 03.mid", write_midi(song(99))
    old = path.read_bytes()
    path.write_bytes(other)
    try:
        listed = conduct(repo, config, root, "--list").stdout
    finally:
        path.write_bytes(old)
    assert listed.count("stale") >= 7 and "up to date" not in listed, listed


def test_the_same_seed_makes_the_same_bytes(road):
    root = road[2]
    other = root.parent / "another root"
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
        ours, theirs = getattr(Layout(root), name), getattr(Layout(other), name)
        assert ours.read_bytes() == theirs.read_bytes(), name
    names = sorted(p.name for p in Layout(root).samples.glob("*.mid"))
    assert names and all(
        (Layout(root).samples / n).read_bytes() == (Layout(other).samples / n).read_bytes()
        for n in names
    )


def test_three_files_are_too_few(repo, road, tmp_path):
    songs = tmp_path / "three"
    songs.mkdir()
    for k in range(3):
        (songs / f"{k}.mid").write_bytes(write_midi(song(k)))
    done = conduct(repo, road[1], tmp_path / "root", "--midi", songs)
    assert done.returncode == 1 and "10" in done.stderr and "3" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "validation" in done.stderr
