"""What goes wrong on a real machine: kills, full disks, broken bytes, bad archives and models."""

import csv
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from musicgen.core import Layout, Rejection, read_settings, write_atomic
from musicgen.corpus.dataset import Corpus, write_corpus
from musicgen.corpus.download import Source, download
from musicgen.corpus.readers import scan_files
from musicgen.features import write_features
from musicgen.ingest import ingest
from musicgen.model.context import make_piece
from musicgen.music.instruments import DRUMS
from musicgen.music.midi import read_midi, write_midi
from musicgen.music.score import make_score
from musicgen.music.tokens import Vocab
from musicgen.preprocess import preprocess, read_scan, scan_rows

posix = pytest.mark.skipif(os.name != "posix", reason="a limit or signal of POSIX")


@pytest.fixture
def root(tmp_path) -> Layout:
    return Layout(tmp_path / "a root")


def tune(seed: int, notes: int = 24):
    "A tune of its own for every seed."
    dice = np.random.default_rng(seed)
    pitches = 60 + np.cumsum(dice.integers(-4, 5, notes)) % 24
    lengths = dice.choice([120, 240, 360, 480], notes)
    onsets = np.cumsum(lengths) - lengths
    rows = [(t, 0, p, d, 80) for t, p, d in zip(onsets, pitches, lengths, strict=True)]
    return make_score(rows, [int(dice.integers(80))])


def write_tunes(folder, count: int):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (folder / f"{k:03d}.mid").write_bytes(write_midi(tune(k)))


def start(code: str, *words) -> subprocess.Popen:
    "A Python process that does what the code says."
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_interrupts,
    )


def hear_interrupts():
    "A shell that runs us in the background has its children ignore Ctrl-C."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill(process: subprocess.Popen):
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL


def wait_for(what, seconds: float = 30):
    "Until it is so."
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.005)


def refusal_of(does, *words, **more) -> str:
    "The one sentence of a refusal."
    with pytest.raises(Rejection) as refused:
        does(*words, **more)
    sentence = refused.value.sentence
    assert 10 < len(sentence) < 800, sentence
    return sentence


# Kills.


@posix
def test_killed_in_the_middle_of_a_write(tmp_path):
    "kill -9 between the first half of a file and the second: the old file stands."
    path = tmp_path / "song.mid"
    path.write_bytes(b"old")
    code = (
        "import sys, time\nfrom musicgen.core import write_atomic\n"
        "def slow(part):\n"
        "    with open(part, 'wb') as f: f.write(b'ne'); f.flush()\n"
        "    print('half', flush=True); time.sleep(60)\n"
        "write_atomic(sys.argv[1], slow)"
    )
    process = start(code, path)
    assert process.stdout.readline() == "half\n"
    kill(process)
    assert path.read_bytes() == b"old" and not list(tmp_path.glob("*.mid.part"))
    assert [p.name for p in tmp_path.glob("*.mid")] == ["song.mid"], "what is left is not a song"
    assert write_atomic(path, b"new").read_bytes() == b"new"


@posix
def test_killed_at_any_moment_of_many_writes(tmp_path):
    "Twelve kills at random moments: each time one version or the other, whole."
    path, size = tmp_path / "song.mid", 300_000
    code = (
        "import itertools, sys\nfrom musicgen.core import write_atomic\n"
        "for k in itertools.cycle('ab'):\n"
        f"    write_atomic(sys.argv[1], k * {size}); print(k, flush=True)"
    )
    dice, seen = np.random.default_rng(0), set()
    for _ in range(12):
        process = start(code, path)
        process.stdout.readline()
        time.sleep(float(dice.uniform(0, 0.05)))
        kill(process)
        text = path.read_text()
        assert len(text) == size and len(set(text)) == 1
        seen.add(text[0])
    assert seen <= set("ab")


