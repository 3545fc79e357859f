"""From the scan to the corpus: the same bytes however they are made, and never parts of two."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from musicgen import features
from musicgen.core import Layout, Rejection, write_atomic
from musicgen.corpus.dataset import Corpus, write_corpus
from musicgen.corpus.scan import scan_rows
from musicgen.features import write_features
from musicgen.model.piece import make_piece
from musicgen.music.midi import read_midi, write_midi
from musicgen.music.originality import OriginalityIndex
from musicgen.music.score import Part, make_score
from musicgen.music.tokens import Vocab
from musicgen.preprocess import preprocess

posix = pytest.mark.skipif(os.name != "posix", reason="a limit or signal of POSIX")
FILES = ("corpus", "index", "vocab", "originality")
HEAD = "path,verdict,reason,sha256,split,licence,seconds"


def tune(seed: int, notes: int = 40):
    "A tune of its own for every seed, in two parts, now and then with a long rest."
    rng = np.random.default_rng(seed)
    pitches = 60 + np.cumsum(rng.integers(-4, 5, notes)) % 24
    waits = rng.choice([120, 240, 360, 480, 4000], notes, p=[0.3, 0.3, 0.2, 0.19, 0.01])
    onsets = np.cumsum(waits)
    rows = [(t, k % 2, p, 110, 80) for k, (t, p) in enumerate(zip(onsets, pitches, strict=True))]
    return make_score(rows, [int(program) for program in rng.integers(0, 80, 2)])


def write_scan(root: Layout, count: int, folder: str = "mine"):
    "So many tunes and a scan that accepts them, without the work of a scan."
    lines = [HEAD]
    for k in range(count):
        path, data = f"{folder}/{k:05d}.mid", write_midi(tune(k))
        write_atomic(root.raw / path, data)
        split = "valid" if k % 10 == 3 else "test" if k % 10 == 7 else "train"
        lines.append(f"{path},ok,,{hashlib.sha256(data).hexdigest()},{split},not stated,9.5")
    write_atomic(root.scan, "\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path) -> Layout:
    return Layout(tmp_path / "a root")


@pytest.fixture
def scanned(root) -> Layout:
    write_scan(root, 60)
    return root


def hashes(root: Layout) -> dict[str, str]:
    "Every file of the corpus and its hash."
    files = sorted(path for path in root.processed.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root.processed)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def rejection_of(call, *arguments, **keywords) -> str:
    "The sentence with which a call is rejected: one line of a readable length."
    with pytest.raises(Rejection) as error:
        call(*arguments, **keywords)
    sentence = error.value.sentence
    assert 10 < len(sentence) < 400, sentence
    return sentence


def start(code: str, *arguments) -> subprocess.Popen:
    "A Python process that runs this code."
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# The same bytes.


def test_the_number_of_processes_changes_no_byte(scanned, monkeypatch):
    monkeypatch.setattr(features, "FEW", 1)
    monkeypatch.setattr(features, "BATCH", 7)
    table, files = write_features(scanned, workers=1), hashes(scanned)
    assert table == [dict(dataset="mine", pieces=60, rows=table[0]["rows"], hours=0.16)]
    assert (write_features(scanned, workers=2), hashes(scanned)) == (table, files)
    monkeypatch.setattr(features, "BATCH", 60)
    assert (write_features(scanned, workers=1), hashes(scanned)) == (table, files)


def test_the_order_of_the_folder_changes_no_byte(tmp_path):
    "The same files, written in another order, under a folder that lists them differently."
    one, two = Layout(tmp_path / "one"), Layout(tmp_path / "two")
    names = [f"b/{k}.mid" for k in range(7)] + [f"a/{k}.mid" for k in range(7)]
    data = {name: write_midi(tune(k)) for k, name in enumerate(names)}
    for root, order in ((one, names), (two, reversed(names))):
        for name in order:
            write_atomic(root.raw / name, data[name])
        preprocess(root, workers=1)
        write_features(root)
    assert hashes(one) == hashes(two) and len(hashes(one)) == 14 + 4


def test_one_way_to_write_a_corpus(scanned, tmp_path):
    "Pieces in memory make what files make: rows, index, originality, byte for byte."
    write_features(scanned)
    corpus, other = Corpus(scanned), Layout(tmp_path / "other")
    names, splits = ([line[column] for line in corpus.lines] for column in ("name", "split"))
    scores = (read_midi(scanned.raw / f"{name}.mid") for name in names)
    pieces = (make_piece(s, corpus.vocab, n, "mine") for s, n in zip(scores, names, strict=True))
    write_corpus(other, pieces, splits, ["not stated"] * len(names), corpus.vocab)
    for name in FILES:
        assert getattr(other, name).read_bytes() == getattr(scanned, name).read_bytes(), name
    index = OriginalityIndex.load(scanned.originality)
    assert index.corpus == corpus.hash and len(index.names) == len(corpus.pieces("train")) == 48


def test_every_piece_has_its_file(scanned):
    "One `.npy` a piece, equal to its rows of the corpus; none that the index does not know."
    write_features(scanned)
    corpus = Corpus(scanned)
    (scanned.tokens / "mine" / "stray.npy").write_bytes(b"")
    write_features(scanned)
    pieces = [p for split in ("train", "valid", "test") for p in corpus.pieces(split)]
    for p in pieces:
        assert np.array_equal(np.load(scanned.tokens / f"{p.name}.npy"), p.rows)
    assert len(list(scanned.tokens.rglob("*.npy"))) == len(pieces) == 60


def test_pieces_are_made_when_they_are_asked_for(scanned):
    write_features(scanned)
    pieces = Corpus(scanned).pieces("train")
    assert len(pieces) == 48 and pieces[-1].name == pieces[47].name == list(pieces)[-1].name
    assert [p.name for p in pieces[1:6:2]] == [pieces[k].name for k in (1, 3, 5)]
    assert pieces[0].header is pieces[0].header, "a header is read once"
    with pytest.raises(IndexError):
        pieces[48]


def test_a_header_longer_than_a_line_of_csv_may_be(root):
    "A performance whose tempo changes twenty thousand times is a piece like another."
    tempos = [(t, 500_000 + t) for t in range(20_000)]
    score = make_score([(0, 0, 60, 480, 90), (19_000, 0, 62, 480, 90)], tempos=tempos)
    corpus = write_corpus(root, [make_piece(score, Vocab(), "a/b", "a")], ["train"], ["x"], Vocab())
    assert corpus.pieces("train")[0].header == score.header


# Files that have changed.


def test_a_file_that_changed_is_named(scanned):
    "And so is one that is gone. The old corpus stays."
    write_features(scanned)
    before, path = hashes(scanned), scanned.raw / "mine/00041.mid"
    path.write_bytes(write_midi(tune(999)))
    sentence = rejection_of(write_features, scanned)
    assert "mine/00041.mid has changed" in sentence and "preprocess" in sentence
    path.unlink()
    with pytest.raises(Rejection, match="mine/00041.mid was scanned and cannot be read"):
        write_features(scanned)
    assert hashes(scanned) == before and len(Corpus(scanned).lines) == 60


def test_a_file_that_changed_is_named_by_a_process(scanned, monkeypatch):
    monkeypatch.setattr(features, "FEW", 1)
    (scanned.raw / "mine/00041.mid").write_bytes(write_midi(tune(999)))
    with pytest.raises(Rejection, match="mine/00041.mid has changed"):
        write_features(scanned, workers=2)
    assert not scanned.index.exists() and not list(scanned.processed.iterdir())


def test_a_piece_that_cannot_be_encoded_is_named(root):
    data = write_midi(make_score([(k, k, 60, 480, 90) for k in range(33)], [0] * 33))
    write_atomic(root.raw / "mine/many.mid", data)
    digest = hashlib.sha256(data).hexdigest()
    write_atomic(root.scan, f"{HEAD}\nmine/many.mid,ok,,{digest},train,x,1\n")
    with pytest.raises(Rejection, match="mine/many.mid: the piece has 33 parts"):
        write_features(root)


def test_a_corpus_that_is_not_what_its_index_says(scanned):
    "Cut off, cut off between two lines, changed, of another shape: rejected, each in a sentence."
    write_features(scanned)
    whole, lines = scanned.corpus.read_bytes(), scanned.index.read_bytes()
    for damaged in (b"", whole[:90], whole[:-5], whole + b"12345", whole[:-1] + b"\xff"):
        scanned.corpus.write_bytes(damaged)
        assert "run the features stage again" in rejection_of(Corpus, scanned)
    scanned.corpus.write_bytes(whole)
    for damaged in (lines[:-9], lines[: lines.rindex(b"\r\n", 0, -2) + 2], lines[:200]):
        scanned.index.write_bytes(damaged)
        with pytest.raises(Rejection, match="another corpus"):
            Corpus(scanned)
    scanned.index.write_bytes(lines)
    scanned.vocab.unlink()
    with pytest.raises(Rejection, match="run the features stage"):
        Corpus(scanned)


# Kills and full disks.

IMPORTS = """
import os, resource, signal, sys
from musicgen.core import Layout
from musicgen.corpus import dataset
from musicgen.features import write_features
"""
RUN = """
print("begins", flush=True)
write_features(Layout(sys.argv[1]))
"""


@posix
def test_killed_at_any_moment(scanned):
    "Killed four times: the old corpus or none; then what an undisturbed run makes."
    write_features(scanned)
    old = Corpus(scanned).hash
    write_scan(scanned, 90)
    undisturbed = Layout(scanned.root.parent / "undisturbed")
    shutil.copytree(scanned.root, undisturbed.root)
    write_features(undisturbed)
    expected, new = hashes(undisturbed), Corpus(undisturbed).hash
    assert new != old
    for pause in (0.05, 0.15, 0.3, 0.45):
        process = start(IMPORTS + RUN, scanned.root)
        process.stdout.readline()
        time.sleep(pause)
        process.kill()
        process.communicate(timeout=30)
        if scanned.index.exists():
            assert Corpus(scanned).hash in (old, new)
        else:
            assert "run the features stage" in rejection_of(Corpus, scanned)
    write_features(scanned)
    assert hashes(scanned) == expected, "what the kills have left is removed"


@posix
@pytest.mark.parametrize(
    "step, stays",
    [
        ("OriginalityIndex.pack", True),
        ("_publish", True),
        ("Vocab.save", False),
        ("write_atomic", False),
    ],
)
def test_killed_at_each_step(scanned, step, stays):
    "Until the exchange the old corpus stays; from there on there is none, until the new is whole."
    write_features(scanned)
    old = Corpus(scanned).hash
    write_scan(scanned, 50)
    kill = f"dataset.{step} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"
    process = start(IMPORTS + kill + RUN, scanned.root)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    if stays:
        assert Corpus(scanned).hash == old
    else:
        assert "run the features stage" in rejection_of(Corpus, scanned)
    write_features(scanned)
    assert len(Corpus(scanned).lines) == 50 == len(list(scanned.tokens.rglob("*.npy")))
    assert sorted(p.name for p in scanned.processed.iterdir()) == sorted(
        [scanned.tokens.name] + [getattr(scanned, name).name for name in FILES]
    )


@posix
@pytest.mark.parametrize("limit", [300, 4_000])
def test_a_full_disk_keeps_the_old_corpus(scanned, limit):
    "No space for a piece, or not for all of them: the old corpus stays, and nothing else is left."
    write_features(scanned)
    before = hashes(scanned)
    small_disk = f"""
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))
try:
    write_features(Layout(sys.argv[1]))