@posix
def test_killed_while_it_unpacks(root, tmp_path):
    "An ingest killed inside an archive leaves nothing that the next one takes for done."
    write_tunes(tmp_path / "tunes", 3)
    packed = tmp_path / "tunes.zip"
    data = [(tmp_path / f"tunes/{k:03d}.mid").read_bytes() for k in range(3)]
    with zipfile.ZipFile(packed, "w") as z:
        for k in range(3000):
            z.writestr(f"{k}.mid", data[k % 3])
    write_source(root, kind="local", path=str(packed))
    code = (
        "import sys\nfrom musicgen.core import Layout\nfrom musicgen.ingest import ingest\n"
        "ingest(Layout(sys.argv[1]))"
    )
    process = start(code, root.root)
    part = root.external / ".mine.part"
    wait_for(lambda: part.exists() and len(list(part.rglob("*.mid"))) > 20)
    kill(process)
    assert not (root.external / "mine").exists() and not (root.raw / "mine").exists()
    (row,) = ingest(root)
    assert row["files"] == 3 and row["twice"] == 2997
    assert not part.exists() and not list(root.raw.glob(".*"))


SCAN = (
    "import sys\nfrom musicgen.core import Layout\n"
    "from musicgen.preprocess import preprocess\n"
    "preprocess(Layout(sys.argv[1]), workers=int(sys.argv[2]))"
)


def children(pid: int) -> list[int]:
    "The processes that a process has started."
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in told.stdout.split()]


def alive(pid: int) -> bool:
    told = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(told.stdout.strip()) and not told.stdout.startswith("Z")


@posix
def test_killed_while_it_scans(root, tmp_path):
    "Killed again and again, the scan goes on where it was, and ends as it would have ended."
    write_tunes(root.raw / "mine", 60)
    (root.raw / "mine/060.mid").write_bytes(write_midi(tune(7))[:-30])
    (root.raw / "mine/061.mid").write_bytes(b"a diary")
    other = Layout(tmp_path / "undisturbed")
    shutil.copytree(root.raw, other.raw)
    journal, readers, dice = root.scan.with_suffix(".journal"), [], np.random.default_rng(3)
    for lines in (3, 17, 40):
        process = start(SCAN, root.root, 2)
        wait_for(
            lambda process=process, lines=lines: (
                process.poll() is not None
                or journal.exists()
                and journal.read_bytes().count(b"\n") > lines
            )
        )
        time.sleep(float(dice.uniform(0, 0.01)))
        readers += children(process.pid)
        if process.poll() is None:
            kill(process)
        else:
            process.communicate(timeout=30)
    assert readers
    wait_for(lambda: not any(map(alive, readers)))  # they end with the pipe that feeds them
    if journal.exists():
        assert not root.scan.exists(), "a scan that is not finished is not there"
        refusal_of(read_scan, root)
    preprocess(root, workers=1)
    preprocess(other, workers=1)
    assert root.scan.read_bytes() == other.scan.read_bytes()
    assert os.listdir(root.scan.parent) == ["scan.csv"]


@posix
@pytest.mark.parametrize("moment", ["find_clusters", "_write_table", "_Journal.close"])
def test_killed_behind_the_reading(root, moment):
    "All files are read, and the table is not there: the next run reads none of them again."
    write_tunes(root.raw / "mine", 12)
    code = (
        "import os, sys\nimport musicgen.preprocess as room\nfrom musicgen.core import Layout\n"
        f"room.{moment} = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "room.preprocess(Layout(sys.argv[1]), workers=1)"
    )
    process = start(code, root.root)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert root.scan.exists() == (moment == "_Journal.close")
    process = start(SCAN, root.root, 1)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 0, wrong
    assert "12 files known from a stopped run" in said
    assert [row["path"] for row in scan_rows(root)] == [f"mine/{k:03d}.mid" for k in range(12)]


@posix
def test_interrupted_while_it_scans(root):
    "Ctrl-C: the readers end with the scan, and what they read is not lost."
    write_tunes(root.raw / "mine", 300)
    process, journal = start(SCAN, root.root, 2), root.scan.with_suffix(".journal")
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 20)
    readers = children(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0 and readers
    wait_for(lambda: not any(map(alive, readers)), 5)
    assert journal.read_bytes().count(b"\n") > 20 and not root.scan.exists()


@posix
def test_two_scans_of_one_root(root, tmp_path):
    "The second is refused while the first is at work; the table is that of one scan alone."
    write_tunes(root.raw / "mine", 12)
    os.mkfifo(tmp_path / "endless")
    code = SCAN.replace(
        "preprocess(Layout",
        "import musicgen.preprocess as room\nread = room.scan_files\n"
        "def slow(*a):\n    yield from read(*a)\n    print('read', flush=True)\n"
        "    sys.stdin.readline()\nroom.scan_files = slow\npreprocess(Layout",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root.root), "1"],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while process.stdout.readline() != "read\n":
        assert process.poll() is None
    sentence = refusal_of(preprocess, root, workers=1)
    assert "another run" in sentence and str(root.scan.parent) in sentence
    assert not root.scan.exists()
    process.communicate("on\n", timeout=60)
    assert process.returncode == 0
    before = root.scan.read_bytes()
    preprocess(root, workers=1)
    assert root.scan.read_bytes() == before


@posix
def test_a_disk_that_lost_part_of_the_journal(root):
    "Zeros where lines should be, a line that is no row, half a line: those files are read again."
    write_tunes(root.raw / "mine", 12)
    preprocess(root, workers=1)
    before, journal = root.scan.read_bytes(), root.scan.with_suffix(".journal")
    process = start(
        SCAN.replace(
            "preprocess(Layout",
            "import musicgen.preprocess as room\nroom.find_clusters = None\npreprocess(Layout",
        ),
        root.root,
        1,
    )
    process.communicate(timeout=60)
    lines = journal.read_bytes().splitlines(True)
    assert len(lines) == 13
    lines[3], lines[5], lines[12] = bytes(100) + b"\n", b"[3]\n", lines[12][:50]
    journal.write_bytes(b"".join(lines))
    process = start(SCAN, root.root, 1)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 0 and "9 files known" in said, wrong
    assert root.scan.read_bytes() == before


def test_the_number_of_processes_and_the_order_change_no_byte(root, tmp_path, monkeypatch):
    "One, two, three readers, and a backend of joblib; and the same files made in another order."
    write_tunes(root.raw / "mine", 150)
    other = Layout(tmp_path / "other")
    for path in sorted(root.raw.rglob("*.mid"), reverse=True):
        write_atomic(other.raw / path.relative_to(root.raw), path.read_bytes())
    preprocess(root, workers=1)
    before = root.scan.read_bytes()
    for workers in (2, 3):
        preprocess(other, workers=workers)
        assert other.scan.read_bytes() == before
    monkeypatch.setenv("MUSICGEN_WORK_BACKEND", "threading")
    preprocess(root, workers=2)
    assert root.scan.read_bytes() == before


@posix
@pytest.mark.parametrize("moment", ["features.OriginalityIndex.pack", "features.Vocab.save"])
def test_killed_while_it_packs(root, moment):
    "A corpus is there when its index is, and the index comes last."
    write_tunes(root.raw / "mine", 12)
    preprocess(root, workers=1)
    write_features(root)
    before = Corpus(root).hash
    (root.raw / "mine/000.mid").unlink()
    preprocess(root, workers=1)
    code = (
        "import os, sys\nimport musicgen.features as features\n"
        "from musicgen.core import Layout\n"
        f"{moment} = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "features.write_features(Layout(sys.argv[1]))"
    )
    process = start(code, root.root)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    try:
        assert Corpus(root).hash == before, "the old corpus, whole, or none"
    except Rejection as e:
        assert "run the features stage" in e.sentence
    write_features(root)
    assert Corpus(root).hash != before and len(Corpus(root).lines) == 11


# Full disks.

FULL = (
    "import resource, signal, sys\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))\n"
)


@posix
def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "song.mid"
    path.write_bytes(b"old")
    code = FULL + (
        "from musicgen.core import write_atomic\n"
        "try: write_atomic(sys.argv[2], b'x' * 100_000)\n"
        "except OSError as e: print('OSError')"
    )
    said, wrong = start(code, 1000, path).communicate(timeout=60)
    assert said == "OSError\n", wrong
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["song.mid"]