except OSError as e:
    print(type(e).__name__)
"""
    output, errors = start(IMPORTS + small_disk, scanned.root).communicate(timeout=60)
    assert output.endswith("OSError\n"), errors
    assert hashes(scanned) == before and len(Corpus(scanned).lines) == 60


# Files that were repaired.


def test_odd_files_are_read_as_they_were_scanned(root):
    "A wrapped file, a name in an old alphabet, a tail: what the scan repaired is repaired again."
    notes = [(480 * k, 0, 60 + k % 7, 480, 90) for k in range(20)]
    data = write_midi(make_score(notes, [Part(40, "Fur Elise")]))
    odd = dict(
        rmi=b"RIFF\0\0\0\0RMIDdata\0\0\0\0" + data,
        latin=data.replace(b"Fur", b"F\xfcr"),
        tail=data + b"junk",
        loud=data.replace(b"\x3c\x5a", b"\x3c\xda", 1),
        sound=data,
    )
    for k, (name, content) in enumerate(odd.items()):
        own = content.replace(bytes((0xC0, 40)), bytes((0xC0, 30 + k)))  # or they were one piece
        write_atomic(root.raw / f"mine/{name}.mid", own)
    preprocess(root, workers=1, min_pieces=1)
    reasons = {row["path"]: row["reason"] for row in scan_rows(root) if row["verdict"] == "ok"}
    sound = [path for path, reason in reasons.items() if not reason.startswith("mended: ")]
    assert sound == ["mine/sound.mid"]
    assert write_features(root, workers=1)[0]["pieces"] == len(reasons) == 5


# Memory.

PEAK = """
import re
from pathlib import Path
write_features(Layout(sys.argv[1]), workers=1)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads a peak of Linux")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    "Eight times the pieces in less than 2.5 MB more; their rows alone are twice that."
    score = make_score([(60 * k, 0, 48 + k % 24, 60, 90) for k in range(700)])
    data, peaks = write_midi(score), []
    for count in (200, 1_600):
        root = Layout(tmp_path / str(count))
        write_atomic(root.raw / "mine/0.mid", data)
        lines = [HEAD]
        digest = hashlib.sha256(data).hexdigest()
        for k in range(count):
            if k:
                os.link(root.raw / "mine/0.mid", root.raw / f"mine/{k}.mid")
            lines.append(f"mine/{k}.mid,ok,,{digest},{'train' if k % 10 == 0 else 'test'},x,1")
        write_atomic(root.scan, "\n".join(lines) + "\n")
        output, errors = start(IMPORTS + PEAK, root.root).communicate(timeout=120)
        assert output, errors
        peaks.append(int(output.split()[-1]) / 1024)
        assert root.corpus.stat().st_size > count * 3_400
    assert peaks[1] - peaks[0] < 2.5, peaks