@posix
@pytest.mark.parametrize("size", [200, 5_000, 13_000])
def test_a_full_disk_keeps_the_old_scan(root, size):
    "Full at once, in the journal, in the fingerprints; with room again, the scan goes on."
    write_tunes(root.raw / "mine", 12)
    preprocess(root, workers=1)
    before = root.scan.read_bytes()
    (root.raw / "mine/012.mid").write_bytes(write_midi(tune(12)))
    code = FULL + (
        "from musicgen.core import Layout\nfrom musicgen.preprocess import preprocess\n"
        "try: preprocess(Layout(sys.argv[2]), workers=1)\n"
        "except OSError as e: print('OSError')"
    )
    said, wrong = start(code, size, root.root).communicate(timeout=60)
    assert said.endswith("OSError\n"), (said, wrong)
    assert root.scan.read_bytes() == before
    preprocess(root, workers=1)
    assert len(read_scan(root)) == 13 and os.listdir(root.scan.parent) == ["scan.csv"]


@posix
def test_a_full_disk_keeps_the_old_corpus_or_none(root):
    "And a later run, with room again, is as good as ever."
    write_tunes(root.raw / "mine", 12)
    preprocess(root, workers=1)
    code = FULL + (
        "from musicgen.core import Layout\n"
        "from musicgen.features import write_features\n"
        "try: write_features(Layout(sys.argv[2]))\n"
        "except OSError as e: print('OSError')"
    )
    said, wrong = start(code, 1100, root.root).communicate(timeout=60)
    assert said.endswith("OSError\n"), wrong
    assert "run the features stage" in refusal_of(Corpus, root)
    assert not list(root.processed.rglob("*.part"))
    write_features(root)
    assert len(Corpus(root).lines) == 12


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Layout:
    "A root with a model that has learnt nothing."
    import torch

    from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig, save_model

    layout = Layout(tmp_path_factory.mktemp("house"))
    torch.manual_seed(0)
    save_model(MusicLSTM(MusicLSTMConfig(hidden=24, head=16)), layout.model)
    return layout


@posix
def test_a_full_disk_is_one_sentence_in_the_shell(house, tmp_path):
    out = tmp_path / "out.mid"
    out.write_bytes(b"old")
    code = FULL + "from musicgen.cli import main\nsys.exit(main(sys.argv[2:]))"
    process = start(code, 200, "generate", "--root", house.root, "-o", out)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 2 and said == "" and wrong.count("\n") == 1, wrong
    assert wrong.startswith("musicgen: ") and "large" in wrong
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == ["out.mid"]


# Broken MIDI, in hex. What is wrong stands beside it.

HEAD = "4d546864 00000006 0001 0001 01e0 4d54726b "
NOTE = "4d54726b 0000000d 00903c40 8360803c00 00ff2f00"  # a track of one note
BROKEN = {
    "nothing at all": "",
    "a head cut short": "4d546864 000000",
    "no track": "4d546864 00000006 0001 0000 01e0",
    "another kind of file": "504b0304 14000000 08000000 21000000 00000000",
    "a track longer than the file": HEAD + "000000ff 00903c40 8360803c00 00ff2f00",
    "a track without an end": HEAD + "00000009 00903c40 8360803c00",
    "a track cut inside an event": HEAD + "00000003 00903c",
    "an event without a status": HEAD + "00000007 003c40 00ff2f00",
    "a text longer than its track": HEAD + "00000008 00ff017f6161 0000",
    "a delta time that never ends": HEAD + "0000000a ffffffff ffffff7f 903c40",
    "a note that is never let go": HEAD + "00000008 00903c40 00ff2f00",
    "a note let go that was never struck": HEAD + "00000008 00803c40 00ff2f00",
    "a pitch above 127": HEAD + "0000000d 0090bc40 8360803c00 00ff2f00",
    "a tempo of nothing": HEAD + "00000014 00ff5103000000 00903c40 8360803c00 00ff2f00",
    "a metre over nothing": HEAD + "00000015 00ff5804000000 08 00903c40 8360803c00 00ff2f00",
    "a metre over 2 ** 255": HEAD + "00000015 00ff580404ff1808 00903c40 8360803c00 00ff2f00",
    "no ticks to the beat": "4d546864 00000006 0001 0001 0000" + NOTE,
    "ticks of film, not of music": "4d546864 00000006 0001 0001 e728" + NOTE,
    "a head that says it is longer": "4d546864 000000ff 0001 0001 01e0 4d54726b 00000004 00ff2f00",
    "notes for a hundred days": HEAD + "0000000f 00903c40 ffffff7f803c00 00ff2f00",
}


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> dict[str, dict]:
    "The row of each broken file."
    folder = tmp_path_factory.mktemp("broken")
    paths = {}
    for k, (name, text) in enumerate(BROKEN.items()):
        path = folder / f"{k}.mid"
        path.write_bytes(bytes.fromhex(text))
        paths[path] = name
    return {paths[path]: row for path, row in scan_files(paths, workers=1)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_has_its_row(scanned, name):
    "A reason in one line, or facts that are finite."
    row = scanned[name]
    assert (
        row.get("sha256", hashlib.sha256(bytes.fromhex(BROKEN[name])).hexdigest())
        == hashlib.sha256(bytes.fromhex(BROKEN[name])).hexdigest()
    )
    if "reason" in row:
        assert row["reason"].strip() and "\n" not in row["reason"]
    else:
        assert 0 <= row["notes"] <= 1 and np.isfinite([row["beats"], row["seconds"]]).all()
        assert row["tempo"] > 0 and row["seconds"] <= 6 * 3600


def test_the_worst_are_refused(scanned):
    for name in (
        "nothing at all",
        "a head cut short",
        "another kind of file",
        "notes for a hundred days",
    ):
        assert "reason" in scanned[name], name


def test_what_can_be_mended_is(scanned):
    "And the row says what."
    for name in ("a track without an end", "a pitch above 127", "a track cut inside an event"):
        assert "reason" not in scanned[name] and scanned[name]["mended"], name


def test_a_file_that_would_kill_the_parser_costs_no_more_than_its_row(root):
    "Twelve tunes and three killers: twelve pieces, three reasons."
    write_tunes(root.raw / "mine", 12)
    for k, killer in enumerate(KILLERS):
        (root.raw / f"mine/killer-{k}.mid").write_bytes(killer)
    assert preprocess(root, workers=2)["ok"] == 12
    scan = read_scan(root)
    bad = scan[scan.path.str.contains("killer")]
    assert len(scan) == 15 and (bad.verdict == "refused").all() and (bad.reason != "").all()
    assert write_features(root)[0]["pieces"] == 12


@posix
def test_a_file_that_hangs_costs_one_row(tmp_path):
    "A named pipe into which nobody writes, between tunes, twice."
    write_tunes(tmp_path, 6)
    for k in (1, 4):
        (tmp_path / f"{k:03d}.mid").unlink()
        os.mkfifo(tmp_path / f"{k:03d}.mid")
    began = time.monotonic()
    rows = dict(scan_files(sorted(tmp_path.iterdir()), workers=2, timeout=0.5))
    assert time.monotonic() - began < 20
    assert [p.stem for p, row in sorted(rows.items()) if "reason" in row] == ["001", "004"]
    assert all("longer than 0.5 s" in row["reason"] for row in rows.values() if "reason" in row)


def test_the_malformed_files_of_the_world(tmp_path):
    "167 broken files that people found: a verdict and a reason for each, and most of them read."
    if not (shared := os.environ.get("MUSICGEN_SHARED")):
        pytest.skip("MUSICGEN_SHARED names no folder")
    files = [p for p in sorted((Path(shared) / "data/malformed").iterdir()) if p.suffix != ".csv"]
    rows = dict(scan_files([p for p in files if p.suffix != ".md"], workers=2))
    assert len(rows) >= 167
    for path, row in rows.items():
        assert row.get("reason", "x").strip(), path
    assert not [p for p, row in rows.items() if "crashed" in row.get("reason", "")]
    assert sum("content" in row for row in rows.values()) >= 124


KILLERS = [
    bytes.fromhex(HEAD + text)
    for text in (
        "00000012 0a9f817f728d16fa059b52cbaf6de948c02b",
        "00000029 07ad061a97631ba8399fb5e21c98e21aa28a63fcb8b3d25793a16b2983f39e3915b2b65dac2f46f991",
        "00000031 d727d9830c560b8beab0977d81414bdcad83f60372b3a615076ac102c10cb9a7ee9efac5750f4e9fd2"
        "391153db8872a782",
    )
]


@pytest.mark.parametrize("command", ["verify", "regenerate"])
def test_a_file_that_would_kill_the_parser_is_a_sentence_in_the_shell(house, tmp_path, command):
    "None of ours, or a refusal: one line, and no traceback."
    for k, killer in enumerate(KILLERS):
        path = tmp_path / f"{k}.mid"
        path.write_bytes(killer)
        process = start(
            "import sys\nfrom musicgen.cli import main\nsys.exit(main(sys.argv[1:]))",
            command,
            path,
            "--root",
            house.root,
        )
        said, wrong = process.communicate(timeout=60)
        assert process.returncode in (1, 2) and (said + wrong).count("\n") == 1, wrong


# Archives and downloads.


def write_source(root: Layout, **facts):
    "A `data/sources.yaml` of one source."
    facts = dict(name="mine", licence="not stated", **facts)
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items()]
    write_atomic(root.sources, "- " + "\n  ".join(lines) + "\n")


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return out.getvalue()


def tarred(*members: tuple[str, bytes | str]) -> bytes:
    "A tar.gz; a member whose content is text is a link to there."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            t.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))
    return out.getvalue()


GOOD = write_midi(tune(0))
NASTY = {
    "truncated.zip": (
        zipped({f"{k}.mid": write_midi(tune(k)) for k in range(9)})[:-400],
        "cannot be unpacked",
    ),
    "truncated.tar.gz": (
        tarred(*((f"{k}.mid", os.urandom(4000)) for k in range(9)))[:-9000],
        "cannot be unpacked",
    ),
    "empty.zip": (b"", "cannot be unpacked"),
    "climbs.zip": (zipped({"good.mid": GOOD, "../../evil.mid": GOOD}), "leads outside"),
    "absolute.zip": (zipped({"/tmp/evil.mid": GOOD}), "leads outside"),
    "windows.zip": (zipped({"..\\evil.mid": GOOD, "C:\\evil.mid": GOOD}), "leads outside"),
    "climbs.tar.gz": (tarred(("good.mid", GOOD), ("../../evil.mid", GOOD)), "leads outside"),
    "link.tar.gz": (tarred(("link.mid", "/etc/passwd")), "link or device"),
    "through.tar.gz": (tarred(("door", "/tmp"), ("door/evil.mid", GOOD)), "link or device"),
    "bomb.zip": (zipped({"bomb.mid": bytes(50_000_000)}), "times its size"),
    "bomb.tar.gz": (tarred(("bomb.mid", bytes(50_000_000))), "times its size"),
}


@pytest.mark.parametrize("name", NASTY)
def test_an_archive_that_means_harm(root, tmp_path, name):
    "Refused by name, whole, with nothing written outside and nothing believed inside."
    data, why = NASTY[name]
    (tmp_path / name).write_bytes(data)
    write_source(root, kind="local", path=str(tmp_path / name))
    sentence = refusal_of(ingest, root)
    assert name in sentence and why in sentence, sentence
    assert not [*tmp_path.rglob("*evil*"), *tmp_path.parent.glob("*evil*")]
    assert not list(root.external.glob("mine*")) and not (root.raw / "mine").exists()
    assert not root.manifest.exists()
    assert sum(p.stat().st_size for p in root.root.rglob("*") if p.is_file()) < 10_000


def test_a_good_archive_is_taken(root, tmp_path):
    "The counter-check: the same door lets harmless music in, under safe names."
    (tmp_path / "good.zip").write_bytes(zipped({"a b/ü?.mid": GOOD, "notes.txt": b"hello"}))
    write_source(root, kind="local", path=str(tmp_path / "good.zip"))
    ingest(root)
    with open(root.manifest, newline="") as f:
        (row,) = csv.DictReader(f)
    assert (root.raw / row["path"]).read_bytes() == GOOD and row["licence"] == "not stated"
    assert row["sha256"] == hashlib.sha256(GOOD).hexdigest() and " " not in row["path"]


@pytest.fixture
def site(tmp_path):
    "A web site of one folder, on this machine: its address, its folder, what has been asked."
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a):
            super().__init__(*a, directory=str(folder))

        def log_message(self, *a):
            asked.append(self.path)

        def do_GET(self):
            if not self.path.startswith("/cut"):
                return super().do_GET()
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder, asked
        server.shutdown()


def test_a_download_with_another_hash(root, site):
    "Source, address, expected, got, consequence; and nothing is kept."
    address, folder, _ = site
    (folder / "songs.zip").write_bytes(zipped({"a.mid": GOOD}))
    url, expected = f"{address}/songs.zip", "0" * 64
    got = hashlib.sha256((folder / "songs.zip").read_bytes()).hexdigest()
    write_source(root, kind="url", url=url, sha256=expected)
    sentence = refusal_of(ingest, root)
    assert all(words in sentence for words in ("mine", url, expected, got, "deleted")), sentence
    assert not [p for p in root.external.rglob("*") if p.is_file()]
    assert not (root.raw / "mine").exists()
    write_source(root, kind="url", url=url, sha256=got)
    assert ingest(root)[0]["files"] == 1


def test_a_download_that_is_cut_off(root, site, tmp_path):
    address, _, asked = site
    path = tmp_path / "songs.zip"
    source = Source("mine", "url", "not stated", url=f"{address}/cut.zip")
    sentence = refusal_of(download, source, path, tries=2, pause=0)
    assert "2 attempts" in sentence and len(asked) >= 2 and not path.exists()


def test_a_download_that_is_not_there(root, site, tmp_path):
    address, _, asked = site
    source = Source("mine", "url", "not stated", url=f"{address}/none.zip")
    sentence = refusal_of(download, source, tmp_path / "x")
    assert "404" in sentence and "1 attempts" in sentence, "a 404 is not tried again"


# Empty and half-written corpora.


def test_nothing_to_work_on(root, tmp_path):
    "Each stage says which one is missing before it."
    (tmp_path / "empty").mkdir()
    assert "gave no piece" in refusal_of(ingest, root, midi=tmp_path / "empty")
    assert "run the ingest stage" in refusal_of(preprocess, root)
    assert "run the preprocess stage" in refusal_of(write_features, root)
    assert "run the features stage" in refusal_of(Corpus, root)


def test_too_little_to_work_on(root):
    write_tunes(root.raw / "mine", 3)
    sentence = refusal_of(preprocess, root, workers=1)
    assert "3 of 3 files" in sentence and "at least 10" in sentence


@pytest.fixture
def packed(root) -> Layout:
    vocab = Vocab()
    pieces = [make_piece(tune(k), vocab, f"mine/{k}", "mine") for k in range(3)]
    write_corpus(root, pieces, ["train", "valid", "test"], ["yours"] * 3, vocab)
    assert len(Corpus(root).pieces("train")) == 1
    return root


@pytest.mark.parametrize("name", ["corpus", "index", "vocab"])
def test_a_missing_piece_of_a_corpus(packed, name):
    getattr(packed, name).unlink()
    with pytest.raises((Rejection, FileNotFoundError)):
        Corpus(packed)


def test_another_corpus_under_the_same_index(packed):
    rows = np.load(packed.corpus)
    rows[3, 2] ^= 1
    np.save(packed.corpus, rows)
    assert "another corpus" in refusal_of(Corpus, packed)


def test_another_vocabulary_under_the_same_index(packed):
    Vocab(grid=12, longest=48).save(packed.vocab)
    assert "another corpus" in refusal_of(Corpus, packed)
    packed.vocab.write_text(packed.vocab.read_text().replace('"grid": 12', '"grid": 13'))
    assert "vocabulary" in refusal_of(Corpus, packed)


def test_a_half_written_array(packed):
    data = packed.corpus.read_bytes()
    for size in (0, 5, 90, len(data) - 7):
        packed.corpus.write_bytes(data[:size])
        with pytest.raises((Rejection, ValueError, EOFError)):
            Corpus(packed)


def test_a_half_written_index(packed):
    text = packed.index.read_text()
    packed.index.write_text(text[: len(text) - 9])
    assert "another corpus" in refusal_of(Corpus, packed)


# Settings.


@pytest.mark.parametrize(
    "text",
    [
        b"port = 3\n",
        b"[api]\nport\n",
        b"[api]\nhost = \xff\n",
        b"[api]\nport = x\n",
        b"[api]\nprot = 1\n",
        b"[apo]\nport = 1\n",
    ],
)
def test_settings_that_make_no_sense(root, text):
    write_atomic(root.settings, text)
    refusal_of(read_settings, root)


# Damaged models.


class Payload:
    "What a pickle does when it is loaded: here, it leaves a file."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "pickle", "inside"])
def test_a_pickled_model_is_refused_and_not_run(house, tmp_path, form):
    import torch

    from musicgen.model.lstm import load_model

    path, mark = tmp_path / "music_lstm.pt", tmp_path / "executed"
    if form == "torch":
        torch.save(Payload(mark), path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        model = torch.load(house.model, weights_only=True)
        torch.save(model | dict(provenance=Payload(mark)), path)
    assert str(path) in refusal_of(load_model, path)
    assert not mark.exists(), "the payload was run"
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the counter-check: it is a payload"


def test_a_damaged_checkpoint_is_refused(house, tmp_path):
    import torch

    from musicgen.model.lstm import load_model

    data, path = house.model.read_bytes(), tmp_path / "music_lstm.pt"
    other = io.BytesIO()
    torch.save(dict(config=3, weights={}), other)
    for broken in (
        b"PK\3\4",
        data[: len(data) // 2],
        data[:-10],
        GOOD,
        b"{}" * 500,
        b"",
        other.getvalue(),
    ):
        path.write_bytes(broken)
        assert str(path) in refusal_of(load_model, path)


def test_damaged_weights_are_refused(house, tmp_path):
    "Cut off, absurd, foreign, without what they should say: one sentence each, the file named."
    from musicgen.generation.generate import open_model

    data, here = house.weights.read_bytes(), Layout(tmp_path)
    size = int.from_bytes(data[:8], "little")
    from safetensors.numpy import save

    for broken in (
        b"",
        data[:4],
        data[: size // 2],
        data[:-10],
        (1 << 60).to_bytes(8, "little") + data[8:],
        data[:8] + b"x" * size + data[8 + size :],
        GOOD,
        save({"a": np.zeros(3)}),
        save({"a": np.zeros(3)}, {"musicgen": "{"}),
    ):
        write_atomic(here.weights, broken)
        assert str(here.weights) in refusal_of(open_model, here)


def test_weights_that_are_not_what_they_say(house, tmp_path):
    "Right in form and wrong inside: another number, a table that is missing, a name of nobody."
    from safetensors.numpy import save

    from musicgen.generation.generate import open_model
    from musicgen.model.decoder import read_weights

    weights, about = read_weights(house.weights)
    here, name = Layout(tmp_path), "parts.weight"
    changed = weights | {name: weights[name] + 1}
    for held, told in (
        (changed, about),
        ({k: v for k, v in weights.items() if k != name}, about),
        (weights | {name: weights[name][:3]}, about),
        (weights, {"hash": about["hash"]}),
        (weights, [1]),
    ):
        write_atomic(here.weights, save(held, {"musicgen": json.dumps(told)}))
        assert str(here.weights) in refusal_of(open_model, here)
    write_atomic(here.weights, save(weights, {"musicgen": json.dumps(about)}))
    assert open_model(here).model_hash == about["hash"]


def test_a_damaged_index_of_originals(house, tmp_path):
    from musicgen.generation.generate import open_model

    here = Layout(tmp_path)
    write_atomic(here.weights, house.weights.read_bytes())
    for broken in (b"", b"PK\3\4", GOOD, pickle.dumps(Payload(tmp_path / "executed"))):
        write_atomic(here.model_originality, broken)
        assert here.model_originality.name in refusal_of(open_model, here)
    np.savez(here.model_originality, text=np.array([Payload(tmp_path / "executed")], object))
    refusal_of(open_model, here)
    assert not (tmp_path / "executed").exists()


def test_the_door_is_as_it_was(house):
    "After all this, music."
    from musicgen.generation.generate import generate, open_model
    from musicgen.generation.request import Request

    take = generate(open_model(house), Request(bars=1, instruments=["piano", "drums"]))[0]
    assert [p.program for p in read_midi(take.midi).parts] == [0, DRUMS]
